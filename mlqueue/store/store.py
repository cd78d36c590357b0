"""The store: one method for each thing that can be done with the jobs of a namespace, one script call for each method.

A `Store` may be used from any thread. Methods raise `StoreUnavailable` when the store cannot be reached within the
settings' ``command_timeout``; what they send may be sent twice without harm, so they retry by themselves until then.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

import msgpack

from .. import codec
from ..errors import (
    EncodeError,
    InvalidJob,
    InvalidTransition,
    JobExists,
    JobNotFound,
    KeyReused,
    MLQueueError,
    ResultMissing,
    StaleAttempt,
    StoreError,
    Unauthorized,
    WaitCycle,
)
from ..job import DeadReason, JobError, JobRecord, NewJob, Result, State
from ..settings import Settings
from .chunks import CHUNK, CHUNK_TTL, BodyReference, Chunks
from .connection import Connector
from .events import Counters, Event, decode_counters, decode_event, place
from .records import (
    CALLBACK,
    CALLBACKS,
    LETTERS,
    STATES,
    decode_error,
    decode_record,
    encode_error,
    flat,
    functions_of,
    lane_of,
    milliseconds,
    new_item,
    pack,
    pack_new,
    quote,
    unquote,
)
from .scripts import Script, script
from .shown import Showing, ShownLines, ShownMetrics, decode_line, decode_points, pack_showings

#: Results of at most so many bytes stand in the record itself (a longer field would unpack the hash).
INLINE: Final = 64

#: How many bytes of a job's log are kept where the settings keep none, and its actor does.
LOG_BYTES: Final = 256 * 2**10

#: How many jobs one call of `submit` carries at most.
SUBMIT_BATCH: Final = 500

#: How many bytes, unless a single job has more.
SUBMIT_BYTES: Final = 8 * 2**20

#: How many jobs one call forgets at most: they hold up the server's other callers.
REMOVE_BATCH: Final = 500

#: For how long it is remembered how a pool that prepares batches fares, in seconds.
POOL_TTL: Final = 15.0

#: How many notes of what people did are kept.
MOST_ACTS: Final = 1000

#: The states that a job can be forgotten in.
NOT_RUNNING: Final = tuple(state for state in State if state is not State.RUNNING)

#: A gap of so many seconds between two sweeps is nobody's fault: leases are renewed instead of ended.
GAP: Final = 5.0


#: What is read of a job for its full record (see part_look.lua), and for one without attempts and callback.
FULL: Final = "sepac"
BRIEF: Final = "sep"

#: What is said to who comes without an API key, and with one that is not, or no longer, known.
KEY_CURE: Final = "send `Authorization: Bearer mlq_...` with a key that `mlqueue key new` has made."
KEY_REFUSED: Final = f"this key is not valid, or has been revoked; {KEY_CURE}"

#: An API key as it was when it was looked at last: its id, and what the store knew of it. A call that takes one looks
#: whether that is so still, in the script that does the rest.
SeenKey = tuple[str, bytes]


class Submitted(NamedTuple):
    """What `Store.submit_once` did."""

    #: The jobs, created now or when the key came first; of a unique job it may be another one that has its key.
    ids: list[str]
    #: Whether this is the first time that the key comes.
    new: bool
    #: The full record of the first one, where it was asked for.
    record: JobRecord | None


class Held(NamedTuple):
    """A job in the hands of a worker, as `Store.turn` gives it. Times are Unix milliseconds."""

    id: str
    queue: str
    actor: str
    attempt: int
    created_ms: int
    retries: int
    body: bytes
    crashes: int
    stalls: int
    priority: int
    parent: str
    has_checkpoint: bool
    started_ms: int
    #: Whether it is to run with no other job beside it, because processes died with it.
    alone: bool
    #: The functions that it is for (MLQ's listeners); empty where all are to run.
    functions: tuple[str, ...]
    #: The slots that it holds, packed; see `records.decode_slots`.
    slots: bytes = b""


class Turn(NamedTuple):
    """What a worker's turn answered."""

    #: The server's clock, Unix milliseconds.
    now_ms: int
    #: Milliseconds until the next scheduled job is due; -1 when there is none.
    next_due_ms: int
    #: Settles that were not accepted: position in the request, and ``stale`` or ``error ...``.
    refused: list[tuple[int, str]]
    jobs: list[Held]
    #: Whether jobs that this worker could run were left for want of a free thread.
    left: bool
    #: Whether the store knows this worker's info; if not it was released, and says hello again.
    known: bool
    #: How many callbacks wait to be delivered.
    callbacks: int


class Settle:
    """The end of an attempt, frozen into the bytes that the script takes. Made by the class methods, one a verb."""

    __slots__ = ("attempt", "id", "journal", "packed", "verb")

    def __init__(self, job_id: str, attempt: int, verb: str, packed: bytes) -> None:
        self.id = job_id
        self.attempt = attempt
        self.verb = verb
        self.packed = packed
        #: What the attempt has shown of itself, as far as that is to be written before its end; None when it is.
        self.journal: Any = None

    @classmethod
    def finish(cls, job_id: str, attempt: int, result: StoredResult, common: Common) -> Settle:
        """It succeeded."""
        tail = result.fields
        return cls(job_id, attempt, "f", pack((job_id, attempt, "f", *common, *tail)))

    @classmethod
    def reschedule(
        cls,
        job_id: str,
        attempt: int,
        delay: float,
        error: JobError,
        common: Common,
        *,
        counts: bool = True,
        stage: str = "",
    ) -> Settle:
        """It is to run again in `delay` seconds; `counts` as a retry. `stage`: how a limit ended it, if one did."""
        tail = (milliseconds(delay), encode_error(error), int(counts), *filter(None, [stage]))
        return cls(job_id, attempt, "r", pack((job_id, attempt, "r", *common, *tail)))

    @classmethod
    def bury(
        cls, job_id: str, attempt: int, reason: str, error: JobError, common: Common, *, stage: str = ""
    ) -> Settle:
        """It is dead. `stage`: how a limit ended it, if one did."""
        tail = (str(reason), encode_error(error), *filter(None, [stage]))
        return cls(job_id, attempt, "b", pack((job_id, attempt, "b", *common, *tail)))

    @classmethod
    def give_back(cls, job_id: str, attempt: int, common: Common, *, begun: bool = True, delay: float = 0.0) -> Settle:
        """It goes back to its queue without a strike, to be run in `delay` seconds; `begun`: its attempt had."""
        return cls(job_id, attempt, "l", pack((job_id, attempt, "l", *common, int(not begun), milliseconds(delay))))

    @classmethod
    def cancelled(cls, job_id: str, attempt: int, common: Common) -> Settle:
        """It heeded its cancelling."""
        return cls(job_id, attempt, "c", pack((job_id, attempt, "c", *common)))


#: What every settle carries: progress value, progress note, jobs to create with it, group to complete with it.
Common = tuple[object, object, object, object]


def common_of(
    progress: tuple[bytes, str] | None = None,
    spawned: Sequence[NewJob] = (),
    group: tuple[str, Sequence[NewJob]] | None = None,
) -> Common:
    """The `Common` of a settle."""
    value, note = progress or (False, False)
    group_item = [group[0], [new_item(job) for job in group[1]]] if group else False
    return value, note, [new_item(job) for job in spawned] if spawned else False, group_item


class StoredResult(NamedTuple):
    """A result, encoded. `chunks` are written before the settle that names them."""

    #: inline, short, content type, full, number of chunks, size: as the script's verb ``f`` takes them.
    fields: tuple[object, ...]
    chunks: Sequence[bytes] = ()


