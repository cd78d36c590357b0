"""Webhooks: what is told and when, signatures, how often it is tried, and that nobody pays who uses none."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import standardwebhooks
from receivers import Receiver, answers, hangs_up, receiver
from standardwebhooks.webhooks import WebhookVerificationError
from support import StartWorker, eventually, fresh_app

import mlqueue
from mlqueue import MLQ, InvalidJob, InvalidTransition, Job, Result, Settings, SettingsError, SignatureInvalid, State
from mlqueue import callbacks as delivering
from mlqueue.callbacks import GONE, PAUSES, PROGRESS_PAUSES, WEBHOOK_PAUSES, Answer, _Call, _retry_after
from mlqueue.job import CallbackState, new_id
from mlqueue.store.records import CALLBACKS
from mlqueue.store.scripts import script
from mlqueue.webhooks import EVENTS, Webhook, key_of, new_secret, sign, verify

OLD, NEW = new_secret(), new_secret()


@pytest.fixture
def server(server: Settings) -> Settings:
    """The server of the session, with settings that let webhooks go to this machine."""
    return dataclasses.replace(
        server,
        callback_allow="loopback",
        callback_timeout=5.0,
        webhook_secret=NEW,
        public_url="https://jobs.example/api/",
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the pauses between tries short."""
    monkeypatch.setattr(delivering, "WEBHOOK_PAUSES", (0.02,) * len(WEBHOOK_PAUSES))


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as server:
        yield server


def told(job: Job[Any], state: CallbackState = CallbackState.DELIVERED) -> mlqueue.JobRecord:
    """The record of a job, as soon as its newest event stands so."""
    eventually(lambda: job.record.webhook_state is state)
    return job.record


def of_type(hook: Receiver, name: str) -> list[dict[str, Any]]:
    return [call.event for call in hook.calls if call.event["type"] == f"job.{name}"]


def deliveries(app: MLQ) -> list[mlqueue.JobRecord]:
    """What has not been delivered or given up."""
    waiting = (State.QUEUED, State.SCHEDULED, State.RUNNING)
    return app.store.page(states=waiting, queue=CALLBACKS, limit=1000).jobs


# What is told


def test_the_end_is_posted_as_json_with_the_short_result_and_never_the_long_one(
    mlq: MLQ, start_worker: StartWorker, hook: Receiver
) -> None:
    mlq.actor(lambda: Result(short=0.97, full=b"\x89PNG" * 1000, content_type="image/png"), actor_name="work")
    start_worker()
    job = mlq.submit("work", webhook=hook.url)
    record = told(job)
    (call,) = hook.calls
    assert (call.method, call.target, call.headers["Content-Type"]) == ("POST", "/hook", "application/json")
    assert record.finished_at is not None
    when = datetime.fromtimestamp(record.finished_at, UTC).isoformat(timespec="milliseconds")
    assert call.event == {
        "type": "job.completed",
        "timestamp": when.replace("+00:00", "Z"),
        "data": {
            "job_id": job.id,
            "namespace": mlq.name,
            "actor": "work",
            "queue": "default",
            "state": "succeeded",
            "attempt": 1,
            "short_result": 0.97,
            "content_type": "image/png",
            "links": {
                "self": f"https://jobs.example/api/jobs/{job.id}",
                "result": f"https://jobs.example/api/jobs/{job.id}/result",
            },
        },
    }
    (tried,) = record.callback_attempts
    assert (tried.status, tried.error, tried.event) == (200, "", "completed")


def test_a_failure_tells_the_first_line_of_the_error_and_a_cancelling_that(
    mlq: MLQ, start_worker: StartWorker, hook: Receiver
) -> None:
    @mlq.actor(max_retries=0, webhook=Webhook(hook.url))
    def work() -> None:
        raise ValueError("no such file\nat all")

    start_worker()
    told(failed := work.submit())
    told_of_nobody = mlq.submit("of_nobody", webhook=hook.url)
    told_of_nobody.cancel()
    told(told_of_nobody)
    data = {call.job_id: (call.event["type"], call.event["data"]) for call in hook.calls}
    kind, failure = data[failed.id]
    assert (kind, failure["dead_reason"], failure["error"]) == ("job.failed", "failed", "ValueError: no such file")
    kind, cancelling = data[told_of_nobody.id]
    assert (kind, cancelling["state"], cancelling["attempt"]) == ("job.cancelled", "cancelled", 0)


