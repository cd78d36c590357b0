"""Connections to the store: from a URL, or to the embedded server, and what a broken one turns into.

redis-py's own retries are off: a call here is retried as a whole, by `Connector.run`, because a script that is sent
again must be one that may be (all of ours are), and because the embedded server may have to be started in between.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import redis
from hiredis import pack_command
from redis._parsers.encoders import Encoder
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.exceptions import AskError
from redis.retry import Retry

from ..embedded import EmbeddedServer
from ..errors import StoreError, StoreFull, StoreUnavailable
from ..settings import Settings
from ..storeurl import CLUSTER, parse_store_url
from .places import MISPLACED, Place
from .records import LARGE
from .scripts import Script

#: Oldest versions that have what the scripts use (their flags, multi-key blocking pops).
OLDEST: Final = {"redis": (7, 0), "valkey": (7, 2)}

#: Pauses between the tries of a call, in seconds: the first, and the longest.
FIRST_PAUSE: Final = 0.02
LONGEST_PAUSE: Final = 0.5

#: How many connections are kept that no call is using.
MOST_IDLE: Final = 64

#: Errors after which the same call may go through: the connection, or the server's state of the moment.
PASSING: Final = (redis.ConnectionError, redis.TimeoutError, *MISPLACED)

#: Replies that pass by themselves: a restart that loads its data, a fail-over, a script in progress.
PASSING_PREFIXES: Final = ("LOADING", "MASTERDOWN", "BUSY", "TRYAGAIN", "READONLY", "UNBLOCKED")

#: How answers begin that refuse the user: as a whole, one of his commands, one of those in a script.
REFUSED_PREFIXES: Final = ("NOAUTH", "WRONGPASS", "NOPERM", "ACL failure")

#: What is said in a server's answer when it has no room for more.
FULL_PREFIXES: Final = ("OOM", "MISCONF", "command not allowed when used memory")


class Connector:
    """Gives connections to the store that the settings name, and runs calls over them until they go through."""

    def __init__(self, settings: Settings, root: str = "") -> None:
        self.settings = settings
        #: What all keys begin with that calls go to, where that decides which server of a cluster has them.
        self.root = root
        #: Which of several servers has our keys; None when there is only one.
        self.place: Place | None = None
        self._lock = threading.Lock()
        self._client: redis.Redis | None = None
        self._checked = False
        #: Connections that no call is using, the one that was used last behind the others. Another list is put in its
        #: place when they are to be used no more: a call that is under way then does not give its own back.
        self._idle: list[Any] = []
        #: Those that `for_root` has made.
        self._bound: list[Connector] = []
        #: The embedded server, when no URL is set.
        self.embedded: EmbeddedServer | None = None
        if settings.url is None:
            self.embedded = EmbeddedServer(
                settings.home,
                binary=settings.server_bin,
                durability=settings.durability,
                grace=settings.server_grace,
            )
        _connectors.add(self)

    @property
    def client(self) -> redis.Redis:
        """The client in use. Made, and the embedded server started, at the first use."""
        client = self._client
        if client is None:
            with self._lock:
                client = self._client
                if client is None:
                    url = self.embedded.ensure() if self.embedded else self.settings.url
                    self._client = client = self._make(str(url))
        return client

    def _make(self, url: str) -> redis.Redis:
        options: dict[str, Any] = {} if urlsplit(url).scheme == "unix" else {"socket_keepalive": True}
        options |= {
            "protocol": 2,
            "socket_timeout": self.settings.socket_timeout,
            "socket_connect_timeout": self.settings.connect_timeout,
            "retry": Retry(NoBackoff(), 0),
            "health_check_interval": 0,
            "decode_responses": False,
            "command_packer": _Packer(),
        }
        parsed = parse_store_url(url)
        if not parsed.kind:
            return redis.Redis.from_url(url, **options)
        self.place = Place(parsed, options, self.root)
        return redis.Redis.from_pool(self.place.pool())

    def for_root(self, root: str) -> Connector:
        """A connector for the keys that begin with `root`: this one, unless they may be elsewhere in a cluster."""
        url = self.settings.url
        if self.root == root or url is None or parse_store_url(url).kind != CLUSTER:
            return self
        with self._lock:
            bound = next((one for one in self._bound if one.root == root), None)
            if bound is None:
                bound = Connector(self.settings, root)
                self._bound.append(bound)
        return bound

    def scan(self, pattern: str, count: int) -> Iterator[list[bytes]]:
        """The keys of all servers that match a pattern, some at a time."""
        self.execute("PING")
        if self.place is None:
            yield from _scan(self.execute, pattern, count)
            return
        with translated(self.where):
            for address in self.place.masters():
                with self.place.connected_to(address) as connection:
                    yield from _scan(lambda *command, over=connection: send(over, command), pattern, count)

    @property
    def where(self) -> str:
        """The store's address for messages, without a password."""
        if self.embedded:
            return f"the embedded server in {self.embedded.home}"
        return self.settings.masked_url or "the store"

    def connection(self) -> Any:
        """A connection of redis-py that belongs to the caller alone, who closes it with ``disconnect()``."""
        with translated(self.where):
            connection = self._new_connection()
            connection.connect()
            self._check_version(connection)
            return connection

    def _new_connection(self) -> Any:
        # Not the pool's make_connection(): that counts those it has ever made, and refuses the hundredth.
        pool = self.client.connection_pool
        return pool.connection_class(**pool.connection_kwargs)

    def reconnect(self) -> None:
        """After a broken connection: makes sure that there is a server to connect to."""
        if self.embedded:
            self.embedded.ensure()
        elif self.place is not None:
            self.place.doubt()

    def run(self, script: Script, *args: bytes | str | float, patience: float | None = None) -> Any:
        """Runs a script, again while the store cannot be reached, for at most `patience` seconds.

        Raises `StoreUnavailable` when they are over, `StoreFull` and `StoreError` at once.
        """
        return self.execute("EVALSHA", script.sha, 1, *args, script=script, patience=patience)

    def execute(self, *command: Any, script: Script | None = None, patience: float | None = None) -> Any:
        """Sends a command, retried as `run` does; one that may not be sent twice passes ``patience=0``."""
        deadline = time.monotonic() + (self.settings.command_timeout if patience is None else patience)
        pause = FIRST_PAUSE
        while True:
            try:
                return self._once(command, script)
            except PASSING as error:
                failure: Exception = error
            except redis.ResponseError as error:
                if not str(error).startswith(PASSING_PREFIXES):
                    raise translate(error, self.where) from error
                failure = error
            if time.monotonic() + pause >= deadline:
                raise translate(failure, self.where) from failure
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(pause * 2, LONGEST_PAUSE)
            self.reconnect()

    def _once(self, command: tuple[Any, ...], script: Script | None) -> Any:
        # Bare connections, as many as there are calls at a time: a third of the cost of Redis.execute_command with its
        # pool, which every submit would pay. Not one for each thread, of which a web server has thousands with gevent.
        idle = self._idle
        try:
            connection = idle.pop()  # from here on nobody else's
        except IndexError:
            connection = self._new_connection()
        try:
            if not self._checked:
                self._check_version(connection)
            answer = send(connection, command, script)
        except redis.ResponseError as error:
            if isinstance(error, MISPLACED):
                # Another server has our keys now, or will have; those that nobody uses lead to this one too.
                connection.disconnect()
                self._drop_idle()
            else:
                self._give_back(connection, idle)
            raise
        except PASSING:
            connection.disconnect()
            # Those that nobody uses are broken as well, as a rule, and each would cost a try.
            self._drop_idle()
            raise
        except BaseException:
            # Interrupted with an answer outstanding, as Dramatiq does to a job that takes too long: the next call would
            # read it as its own.
            connection.disconnect()
            raise
        self._give_back(connection, idle)
        return answer

    def _give_back(self, connection: Any, idle: list[Any]) -> None:
        """Keeps a connection, whose answers have all been read, for another call."""
        if idle is self._idle and len(idle) < MOST_IDLE:
            idle.append(connection)
        else:
            connection.disconnect()

    def _drop_idle(self) -> None:
        idle, self._idle = self._idle, []
        while idle:
            with contextlib.suppress(IndexError):  # a call that began before has taken it
                idle.pop().disconnect()

    def _after_fork(self) -> None:
        """In a forked child: the connections are the parent's, and so are the threads that held the lock."""
        self._lock = threading.Lock()
        self._idle = []

    def _check_version(self, connection: Any) -> None:
        connection.send_command("HELLO", 2)
        answer = connection.read_response()
        hello = dict(zip(answer[::2], answer[1::2], strict=False))
        server = hello[b"server"].decode()
        version = hello[b"version"].decode()
        oldest = OLDEST.get(server, OLDEST["redis"])
        if tuple(int(part) for part in version.split(".")[:2]) < oldest:
            raise StoreError(
                f"{self.where} runs {server} {version}; mlqueue needs Redis 7.0 or Valkey 7.2 or newer. "
                "Upgrade it, or unset MLQUEUE_URL and REDIS_URL to use the embedded server."
            )
        self._checked = True

    def close(self) -> None:
        """Closes the connections, those in use when their call is over, and gives up the embedded server."""
        with self._lock:
            self._drop_idle()
            if self._client is not None:
                self._client.close()
                self._client = None
                self._checked = False
        for bound in self._bound:
            bound.close()
        if self.embedded:
            self.embedded.release()


