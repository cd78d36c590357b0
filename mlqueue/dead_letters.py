"""Dead letters: the jobs that have ended for good without success, to be looked at, mended, put back or forgotten.

A dead letter is a job in state ``dead``: nothing was moved, and its record and its message are whole. Each change of
one is one script, which checks that it is dead still: what two people do to one at a time is done once. Those that are
changed by a filter are picked first and changed then, some hundred a call, so that one which dies again meanwhile is
not picked twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypedDict, Unpack

from . import codec
from .dead_lines import MAX_CHECKPOINT, read_line, write_line
from .errors import DecodeError, InvalidJob, JobNotFound, ResultMissing
from .files import replacing
from .job import Attempt, DeadReason, JobError, JobRecord, State, id_in, new_id, seconds
from .message import LISTENER, OPTION_CHECKS
from .store import Store
from .store.store import SUBMIT_BYTES, DeadPlace

#: How many letters one call of the store puts back or forgets: it answers nobody else meanwhile.
BATCH: Final = 200

#: How many letters are read at once; with a filter by text, of the errors of how many.
PAGE: Final = 100

#: How many letters are read at once with their messages, which may have megabytes each.
WHOLE: Final = 10

#: How many letters one call of the store looks at to find those of an actor, a queue or a reason.
LOOKS: Final = 1000

#: The largest page.
MAX_PAGE: Final = 1000

Ids = list[str]
Found = list[tuple[DeadPlace, JobRecord]]


class DeadFilters(TypedDict, total=False):
    """Which dead letters are meant; those that fit all that is given."""

    actor: str | None
    #: A `DeadReason`, or its text.
    reason: DeadReason | str | None
    queue: str | None
    #: How long ago they died, at least and at most.
    older_than: float | timedelta | None
    newer_than: float | timedelta | None
    #: A part of the error's type, message or traceback, whatever its case.
    text: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class DeadPage:
    """A page of dead letters, the latest death first."""

    #: Their records, with the error, without the attempts.
    letters: list[JobRecord]
    #: What to pass as ``cursor`` for the next page; None when this was the last.
    cursor: str | None

    def __len__(self) -> int:
        return len(self.letters)

    def __iter__(self) -> Iterator[JobRecord]:
        return iter(self.letters)

    def __getitem__(self, index: int) -> JobRecord:
        return self.letters[index]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A dead letter with its message."""

    #: All that is known of the job: error, attempts, times, ``functions``, ``callback`` ...
    record: JobRecord
    #: The message as the store keeps it.
    body: bytes | memoryview = dataclasses.field(repr=False)
    #: What was sent; None where the body cannot be read.
    args: list[Any] | None
    kwargs: dict[str, Any] | None
    #: The options that are kept with the arguments (``max_retries``, ``time_limit`` ...); the others are on the record.
    options: dict[str, Any] | None

    @classmethod
    def of(cls, record: JobRecord, body: bytes | memoryview) -> DeadLetter:
        """The letter of a job."""
        try:
            args, kwargs, options = codec.decode_call(body)
        except DecodeError:
            # One of those that are looked at here.
            return cls(record=record, body=body, args=None, kwargs=None, options=None)
        return cls(record=record, body=body, args=args, kwargs=kwargs, options=options)

    @property
    def id(self) -> str:
        """The job's id."""
        return self.record.id

    @property
    def reason(self) -> DeadReason:
        """Why it is dead."""
        return self.record.dead_reason or DeadReason.FAILED

    @property
    def error(self) -> JobError | None:
        """The last error, with the traceback in the worker."""
        return self.record.error

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The attempts, each with its worker, its times and its error."""
        return self.record.attempts

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions that it was for; empty for all, and for an actor's job."""
        return self.record.functions

    @property
    def callback(self) -> str | None:
        """The URL that is fetched when it has ended."""
        return self.record.callback

    @property
    def msg(self) -> Any:
        """The message that was posted for MLQ listeners; None for an actor's job."""
        return self.args[0] if self.record.actor == LISTENER and self.args else None


class Imported(NamedTuple):
    """What became of the lines of a file."""

    #: The ids of new dead letters.
    created: Ids
    #: Ids of jobs that were there already, in whatever state, and are as they were.
    skipped: Ids