def test_only_the_events_that_were_asked_for_are_told(mlq: MLQ, start_worker: StartWorker, hook: Receiver) -> None:
    @mlq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def work() -> str:
        mlqueue.current_job().progress(50)
        if mlqueue.current_job().retries == 0:
            raise ValueError("not yet")
        return "done"

    start_worker()
    some = work.submit(webhook=Webhook(hook.url, events=["completed", "started"]))  # type: ignore[call-arg]
    none = work.submit(webhook=Webhook(hook.url, events=["failed"]))  # type: ignore[call-arg]
    assert (some.result(15), none.result(15)) == ("done", "done")
    eventually(lambda: len(hook.calls) == 3 and not deliveries(mlq))
    assert hook.of(none.id) == []
    events = sorted((call.event["type"], call.event["data"]["attempt"]) for call in hook.of(some.id))
    assert events == [("job.completed", 2), ("job.started", 1), ("job.started", 2)]
    assert {call.event["data"]["state"] for call in hook.calls} == {"running", "succeeded"}
    assert some.record.webhook == Webhook(hook.url, events=["started", "completed"])


def test_progress_is_told_at_most_once_in_its_time_and_the_latest_wins(
    mlq: MLQ, start_worker: StartWorker, hook: Receiver
) -> None:
    @mlq.actor
    def work() -> None:
        job = mlqueue.current_job()
        for step in range(60):
            job.progress(step, f"step {step}")
            time.sleep(0.02)
        eventually(lambda: of_type(hook, "progress")[-1]["data"]["progress"] == 59)

    start_worker()
    job = work.submit(webhook=Webhook(hook.url, events=["progress", "completed"], progress_every=0.4))  # type: ignore[call-arg]
    job.result(15)
    told(job)
    times = [call.at for call in hook.calls if call.event["type"] == "job.progress"]
    reports = [event["data"]["progress"] for event in of_type(hook, "progress")]
    assert 3 <= len(reports) <= 6
    assert reports == sorted(set(reports))
    assert of_type(hook, "progress")[-1]["data"]["progress_note"] == "step 59"
    # Never more than one waits for its time: that of a report which came while the one before was being told.
    assert len([one for one in deliveries(mlq) if one.state is not State.RUNNING]) <= 1
    # They are due so far apart; how long each takes on its way is not the same.
    assert (times[-1] - times[0]) / (len(times) - 1) > 0.3


def test_a_job_that_is_claimed_by_one_that_waits_for_it_tells_that_it_started(
    mlq: MLQ, start_worker: StartWorker, hook: Receiver
) -> None:
    @mlq.actor
    def inner() -> int:
        return 1

    @mlq.actor
    def outer() -> int:
        return inner.with_options(webhook=Webhook(hook.url, ["started"])).submit().result(10)

    start_worker(threads=1)
    assert outer.submit().result(15) == 1
    eventually(lambda: of_type(hook, "started"))


def test_callback_and_webhook_of_one_job_are_both_called(mlq: MLQ, start_worker: StartWorker, hook: Receiver) -> None:
    mlq.actor(lambda: "short", actor_name="work")
    start_worker()
    job = mlq.submit("work", callback=hook.url, webhook=hook.url)
    eventually(lambda: len(hook.calls) == 2 and not deliveries(mlq))
    record = job.record
    assert (record.callback_state, record.webhook_state) == (CallbackState.DELIVERED, CallbackState.DELIVERED)
    assert sorted(tried.event for tried in record.callback_attempts) == ["", "completed"]
    assert sorted(call.method for call in hook.of(job.id)) == ["GET", "POST"]


