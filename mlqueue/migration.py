"""From one store to another, while both are in use: jobs of every state with all that belongs to them, and data.

A job is taken off in the one store by a script that keeps what it was, made in the other by a script that does so once,
and forgotten in the first then. Whatever is killed in between, the job is in the first store (and perhaps on its way)
or in the second, and who migrates again finds what was on its way. Jobs that run are waited for; so are those that they
wait for. A lock in the first store, and its token in the second, keep two who migrate apart.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgpack

from . import codec
from .errors import DecodeError, InvalidTransition, ResultMissing, SettingsError, StoreError
from .job import State
from .store import Store
from .store.chunks import CHUNK_TTL, BodyReference
from .store.records import CALLBACKS, flat
from .store.scripts import script

__all__ = ["Migration", "Moved"]

#: How many jobs are taken off at once, and after how many bytes no more.
BATCH: Final = 100
BATCH_BYTES: Final = 4 * 2**20

#: How many ids of a shelf are read at once.
PAGE: Final = 1000

#: For how long the lock holds, in seconds, and after how many it is renewed.
LOCK: Final = 10.0
RENEWED: Final = 2.0

#: How long to pause when nothing could be moved, in seconds.
PAUSE: Final = 0.25

#: How the jobs of groups say so in their options.
GROUP: Final = "group_completion_uuid"

#: The states in the order in which their jobs are moved: those that wait last, and in the order in which they run.
ENDED: Final = "sdc"
WAITING: Final = "qiw"


@dataclasses.dataclass
class Moved:
    """What has been moved so far."""

    #: Jobs by the state that they were in.
    jobs: dict[State, int] = dataclasses.field(default_factory=dict)
    #: Callbacks to be delivered.
    callbacks: int = 0
    #: Keys of data that jobs keep for each other.
    data: int = 0
    #: Ids of jobs that stay, because another job in the other store has the id.
    kept: set[str] = dataclasses.field(default_factory=set)
    #: How many jobs run where they were, and are waited for.
    running: int = 0

    @property
    def total(self) -> int:
        """How many jobs."""
        return sum(self.jobs.values())


class Migration:
    """Moves a namespace from one store to another.

    Parameters:
      source: Where the jobs are.
      target: Where they go; its namespace may have another name.
      tell: Called now and then with what has been moved.
    """

    def __init__(self, source: Store, target: Store, tell: Callable[[Moved], None] = lambda moved: None) -> None:
        self.source = source
        self.target = target
        self.moved = Moved()
        self._tell = tell
        self._token = uuid.uuid4().hex
        self._name = ""
        self._renew_at = 0.0
        self._groups: set[str] = set()

    def run(self, *, follow: bool = False) -> Moved:
        """Moves all that is there, and what comes, until nothing is left but jobs that cannot go (`Moved.kept`); with
        `follow` until it is interrupted. Raises `InvalidTransition` where somebody else migrates, or both are one."""
        self._begin()
        idle = 0
        try:
            while True:
                before = self.moved.total + self.moved.callbacks
                self._move_jobs()
                self._forward_children()
                self._copy_settings()
                self._copy_data()
                self.moved.running, left = self._left()
                self._tell(self.moved)
                if left == 0 and not follow:
                    self._move_data()
                    self.source.connector.execute("DEL", f"{self.source.root}:mig:g")
                    return self.moved
                if self.moved.total + self.moved.callbacks == before:
                    # What cannot go is left, when nothing runs that it could wait for; not what has just come.
                    idle = 0 if self.moved.running else idle + 1
                    if idle > 1 and not follow:
                        return self.moved
                    # Of workers that are gone nobody else may take the jobs here.
                    self.source.sweep(self._token, 1.0)
                    time.sleep(PAUSE)
        finally:
            self._end()

    # Who may

    def _begin(self) -> None:
        probe = f"{self.target.root}:mig:probe:{self._token}"
        self.target.connector.execute("SET", probe, 1, "PX", 10_000)
        one = self.source.root == self.target.root and self.source.connector.execute("EXISTS", probe)
        self.target.connector.execute("DEL", probe)
        if one:
            raise SettingsError(
                "the two stores are one: --to names the store that the jobs are in already. Name another one, or "
                "another namespace (--to-namespace)."
            )
        own = f"{self.source.root}:mig:own"
        deadline = time.monotonic() + LOCK + 1
        # One who was killed cannot give the lock back.
        while not self.source.connector.execute("SET", own, self._token, "NX", "PX", round(LOCK * 1000)):
            if time.monotonic() > deadline:
                raise InvalidTransition(
                    f"somebody else migrates from {self.source.namespace!r} now; wait for its end, or stop it."
                )
            time.sleep(PAUSE)
        self.source.connector.execute("SET", f"{self.source.root}:mig:id", uuid.uuid4().hex, "NX")
        self._name = self.source.connector.execute("GET", f"{self.source.root}:mig:id").decode()
        self.target.connector.execute("SET", f"{self.target.root}:mig:own{self._name}", self._token)
        self._renew_at = time.monotonic() + RENEWED
        self._deliver_what_was_on_its_way()

    def _deliver_what_was_on_its_way(self) -> None:
        """What a migration left that was killed."""
        while found := self.source.connector.execute("SMEMBERS", f"{self.source.root}:mig"):
            # The callbacks behind their jobs.
            for batch in _batches(sorted((job_id.decode() for job_id in found), key=len)):
                self._move(batch)
        arrived = f"{self.target.root}:mig:in:{self._name}"
        for job_id in self.target.connector.execute("SMEMBERS", arrived):
            if not self.source.connector.execute("SISMEMBER", f"{self.source.root}:mig", job_id):
                self.target.connector.execute("SREM", arrived, job_id)

    def _renew(self) -> None:
        if time.monotonic() < self._renew_at:
            return
        own = f"{self.source.root}:mig:own"
        if self.source.connector.execute("GET", own) != self._token.encode():
            raise InvalidTransition("another migration has taken over from this one, which had stood still too long.")
        self.source.connector.execute("PEXPIRE", own, round(LOCK * 1000))
        self._renew_at = time.monotonic() + RENEWED

    def _end(self) -> None:
        own = f"{self.source.root}:mig:own"
        if self.source.connector.execute("GET", own, patience=0) == self._token.encode():
            self.source.connector.execute("DEL", own, patience=0)
            self.target.connector.execute("DEL", f"{self.target.root}:mig:own{self._name}", patience=0)

    # Jobs

    def _move_jobs(self) -> None:
        for states, callbacks in ((ENDED, False), (WAITING, False), (ENDED + WAITING, True)):
            shelves = [self._shelf(name) for name in self._shelves(states, callbacks)]
            ids = (job_id for _, job_id in heapq.merge(*shelves))
            for batch in _batches(job_id for job_id in ids if job_id not in self.moved.kept):
                self._move(batch)

    def _shelves(self, states: str, callbacks: bool) -> list[str]:
        names = [name.decode() for name in self.source.connector.execute("SMEMBERS", f"{self.source.root}:shelves")]
        return [name for name in names if name[0] in states and (name.split(":")[1] == CALLBACKS) == callbacks]

    def _shelf(self, name: str) -> Iterator[tuple[float, str]]:
        """The jobs of a shelf as they were when they were read, in order."""
        above = "-inf"
        while True:
            page = self.source.connector.execute(
                "ZRANGEBYSCORE", f"{self.source.root}:s:{name}", above, "+inf", "WITHSCORES", "LIMIT", 0, PAGE
            )
            for job_id, score in zip(page[::2], page[1::2], strict=True):
                yield float(score), job_id.decode()
            if len(page) < 2 * PAGE:
                return
            above = f"({page[-1].decode()}"

    def _move(self, ids: Sequence[str]) -> None:
        while ids:
            self._renew()
            taken = self._run(self.source, "migrate_out", self._token, BATCH_BYTES, *ids)
            self._make(taken)
            if sum(len(packed) for _, packed, *_ in taken) <= BATCH_BYTES:
                return
            # It stopped when that was enough.
            moved = {job_id.decode() for job_id, *_ in taken}
            ids = ids[max(index for index, job_id in enumerate(ids) if job_id in moved) + 1 :]

    def _make(self, taken: Sequence[Any]) -> None:
        if not taken:
            return
        for job_id, packed, *chunks in taken:
            for what, number in zip(chunks[::2], chunks[1::2], strict=True):
                self._copy_chunks(job_id.decode(), what.decode(), number)
            self._move_group_of(job_id.decode(), packed)
        made = self._run(self.target, "migrate_in", self._name, self._token, *[packed for _, packed, *_ in taken])
        arrived: list[tuple[bytes, bytes]] = []
        kept: list[tuple[bytes, bytes]] = []
        for (job_id, packed, *_), answer in zip(taken, made, strict=True):
            if isinstance(answer, bytes):
                raise StoreError(f"job {job_id.decode()} could not be made in the other store: {answer.decode()}")
            (arrived if answer == 1 else kept).append((job_id, packed))
        self._forget(arrived)
        self._restore(kept)
        self._tell(self.moved)

    def _forget(self, arrived: Sequence[tuple[bytes, bytes]]) -> None:
        if not arrived:
            return
        ids = [job_id for job_id, _ in arrived]
        self._run(self.source, "migrate_done", self._token, 1, *ids)
        self.target.connector.execute("SREM", f"{self.target.root}:mig:in:{self._name}", *ids)
        for _, packed in arrived:
            _, letter, fields, *_ = msgpack.unpackb(packed, raw=True)
            if flat(fields)[b"q"] == CALLBACKS.encode():
                self.moved.callbacks += 1
            else:
                state = LETTER_STATES[letter]
                self.moved.jobs[state] = self.moved.jobs.get(state, 0) + 1

    def _restore(self, kept: Sequence[tuple[bytes, bytes]]) -> None:
        """Makes those anew where they were whose id another job has."""
        if not kept:
            return
        ids = [job_id for job_id, _ in kept]
        self._run(self.source, "migrate_in", "", self._token, *[packed for _, packed in kept])
        self._run(self.source, "migrate_done", self._token, 0, *ids)
        self.source.connector.execute("DEL", f"{self.source.root}:mig:in:")
        self.moved.kept.update(job_id.decode() for job_id in ids)

    def _copy_chunks(self, job_id: str, what: str, number: int) -> None:
        for index in range(number):
            self._renew()
            key = f":x:{job_id}:{what}:{index}"
            chunk = self.source.connector.execute("GET", self.source.root + key)
            if chunk is not None:
                self.target.connector.execute("SET", self.target.root + key, chunk, "EX", CHUNK_TTL)

    # Groups

    def _move_group_of(self, job_id: str, packed: bytes) -> None:
        """The group of a job is counted where the job goes, and before that arrives."""
        _, _, fields, beside, *_ = msgpack.unpackb(packed, raw=True, strict_map_key=False)
        held = dict(beside or {}).get(b"b")
        body = held[1] if held else flat(fields).get(b"b", b"")
        if not self._speaks_of_group(job_id, body):
            return
        try:
            options = codec.decode_call(self.source.whole_body(job_id, body))[2]
        except (DecodeError, ResultMissing):
            return
        if isinstance(options.get(GROUP), str):
            self._move_group(options[GROUP])

    def _speaks_of_group(self, job_id: str, body: bytes) -> bool:
        reference = BodyReference.of(body)
        if reference is None:
            return GROUP.encode() in body
        # The options stand at the end; in a frame near its beginning.
        root = f"{self.source.root}:x:{job_id}:{reference.what}:"
        ends = (self.source.connector.execute("GET", f"{root}{at}") or b"" for at in (0, reference.number - 1))
        return any(GROUP.encode() in end for end in ends)

    def _move_group(self, group: str) -> None:
        if group in self._groups:
            return
        found = self._run(self.source, "migrate_group", group)
        if found is not None:
            parties, left, completed = found
            key = f"{self.target.root}:g:{group}"
            if parties > 0 and left > 0:
                self.target.connector.execute("SET", f"{key}:n", parties, "NX", "PX", left)
                if completed:
                    self.target.connector.execute("SADD", key, *completed)
                    self.target.connector.execute("PEXPIRE", key, left)
        self._groups.add(group)

    def _forward_children(self) -> None:
        """Children of moved groups that have completed here since."""
        waiting = f"{self.source.root}:mig:gl"
        while item := self.source.connector.execute("LINDEX", waiting, 0):
            _, (_, callbacks) = msgpack.unpackb(item, raw=True)
            for callback in callbacks or ():
                reference = BodyReference.of(callback[7])
                if reference is not None:
                    self._copy_chunks(callback[0].decode(), reference.what, reference.number)
            self._run(self.target, "migrate_child", item)
            self.source.connector.execute("LREM", waiting, 1, item)

    # Beside the jobs

    def _copy_settings(self) -> None:
        """What workers have told of actors, limits, API keys, idempotency keys: what the other store has counts."""
        for name in ("actors", "http", "keys", "lim", "lim:a"):
            found = flat(self.source.connector.execute("HGETALL", f"{self.source.root}:{name}"))
            for field, value in found.items():
                self.target.connector.execute("HSETNX", f"{self.target.root}:{name}", field, value)
        root = f"{self.source.root}:once:".encode()
        for keys in self.source.connector.scan(f"{self.source.root}:once:*", PAGE):
            for key in keys:
                value = self.source.connector.execute("GET", key)
                left = self.source.connector.execute("PTTL", key)
                if value is not None and left > 0:
                    there = f"{self.target.root}:once:".encode() + key.removeprefix(root)
                    self.target.connector.execute("SET", there, value, "NX", "PX", left)

    def _copy_data(self) -> None:
        """Data that jobs keep for each other. What jobs in the other store have written themselves is newer."""
        marks = f"{self.target.root}:mig:data:{self._name}"
        for name in self._data_keys():
            fields = flat(self.source.connector.execute("HGETALL", f"{self.source.root}:data:{name}"))
            if not fields:
                continue
            generation = fields[b"g"]
            there = self.target.connector.execute("HGET", f"{self.target.root}:data:{name}", "g")
            mark = self.target.connector.execute("HGET", marks, name)
            if there == generation or mark == generation or (there is not None and there != (mark or b"").lstrip(b"?")):
                continue
            # Before it is written, or it could pass for somebody else's; and behind, or it could pass for written.
            self.target.connector.execute("HSET", marks, name, b"?" + generation)
            self._put_data(name, fields)
            self.target.connector.execute("HSET", marks, name, generation)

    def _data_keys(self) -> list[str]:
        return [name.decode() for name in self.source.connector.execute("ZRANGE", f"{self.source.root}:datas", 0, -1)]

    def _put_data(self, name: str, fields: dict[bytes, Any]) -> None:
        generation, number = fields[b"g"].decode(), int(fields.get(b"n", 0))
        for index in range(number):
            self._renew()
            key = f":data:{name}:{generation}:{index}"
            chunk = self.source.connector.execute("GET", self.source.root + key)
            if chunk is None:
                return  # it has been replaced meanwhile; the next round finds what by
            self.target.connector.execute("SET", self.target.root + key, chunk, "EX", CHUNK_TTL)
        left = self.source.connector.execute("PTTL", f"{self.source.root}:data:{name}")
        if left != -2:
            size, value = int(fields[b"z"]), fields.get(b"v", b"")
            self._run(self.target, "put_data", name, generation, size, value, number, left)

    def _move_data(self) -> None:
        """When no job is left that could want them."""
        self._copy_data()
        names = self._data_keys()
        for batch in _batches(names):
            self._run(self.source, "drop_data", *batch)
        self.moved.data = len(names)
        self.target.connector.execute("DEL", f"{self.target.root}:mig:data:{self._name}")

    # How it stands

    def _left(self) -> tuple[int, int]:
        """How many jobs run, and how many jobs there are in all, callbacks included."""
        running = left = 0
        for name, number in flat(self._run(self.source, "count")).items():
            left += number
            running += number if name.startswith(b"r:") else 0
        left += int(self.source.connector.execute("LLEN", f"{self.source.root}:mig:gl"))
        return running, left

    def _run(self, store: Store, name: str, *args: Any) -> Any:
        return store.connector.run(script(name), store.root, *args)


#: The states by the letters that the scripts know.
LETTER_STATES: Final = {
    b"q": State.QUEUED,
    b"w": State.SCHEDULED,
    b"s": State.SUCCEEDED,
    b"d": State.DEAD,
    b"c": State.CANCELLED,
}


def _batches(items: Any) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch
