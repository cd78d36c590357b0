"""The connections of a `Connector`: what a call leaves behind, however it ends, never reaches the next one."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest
from support import eventually

from mlqueue import Settings, StoreError
from mlqueue.store import Connector
from mlqueue.store.connection import MOST_IDLE


@pytest.fixture
def connector(server: Settings) -> Iterator[Connector]:
    connector = Connector(server)
    yield connector
    connector.close()


class Interrupt(BaseException):
    """What Dramatiq raises in the midst of a job, whatever the thread is at."""


def interrupt(thread: threading.Thread) -> None:
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_long(thread.ident), ctypes.py_object(Interrupt))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_call_that_is_interrupted_anywhere_leaves_no_answer_for_the_next(connector: Connector) -> None:
    over = False
    wrong: list[tuple[bytes, bytes]] = []
    interrupted = calls = 0

    def ask() -> None:
        nonlocal interrupted, calls
        while not over:
            with contextlib.suppress(Interrupt):
                interrupted += 1
                while not over:
                    calls += 1
                    sent = b"%d" % random.getrandbits(60)
                    answer = connector.execute("ECHO", sent)
                    if answer != sent:
                        wrong.append((sent, answer))

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 20
    while interrupted < 300 and time.monotonic() < deadline:
        seen = calls
        eventually(lambda seen=seen: calls > seen)
        threading.Event().wait(random.random() * 0.001)
        interrupt(thread)
    over = True
    thread.join()
    assert ([], True) == (wrong, calls > 300), (wrong[:3], calls)
    assert len(connector._idle) <= 1


def test_a_refused_command_costs_no_connection_and_a_broken_one_does(connector: Connector) -> None:
    first = connector.execute("CLIENT", "ID")
    with pytest.raises(StoreError, match="unknown command"):
        connector.execute("NONSENSE")
    assert first == connector.execute("CLIENT", "ID")
    # The server ends it, and those that lie idle.
    connector.client.client_kill_filter(_id=first)
    assert first < connector.execute("CLIENT", "ID")


def test_a_database_that_the_server_does_not_have_is_refused_with_what_decides_it(server: Settings) -> None:
    address, _, _ = (server.url or "").partition("?")
    connector = Connector(dataclasses.replace(server, url=f"{address}?db=99"))
    with pytest.raises(StoreError, match="It has so many databases as its setting `databases` says"):
        connector.execute("PING")
    connector.close()


def test_calls_at_a_time_have_a_connection_each_and_few_are_kept(connector: Connector) -> None:
    numbers = set()
    count = MOST_IDLE + 6
    together = threading.Barrier(count)

    def ask() -> None:
        together.wait()
        numbers.add(connector.execute("BLPOP", "nothing", 0.2) or connector.execute("CLIENT", "ID"))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 < len(numbers)
    assert MOST_IDLE == len(connector._idle)


def test_a_fork_has_connections_of_its_own(connector: Connector) -> None:
    """Both use what there was before the fork, at the same time: shared, each would read the other's answers."""
    assert connector.execute("ECHO", b"before") == b"before"
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(read)
            os.write(write, b"begun")
            right = all(connector.execute("ECHO", b"child %d" % n) == b"child %d" % n for n in range(500))
            os._exit(0 if right else 3)
        os._exit(4)
    os.close(write)
    os.read(read, 5)
    os.close(read)
    mine = [connector.execute("ECHO", b"parent %d" % n) for n in range(500)]
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert [b"parent %d" % n for n in range(500)] == mine


def test_a_fork_while_another_thread_connects_does_not_wait_for_it(connector: Connector) -> None:
    with connector._lock:  # as a thread has it that starts the server
        pid = os.fork()
        if pid == 0:
            # It has no thread but this one: nobody would give the lock up.
            os._exit(0 if connector.execute("PING") == b"PONG" else 3)
    eventually(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)


def test_what_is_under_way_when_it_is_closed_ends_well_and_leaves_no_connection(connector: Connector) -> None:
    answers = []
    thread = threading.Thread(target=lambda: answers.append(connector.execute("BLPOP", "nothing", 0.3)))
    thread.start()
    eventually(lambda: connector._client is not None)
    number = connector.client.client_id()
    connector.close()
    thread.join()
    assert ([None], []) == (answers, connector._idle)
    assert number < connector.execute("CLIENT", "ID")