def test_without_a_secret_there_is_no_signature_and_without_a_public_url_no_link(
    server: Settings, start_worker: StartWorker, hook: Receiver
) -> None:
    with fresh_app(dataclasses.replace(server, webhook_secret=None, public_url=None)) as app:
        app.actor(lambda: None, actor_name="work")
        worker = start_worker(app)
        told(app.submit("work", webhook=hook.url))
        worker.stop(timeout=10_000)
    (call,) = hook.calls
    assert "links" not in call.event["data"]
    names = {name.lower() for name in call.headers}
    assert "webhook-id" in names
    assert "webhook-signature" not in names
    with pytest.raises(SignatureInvalid, match="lacks webhook-signature"):
        verify(call.headers, call.body, NEW)


def test_an_event_that_the_job_has_gone_on_from_is_not_told(mlq: MLQ, start_worker: StartWorker, quick: None) -> None:
    """A failure that could not be told yet, of a job that was retried by hand and went well."""
    fails = [True, False]

    @mlq.actor(max_retries=0)
    def work() -> str:
        if fails.pop(0):
            raise ValueError("no")
        return "yes"

    start_worker()
    down = [True]

    def answer(receiver: Receiver, connection: Any) -> None:
        answers(503 if down[0] else 200)(receiver, connection)  # type: ignore[operator]

    with receiver(answer) as hook:
        job = work.submit(webhook=hook.url)  # type: ignore[call-arg]
        eventually(lambda: len(hook.calls) >= 2)
        job.retry()
        job.result(10)
        down[0] = False
        told(job)
        eventually(lambda: not deliveries(mlq))
        assert hook.calls[-1].event["type"] == "job.completed"
        done = [call for call in hook.calls if call.event["type"] == "job.completed"]
        assert hook.calls[-len(done) :] == done


# Signatures


def test_the_vectors_of_standard_webhooks() -> None:
    """Those of the specification's reference libraries."""
    key = key_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert key_of("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw") == key


def headers_at(moment: float, body: bytes = b"{}", secret: str = NEW, message_id: str = "msg_1") -> dict[str, str]:
    signature = sign(key_of(secret), message_id, int(moment), body)
    return {"Webhook-Id": message_id, "Webhook-Timestamp": str(int(moment)), "Webhook-Signature": signature}


def test_what_is_sent_is_accepted_by_standardwebhooks_and_tampered_old_and_replayed_ones_are_refused(
    mlq: MLQ, start_worker: StartWorker, hook: Receiver
) -> None:
    mlq.actor(lambda: "ü", actor_name="work")
    start_worker()
    told(mlq.submit("work", webhook=hook.url))
    (call,) = hook.calls
    theirs = standardwebhooks.Webhook(NEW)
    assert theirs.verify(call.body, call.headers) == verify(call.headers, call.body, NEW) == call.event
    later = datetime.now(UTC) + timedelta(seconds=1)
    refused: list[tuple[dict[str, str], bytes]] = [
        (call.headers, call.body.replace(b"succeeded", b"cancelled")),
        ({**call.headers, "webhook-id": "msg_other"}, call.body),
        # Sent again with a time of now, and as it was when it is old.
        ({**call.headers, "webhook-timestamp": str(int(later.timestamp()))}, call.body),
        (headers_at(time.time() - 301, call.body), call.body),
        (headers_at(time.time() + 310, call.body), call.body),
        (headers_at(time.time(), call.body, secret=OLD), call.body),
    ]
    for headers, body in refused:
        with pytest.raises(WebhookVerificationError):
            theirs.verify(body, headers)
        with pytest.raises(SignatureInvalid):
            verify(headers, body, NEW)


def test_verify_takes_any_case_of_headers_several_secrets_and_bodies_as_text() -> None:
    headers = headers_at(time.time())
    assert verify(headers, "{}", [OLD, NEW]) == verify({k.upper(): v for k, v in headers.items()}, b"{}", NEW) == {}
    assert verify(headers, b"{}", f"{OLD}, {NEW}") == {}
    assert verify(headers_at(time.time() - 500), b"{}", NEW, tolerance=600) == {}
    listed = {**headers, "Webhook-Signature": f"v1a,AAAA v1,nonsense {headers['Webhook-Signature']}"}
    assert verify(listed, b"{}", NEW) == {}


