"""The store's scripts: every transition, its fence, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest

from mlqueue import MLQ, codec
from mlqueue.errors import (
    InvalidJob,
    InvalidTransition,
    JobNotFound,
    ResultMissing,
    StaleAttempt,
    StoreError,
    StoreFull,
)
from mlqueue.job import MOVES, DeadReason, JobError, NewJob, Result, State, new_id
from mlqueue.store import Held, Settle, Store, Turn
from mlqueue.store.records import LARGE, PRIORITIES
from mlqueue.store.scripts import script
from mlqueue.store.store import CHUNK, common_of, encode_result

ERROR = JobError(type="builtins.ValueError", message="bad", traceback="Traceback ...")
BODY = codec.encode_call([1], {})


@pytest.fixture
def store(mlq: MLQ) -> Store:
    return mlq.store


class Hand:
    """A worker's side of the store, without a worker."""

    def __init__(
        self, store: Store, *, actors: tuple[str, ...] = ("add",), queues: tuple[str, ...] = ("default",)
    ) -> None:
        self.store = store
        self.name = uuid.uuid4().hex
        self.lanes = [store.lane(queue, actor) for queue in queues for actor in actors]
        store.start_worker(self.name, {"pid": 1}, dict.fromkeys(actors, "default"))

    def command(self, want: int, settles: tuple[Settle, ...] = (), **flags: bool) -> tuple[Any, ...]:
        return self.store.turn_command(self.name, uuid.uuid4().hex, want, self.lanes, settles, **flags)

    def send(self, command: tuple[Any, ...]) -> Turn:
        return self.store.read_turn(self.store.connector.execute(*command, script=script("turn")))

    def turn(self, want: int = 0, *settles: Settle, **flags: bool) -> Turn:
        return self.send(self.command(want, settles, **flags))

    def fetch(self, want: int = 1) -> list[Held]:
        return self.turn(want).jobs

    def one(self) -> Held:
        (held,) = self.fetch()
        return held


def job(actor: str = "add", **fields: Any) -> NewJob:
    return NewJob(**{"id": new_id(), "queue": "default", "actor": actor, "body": BODY, **fields})


def submit(store: Store, **fields: Any) -> str:
    new = job(**fields)
    assert store.submit([new]) == [True]
    return new.id


def finish(held: Held, value: object = None) -> Settle:
    return Settle.finish(held.id, held.attempt, encode_result(Result.of(value)), common_of())


def bury(held: Held, reason: str = "failed") -> Settle:
    return Settle.bury(held.id, held.attempt, reason, ERROR, common_of())


def reschedule(held: Held, delay: float = 60) -> Settle:
    return Settle.reschedule(held.id, held.attempt, delay, ERROR, common_of())


def give_back(held: Held) -> Settle:
    return Settle.give_back(held.id, held.attempt, common_of())


def keys(store: Store) -> set[str]:
    found = store.connector.client.scan_iter(match=store.root.replace("[", "\\[") + ":*", count=1000)
    return {key.decode().removeprefix(store.root + ":") for key in found}


