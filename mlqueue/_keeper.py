"""The keeper: the process that owns the embedded server of one folder, and the few file and socket helpers it shares
with ``mlqueue.embedded``.

It runs as a plain script (``python -I -S _keeper.py '{"home": ...}'``), so it needs the standard library only, and
the light part of that, as its start is part of a first use. It starts the server, or adopts one whose keeper was
killed, and stops it when no process has held a share of ``users.lock`` for the grace time. It starts a server once and
ends with it: whoever needs the store next starts both anew.

With the durability ``everysec`` it also syncs the append-only file to the disk, once a second. The server's own
``everysec`` would hold writes back in its memory while such a sync takes long, up to two seconds of them, and answer
all the same: a kill -9 of it would lose what it has acknowledged. It is told to write at once and to sync never.

The files of the folder::

    users.lock      held shared by each process that uses the store; exclusively by the keeper while the server stops
    keeper.lock     held by the keeper as long as it lives; its content is the keeper's pid
    server.lock     held by the server itself as long as it lives (it inherits the descriptor); its content is its pid
    server.json     what runs: url, pids, binary, version; there from the start of a server until its end
    valkey.sock     the server's socket, unless the path is too long for one (server.json says where it is then)
    server.log      the server's output since its start; server.log.1 is the one before
    stopped         there after `mlqueue server --stop`, until the next start
    appendonlydir/  the data

A pid in a lock file is true as long as that lock is held, which is what makes it safe to send it a signal.
"""

# pathlib is among what would slow the start down.
# ruff: noqa: PTH105, PTH108, PTH110, PTH116, PTH118, PTH123, PTH208

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from _thread import start_new_thread

try:
    import fcntl
except ImportError:  # Windows, where mlqueue.embedded refuses before it comes to a lock
    fcntl = None  # type: ignore[assignment]

#: Whether this system has the locks that everything here stands on.
HAS_LOCKS = fcntl is not None

TYPE_CHECKING = False  # for the checker it is true; at run time typing would slow the start down
if TYPE_CHECKING:
    from typing import NoReturn

#: The names of the files in the folder; see above.
USERS_LOCK, KEEPER_LOCK, SERVER_LOCK = "users.lock", "keeper.lock", "server.lock"
SOCKET, STATE, LOG, STOPPED = "valkey.sock", "server.json", "server.log", "stopped"
DATA = "appendonlydir"
#: Seconds between two looks at something that cannot be waited for.
POLL = 0.005
#: Seconds that a server gets to stop; one that takes longer is killed, which loses nothing that it has acknowledged
#: (it writes to the append-only file before it answers).
STOP_LIMIT = 10.0
#: Seconds between two syncs of the append-only file.
SYNC_INTERVAL = 1.0
#: What `ping` answers.
ALIVE, LOADING, SILENT = "alive", "loading", "silent"


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file without waiting; False when another holds it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(fd: int) -> None:
    """Give the lock back, also for copies of the descriptor that a fork in another thread may have made."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def is_held(path: str) -> bool:
    """Whether a process holds the lock at `path` exclusively."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(fd, shared=True):
            return True
        unlock(fd)
        return False
    finally:
        os.close(fd)


def holder(path: str) -> int | None:
    """The pid of the process that holds the lock at `path`, or None when it is free (or held a moment ago only)."""
    if not is_held(path):
        return None
    with open(path, "rb") as file:
        text = file.read().strip()
    return int(text) if text.isdigit() else None


def write_pid(fd: int, pid: int | None) -> None:
    os.ftruncate(fd, 0)
    if pid is not None:
        os.pwrite(fd, b"%d\n" % pid, 0)