@pytest.mark.parametrize("timestamp", ["", "soon", "-5", "1e9", "١٢", "9" * 30])
def test_a_time_that_is_none_is_refused(timestamp: str) -> None:
    with pytest.raises(SignatureInvalid):
        verify({**headers_at(time.time()), "Webhook-Timestamp": timestamp}, b"{}", NEW)


def test_while_the_secret_is_changed_receivers_with_either_accept(
    server: Settings, start_worker: StartWorker, hook: Receiver
) -> None:
    with fresh_app(dataclasses.replace(server, webhook_secret=f"{NEW},{OLD}")) as app:
        app.actor(lambda: None, actor_name="work")
        worker = start_worker(app)
        told(app.submit("work", webhook=hook.url))
        worker.stop(timeout=10_000)
    (call,) = hook.calls
    for secret in (OLD, NEW):
        standardwebhooks.Webhook(secret).verify(call.body, call.headers)
        verify(call.headers, call.body, secret)
    with pytest.raises(SignatureInvalid):
        verify(call.headers, call.body, new_secret())


@pytest.mark.parametrize(
    "secret",
    ["whsec_", "whsec_c2hvcnQ=", "not base64 at all, is it", pytest.param(f"{NEW},short", id="one of two"), ","],
)
def test_a_secret_that_is_none_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(SettingsError, match="new_secret") as caught:
        Settings(webhook_secret=secret)
    for part in secret.split(","):
        assert not part or part == "whsec_" or part not in str(caught.value)


def test_secrets_show_nowhere() -> None:
    settings = Settings(webhook_secret=f"{NEW},{OLD}")
    shown = next(one.value for one in settings.describe() if one.name == "webhook_secret")
    assert shown == "***,***"
    assert NEW not in repr(settings)


# How often it is tried


def test_every_try_has_the_same_id_and_a_time_and_signature_of_its_own(
    mlq: MLQ, start_worker: StartWorker, quick: None
) -> None:
    mlq.actor(lambda: None, actor_name="work")
    start_worker()
    with receiver(answers(500), answers(404), answers(302, Location="http://127.0.0.1/"), hangs_up, 204) as hook:
        job = mlq.submit("work", webhook=hook.url)
        record = told(job)
        assert len({call.headers["webhook-id"] for call in hook.calls}) == 1
        assert "." not in hook.calls[0].headers["webhook-id"]
        for call in hook.calls:
            verify(call.headers, call.body, NEW, tolerance=10)
        job.redeliver()
        eventually(lambda: len(hook.calls) == 6)
        assert hook.calls[5].headers["webhook-id"] == hook.calls[0].headers["webhook-id"]
        assert hook.calls[5].event == hook.calls[0].event
    assert [tried.status for tried in record.callback_attempts] == [500, 404, 302, None, 204]


def test_it_is_given_up_after_all_pauses_and_redeliver_tells_it_elsewhere(
    mlq: MLQ, start_worker: StartWorker, quick: None, hook: Receiver
) -> None:
    mlq.actor(lambda: 5, actor_name="work")
    start_worker()
    with receiver(answers(500)) as bad:
        job = mlq.submit("work", webhook=bad.url)
        record = told(job, CallbackState.FAILED)
        assert len(bad.calls) == len(WEBHOOK_PAUSES) + 1 == len(record.callback_attempts)
    eventually(lambda: not deliveries(mlq))
    job.redeliver(webhook=hook.url)
    assert told(job).webhook == Webhook(hook.url)
    assert hook.calls[0].event["data"]["short_result"] == 5


def test_410_ends_it_for_all_further_events_of_the_job(mlq: MLQ, start_worker: StartWorker, quick: None) -> None:
    @mlq.actor
    def work() -> None:
        eventually(lambda: mlq.job(mlqueue.current_job().id).record.webhook_state is CallbackState.FAILED)
        mlqueue.current_job().progress(50)

    start_worker()
    with receiver(answers(GONE)) as hook, receiver() as other:
        job = work.submit(callback=other.url, webhook=Webhook(hook.url, list(EVENTS)))  # type: ignore[call-arg]
        job.result(15)
        eventually(lambda: other.calls and not deliveries(mlq))
        assert [call.event["type"] for call in hook.calls] == ["job.started"]
        # What nobody wants is not even made; the callback was.
        assert mlq.client.hget(f"{mlq.store.root}:j:{job.id}", "C") == b"1"
        job.redeliver(webhook=other.url)
        eventually(lambda: of_type_or_none(other))


