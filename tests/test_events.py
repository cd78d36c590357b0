"""Events of all jobs: what the store tells, and the hub that hands it to those who listen."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator

import dramatiq
import pytest
from receivers import receiver
from support import StartWorker, eventually, fresh_app

from mlqueue import MLQ, Settings, State, current_job, events
from mlqueue.errors import StoreUnavailable
from mlqueue.events import Filter, Hub, Listener, close_hub, hub_of
from mlqueue.job import CallbackState, DeadReason
from mlqueue.store.events import UNHEARD, Event, decode_event, place
from mlqueue.testing import drain


@pytest.fixture
def hub(mlq: MLQ) -> Hub:
    return hub_of(mlq.store)


@pytest.fixture
def listener(hub: Hub) -> Iterator[Listener]:
    """One who listens to all jobs."""
    found = hub.listen()
    yield found
    found.close()


def hear(listener: Listener, number: int, timeout: float = 10.0) -> list[Event]:
    """The next so many events, and no more."""
    found: list[Event] = []
    deadline = time.monotonic() + timeout
    while len(found) < number and time.monotonic() < deadline:
        found += listener.take(0.2)
    assert number == len(found), found
    return found


def told(found: list[Event]) -> list[tuple[str, str]]:
    return [(event.kind, str(event.state)) for event in found]


def stream(mlq: MLQ) -> str:
    return f"{mlq.store.root}:ev"


# What is told


def test_nothing_is_told_while_nobody_listens(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        current_job().progress(1)

    work.submit()
    drain(mlq)
    assert 0 == mlq.client.exists(stream(mlq), f"{mlq.store.root}:evl")


def test_every_change_of_a_job_is_told_in_order(mlq: MLQ, worker: dramatiq.Worker, listener: Listener) -> None:
    @mlq.actor(max_retries=1, min_backoff=10, max_backoff=20)
    def work() -> None:
        current_job().progress(50, "half")
        if current_job().attempt == 1:
            raise ValueError("once")

    job = work.with_options(delay=0.05).submit()
    found = hear(listener, 9)
    assert [
        ("state", "scheduled"),
        ("state", "queued"),
        ("state", "running"),
        ("progress", "running"),
        ("state", "scheduled"),
        ("state", "queued"),
        ("state", "running"),
        ("progress", "running"),
        ("state", "succeeded"),
    ] == told(found)
    assert {(job.id, "default", "work")} == {(event.id, event.queue, event.actor) for event in found}
    assert [0, 0, 1, 1, 1, 1, 2, 2, 2] == [event.attempt for event in found]
    places = [place(event.event_id) for event in found]
    assert sorted(set(places)) == places


def test_an_event_says_what_the_record_says(mlq: MLQ, listener: Listener) -> None:
    @mlq.actor(max_retries=0, actor_name="train: é")
    def fails() -> None:
        current_job().progress(2**53 + 1, "näh")
        raise ValueError("no")

    job = fails.submit()
    drain(mlq)
    _, _, progress, end = hear(listener, 4)
    assert ("progress", State.RUNNING, 1, 2**53 + 1, "näh", None) == (
        progress.kind,
        progress.state,
        progress.attempt,
        progress.progress,
        progress.progress_note,
        progress.dead_reason,
    )
    assert ("state", State.DEAD, DeadReason.FAILED, 2**53 + 1, "train: é") == (
        end.kind,
        end.state,
        end.dead_reason,
        end.progress,
        end.actor,
    )
    finished_at = job.record.finished_at
    assert finished_at is not None
    assert abs(end.at - finished_at) < 0.05


def test_cancelling_is_told_when_it_is_asked_for_and_when_it_is_done(
    mlq: MLQ, worker: dramatiq.Worker, listener: Listener
) -> None:
    @mlq.actor
    def work() -> None:
        while not current_job().cancelled:
            threading.Event().wait(0.01)

    job = work.submit()
    eventually(lambda: job.state is State.RUNNING)
    job.cancel()
    *_, asked, done = hear(listener, 4)
    assert [("state", State.RUNNING, True), ("state", State.CANCELLED, True)] == [
        (event.kind, event.state, event.cancel_requested) for event in (asked, done)
    ]


def test_jobs_that_are_put_back_or_forgotten_are_told(mlq: MLQ, listener: Listener) -> None:
    job = mlq.submit("nobody_knows_it", queue_name="default")
    job.cancel()
    job.retry()
    mlq.store.remove([job.id])
    ended = mlq.submit("nobody_knows_it", queue_name="default")
    ended.cancel()
    mlq.store.remove([ended.id])  # nobody waits for its end any more
    assert [
        ("state", "queued"),
        ("state", "cancelled"),
        ("state", "queued"),
        ("removed", "queued"),
        ("state", "queued"),
        ("state", "cancelled"),
    ] == told(hear(listener, 6))


def test_of_callbacks_the_outcome_is_told_and_not_the_jobs_that_deliver_them(
    server: Settings, start_worker: StartWorker
) -> None:
    with fresh_app(dataclasses.replace(server, callback_allow="loopback")) as app, receiver(200) as called:

        @app.actor
        def work() -> None:
            pass

        listener = hub_of(app.store).listen()
        worker = start_worker(app)
        job = work.with_options(callback=called.url).submit()
        *_, end, callback = hear(listener, 4)
        worker.stop()
    assert ("state", State.SUCCEEDED) == (end.kind, end.state)
    assert ("callback", job.id, State.SUCCEEDED, CallbackState.DELIVERED) == (
        callback.kind,
        callback.id,
        callback.state,
        callback.callback_state,
    )


def test_long_texts_are_cut_between_two_characters(mlq: MLQ, worker: dramatiq.Worker, listener: Listener) -> None:
    @mlq.actor
    def work() -> None:
        current_job().progress("x" + "ä" * 900, "y" + "€" * 900)

    job = work.submit()
    progress = hear(listener, 4)[2]
    assert ("x" + "ä" * 124, "y" + "€" * 83) == (progress.progress, progress.progress_note)
    assert ("x" + "ä" * 900, "y" + "€" * 900) == (job.record.progress, job.record.progress_note)


def test_what_is_wrong_with_the_stream_is_no_harm_to_jobs(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> int:
        return 1

    mlq.client.set(f"{mlq.store.root}:evl", 1)
    mlq.client.set(stream(mlq), "not a stream")
    mlq.client.set(f"{mlq.store.root}:m", "no counters")
    job = work.submit()
    drain(mlq)
    assert 1 == job.result(timeout=0)


@pytest.mark.parametrize("entry", [{}, {b"e": b"\xc1"}, {b"e": b"\x01"}, {b"e": b"\x91\xa5state"}])
def test_an_entry_that_is_none_of_ours_says_that_something_is_not_known(entry: dict[bytes, bytes]) -> None:
    assert Event("1-0", UNHEARD) == decode_event(b"1-0", entry)


# Who hears what


def test_a_listener_hears_of_its_job_alone_and_others_what_their_filters_let_through(mlq: MLQ, hub: Hub) -> None:
    @mlq.actor
    def one() -> None:
        pass

    @mlq.actor(queue_name="other")
    def two() -> None:
        pass

    first = one.with_options(delay=3600).submit()
    listeners = [
        hub.listen(first.id),
        hub.listen(None, Filter(actor="two")),
        hub.listen(None, Filter(queue="default")),
        hub.listen(None, Filter(states=["succeeded", State.CANCELLED])),
        hub.listen(),
    ]
    second, third = one.submit(), two.submit()
    drain(mlq, delayed=False)
    first.cancel()
    for number, listener, jobs in zip(
        (1, 3, 4, 3, 7),
        listeners,
        (
            {first.id},
            {third.id},
            {first.id, second.id},
            {first.id, second.id, third.id},
            {first.id, second.id, third.id},
        ),
        strict=True,
    ):
        assert jobs == {event.id for event in hear(listener, number)}
        listener.close()
    assert 0 == len(hub)


def test_all_listeners_of_a_process_share_one_connection(mlq: MLQ, hub: Hub) -> None:
    listeners = [hub.listen() for _ in range(20)]
    eventually(lambda: [one for one in mlq.client.client_list() if one["cmd"] == "xread"])
    assert 1 == len([one for one in mlq.client.client_list() if one["cmd"] == "xread"])
    assert 1 == len([thread for thread in threading.enumerate() if thread.name == "mlqueue-events"])
    for listener in listeners:
        listener.close()


def test_a_listener_that_is_too_far_behind_is_cut_off_and_holds_up_nobody(
    mlq: MLQ, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_BEHIND", 10)
    cut = threading.Event()
    slow, fast = hub.listen(on_cut=cut.set), hub.listen()
    heard: list[Event] = []
    for _ in range(20):
        mlq.submit("nobody_knows_it", queue_name="default")
        heard += hear(fast, 1)
    assert cut.wait(10)
    assert slow.cut_off
    assert [] == slow.take(10)
    assert (20, 1, False) == (len(heard), len(hub), fast.cut_off)
    fast.close()


# Over time


def test_a_hub_that_nobody_needs_ends_and_begins_anew(mlq: MLQ, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LINGER", 0.05)
    monkeypatch.setattr(events, "SLICE", 0.05)
    for _ in range(2):
        listener = hub.listen()
        mlq.submit("nobody_knows_it", queue_name="default")
        hear(listener, 1)
        assert "mlqueue-events" in {thread.name for thread in threading.enumerate()}
        listener.close()
        listener.close()
        eventually(lambda: "mlqueue-events" not in {thread.name for thread in threading.enumerate()})


def test_closing_the_app_cuts_off_who_listens(mlq: MLQ, hub: Hub) -> None:
    cut = threading.Event()
    listener = hub.listen("some-job", on_cut=cut.set)
    heard: list[list[Event]] = []
    thread = threading.Thread(target=lambda: heard.append(listener.take(30)))
    thread.start()
    close_hub(mlq.store)
    thread.join(5)
    assert ([[]], True, True) == (heard, cut.is_set(), listener.cut_off)


def test_a_broken_connection_costs_no_event(mlq: MLQ, hub: Hub, listener: Listener) -> None:
    def reading() -> list[str]:
        return [one["id"] for one in mlq.client.client_list() if one["cmd"] == "xread"]

    mlq.client.client_kill_filter(_id=eventually(reading)[0])
    jobs = [mlq.submit("nobody_knows_it", queue_name="default").id for _ in range(3)]
    assert jobs == [event.id for event in hear(listener, 3)]


def test_what_the_store_forgot_is_said(mlq: MLQ, hub: Hub, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SLICE", 0.1)
    of_job = hub.listen("some-job")
    mlq.client.delete(stream(mlq), f"{mlq.store.root}:evl")
    mlq.submit("nobody_knows_it", queue_name="default")  # nobody has heard of it
    eventually(lambda: [one for one in mlq.client.client_list() if one["cmd"] == "xread"])
    mlq.client.client_kill_filter(
        _id=eventually(lambda: [one["id"] for one in mlq.client.client_list() if one["cmd"] == "xread"])[0]
    )
    assert [UNHEARD] == [event.kind for event in hear(listener, 1)]
    assert [UNHEARD] == [event.kind for event in hear(of_job, 1)]
    job = mlq.submit("nobody_knows_it", queue_name="default")
    assert [job.id] == [event.id for event in hear(listener, 1)]
    of_job.close()


def test_a_store_that_cannot_be_reached_is_an_error_at_once(
    mlq: MLQ, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> str:
        raise StoreUnavailable

    monkeypatch.setattr(mlq.store, "listen", fails)
    with pytest.raises(StoreUnavailable):
        hub.listen()
    assert 0 == len(hub)


def test_a_forked_process_has_a_hub_of_its_own(mlq: MLQ, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub is hub_of(mlq.store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        assert hub is not hub_of(mlq.store)


# What was missed


def test_what_was_missed_is_read_from_where_it_was_left(
    mlq: MLQ, hub: Hub, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "BATCH", 4)
    jobs = [mlq.submit("nobody_knows_it", queue_name="default").id for _ in range(10)]
    heard = hear(listener, 10)
    assert jobs == [event.id for event in heard]
    for n in (0, 3, 9):
        assert jobs[n + 1 :] == [event.id for event in hub.since(heard[n].event_id)]


@pytest.mark.parametrize("how", ["trimmed", "unheard", "forgotten", "of another time"])
def test_where_events_may_be_missing_that_is_said(mlq: MLQ, hub: Hub, listener: Listener, how: str) -> None:
    job = mlq.submit("nobody_knows_it", queue_name="default")
    [last] = hear(listener, 1)
    after = last.event_id
    assert [] == list(hub.since(after))
    if how == "trimmed":
        job.cancel()
        mlq.client.xtrim(stream(mlq), maxlen=1, approximate=False)
    elif how == "forgotten":
        mlq.client.delete(stream(mlq))
    elif how == "unheard":
        mlq.client.delete(f"{mlq.store.root}:evl")
        mlq.store.listen(60, 60)
    else:
        after = "9999999999999-0"
    assert UNHEARD in [event.kind for event in hub.since(after)]


def test_a_snapshot_knows_which_events_it_has_in_it(mlq: MLQ, hub: Hub, listener: Listener) -> None:
    job = mlq.submit("nobody_knows_it", queue_name="default")
    record, newest = mlq.store.snapshot(job.id)
    [event] = hear(listener, 1)
    assert (State.QUEUED, event.event_id) == (record.state, newest)
    job.cancel()
    assert [State.CANCELLED] == [event.state for event in hub.since(newest)]
