"""Several processes in one terminal: they are started together, their output gets prefixes, one that crashes is started
again, and they are stopped together and in order.

What `mlqueue up` and `mlqueue consumer` are made of. Nothing of it is left behind, however it ends: each process is a
group of its own that is killed to its last member, and Linux ends a process whose foreman has been killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Final

from .child import PR_SET_PDEATHSIG
from .supervisor import ECHO, EXIT_INTERRUPTED, LAST_RELEASES, how_it_ended, restart_pause

__all__ = ["Foreman", "Line"]

#: How long a process must have run for its end to be a crash of something that works, in seconds.
WORKED_AFTER: Final = 5.0

#: How long a process must have run for its crashes to be forgotten, in seconds.
HEALTHY_AFTER: Final = 60.0

#: How often a process is told to end when everything is to end at once, in seconds.
INSIST: Final = 1.0

#: How much longer than the drain time a process has for its end, in seconds.
MARGIN: Final = 5.0

#: How long a process has for its end when everything is to end at once, in seconds: longer than a supervisor tries to
#: give its jobs back.
AT_ONCE: Final = LAST_RELEASES + 5.0

#: The longest sleep of the main loop while something waits for what it needs, in seconds.
LOOK: Final = 0.2
LONGEST_SLEEP: Final = 5.0

#: How much of a line is gathered before it is shown in parts, in bytes.
LONGEST_LINE: Final = 64 * 2**10

#: The exit code of a command that was called wrongly: to call it again would not help.
USAGE: Final = 2

#: Colours of the names, as terminals number them: cyan, yellow, green, magenta, blue, and their bright ones.
COLOURS: Final = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A process that is to run."""

    #: What its output is prefixed with.
    name: str
    #: What to run: the words of a command, a text for the shell, or a function that gives one of these, or None as long
    #: as it is not to be started yet.
    command: Sequence[str] | str | Callable[[], Sequence[str] | str | None]
    #: What it has in its environment besides.
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: Those of a lower number are stopped first, and have ended when the next ones are.
    stage: int = 0


@dataclasses.dataclass(eq=False, kw_only=True)
class _Place:
    """A line, and the process that runs it now."""

    line: Line
    colour: int
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    #: Crashes, one after another.
    failures: int = 0
    #: When to start it (monotonic); None while it runs, and once it has ended for good.
    due: float | None = 0.0
    #: Whether it has been told to end, and when it is killed unless it has ended by then (monotonic).
    told: bool = False
    deadline: float | None = None
    #: When it is told once more, which it takes for: at once (monotonic).
    again: float | None = None
    #: What it has written of a line.
    pending: bytes = b""


