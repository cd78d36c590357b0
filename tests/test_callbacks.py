"""Callbacks: what is told, how often it is tried, how long a try may take, and where it may go."""

from __future__ import annotations

import dataclasses
import logging
import socket
import ssl
import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from receivers import (
    Answer,
    Receiver,
    bombs,
    drips,
    drips_body,
    drips_headers,
    floods,
    floods_headers,
    free_port,
    hangs,
    hangs_up,
    hangs_up_in_the_head,
    receiver,
    redirects_to,
    speaks_something_else,
)
from support import StartWorker, eventually, fresh_app

import mlqueue
from mlqueue import MLQ, InvalidJob, InvalidTransition, Job, Result, Settings, SettingsError, State, callbacks
from mlqueue.beside import MOST_CALLBACKS
from mlqueue.callbacks import PAUSES, fetch
from mlqueue.job import CallbackAttempt, CallbackState, new_id
from mlqueue.store.records import CALLBACK, CALLBACKS, pack_callback_attempt
from mlqueue.store.scripts import script
from mlqueue.urlpolicy import AddressPolicy, AddressRefused, canonical, policy_of

LOOPBACK = policy_of("loopback")


@pytest.fixture
def server(server: Settings) -> Settings:
    """The server of the session, with settings that let callbacks go to this machine."""
    return dataclasses.replace(server, callback_allow="loopback", callback_timeout=5.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the pauses between tries short."""
    monkeypatch.setattr(callbacks, "PAUSES", (0.01, 0.02))


def ended(job: Job[Any]) -> mlqueue.JobRecord:
    """The record of a job, as soon as its callback is delivered or given up."""

    def look() -> mlqueue.JobRecord | None:
        record = job.record
        return record if record.callback_state in (CallbackState.DELIVERED, CallbackState.FAILED) else None

    record = eventually(look)
    assert record is not None
    return record


def deliveries(app: MLQ) -> list[mlqueue.JobRecord]:
    """Callbacks that have not been delivered or given up."""
    waiting = (State.QUEUED, State.SCHEDULED, State.RUNNING)
    return app.store.page(states=waiting, queue=CALLBACKS, limit=1000).jobs


# What is told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("97 % of a&b=c/ü?#\n+", "97 % of a&b=c/ü?#\n+"),
        (0.25, "0.25"),
        (0, "0"),
        (True, "True"),
        (None, ""),
        ([1, 2], ""),
        ("x" * 1001, ""),
        (Result(short="short", full=b"\x89PNG"), "short"),
    ],
    ids=str,
)
def test_success_tells_1_the_id_and_the_short_result_as_text(
    mlq: MLQ, start_worker: StartWorker, value: object, told: str
) -> None:
    mlq.actor(lambda: value, actor_name="work")
    start_worker()
    with receiver() as hook:
        job = mlq.submit("work", callback=hook.url)
        record = ended(job)
        (call,) = hook.calls
    assert call.query == {"success": "1", "job_id": job.id, "short_result": told}
    assert record.callback_state is CallbackState.DELIVERED
    (attempt,) = record.callback_attempts
    assert (attempt.status, attempt.error) == (200, "")
    assert attempt.worker == record.worker
    assert record.finished_at is not None
    assert abs(attempt.at - record.finished_at) < 5
    assert 0 < attempt.seconds < 5


def test_the_query_of_the_url_stays_as_it_is_and_its_fragment_does_not_travel(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    mlq.actor(lambda: "a b+c", actor_name="work")
    start_worker()
    with receiver() as hook:
        urls = [
            hook.url + "?token=a%2Fb+c&job_id=mine&empty=&ü#top",
            f"http://127.0.0.1:{hook.port}",
            hook.url + "?",
        ]
        jobs = [mlq.submit("work", callback=url) for url in urls]
        for job in jobs:
            ended(job)
        targets = {job.id: call.target for job in jobs for call in hook.of(job.id)}
    told = [f"success=1&job_id={job.id}&short_result=a%20b%2Bc" for job in jobs]
    assert list(targets.values()) == [
        f"/hook?token=a%2Fb+c&job_id=mine&empty=&%C3%BC&{told[0]}",
        f"/?{told[1]}",
        f"/hook?{told[2]}",
    ]


def test_failure_tells_0_and_the_first_line_of_the_error(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0)
    def work(text: str) -> None:
        raise ValueError(text)

    start_worker()
    with receiver() as hook:
        jobs = [work.submit(text, callback=hook.url) for text in ("no such file\nat all", "", "x" * 3000)]  # type: ignore[call-arg]
        for job in jobs:
            ended(job)
        told = [call.told for job in jobs for call in hook.of(job.id)]
    assert told == [("0", "ValueError: no such file"), ("0", "ValueError"), ("0", f"ValueError: {'x' * 988}")]


def test_a_job_that_failed_first_and_then_succeeded_tells_of_its_success_once(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    @mlq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def work() -> str:
        if mlqueue.current_job().retries == 0:
            raise ValueError("not yet")
        return "now"

    start_worker()
    with receiver() as hook:
        job = work.with_options(callback=hook.url).submit()
        assert ended(job).retries == 1
        assert [call.told for call in hook.calls] == [("1", "now")]


def test_a_job_that_is_cancelled_before_it_began_tells_0_by_a_worker_that_could_not_have_run_it(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    start_worker()
    with receiver() as hook:
        job = mlq.submit("of_somebody_else", callback=hook.url)
        job.cancel()
        record = ended(job)
        assert [call.told for call in hook.calls] == [("0", "")]
    assert (record.state, record.worker) == (State.CANCELLED, None)


def test_a_job_that_is_dead_by_a_crash_tells_0_and_how_its_worker_died(mlq: MLQ, start_worker: StartWorker) -> None:
    store, victim = mlq.store, uuid.uuid4().hex
    store.start_worker(victim, {"pid": 1}, {"work": "default"})
    with receiver() as hook:
        job = mlq.submit("work", callback=hook.url, max_crashes=1)
        turn = store.turn_command(victim, new_id(), 1, [store.lane("default", "work")], ())
        store.connector.execute(*turn, script=script("turn"))
        assert store.release(victim, "crash", "killed by signal 9") == {job.id: "dead"}
        start_worker()
        ended(job)
        assert [call.told for call in hook.calls] == [("0", "killed by signal 9")]


def test_a_job_that_is_retried_by_hand_calls_once_at_each_of_its_ends(mlq: MLQ, start_worker: StartWorker) -> None:
    fails = [True, True, False]

    @mlq.actor(max_retries=0)
    def work() -> str:
        if fails.pop(0):
            raise ValueError("no")
        return "yes"

    start_worker()
    with receiver() as hook:
        job = work.with_options(callback=hook.url).submit()
        for ends in (1, 2, 3):
            eventually(lambda ends=ends: len(hook.calls) == ends)  # type: ignore[misc]
            ended(job)
            if ends < 3:
                job.retry()
        eventually(lambda: not deliveries(mlq))
        assert [call.told for call in hook.calls] == [("0", "ValueError: no")] * 2 + [("1", "yes")]


def test_a_request_says_who_asks_and_for_whom_and_nothing_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with receiver() as hook:
        assert fetch(f"http://LOCALHOST.:{hook.port}/", LOOPBACK, 5).status == 200
        (call,) = hook.calls
    assert call.headers == {
        "Host": f"localhost:{hook.port}",
        "User-Agent": f"mlqueue/{mlqueue.__version__}",
        "Accept": "*/*",
        "Connection": "close",
    }


# Tries


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answers", "statuses", "state"),
    [
        ((204,), [204], "delivered"),
        ((500, 500, 200), [500, 500, 200], "delivered"),
        ((429, 201), [429, 201], "delivered"),
        ((503,), [503, 503, 503], "failed"),
        ((404,), [404], "failed"),
        ((410,), [410], "failed"),
        ((500, 400), [500, 400], "failed"),
        ((304,), [304], "failed"),
        ((hangs_up, hangs_up_in_the_head, speaks_something_else), [None, None, None], "failed"),
        ((hangs_up, 200), [None, 200], "delivered"),
    ],
)
def test_tries_go_on_after_what_may_pass_and_end_after_what_will_not(
    mlq: MLQ, start_worker: StartWorker, answers: tuple[Answer, ...], statuses: list[int | None], state: str
) -> None:
    mlq.actor(lambda: None, actor_name="work")
    start_worker()
    with receiver(*answers) as hook:
        job = mlq.submit("work", callback=hook.url)
        record = ended(job)
        eventually(lambda: not deliveries(mlq))
        assert len(hook.calls) == len(statuses)
    assert [attempt.status for attempt in record.callback_attempts] == statuses
    assert record.callback_state == state
    assert [bool(attempt.error) for attempt in record.callback_attempts] == [
        status is None or not 200 <= status < 300 for status in statuses
    ]


@pytest.mark.usefixtures("quick")
def test_a_receiver_that_is_down_is_tried_three_times_and_then_stands_on_the_record_as_failed(
    mlq: MLQ, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    mlq.actor(lambda: "fine", actor_name="work")
    start_worker()
    with caplog.at_level(logging.INFO):
        job = mlq.submit("work", callback=f"http://127.0.0.1:{free_port()}/hook?token=hunter2")
        record = ended(job)
        eventually(lambda: not deliveries(mlq))
    assert (record.state, record.callback_state) == (State.SUCCEEDED, CallbackState.FAILED)
    assert [attempt.error for attempt in record.callback_attempts] == ["its connection failed: Connection refused"] * 3
    own = [entry for entry in caplog.records if entry.name == "mlqueue.callbacks"]
    assert [entry.levelname for entry in own] == ["INFO", "INFO", "WARNING"]
    assert f"the callback of job {job.id} is given up: 127.0.0.1:" in own[-1].getMessage()
    assert "hunter2" not in caplog.text
    assert "hunter2" not in repr(record.callback_attempts)


def test_the_second_try_comes_after_1_s_and_the_third_after_5(mlq: MLQ, start_worker: StartWorker) -> None:
    mlq.actor(lambda: None, actor_name="work")
    start_worker()
    with receiver(500) as hook:
        mlq.submit("work", callback=hook.url)

        def pause() -> float:
            (waiting,) = eventually(lambda: mlq.store.page(states=[State.SCHEDULED], queue=CALLBACKS).jobs)
            (call,) = hook.calls[-1:]
            return float((waiting.due_at or 0) - call.at)

        assert 0.99 < pause() < 4
        eventually(lambda: len(hook.calls) == 2)
        assert 4.99 < pause() < 8
    assert PAUSES == (1, 5)


@pytest.mark.usefixtures("quick")
def test_an_app_with_other_middleware_tries_again_too(server: Settings, start_worker: StartWorker) -> None:
    with fresh_app(server) as plain, receiver(500, 500, 200) as hook:
        app = MLQ(plain.name, settings=server, middleware=[])
        app.actor(lambda: None, actor_name="work")
        worker = start_worker(app)
        record = ended(app.submit("work", callback=hook.url))
        worker.stop()
        app.close()
    assert [attempt.status for attempt in record.callback_attempts] == [500, 500, 200]


@pytest.mark.parametrize(
    "url", [f"http://example.com/{'x' * 2048}", "ftp://a/", "http://user@a/", "http:///", "http://a b/"]
)
def test_what_is_no_url_of_a_callback_is_refused_at_submit(mlq: MLQ, url: str) -> None:
    with pytest.raises(InvalidJob, match=r"callback=.*it must be a URL"):
        mlq.submit("work", callback=url)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (hangs_up, "hung up without an answer"),
        (hangs_up_in_the_head, "its answer is not HTTP"),
        (speaks_something_else, "its answer is not HTTP"),
    ],
)
def test_what_is_kept_of_a_bad_answer_says_why_and_nothing_that_the_url_held(answer: Answer, error: str) -> None:
    with receiver(answer) as hook:
        got = fetch(hook.url + "?token=hunter2", LOOPBACK, 5)
    assert (got.status, got.error, got.again) == (None, error, True)


def test_an_actor_may_have_a_callback_for_all_of_its_jobs(mlq: MLQ, start_worker: StartWorker) -> None:
    with pytest.raises(InvalidJob, match=r"option callback='ftp://a/': it must be a URL"):
        mlq.actor(lambda: None, actor_name="wrong", callback="ftp://a/")
    start_worker()
    with receiver() as hook, receiver() as other:
        work = mlq.actor(lambda n: n, actor_name="work", callback=hook.url)
        jobs = [
            work.submit(1),
            work.with_options(callback=other.url).submit(2),
            work.with_options(callback=None).submit(3),
        ]
        assert jobs[2].wait(10)
        for job in jobs[:2]:
            ended(job)
        assert [[call.told for call in one.calls] for one in (hook, other)] == [[("1", "1")], [("1", "2")]]
    assert jobs[2].record.callback is None


# One try has an end


@pytest.mark.parametrize("answer", [hangs, drips, drips_headers])
def test_a_try_ends_in_time_however_slowly_the_receiver_speaks(answer: Answer) -> None:
    with receiver(answer) as hook:
        begun = time.monotonic()
        got = fetch(hook.url, LOOPBACK, 0.3)
        took = time.monotonic() - begun
    assert (got.status, got.error, got.again) == (None, "no answer within 0.3 s", True)
    assert 0.3 <= took < 1.3


def test_a_try_ends_in_time_when_nobody_answers_the_greeting_of_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        begun = time.monotonic()
        got = fetch(f"https://127.0.0.1:{listener.getsockname()[1]}/", LOOPBACK, 0.3)
        took = time.monotonic() - begun
    assert got.error == "no answer within 0.3 s"
    assert 0.3 <= took < 1.3


def test_a_try_ends_in_time_when_the_name_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def look_up(*args: Any, **options: Any) -> list[Any]:
        over.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    begun = time.monotonic()
    got = fetch("http://slow.example/", LOOPBACK, 0.2)
    took = time.monotonic() - begun
    over.set()
    assert (got.error, got.again) == ("no answer within 0.2 s", True)
    assert 0.2 <= took < 1.2


def test_a_name_that_is_not_found_is_tried_again_and_one_that_cannot_be_is_not() -> None:
    got = fetch("http://nowhere.invalid/", LOOPBACK, 5)
    assert (got.status, got.again) == (None, True)
    assert got.error.startswith("its host is not found: ")
    got = fetch(f"http://{'x' * 64}.example/", LOOPBACK, 5)
    assert (got.error, got.again) == ("its host cannot be a name", False)


@pytest.mark.parametrize("answer", [drips_body, floods, floods_headers, bombs])
def test_of_an_answer_only_the_status_counts_and_little_is_read_of_its_body(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "LINGER", 0.2)
    read: list[int] = []
    readinto = callbacks._Incoming.readinto

    def counting(self: callbacks._Incoming, buffer: Any) -> int:
        read.append(readinto(self, buffer))
        return read[-1]

    monkeypatch.setattr(callbacks._Incoming, "readinto", counting)
    with receiver(answer) as hook:
        begun = time.monotonic()
        got = fetch(hook.url, LOOPBACK, 5)
        took = time.monotonic() - begun
    assert (got.status, got.error) == (200, "")
    assert 0 < sum(read) <= 64 * 1024
    assert took < 2


def test_a_receiver_that_answers_is_not_cut_short_while_it_writes() -> None:
    written: list[object] = []

    def answers_slowly(receiver: Receiver, connection: socket.socket) -> None:
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
            for _ in range(10):
                receiver.closing.wait(0.01)
                connection.sendall(b"x" * 1000)
            written.append("all")
        except OSError as error:
            written.append(error)

    with receiver(answers_slowly) as hook:
        assert fetch(hook.url, LOOPBACK, 5).status == 200
    assert written == ["all"]


def test_an_informational_answer_before_the_real_one_is_passed_over() -> None:
    def goes_on(receiver: Receiver, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202 Accepted\r\n\r\n")

    with receiver(goes_on) as hook:
        assert fetch(hook.url, LOOPBACK, 5).status == 202


# Where it may go


PUBLIC = ["8.8.8.8", "1.1.1.1", "192.31.196.1", "2606:4700:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8"]

NOT_PUBLIC = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254"),
    *("172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.0.170", "192.0.2.1", "192.88.99.1", "192.168.1.1"),
    *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1"),
    *("64:ff9b::808:808", "64:ff9b:1::7f00:1", "100::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
    *("2001:2::1", "2001:10::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1", "5f00::1"),
    *("fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1"),
]


def refused(policy: AddressPolicy, *addresses: str, host: str = "name.example") -> bool:
    try:
        policy.check(host, addresses)
    except AddressRefused:
        return True
    return False


def test_only_public_addresses_are_allowed_by_themselves() -> None:
    policy = policy_of(None)
    assert [address for address in PUBLIC if refused(policy, address)] == []
    assert [address for address in NOT_PUBLIC if not refused(policy, address)] == []


def test_one_address_that_is_not_allowed_is_enough() -> None:
    assert refused(policy_of(None), "8.8.8.8", "10.0.0.1")
    assert refused(policy_of("10.0.0.1"), "10.0.0.1", "10.0.0.2")
    assert not refused(policy_of("10.0.0.1"), "10.0.0.1", "8.8.8.8")


@pytest.mark.parametrize(
    ("allow", "allowed", "still_refused"),
    [
        ("10.1.2.0/24", ["10.1.2.0", "10.1.2.255", "::ffff:10.1.2.3"], ["10.1.3.0", "127.0.0.1"]),
        (" 10.1.2.3 ,fd00::/8", ["10.1.2.3", "fd12::1"], ["10.1.2.4", "fc00::1"]),
        ("loopback", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"], ["0.0.0.0", "10.0.0.1", "64:ff9b::7f00:1"]),
        ("Private", ["10.0.0.1", "172.16.0.1", "192.168.0.1", "fd00::1"], ["127.0.0.1", "169.254.169.254", "fe80::1"]),
        ("64:ff9b::/96", ["64:ff9b::808:808"], ["64:ff9b:1::808:808"]),
        ("none.example", [], ["10.0.0.1"]),
    ],
)
def test_the_setting_names_networks_addresses_and_kinds_of_them(
    allow: str, allowed: list[str], still_refused: list[str]
) -> None:
    policy = policy_of(allow)
    assert [address for address in allowed if refused(policy, address)] == []
    assert [address for address in still_refused if not refused(policy, address)] == []


def test_a_host_that_is_named_may_lead_anywhere_and_no_other_host_may() -> None:
    policy = policy_of("Hooks.Internal., gpu-1, bücher.example")
    for host in ("hooks.internal", "HOOKS.internal.", "gpu-1", "BÜCHER.example"):
        assert not refused(policy, "10.0.0.1", host=canonical(host)), host
    for host in ("hooks.internal.example", "x.hooks.internal", "gpu-10"):
        assert refused(policy, "10.0.0.1", host=canonical(host)), host


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("10.0.0.0/33", "is not understood at '10.0.0.0/33'; allowed are networks (10.1.2.0/24), addresses, names of"),
        ("loopback,http://a/", "is not understood at 'http://a/'; allowed are networks"),
        ("loopback,,private", "is not understood at ''; allowed are networks"),
        ("10.1.2", "is not understood at '10.1.2'; allowed are networks"),
        ("a_host/24", "is not understood at 'a_host/24'; allowed are networks"),
        ("*.example.com", "is not understood at '*.example.com'; allowed are networks"),
        ("10.1.2.3/24", "'10.1.2.3/24'; allowed are the network 10.1.2.0/24 and the address 10.1.2.3"),
    ],
)
def test_an_entry_that_is_wrong_is_refused_with_the_settings(value: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({"MLQUEUE_CALLBACK_ALLOW": value})
    message = str(caught.value)
    assert message.startswith(f"MLQUEUE_CALLBACK_ALLOW={value!r} ")
    assert said in message
    assert message.endswith("or none (public addresses only). Change it, or leave it out for the default, none.")


SPELLINGS = [
    *("127.0.0.1", "localhost", "LocalHost.", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001"),
    *("127.1", "①27.0.0.1", "0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]"),
    *("[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "169.254.169.254", "[fe80::1]"),
]


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_of_an_address_of_this_machine_is_connected_to(host: str) -> None:
    with receiver() as hook:
        got = fetch(f"http://{host}:{hook.port}/?token=hunter2", policy_of(None), 5)
        assert hook.calls == []
    assert (got.status, got.again) == (None, False)
    assert "MLQUEUE_CALLBACK_ALLOW" in got.error
    assert "hunter2" not in got.error


def test_a_refusal_says_what_would_allow_it() -> None:
    assert fetch("http://2130706433/", policy_of(None), 5).error == (
        "2130706433 is 127.0.0.1, which is not a public address, and callbacks go to others only where "
        "MLQUEUE_CALLBACK_ALLOW of the workers names them: add 127.0.0.1 or loopback to it."
    )
    with pytest.raises(AddressRefused) as caught:
        policy_of("loopback").check("hooks.corp", ["10.1.2.3"])
    assert str(caught.value).endswith("add 10.1.2.3, private or hooks.corp to it.")
    with pytest.raises(AddressRefused) as caught:
        policy_of(None).check("169.254.169.254", ["169.254.169.254"])
    assert str(caught.value).startswith("169.254.169.254 is not a public address, and ")
    assert str(caught.value).endswith("add 169.254.169.254 to it.")


def test_a_refused_address_is_not_tried_again_and_says_so_on_the_record(
    server: Settings, start_worker: StartWorker
) -> None:
    with fresh_app(dataclasses.replace(server, callback_allow=None)) as app, receiver() as hook:
        app.actor(lambda: None, actor_name="work")
        worker = start_worker(app)
        record = ended(app.submit("work", callback=f"http://127.1:{hook.port}/"))
        eventually(lambda: not deliveries(app))
        assert hook.calls == []
        worker.stop()
    assert record.callback_state is CallbackState.FAILED
    (attempt,) = record.callback_attempts
    assert attempt.status is None
    assert "add 127.0.0.1 or loopback to it" in attempt.error


def test_with_the_embedded_server_loopback_is_allowed_by_itself_and_nothing_else_is(
    tmp_path: Path, start_worker: StartWorker
) -> None:
    settings = Settings.load({}, url=None, home=tmp_path / "home", server_grace=0.5)
    with fresh_app(settings) as app, receiver() as hook:
        app.actor(lambda: None, actor_name="work")
        worker = start_worker(app)
        assert ended(app.submit("work", callback=hook.url)).callback_state is CallbackState.DELIVERED
        assert ended(app.submit("work", callback="http://10.0.0.1/")).callback_state is CallbackState.FAILED
        assert len(hook.calls) == 1
        worker.stop()


def leads_to(*addresses: str, port: int) -> list[Any]:
    """What getaddrinfo says of a name with these addresses."""
    return [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
        if ":" in address
        else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
        for address in addresses
    ]


def test_a_name_is_looked_up_once_and_what_was_checked_is_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[list[str]] = []
    asked: list[str] = []

    def look_up(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        asked.append(host)
        return leads_to(*answers.pop(0), port=port)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    policy = policy_of("127.0.0.1")
    with receiver() as wanted, receiver(host="::1", port=wanted.port) as other:
        answers[:] = [["127.0.0.1"], ["::1"]]
        assert fetch(f"http://rebinds.example:{wanted.port}/", policy, 5).status == 200
        assert (len(wanted.calls), len(other.calls), asked) == (1, 0, ["rebinds.example"])
        assert wanted.calls[0].headers["Host"] == f"rebinds.example:{wanted.port}"
        # And where both come at once, neither is called.
        answers[:] = [["127.0.0.1", "::1"]]
        got = fetch(f"http://rebinds.example:{wanted.port}/", policy, 5)
        assert (got.status, got.again) == (None, False)
        assert got.error.startswith("rebinds.example is ::1, which is not a public address")
        assert (len(wanted.calls), len(other.calls)) == (1, 0)


def test_of_several_addresses_the_next_is_called_when_one_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        return leads_to("::1", "127.0.0.1", port=port)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with receiver() as hook:
        assert fetch(f"http://both.example:{hook.port}/", LOOPBACK, 5).status == 200


def test_a_redirect_to_a_private_address_is_not_followed(mlq: MLQ, start_worker: StartWorker) -> None:
    mlq.actor(lambda: None, actor_name="work")
    start_worker()
    with receiver() as inside, receiver(redirects_to(inside.url)) as hook:
        record = ended(mlq.submit("work", callback=hook.url))
        eventually(lambda: not deliveries(mlq))
        assert (len(hook.calls), len(inside.calls)) == (1, 0)
    assert record.callback_state is CallbackState.FAILED
    (attempt,) = record.callback_attempts
    assert (attempt.status, attempt.error) == (302, "answered 302, a redirect; they are not followed")


# TLS


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process trusts the authority, as one that is started with SSL_CERT_FILE does."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    callbacks.tls_context.cache_clear()
    yield
    callbacks.tls_context.cache_clear()


def certified(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


@pytest.mark.usefixtures("trusted")
def test_a_certificate_is_checked_against_the_name_and_the_name_is_asked_for(authority: trustme.CA) -> None:
    context = certified(authority, "localhost")
    asked: list[str | None] = []
    context.sni_callback = lambda wrapped, name, _: asked.append(name)
    with receiver(tls=context) as hook:
        assert fetch(f"https://localhost:{hook.port}/", LOOPBACK, 5).status == 200
        assert [call.headers["Host"] for call in hook.calls] == [f"localhost:{hook.port}"]
        got = fetch(f"https://127.0.0.1:{hook.port}/", LOOPBACK, 5)
        assert len(hook.calls) == 1
    assert asked[0] == "localhost"
    assert (got.status, got.again) == (None, True)
    assert got.error.startswith("its certificate is not accepted: IP address mismatch")


@pytest.mark.usefixtures("trusted")
def test_a_certificate_of_an_address_counts_for_it(authority: trustme.CA) -> None:
    with receiver(tls=certified(authority, "127.0.0.1")) as hook:
        assert fetch(f"https://127.0.0.1:{hook.port}/", LOOPBACK, 5).status == 200


def test_a_certificate_of_an_authority_that_nobody_knows_is_not_accepted(authority: trustme.CA) -> None:
    with receiver(tls=certified(authority, "localhost")) as hook:
        got = fetch(f"https://localhost:{hook.port}/", LOOPBACK, 5)
        assert hook.calls == []
    assert got.status is None
    assert got.error.startswith("its certificate is not accepted: ")


def test_tls_where_there_is_none_is_an_error_like_any_other() -> None:
    def answers_plainly() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answers_plainly)
        thread.start()
        got = fetch(f"https://127.0.0.1:{listener.getsockname()[1]}/", LOOPBACK, 5)
        thread.join(5)
    assert (got.status, got.again) == (None, True)
    assert got.error.startswith("its connection failed: [SSL")


# Whatever happens to jobs and workers


def test_two_workers_deliver_each_of_100_callbacks_once(mlq: MLQ, server: Settings, start_worker: StartWorker) -> None:
    other = MLQ(mlq.name, settings=server)
    for app in (mlq, other):
        app.actor(lambda n: n, actor_name="work")
    workers = [start_worker(app) for app in (mlq, other)]
    with receiver() as hook:
        jobs = [mlq.submit("work", n, callback=hook.url) for n in range(100)]
        records = [ended(job) for job in jobs]
        eventually(lambda: not deliveries(mlq))
        told = sorted((call.query["job_id"], *call.told) for call in hook.calls)
    assert told == sorted((job.id, "1", str(n)) for n, job in enumerate(jobs))
    assert {len(record.callback_attempts) for record in records} == {1}
    assert {record.callback_state for record in records} == {CallbackState.DELIVERED}
    workers[1].stop()
    other.close()


def test_a_receiver_that_hangs_leaves_places_to_others(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "places", callbacks.Places(3))
    mlq.actor(lambda: None, actor_name="work")
    worker = start_worker()
    with receiver(hangs) as slow, receiver() as good:
        held_up = [mlq.submit("work", callback=slow.url) for _ in range(MOST_CALLBACKS + 8)]
        eventually(lambda: all(job.done for job in held_up) and len(slow.calls) == 3)
        quick = [mlq.submit("work", callback=good.url) for _ in range(8)]
        eventually(lambda: len(good.calls) == len(quick))
        # Those that found no place have not been tried, and none of them is forgotten.
        assert 3 == len(slow.calls)
        assert {0} == {len(job.record.callback_attempts) for job in held_up}
        eventually(lambda: len(held_up) == len(deliveries(mlq)))
        worker.stop()


def test_a_worker_whose_only_thread_is_busy_delivers(mlq: MLQ, start_worker: StartWorker) -> None:
    over = threading.Event()
    mlq.actor(lambda: None, actor_name="quick")
    mlq.actor(lambda: over.wait(30) and None, actor_name="long")
    start_worker(threads=1)
    with receiver() as hook:
        first = mlq.submit("quick", callback=hook.url)
        long = mlq.submit("long")
        eventually(lambda: long.state is State.RUNNING)
        assert ended(first).callback_state is CallbackState.DELIVERED
        waiting = mlq.submit("quick", callback=hook.url)
        waiting.cancel()
        assert ended(waiting).callback_state is CallbackState.DELIVERED
        assert long.state is State.RUNNING
        over.set()
        assert long.wait(10)


def test_the_callback_of_a_job_that_expires_at_once_is_delivered_all_the_same(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "PAUSES", (0.3, 0.3))
    mlq.actor(lambda: "kept", actor_name="work")
    start_worker()
    with receiver(500, 200) as hook:
        job = mlq.submit("work", callback=hook.url, result_ttl=0)
        eventually(lambda: hook.calls)
        eventually(lambda: mlq.store.sweep("test", 0.001).elected)  # it would go now
        assert ended(job).callback_state is CallbackState.DELIVERED
        assert [call.told for call in hook.calls] == [("1", "kept")] * 2


def test_a_callback_of_a_job_that_is_gone_or_runs_again_ends_quietly(
    mlq: MLQ, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    @mlq.actor(max_retries=0)
    def work() -> None:
        raise ValueError("no")

    over = threading.Event()
    with receiver() as hook:
        gone, again = (work.with_options(callback=hook.url).submit() for _ in range(2))
        for job in (gone, again):
            job.cancel()
        mlq.store.remove([gone.id])
        again.retry()
        mlq.actor(lambda: over.wait(30) and None, actor_name="work_again")
        del mlq.broker.actors["work"]
        with caplog.at_level(logging.INFO, "mlqueue.callbacks"):
            start_worker()
            eventually(lambda: not deliveries(mlq))
        assert hook.calls == []
    over.set()
    assert sorted(entry.getMessage() for entry in caplog.records if entry.name == "mlqueue.callbacks") == sorted(
        [
            f"job {gone.id} is gone; its callback is not delivered",
            f"job {again.id} was put back and is queued; it calls back at its next end",
        ]
    )


def test_a_worker_that_dies_with_a_callback_in_hand_leaves_it_to_the_next_without_a_strike(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    store, victim = mlq.store, uuid.uuid4().hex
    store.start_worker(victim, {"pid": 1}, {})
    with receiver() as hook:
        job = mlq.submit("work", callback=hook.url)
        job.cancel()
        for crashes in range(5):
            (held,) = store.claim_callbacks(victim, new_id(), 1)
            assert (held.parent, held.attempt, held.crashes) == (job.id, crashes + 1, 0)
            assert store.release(victim, "crash", "killed") == {held.id: "queued"}
            store.start_worker(victim, {"pid": 1}, {})
        start_worker()
        assert ended(job).callback_state is CallbackState.DELIVERED
        assert len(hook.calls) == 1


def test_a_worker_that_is_stopped_ends_the_try_that_it_makes(mlq: MLQ, start_worker: StartWorker) -> None:
    begun = threading.Event()

    def takes_a_while(receiver: Receiver, connection: socket.socket) -> None:
        begun.set()
        receiver.closing.wait(0.3)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    worker = start_worker()
    with receiver(takes_a_while) as hook:
        job = mlq.submit("work", callback=hook.url)
        job.cancel()
        assert begun.wait(10)
        worker.stop()
        assert job.record.callback_state is CallbackState.DELIVERED
        assert deliveries(mlq) == []


def test_a_delivery_that_cannot_reach_the_store_is_no_try_of_the_receivers(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [True] * 5
    note = mlq.store.note_callback

    def fails_at_first(*args: Any) -> bool:
        if failures:
            failures.pop()
            raise mlqueue.StoreUnavailable("away")
        return note(*args)

    monkeypatch.setattr(mlq.store, "note_callback", fails_at_first)
    start_worker()
    with receiver() as hook:
        job = mlq.submit("work", callback=hook.url)
        job.cancel()
        record = ended(job)
        assert len(hook.calls) == 6  # at least once
    assert [attempt.status for attempt in record.callback_attempts] == [200]


def test_the_delivery_is_not_to_be_called_by_hand(mlq: MLQ) -> None:
    with pytest.raises(RuntimeError, match="was called outside a worker"):
        mlq.broker.get_actor(CALLBACK).fn()


# Again


def test_a_callback_is_delivered_again_when_asked_for_also_to_another_url(mlq: MLQ, start_worker: StartWorker) -> None:
    mlq.actor(lambda: "done", actor_name="work")
    start_worker()
    with receiver(404, 200) as hook, receiver() as other:
        job = mlq.submit("work", callback=hook.url)
        assert ended(job).callback_state is CallbackState.FAILED
        job.redeliver()
        eventually(lambda: job.record.callback_state is CallbackState.DELIVERED)
        job.redeliver(other.url + "?again=1")
        eventually(lambda: other.calls)
        record = ended(job)
        assert [call.told for call in hook.calls + other.calls] == [("1", "done")] * 3
        assert other.calls[0].query["again"] == "1"
    assert record.callback == other.url + "?again=1"
    assert [attempt.status for attempt in record.callback_attempts] == [404, 200, 200]


def test_a_job_without_a_callback_gets_one_when_a_url_is_given(mlq: MLQ, start_worker: StartWorker) -> None:
    job = mlq.submit("work")
    with pytest.raises(InvalidTransition, match="its callback is delivered when it has ended"):
        job.redeliver()
    job.cancel()
    with pytest.raises(InvalidTransition, match=r"no webhook. Give the URL to call: redeliver\(url=...\)"):
        job.redeliver()
    with pytest.raises(InvalidJob, match="it must be a URL"):
        job.redeliver("not a url")
    with receiver() as hook:
        job.redeliver(hook.url)
        start_worker()
        assert ended(job).callback_state is CallbackState.DELIVERED
        assert len(hook.calls) == 1


def test_a_try_that_waits_while_the_callback_is_delivered_by_hand_is_not_made(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(callbacks, "PAUSES", (0.5, 0.5))
    start_worker()
    with receiver(500, 200) as hook, caplog.at_level(logging.INFO, "mlqueue.callbacks"):
        job = mlq.submit("work", callback=hook.url)
        job.cancel()
        eventually(lambda: job.record.callback_attempts)
        job.redeliver()
        eventually(lambda: "was delivered meanwhile" in caplog.text)
        assert len(hook.calls) == 2
        assert job.record.callback_state is CallbackState.DELIVERED


def test_the_record_keeps_the_last_50_tries(mlq: MLQ) -> None:
    job = mlq.submit("work", callback="http://example.com/")
    for number in range(60):
        attempt = CallbackAttempt(at=float(number), seconds=0.1, status=500, error="answered 500", worker="w")
        assert mlq.store.note_callback(job.id, "f", pack_callback_attempt(attempt))
    assert [attempt.at for attempt in job.record.callback_attempts] == list(range(10, 60))


# Jobs are not held up


def latency(app: MLQ, urls: list[str | None]) -> float:
    """The median time in ms from the submit of a job to its end, with these callbacks."""
    took = []
    for url in urls:
        begun = time.perf_counter()
        assert app.submit("work", callback=url).wait(20)
        took.append(1000 * (time.perf_counter() - begun))
    return statistics.median(took)


def test_receivers_that_hang_drip_or_are_down_delay_no_job(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlq.actor(lambda: None, actor_name="work")
    worker = start_worker(threads=1)
    with receiver(hangs) as one, receiver(drips) as two, receiver(drips_body) as three, receiver(500) as four:
        urls = [one.url, two.url, three.url, four.url, f"http://127.0.0.1:{free_port()}/"]
        alone = latency(mlq, [None] * 40)
        beside = latency(mlq, [urls[n % len(urls)] for n in range(40)])
        assert beside < alone + 50
        assert one.calls
        assert two.calls
    worker.stop()
