"""What the operating system knows of processes: is one stopped, is it still the one that was meant, what memory has it.

Linux tells it in ``/proc``; elsewhere ``ps`` is asked.
"""

from __future__ import annotations

import functools
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "born",
    "in_forks",
    "interpreter_command",
    "is_gone",
    "is_stopped",
    "place",
    "python_command",
    "resident_bytes",
    "usage",
]

#: The folder of Linux's process table.
PROC = Path("/proc")

#: The longest that `ps` or `sysctl` may take, in seconds.
PATIENCE = 5.0


class _Entry(NamedTuple):
    #: One letter: R running, S sleeping, T stopped, Z dead and not waited for ...
    state: str
    #: When it was started, in whatever the system counts in: only to be compared.
    born: str


def is_stopped(pid: int) -> bool:
    """Whether a process has been stopped (SIGSTOP, Ctrl-Z): it lives, and does nothing."""
    entry = _entry(pid)
    return entry is not None and entry.state == "T"


def born(pid: int) -> str | None:
    """When a process was started, to tell it from a later one with the same id; None when there is none."""
    entry = _entry(pid)
    return entry.born if entry is not None and entry.state not in "ZX" else None


def is_gone(pid: int, born_at: str) -> bool:
    """Whether the process `pid` of this place that was born then has ended. When in doubt it has not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    entry = _entry(pid)
    # Of other users' processes some systems show nothing, so silence is no sign of death.
    return entry is not None and (entry.state in "ZX" or entry.born != born_at)


@functools.cache
def place() -> str:
    """Where process ids mean what they mean here: the machine, its last start, and on Linux the pid namespace."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = str((PROC / "self/ns/pid").readlink())
    except OSError:
        boot, namespace = _output("sysctl", "-n", "kern.boottime"), ""
    return "/".join((platform.node(), boot, namespace))


def resident_bytes() -> int | None:
    """How much memory this process has now; None when the system does not say."""
    try:
        pages = (PROC / "self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        kilobytes = _output("ps", "-o", "rss=", "-p", str(os.getpid()))
        return int(kilobytes) * 1024 if kilobytes.isdigit() else None


class Usage(NamedTuple):
    """What a process takes."""

    #: Its memory, in bytes.
    rss: int
    #: The processor time that it has taken so far, in seconds.
    cpu: float


def usage(pid: int) -> Usage | None:
    """What a process takes; None when there is none, or the system does not say."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return Usage(int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, IndexError, ValueError):
        if (PROC / "self/stat").exists():
            return None
    rss, _, clock = _output("ps", "-o", "rss=,time=", "-p", str(pid)).strip().partition(" ")
    return Usage(int(rss) * 1024, _seconds(clock.strip())) if rss.isdigit() else None


def _seconds(clock: str) -> float:
    """A time as ``ps`` has it: ``[[days-]hours:]minutes:seconds``."""
    days, _, rest = clock.rpartition("-")
    seconds = 0.0
    for part in rest.split(":"):
        seconds = seconds * 60 + float(part)
    return int(days or 0) * 86400 + seconds


def in_forks(act: Callable[[], None], signals: Collection[signal.Signals]) -> None:
    """Has `act` called in each process that this one forks from now on, before any of these signals reaches it. Python
    drops those that come while it forks; here they wait."""
    masks = threading.local()

    def before() -> None:
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def after_in_child() -> None:
        act()
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)


def interpreter_command(module: str, *arguments: str, ignoring: Iterable[signal.Signals] = ()) -> list[str]:
    """The command that runs ``main()`` of a module of ours in a new interpreter, which ignores those signals.

    Not ``-m``, since the package imports some of these modules itself, and because the package must be found from
    wherever this process has it, while a ``random.py`` in the current folder must not be found.
    """
    # Before the imports, which take a while.
    ignore = "".join(f"signal.signal({int(signum)}, signal.SIG_IGN); " for signum in ignoring)
    return python_command(f"import signal; {ignore}from {module} import main; main()", *arguments)


def python_command(code: str, *arguments: str) -> list[str]:
    """The command that runs Python code in a new interpreter, which finds the package as `interpreter_command` says."""
    root = str(Path(__file__).resolve().parent.parent)
    return [_interpreter(), "-P", "-c", f"import sys; sys.path.append({root!r}); {code}", *arguments]


def _interpreter() -> str:
    # Under uWSGI, or where Python is embedded in a program, sys.executable is that program.
    if Path(sys.executable or "").name.startswith(("python", "pypy")):
        return sys.executable
    name = f"bin/python{sys.version_info.major}.{sys.version_info.minor}"
    found = [str(path) for prefix in (sys.exec_prefix, sys.base_exec_prefix) if (path := Path(prefix, name)).exists()]
    return found[0] if found else "python3"


def _entry(pid: int) -> _Entry | None:
    if not (PROC / "self/stat").exists():
        return _entry_of_ps(pid)
    try:
        # The name, in parentheses, may hold anything.
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return _Entry(fields[0], fields[19])


def _entry_of_ps(pid: int) -> _Entry | None:
    state, _, started = _output("ps", "-o", "state=,lstart=", "-p", str(pid)).partition(" ")
    return _Entry(state[:1], " ".join(started.split())) if state else None


def _output(*command: str) -> str:
    """What a command prints, in English; empty when it fails."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace").strip()
