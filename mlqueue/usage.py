"""What attempts use: processor time, memory, memory of GPUs. Measured for those that last a tenth of a second or more.

Memory is the process's: which of several jobs took it nobody knows. The kernel keeps the most that the process had
since it was last told to begin anew (``VmHWM``); a thread that looks four times a second, while jobs run, reads that
and has it begin anew, so a peak between two looks is not missed. Where the kernel cannot be told so (not Linux, a
``/proc`` that may not be written), what the process has at each look counts.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .delivery import Delivery
from .job import Usage
from .processes import resident_bytes
from .store.records import pack_usage

#: The shortest attempt that is measured, in seconds.
SHORTEST: Final = 0.1

#: How often is looked, in seconds; at GPUs less often, since the driver takes its time.
LOOK: Final = 0.25
LOOK_AT_GPUS: Final = 1.0

#: How long an attempt runs until what it uses is written the first time, and how often then, in seconds: at once when
#: its memory has grown by a part in 50.
WRITE_AFTER: Final = 1.0
WRITE_EVERY: Final = 10.0
GROWN: Final = 1.02

#: How long the thread stays when nothing runs, in seconds.
LINGER: Final = 1.0

logger = logging.getLogger("mlqueue.usage")


class Clocks:
    """Where the clocks stood when an attempt began, and what was seen of it since."""

    __slots__ = (
        "alone",
        "delivery",
        "gpu",
        "peak",
        "process_time",
        "seen",
        "started",
        "thread_time",
        "written_at",
        "written_peak",
    )

    def __init__(self, delivery: Delivery, started: float) -> None:
        self.delivery = delivery
        #: Whether no other attempt has run beside it.
        self.alone = False
        self.started = started
        self.thread_time = time.thread_time()
        self.process_time = 0.0
        #: Whether the memory was looked at since it began: what was there before may be another's.
        self.seen = False
        self.peak = 0
        self.gpu: int | None = None
        self.written_at = 0.0
        self.written_peak = 0

    def usage(self, cpu_seconds: float | None) -> Usage:
        """What was used."""
        if self.alone:
            cpu_seconds = time.process_time() - self.process_time
        return Usage(cpu_seconds=cpu_seconds, peak_memory=self.peak or None, gpu_memory=self.gpu, alone=self.alone)


class Meter:
    """Measures the attempts of one process's worker.

    Parameters:
      note: Called with an attempt and, encoded, what it has used so far.
    """

    def __init__(self, note: Callable[[Delivery, bytes], None]) -> None:
        self._note = note
        self._lock = threading.Lock()
        self._running: set[Clocks] = set()
        #: When an attempt began last while others ran.
        self._crowded_at = 0.0
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._memory = Memory()
        self._gpus = Gpus()

    def begin(self, delivery: Delivery) -> None:
        """An attempt begins, in this thread. No lock: there may be thousands a second, in many threads."""
        delivery.clocks = clocks = Clocks(delivery, delivery.begun_at or time.monotonic())
        self._running.add(clocks)
        if len(self._running) > 1:
            self._crowded_at = time.monotonic()
        else:
            clocks.alone = True
            clocks.process_time = time.process_time()
        if self._thread is None:
            self._begin_to_look()

    def _begin_to_look(self) -> None:
        with self._lock:
            if self._thread is None:
                self._over.clear()
                self._thread = threading.Thread(target=self._run, name="mlqueue-usage", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread can be started now; the end is looked at still
                    self._thread.start()

    def end(self, delivery: Delivery, function: Callable[..., Any] | None) -> None:
        """It has ended, in the same thread. `function` is what it ran."""
        clocks: Clocks | None = delivery.clocks
        if clocks is None:
            return
        delivery.clocks = None  # else each would keep the other until the garbage is collected
        self._running.discard(clocks)
        if time.monotonic() - clocks.started >= SHORTEST:
            self._look([clocks])
            # On the event loop it ran in a thread with others.
            in_thread = function is None or not inspect.iscoroutinefunction(inspect.unwrap(function))
            cpu_seconds = time.thread_time() - clocks.thread_time if in_thread else None
            self._tell(clocks, cpu_seconds)

    def close(self) -> None:
        """Ends the thread. It starts again with the next attempt."""
        with self._lock:
            self._running.clear()
        self._over.set()

    def _run(self) -> None:
        idle_since = gpus_at = time.monotonic()
        while True:
            over, now = self._over.wait(LOOK), time.monotonic()
            with self._lock:
                running = list(self._running)
                idle_since = now if running else idle_since
                if not running and (over or now - idle_since >= LINGER):
                    self._thread = None
                    if not self._running:
                        return
                    self._thread = threading.current_thread()  # one that began meanwhile has still seen this one
            running = [clocks for clocks in running if now - clocks.started >= SHORTEST]
            if not running:
                continue
            self._look(running)
            if now >= gpus_at:
                gpus_at = now + LOOK_AT_GPUS
                self._look_at_gpus(running)
            for clocks in running:
                self._write(clocks, now)

    def _look(self, concerned: list[Clocks]) -> None:
        """Notes the most memory since the last look, for all that run and for those concerned."""
        with self._lock:
            now, most = self._memory.look()
            for clocks in {*self._running, *concerned}:
                clocks.peak = max(clocks.peak, most if clocks.seen else now)
                clocks.seen = True

    def _look_at_gpus(self, concerned: list[Clocks]) -> None:
        memory = self._gpus.memory()
        if memory is not None:
            for clocks in concerned:
                clocks.gpu = max(clocks.gpu or 0, memory)

    def _write(self, clocks: Clocks, now: float) -> None:
        """Has what was used so far written now and then: who is killed for want of memory says nothing at its end."""
        due = clocks.written_at + (WRITE_AFTER if clocks.peak > GROWN * clocks.written_peak else WRITE_EVERY)
        if now >= max(due, clocks.started + WRITE_AFTER):
            clocks.written_at, clocks.written_peak = now, clocks.peak
            self._tell(clocks, None)

    def _tell(self, clocks: Clocks, cpu_seconds: float | None) -> None:
        clocks.alone = clocks.alone and self._crowded_at < clocks.started
        self._note(clocks.delivery, pack_usage(clocks.usage(cpu_seconds), clocks.delivery.held.attempt))


class Memory:
    """The memory of this process."""

    def __init__(self) -> None:
        self._begins_anew = sys.platform == "linux"

    def look(self) -> tuple[int, int]:
        """How many bytes it has now, and had at most since the last look; 0 where that is not known."""
        now = resident_bytes() or 0
        if not self._begins_anew:
            return now, now
        try:
            status = Path("/proc/self/status").read_text(errors="replace")
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            logger.debug("the most memory that a job has had is not known, only what it had at each look: %s", error)
            self._begins_anew = False
            return now, now
        match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return now, max(now, int(match[1]) * 1024 if match else 0)


class Gpus:
    """The memory that this process has of NVIDIA's GPUs. Needs nvidia-ml-py."""

    def __init__(self) -> None:
        self._library: Any = None
        self._devices: list[Any] | None = None

    def memory(self) -> int | None:
        """How many bytes it has now, of all of them; None when that is not known."""
        if self._devices is None:
            self._devices = self._found()
        total, pid = None, os.getpid()
        for device in self._devices:
            try:
                for process in self._library.nvmlDeviceGetComputeRunningProcesses(device):
                    # In a container ids may be those of the host: then it finds nothing, and says nothing.
                    if process.pid == pid and process.usedGpuMemory is not None:
                        total = (total or 0) + process.usedGpuMemory
            except self._library.NVMLError as error:
                logger.debug("a GPU does not say who has its memory: %s", error)
        return total

    def _found(self) -> list[Any]:
        try:
            import pynvml
        except ImportError:
            return []
        try:
            pynvml.nvmlInit()
            self._library = pynvml
            return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            logger.debug("no GPU is seen: %s", error)
            return []


__all__ = ["Meter"]
