"""What a worker's process has in hand, kept where it outlives that process: in memory shared with who looks after it.

A supervisor must know which jobs had begun when a process died (only they can be the reason), and until when each that
runs may go on, also while a job holds the GIL and the process can say nothing. So before a job begins its worker writes
down id, attempt and limits, in a slot of this memory: no call of the store, no message, about a microsecond.

A slot keeps the last job that was written there after that has ended, until another one needs it: its end may not have
reached the store.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable
from typing import Final, Self

__all__ = ["Board", "Entry", "Slot"]

#: How many jobs may be in hand at a time; of more a board knows nothing, and says so.
SLOTS: Final = 1024

#: The size of a slot in bytes: a head, and an id of at most 128 characters.
SLOT_SIZE: Final = 256

#: Of the first bytes of a board: how many slots have ever been used, whether there were too few, whether a job with a
#: limit has been seen.
_TOP: Final = struct.Struct("<I??")
TOP_SIZE: Final = 64

#: Of a slot: checksum of the rest, whether it runs, length of its id, attempt, hard and soft deadline, limits, grace,
#: by how much it was prolonged.
_HEAD: Final = struct.Struct("<I?HIdddddd")
_NAME: Final = struct.Struct("<?HI")
_LIMITS: Final = struct.Struct("<dddddd")
_NO_LIMITS: Final = _LIMITS.pack(*[math.inf] * 5, 0.0)


@dataclasses.dataclass(slots=True)
class Entry:
    """A job in a slot. Times are those of `time.monotonic`, which all processes of a machine share; durations are
    seconds."""

    job_id: str
    attempt: int
    #: Whether its call has not ended yet; said of those with a limit alone.
    running: bool = True
    #: When its process is to be killed, and when it is interrupted. Infinite: never.
    hard: float = math.inf
    soft: float = math.inf
    #: Its ``hard_time_limit`` and its ``time_limit``.
    hard_limit: float = math.inf
    soft_limit: float = math.inf
    #: How long it has to end when it is cancelled or interrupted, before its process is killed; infinite: for ever.
    grace: float = math.inf
    #: By how much these were prolonged.
    extended_by: float = 0.0

    @property
    def limited(self) -> bool:
        """Whether its process may have to be killed for it."""
        return self.running and (self.hard < math.inf or self.grace < math.inf)


class Board:
    """Slots in shared memory. One process writes, in any of its threads; another one reads."""

    def __init__(self, fd: int) -> None:
        #: The descriptor of the memory, to be inherited by the other process; None when it is closed.
        self.fd: int | None = fd
        self._memory = mmap.mmap(fd, TOP_SIZE + SLOTS * SLOT_SIZE)
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._used = 0
        self._short = self._limited = False
        #: Called when the first job begins for which the process may have to be killed.
        self.on_limited: Callable[[], None] = lambda: None

    @classmethod
    def create(cls) -> Self:
        """A board without any job."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("mlqueue-board", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, TOP_SIZE + SLOTS * SLOT_SIZE)
        return cls(fd)

    def close_fd(self) -> None:
        """No further process will inherit it. The memory stays as long as this object."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    # For the process that runs jobs

    def begin(self, entry: Entry) -> Slot | None:
        """Writes down a job that is about to begin; None when there is no room."""
        number = self._place()
        if number is None:
            return None
        first = entry.limited and not self._limited
        if first:
            with self._lock:
                self._limited = True
                self._write_top()
        self._write(number, entry)
        if first:
            self.on_limited()
        return Slot(self, number, entry)

    def begin_unlimited(self, job_id: str, attempt: int) -> Slot | None:
        """The same for a job without any limit, as most are."""
        number = self._place()
        if number is None:
            return None
        name = job_id.encode()
        self._put(number, _NAME.pack(True, len(name), attempt) + _NO_LIMITS + name)
        return Slot(self, number, None)

    def _place(self) -> int | None:
        """A free slot; None when there is none, which the other process is told."""
        try:
            return self._free.pop()  # in any thread, without a lock
        except IndexError:
            pass
        with self._lock:
            if self._used < SLOTS:
                self._used += 1
                self._write_top()
                return self._used - 1
            if not self._short:
                self._short = True
                self._write_top()
            return None

    def _write_top(self) -> None:
        _TOP.pack_into(self._memory, 0, self._used, self._short, self._limited)

    def _write(self, number: int, entry: Entry) -> None:
        name = entry.job_id.encode()
        head = _NAME.pack(entry.running, len(name), entry.attempt)
        limits = _LIMITS.pack(
            entry.hard, entry.soft, entry.hard_limit, entry.soft_limit, entry.grace, entry.extended_by
        )
        self._put(number, head + limits + name)

    def _put(self, number: int, data: bytes) -> None:
        at = TOP_SIZE + number * SLOT_SIZE
        self._memory[at : at + 4 + len(data)] = zlib.crc32(data).to_bytes(4, "little") + data

    # For the process that looks after it

    @property
    def limited(self) -> bool:
        """Whether a job that its process may have to be killed for has ever begun there."""
        limited: bool = _TOP.unpack_from(self._memory)[2]
        return limited

    def entries(self) -> list[Entry]:
        """The last job of each slot, as far as it is written."""
        used = min(_TOP.unpack_from(self._memory)[0], SLOTS)
        found = (self._read(number) for number in range(used))
        return [entry for entry in found if entry is not None]

    def begun(self) -> dict[str, int] | None:
        """The attempts that have begun, by id, of jobs that may still be in hand; None when that is not known."""
        if _TOP.unpack_from(self._memory)[1]:
            return None
        return {entry.job_id: entry.attempt for entry in sorted(self.entries(), key=lambda entry: entry.attempt)}

    def _read(self, number: int) -> Entry | None:
        at = TOP_SIZE + number * SLOT_SIZE
        data = self._memory[at : at + SLOT_SIZE]
        checksum, running, length, attempt, *times = _HEAD.unpack_from(data)
        end = _HEAD.size + length
        if length == 0 or end > SLOT_SIZE or zlib.crc32(data[4:end]) != checksum:
            return None  # it is being written
        return Entry(data[_HEAD.size : end].decode(), attempt, running, *times)


class Slot:
    """The place of one job on a board, as long as it is in hand."""

    __slots__ = ("_board", "_ended", "_number", "entry")

    def __init__(self, board: Board, number: int, entry: Entry | None) -> None:
        self._board = board
        self._number = number
        #: None for a job that has no limit.
        self.entry = entry
        self._ended = False

    @property
    def limited(self) -> bool:
        """Whether its process may have to be killed for it."""
        return self.entry is not None and self.entry.limited

    def change(self, **values: float) -> None:
        """Gives the entry other values, unless the call has ended. Called in any thread."""
        if self.entry is None:
            return  # of one whose process is not killed nobody asks for the others
        with self._board._lock:
            if self.entry.running:
                for name, value in values.items():
                    setattr(self.entry, name, value)
                self._board._write(self._number, self.entry)

    def prolong(self, by: float, in_all: float) -> None:
        """Its limits are over so many seconds later."""
        if self.entry is not None:
            self.change(hard=self.entry.hard + by, soft=self.entry.soft + by, extended_by=in_all)

    def end(self) -> None:
        """Its call has ended: no limit holds any more. Another job may take the place. Called in its thread, and
        more than once."""
        if self._ended:
            return
        self._ended = True
        if self.entry is not None:
            with self._board._lock:
                limited, self.entry.running = self.entry.limited, False
                # Of one without a limit nobody asks whether it runs.
                if limited:
                    self._board._write(self._number, self.entry)
        self._board._free.append(self._number)
