"""From what the scripts answer to the records of `mlqueue.job`, and from new jobs to what the scripts take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote as _quote
from urllib.parse import unquote as _unquote

import msgpack

from .. import codec
from ..errors import InvalidJob
from ..job import (
    Attempt,
    CallbackAttempt,
    CallbackState,
    DeadReason,
    JobError,
    JobRecord,
    NewJob,
    SavedCheckpoint,
    State,
    Usage,
)
from ..webhooks import EVENTS, Webhook

#: A checkpoint as the scripts take it: size, value, number of chunks (0: it is the value), generation.
Checkpoint = tuple[int, bytes | memoryview, int, str]

#: The letters that the scripts know the states by.
LETTERS: Final = {
    State.QUEUED: "q",
    State.SCHEDULED: "w",
    State.RUNNING: "r",
    State.SUCCEEDED: "s",
    State.DEAD: "d",
    State.CANCELLED: "c",
}
STATES: Final = {letter.encode(): state for state, letter in LETTERS.items()}

#: The queue in which callbacks wait to be delivered, and the actor that delivers them.
CALLBACKS: Final = "mlqueue.callbacks"
CALLBACK: Final = "mlqueue.callback"

#: The letters that the scripts know a callback's states by.
CALLBACK_STATES: Final = {b"p": CallbackState.PENDING, b"d": CallbackState.DELIVERED, b"f": CallbackState.FAILED}

#: The events of webhooks by the letters that the scripts know them by.
EVENT_NAMES: Final = {letter: name for name, letter in EVENTS.items()}

#: The lowest and the highest priority: with the job's number it must fit a sorted set's score.
PRIORITIES: Final = range(-1000, 1001)


#: A body of so many bytes is large.
LARGE: Final = 32 * 2**10

#: Where the body stands among what `new_item` gives.
BODY: Final = 7


def pack(value: object) -> bytes:
    """MessagePack as the scripts read it: they know no type for binary, a string is its bytes."""
    packed: bytes = msgpack.Packer(use_bin_type=False, buf_size=1024).pack(value)
    return packed


def quote(name: str) -> str:
    """A name as a part of a key: percent-encoded outside ``[A-Za-z0-9._-]``."""
    return name if name.isascii() and name.isidentifier() else _quote(name, safe="").replace("~", "%7E")


def unquote(name: bytes) -> str:
    text = name.decode()
    return _unquote(text) if "%" in text else text


def lane_of(actor: str, functions: Sequence[str], *, turns: bool = False) -> str:
    """The lane of a job, quoted: the jobs that the same workers can run. `turns`: they take turns there."""
    if not functions and not turns:
        return quote(actor)
    return f"{quote(actor)}|{','.join(quote(name) for name in functions)}{'@' if turns else ''}"


def functions_of(lane: str) -> tuple[str, ...]:
    """The functions that a lane, quoted, asks for."""
    names = lane.partition("|")[2].removesuffix("@")
    return tuple(_unquote(name) for name in names.split(",")) if names else ()


def milliseconds(value: float | None) -> int:
    """Seconds as the scripts take them; -1 for None."""
    return -1 if value is None else round(value * 1000)


def pack_new(job: NewJob) -> tuple[bytes, ...]:
    """A new job as enqueue.lua takes it: in one part, or a large body apart from the rest: within, it would be copied
    three times more, here and in the server."""
    item = new_item(job)
    if len(job.body) < LARGE:
        return (pack(item),)
    item[BODY] = False
    return pack(item), job.body


def new_item(job: NewJob) -> list[object]:
    if job.priority not in PRIORITIES:
        raise InvalidJob(f"priority={job.priority!r}: a priority is an int from -1,000 to 1,000; lower runs first.")
    actor = quote(job.actor)
    group = f"{quote(job.concurrency_key or '')}/{quote(job.fair_by or '')}" if job.takes_turns else None
    item = [
        job.id,
        quote(job.queue),
        actor,
        lane_of(job.actor, job.functions, turns=group is not None) if job.functions or group else actor,
        job.priority,
        milliseconds(job.delay),
        milliseconds(job.eta),
        job.body,
        milliseconds(job.result_ttl),
        job.parent or "",
        [quote(tag) for tag in job.tags] or False,
        job.max_crashes or False,
        job.max_stalls or False,
        _to_call(job) if job.webhook else job.callback or False,
        False if job.job_timeout is None else milliseconds(job.job_timeout),
        False if job.queue_timeout is None else milliseconds(job.queue_timeout),
    ]
    if group or job.unique_key is not None:
        item += [group or False, _unique_item(job)]
    return item


def _unique_item(job: NewJob) -> object:
    if job.unique_key is None:
        return False
    holds = job.unique_for
    scope = {"queued": "q", "active": "a"}[holds] if isinstance(holds, str) else milliseconds(holds)
    return [quote(job.unique_key), scope, job.unique_policy]


def _to_call(job: NewJob) -> list[object]:
    """What is to be called for a job with a webhook."""
    assert job.webhook is not None
    letters = "".join(EVENTS[name] for name in job.webhook.events)
    return [job.callback or False, job.webhook.url, letters, milliseconds(job.webhook.progress_every)]


def pack_dead(
    job: NewJob, record: JobRecord, checkpoint: tuple[int, bytes | memoryview, int, str] | None = None
) -> bytes:
    """A dead job and what is known of it, as import.lua takes it; `checkpoint` as `Store.write_checkpoint` gives it."""
    fields: dict[str, object] = {
        "k": record.attempt,
        "y": record.retries,
        "x": record.crashes,
        "z": record.stalls,
        "O": record.timeouts,
        "t": milliseconds(record.created_at),
        "g": str(record.dead_reason or DeadReason.FAILED),
    }
    if job.unique_key is not None:
        # It stands in nobody's way as long as it is dead, and nobody in its: the key counts when it is put back.
        fields["D"] = quote(job.unique_key)
        job = dataclasses.replace(job, unique_key=None)
    if record.worker is not None:
        fields["w"] = record.worker
    if record.started_at is not None:
        fields["u"] = milliseconds(record.started_at)
    if record.usage is not None:
        fields["e"] = pack_usage(record.usage, record.attempt)
    if record.resumed_from is not None:
        fields["R"] = _saved_text(record.resumed_from)
    if record.progress is not None:
        fields |= {"v": codec.encode(record.progress), "V": record.progress_note or ""}
    return pack(
        [
            new_item(job),
            [part for field in fields.items() for part in field],
            milliseconds(record.finished_at if record.finished_at is not None else record.created_at),
            encode_error(record.error or JobError(type="", message="")),
            [_pack_attempt(attempt) for attempt in record.attempts],
            *([checkpoint] if checkpoint else []),
        ]
    )


def _pack_attempt(attempt: Attempt) -> bytes:
    error = encode_error(attempt.error) if attempt.error else b""
    return pack(
        [
            attempt.attempt,
            attempt.worker,
            milliseconds(attempt.started_at),
            milliseconds(attempt.ended_at),
            attempt.outcome,
            error,
            attempt.stage or "",
            pack_usage(attempt.usage, attempt.attempt) if attempt.usage else b"",
            *([_saved_text(attempt.resumed_from)] if attempt.resumed_from else []),
        ]
    )


def flat(answer: Sequence[Any]) -> dict[bytes, Any]:
    """A dict of a flat list of keys and values."""
    return dict(zip(answer[::2], answer[1::2], strict=True))


def decode_error(data: bytes) -> JobError | None:
    if not data:
        return None
    kind, message, trace = codec.decode(data)
    return JobError(type=kind, message=message, traceback=trace)


def encode_error(error: JobError) -> bytes:
    return codec.encode([error.type, error.message, error.traceback])


def decode_record(
    job_id: str,
    fields: Mapping[bytes, bytes],
    *,
    result: Mapping[bytes, bytes] | None = None,
    error: bytes = b"",
    attempts: Sequence[bytes] = (),
    position: int = -1,
    callback: Mapping[bytes, bytes] | None = None,
    tries: Sequence[bytes] = (),
) -> JobRecord:
    """The record of a job from its hash and what lies beside it."""

    def number(name: bytes) -> int:
        return int(fields.get(name, 0))

    def seconds(name: bytes) -> float | None:
        return int(fields[name]) / 1000 if name in fields else None

    short, content_type = _short_result(fields, result or {})
    state = STATES[fields[b"s"]]
    ttl = number(b"T")
    return JobRecord(
        id=job_id,
        state=state,
        queue=unquote(fields[b"q"]),
        actor=unquote(fields[b"a"]),
        created_at=number(b"t") / 1000,
        priority=number(b"p"),
        attempt=number(b"k"),
        retries=number(b"y"),
        crashes=number(b"x"),
        stalls=number(b"z"),
        due_at=seconds(b"d") if state is State.SCHEDULED else None,
        started_at=seconds(b"u"),
        finished_at=seconds(b"f"),
        worker=fields[b"w"].decode() if b"w" in fields else None,
        progress=codec.decode(fields[b"v"]) if b"v" in fields else None,
        progress_note=fields[b"V"].decode() if fields.get(b"V") else None,
        position=position if position >= 0 else None,
        cancel_requested_at=seconds(b"c"),
        dead_reason=DeadReason(fields[b"g"].decode()) if b"g" in fields else None,
        error=decode_error(error),
        parent=fields[b"P"].decode() if b"P" in fields else None,
        tags=tuple(unquote(tag) for tag in msgpack.unpackb(fields[b"G"], raw=True)) if b"G" in fields else (),
        result_ttl=None if ttl < 0 else ttl / 1000,
        has_checkpoint=b"K" in fields,
        short_result=short,
        content_type=content_type,
        attempts=tuple(_attempt(item) for item in attempts),
        functions=functions_of(fields[b"l"].decode()) if b"l" in fields else (),
        timeouts=number(b"O"),
        job_timeout=seconds(b"J"),
        queue_timeout=seconds(b"Q"),
        extended_by=int(fields[b"j"].partition(b" ")[0]) / 1000 if b"j" in fields else 0.0,
        max_crashes=number(b"X") or None,
        max_stalls=number(b"Z") or None,
        waits_for=fields[b"A"].decode() if b"A" in fields else None,
        cancel_stage=fields[b"h"].decode() if b"h" in fields else None,
        slots=decode_slots(fields[b"H"]) if b"H" in fields and state is State.RUNNING else {},
        concurrency_key=_group(fields)[0],
        fair_by=_group(fields)[1],
        unique_key=unquote(fields[b"D"]) if b"D" in fields else None,
        callback=callback[b"u"].decode() if callback and b"u" in callback else None,
        callback_state=CALLBACK_STATES.get(callback.get(b"s", b"")) if callback else None,
        callback_attempts=tuple(_callback_attempt(item) for item in tries),
        usage=decode_usage(fields[b"e"], number(b"k")) if b"e" in fields else None,
        resumed_from=_saved(fields.get(b"R", b"")),
        webhook=_webhook(callback) if callback and b"w" in callback else None,
        webhook_state=CALLBACK_STATES.get(callback.get(b"h", b"")) if callback else None,
    )


def _webhook(callback: Mapping[bytes, bytes]) -> Webhook:
    events = [EVENT_NAMES[letter] for letter in callback[b"e"].decode()]
    return Webhook(callback[b"w"].decode(), events, int(callback[b"m"]) / 1000)


def decode_slots(packed: bytes) -> dict[str, tuple[int, ...]]:
    """The slots of each resource that a job holds."""
    held = msgpack.unpackb(packed, raw=True)
    return {unquote(name): tuple(int(slot) for slot in slots) for name, slots, *_ in held if not name.startswith(b"@")}


def _group(fields: Mapping[bytes, bytes]) -> tuple[str | None, str | None]:
    """The concurrency key, and what the job takes turns by."""
    key, _, value = fields.get(b"E", b"/").partition(b"/")
    return unquote(key) or None, unquote(value) or None


def _short_result(fields: Mapping[bytes, bytes], result: Mapping[bytes, bytes]) -> tuple[Any, str | None]:
    if b"r" in fields:
        short, _, content_type = codec.decode(fields[b"r"])
        return short, content_type
    if result:
        return codec.decode(result[b"s"]), result[b"c"].decode() or None
    return None, None


def _attempt(data: bytes) -> Attempt:
    attempt, worker, started, ended, outcome, error, stage, usage, *resumed = msgpack.unpackb(data, raw=True)
    return Attempt(
        attempt=attempt,
        worker=worker.decode(),
        started_at=started / 1000,
        ended_at=ended / 1000,
        outcome=outcome.decode(),
        error=decode_error(error),
        stage=stage.decode() or None,
        usage=decode_usage(usage, attempt) if usage else None,
        resumed_from=_saved(*resumed[:1]),
    )


def _saved(text: bytes = b"") -> SavedCheckpoint | None:
    """A checkpoint as the records tell of it; an attempt that began from none, or of an older version, says nothing."""
    if not text:
        return None
    attempt, at, size = map(int, text.split())
    return SavedCheckpoint(attempt=attempt, saved_at=at / 1000, size=size)


def _saved_text(saved: SavedCheckpoint | None) -> str:
    return f"{saved.attempt} {milliseconds(saved.saved_at)} {saved.size}" if saved else ""


def pack_usage(usage: Usage, attempt: int) -> bytes:
    """What an attempt used, as it is kept."""
    cpu = None if usage.cpu_seconds is None else round(usage.cpu_seconds * 1000)
    return pack([cpu, usage.peak_memory, usage.gpu_memory, int(usage.alone), attempt])


def decode_usage(data: bytes, attempt: int) -> Usage | None:
    """What an attempt used; None when that was another one."""
    if not data:
        return None
    cpu, memory, gpu, alone, of = msgpack.unpackb(data)
    if of != attempt:
        return None
    seconds = None if cpu is None else cpu / 1000
    return Usage(cpu_seconds=seconds, peak_memory=memory, gpu_memory=gpu, alone=alone == 1)


def pack_callback_attempt(attempt: CallbackAttempt) -> bytes:
    """A try to deliver a callback, as the store keeps it."""
    return codec.encode([attempt.at, attempt.seconds, attempt.status, attempt.error, attempt.worker, attempt.event])


def _callback_attempt(data: bytes) -> CallbackAttempt:
    at, seconds, status, error, worker, *event = codec.decode(data)
    return CallbackAttempt(at=at, seconds=seconds, status=status, error=error, worker=worker, event="".join(event))
