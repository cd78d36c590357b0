"""What a webhook tells: a small message, with where the rest is."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from .job import JobRecord, State
from .settings import Settings
from .store.records import EVENT_NAMES
from .values import plain
from .webhooks import keys_of, sign

__all__ = ["Happening", "headers_of", "message_of"]

#: The media type of the messages.
JSON: Final = "application/json"


class Happening(NamedTuple):
    """An event of a job, as its delivery is given it by the script that made it."""

    #: The letter of the event (`mlqueue.webhooks.EVENTS`).
    letter: str
    #: When it was, by the server's clock in Unix milliseconds.
    at_ms: int
    #: The attempt that it belongs to.
    attempt: int
    #: Whether it is told again because somebody has asked for it.
    by_hand: bool = False

    @property
    def name(self) -> str:
        """The name of the event."""
        return EVENT_NAMES[self.letter]

    def is_stale(self, record: JobRecord) -> bool:
        """Whether the job has gone on since, so that another event tells what this one would."""
        if self.letter == "r":
            return False
        states = {"p": State.RUNNING, "s": State.SUCCEEDED, "d": State.DEAD, "c": State.CANCELLED}
        return (record.state, record.attempt) != (states[self.letter], self.attempt)


def message_of(record: JobRecord, event: Happening, settings: Settings, namespace: str) -> bytes:
    """The message as JSON. Never the full result: that may be large, and is nobody's business who has not asked."""
    told: dict[str, Any] = {
        "job_id": record.id,
        "namespace": namespace,
        "actor": record.actor,
        "queue": record.queue,
        "state": "running" if event.letter == "r" else str(record.state),
        "attempt": event.attempt,
    }
    if event.letter == "p":
        told |= {"progress": plain(record.progress), "progress_note": record.progress_note}
    elif event.letter == "s":
        told |= {"short_result": plain(record.short_result), "content_type": record.content_type}
    elif event.letter == "d":
        told |= {"dead_reason": str(record.dead_reason), "error": record.short_text}
    if settings.public_url is not None:
        job = f"{settings.public_url.rstrip('/')}/jobs/{record.id}"
        told["links"] = {"self": job, **({"result": f"{job}/result"} if event.letter == "s" else {})}
    when = datetime.fromtimestamp(event.at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    message = {"type": f"job.{event.name}", "timestamp": when.replace("+00:00", "Z"), "data": told}
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def headers_of(
    root: str, record: JobRecord, event: Happening, body: bytes, now: float, settings: Settings
) -> dict[str, str]:
    """The headers of Standard Webhooks; with a signature for each secret that is set. `root` names the namespace."""
    # The same for every try. Without a dot, which parts what is signed.
    identity = f"{root} {record.id} {event.letter} {event.at_ms} {event.attempt}"
    message_id = f"msg_{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    headers = {"Content-Type": JSON, "webhook-id": message_id, "webhook-timestamp": str(int(now))}
    if settings.webhook_secret is not None:
        signatures = [sign(key, message_id, int(now), body) for key in keys_of(settings.webhook_secret)]
        headers["webhook-signature"] = " ".join(signatures)
    return headers