#: What commands are made of, as a rule.
SIMPLE: Final = frozenset({bytes, str, int, float})


class _Packer:
    """Commands as bytes: by hiredis (redis-py looks at each argument before, for twice the time), but without a copy of
    what is large."""

    def __init__(self) -> None:
        self._any = PythonRespSerializer(LARGE, Encoder("utf-8", "strict", False).encode)

    def pack(self, *args: Any) -> list[Any]:
        """The parts of a command."""
        for arg in args:
            kind = type(arg)
            if (kind is bytes and len(arg) >= LARGE) or kind not in SIMPLE:
                return self._any.pack(*args)  # type: ignore[no-any-return]
        # Those of redis-py itself may be two words.
        return [pack_command(args)] if args[0].isalnum() else self._any.pack(*args)


#: Those that a fork has to look after.
_connectors: weakref.WeakSet[Connector] = weakref.WeakSet()


def _after_fork() -> None:
    for connector in list(_connectors):
        connector._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _scan(execute: Callable[..., Any], pattern: str, count: int) -> Iterator[list[bytes]]:
    cursor = b"0"
    while True:
        cursor, keys = execute("SCAN", cursor, "MATCH", pattern, "COUNT", count)
        yield keys
        if cursor == b"0":
            return


def send(connection: Any, command: tuple[Any, ...], script: Script | None = None) -> Any:
    """One command over one connection of redis-py; a script that the server does not know yet is sent whole."""
    connection.send_command(*command)
    try:
        return connection.read_response()
    except redis.exceptions.NoScriptError:
        if script is None:
            raise
        connection.send_command("EVAL", script.text, *command[2:])
        return connection.read_response()