class Writable(Protocol):
    """What `DeadLetters.export` writes to: a file opened for text, for one."""

    def write(self, text: str, /) -> object:
        """Takes a line."""


class DeadLetters:
    """The dead letters of a namespace; ``mlq.dead_letters``."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # Looking

    def __iter__(self) -> Iterator[JobRecord]:
        """All of them, the latest death first."""
        return self.scan()

    def scan(self, **filters: Unpack[DeadFilters]) -> Iterator[JobRecord]:
        """Those that the filters let through, the latest death first, as `list` gives them."""
        query = _Query.of(filters)
        place: DeadPlace | None = None
        while True:
            found, place = self._look(query, place, PAGE)
            yield from (record for _, record in found)
            if place is None:
                return

    def list(self, *, cursor: str | None = None, limit: int = 50, **filters: Unpack[DeadFilters]) -> DeadPage:
        """A page of them, the latest death first. ``page.cursor`` gives the next; pages are stable while letters come
        and go.

        Filters: ``actor``, ``reason``, ``queue``, ``older_than`` and ``newer_than`` (seconds, or a timedelta, since the
        death) and ``text`` (a part of the error's type, message or traceback, whatever its case). A filter by text
        reads the errors of all that the others let through.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidJob(f"limit={limit!r}: a page has from 1 to {MAX_PAGE:,} dead letters.")
        query = _Query.of(filters)
        place = None if cursor is None else _place(cursor)
        found: Found = []
        while True:
            step, place = self._look(query, place, PAGE if query.text else limit - len(found))
            found += step
            if len(found) > limit:
                place = found[limit - 1][0]
            if place is None or len(found) >= limit:
                return DeadPage([record for _, record in found[:limit]], place and f"{place.died_ms}:{place.id}")

    def count(self, **filters: Unpack[DeadFilters]) -> int:
        """How many there are. Without an age, a reason or a text none of them is looked at."""
        query = _Query.of(filters)
        if not query.picks:
            return sum(
                count.number
                for count in self._store.counts()
                if count.state is State.DEAD
                and query.actor in (None, count.actor)
                and query.queue in (None, count.queue)
            )
        return sum(1 for _ in self._ids(query))

    def show(self, job_id: str) -> DeadLetter:
        """One with all that is known of it. Raises `JobNotFound`, also for a job that is not dead."""
        letter = self._letter(job_id)
        if letter.record.state is not State.DEAD:
            raise JobNotFound(
                f"job {job_id} is {letter.record.state}, no dead letter. `mlqueue show {job_id}` shows any job."
            )
        return letter

    # Changing

    def requeue(
        self,
        job_id: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        msg: Any = None,
    ) -> None:
        """Puts one back at the end of its queue, its retries, crashes and stalls at nought; ``attempt`` goes on, and
        the history stays.

        With `args` or `kwargs` these take the place of all that were sent of that kind; `msg` is that for a job of MLQ
        listeners. Its options stay. Raises `InvalidTransition` for a job that is not dead, `JobNotFound`.
        """
        body = b""
        if args is not None or kwargs is not None or msg is not None:
            body = self._edited(self._letter(job_id), args, kwargs, msg)
        self._store.retry(id_in(self._store.namespace, job_id), body, states=(State.DEAD,))

    def requeue_many(self, job_ids: Iterable[str]) -> Ids:
        """Puts those of these jobs back that are dead, in this order; their ids."""
        if isinstance(job_ids, str):
            raise InvalidJob(f"requeue_many({job_ids!r}): give a list of ids, or use requeue for one.")
        back: Ids = []
        for batch in _batches(list(dict.fromkeys(job_ids))):
            done = self._store.retry_dead(batch)
            back += [job_id for job_id, was_dead in zip(batch, done, strict=True) if was_dead]
        return back

    def requeue_all(self, **filters: Unpack[DeadFilters]) -> Ids:
        """Puts all back that the filters let through, in the order of their deaths; their ids."""
        return self.requeue_many(list(self._ids(_Query.of(filters)))[::-1])

    def purge(self, job_ids: str | Iterable[str]) -> int:
        """Forgets one, or those of several, that are dead; how many it forgot."""
        ids = [job_ids] if isinstance(job_ids, str) else list(dict.fromkeys(job_ids))
        return sum(self._store.remove(batch, states=(State.DEAD,)) for batch in _batches(ids))

    def purge_all(self, **filters: Unpack[DeadFilters]) -> int:
        """Forgets all that the filters let through; how many."""
        return self.purge(self._ids(_Query.of(filters)))

    # To and from files

    def export(self, file: str | os.PathLike[str] | Writable, **filters: Unpack[DeadFilters]) -> int:
        """Writes those that the filters let through to a path (whole or not at all) or to a file opened for text, as
        JSON Lines, the latest death first; how many. They stay where they are, and their checkpoints stay here."""
        lines = self.lines(**filters)
        if isinstance(file, str | os.PathLike):
            with replacing(Path(file)) as opened:
                return _each(lines, lambda line: opened.write(line.encode()))
        return _each(lines, file.write)

    def lines(self, **filters: Unpack[DeadFilters]) -> Iterator[str]:
        """Those that the filters let through, as `export` writes them: a line of JSON each."""
        return self._lines(_Query.of(filters))  # a wrong filter is refused here, not at the first line

    def import_(self, file: str | os.PathLike[str] | Iterable[str | bytes]) -> Imported:
        """Makes dead letters of exported lines, of a path or of an open file. A job whose id is there already, in
        whatever state, is skipped, so a file may be imported again.

        Raises `InvalidJob` with the number of a line that is none; those before it are in then. The message of a letter
        may have the options of `mlqueue.dead_lines.IMPORTABLE` only. A letter that died longer ago than
        ``MLQUEUE_DEAD_TTL`` counts as having died now, else it would be forgotten at once.
        """
        if isinstance(file, str | os.PathLike):
            with Path(file).open("rb") as opened:
                return self._import(opened)
        return self._import(file)

    # How

    def _look(self, query: _Query, place: DeadPlace | None, limit: int) -> tuple[Found, DeadPlace | None]:
        """Some of the next ones, each with its place, and where to go on."""
        places, rest = self._store.dead(**query.fields(), cursor=place, limit=limit, looks=LOOKS)
        records = self._store.records([place.id for place in places])
        # One may have been put back or forgotten since.
        found = [
            (place, record)
            for place, record in zip(places, records, strict=True)
            if record is not None and record.state is State.DEAD and query.has_text(record.error)
        ]
        return found, rest

    def _ids(self, query: _Query) -> Iterator[str]:
        place: DeadPlace | None = None
        while True:
            if query.text:
                found, place = self._look(query, place, PAGE)
                yield from (one.id for one, _ in found)
            else:
                places, place = self._store.dead(**query.fields(), cursor=place, limit=LOOKS, looks=LOOKS)
                yield from (one.id for one in places)
            if place is None:
                return

    def _letter(self, job_id: str) -> DeadLetter:
        [found] = self._store.records_and_bodies([id_in(self._store.namespace, job_id)])
        if found is None:
            raise JobNotFound.of(job_id, self._store.namespace)
        return DeadLetter.of(*found)

    def _edited(
        self, letter: DeadLetter, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, msg: Any
    ) -> bytes:
        if msg is not None:
            if letter.record.actor != LISTENER or args is not None or kwargs is not None:
                raise InvalidJob(
                    f"requeue({letter.id!r}, msg=...): msg alone is for jobs that were posted for MLQ listeners; give "
                    f"args and kwargs for one of the actor {letter.record.actor!r}."
                )
            args = [msg]
        if args is not None and (isinstance(args, str | bytes) or not isinstance(args, Sequence)):
            raise InvalidJob(f"args={args!r}: the arguments are a list, in their order: [{args!r}].")
        if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)):
            raise InvalidJob(f"kwargs={kwargs!r}: the keyword arguments are a dict by their names.")
        # An option that no job can have is why it is here; it would be again.
        options = {name: value for name, value in (letter.options or {}).items() if _can_be(name, value)}
        return codec.encode_call(
            (letter.args or []) if args is None else args,
            (letter.kwargs or {}) if kwargs is None else kwargs,
            options,
            max_bytes=self._store.settings.max_message_bytes,
        )

    def _lines(self, query: _Query) -> Iterator[str]:
        for batch in _batches(self._ids(query), WHOLE):
            for found in self._store.records_and_bodies(batch):
                if found is not None and found[0].state is State.DEAD:
                    yield write_line(*found, self._checkpoint(found[0]))

    def _checkpoint(self, record: JobRecord) -> bytes | memoryview | None:
        if not record.has_checkpoint:
            return None
        with contextlib.suppress(ResultMissing):  # it was put back meanwhile
            return self._store.load_checkpoint(record.id, MAX_CHECKPOINT)
        return None

    def _write_checkpoint(self, job_id: str, data: bytes) -> tuple[int, bytes | memoryview, int, str]:
        return self._store.write_checkpoint(job_id, data, new_id()[-12:])

    def _import(self, lines: Iterable[str | bytes]) -> Imported:
        done = Imported([], [])
        pending: list[tuple[str, bytes]] = []
        size = 0
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                most = self._store.settings.max_message_bytes
                job_id, item = read_line(line, most, self._write_checkpoint, self._store.stash)
            except InvalidJob as error:
                self._make(pending, done)
                raise InvalidJob(
                    f"line {number}: {error.message} The lines before it are in ({len(done.created)} new, "
                    f"{len(done.skipped)} there before). Mend it and import the file again: what is there is skipped."
                ) from None
            if pending and (len(pending) == BATCH or size + len(item) > SUBMIT_BYTES):
                self._make(pending, done)
                pending, size = [], 0
            pending.append((job_id, item))
            size += len(item)
        self._make(pending, done)
        return done

    def _make(self, pending: Sequence[tuple[str, bytes]], done: Imported) -> None:
        made = self._store.import_dead([item for _, item in pending])
        for (job_id, _), new in zip(pending, made, strict=True):
            (done.created if new else done.skipped).append(job_id)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Query:
    """Filters, checked."""

    actor: str | None
    queue: str | None
    reason: str
    older_than: float | None
    newer_than: float | None
    text: str

    @classmethod
    def of(cls, filters: DeadFilters) -> _Query:
        unknown = set(filters) - set(DeadFilters.__annotations__)
        if unknown:
            raise TypeError(
                f"{', '.join(sorted(unknown))}: no filter of dead letters; there are "
                f"{', '.join(DeadFilters.__annotations__)}."
            )
        reason = filters.get("reason")
        if reason is not None and reason not in tuple(DeadReason):
            raise InvalidJob(f"reason={reason!r}: the reasons are {', '.join(DeadReason)}.")
        return cls(
            actor=filters.get("actor"),
            queue=filters.get("queue"),
            reason=str(reason or ""),
            older_than=seconds(filters.get("older_than"), "older_than"),
            newer_than=seconds(filters.get("newer_than"), "newer_than"),
            text=(filters.get("text") or "").casefold(),
        )

    @property
    def picks(self) -> bool:
        """Whether it takes more than an actor and a queue to know which are meant."""
        return bool(self.reason or self.text) or self.older_than is not None or self.newer_than is not None

    def fields(self) -> dict[str, Any]:
        """What the store looks at; the text is none of that."""
        return {name: getattr(self, name) for name in ("actor", "queue", "reason", "older_than", "newer_than")}

    def has_text(self, error: JobError | None) -> bool:
        if not self.text:
            return True
        parts = (error.type, error.message, error.traceback) if error else ()
        return any(self.text in part.casefold() for part in parts)


def _place(cursor: object) -> DeadPlace:
    match = re.fullmatch(r"([0-9]{1,15}):([A-Za-z0-9._-]{1,128})", cursor) if isinstance(cursor, str) else None
    if match is None:
        raise InvalidJob(f"cursor={cursor!r}: give the cursor of the page before, as it is; or None for the first.")
    return DeadPlace(int(match[1]), match[2])


def _each(lines: Iterable[str], write: Callable[[str], object]) -> int:
    count = 0
    for line in lines:
        write(line)
        count += 1
    return count


def _batches(ids: Iterable[str], size: int = BATCH) -> Iterator[list[str]]:
    batch: list[str] = []
    for job_id in ids:
        batch.append(job_id)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _can_be(name: str, value: object) -> bool:
    check = OPTION_CHECKS.get(name)
    return check is None or check[0](value)


__all__ = ["DeadFilters", "DeadLetter", "DeadLetters", "DeadPage", "Imported"]