class Foreman:
    """Runs processes until it is told to stop.

    Parameters:
      lines: What to run.
      environment: What the processes have in their environment.
      drain: How long each has for its end, in seconds, before it is killed.
      output: Where their output goes: stdout when None.
      coloured: Whether the prefixes have colours: on a terminal, unless NO_COLOR is set, when None.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        *,
        environment: Mapping[str, str],
        drain: float,
        output: BinaryIO | None = None,
        coloured: bool | None = None,
    ) -> None:
        self._places = [_Place(line=line, colour=COLOURS[number % len(COLOURS)]) for number, line in enumerate(lines)]
        self._environment = dict(environment)
        self._patience = drain + MARGIN
        self._output = sys.stdout.buffer if output is None else output
        if coloured is None:
            coloured = self._output.isatty() and not self._environment.get("NO_COLOR")
        self._coloured = coloured
        self._width = max((len(line.name) for line in lines), default=0)
        self._stopping_since: float | None = None
        self._hurried = False
        self._exit_code = 0
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)

    def run(self) -> int:
        """Runs in the foreground, in the main thread, until SIGTERM, SIGINT or SIGHUP, or until all have ended by
        themselves; the exit code.

        0 after a stop in order, 130 when a second signal cut it short, 2 when a command was called wrongly.
        """
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_wake)
        with self._signals():
            try:
                while not self._is_over():
                    self._step()
            finally:
                self._end()
        return self._exit_code

    def _step(self) -> None:
        for place in self._places:
            if place.due is not None and time.monotonic() >= place.due:
                self._start(place)
        for key, _ in self._selector.select(self._pause()):
            key.data()
        for place in self._running():
            assert place.process is not None
            if place.process.poll() is not None:
                self._on_exit(place)
            elif place.deadline is not None and time.monotonic() >= place.deadline:
                self._say(f"{place.line.name} has not ended in time and is killed")
                place.deadline = None
                _signal_group(place.process, signal.SIGKILL)
        if self._stopping_since is not None:
            self._stop_next()

    def _running(self) -> list[_Place]:
        return [place for place in self._places if place.process is not None]

    def _is_over(self) -> bool:
        return not self._running() and all(place.due is None for place in self._places)

    def _pause(self) -> float:
        now = time.monotonic()
        times = [place.due for place in self._places if place.due is not None]
        times += [place.deadline for place in self._places if place.deadline is not None]
        times += [place.again for place in self._places if place.again is not None]
        return max(0.0, min([LONGEST_SLEEP, *(moment - now for moment in times)]))

    # Processes

    def _start(self, place: _Place) -> None:
        command = place.line.command() if callable(place.line.command) else place.line.command
        if command is None:
            place.due = time.monotonic() + LOOK
            return
        place.due = None
        place.began = time.monotonic()
        try:
            place.process = process = subprocess.Popen(
                ["sh", "-c", command] if isinstance(command, str) else list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**self._environment, "PYTHONUNBUFFERED": "1", **place.line.environment},
                # So that a terminal's Ctrl-C reaches the foreman alone.
                start_new_session=True,
                preexec_fn=_ending_with(os.getpid()),
            )
        except OSError as error:
            self._say(f"{place.line.name} cannot be started: {error}")
            place.failures += 1
            place.due = time.monotonic() + restart_pause(place.failures, worked=False)
            return
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, lambda: self._read(place))

    def _on_exit(self, place: _Place) -> None:
        process, lived = place.process, time.monotonic() - place.began
        assert process is not None
        # What it has left behind goes with it, and so it holds nothing of its output open.
        _signal_group(process, signal.SIGKILL)
        self._read(place)
        self._show(place, place.pending)
        place.pending = b""
        self._forget_output(process)
        place.process = place.deadline = place.again = None
        code = process.returncode
        how = how_it_ended(code)
        if place.told or self._stopping_since is not None:
            self._say(f"{place.line.name} has ended")
        elif code == 0:
            self._say(f"{place.line.name} has ended; it is not started again")
        elif code == USAGE and not place.failures and lived < WORKED_AFTER:
            self._say(f"{place.line.name} cannot run as it was called; all is stopped")
            self._exit_code = USAGE
            self._begin_stop()
        else:
            place.failures = 1 if lived >= HEALTHY_AFTER else place.failures + 1
            pause = restart_pause(place.failures, worked=lived >= WORKED_AFTER)
            place.due = time.monotonic() + pause
            self._say(f"{place.line.name} died ({how}); it starts again in {pause:.1f} s")

    def _forget_output(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(KeyError):
            self._selector.unregister(process.stdout)
        process.stdout.close()

    # The end

    def _begin_stop(self) -> None:
        self._stopping_since = time.monotonic()
        for place in self._places:
            place.due = None

    def _stop_next(self) -> None:
        """Tells those to end whose turn it is."""
        running = self._running()
        if not running:
            return
        stage = min(place.line.stage for place in running)
        for place in running:
            if not place.told and place.line.stage == stage:
                self._tell(place, self._patience)
            elif place.again is not None and time.monotonic() >= place.again:
                self._tell(place, AT_ONCE)

    def _tell(self, place: _Place, patience: float) -> None:
        assert place.process is not None
        now = time.monotonic()
        deadline = now + patience
        if self._hurried:
            # Again and again: on a slow machine it may take two for one, or the second for an echo.
            place.again = now + INSIST
            deadline = min(deadline, place.deadline or deadline)
        place.told, place.deadline = True, deadline
        _signal_group(place.process, signal.SIGTERM)

    def _hurry(self) -> None:
        """Everything ends at once. Whoever insists does not put that off."""
        if self._hurried:
            return
        self._hurried = True
        self._exit_code = EXIT_INTERRUPTED
        for place in self._running():
            if not place.told:
                self._tell(place, AT_ONCE)
            # Told too soon after the first time, they would take it for an echo of that.
            place.again = time.monotonic() + ECHO + LOOK

    def _end(self) -> None:
        """Leaves nothing behind, however the loop ended."""
        for place in self._running():
            assert place.process is not None
            _signal_group(place.process, signal.SIGKILL)
            place.process.wait()
            self._forget_output(place.process)
            place.process = None
        self._selector.close()

    # Signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Has signals wake the main loop, as long as it runs."""
        previous: dict[int, Any] = {}
        number: int
        for number in (*SIGNALS, signal.SIGCHLD):
            previous[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                if self._hurried and number in SIGNALS:
                    # Everything has ended. Whoever insists still is not to change how this ends.
                    handler = signal.SIG_IGN
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _on_signal(self, number: int, frame: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, bytes([number]))

    def _on_wake(self) -> None:
        for number in os.read(self._wake_read, 4096):
            if number not in SIGNALS:
                continue
            if self._stopping_since is None:
                self._say(f"{signal.Signals(number).name}: stopping; the same again stops everything at once")
                self._begin_stop()
            elif time.monotonic() > self._stopping_since + ECHO:
                self._hurry()

    # Output

    def _read(self, place: _Place) -> None:
        process = place.process
        if process is None or process.stdout is None or process.stdout.closed:
            return
        with contextlib.suppress(BlockingIOError):
            while data := os.read(process.stdout.fileno(), 65_536):
                *lines, place.pending = (place.pending + data).split(b"\n")
                for line in lines:
                    self._show(place, line, even_empty=True)
                if len(place.pending) > LONGEST_LINE:
                    self._show(place, place.pending)
                    place.pending = b""
            # It has closed its end; that of the process follows, or does not.
            with contextlib.suppress(KeyError):
                self._selector.unregister(process.stdout)

    def _show(self, place: _Place, line: bytes, *, even_empty: bool = False) -> None:
        if line or even_empty:
            self._write(place.line.name, place.colour, line)

    def _say(self, text: str) -> None:
        """Something of the foreman's own."""
        self._write("mlqueue", 0, text.encode())

    def _write(self, name: str, colour: int, line: bytes) -> None:
        prefix = f"{name:<{max(self._width, 7)}} | "
        if self._coloured:
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        try:
            self._output.write(prefix.encode() + line + b"\n")
            self._output.flush()
        except (BrokenPipeError, ValueError):
            # Nobody reads it any more: nobody is there.
            if self._stopping_since is None:
                self._begin_stop()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _ending_with(foreman: int) -> Callable[[], None] | None:
    """What a new process does first, so that it is told to end when its foreman has been killed. Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def set_up() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != foreman:
            os._exit(1)

    return set_up