def shut(connection: Any) -> None:
    """Ends a read over a connection of redis-py that another thread is in."""
    sock = connection._sock
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Errors of redis-py inside become errors of our tree."""
    try:
        yield
    except redis.RedisError as error:
        raise translate(error, where) from error


def translate(error: Exception, where: str) -> StoreError:
    """The error of our tree for one of redis-py."""
    text = str(error)
    if isinstance(error, AskError):
        text = f"our keys are moving, or have moved, to another server (slot and server: {text})"
    if any(prefix in text for prefix in FULL_PREFIXES):
        return StoreFull(f"{StoreFull.__doc__} ({where}: {text})")
    if isinstance(error, redis.AuthenticationError) or text.startswith(REFUSED_PREFIXES):
        return StoreError(
            f"{where} refused us: {text}. Check user and password in MLQUEUE_URL, and that the user may run scripts "
            "(+@scripting +@write +@read +@blocking +@connection +time on keys mlq:*)."
        )
    if isinstance(error, PASSING) or text.startswith(PASSING_PREFIXES):
        return StoreUnavailable(
            f"{where} cannot be reached: {text.rstrip('.') or type(error).__name__}. Is it running, and is its "
            "address right (host and port or url of MLQ(), else MLQUEUE_URL, else REDIS_URL)? Without any of these an "
            "embedded server is used."
        )
    if text.startswith("DB index"):
        return StoreError(
            f"{where} refused us: {text}. It has so many databases as its setting `databases` says, 16 unless that was "
            "changed, the first being 0."
        )
    return StoreError(f"{where} refused a command: {text}")
