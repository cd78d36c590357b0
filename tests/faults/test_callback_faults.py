"""Callbacks under faults: receivers of every bad kind at once, and senders that are killed while they deliver."""

from __future__ import annotations

import itertools
import signal
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import trustme
from harness import ACTORS, LONG, QUIET, Fleet, MakeFleet, send, wait_for
from receivers import (
    Answer,
    Receiver,
    bomb,
    bombs,
    drips,
    drips_body,
    floods,
    free_port,
    hangs,
    hangs_up_in_the_head,
    receiver,
    redirects_to,
)

from mlqueue import JobRecord
from mlqueue.callbacks import PAUSES
from mlqueue.job import CallbackState

pytestmark = pytest.mark.faults

#: How much later a job may end because callbacks are delivered beside it, in seconds.
DELAY = 0.05 if QUIET else 0.4

#: How long one try may take in these tests, in seconds.
TIMEOUT = 1.0 if QUIET else 2.0

#: For the user's module: a name that leads to an allowed address and to one that is not, in turn.
REBINDS = """
import itertools, socket

look_up, questions = socket.getaddrinfo, itertools.count()


def rebinds(host, port, *args, **options):
    if host == "rebinds.test":
        host = ("127.0.0.1", "127.0.0.2")[next(questions) % 2]
    return look_up(host, port, *args, **options)


socket.getaddrinfo = rebinds
"""


def called_back(here: Fleet, jobs: Sequence[Any]) -> list[JobRecord]:
    """The records of jobs, when all of their callbacks are delivered or given up."""

    def look() -> list[JobRecord]:
        records = [record for record in here.records(jobs) if record is not None]
        assert len(records) == len(jobs)
        ended = (CallbackState.DELIVERED, CallbackState.FAILED)
        return records if all(record.callback_state in ended for record in records) else []

    return wait_for(look, 120, here.logs)


class Load:
    """Jobs without callbacks, submitted at a steady pace, and how long each took from its submit to its end."""

    def __init__(self, here: Fleet) -> None:
        self._here = here
        self._pace = threading.Event()
        self.jobs: list[Any] = []

    def submit(self, actor: str, **options: Any) -> Any:
        self._pace.wait(0.01)
        self.jobs.append(self._here.submit(actor, **options))
        return self.jobs[-1]

    def took(self) -> list[float]:
        """Seconds, sorted."""
        self._here.wait_drained()
        records = self._here.records(self.jobs)
        return sorted((record.finished_at or 0) - record.created_at for record in records if record)


# Receivers


def test_receivers_of_every_bad_kind_delay_no_job_and_each_callback_ends_as_it_should(fleet: MakeFleet) -> None:
    each = 100 if LONG else 20
    here = fleet(actors=ACTORS + REBINDS, callback_allow="127.0.0.1, ::1", callback_timeout=TIMEOUT)
    here.worker(processes=2, threads=8)

    bomb()  # making it takes time
    alone = Load(here)
    for _ in range(14 * each):
        alone.submit("quiet")
    before = alone.took()

    untrusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(untrusted)
    with ExitStack() as stack:

        def on(*answers: Answer, **options: Any) -> Receiver:
            return stack.enter_context(receiver(*answers, **options))

        inside = on(host="127.0.0.2")
        rebound = on()
        trap = on(host="127.0.0.2", port=rebound.port)
        # What each gets, how that ends, and the status of each try.
        kinds: dict[str, tuple[Receiver | str, str, list[int | None]]] = {
            "good": (on(200), "delivered", [200]),
            "500 twice": (on(500, 500, 200), "delivered", [500, 500, 200]),
            "429 and Retry-After": (on(429, 200), "delivered", [429, 200]),
            "410": (on(410), "failed", [410]),
            "redirect": (on(redirects_to(inside.url)), "failed", [302]),
            "hangs": (on(hangs), "failed", [None] * 3),
            "drips": (on(drips), "failed", [None] * 3),
            "drips a body": (on(drips_body), "delivered", [200]),
            "floods": (on(floods), "delivered", [200]),
            "gzip bomb": (on(bombs), "delivered", [200]),
            "hangs up": (on(hangs_up_in_the_head), "failed", [None] * 3),
            "bad TLS": (on(tls=untrusted), "failed", [None] * 3),
            "IPv6 only": (on(host="::1"), "delivered", [200]),
            "down": (f"http://127.0.0.1:{free_port()}/", "failed", [None] * 3),
            "rebinds": (f"http://rebinds.test:{rebound.port}/", "either", []),
        }
        load = Load(here)
        jobs: dict[str, list[Any]] = {kind: [] for kind in kinds}
        for _, (kind, (target, *_)) in itertools.product(range(each), kinds.items()):
            url = target if isinstance(target, str) else target.url
            jobs[kind].append(load.submit("quiet", callback=url))
        everything = [job for group in jobs.values() for job in group]
        while any(record.callback_state is CallbackState.PENDING for record in here.records(everything) if record):
            for _ in range(50):
                load.submit("quiet")  # others go on meanwhile
        after = load.took()
        report = here.audit("callbacks_of_every_kind", [*alone.jobs, *load.jobs], callbacks=False)

        for kind, (target, state, statuses) in kinds.items():
            for record in called_back(here, jobs[kind]):
                report.callbacks_delivered += record.callback_state is CallbackState.DELIVERED
                report.callbacks_failed += record.callback_state is CallbackState.FAILED
                got = [attempt.status for attempt in record.callback_attempts]
                if state == "either":
                    assert len(got) == 1
                    continue
                if record.callback_state != state or got != statuses:
                    report.note(f"{kind}: {record.callback_state} after {record.callback_attempts}")
                if isinstance(target, Receiver) and target.tls is None:
                    calls = target.of(record.id)
                    report.callbacks_repeated += len(calls) - len(statuses)
                    check_schedule([call.at for call in calls])
                longest = max(attempt.seconds for attempt in record.callback_attempts)
                report.longest_s = max(report.longest_s or 0, longest)
        # Nothing was called but what was checked.
        assert (inside.calls, trap.calls) == ([], [])
        assert 0 < len(rebound.calls) < each
    assert report.callbacks_repeated == 0
    assert report.longest_s is not None
    assert report.longest_s < TIMEOUT + (0.5 if QUIET else 5)
    report.notes.append(f"ms from submit to end, alone {shown(before)}, with callbacks {shown(after)}")
    report.finish()
    assert at(0.5, after) < at(0.5, before) + DELAY
    # Not the very last: on a machine of two cores the receivers' own work may take one.
    assert at(0.99, after) < at(0.99, before) + DELAY
    assert at(1, after) < TIMEOUT / 2