def encode_result(result: Result, max_bytes: int = 512 * 2**20) -> StoredResult:
    """A result as the store keeps it. Raises `EncodeError` with the path to what cannot be kept."""
    short, full, content_type = result.short, result.full, result.content_type
    inline = None
    if not isinstance(full, bytes | bytearray | memoryview) or len(full) <= INLINE:
        encoded = codec.encode(full, path="result", max_bytes=max_bytes)
        if len(encoded) < INLINE:
            inline = codec.encode([short, full, content_type], path="result")
            if len(inline) <= INLINE:
                return StoredResult((inline, False, False, False, 0, 0))
    else:
        if len(full) > max_bytes:
            raise EncodeError(
                f"result: {len(full):,} bytes; a result may have {max_bytes:,} (MLQUEUE_MAX_RESULT_BYTES). "
                "Store it elsewhere and return where.",
                path="result",
            )
        encoded = codec.encode(full, path="result", max_bytes=max_bytes + 16)
    head = (False, codec.encode(short, path="result"), content_type or "")
    if len(encoded) <= CHUNK:
        return StoredResult((*head, encoded, 0, len(encoded)))
    chunks = Chunks(encoded)
    return StoredResult((*head, False, len(chunks), len(encoded)), chunks)


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """A page of a listing, newest first."""

    jobs: list[JobRecord]
    #: What to pass as ``cursor`` for the next page; None when this was the last.
    cursor: int | None

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[JobRecord]:
        return iter(self.jobs)

    def __getitem__(self, index: int) -> JobRecord:
        return self.jobs[index]


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker's process, as it described itself when it started."""

    id: str
    #: Seconds until its lease ends unless it is renewed.
    lease_left: float
    #: host, pid, started_at, threads, queues, actors, supervisor.
    info: dict[str, Any]
    #: Ids of the jobs that it holds.
    jobs: tuple[str, ...]
    #: What its process takes, as its supervisor measures it: rss (bytes), cpu (of one core), seat, restarts, supervisor
    #: (process id). Empty where nobody measures.
    vitals: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: How many seconds ago that was told; None for never.
    vitals_age: float | None = None
    #: What has been asked of it: ``drain``, ``stop``, or nothing.
    asked: str = ""


