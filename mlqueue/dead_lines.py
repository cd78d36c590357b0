"""A dead letter as a line of JSON, and back.

A line is an object: the fields of the record by their names, ``args``, ``kwargs`` and ``options`` for people to read,
and ``body``, base64, from which the job is made again; ``checkpoint`` likewise, if it has one that is not too large.
Whoever hands in a line is not trusted: what is read is checked field by field, and of the options of the message only
those are taken that say how the job itself is run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from . import codec
from .errors import DecodeError, InvalidJob
from .job import (
    Attempt,
    DeadReason,
    JobError,
    JobRecord,
    NewJob,
    SavedCheckpoint,
    State,
    Usage,
    check_id,
    seconds,
    timestamp,
)
from .message import check_options
from .store.chunks import BodyReference
from .store.records import CALLBACKS, pack_dead
from .values import plain
from .webhooks import Webhook

#: Options that the message of an imported letter may have: those that say how the job itself is run. Dramatiq's others
#: have its end start something else (``pipe_target``, ``on_failure``, ``group_...``); who may hand in a file could have
#: any actor run with them.
IMPORTABLE: Final = frozenset(
    {
        "retries",
        "max_retries",
        "min_backoff",
        "max_backoff",
        "max_age",
        "time_limit",
        "hard_time_limit",
        "kill",
        "job_logs",
        "notify_shutdown",
        "store_results",
        "waits_count",
        "delay",
        "eta",
    }
)

#: Fields of a record that are exported.
EXPORTED: Final = (
    "id",
    "actor",
    "queue",
    "functions",
    "dead_reason",
    "error",
    "attempts",
    "attempt",
    "retries",
    "crashes",
    "stalls",
    "timeouts",
    "created_at",
    "started_at",
    "finished_at",
    "worker",
    "progress",
    "progress_note",
    "priority",
    "tags",
    "parent",
    "callback",
    "webhook",
    "result_ttl",
    "job_timeout",
    "queue_timeout",
    "max_crashes",
    "max_stalls",
    "concurrency_key",
    "fair_by",
    "unique_key",
    "has_checkpoint",
    "resumed_from",
)

#: The largest checkpoint that travels in a line, in bytes.
MAX_CHECKPOINT: Final = 64 * 2**20

#: Those of them that are options of the job; they are checked as such.
OPTIONS: Final = (
    "priority",
    "tags",
    "callback",
    "webhook",
    "functions",
    "result_ttl",
    "job_timeout",
    "queue_timeout",
    "max_crashes",
    "max_stalls",
    "concurrency_key",
    "fair_by",
    "unique_key",
)


def write_line(record: JobRecord, body: bytes | memoryview, checkpoint: bytes | memoryview | None = None) -> str:
    """A dead job with its message, and its checkpoint, as a line."""
    fields = record.asdict()
    entry = {name: fields[name] for name in EXPORTED}
    try:
        args, kwargs, options = codec.decode_call(body)
    except DecodeError:
        entry |= {"args": None, "kwargs": None, "options": None}
    else:
        entry |= {"args": args, "kwargs": kwargs, "options": options}
    whole = plain(entry) | {"body": base64.b64encode(body).decode()}
    if checkpoint is not None:
        whole["checkpoint"] = base64.b64encode(checkpoint).decode()
    return json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n"


#: Writes the parts of a checkpoint: the id of the job and the checkpoint to what `pack_dead` takes of it.
WriteCheckpoint = Callable[[str, bytes], tuple[int, bytes | memoryview, int, str]]


def read_line(
    line: str | bytes,
    max_body: int,
    write_checkpoint: WriteCheckpoint,
    stash: Callable[[str, bytes], bytes] = lambda job_id, body: body,
) -> tuple[str, bytes]:
    """The id of a line's job, and the job as the store takes it (`mlqueue.store.records.pack_dead`). `stash` puts a
    large body beside the record (`Store.stash`). Raises `InvalidJob`."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 included
        raise InvalidJob(f"it is no JSON ({str(error) or type(error).__name__}).") from None
    if not isinstance(entry, dict):
        raise InvalidJob(f"it is JSON, but a {type(entry).__name__}; a dead letter is an object.")
    fields = _read_fields(entry)
    job = NewJob(**fields, body=stash(fields["id"], _read_body(entry, max_body)))
    record, checkpoint = _read_record(entry, fields), _read_checkpoint(entry)
    written = None if checkpoint is None else write_checkpoint(job.id, checkpoint)
    try:
        return job.id, pack_dead(job, record, written)
    except (OverflowError, UnicodeEncodeError) as error:
        raise InvalidJob(f"a number or a text in it cannot be kept ({error}).") from None