def at(share: float, took: Sequence[float]) -> float:
    return took[min(len(took) - 1, int(share * len(took)))]


def shown(took: Sequence[float]) -> str:
    return ", ".join(
        f"{name} {1000 * at(share, took):.0f}" for name, share in (("50 %", 0.5), ("99 %", 0.99), ("most", 1))
    )


def check_schedule(calls: Sequence[float]) -> None:
    """The second call comes after 1 s, the third after 5 more."""
    for pause, (first, second) in zip(PAUSES, itertools.pairwise(calls), strict=False):
        late = second - first - pause
        assert -0.05 < late < (TIMEOUT + 1 if QUIET else 15), calls


# Senders


def test_callbacks_of_workers_that_are_killed_while_they_deliver_arrive_all_the_same(fleet: MakeFleet) -> None:
    count, kills = (2000, 40) if LONG else (200, 8)
    here = fleet(callback_allow="loopback", callback_timeout=10, lease=1, sweep_interval=0.25)
    worker = here.worker(processes=2, threads=8)
    port = free_port()
    jobs = [here.submit("quiet", callback=f"http://127.0.0.1:{port}/hook") for _ in range(count)]
    here.wait_drained()
    wait_for(lambda: sum(len(record.callback_attempts) for record in here.records(jobs) if record) >= count // 2)

    answering = threading.Semaphore(0)

    def takes_a_while(receiver: Receiver, connection: socket.socket) -> None:
        answering.release()
        receiver.closing.wait(0.1)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with receiver(takes_a_while, port=port) as hook:
        for kill in range(kills):
            while answering.acquire(blocking=False):
                pass
            if not answering.acquire(timeout=20):
                break  # all of them have been delivered
            if kill == kills // 2:
                worker.kill_all()
                worker = here.worker(processes=2, threads=8)
            else:
                ready = len(worker.pids())
                send(signal.SIGKILL, [worker.pids(seat)[-1] for seat in (1, 2)])
                worker.wait_ready(ready + 2)
        assert kill >= 3
        records = called_back(here, jobs)
        calls = {job.id: len(hook.of(job.id)) for job in jobs}
    report = here.audit("callbacks_of_killed_senders", jobs, callbacks=False)
    for record in records:
        report.callbacks_delivered += record.callback_state is CallbackState.DELIVERED
        report.callbacks_failed += record.callback_state is CallbackState.FAILED
        answered = [attempt for attempt in record.callback_attempts if attempt.status == 200]
        report.callbacks_repeated += calls[record.id] - len(answered)
        if not calls[record.id]:
            report.lost += 1
        if record.callback_state is not CallbackState.DELIVERED or not answered:
            report.note(f"{record.id}: {record.callback_state} after {record.callback_attempts}")
    report.finish()
    assert report.callbacks_repeated > 0, "no process was killed while it delivered"