def test_410_ends_what_waits_to_be_tried_again_too(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivering, "WEBHOOK_PAUSES", (0.3,) * len(WEBHOOK_PAUSES))
    with receiver(answers(500), answers(GONE), answers(200)) as hook:

        @mlq.actor
        def work() -> None:
            eventually(lambda: mlq.job(mlqueue.current_job().id).record.callback_attempts)

        start_worker()
        job = work.submit(webhook=Webhook(hook.url, ["started", "completed"]))  # type: ignore[call-arg]
        job.result(15)
        eventually(lambda: not deliveries(mlq))
        assert [call.event["type"] for call in hook.calls] == ["job.started", "job.completed"]


def of_type_or_none(hook: Receiver) -> list[str]:
    return [call.event["type"] for call in hook.calls if call.body]


def test_the_schedule_goes_on_for_three_days_and_retry_after_is_heeded() -> None:
    call = _Call("http://x", "webhook", WEBHOOK_PAUSES, b"{}", event="completed")
    for retries, pause in enumerate(WEBHOOK_PAUSES):
        got = call.pause(Answer(500, "answered 500", True), retries)
        assert got is not None
        assert pause <= got <= pause * 1.1
    assert 70 * 3600 < sum(WEBHOOK_PAUSES) < 80 * 3600
    assert call.pause(Answer(500, "answered 500", True), len(WEBHOOK_PAUSES)) is None
    busy = call.pause(Answer(503, "answered 503", True, retry_after=1000.0), 0)
    assert busy is not None
    assert 1000 <= busy <= 1100
    assert (call.pause(Answer(429, "x", True, retry_after=1e9), 0) or 0) <= 86400 * 1.1
    assert call.pause(Answer(GONE, "answered 410"), 0) is None
    assert call.pause(Answer(None, "10.0.0.1 is not a public address"), 0) is None
    assert call.pause(Answer(None, "no answer within 5 s", True), 0) is not None
    assert len(PROGRESS_PAUSES) < len(PAUSES) + 1


def test_the_header_retry_after_is_seconds_or_a_date() -> None:
    soon = datetime.now(UTC) + timedelta(seconds=100)
    assert _retry_after("120") == 120
    assert 95 < _retry_after(soon.strftime("%a, %d %b %Y %H:%M:%S GMT")) <= 100
    assert [_retry_after(text) for text in ("", "soon", "-1", "Thu, 01 Jan 1970 00:00:00 GMT")] == [0, 0, 0, 0]


def test_a_receiver_that_asks_for_time_gets_it(mlq: MLQ, start_worker: StartWorker, quick: None) -> None:
    mlq.actor(lambda: None, actor_name="work")
    start_worker()
    with receiver(answers(503, Retry_After="1"), 200) as hook:
        told(mlq.submit("work", webhook=hook.url))
        assert 0.95 < hook.calls[1].at - hook.calls[0].at < 8


def test_redeliver_of_a_job_without_either_says_what_to_give(mlq: MLQ, start_worker: StartWorker) -> None:
    mlq.actor(lambda: None, actor_name="work")
    start_worker()
    job = mlq.submit("work")
    job.result(10)
    with pytest.raises(InvalidTransition, match="no callback and no webhook"):
        job.redeliver()
    with receiver() as hook:
        job.redeliver(webhook=hook.url)
        told(job)
        assert hook.calls[0].event["type"] == "job.completed"