def _read_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a job and its record have in common."""
    options = {name: entry[name] for name in OPTIONS if entry.get(name) not in (None, [])}
    check_options(options)
    for name in ("result_ttl", "job_timeout", "queue_timeout"):
        if name in options:
            options[name] = seconds(options[name], name)
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if "webhook" in fields:
        fields["webhook"] = Webhook.of(fields["webhook"])
    if entry.get("id") is None:
        raise InvalidJob("id is missing: it is the id that the job had, by which it is imported once.")
    fields["id"] = check_id(entry["id"])
    for name in ("queue", "actor"):
        fields[name] = _field(entry, name, _is_name, "a text that is not empty")
    if fields["queue"] == CALLBACKS:
        raise InvalidJob(f"the queue {CALLBACKS} is mlqueue's own; what is in it belongs to other jobs.")
    if entry.get("parent") is not None:
        fields["parent"] = check_id(entry["parent"])
    return fields


def _read_body(entry: Mapping[str, Any], most: int) -> bytes:
    text = _field(entry, "body", _is_text, "the message in base64")
    try:
        body = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InvalidJob(f"body is no base64 ({error}).") from None
    if len(body) > most:
        raise InvalidJob(f"body has {len(body):,} bytes; allowed are {most:,} (MLQUEUE_MAX_MESSAGE_BYTES).")
    if BodyReference.of(body) is not None:
        raise InvalidJob("body stands for chunks in the store that it was exported from; export it anew.")
    try:
        _, _, options = codec.decode_call(body)
    except DecodeError:
        return body  # it died of that, and nobody will run it as it is
    foreign = sorted(set(options) - IMPORTABLE)
    if foreign:
        raise InvalidJob(
            f"its message has the options {', '.join(foreign)}, with which nothing is imported; allowed are "
            f"{', '.join(sorted(IMPORTABLE))}. Submit the job anew, or requeue it where it died."
        )
    return body


def _read_checkpoint(entry: Mapping[str, Any]) -> bytes | None:
    if entry.get("checkpoint") is None:
        return None
    text = _field(entry, "checkpoint", _is_text, "the checkpoint in base64, or null")
    if len(text) > 4 * MAX_CHECKPOINT // 3 + 4:
        raise InvalidJob(f"checkpoint has more than {MAX_CHECKPOINT:,} bytes; leave it out.")
    try:
        data = base64.b64decode(text, validate=True)
        codec.decode(data)
    except (ValueError, DecodeError) as error:
        raise InvalidJob(f"checkpoint is none ({error}); leave it out.") from None
    return data


def _read_record(entry: Mapping[str, Any], fields: Mapping[str, Any]) -> JobRecord:
    counts = {
        name: _field(entry, name, _is_count, "an int, 0 or more", 0)
        for name in ("attempt", "retries", "crashes", "stalls", "timeouts")
    }
    times = {name: timestamp(entry.get(name), name) for name in ("created_at", "started_at", "finished_at")}
    if times["created_at"] is None or times["finished_at"] is None:
        raise InvalidJob("created_at and finished_at are Unix seconds; one of them is missing.")
    return JobRecord(
        **fields,
        **counts,
        **times,  # type: ignore[arg-type]
        state=State.DEAD,
        dead_reason=DeadReason(
            _field(entry, "dead_reason", lambda value: value in tuple(DeadReason), f"one of {', '.join(DeadReason)}")
        ),
        worker=_text(entry, "worker"),
        progress=_progress(entry),
        progress_note=_text(entry, "progress_note"),
        error=_read_error(entry),
        resumed_from=_read_saved(entry),
        attempts=tuple(
            map(_read_attempt, _field(entry, "attempts", _are_attempts, "a list of at most 50 objects", []))
        ),
    )


def _read_attempt(entry: Mapping[str, Any]) -> Attempt:
    return Attempt(
        attempt=_field(entry, "attempt", _is_count, "an int, 0 or more"),
        worker=_text(entry, "worker") or "",
        started_at=timestamp(entry.get("started_at"), "started_at") or 0.0,
        ended_at=timestamp(entry.get("ended_at"), "ended_at") or 0.0,
        outcome=_field(entry, "outcome", _is_name, "a text that is not empty"),
        stage=_text(entry, "stage"),
        error=_read_error(entry),
        usage=_read_usage(entry),
        resumed_from=_read_saved(entry),
    )


def _object(entry: Mapping[str, Any], name: str) -> Any:
    return _field(entry, name, lambda value: value is None or isinstance(value, dict), "an object, or null", None)


def _read_saved(entry: Mapping[str, Any]) -> SavedCheckpoint | None:
    saved = _object(entry, "resumed_from")
    if saved is None:
        return None
    at = timestamp(saved.get("saved_at"), "saved_at") or 0.0
    attempt, size = (_field(saved, name, _is_count, "an int, 0 or more") for name in ("attempt", "size"))
    return SavedCheckpoint(attempt=attempt, saved_at=at, size=size)


def _read_usage(entry: Mapping[str, Any]) -> Usage | None:
    usage = _object(entry, "usage")
    if usage is None:
        return None

    def number(name: str) -> int | None:
        given: int | None = _field(usage, name, lambda one: one is None or _is_count(one), "an int, or null", None)
        return given

    cpu = seconds(usage.get("cpu_seconds"), "cpu_seconds")
    memory, gpu = number("peak_memory"), number("gpu_memory")
    return Usage(cpu_seconds=cpu, peak_memory=memory, gpu_memory=gpu, alone=usage.get("alone") is True)


def _read_error(entry: Mapping[str, Any]) -> JobError | None:
    error = _object(entry, "error")
    if error is None:
        return None
    texts = {name: _text(error, name) or "" for name in ("type", "message", "traceback")}
    return JobError(**texts)


def _progress(entry: Mapping[str, Any]) -> int | float | str | None:
    value = entry.get("progress")
    if isinstance(value, dict) and value.get("$float") in ("nan", "inf", "-inf"):
        return float(value["$float"])
    if value is None or (isinstance(value, int | float | str) and not isinstance(value, bool)):
        return value
    raise InvalidJob(f"progress is {_short(value)}; it must be a number, a text or null.")


def _text(entry: Mapping[str, Any], name: str) -> str | None:
    text: str | None = _field(entry, name, lambda value: value is None or _is_text(value), "a text, or null", None)
    return text


#: Stands for a field that has no default.
_NEEDED: Final = object()


def _field(
    entry: Mapping[str, Any], name: str, check: Callable[[Any], bool], must_be: str, default: object = _NEEDED
) -> Any:
    value = entry.get(name, default)
    if value is _NEEDED:
        raise InvalidJob(f"{name} is missing; it must be {must_be}.")
    if not check(value):
        raise InvalidJob(f"{name} is {_short(value)}; it must be {must_be}.")
    return value


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return False
    return True


def _is_name(value: object) -> bool:
    return _is_text(value) and value != ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _are_attempts(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 50 and all(isinstance(item, dict) for item in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


__all__ = ["IMPORTABLE", "read_line", "write_line"]