class Store:
    """The jobs of one namespace."""

    def __init__(self, connector: Connector, namespace: str, settings: Settings) -> None:
        if not isinstance(namespace, str) or not namespace or len(namespace) > 128:
            raise InvalidJob(f"namespace {namespace!r}: the name of a queue is a str of 1 to 128 characters.")
        self.namespace = namespace
        self.settings = settings
        #: What all keys begin with; the braces keep them in one hash slot.
        self.root = f"mlq:{{{quote(namespace)}}}"
        self.connector = connector.for_root(self.root)
        self._clock_offset = 0.0

    # Submitting

    def submit(self, jobs: Sequence[NewJob]) -> list[bool]:
        """Creates jobs; for each whether it was new. An id that exists is left as it is, so this may be repeated."""
        return [made == 1 for made in self._create(jobs)]

    def submit_unique(self, jobs: Sequence[NewJob]) -> list[str]:
        """Creates jobs some of which have a unique key: for each its id, or that of the job that stays the only one.

        Raises `JobExists` where one is rejected; then, of some hundred at least, none is created.
        """
        made = self._create(jobs, "enqueue_unique")
        return [one[1:].decode() if isinstance(one, bytes) else job.id for job, one in zip(jobs, made, strict=True)]

    def _create(self, jobs: Sequence[NewJob], name: str = "enqueue") -> list[int | bytes]:
        created: list[int | bytes] = []
        for batch in _batches([pack_new(self.stashed(job)) for job in jobs]):
            answer = self._run(name, *chain.from_iterable(batch))
            if isinstance(answer, bytes):
                raise JobExists.of(answer[1:].decode())
            for made in answer:
                if isinstance(made, bytes) and not made.startswith(b"="):
                    raise StoreError(f"the store would not take a job: {made.decode(errors='replace')}")
            created += answer
        return created

    def submit_once(
        self,
        jobs: Sequence[NewJob],
        key: str,
        fingerprint: bytes,
        holds: float,
        *,
        seen: SeenKey | None = None,
        wants_record: bool = False,
    ) -> Submitted:
        """Creates jobs, in one call, unless `key` has come within the last `holds` seconds. With an empty key jobs are
        created. The id is that of another job where that stays the only one with its unique key.

        Raises `KeyReused` when the key came with another `fingerprint` then, `Unauthorized` unless the API key `seen`
        is as it was, and `JobExists` where a unique job is rejected.
        """
        if not key and seen is None and not wants_record:
            if any(job.unique_key is not None for job in jobs):
                return Submitted(self.submit_unique(jobs), True, None)
            self.submit(jobs)
            return Submitted([job.id for job in jobs], True, None)
        answer = self._run(
            "enqueue_once",
            *(key, fingerprint, milliseconds(holds), *(seen or ("", b"")), FULL if wants_record else ""),
            *chain.from_iterable(pack_new(self.stashed(job)) for job in jobs),
        )
        if isinstance(answer, bytes):
            raise JobExists.of(answer[1:].decode())
        if answer == 0:
            raise KeyReused
        if answer == 1:
            raise Unauthorized(KEY_REFUSED)
        ids, record, new = answer
        found = [job_id.decode() for job_id in ids]
        if wants_record and record is None:
            raise JobNotFound.of(found[0], self.namespace)  # of the first time, and forgotten since
        return Submitted(found, new == 1, _record(found[0], record) if wants_record else None)

    def stashed(self, job: NewJob) -> NewJob:
        """A job as it may be created: a large body is written in chunks, and a reference stands for it."""
        return job if len(job.body) <= CHUNK else dataclasses.replace(job, body=self.stash(job.id, job.body))

    def stash(self, job_id: str, body: bytes) -> bytes:
        """A body as the scripts take it: itself, or a reference to its chunks, which are written here."""
        if len(body) <= CHUNK:
            return body
        chunks = Chunks(body)
        reference = BodyReference(uuid.uuid4().hex[:12], len(chunks), len(body))
        self.write_chunks(job_id, reference.what, chunks)
        return reference.packed()

    def whole_body(self, job_id: str, body: bytes) -> bytes | memoryview:
        """A body, joined from its chunks where it is a reference. Raises `ResultMissing` when one of them is gone."""
        reference = BodyReference.of(body)
        if reference is None:
            return body
        return self._join_chunks(job_id, reference.what, reference.number, reference.size)

    # The worker's side

    def start_worker(
        self,
        worker: str,
        info: dict[str, Any],
        actors: Mapping[str, str],
        published: Mapping[str, bytes] | None = None,
        keys: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        """Makes a worker incarnation known, with the queue of each actor that it knows, and gives it a lease.

        `published` is what web processes are told of those actors that they may submit jobs of; `keys` the names of
        the keys that actors make of the arguments.
        """
        known, made = published or {}, keys or {}
        parts = [
            part
            for actor, queue in actors.items()
            for part in (actor, " ".join((queue, *sorted(made.get(actor, ())))), known.get(actor, b""))
        ]
        self._run("start_worker", worker, milliseconds(self.settings.lease), codec.encode(info), *parts)

    def published(self, actor: str) -> bytes | None:
        """What a worker has told of an actor that may be called over HTTP, encoded: its ``queue``, its ``defaults``,
        and its signature (see `mlqueue.schema.signature_of`). None for any other actor."""
        data: bytes | None = self.connector.execute("HGET", f"{self.root}:http", actor)
        return data

    def all_published(self) -> dict[str, bytes]:
        """What `published` gives, of every actor."""
        found = flat(self.connector.execute("HGETALL", f"{self.root}:http"))
        return {name.decode(): data for name, data in found.items()}

    def queue_of(self, actor: str) -> str | None:
        """The queue of an actor that some worker has declared; None when none has."""
        return self.declared(actor)[0]

    def declared(self, actor: str) -> tuple[str | None, list[str]]:
        """The queue of an actor that some worker has declared, None when none has; and the names of the keys that it
        makes of the arguments of its jobs, which who has not its code has to give."""
        found: bytes | None = self.connector.execute("HGET", f"{self.root}:actors", actor)
        if found is None:
            return None, []
        queue, *keys = found.decode().split(" ")  # no queue has a space in its name
        return queue, keys

    def turn_command(
        self,
        worker: str,
        nonce: str,
        want: int,
        lanes: Sequence[tuple[str, str]],
        settles: Sequence[Settle],
        *,
        only_alone: bool = False,
        poke: bool = False,
    ) -> tuple[Any, ...]:
        """The command for a worker's turn. `lanes` are pairs of queue and lane, quoted (`lane`);
        `poke` puts a token on the worker's own bell."""
        names = [part for lane in lanes for part in lane]
        return (
            *self.command("turn"),
            worker,
            nonce,
            want,
            milliseconds(self.settings.lease),
            int(only_alone) + 2 * int(poke),
            len(lanes),
            *names,
            *[settle.packed for settle in settles],
        )

    def read_turn(self, answer: list[Any]) -> Turn:
        """What a turn answered."""
        now, next_due, refused, jobs, left, known, callbacks = answer
        self._clock_offset = now / 1000 - time.time()
        return Turn(now, next_due, _refusals(refused), [_held(job) for job in jobs], left == 1, known == 1, callbacks)

    def await_job(
        self,
        waiter: tuple[str, int],
        target: str,
        bell: str,
        *,
        worker: str,
        nonce: str,
        may_start: bool,
        lanes: Sequence[tuple[str, str]],
    ) -> Awaited:
        """Has a job, `waiter` (id and attempt), wait for another one, which its worker is given if that may start it.

        Raises `JobNotFound`, and `WaitCycle` when nobody would ever go on.
        """
        names = [part for lane in lanes for part in lane]
        answer = self._run("await", *waiter, target, bell, worker, nonce, int(may_start), *names)
        if answer is None:
            raise JobNotFound.of(target, self.namespace)
        letter, chain, jobs, holder = answer
        if chain:
            raise WaitCycle.of([job_id.decode() for job_id in chain])
        return Awaited(STATES[letter], [_held(job) for job in jobs], holder.decode())

    def stop_awaiting(self, waiter: tuple[str, int]) -> None:
        """A job (id and attempt) waits for no other any more."""
        self._run("unawait", *waiter)

    def claim_callbacks(self, worker: str, nonce: str, limit: int) -> list[Held]:
        """Starts callbacks that wait to be delivered; called with the same nonce again it gives the same."""
        return [_held(job) for job in self._run("claim", worker, nonce, limit)]

    def function_lanes(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Lanes with a list of functions, or whose jobs take turns: queue and lane, quoted, and the functions."""
        lanes = []
        for name in self.connector.execute("SMEMBERS", f"{self.root}:fl"):
            queue, _, lane = name.decode().partition(":")
            lanes.append((queue, lane, functions_of(lane)))
        return sorted(lanes)

    def settle(self, settles: Sequence[Settle]) -> list[tuple[int, str]]:
        """Settles jobs outside a turn; those that were refused: position, and ``stale`` or ``error ...``."""
        return _refusals(self._run("settle", *[settle.packed for settle in settles]))

    def lane(self, queue: str, actor: str, functions: Sequence[str] = (), *, turns: bool = False) -> tuple[str, str]:
        """A lane, quoted, as turns and bells take it."""
        return quote(queue), lane_of(actor, functions, turns=turns)

    def bell(self, lane: tuple[str, str]) -> str:
        """The key of a lane's doorbell."""
        return f"{self.root}:bell:{lane[0]}:{lane[1]}"

    @property
    def callback_bell(self) -> str:
        """The key of the doorbell that callbacks ring."""
        return self.bell((CALLBACKS, CALLBACK))

    def own_bell(self, name: str) -> str:
        """The key of a worker's or waiter's own bell."""
        return f"{self.root}:wb:{name}"

    def command(self, name: str) -> tuple[Any, ...]:
        """The beginning of the command that runs a script, for one who sends it over a connection of his own."""
        return "EVALSHA", script(name).sha, 1, self.root

    def write_chunks(self, job_id: str, what: str, chunks: Sequence[bytes]) -> None:
        """Writes the chunks of a blob ahead of the script that makes them part of a job; they go if none does."""
        for number, chunk in enumerate(chunks):
            self.connector.execute("SET", self._chunk_key(job_id, what, number), chunk, "EX", CHUNK_TTL)

    def touch(self, items: Sequence[tuple[str, int, bytes, str]]) -> list[int]:
        """Writes progress (id, attempt, encoded value, note): for each 0 stale, 1 written, 2 cancelling asked for."""
        answer: list[int] = self._run("touch", *[part for item in items for part in item])
        return answer

    def show(self, showings: Sequence[Showing], patience: float | None = None) -> list[int | str]:
        """Writes what running jobs show of themselves: for each 0 stale, 1 written, 2 cancelling asked for, or why not.

        `patience` as of `Connector.run`. May be sent again.
        """
        most = self.settings.job_logs or LOG_BYTES
        answer = self.connector.run(script("show"), self.root, most, *pack_showings(showings), patience=patience)
        return [item.decode(errors="replace") if isinstance(item, bytes) else item for item in answer]

    def log(self, job_id: str, first: int = 0, limit: int = 1000) -> ShownLines:
        """Lines of the log of a job from number `first` on (below 0: the last so many), at most `limit`. Those that are
        not kept any more are left out."""
        answer = self._run("shown", job_id, "l", first, limit)
        if answer is None:
            raise JobNotFound.of(job_id, self.namespace)
        letter, number, items = answer
        lines = [decode_line(number + index, item) for index, item in enumerate(items)]
        return ShownLines(lines, number + len(lines), STATES[letter].ended)

    def metrics(self, job_id: str, after: float = 0.0) -> ShownMetrics:
        """The metrics of a job; of their points those logged after a time."""
        answer = self._run("shown", job_id, "m", repr(after))
        if answer is None:
            raise JobNotFound.of(job_id, self.namespace)
        letter, attempt, found = answer
        points = {name.decode(errors="replace"): decode_points(data) for name, data in sorted(flat(found).items())}
        return ShownMetrics(points, attempt, STATES[letter].ended)

    def stored_metrics(self, job_id: str) -> dict[str, bytes]:
        """What is kept of the metrics of a job, for who goes on with them (`Series`)."""
        found = flat(self.connector.execute("HGETALL", f"{self.root}:me:{job_id}"))
        return {name.decode(errors="replace"): data for name, data in found.items()}

    def save_checkpoint(self, job_id: str, attempt: int, data: bytes, generation: str) -> bool:
        """Keeps `data` with the job until it succeeds; True when cancelling has been asked for."""
        size, value, chunks, _ = self.write_checkpoint(job_id, data, generation)
        answer = self._run("checkpoint", job_id, attempt, size, value, chunks, generation)
        if answer == 0:
            raise StaleAttempt(f"attempt {attempt} of job {job_id} no longer holds it; its checkpoint was not saved.")
        return bool(answer == 2)

    def write_checkpoint(
        self, job_id: str, data: bytes | memoryview, generation: str
    ) -> tuple[int, bytes | memoryview, int, str]:
        """Writes the chunks of a checkpoint, if it is large, ahead of the script that makes it part of a job: what that
        takes, size, value, number of chunks and generation."""
        chunks: Sequence[bytes] = ()
        if len(data) > CHUNK:
            chunks = Chunks(data)
            self.write_chunks(job_id, f"c{generation}", chunks)
        return len(data), b"" if chunks else data, len(chunks), generation

    def load_checkpoint(self, job_id: str, most: int | None = None) -> bytes | memoryview | None:
        """The last checkpoint, or None; None, too, for one of more than `most` bytes."""
        if most is not None and int(self.connector.execute("HGET", f"{self.root}:ck:{job_id}", "z") or 0) > most:
            return None
        fields = flat(self.connector.execute("HGETALL", f"{self.root}:ck:{job_id}"))
        if not fields:
            return None
        if b"n" not in fields:
            return bytes(fields[b"v"])
        return self._join_chunks(job_id, f"c{fields[b'g'].decode()}", int(fields[b"n"]), int(fields[b"z"]))

    # Looking after workers

    def beat(self, workers: Sequence[str], vitals: Mapping[str, Mapping[str, Any]] | None = None) -> int:
        """Renews the leases of workers; how many jobs wait to be run alone."""
        return self.tend(workers, vitals).waiting_alone

    def tend(self, workers: Sequence[str], vitals: Mapping[str, Mapping[str, Any]] | None = None) -> Tended:
        """Renews the leases of workers, tells what their processes take (see `WorkerInfo.vitals`), and hears what is
        asked of them."""
        told = vitals or {}
        parts = [part for name in workers for part in (name, codec.encode(dict(told[name])) if name in told else b"")]
        waiting, asked = self._run("beat", milliseconds(self.settings.lease), *parts)
        return Tended(waiting, {name.decode(): what.decode() for name, what in flat(asked).items()})

    def release(
        self,
        worker: str,
        reason: str,
        detail: str,
        *,
        begun: Mapping[str, int] | None = None,
        dooms: Mapping[str, tuple[int, str]] | None = None,
    ) -> dict[str, str]:
        """Takes all jobs from a worker incarnation that is gone and forgets it: what became of each job.

        `reason` is ``crash`` (its process died), ``stall`` (its machine or supervisor was lost) or ``drain`` (no
        strike); `detail` is the error's text on the record, such as the signal. Only jobs that had `begun` (their
        attempts, by id) get a strike; None when that is not known: then all. `dooms` are those for which its process
        was killed: by id the attempt and why.
        """
        error = encode_error(JobError(type="", message=detail))
        known = pack(
            [False if begun is None else dict(begun), {key: list(doom) for key, doom in (dooms or {}).items()}]
        )
        settings = self.settings
        answer = self._run("release", worker, reason, error, settings.max_crashes, settings.max_stalls, known)
        return {job.decode(): outcome.decode() for job, outcome in flat(answer).items()}

    def sweep(self, sweeper: str, elected_for: float) -> Sweep:
        """One round of looking after expired leases, due and expired jobs, if `sweeper` is the elected one."""
        answer = self._run(
            "sweep",
            sweeper,
            milliseconds(elected_for),
            milliseconds(self.settings.lease),
            encode_error(JobError(type="", message=f"no heartbeat for {self.settings.lease:g} s: worker or host lost")),
            self.settings.max_crashes,
            self.settings.max_stalls,
            milliseconds(GAP),
            milliseconds(self.settings.dead_ttl),
            milliseconds(self.settings.function_timeout),
        )
        elected, wait, outcomes = answer
        released = {job.decode(): outcome.decode() for job, outcome in flat(outcomes).items()}
        return Sweep(elected == 1, wait / 1000 if wait >= 0 else None, released)

    def standing(self, worker: str, attempts: Sequence[tuple[str, int]]) -> list[Standing]:
        """How attempts (id and number) stand that a worker runs, as far as its supervisor must know."""
        answer = self._run("standing", worker, *[part for attempt in attempts for part in attempt])
        return [
            Standing(held == 1, None if asked < 0 else asked / 1000, extended / 1000)
            for held, asked, extended in answer
        ]

    def bind_timeout(self, who: str, timeout: float, most: int, holds: float) -> None:
        """Binds a timeout to all jobs of the namespace that have none of their own, for `holds` seconds unless it is
        bound again; at the end after `most` timeouts a job is dead."""
        self._run("bind", who, milliseconds(timeout), most, milliseconds(holds))

    def unbind_timeout(self, who: str) -> None:
        """Ends what `bind_timeout` began."""
        self._run("bind", who, 0, 0, 0)

    def workers(self) -> list[WorkerInfo]:
        """The workers whose lease has not ended, or whose jobs have not been taken from them yet."""
        return [
            WorkerInfo(
                id=name.decode(),
                lease_left=left / 1000,
                info=codec.decode(info) if info else {},
                jobs=tuple(job.decode() for job in jobs),
                vitals=codec.decode(vitals) if vitals else {},
                vitals_age=age / 1000 if age >= 0 else None,
                asked=asked.decode(),
            )
            for name, left, info, jobs, vitals, age, asked in self._run("workers")
        ]

    def held_by(self, worker: str) -> dict[str, int]:
        """The jobs that a worker runs, as far as the store knows, with their attempts."""
        ids = [job_id.decode() for job_id in self.connector.execute("SMEMBERS", f"{self.root}:h:{worker}")]
        found = zip(ids, self.records(ids), strict=True)
        return {job_id: record.attempt for job_id, record in found if record is not None and record.worker == worker}

    def ask_worker(self, worker: str, what: str) -> bool:
        """Asks a worker to end: to ``drain`` (it takes no other job, ends when those in hand have, and another process
        takes its place) or to ``stop`` (its jobs have the drain time, its place stays empty). Its supervisor hears of
        it with its next beat. False when there is no such worker."""
        return bool(self._run("ask", worker, what))

    # Looking after queues, and what is told of all that

    def pause(self, queue: str, who: str = "") -> None:
        """Starts no job of a queue any more, until it is resumed. Those that run go on, and it can be submitted to."""
        self._run("pause", quote(queue), 1, who)

    def resume(self, queue: str) -> None:
        """Ends what `pause` began."""
        self._run("pause", quote(queue), 0, "")

    def paused(self) -> dict[str, Paused]:
        """The queues that are paused."""
        found = flat(self.connector.execute("HGETALL", f"{self.root}:paused"))
        return {unquote(queue): _paused(data) for queue, data in found.items()}

    def course(self) -> list[Moment]:
        """How the namespace fared over the last hour, oldest first; nothing of the time when no worker was there."""
        entries = self.connector.execute("LRANGE", f"{self.root}:course", 0, -1)
        return [Moment(*msgpack.unpackb(entry)) for entry in reversed(entries)]

    def note_act(self, who: str, act: str, what: str) -> None:
        """Notes what somebody does to the jobs, queues or workers; the last `MOST_ACTS` are kept."""
        self._run("note_act", who, act, what, MOST_ACTS)

    def acts(self, start: int = 0, limit: int = 100) -> list[Act]:
        """What was noted, newest first."""
        entries = self.connector.execute("LRANGE", f"{self.root}:acts", start, start + limit - 1)
        return [_act(entry) for entry in entries]

    # Steering

    def cancel(self, job_id: str) -> State:
        """Cancels a job that waits, flags one that runs; the state that it was in."""
        answer = self._run("cancel", job_id)
        if answer is None:
            raise JobNotFound.of(job_id, self.namespace)
        return STATES[answer]

    def extend(self, job_id: str, by: float, *, attempt: int | None = None) -> float:
        """Gives a running job `by` seconds more; by how many its attempt has been prolonged in all.

        With `attempt` it is that one which asks, and raises `StaleAttempt` when the job is no longer its own; without,
        the worker of the job is told, and `InvalidTransition` is raised for a job that does not run.
        """
        answer = self._run(
            "extend",
            job_id,
            -1 if attempt is None else attempt,
            milliseconds(by),
            uuid.uuid4().hex[:8],
            int(attempt is None),
        )
        if answer is None:
            raise JobNotFound.of(job_id, self.namespace)
        state, total = answer
        if total >= 0:
            return float(total / 1000)
        if attempt is not None:
            raise StaleAttempt(f"attempt {attempt} of job {job_id} no longer holds it; it was not prolonged.")
        raise InvalidTransition(f"job {job_id} is {STATES[state]}; only a running job can be prolonged.")

    def retry(self, job_id: str, body: bytes = b"", *, states: Sequence[State] = (State.DEAD, State.CANCELLED)) -> None:
        """Puts a job that has ended in one of `states` back into its queue, its counts at nought; with another body
        where one is given."""
        [state] = self._retry([(job_id, self.stash(job_id, body))], states)
        if state is None:
            raise JobNotFound.of(job_id, self.namespace)
        if isinstance(state, str) and not isinstance(state, State):
            raise InvalidTransition(
                f"job {job_id} cannot be retried: job {state} has its unique key now. Wait for that one, or cancel it."
            )
        if state not in states:
            allowed = " or ".join(states)
            raise InvalidTransition(
                f"job {job_id} is {state}; only a {allowed} job can be retried. "
                + ("Submit it anew to run it again." if state.ended else "Wait for its end, or cancel it first.")
            )

    def retry_dead(self, job_ids: Sequence[str]) -> list[bool]:
        """Puts those that are dead back into their queues, in this order; for each whether it was."""
        was = self._retry([(job_id, b"") for job_id in job_ids], (State.DEAD,)) if job_ids else []
        return [state is State.DEAD for state in was]

    def _retry(self, jobs: Sequence[tuple[str, bytes]], states: Sequence[State]) -> list[State | str | None]:
        """The state that each was in; None for one that there is none of; the id of the job that has its unique key."""
        letters = "".join(LETTERS[state] for state in states)
        answer = self._run("retry", uuid.uuid4().hex, letters, *[part for job in jobs for part in job])
        for item in answer:
            if item is not None and item not in STATES and not item.startswith(b"only "):
                raise StoreError(f"the store would not take a job back: {item.decode(errors='replace')}")
        return [item and (STATES.get(item) or item[5:].decode()) for item in answer]

    def redeliver(self, job_id: str, url: str = "", webhook: str = "") -> None:
        """Has the callback of an ended job delivered again, or its webhook told of its end again: the one of which
        another URL is given; with neither what it has."""
        answer = self._run("redeliver", job_id, url, uuid.uuid4().hex[:8], webhook)
        if answer is None:
            raise JobNotFound.of(job_id, self.namespace)
        if answer == b"-":
            raise InvalidTransition(
                f"job {job_id} has no callback and no webhook. Give the URL to call: redeliver(url=...)."
            )
        if not STATES[answer].ended:
            raise InvalidTransition(f"job {job_id} is {STATES[answer]}; its callback is delivered when it has ended.")

    def note_callback(
        self, job_id: str, state: str, attempt: bytes, *, delivery: str = "", no_more: bool = False
    ) -> bool:
        """Notes a try to deliver the callback of a job, or, with the id of its `delivery`, an event to its webhook;
        False when the job is gone. With `no_more` the webhook is told of nothing further."""
        return bool(self._run("note_callback", job_id, state, attempt, delivery, int(no_more)))

    def import_dead(self, items: Sequence[bytes]) -> list[bool]:
        """Creates dead jobs (see `records.pack_dead`); for each whether it was new."""
        made = self._run("import", milliseconds(self.settings.dead_ttl), *items) if items else []
        for answer in made:
            if isinstance(answer, bytes):
                raise StoreError(f"the store would not take a dead letter: {answer.decode(errors='replace')}")
        return [answer == 1 for answer in made]

    def remove(
        self, job_ids: Sequence[str], *, states: Sequence[State] = NOT_RUNNING, latest: float | None = None
    ) -> int:
        """Forgets those of the jobs that are in one of `states` (never one that runs) and have ended, or, if they have
        not, been created, at `latest` (Unix seconds) or before; how many it forgot."""
        letters = "".join(LETTERS[state] for state in states)
        answer: list[int] = self._run("remove", letters, milliseconds(latest), *job_ids) if job_ids else []
        return sum(answer)

    def clear(self, states: Sequence[State] | None = None, older_than: float | None = None) -> int:
        """Forgets jobs in these states (None: all but those that run) that have ended, or, if they have not, been
        created, `older_than` seconds ago or before; how many. Of those that are submitted meanwhile none. With neither
        what jobs keep for each other goes too."""
        latest = None
        if older_than is not None:
            seconds, microseconds = self.connector.execute("TIME")
            latest = int(seconds) + int(microseconds) / 1e6 - older_than
        if states is None and latest is None:
            # The callbacks first: later ones are of jobs that run now, and stay.
            self._clear(NOT_RUNNING, queue=CALLBACKS)
            self._clear_data()
        return self._clear(states or NOT_RUNNING, latest)

    def _clear(self, states: Sequence[State], latest: float | None = None, queue: str | None = None) -> int:
        gone, cursor = 0, None
        while True:
            page = self.page(states=states, queue=queue, until=latest, cursor=cursor, limit=REMOVE_BATCH)
            gone += self.remove([record.id for record in page.jobs], states=states, latest=latest)
            if page.cursor is None:
                return gone
            cursor = page.cursor

    def _clear_data(self) -> None:
        while names := self.connector.execute("ZRANGE", f"{self.root}:datas", 0, REMOVE_BATCH - 1):
            self._run("drop_data", *names)

    def flush(self, queue: str | None = None) -> int:
        """Forgets the jobs of a queue (None: of all) that wait; how many."""
        total = 0
        while True:
            gone: int = self._run("flush", quote(queue) if queue else "", 1000)
            total += gone
            if gone < 1000:
                return total

    # Reading

    def record(self, job_id: str, *, full: bool = True) -> JobRecord:
        """The record of a job; `full` with its attempts."""
        found = self.records([job_id], full=full)[0]
        if found is None:
            raise JobNotFound.of(job_id, self.namespace)
        return found

    def record_for(self, job_id: str, seen: SeenKey) -> JobRecord:
        """The full record of a job for who has an API key. Raises `Unauthorized` unless that is as it was."""
        item, key = self._run("read", FULL + "k", job_id, seen[0])
        if key != seen[1]:
            raise Unauthorized(KEY_REFUSED)
        if item is None:
            raise JobNotFound.of(job_id, self.namespace)
        return _record(job_id, item)

    def records(self, job_ids: Sequence[str], *, full: bool = False) -> list[JobRecord | None]:
        """The records of jobs; None for each that there is none of."""
        if not job_ids:
            return []
        answer = self._run("read", FULL if full else BRIEF, *job_ids)
        return [item and _record(job_id, item) for job_id, item in zip(job_ids, answer, strict=True)]

    def details(self, job_id: str) -> tuple[JobRecord, bytes | memoryview, Outcome]:
        """All that is known of a job: its record, its body, and what it has ended with."""
        item = self._run("read", "brepac", job_id)[0]
        if item is None:
            raise JobNotFound.of(job_id, self.namespace)
        return _record(job_id, item), self.whole_body(job_id, _body(item)), self._outcome(job_id, item)

    def waiting(self, job_id: str) -> Waiting:
        """What decides when a waiting job starts."""
        answer = self._run("waiting", job_id)
        if answer is None:
            raise JobNotFound.of(job_id, self.namespace)
        letter, due, now, queue, actor, lanes, workers, times = answer
        ahead: dict[str, int] = {}
        for name, number in zip(lanes[::2], lanes[1::2], strict=True):
            ahead[unquote(name)] = ahead.get(unquote(name), 0) + number
        triples = zip(times[::3], times[1::3], times[2::3], strict=True)
        return Waiting(
            state=STATES[letter],
            due_at=due / 1000,
            now=now / 1000,
            queue=unquote(queue),
            actor=unquote(actor),
            ahead=ahead,
            workers=[
                BusyWorker(
                    codec.decode(info) if info else {},
                    [(unquote(name), at / 1000) for name, at in zip(held[::2], held[1::2], strict=True)],
                )
                for info, held in workers
            ],
            means={unquote(name): total / number / 1000 for name, total, number in triples if number},
        )

    def children(self, job_id: str, limit: int = 50) -> tuple[list[str], int]:
        """The ids of the latest jobs that a job has submitted, newest first, and how many of them are known: at most
        1,000. Some may be forgotten."""
        key = f"{self.root}:ch:{job_id}"
        latest = self.connector.execute("LRANGE", key, -limit, -1)
        return [child.decode() for child in reversed(latest)], int(self.connector.execute("LLEN", key))

    def body(self, job_id: str) -> bytes:
        """The arguments and options of a job, encoded, or a reference to them (see `whole_body`)."""
        item = self._run("read", "b", job_id)[0]
        if item is None:
            raise JobNotFound.of(job_id, self.namespace)
        return _body(item)

    def records_and_bodies(self, job_ids: Sequence[str]) -> list[tuple[JobRecord, bytes | memoryview] | None]:
        """The full records of jobs, each with its arguments and options, encoded; None for each that there is none
        of."""
        answer = self._run("read", "beac", *job_ids) if job_ids else []
        return [
            item and (_record(job_id, item), self.whole_body(job_id, _body(item)))
            for job_id, item in zip(job_ids, answer, strict=True)
        ]

    def dead(
        self,
        *,
        reason: str = "",
        actor: str | None = None,
        queue: str | None = None,
        older_than: float | None = None,
        newer_than: float | None = None,
        cursor: DeadPlace | None = None,
        limit: int = 50,
        looks: int = 1000,
    ) -> tuple[list[DeadPlace], DeadPlace | None]:
        """Dead jobs, the latest death first, and where to go on (None: that was all). At most `limit`, and fewer than
        there are when `looks` of them were looked at. `older_than` and `newer_than` are seconds since the death."""
        found, at, job_id = self._run(
            "dead",
            reason,
            quote(actor) if actor else "",
            quote(queue) if queue else "",
            milliseconds(older_than),
            milliseconds(newer_than),
            *(cursor or (-1, "")),
            limit,
            looks,
        )
        places = [DeadPlace(int(died), one.decode()) for one, died in zip(found[::2], found[1::2], strict=True)]
        return places, DeadPlace(int(at), job_id.decode()) if at else None

    def died(self, job_ids: Sequence[str], most: int = 400) -> list[Died | None]:
        """What jobs died of, at a fraction of the cost of their records; None for each that is not dead. Of a message
        the first `most` bytes."""
        answer = self._run("died", most, *job_ids) if job_ids else []
        return [
            item
            and Died(
                actor=unquote(item[0]),
                reason=DeadReason(item[1].decode() or DeadReason.FAILED),
                at=item[2] / 1000,
                error=JobError(type=item[3].decode(errors="replace"), message=item[4].decode(errors="replace")),
            )
            for item in answer
        ]

    def texts(
        self, job_ids: Sequence[str], most_of_body: int, most_of_error: int
    ) -> list[tuple[bytes, JobError] | None]:
        """What there is to search in jobs beside their records: arguments and options, encoded, empty where they have
        more than `most_of_body` bytes, and the first `most_of_error` bytes of the error without its traceback."""
        answer = self._run("texts", most_of_body, most_of_error, *job_ids) if job_ids else []
        return [
            item
            and (item[0], JobError(type=item[1].decode(errors="replace"), message=item[2].decode(errors="replace")))
            for item in answer
        ]

    def outcome(self, job_id: str) -> Outcome:
        """The state of a job and, when it has ended, what it ended with."""
        item = self._run("read", "re", job_id)[0]
        if item is None:
            raise JobNotFound.of(job_id, self.namespace)
        return self._outcome(job_id, item)

    def _outcome(self, job_id: str, item: list[Any]) -> Outcome:
        fields, result = flat(item[0]), flat(item[2])
        state = STATES[fields[b"s"]]
        reason = fields[b"g"].decode() if b"g" in fields else ""
        if state is State.SUCCEEDED:
            return Outcome(state, self._result(job_id, fields, result), None, reason)
        return Outcome(state, None, decode_error(item[3] or b"") if state.ended else None, reason)

    def _result(self, job_id: str, fields: dict[bytes, bytes], stored: dict[bytes, bytes]) -> Result:
        if b"r" in fields:
            return Result(*codec.decode(fields[b"r"]))
        if not stored:
            raise ResultMissing(f"the result of job {job_id} has been removed. Its record is there still.")
        encoded: bytes | memoryview
        if b"n" in stored:
            what = f"r{stored[b'k'].decode()}"
            encoded = self._join_chunks(job_id, what, int(stored[b"n"]), int(stored[b"z"]))
        else:
            encoded = stored[b"f"]
        return Result(codec.decode(stored[b"s"]), codec.decode(encoded), stored[b"c"].decode() or None)

    def open_result(self, job_id: str) -> StoredFile:
        """What a job has ended with, its full result to be read in parts."""
        item = self._run("read", "re", job_id)[0]
        if item is None:
            raise JobNotFound.of(job_id, self.namespace)
        fields, stored = flat(item[0]), flat(item[2])
        state, attempt = STATES[fields[b"s"]], int(fields.get(b"k", 0))
        if state is not State.SUCCEEDED:
            return StoredFile(self, self._outcome(job_id, item), attempt)
        if b"r" in fields or not stored or b"f" in stored:
            whole = self._result(job_id, fields, stored)
            short = Result(whole.short, None, whole.content_type)
            head = stored[b"f"] if stored else codec.encode(whole.full)
            return StoredFile(self, Outcome(state, short, None, ""), attempt, head=head, size=len(head))
        short = Result(codec.decode(stored[b"s"]), None, stored[b"c"].decode() or None)
        chunks = f"{self.root}:x:{job_id}:r{stored[b'k'].decode()}:"
        return StoredFile(self, Outcome(state, short, None, ""), attempt, size=int(stored[b"z"]), chunks=chunks)

    def page(
        self,
        *,
        states: Sequence[State] = tuple(State),
        queue: str | None = None,
        actor: str | None = None,
        tag: str | None = None,
        since: float | None = None,
        until: float | None = None,
        cursor: int | None = None,
        limit: int = 50,
    ) -> Page:
        """A page of jobs, newest first; `since` and `until` bound the time of creation, in Unix seconds."""
        below, records = self._run(
            "list",
            "".join(LETTERS[state] for state in states),
            quote(queue) if queue else "",
            quote(actor) if actor else "",
            quote(tag) if tag else "",
            milliseconds(since),
            milliseconds(until),
            -1 if cursor is None else cursor,
            limit,
        )
        jobs = [decode_record(job_id.decode(), flat(fields)) for job_id, fields in records if fields]
        return Page(jobs, None if below < 0 else below)

    def scan(self, **filters: Any) -> Iterator[JobRecord]:
        """All jobs that the filters of `page` let through, newest first."""
        cursor: int | None = None
        while True:
            page = self.page(cursor=cursor, **filters)
            yield from page.jobs
            if page.cursor is None:
                return
            cursor = page.cursor

    def counts(self) -> list[Count]:
        """How many jobs there are, by state, queue and actor. Callbacks to be delivered are not counted."""
        totals: dict[tuple[State, str, str], int] = {}
        for name, number in flat(self._run("count")).items():
            letter, queue, lane = name.split(b":", 2)
            state = STATES[letter.replace(b"i", b"q")]
            key = (state, unquote(queue), unquote(lane.partition(b"|")[0]))
            if key[1] != CALLBACKS:
                totals[key] = totals.get(key, 0) + number
        return [Count(*key, number) for key, number in sorted(totals.items()) if number]

    def oldest(self) -> dict[str, float]:
        """For how many seconds the job has waited that is there longest, by queue; no queue in which none waits."""
        found = flat(self._run("oldest"))
        return {unquote(queue): waited / 1000 for queue, waited in found.items() if unquote(queue) != CALLBACKS}

    # Waiting

    def watch(self, job_id: str, bell: str, *, every_change: bool = False) -> State:
        """Registers a bell with a job unless it has ended; its state."""
        answer = self._run("watch", job_id, "a" if every_change else "e", bell)
        if answer is None:
            raise JobNotFound.of(job_id, self.namespace)
        return STATES[answer]

    # Listening to all jobs

    def listen(self, holds: float, keeps: float) -> str:
        """Has every change of a job told, for `holds` seconds unless it is called again; what was told is kept for
        `keeps` seconds more. The id of the newest event."""
        newest: bytes = self._run("listen", milliseconds(holds), milliseconds(keeps))
        return newest.decode()

    def events(self, after: str, limit: int) -> tuple[list[Event], bool]:
        """Events behind one, oldest first, at most `limit`; and whether none is missing between."""
        found, oldest, newest = self._run("events", after, limit)
        whole = oldest is not None and place(oldest.decode()) <= place(after) <= place(newest.decode())
        return self.read_events(found), whole

    def next_events_command(self, after: str, wait: float, limit: int) -> tuple[Any, ...]:
        """The command that waits for events behind one, for at most `wait` seconds."""
        return "XREAD", "COUNT", limit, "BLOCK", milliseconds(wait), "STREAMS", f"{self.root}:ev", after

    def read_events(self, entries: Sequence[Any]) -> list[Event]:
        """The events of what the stream has."""
        return [decode_event(event_id, flat(fields)) for event_id, fields in entries]

    def snapshot(self, job_id: str) -> tuple[JobRecord, str]:
        """The record of a job, and the id of the newest event: those behind it come on top of the record."""
        item, newest = self._run("read", "sepacn", job_id)
        if item is None:
            raise JobNotFound.of(job_id, self.namespace)
        return _record(job_id, item), newest.decode()

    def counters(self) -> Counters:
        """What the store has counted since it is there: ends, times, crashes."""
        return decode_counters(flat(self.connector.execute("HGETALL", f"{self.root}:m")))

    # Limits

    def declare_limits(
        self, capacities: Mapping[str, int], actors: Mapping[str, tuple[Mapping[str, int], int | None]]
    ) -> None:
        """What a worker knows of limits: the capacities of its settings, and of each actor the resources that a job of
        it needs and how many may run at a time (None: as many as like)."""
        args: list[object] = [len(capacities)]
        for name, capacity in capacities.items():
            args += [quote(name), capacity]
        for actor, (resources, most) in actors.items():
            needed = [[quote(name), number] for name, number in sorted(resources.items())]
            args += [quote(actor), pack(needed), -1 if most is None else most]
        self._run("limit_actors", *args)

    def set_limit(self, name: str, capacity: int | None) -> int:
        """Sets how many slots a limit has; None: what settings or actors say. How many it has now."""
        quoted = f"@{quote(name[1:])}" if name.startswith("@") else quote(name)
        slots: int = self._run("limit", quoted, -1 if capacity is None else capacity)
        return slots

    def limits(self) -> list[tuple[str, int, str, dict[str, str]]]:
        """Of each limit its name, its capacity, who set that (``hand``, ``worker`` or nobody), and its slots with the
        ids of the jobs that hold them."""
        return sorted(
            (
                unquote(name),
                capacity,
                source.decode(),
                {slot.decode(): holder.decode().partition(" ")[0] for slot, holder in flat(held).items()},
            )
            for name, capacity, source, held in self._run("limits")
        )

    def parked(self, most: int = 50) -> dict[str, list[Parked]]:
        """The jobs that wait for a limit, by its name: those of at most so many lanes. None is told of while no worker
        has a free thread, since it is that which they wait for then."""
        return {
            unquote(name): [
                Parked(unquote(queue), unquote(lane.partition(b"|")[0]), number, first.decode())
                for queue, lane, number, first in lanes
            ]
            for name, lanes in self._run("parked", most)
        }

    def lacking(self, job_id: str) -> list[tuple[str, int, int, dict[str, float]]]:
        """The limits that have no room for a job: name, how many slots it needs, how many there are, and the jobs that
        hold them with when each was started (Unix seconds)."""
        answer = self._run("why", job_id)
        if answer is None:
            raise JobNotFound.of(job_id, self.namespace)
        return [
            (unquote(name), number, most, {job.decode(): at / 1000 for job, at in flat(holders).items()})
            for name, number, most, holders in answer
        ]

    # Groups, and what jobs keep for each other

    def open_group(self, uuid: str, parties: int, ttl: float) -> bool:
        """Expects `parties` children of a group; False when the group exists."""
        key = f"{self.root}:g:{uuid}:n"
        return bool(self.connector.execute("SET", key, parties, "NX", "PX", milliseconds(ttl)))

    def put_data(self, key: str, value: bytes, expiry: float | None = None) -> None:
        """Keeps bytes under a key of this namespace, for `expiry` seconds or for ever."""
        generation = uuid.uuid4().hex[:12]
        name = quote(key)
        count = 0
        if len(value) > CHUNK:
            for start in range(0, len(value), CHUNK):
                chunk = value[start : start + CHUNK]
                self.connector.execute("SET", self._data_key(name, generation, count), chunk, "EX", CHUNK_TTL)
                count += 1
        inline = b"" if count else value
        self._run("put_data", name, generation, len(value), inline, count, milliseconds(expiry))

    def get_data(self, key: str) -> bytes | None:
        """The bytes kept under a key, or None."""
        name = quote(key)
        seen = ""
        while True:
            fields = flat(self.connector.execute("HGETALL", f"{self.root}:data:{name}"))
            if not fields:
                return None
            if b"n" not in fields:
                return bytes(fields[b"v"])
            generation, count = fields[b"g"].decode(), int(fields[b"n"])
            if generation == seen:
                raise StoreError(
                    f"a part of the data under {key!r} is gone: something else has removed it from the store."
                )
            seen = generation
            joined = bytearray()
            for number in range(count):
                chunk = self.connector.execute("GET", self._data_key(name, generation, number))
                if chunk is None:
                    break  # it has been replaced, or has expired, meanwhile: look again
                joined += chunk
            else:
                return bytes(joined)

    def drop_data(self, key: str) -> bool:
        """Forgets what is kept under a key; False when there was nothing."""
        return bool(self._run("drop_data", quote(key)))

    def _data_key(self, name: str, generation: str, number: int) -> str:
        return f"{self.root}:data:{name}:{generation}:{number}"

    def publish_pool(self, run: str, data: bytes, holds: float = POOL_TTL) -> None:
        """Tells how a pool that prepares batches fares; forgotten unless told again within `holds` seconds."""
        key = f"{self.root}:pools"
        self.connector.execute("HSET", key, run, codec.encode([self.now(), data]))
        self.connector.execute("PEXPIRE", key, milliseconds(holds))

    def withdraw_pool(self, run: str) -> None:
        """Forgets what a pool has told."""
        self.connector.execute("HDEL", f"{self.root}:pools", run)

    def pools(self, told_within: float = POOL_TTL) -> dict[str, dict[str, Any]]:
        """What pools that prepare batches have told within so many seconds, by run."""
        key, found = f"{self.root}:pools", {}
        for run, packed in flat(self.connector.execute("HGETALL", key)).items():
            told, data = codec.decode(packed)
            if told > self.now() - told_within:
                found[run.decode()] = codec.decode(data)
            else:
                self.connector.execute("HDEL", key, run)  # its trainer was killed
        return found

    def now(self) -> float:
        """The server's clock in Unix seconds, as far as this process has seen it."""
        return time.time() + self._clock_offset

    def _run(self, name: str, *args: Any) -> Any:
        source: Script = script(name)
        return self.connector.run(source, self.root, *args)

    def _chunk_key(self, job_id: str, what: str, number: int) -> str:
        return f"{self.root}:x:{job_id}:{what}:{number}"

    def _join_chunks(self, job_id: str, what: str, count: int, size: int) -> memoryview:
        joined = bytearray(size)
        position = 0
        for number in range(count):
            chunk = self.connector.execute("GET", self._chunk_key(job_id, what, number))
            if chunk is None:
                raise ResultMissing(f"chunk {number} of job {job_id} is gone: it was removed while it was read.")
            joined[position : position + len(chunk)] = chunk
            position += len(chunk)
        # Not as bytes: that would be all of it once more.
        return memoryview(joined).toreadonly()


class Awaited(NamedTuple):
    """How a job stands that another one waits for."""

    state: State
    #: The job itself, when it was handed over to the waiting one's worker: none or one.
    jobs: list[Held]
    #: The worker that runs it; empty when none does.
    worker: str


class Standing(NamedTuple):
    """How an attempt stands."""

    #: Whether the job is still in the hands of it.
    held: bool
    #: For how many seconds cancelling has been asked for; None when it has not.
    cancelled_for: float | None
    #: By how many seconds it was prolonged.
    extended_by: float


class BusyWorker(NamedTuple):
    """A worker that lives, and what it does."""

    #: See `WorkerInfo.info`.
    info: dict[str, Any]
    #: The actor and the start (Unix seconds) of each job that it runs; callbacks are left out.
    jobs: list[tuple[str, float]]


class Waiting(NamedTuple):
    """What decides when a job starts. But for one that is queued, most of it is empty."""

    state: State
    #: Unix seconds, by the store's clock, as is `now`.
    due_at: float
    now: float
    queue: str
    actor: str
    #: How many jobs come before it in its queue, by actor.
    ahead: dict[str, int]
    workers: list[BusyWorker]
    #: How long the attempts of these actors have run on average, in seconds.
    means: dict[str, float]


class Outcome(NamedTuple):
    """How a job stands: its result when it has succeeded, its error when it is dead."""

    state: State
    result: Result | None
    error: JobError | None
    reason: str


class StoredFile:
    """The result of a job, its encoding to be read in parts; made by `Store.open_result`."""

    def __init__(
        self, store: Store, outcome: Outcome, attempt: int, *, head: bytes = b"", size: int = 0, chunks: str = ""
    ) -> None:
        self._store = store
        self._head = head
        self._chunks = chunks
        self._last = (-1, b"")
        #: How the job stands; of its result the short one and the content type.
        self.outcome = outcome
        #: The attempt that gave it.
        self.attempt = attempt
        #: How many bytes the encoding of the full result has.
        self.size = size

    def parts(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, some megabytes at a time. Raises `ResultMissing` when the result is removed
        meanwhile."""
        while start < stop:
            index, offset = divmod(start, CHUNK)
            chunk = self._chunk(index) if self._chunks else self._head[index * CHUNK : (index + 1) * CHUNK]
            part = chunk[offset : offset + stop - start]
            if not part:
                raise ResultMissing("the result ends before it should; its chunks are damaged.")
            yield part
            start += len(part)

    def read(self, stop: int) -> bytes:
        """The bytes up to `stop`."""
        return b"".join(self.parts(0, min(stop, self.size)))

    def _chunk(self, index: int) -> bytes:
        if self._last[0] == index:
            return self._last[1]
        chunk: bytes | None = self._store.connector.execute("GET", f"{self._chunks}{index}")
        if chunk is None:
            raise ResultMissing(f"chunk {index} of the result is gone: it was removed while it was read.")
        self._last = index, chunk
        return chunk


class Count(NamedTuple):
    """How many jobs of an actor are in a state."""

    state: State
    queue: str
    actor: str
    number: int


class DeadPlace(NamedTuple):
    """Where a dead job stands among the others."""

    #: When it died, Unix milliseconds.
    died_ms: int
    id: str


class Tended(NamedTuple):
    """What a beat answered."""

    #: How many jobs wait to be run alone.
    waiting_alone: int
    #: Workers of which something is asked, and what.
    asked: dict[str, str]


class Paused(NamedTuple):
    """That a queue is paused."""

    #: Since when, Unix seconds.
    since: float
    #: Who said so.
    who: str


class Parked(NamedTuple):
    """Jobs of one actor and queue that wait for a limit."""

    queue: str
    actor: str
    #: How many they are.
    number: int
    #: The id of the one that comes first.
    first: str


class Died(NamedTuple):
    """What a job died of."""

    actor: str
    reason: DeadReason
    #: When; Unix seconds.
    at: float
    #: The error without its traceback, its message cut where it is long.
    error: JobError


class Moment(NamedTuple):
    """How the namespace stood at a moment (part_course.lua). Numbers of what happened count from the beginning."""

    at_ms: int
    queued: int
    scheduled: int
    running: int
    succeeded: int
    dead: int
    cancelled: int
    retries: int
    #: Attempts whose process died, or whose worker was lost.
    crashes: int
    #: Callbacks that were given up.
    undelivered: int
    #: How long jobs waited in all, in ms, and how many did; how long attempts ran.
    waited_ms: int
    waits: int
    ran_ms: int
    runs: int


class Act(NamedTuple):
    """What somebody did."""

    #: Unix seconds.
    at: float
    who: str
    #: A verb: ``cancel``, ``requeue``, ``pause`` ...
    act: str
    #: What it was done to.
    what: str


class Sweep(NamedTuple):
    """What a sweep did."""

    #: Whether this sweeper is the elected one; the others only wait.
    elected: bool
    #: Seconds until a lease ends unless it is renewed (elected), or until another may be elected; None: no worker.
    wait: float | None
    #: Jobs that were taken from lost workers, and what became of them.
    released: dict[str, str]


def _batches(packed: Sequence[tuple[bytes, ...]]) -> Iterator[list[tuple[bytes, ...]]]:
    """Parts of at most `SUBMIT_BATCH` jobs and, but for one that is larger by itself, `SUBMIT_BYTES`."""
    batch: list[tuple[bytes, ...]] = []
    size = 0
    for item in packed:
        length = sum(map(len, item))
        if batch and (len(batch) == SUBMIT_BATCH or size + length > SUBMIT_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += length
    if batch:
        yield batch


def _paused(data: bytes) -> Paused:
    since, who = msgpack.unpackb(data, raw=True)
    return Paused(since / 1000, who.decode(errors="replace"))


def _act(data: bytes) -> Act:
    at, *texts = msgpack.unpackb(data, raw=True)
    return Act(at / 1000, *(text.decode(errors="replace") for text in texts))


def _body(item: list[Any]) -> bytes:
    body: bytes = flat(item[0]).get(b"b") or item[1] or b""
    return body


def _record(job_id: str, item: list[Any]) -> JobRecord:
    fields, _, result, error, attempts, position, callback, tries = item
    return decode_record(
        job_id,
        flat(fields),
        result=flat(result),
        error=error or b"",
        attempts=attempts,
        position=position,
        callback=flat(callback),
        tries=tries,
    )


def _refusals(answer: list[Any]) -> list[tuple[int, str]]:
    return [(answer[i], answer[i + 1].decode(errors="replace")) for i in range(0, len(answer), 2)]


def _held(item: list[Any]) -> Held:
    job_id, queue, actor, attempt, created, retries, body, crashes, stalls, priority, parent, checkpoint, at = item[:13]
    alone, lane = item[13:15]
    return Held(
        job_id.decode(),
        unquote(queue),
        unquote(actor),
        attempt,
        created,
        retries,
        body,
        crashes,
        stalls,
        priority,
        parent.decode(),
        checkpoint == 1,
        at,
        alone == 1,
        functions_of(lane.decode()) if lane else (),
        *item[15:],
    )


__all__ = [
    "CHUNK",
    "Common",
    "Count",
    "Held",
    "MLQueueError",
    "Outcome",
    "Page",
    "Settle",
    "Standing",
    "Store",
    "StoredFile",
    "StoredResult",
]