def test_a_job_whose_end_has_not_been_told_is_not_forgotten(mlq: MLQ, start_worker: StartWorker) -> None:
    mlq.actor(lambda: None, actor_name="work")
    start_worker()
    with receiver(answers(503, Retry_After="3600")) as hook:
        job = mlq.submit("work", webhook=hook.url, result_ttl=0.001)
        plain = mlq.submit("work", result_ttl=0.001)
        told(job, CallbackState.PENDING)
        eventually(lambda: hook.calls)
        eventually(lambda: mlq.store.sweep("me", 60).elected and mlq.store.records([plain.id]) == [None])
        assert job.state is State.SUCCEEDED


# What it costs, and where it comes from


def test_the_event_is_made_by_the_script_that_makes_the_move(mlq: MLQ) -> None:
    """No worker of Python's is there: what the start, the progress and the end have left is in the store."""
    store, worker = mlq.store, uuid.uuid4().hex
    store.start_worker(worker, {"pid": 1}, {"work": "default"})
    job = mlq.submit("work", webhook=Webhook("http://127.0.0.1:9/", list(EVENTS)))
    turn = store.turn_command(worker, new_id(), 1, [store.lane("default", "work")], ())
    store.connector.execute(*turn, script=script("turn"))
    assert [one.parent for one in deliveries(mlq)] == [job.id]
    store.touch([(job.id, 1, b"\x05", "")])
    store.touch([(job.id, 1, b"\x06", "")])
    store.touch([(job.id, 1, b"\x07", "")])
    assert [one.state for one in deliveries(mlq)] == [State.SCHEDULED, State.QUEUED, State.QUEUED]
    store.release(worker, "crash", "killed by signal 9")
    assert len(deliveries(mlq)) == 3
    job.cancel()
    assert len(deliveries(mlq)) == 4
    bodies = [store.body(one.id) for one in deliveries(mlq)]
    assert len(set(bodies)) == 4


def test_without_a_webhook_nothing_is_kept_or_made_for_one(mlq: MLQ, start_worker: StartWorker) -> None:
    mlq.actor(lambda: mlqueue.current_job().progress(5), actor_name="work")
    start_worker()
    job = mlq.submit("work")
    job.result(10)
    assert mlq.client.exists(f"{mlq.store.root}:cb:{job.id}") == 0
    assert mlq.client.hexists(f"{mlq.store.root}:j:{job.id}", "C") is False
    assert mlq.store.page(queue=CALLBACKS).jobs == []
    assert (job.record.webhook, job.record.webhook_state) == (None, None)


# What may be asked for


@pytest.mark.parametrize(
    "webhook",
    [
        "ftp://example.com/",
        "http://user@example.com/",
        "",
        5,
        {"url": "http://example.com/", "event": ["started"]},
        {"events": ["started"]},
        {"url": "http://example.com/", "events": []},
        {"url": "http://example.com/", "events": "completed"},
        {"url": "http://example.com/", "events": ["ended"]},
        {"url": "http://example.com/", "progress_every": 0},
    ],
    ids=str,
)
def test_what_cannot_be_a_webhook_is_refused_at_once(mlq: MLQ, webhook: Any) -> None:
    with pytest.raises(InvalidJob, match="webhook"):
        mlq.submit("work", webhook=webhook)
    with pytest.raises(InvalidJob, match="webhook"):
        mlq.actor(lambda: None, actor_name="work", webhook=webhook)


def test_post_and_with_options_take_one_and_a_dead_letter_keeps_it(
    mlq: MLQ, start_worker: StartWorker, hook: Receiver
) -> None:
    def listener(msg: Any, utils: dict[str, Any]) -> None:
        raise ValueError(msg)

    hook_of_mine = Webhook(hook.url, ["failed"], 1.5)
    mlq.actor(lambda: None, actor_name="work")
    job = mlq.job(mlq.post("no", webhook=hook_of_mine))
    assert job.record.webhook == hook_of_mine
    mlq.create_listener(listener)
    told(job)
    mlq.shutdown()
    assert mlq.join(10)
    (line,) = mlq.dead_letters.lines()
    assert json.loads(line)["webhook"] == hook_of_mine.asdict()
    mlq.dead_letters.purge(job.id)
    mlq.dead_letters.import_([line])
    assert job.record.webhook == hook_of_mine