def same_file(fd: int, path: str) -> bool:
    """Whether the open file is still the one at `path`: a folder can be deleted and made anew while it is in use."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def read_state(home: str) -> dict[str, object]:
    """What server.json says, or nothing. It is replaced as a whole, so it is never read half written."""
    try:
        with open(os.path.join(home, STATE), "rb") as file:
            state = json.load(file)
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def connect(path: str, timeout: float) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.settimeout(timeout)
        link.connect(path)
    except BaseException:
        link.close()
        raise
    return link


def ask(path: str, *words: str, timeout: float = 1.0) -> bytes:
    """One command over a connection of its own: the reply's line, or the text of a bulk reply; b"" when the server hung
    up (which is how it answers SHUTDOWN). Raises OSError when it cannot be reached or does not answer in time."""
    request = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in map(str.encode, words))
    with connect(path, timeout) as link:
        link.sendall(request)
        with link.makefile("rb") as replies:
            line: bytes = replies.readline().rstrip()
            return replies.read(int(line[1:])) if line.startswith(b"$") and line != b"$-1" else line


def ping(path: str, timeout: float = 1.0) -> str:
    """ALIVE, LOADING, or SILENT. A server that answers with an error (BUSY in a long script, MISCONF with a full disk)
    is alive."""
    try:
        reply = ask(path, "PING", timeout=timeout)
    except OSError:
        return SILENT
    if reply.startswith(b"-LOADING"):
        return LOADING
    return ALIVE if reply[:1] in (b"+", b"-") else SILENT


class Keeper:
    """One server's life. The descriptors are those that `mlqueue.embedded` handed over: the locked keeper.lock, and the
    pipe on which it waits for one line that says how the start went."""

    def __init__(
        self,
        *,
        home: str,
        socket_path: str,
        command: list[str],
        version: str,
        durability: str,
        grace: float,
        patience: float,
        lock_fd: int,
        report_fd: int,
    ) -> None:
        self.home = home
        self.socket_path = socket_path
        #: The server's command line; empty when a living server is to be adopted.
        self.command = command
        self.version = version
        self.durability = durability
        self.grace = grace
        #: Seconds that a server.lock which is held, or a server just started, may stay silent.
        self.patience = patience
        self.lock_fd = lock_fd
        self.report_fd = report_fd
        #: The server when it is our child; None when it was adopted, or has been reaped.
        self.child: int | None = None
        #: A way to look at server.lock that does not belong to the server.
        self.server_fd = -1
        self.users_fd = -1
        self.wake_fd = -1
        #: A connection that tells of the server's end at once, whether it is our child or was adopted.
        self.link: socket.socket | None = None
        self.stopping = False

    def path(self, name: str) -> str:
        return os.path.join(self.home, name)

    def run(self) -> None:
        self.detach()
        self.users_fd = os.open(self.path(USERS_LOCK), os.O_RDWR | os.O_CREAT, 0o600)
        self.server_fd = os.open(self.path(SERVER_LOCK), os.O_RDWR | os.O_CREAT, 0o600)
        if not self.adopt_or_start():
            return
        self.report(ready=True)
        if self.durability == "everysec":
            # A thread of its own: a slow disk must not keep from anything else.
            start_new_thread(self.sync_for_ever, ())
        if self.serve():
            self.stop()
        self.clean_up()

    def detach(self) -> None:
        """Keep nothing of the process that happened to start us: not its signals, umask, folder or parenthood. The
        session and the standard streams are ours already."""
        for fd in (self.lock_fd, self.report_fd):
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # What is ignored here is so in the server too, until it sets handlers of its own.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.wake_fd, wake = os.pipe()
        os.set_blocking(self.wake_fd, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGTERM, self.on_sigterm)
        os.umask(0o077)
        os.chdir("/")
        write_pid(self.lock_fd, os.getpid())

    def on_sigterm(self, signum: int, frame: object) -> None:
        self.stopping = True

    def report(self, **news: object) -> None:
        """Tell the starter, once; it may be dead, which is no reason not to serve the others."""
        fd, self.report_fd = self.report_fd, -1
        if fd >= 0:
            try:
                os.write(fd, json.dumps(news).encode() + b"\n")
            except OSError:
                pass
            os.close(fd)

    # --- start ---

    def adopt_or_start(self) -> bool:
        """True when a server answers; else the reason has been reported."""
        deadline = time.monotonic() + self.patience
        lock_fd = os.open(self.path(SERVER_LOCK), os.O_RDWR)
        while not try_lock(lock_fd):
            # The server lives, or a child of it that rewrites the append-only file and inherited the lock: never start
            # a second one, two on one folder lose data.
            answer = ping(self.socket_path, timeout=min(1.0, self.patience))
            if answer == ALIVE:
                os.close(lock_fd)
                self.note("took over the server of a keeper that was killed")
                self.write_state(read_state(self.home) | {"keeper_pid": os.getpid()})
                return True
            if answer == LOADING:
                deadline = time.monotonic() + self.patience
            if time.monotonic() > deadline:
                self.report(error="held", pid=holder(self.path(SERVER_LOCK)))
                return False
            time.sleep(POLL)
        if not self.command:
            self.report(error="gone")
            return False
        return self.start(lock_fd)

    def start(self, lock_fd: int) -> bool:
        remove(self.path(STOPPED))
        try:
            remove(self.socket_path)
            # Some file systems (shares of networks and of virtual machines) have no sockets.
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.bind(self.socket_path)
            remove(self.socket_path)
        except OSError as error:
            self.report(error="socket", detail=f"{error.strerror or error}")
            return False
        if os.path.exists(self.path(LOG)):
            os.replace(self.path(LOG), self.path(LOG + ".1"))
        self.child = pid = self.spawn(lock_fd)
        write_pid(lock_fd, pid)
        self.write_state(
            {
                "url": "",
                "pid": pid,
                "keeper_pid": os.getpid(),
                "binary": self.command[0],
                "version": self.version,
                "durability": self.durability,
                "started_at": time.time(),
            }
        )
        # From here on the lock lives exactly as long as the server does.
        os.close(lock_fd)
        return self.wait_ready()

    def spawn(self, lock_fd: int) -> int:
        log = os.open(self.path(LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.dup2(null, 0)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.set_inheritable(lock_fd, True)
                os.execv(self.command[0], self.command)  # noqa: S606 - a shell is what must not be here
            except OSError as error:
                os.write(2, f"cannot run {self.command[0]}: {error}\n".encode())
            finally:
                os._exit(127)
        os.close(log)
        os.close(null)
        return pid

    def wait_ready(self) -> bool:
        deadline = time.monotonic() + self.patience
        while (answer := ping(self.socket_path, timeout=0.5)) != ALIVE:
            if self.reap():
                self.report(error="exited", detail=self.log_tail())
                self.clean_up()
                return False
            if answer == LOADING:
                deadline = time.monotonic() + self.patience
            if self.stopping or time.monotonic() > deadline:
                pid = self.child
                self.stop()
                self.report(error="silent", pid=pid, detail=self.log_tail())
                self.clean_up()
                return False
            time.sleep(0.001)
        return True

    # --- serve ---

    def serve(self) -> bool:
        """Wait until the server is to be stopped (True) or has ended (False)."""
        tick = min(1.0, max(0.02, self.grace / 4))
        place = stat_or_none(self.socket_path)
        changed, used = self.last_taken(), time.monotonic()
        self.connect()
        while True:
            watched: list[int] = [self.wake_fd] + ([self.link.fileno()] if self.link else [])
            ready = select.select(watched, [], [], tick if self.link else POLL)[0]
            if self.stopping or not self.in_place(place):
                return True
            if self.link is None or self.link.fileno() in ready:
                # The server's end, or only somebody's CLIENT KILL.
                if self.gone():
                    self.note("the server has ended without being asked by its keeper")
                    return False
                self.connect()
            taken = self.last_taken()
            if taken != changed or not try_lock(self.users_fd):
                changed, used = taken, time.monotonic()
            elif time.monotonic() - used >= self.grace:
                return True  # and keep the lock: newcomers wait until the server is gone
            else:
                unlock(self.users_fd)

    def sync_for_ever(self) -> None:
        synced: dict[str, int] = {}
        told = False
        while True:
            time.sleep(SYNC_INTERVAL)
            try:
                sync(self.path(DATA), synced)
                told = False
            except OSError as error:
                if not told:
                    self.note(f"the append-only file cannot be synced to the disk: {error}")
                told = True

    def connect(self) -> None:
        if self.link is not None:
            self.link.close()
        try:
            self.link = connect(self.socket_path, 1.0)
        except OSError:
            self.link = None

    def last_taken(self) -> int:
        """When a share of users.lock was last taken: processes that live for less than a tick count as users too."""
        return os.fstat(self.users_fd).st_mtime_ns

    def in_place(self, place: os.stat_result | None) -> bool:
        """False once the folder or the socket has been moved or deleted, after which nobody new finds the server."""
        now = stat_or_none(self.socket_path)
        if place is None or now is None or not os.path.samestat(place, now):
            return False
        return same_file(self.users_fd, self.path(USERS_LOCK))

    # --- stop ---

    def stop(self) -> None:
        """Stop the server and wait until it is gone. It syncs its append-only file before it exits.

        It is asked over the connection that we have had all along: the socket's path may lead to another server by now.
        """
        if self.child is not None and not same_file(self.users_fd, self.path(USERS_LOCK)):
            # The folder is gone or another one, and a server that stops removes what is at its socket's path.
            os.kill(self.child, signal.SIGKILL)
        began = time.monotonic()
        asked = began - 1.0
        while not self.gone():
            now = time.monotonic()
            if now - asked >= 1.0:
                asked = now
                self.ask_to_stop()
                if self.child is not None and (self.link is None or now - began >= 1.0):
                    os.kill(self.child, signal.SIGTERM)
            if now - began > STOP_LIMIT:
                if self.child is None:
                    return  # an adopted one, perhaps of another container: no pid that we may kill
                os.kill(self.child, signal.SIGKILL)
            time.sleep(0.002)

    def ask_to_stop(self) -> None:
        # At once, where SIGTERM waits for the server's next tick.
        try:
            if self.link is not None:
                self.link.sendall(b"SHUTDOWN\r\n")
        except OSError:
            pass

    def gone(self) -> bool:
        self.reap()
        if not try_lock(self.server_fd):
            return False
        unlock(self.server_fd)
        return True

    def reap(self) -> bool:
        if self.child is not None and os.waitpid(self.child, os.WNOHANG)[0]:
            self.child = None
        return self.child is None

    def clean_up(self) -> None:
        # If the folder is another by now, its socket belongs to another keeper.
        if same_file(self.lock_fd, self.path(KEEPER_LOCK)):
            remove(self.socket_path)
            remove(self.path(STATE))
        write_pid(self.lock_fd, None)

    # --- files ---

    def write_state(self, state: dict[str, object]) -> None:
        state |= {"socket": self.socket_path, "url": url_of(self.socket_path)}
        with open(self.path(STATE + ".new"), "w") as file:
            json.dump(state, file, indent=1)
        os.replace(self.path(STATE + ".new"), self.path(STATE))

    def note(self, text: str) -> None:
        try:
            with open(self.path(LOG), "a") as file:
                file.write(f"{os.getpid()}:K {time.strftime('%d %b %Y %H:%M:%S')} * mlqueue keeper: {text}\n")
        except OSError:
            pass  # the disk may be full, or the folder deleted; the keeper's work goes on

    def log_tail(self) -> str:
        try:
            with open(self.path(LOG), errors="replace") as file:
                return "\n".join(line.rstrip() for line in file.readlines()[-6:] if line.strip())
        except OSError as error:
            return f"({LOG} cannot be read: {error.strerror})"


def sync(folder: str, synced: dict[str, int]) -> None:
    """Syncs the files of a folder that have grown since they were last; `synced` remembers their sizes."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # the server has rewritten its file, and removed the old one
        try:
            size = os.fstat(fd).st_size
            if synced.get(path) != size:
                os.fsync(fd)
                synced[path] = size
        finally:
            os.close(fd)


def url_of(socket_path: str) -> str:
    """The URL that redis-py's ``from_url`` takes."""
    safe = b"/._-~ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    quoted = "".join(chr(byte) if byte in safe else f"%{byte:02X}" for byte in os.fsencode(socket_path))
    return f"unix://{quoted}?db=0"


def main() -> NoReturn:
    keeper = Keeper(**json.loads(sys.argv[1]))
    # The starter waits for this parent only and gets no child that it did not ask for.
    if os.fork() == 0:
        try:
            keeper.run()
        except Exception as error:  # noqa: BLE001 - the last resort of a process without a terminal
            keeper.note(f"failed: {error!r}")
            keeper.report(error="failed", detail=repr(error))
            os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