def eventually(check: Callable[[], bool], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


# Submitting


def test_a_submitted_job_is_a_record_in_state_queued(store: Store) -> None:
    before = time.time()
    job_id = submit(store, priority=3, tags=("a", "b c"), parent="p1", result_ttl=60)
    record = store.record(job_id)
    assert (record.id, record.state, record.queue, record.actor) == (job_id, State.QUEUED, "default", "add")
    assert (record.priority, record.tags, record.parent, record.result_ttl) == (3, ("a", "b c"), "p1", 60)
    assert (record.attempt, record.retries, record.crashes, record.stalls) == (0, 0, 0, 0)
    assert before - 5 < record.created_at < time.time() + 5
    assert record.position == 0


def test_submitting_an_id_again_changes_nothing(store: Store) -> None:
    first = job(id="order-17", priority=1)
    assert [True] == store.submit([first])
    assert [False] == store.submit([job(id="order-17", actor="other", priority=2)])
    record = store.record("order-17")
    assert (record.actor, record.priority) == ("add", 1)
    assert [count.number for count in store.counts()] == [1]


def test_a_small_body_stands_in_the_record_and_a_large_one_beside_it(store: Store) -> None:
    small, large = submit(store, body=b"x" * 64), submit(store, body=b"y" * 65)
    assert store.body(small) == b"x" * 64
    assert store.body(large) == b"y" * 65
    assert f"b:{small}" not in keys(store)
    assert f"b:{large}" in keys(store)
    assert store.connector.client.object("ENCODING", f"{store.root}:j:{large}") == b"listpack"


def test_a_malformed_job_is_refused_and_the_others_of_the_call_are_not(store: Store) -> None:
    good = job()
    packed = [b"\x91\x01", *store_packed(good)]
    answer = store._run("enqueue", *packed)
    assert answer[0].startswith(b"error ")
    assert answer[1] == 1
    assert store.record(good.id).state is State.QUEUED


def store_packed(*jobs: NewJob) -> list[bytes]:
    from mlqueue.store.records import pack_new

    return [part for item in jobs for part in pack_new(item)]


def test_a_priority_out_of_bounds_is_refused_with_what_is_allowed(store: Store) -> None:
    for priority in (PRIORITIES.start - 1, PRIORITIES.stop, 10**9):
        with pytest.raises(InvalidJob, match=r"from -1,000 to 1,000"):
            store.submit([job(priority=priority)])


# Fetching


def test_a_fetched_job_runs_and_is_handed_over_whole(store: Store) -> None:
    job_id = submit(store, priority=-5, body=b"b" * 100)
    hand = Hand(store)
    held = hand.one()
    assert (held.id, held.queue, held.actor, held.attempt, held.body) == (job_id, "default", "add", 1, b"b" * 100)
    assert (held.priority, held.retries, held.crashes, held.alone) == (-5, 0, 0, False)
    record = store.record(job_id)
    assert (record.state, record.attempt, record.worker) == (State.RUNNING, 1, hand.name)
    assert record.started_at == held.started_ms / 1000
    assert hand.fetch() == []


def test_jobs_come_by_priority_then_in_the_order_of_submission_over_all_lanes(store: Store) -> None:
    plan = [("add", 0), ("mul", 0), ("add", 5), ("mul", -1), ("add", -1), ("mul", 0), ("add", 0)]
    ids = [submit(store, actor=actor, priority=priority) for actor, priority in plan]
    hand = Hand(store, actors=("add", "mul"))
    expected = [ids[i] for i in (3, 4, 0, 1, 5, 6, 2)]
    assert expected == [held.id for held in hand.fetch(3)] + [held.id for held in hand.fetch(10)]


def test_the_lowest_and_the_highest_priority_keep_the_order(store: Store) -> None:
    ids = [submit(store, priority=priority) for priority in (1000, 0, -1000)]
    assert ids[::-1] == [held.id for held in Hand(store).fetch(3)]


def test_a_job_that_no_worker_knows_waits_and_blocks_nothing(store: Store) -> None:
    unknown = submit(store, actor="unknown", priority=-1000)
    known = submit(store)
    hand = Hand(store)
    assert [known] == [held.id for held in hand.fetch(10)]
    assert store.record(unknown).state is State.QUEUED


def test_a_worker_of_one_queue_leaves_the_others(store: Store) -> None:
    submit(store, queue="other")
    assert Hand(store).fetch(10) == []
    assert len(Hand(store, queues=("other",)).fetch(10)) == 1


def test_the_position_counts_the_jobs_ahead_in_the_queue(store: Store) -> None:
    ids = [submit(store, actor=actor) for actor in ("add", "mul", "add")]
    urgent = submit(store, actor="mul", priority=-1)
    submit(store, queue="other", priority=-2)
    assert [0, 1, 2, 3] == [store.record(i).position for i in (urgent, *ids)]
    Hand(store, actors=("mul",)).fetch(1)
    assert [None, 0, 1, 2] == [store.record(i).position for i in (urgent, *ids)]


def test_what_a_turn_leaves_behind_is_said_and_rings_again(store: Store) -> None:
    for _ in range(3):
        submit(store)
    hand = Hand(store)
    bell = store.bell(store.lane("default", "add"))
    store.connector.client.delete(bell)
    turn = hand.turn(2)
    assert (len(turn.jobs), turn.left) == (2, True)
    assert store.connector.client.llen(bell) == 1
    store.connector.client.delete(bell)
    assert not hand.turn(1).left
    assert store.connector.client.llen(bell) == 0


def test_a_worker_with_no_free_thread_hands_the_bell_on(store: Store) -> None:
    submit(store)
    bell = store.bell(store.lane("default", "add"))
    assert store.connector.client.lpop(bell) == b"1"
    assert Hand(store).turn(0).left
    assert store.connector.client.llen(bell) == 1


def test_a_doorbell_holds_at_most_one_token(store: Store) -> None:
    for _ in range(5):
        submit(store)
    assert store.connector.client.llen(store.bell(store.lane("default", "add"))) == 1


def test_a_turn_that_is_sent_again_gives_the_same_answer_once(store: Store) -> None:
    ids = [submit(store) for _ in range(4)]
    hand = Hand(store)
    first = hand.one()
    command = hand.command(2, (finish(first, 1),))
    turn, again = hand.send(command), hand.send(command)
    assert [ids[1], ids[2]] == [held.id for held in turn.jobs]
    assert turn.jobs == again.jobs
    assert turn.refused == again.refused == []
    assert store.record(ids[3]).state is State.QUEUED
    assert store.record(ids[1]).attempt == 1


def test_a_turn_sent_again_after_its_jobs_were_taken_away_does_not_repeat_the_old_attempt(store: Store) -> None:
    submit(store)
    hand = Hand(store)
    command = hand.command(1)
    assert [1] == [held.attempt for held in hand.send(command).jobs]
    store.release(hand.name, "crash", "killed")
    turn = hand.send(command)
    assert ([], False) == (turn.jobs, turn.known)


def test_a_worker_that_was_released_gets_no_job_until_it_has_said_hello(store: Store) -> None:
    # Its process may have died after it sent this: a job that it got would wait for the end of a lease.
    job_id = submit(store)
    hand = Hand(store)
    for word in ("crash", "stall"):
        hand.fetch()
        store.release(hand.name, word, "gone")
        turn = hand.turn(1)
        assert ([], False, True) == (turn.jobs, turn.known, turn.left)
        assert store.record(job_id).state is State.QUEUED
        assert store.workers() == []
        assert store.connector.client.pttl(f"{store.root}:w:{hand.name}") > 0
        store.start_worker(hand.name, {"pid": 1}, {})
        assert store.connector.client.pttl(f"{store.root}:w:{hand.name}") == -1
    assert hand.one().attempt == 3


def test_a_poke_puts_a_token_on_the_workers_own_bell(store: Store) -> None:
    hand = Hand(store)
    hand.turn(1, poke=True)
    assert store.connector.client.llen(store.own_bell(hand.name)) == 1


# Ends


def test_a_finished_job_has_its_result_and_its_times(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    assert hand.turn(0, finish(hand.one(), {"x": [1, 2.5]})).refused == []
    outcome = store.outcome(job_id)
    assert outcome.state is State.SUCCEEDED
    assert outcome.result == Result(None, {"x": [1, 2.5]})
    record = store.record(job_id)
    assert record.started_at is not None
    assert record.finished_at is not None
    assert record.created_at <= record.started_at <= record.finished_at


@pytest.mark.parametrize("size", [0, 1, 60, 65, 1000, CHUNK - 10, CHUNK + 1, 3 * CHUNK + 7])
def test_a_result_of_any_size_comes_back(store: Store, size: int) -> None:
    job_id = submit(store)
    hand = Hand(store)
    held = hand.one()
    stored = encode_result(Result("short", b"x" * size, "image/png"))
    store.write_chunks(job_id, f"r{held.attempt}", stored.chunks)
    settle = Settle.finish(job_id, held.attempt, stored._replace(chunks=()), common_of())
    assert hand.turn(0, settle).refused == []
    assert store.outcome(job_id).result == Result("short", b"x" * size, "image/png")
    record = store.record(job_id)
    assert (record.short_result, record.content_type) == ("short", "image/png")
    assert all(store.connector.client.ttl(f"{store.root}:{key}") == -1 for key in keys(store) if key.startswith("x:"))
    store.remove([job_id])
    assert [key for key in keys(store) if key.startswith(("x:", "r:"))] == []


def test_chunks_that_no_settle_took_up_go_by_themselves(store: Store) -> None:
    store.write_chunks("some", "r1", [b"x"])
    assert 0 < store.connector.client.ttl(f"{store.root}:x:some:r1:0") <= 3600


def test_a_result_whose_chunks_are_gone_is_refused_and_the_job_still_runs(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    held = hand.one()
    stored = encode_result(Result(None, b"x" * (CHUNK + 1)))
    refused = hand.turn(0, Settle.finish(job_id, held.attempt, stored, common_of())).refused
    assert [index for index, _ in refused] == [0]
    assert "chunk 0 of the result is gone" in refused[0][1]
    assert store.record(job_id).state is State.RUNNING


def test_a_result_that_was_removed_is_missing_and_not_none(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    hand.turn(0, finish(hand.one(), b"x" * 100))
    store.connector.client.delete(f"{store.root}:r:{job_id}")
    with pytest.raises(ResultMissing):
        store.outcome(job_id)


def test_a_buried_job_is_dead_with_reason_error_and_history(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    hand.turn(0, bury(hand.one()))
    record = store.record(job_id)
    assert (record.state, record.dead_reason, record.error) == (State.DEAD, DeadReason.FAILED, ERROR)
    (attempt,) = record.attempts
    assert (attempt.attempt, attempt.worker, attempt.outcome, attempt.error) == (1, hand.name, "failed", ERROR)


def test_a_rescheduled_job_waits_for_its_time_and_counts_a_retry(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    hand.turn(0, reschedule(hand.one(), 60))
    record = store.record(job_id)
    assert (record.state, record.retries, record.attempt) == (State.SCHEDULED, 1, 1)
    assert record.due_at is not None
    assert 50 < record.due_at - store.now() <= 61
    assert hand.fetch(10) == []


def test_a_job_rescheduled_without_delay_is_queued_at_once(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    turn = hand.turn(1, reschedule(hand.one(), 0))
    assert [(job_id, 2, 1)] == [(held.id, held.attempt, held.retries) for held in turn.jobs]


def test_a_job_given_back_stands_where_it_stood_and_keeps_its_attempt(store: Store) -> None:
    ids = [submit(store) for _ in range(3)]
    hand = Hand(store)
    hand.turn(0, give_back(hand.one()))
    record = store.record(ids[0])
    assert (record.state, record.attempt, record.position) == (State.QUEUED, 1, 0)
    assert (record.crashes, record.stalls, record.retries) == (0, 0, 0)
    assert [ids[0], 2] == list(hand.one()[0:4:3])


def test_jobs_spawned_by_a_settle_exist_with_it_or_not_at_all(store: Store) -> None:
    parent, child, other = submit(store), job(actor="mul"), job(actor="mul")
    hand = Hand(store)
    held = hand.one()
    stale = Settle.finish(parent, 99, encode_result(Result()), common_of(spawned=[other]))
    good = Settle.finish(parent, held.attempt, encode_result(Result()), common_of(spawned=[child]))
    assert hand.turn(0, stale, good).refused == [(0, "stale")]
    assert store.record(child.id).state is State.QUEUED
    with pytest.raises(JobNotFound):
        store.record(other.id)


def test_limits_may_come_into_use_by_what_a_settle_spawns(store: Store) -> None:
    parent, child = submit(store), job(actor="mul", fair_by="ann")
    hand = Hand(store)
    held = hand.one()
    settle = Settle.finish(parent, held.attempt, encode_result(Result()), common_of(spawned=[child]))
    assert hand.turn(0, settle).refused == []
    assert [store.record(job_id).state for job_id in (parent, child.id)] == [State.SUCCEEDED, State.QUEUED]


def test_a_groups_callback_is_created_exactly_once_by_the_last_of_its_children(store: Store) -> None:
    callback = job(actor="done")
    assert store.open_group("g1", 2, 60)
    assert not store.open_group("g1", 3, 60)
    hand = Hand(store)
    first, second = submit(store), submit(store)
    held, late = hand.fetch(2)

    def settle(item: Held) -> Settle:
        group = ("g1", [callback])
        return Settle.finish(item.id, item.attempt, encode_result(Result()), common_of(group=group))

    hand.turn(0, settle(held))
    with pytest.raises(JobNotFound):
        store.record(callback.id)
    # The child is delivered again after its end was counted, as after a lost reply: it counts once.
    store.connector.client.hset(f"{store.root}:j:{first}", mapping={"s": "r"})
    hand.turn(0, settle(held))
    with pytest.raises(JobNotFound):
        store.record(callback.id)
    hand.turn(0, settle(late))
    assert store.record(callback.id).state is State.QUEUED
    assert second == late.id
    assert [key for key in keys(store) if key.startswith("g:")] == []


# The fence: what an older attempt writes is refused


SETTLES = {"finish": finish, "bury": bury, "reschedule": reschedule, "give_back": give_back}


@pytest.mark.parametrize("verb", SETTLES)
def test_the_settle_of_an_older_attempt_is_refused_whatever_state_the_job_is_in(store: Store, verb: str) -> None:
    job_id = submit(store)
    old, new = Hand(store), Hand(store)
    stale = SETTLES[verb](old.one())
    store.release(old.name, "stall", "lost")
    assert old.turn(0, stale).refused == [(0, "stale")]
    assert store.record(job_id).state is State.QUEUED
    held = new.one()
    assert store.settle([stale]) == [(0, "stale")]
    assert (store.record(job_id).state, store.record(job_id).worker) == (State.RUNNING, new.name)
    assert new.turn(0, finish(held, "new")).refused == []
    assert store.settle([stale]) == [(0, "stale")]
    assert store.outcome(job_id).result == Result("new", "new")


def test_progress_and_checkpoint_of_an_older_attempt_are_refused(store: Store) -> None:
    job_id = submit(store)
    old, new = Hand(store), Hand(store)
    held = old.one()
    store.release(old.name, "stall", "lost")
    assert store.touch([(job_id, held.attempt, codec.encode(5), "")]) == [0]
    again = new.one()
    assert store.touch(
        [(job_id, held.attempt, codec.encode(5), ""), (job_id, again.attempt, codec.encode(7), "n")]
    ) == [0, 1]
    with pytest.raises(StaleAttempt, match="no longer holds it"):
        store.save_checkpoint(job_id, held.attempt, b"old", "g1")
    assert store.load_checkpoint(job_id) is None
    record = store.record(job_id)
    assert (record.progress, record.progress_note) == (7, "n")


def test_the_attempt_never_goes_down(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    seen = []
    for settle in (give_back, lambda held: reschedule(held, 0), give_back, bury):
        held = hand.one()
        seen.append(held.attempt)
        hand.turn(0, settle(held))
    store.retry(job_id)
    seen.append(hand.one().attempt)
    assert seen == [1, 2, 3, 4, 5]


# Schedule


def test_a_delayed_job_is_scheduled_and_runs_when_it_is_due(store: Store) -> None:
    job_id = submit(store, delay=0.3)
    assert store.record(job_id).state is State.SCHEDULED
    hand = Hand(store)
    turn = hand.turn(1)
    assert turn.jobs == []
    assert 0 < turn.next_due_ms <= 300
    eventually(lambda: bool(hand.fetch()))


def test_an_eta_in_the_past_is_queued_at_once(store: Store) -> None:
    assert store.record(submit(store, eta=time.time() - 1000)).state is State.QUEUED


def test_only_a_job_that_becomes_the_earliest_scheduled_rings(store: Store) -> None:
    client, bell = store.connector.client, store.bell(store.lane("default", "add"))
    submit(store, delay=1000)
    assert client.lpop(bell) == b"1"
    submit(store, delay=2000)
    assert client.llen(bell) == 0
    submit(store, delay=500)
    assert client.llen(bell) == 1


def test_a_short_delay_is_not_held_up_by_many_long_ones(store: Store) -> None:
    store.submit([job(delay=10_000 + i) for i in range(300)])
    job_id = submit(store, delay=0.05)
    hand = Hand(store)
    deadline = time.monotonic() + 5
    while not (found := hand.fetch(10)) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert [job_id] == [held.id for held in found]


# Cancelling: the column of the table of transitions


def test_a_waiting_job_that_is_cancelled_never_runs(store: Store) -> None:
    queued, scheduled = submit(store), submit(store, delay=100)
    assert (store.cancel(queued), store.cancel(scheduled)) == (State.QUEUED, State.SCHEDULED)
    assert [State.CANCELLED] * 2 == [store.record(i).state for i in (queued, scheduled)]
    assert Hand(store).fetch(10) == []
    assert store.connector.client.zcard(f"{store.root}:sched") == 0


@pytest.mark.parametrize("verb", SETTLES)
def test_a_running_job_with_the_cancel_flag_ends_cancelled_however_it_ends(store: Store, verb: str) -> None:
    job_id = submit(store)
    hand = Hand(store)
    held = hand.one()
    assert store.cancel(job_id) is State.RUNNING
    record = store.record(job_id)
    assert record.state is State.RUNNING
    assert record.cancel_requested_at is not None
    assert store.connector.client.lpop(store.own_bell(hand.name)) == f"c{job_id}".encode()
    assert store.touch([(job_id, held.attempt, codec.encode(1), "")]) == [2]
    assert hand.turn(0, SETTLES[verb](held)).refused == []
    assert store.record(job_id).state is State.CANCELLED
    assert hand.fetch(10) == []


@pytest.mark.parametrize("reason", ["crash", "stall", "drain"])
def test_a_job_with_the_cancel_flag_whose_worker_is_lost_ends_cancelled(store: Store, reason: str) -> None:
    job_id = submit(store)
    hand = Hand(store)
    hand.one()
    store.cancel(job_id)
    assert store.release(hand.name, reason, "gone") == {job_id: "cancelled"}
    assert store.record(job_id).state is State.CANCELLED


def test_cancelling_an_ended_job_changes_nothing(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    hand.turn(0, finish(hand.one(), 1))
    assert store.cancel(job_id) is State.SUCCEEDED
    assert store.record(job_id).state is State.SUCCEEDED
    with pytest.raises(JobNotFound, match="mlqueue jobs"):
        store.cancel("nothing")


# Retrying by hand


def test_a_dead_or_cancelled_job_can_be_retried_from_the_end_of_the_queue(store: Store) -> None:
    dead, cancelled, other = submit(store, body=b"z" * 100), submit(store), submit(store)
    hand = Hand(store)
    hand.turn(0, bury(hand.one()))
    store.cancel(cancelled)
    for job_id in (dead, cancelled):
        store.retry(job_id)
    record = store.record(dead)
    assert (record.state, record.dead_reason, record.error, record.finished_at) == (State.QUEUED, None, None, None)
    fetched = hand.fetch(3)
    assert [other, dead, cancelled] == [held.id for held in fetched]
    assert fetched[1].body == b"z" * 100
    assert hand.turn(0, *(finish(held, 1) for held in fetched)).refused == []
    assert {State.SUCCEEDED} == {store.record(i).state for i in (dead, cancelled, other)}


def test_any_other_job_cannot_be_retried_and_the_error_says_what_to_do(store: Store) -> None:
    job_id = submit(store)
    with pytest.raises(InvalidTransition, match=r"queued; only a dead or cancelled job can be retried. Wait"):
        store.retry(job_id)
    hand = Hand(store)
    hand.turn(0, finish(hand.one()))
    with pytest.raises(InvalidTransition, match="Submit it anew"):
        store.retry(job_id)
    with pytest.raises(JobNotFound):
        store.retry("nothing")


# Workers that are gone


def test_a_crash_puts_all_jobs_of_a_worker_back_with_a_strike_each(store: Store) -> None:
    ids = [submit(store) for _ in range(3)]
    hand, other = Hand(store), Hand(store)
    hand.fetch(2)
    third = other.one()
    assert store.release(hand.name, "crash", "killed by signal 9") == dict.fromkeys(ids[:2], "queued")
    records = store.records(ids, full=True)
    assert [(1, 0), (1, 0), (0, 0)] == [(r.crashes, r.stalls) for r in records if r]
    assert records[0] is not None
    assert records[0].attempts[0].outcome == "crashed"
    assert records[0].error == JobError(type="", message="killed by signal 9")
    assert store.record(third.id).state is State.RUNNING
    assert [worker.id for worker in store.workers()] == [other.name]


def test_a_drain_puts_jobs_back_without_a_strike(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    hand.one()
    store.release(hand.name, "drain", "stopped")
    record = store.record(job_id)
    assert (record.state, record.crashes, record.stalls, record.error) == (State.QUEUED, 0, 0, None)


def test_a_job_with_two_strikes_runs_only_with_no_other_beside_it(store: Store) -> None:
    poison = submit(store)
    for _ in range(2):
        hand = Hand(store)
        hand.one()
        outcome = store.release(hand.name, "crash", "killed")
    assert outcome == {poison: "isolated"}
    others = [submit(store) for _ in range(4)]
    busy = Hand(store)
    # A worker that is idle takes it, and nothing with it.
    (alone,) = busy.fetch(8)
    assert (alone.id, alone.alone) == (poison, True)
    assert busy.fetch(8) == []
    busy.turn(0, finish(alone))
    assert others == [held.id for held in busy.fetch(8)]
    # One that holds a job does not.
    again = submit(store)
    for _ in range(2):
        hand = Hand(store)
        (held,) = hand.fetch(1)
        assert held.id == again
        store.release(hand.name, "crash", "killed")
    assert busy.fetch(8) == []
    assert [again] == [held.id for held in Hand(store).turn(1, only_alone=True).jobs]


def test_a_poison_job_is_dead_at_its_third_start_and_its_neighbours_are_not(store: Store) -> None:
    poison, *innocent = [submit(store) for _ in range(8)]
    starts = 0
    for _ in range(20):
        hand = Hand(store)
        held = hand.fetch(8)
        if not held:
            break
        if poison in [item.id for item in held]:
            starts += 1
            store.release(hand.name, "crash", "killed by signal 11 (SIGSEGV)")
        else:
            hand.turn(0, *(finish(item) for item in held))
    record = store.record(poison)
    assert (starts, record.state, record.dead_reason) == (3, State.DEAD, DeadReason.CRASHED)
    assert record.error == JobError(type="", message="killed by signal 11 (SIGSEGV)")
    assert {State.SUCCEEDED} == {store.record(i).state for i in innocent}


def test_a_worker_for_jobs_to_be_run_alone_takes_no_others(store: Store) -> None:
    submit(store)
    assert Hand(store).turn(1, only_alone=True).jobs == []


def test_a_job_whose_machines_are_lost_too_often_is_dead_as_stalled(store: Store) -> None:
    job_id = submit(store, max_stalls=2)
    outcomes = []
    for _ in range(2):
        hand = Hand(store)
        hand.one()
        outcomes += store.release(hand.name, "stall", "lost").values()
    assert outcomes == ["queued", "dead"]
    assert store.record(job_id).dead_reason is DeadReason.STALLED


# Sweeping


def expire(store: Store, worker: str) -> None:
    store.connector.client.zadd(f"{store.root}:workers", {worker: 1})


def test_the_sweep_takes_jobs_from_workers_whose_lease_has_ended(store: Store) -> None:
    job_id = submit(store)
    hand, live = Hand(store), Hand(store)
    hand.one()
    assert store.sweep("s", 5).released == {}
    expire(store, hand.name)
    sweep = store.sweep("s", 5)
    assert sweep.elected
    assert sweep.released == {job_id: "queued"}
    record = store.record(job_id)
    assert (record.state, record.stalls) == (State.QUEUED, 1)
    assert [worker.id for worker in store.workers()] == [live.name]


def test_a_beat_renews_a_lease(store: Store) -> None:
    hand = Hand(store)
    expire(store, hand.name)
    store.beat([hand.name])
    (worker,) = store.workers()
    assert store.settings.lease - 5 < worker.lease_left <= store.settings.lease


def test_one_sweeper_works_at_a_time_and_another_takes_over_when_it_is_gone(store: Store) -> None:
    assert store.sweep("a", 0.2).elected
    second = store.sweep("b", 0.2)
    assert not second.elected
    assert second.wait is not None
    assert 0 < second.wait <= 0.2
    assert store.sweep("a", 0.2).elected
    eventually(lambda: store.sweep("b", 0.2).elected)


def test_a_gap_between_sweeps_is_nobodys_fault(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    hand.one()
    store.sweep("s", 5)
    expire(store, hand.name)
    # As after the server was down, or the machine slept.
    store.connector.client.hincrby(f"{store.root}:sweep", "last", -6000)
    assert store.sweep("s", 5).released == {}
    assert store.record(job_id).state is State.RUNNING
    assert store.workers()[0].lease_left > store.settings.lease - 5
    expire(store, hand.name)
    assert store.sweep("s", 5).released == {job_id: "queued"}


def test_the_sweep_promotes_what_is_due_without_any_worker(store: Store) -> None:
    job_id = submit(store, delay=0.05)

    def promoted() -> bool:
        store.sweep("s", 5)
        return store.record(job_id).state is State.QUEUED

    eventually(promoted)


def test_ended_jobs_go_after_their_ttl_and_leave_nothing(store: Store) -> None:
    before = keys(store)
    hand = Hand(store)
    for i in range(6):
        submit(store, result_ttl=0, tags=("t",), body=b"x" * 100, actor="add")
        held = hand.one()
        if i == 0:
            store.save_checkpoint(held.id, held.attempt, b"c" * (CHUNK + 1), "g1")
        if i == 1:
            hand.turn(0, reschedule(held, 0))
            held = hand.one()
        hand.turn(0, finish(held, b"y" * 200))
    keep = submit(store, result_ttl=None)
    hand.turn(0, finish(hand.one()))

    def gone() -> bool:
        store.sweep("s", 5)
        return [keep] == [record.id for record in store.scan()]

    eventually(gone)
    store.release(hand.name, "drain", "")
    store.remove([keep])
    for _ in range(20):
        store.sweep("s", 5)
    assert keys(store) - before == {"seq", "sweep", "actors", "m", "course", "bell:default:add"}


def test_dead_jobs_stay_until_they_are_removed(store: Store) -> None:
    job_id = submit(store, result_ttl=0)
    hand = Hand(store)
    hand.turn(0, bury(hand.one()))
    store.sweep("s", 5)
    assert store.record(job_id).state is State.DEAD
    assert store.remove([job_id]) == 1
    with pytest.raises(JobNotFound):
        store.record(job_id)


def test_a_running_job_cannot_be_removed(store: Store) -> None:
    submit(store)
    held = Hand(store).one()
    assert store.remove([held.id]) == 0
    assert store.record(held.id).state is State.RUNNING


# Checkpoints


@pytest.mark.parametrize("size", [0, 10, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_a_checkpoint_survives_everything_but_success(store: Store, size: int) -> None:
    job_id = submit(store)
    hand = Hand(store)
    held = hand.one()
    assert store.save_checkpoint(job_id, held.attempt, b"old" * 1000, "g1") is False
    assert store.save_checkpoint(job_id, held.attempt, b"n" * size, "g2") is False
    for reason in ("crash", "stall", "drain"):
        store.release(hand.name, reason, "gone")
        assert store.load_checkpoint(job_id) == b"n" * size
        hand = Hand(store)
        held = hand.one()
        assert held.has_checkpoint
    hand.turn(1, reschedule(held, 0))
    assert store.load_checkpoint(job_id) == b"n" * size
    hand.turn(0, finish(held._replace(attempt=held.attempt + 1)))
    assert store.load_checkpoint(job_id) is None
    assert [key for key in keys(store) if key.startswith(("x:", "ck:"))] == []


def test_a_record_says_which_checkpoint_each_attempt_began_from(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    first = hand.one()
    store.save_checkpoint(job_id, first.attempt, b"a" * 10, "g1")
    record = store.record(job_id)
    assert record.resumed_from is None, "it had begun before"
    hand.turn(1, reschedule(first, 0))
    second = store.record(job_id)
    assert second.resumed_from is not None
    assert (1, 10, record.attempts) == (second.resumed_from.attempt, second.resumed_from.size, ())
    assert record.started_at <= second.resumed_from.saved_at <= second.started_at  # type: ignore[operator]
    store.save_checkpoint(job_id, 2, b"b" * 2 * CHUNK, "g2")
    store.release(hand.name, "crash", "gone")
    hand = Hand(store)
    third = hand.one()
    record = store.record(job_id)
    assert record.resumed_from is not None
    assert (2, 2 * CHUNK) == (record.resumed_from.attempt, record.resumed_from.size)
    assert [None, second.resumed_from] == [attempt.resumed_from for attempt in record.attempts]
    hand.turn(0, finish(third))
    assert record.resumed_from == store.record(job_id).resumed_from


def test_a_new_checkpoint_takes_the_place_of_the_old_ones_chunks(store: Store) -> None:
    submit(store)
    held = Hand(store).one()
    store.save_checkpoint(held.id, held.attempt, b"a" * (2 * CHUNK), "g1")
    store.save_checkpoint(held.id, held.attempt, b"b" * 10, "g2")
    assert [key for key in keys(store) if key.startswith("x:")] == []


# Looking


def test_pages_are_stable_while_jobs_come_and_go(store: Store) -> None:
    ids = [submit(store, priority=i % 3 - 1, actor="add" if i % 2 else "mul") for i in range(25)]
    hand = Hand(store, actors=("add", "mul"))
    hand.turn(0, *(finish(held) for held in hand.fetch(5)))
    hand.turn(0, *(bury(held) for held in hand.fetch(5)))
    hand.fetch(3)
    submit_later = [submit(store, delay=1000)]
    seen: list[str] = []
    cursor = None
    while True:
        page = store.page(limit=4, cursor=cursor)
        seen += [record.id for record in page.jobs]
        cursor = page.cursor
        if cursor is None:
            break
        submit(store)  # new jobs come first, and disturb no later page
        hand.turn(1)
    assert (submit_later + ids[::-1]) == seen


def test_jobs_are_found_by_state_actor_queue_tag_and_time(store: Store) -> None:
    one = submit(store, actor="add", tags=("x",))
    two = submit(store, actor="mul", queue="other", tags=("x", "y"))
    three = submit(store, actor="add", queue="other", delay=1000)
    hand = Hand(store)
    hand.one()

    def found(**filters: Any) -> list[str]:
        return [record.id for record in store.scan(limit=2, **filters)]

    assert found() == [three, two, one]
    assert found(states=[State.RUNNING]) == [one]
    assert found(states=[State.QUEUED, State.SCHEDULED]) == [three, two]
    assert found(actor="add") == [three, one]
    assert found(queue="other", actor="mul") == [two]
    assert found(tag="x") == [two, one]
    assert found(tag="x", states=[State.RUNNING]) == [one]
    assert found(since=time.time() + 100) == []
    assert found(until=time.time() - 100) == []
    created = store.record(two).created_at
    assert two in found(since=created, until=created)
    assert found(since=time.time() - 100, until=time.time() + 100) == [three, two, one]


def test_a_page_can_be_cut_at_any_time_of_creation(store: Store) -> None:
    ids = []
    for i in range(12):
        ids.append(submit(store, priority=i % 2))
        time.sleep(0.003)  # so that each was created in a millisecond of its own
    created = {job_id: store.record(job_id).created_at for job_id in ids}
    for job_id in ids:
        expected = [other for other in reversed(ids) if created[other] <= created[job_id]]
        assert expected == [record.id for record in store.scan(until=created[job_id], limit=5)]
        expected = [other for other in reversed(ids) if created[other] >= created[job_id]]
        assert expected == [record.id for record in store.scan(since=created[job_id], limit=5)]


def test_counts_are_by_state_queue_and_actor(store: Store) -> None:
    for actor, queue in (("add", "default"), ("add", "default"), ("mul", "a b:c")):
        submit(store, actor=actor, queue=queue)
    submit(store, delay=1000)
    hand = Hand(store)
    hand.one()
    assert {
        (State.QUEUED, "default", "add", 1),
        (State.QUEUED, "a b:c", "mul", 1),
        (State.SCHEDULED, "default", "add", 1),
        (State.RUNNING, "default", "add", 1),
    } == set(store.counts())


def test_flushing_a_queue_forgets_what_waits_in_it_and_nothing_else(store: Store) -> None:
    running = submit(store)
    hand = Hand(store)
    hand.one()
    other = submit(store, queue="other")
    store.submit([job() for _ in range(1200)] + [job(delay=100) for _ in range(5)])
    assert store.flush("default") == 1205
    assert {running, other} == {record.id for record in store.scan()}


# Names


def test_namespaces_do_not_see_each_other_whatever_their_names(mlq: MLQ) -> None:
    base = mlq.name
    names = [f"{base}a", f"{base}{{a}}b}}", f"{base}{{a}}", f"{base}:a", f"{base}%61", f"{base} ü*"]
    stores = [Store(mlq.store.connector, name, mlq.settings) for name in names]
    assert len(names) == len({store.root for store in stores})
    for store in stores:
        assert re.fullmatch(r"mlq:\{[A-Za-z0-9._%-]+\}", store.root)
        submit(store, actor="a:b|c", queue="q:{x}")
    for store in stores:
        ((state, queue, actor, number),) = store.counts()
        assert (state, queue, actor, number) == (State.QUEUED, "q:{x}", "a:b|c", 1)
        store.flush()
    assert all(not store.counts() for store in stores)


# Robustness of the scripts


def script_names() -> list[str]:
    folder = resources.files("mlqueue.store") / "lua"
    names = [path.name.removesuffix(".lua") for path in folder.iterdir() if path.name.endswith(".lua")]
    return sorted(name for name in names if name != "common" and not name.startswith("part_"))


READERS = {"astray", "count", "dead", "events", "functions", "limits", "list", "oldest", "read", "shown", "standing"}
READERS |= {"died", "parked", "texts", "waiting", "why", "workers"}
ON_A_FULL_SERVER = {
    "await",
    "beat",
    "bind",
    "cancel",
    "claim",
    "drop_data",
    "drop_function",
    "extend",
    "flush",
    "limit",
    "limit_actors",
    "listen",
    "mend",
    "migrate_done",
    "migrate_group",
    "migrate_out",
    "note_callback",
    "note_function",
    "orphans",
    "release",
    "remove",
    "settle",
    "start_worker",
    "ask",
    "note_act",
    "pause",
    "sweep",
    "turn",
    "unawait",
}


@pytest.mark.parametrize("name", script_names())
def test_each_script_says_what_it_may_do(name: str) -> None:
    first = script(name).text.split(b"\n", 1)[0].decode()
    flags = {flag for part in first.split()[1:] for flag in part.removeprefix("flags=").split(",")}
    assert first.startswith("#!lua")
    assert ("no-writes" in flags) == (name in READERS)
    assert ("allow-oom" in flags) == (name in ON_A_FULL_SERVER)


def test_the_table_of_moves_in_python_and_in_lua_agree() -> None:
    text = (resources.files("mlqueue.store") / "lua" / "common.lua").read_text("utf-8")
    letters = {
        "q": State.QUEUED,
        "w": State.SCHEDULED,
        "r": State.RUNNING,
        "s": State.SUCCEEDED,
        "d": State.DEAD,
        "c": State.CANCELLED,
    }
    table = text[text.index("  create ") : text.index("A move checks")]
    moves: dict[State, set[State]] = {state: set() for state in State}
    for row in table.splitlines()[1:]:
        cells = re.split(r" {2,}", row.strip())
        if len(cells) != 6 or not re.fullmatch(r"[qwrsdc ]+", cells[2]):
            continue
        _, _, starts, ends, _, with_flag = cells
        for letter in starts.split():
            reached = re.findall(r"\b([qwrsdc])\b", ends) + re.findall(r"^c$", with_flag)
            moves[letters[letter]] |= {letters[end] for end in reached} - {letters[letter]}
    assert {state: set(targets) for state, targets in MOVES.items()} == moves


def test_one_job_whose_settle_the_store_cannot_take_does_not_harm_the_others(store: Store) -> None:
    ids = [submit(store) for _ in range(3)]
    hand = Hand(store)
    held = hand.fetch(3)
    # A key of the wrong type where the result would go: the script fails in mid-write.
    store.connector.client.set(f"{store.root}:r:{ids[1]}", "not a hash")
    turn = hand.turn(0, *(finish(item, b"x" * 100) for item in held))
    assert [index for index, _ in turn.refused] == [1]
    assert turn.refused[0][1].startswith("error ")
    assert [State.SUCCEEDED, State.RUNNING, State.SUCCEEDED] == [store.record(i).state for i in ids]
    # Made again once the cause is gone, the same settle succeeds: its first half did no harm.
    store.connector.client.delete(f"{store.root}:r:{ids[1]}")
    assert hand.turn(0, finish(held[1], b"x" * 100)).refused == []
    assert store.outcome(ids[1]).result == Result(None, b"x" * 100)


@pytest.mark.parametrize("garbage", [b"\xc1", b"", b"\x91", b"\x93\x01\x02\x03", b"\x93\xa1x\x01\xa1q", b"\x80"])
def test_a_settle_that_is_garbage_harms_nobody(store: Store, garbage: bytes) -> None:
    submit(store)
    hand = Hand(store)
    good = finish(hand.one(), 1)
    bad = Settle("x", 1, "f", garbage)
    turn = hand.turn(0, bad, good)
    assert [index for index, _ in turn.refused] == [0]
    assert store.record(good.id).state is State.SUCCEEDED


@pytest.fixture
def full_server(store: Store) -> Iterator[Store]:
    client = store.connector.client
    yield store
    client.config_set("maxmemory", 0)


def test_on_a_full_server_submits_fail_clearly_and_running_jobs_end(full_server: Store) -> None:
    store = full_server
    waiting = [submit(store) for _ in range(4)]
    hand = Hand(store)
    held = hand.fetch(2)
    store.connector.client.config_set("maxmemory", 1)
    with pytest.raises(StoreFull, match="no memory or disk left") as caught:
        store.submit([job()])
    assert (caught.value.status, caught.value.exit_code) == (507, 4)
    turn = hand.turn(2, *(finish(item, 1) for item in held))
    assert turn.refused == []
    assert waiting[2:] == [item.id for item in turn.jobs]
    hand.turn(0, finish(turn.jobs[0]), bury(turn.jobs[1]))
    assert [State.SUCCEEDED] * 3 + [State.DEAD] == [store.record(i).state for i in waiting]


def test_a_script_that_the_server_has_forgotten_is_sent_again(store: Store) -> None:
    job_id = submit(store)
    store.connector.client.script_flush()
    assert store.record(job_id).state is State.QUEUED


def test_a_server_that_cannot_be_reached_is_an_error_that_says_so(mlq: MLQ) -> None:
    from mlqueue import Settings
    from mlqueue.errors import StoreUnavailable

    nowhere = MLQ("x", settings=Settings(url="redis://user:secret@127.0.0.1:1/0", command_timeout=0.2))
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match="cannot be reached") as caught:
        nowhere.store.submit([job()])
    assert time.monotonic() - begin < 5
    assert "secret" not in str(caught.value)
    nowhere.close()


def test_a_wrong_password_is_an_error_that_says_so(store: Store) -> None:
    from mlqueue import Settings
    from mlqueue.store import Connector

    client = store.connector.client
    name = f"u{uuid.uuid4().hex}"
    client.acl_setuser(name, enabled=True, passwords=["+right"], keys=["mlq:*"], commands=["+@all", "-@dangerous"])
    try:
        options = client.connection_pool.connection_kwargs
        if "path" in options:
            base, tail = "unix://{}:{}@" + options["path"], ""
        else:
            base, tail = "redis://{}:{}@" + f"{options['host']}:{options['port']}", "/0"
        wrong = Store(Connector(Settings(url=base.format(name, "wrong") + tail)), store.namespace, store.settings)
        with pytest.raises(StoreError, match="Check user and password"):
            wrong.submit([job()])
        wrong.connector.close()
        # A user without dangerous commands can do all that a worker and a producer do.
        right = Store(Connector(Settings(url=base.format(name, "right") + tail)), store.namespace, store.settings)
        submit(right)
        hand = Hand(right)
        hand.turn(0, finish(hand.one(), 5))
        right.sweep("s", 5)
        assert right.page().jobs[0].state is State.SUCCEEDED
        right.connector.close()
    finally:
        client.acl_deluser(name)


def test_there_is_a_connection_for_each_of_any_number_of_threads(mlq: MLQ) -> None:
    made = []
    for _ in range(150):
        thread = threading.Thread(target=lambda: made.append(mlq.store.counts()))
        thread.start()
        thread.join()
    assert made == [[]] * 150
    for _ in range(150):
        mlq.store.connector.connection().disconnect()


# What a second look found


def test_a_shelf_of_its_own_is_listed_to_its_end(store: Store) -> None:
    jobs = [job() for _ in range(120)]
    ids = [item.id for item in jobs]
    store.submit(jobs)
    assert ids[::-1] == [record.id for record in store.scan()]
    page = store.page(limit=4)
    assert (4, True) == (len(page.jobs), page.cursor is not None)
    assert store.page(limit=120).cursor is None
    assert ids[::-1] == [record.id for record in store.scan(limit=40)]


def test_a_checkpoint_whose_answer_was_lost_is_saved_again_without_harm(store: Store) -> None:
    submit(store)
    held = Hand(store).one()
    data = b"c" * (CHUNK + 1)
    store.save_checkpoint(held.id, held.attempt, data, "g1")
    command = (*store.command("checkpoint"), held.id, held.attempt, len(data), b"", 2, "g1")
    assert store.connector.execute(*command, script=script("checkpoint")) == 1
    assert store.load_checkpoint(held.id) == data


def test_a_finish_that_failed_behind_its_chunks_can_be_made_again(store: Store) -> None:
    job_id = submit(store)
    hand = Hand(store)
    held = hand.one()
    stored = encode_result(Result(None, b"x" * (CHUNK + 1)))
    store.write_chunks(job_id, f"r{held.attempt}", stored.chunks)
    settle = Settle.finish(job_id, held.attempt, stored, common_of())
    store.connector.client.set(f"{store.root}:r:{job_id}", "not a hash")
    assert [index for index, _ in hand.turn(0, settle).refused] == [0]
    store.connector.client.delete(f"{store.root}:r:{job_id}")
    assert hand.turn(0, settle).refused == []
    assert store.outcome(job_id).result == Result(None, b"x" * (CHUNK + 1))


def test_a_record_that_is_garbage_stops_no_worker_and_no_sweep(store: Store) -> None:
    client = store.connector.client
    client.set(f"{store.root}:j:garbage", "not a hash")
    client.zadd(f"{store.root}:sched", {"garbage": 1})
    client.zadd(f"{store.root}:exp", {"garbage": 1})
    client.zadd(f"{store.root}:s:q:default:add", {"garbage": 0})
    good = submit(store)
    assert [good] == [held.id for held in Hand(store).fetch(3)]
    assert store.sweep("s", 5).elected
    assert client.zscore(f"{store.root}:sched", "garbage") is None
    assert client.zscore(f"{store.root}:exp", "garbage") is None


def test_a_bell_that_nobody_listens_to_does_not_grow_without_bound(store: Store) -> None:
    job_id = submit(store)
    held = Hand(store).one()
    store.watch(job_id, "gone", every_change=True)
    for i in range(1100):
        store.touch([(job_id, held.attempt, codec.encode(i), "")])
    assert store.connector.client.llen(store.own_bell("gone")) == 1000


def test_what_a_cancelled_job_would_have_started_is_not_started(store: Store) -> None:
    job_id, successor = submit(store), job(actor="mul")
    hand = Hand(store)
    held = hand.one()
    store.cancel(job_id)
    hand.turn(0, Settle.finish(job_id, held.attempt, encode_result(Result()), common_of(spawned=[successor])))
    assert store.record(job_id).state is State.CANCELLED
    with pytest.raises(JobNotFound):
        store.record(successor.id)


def test_pages_by_time_hold_when_an_old_job_was_retried(store: Store) -> None:
    old = submit(store)
    store.cancel(old)
    time.sleep(0.01)  # so that the next ones are created in a later millisecond
    since = store.record(submit(store)).created_at
    for _ in range(2):
        submit(store)
    store.retry(old)
    assert len(list(store.scan(since=since, limit=2))) == 4
    assert len(list(store.scan(until=time.time() + 100, limit=2))) == 4


def test_submits_are_parted_by_their_bytes_too(store: Store) -> None:
    from mlqueue.store.store import SUBMIT_BYTES, _batches

    big, small = (b"", b"x" * (SUBMIT_BYTES // 2)), (b"a",)
    assert [2, 1] == [len(batch) for batch in _batches([big, big, big])]
    assert [1, 2] == [len(batch) for batch in _batches([(big[1] * 3,), small, small])]
    assert [500, 1] == [len(batch) for batch in _batches([small] * 501)]


def test_large_and_small_bodies_of_one_call_each_reach_their_job(store: Store) -> None:
    jobs = [job(body=bytes([n]) * size) for n, size in enumerate((10, LARGE, 70, LARGE + 1, LARGE - 1))]
    assert [True] * 5 == store.submit(jobs)
    assert [item.body for item in jobs] == [store.body(item.id) for item in jobs]
    again = store.submit_once(jobs, "key", b"print", 10, wants_record=True)
    assert ([item.id for item in jobs], True) == (again.ids, again.new)
    more = [dataclasses.replace(item, id=new_id()) for item in jobs]
    assert more[0].id == store.submit_once(more, "other", b"print", 10).ids[0]
    assert [item.body for item in more] == [store.body(item.id) for item in more]
