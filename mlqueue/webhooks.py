"""Webhooks: what is asked for with ``webhook=``, and `verify` for those who receive them.

A webhook is a POST of JSON to a URL when a job is started, tells of its progress, or ends, with the headers and the
signature of `Standard Webhooks <https://www.standardwebhooks.com>`_::

    from mlqueue.webhooks import verify

    @app.post("/hooks")
    def hook():
        event = verify(request.headers, request.get_data(), SECRET)   # raises SignatureInvalid
        print(event["type"], event["data"]["job_id"])
        return "", 204

This module needs nothing but the standard library, so a receiver that has no jobs may use it, too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .errors import InvalidJob, SignatureInvalid
from .urlpolicy import MAX_URL, is_url

__all__ = ["EVENTS", "Webhook", "key_of", "keys_of", "new_secret", "sign", "verify"]

#: The events, each with the letter that the scripts of the store know it by.
EVENTS: Final[Mapping[str, str]] = {"started": "r", "progress": "p", "completed": "s", "failed": "d", "cancelled": "c"}

#: The events that are told of when nothing else is asked for: the ends.
ENDS: Final = ("completed", "failed", "cancelled")

#: What a secret begins with.
PREFIX: Final = "whsec_"

#: How many bytes a secret has.
SECRET_BYTES: Final = range(24, 65)

#: What a signature begins with: the version of the scheme.
VERSION: Final = "v1"


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where a job is told of, and what: ``train.submit(0.1, webhook=Webhook("https://example.com/hooks"))``."""

    url: str
    #: Which events: ``started``, ``progress``, ``completed``, ``failed``, ``cancelled``.
    events: Sequence[str] = ENDS
    #: The shortest time between two events of progress, in seconds; what comes between is told of with the next.
    progress_every: float = 5.0

    def __post_init__(self) -> None:
        if not is_url(self.url):
            raise InvalidJob(
                f"webhook {self.url!r}: it must be a URL, http:// or https:// with a host and without a user, of at "
                f"most {MAX_URL:,} characters."
            )
        events = self.events
        if isinstance(events, str) or not isinstance(events, Sequence) or not events or not set(events) <= set(EVENTS):
            raise InvalidJob(f"webhook events={events!r}: give a list of one or more of {', '.join(EVENTS)}.")
        every = self.progress_every
        if isinstance(every, bool) or not isinstance(every, int | float) or not 0.1 <= every <= 86400:
            raise InvalidJob(f"webhook progress_every={every!r}: it must be a number of seconds from 0.1 to 86,400.")
        object.__setattr__(self, "events", tuple(name for name in EVENTS if name in events))

    @classmethod
    def of(cls, given: object) -> Webhook:
        """What was given as ``webhook=``: a URL, a `Webhook`, or a dict of its fields. Raises `InvalidJob`."""
        if isinstance(given, Webhook):
            return given
        if isinstance(given, Mapping) and given.keys() <= {"url", "events", "progress_every"} and "url" in given:
            return cls(**given)
        if isinstance(given, str):
            return cls(given)
        raise InvalidJob(f"webhook={given!r}: give a URL, or Webhook(url, events=[...]).")

    def asdict(self) -> dict[str, Any]:
        """The fields, as JSON and messages carry them."""
        return {"url": self.url, "events": list(self.events), "progress_every": self.progress_every}


def new_secret() -> str:
    """A new secret for ``MLQUEUE_WEBHOOK_SECRET``, and for who receives: ``whsec_`` and 32 random bytes in base64."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def keys_of(given: str | Sequence[str]) -> tuple[bytes, ...]:
    """The keys of one secret or several: a list, or a text in which they are parted by commas. Raises ValueError."""
    texts = given.split(",") if isinstance(given, str) else given
    found = tuple(key_of(text.strip()) for text in texts if text.strip())
    if not found:
        raise ValueError("there is none in it; mlqueue.webhooks.new_secret() makes one")
    return found


def key_of(secret: str) -> bytes:
    """The key in a secret. Raises ValueError, which says nothing of the secret itself."""
    try:
        text = secret.removeprefix(PREFIX).rstrip("=")
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) not in SECRET_BYTES:
        raise ValueError(
            f"a secret is {PREFIX} and the base64 of {SECRET_BYTES[0]} to {SECRET_BYTES[-1]} random bytes; "
            "mlqueue.webhooks.new_secret() makes one"
        )
    return key


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The signature of a message, as it stands in the header ``webhook-signature``."""
    content = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    return f"{VERSION},{base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()}"


def verify(
    headers: Mapping[str, str], body: bytes | str, secret: str | Sequence[str], tolerance: float = 300
) -> dict[str, Any]:
    """What a webhook tells, if it was signed with the secret, and not long ago.

    Parameters:
      headers: The headers of the request, in whatever case.
      body: The body, exactly as it came: JSON that was parsed and written again has another signature.
      secret: The secret, or several of which one must have signed: a list, or a text parted by commas.
      tolerance: How far its time may be from the clock here, in seconds. What is older may be a message that somebody
        has kept and sends again; within that time ``webhook-id``, the same for each try, tells the second from the
        first.

    Raises `SignatureInvalid`, and ValueError for a secret that is none.
    """
    keys = keys_of(secret)
    given = {name.lower(): value for name, value in headers.items()}
    data = body.encode() if isinstance(body, str) else bytes(body)
    missing = [name for name in ("webhook-id", "webhook-timestamp", "webhook-signature") if not given.get(name)]
    if missing:
        raise SignatureInvalid(
            f"this webhook lacks {', '.join(missing)}: whoever sent it does not sign. The workers sign when "
            "MLQUEUE_WEBHOOK_SECRET is set for them."
        )
    timestamp = _timestamp(given["webhook-timestamp"], tolerance)
    expected = [sign(key, given["webhook-id"], timestamp, data) for key in keys]
    signatures = given["webhook-signature"].split()
    # All are compared, so that the time taken does not tell which secret it was.
    if not sum(hmac.compare_digest(one.encode(), other.encode()) for one in expected for other in signatures):
        raise SignatureInvalid(
            "the signature of this webhook is of none of the secrets given here, or its body is not as it was sent. "
            "Give verify() the bytes of the body, and the secret that the workers have in MLQUEUE_WEBHOOK_SECRET."
        )
    told: dict[str, Any] = json.loads(data)
    return told


def _timestamp(text: str, tolerance: float) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise SignatureInvalid("the webhook-timestamp of this webhook is no number of Unix seconds.")
    away = time.time() - int(text)
    if abs(away) > tolerance:
        raise SignatureInvalid(
            f"this webhook was signed {abs(away):.0f} s {'ago' if away > 0 else 'in the future'}; {tolerance:g} s are "
            "allowed. It is one that was sent before, or a clock is wrong."
        )
    return int(text)
