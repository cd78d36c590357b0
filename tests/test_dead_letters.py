"""Dead letters: every reason to be one, finding them, mending them, forgetting them, and files of them."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dramatiq
import numpy as np
import pytest
from dramatiq.middleware import SkipMessage
from support import counting_proxy, eventually, fresh_app

from mlqueue import MLQ, DeadReason, InvalidJob, InvalidTransition, JobNotFound, Settings, State, codec, current_job
from mlqueue.dead_letters import BATCH, LOOKS, PAGE
from mlqueue.dead_lines import IMPORTABLE, read_line
from mlqueue.job import Attempt, JobError, JobRecord, NewJob, SavedCheckpoint, new_id
from mlqueue.message import LIFTED, LISTENER, OPTION_CHECKS
from mlqueue.store import Settle, Store
from mlqueue.store.records import CALLBACK, CALLBACKS, pack_dead
from mlqueue.store.scripts import script
from mlqueue.store.store import common_of
from mlqueue.testing import drain

NOW = 1_700_000_000.0
ERROR = JobError(type="builtins.ValueError", message="Nö way in this Straße", traceback="Traceback ...\nin line 7")


@pytest.fixture(scope="module")
def server(server: Settings) -> Settings:
    """The server of the session; functions that no worker has are missed at once."""
    return dataclasses.replace(server, function_timeout=0.0)


def bury(store: Store, **fields: Any) -> str:
    """A job that died, as if here; its id."""
    new = {"id": new_id(), "queue": "default", "actor": "train", "body": codec.encode_call([1], {})}
    known = {"created_at": NOW - 5, "started_at": NOW - 2, "finished_at": NOW, "error": ERROR, "attempt": 1}
    for name, value in fields.items():
        (new if name in NewJob.__dataclass_fields__ else known)[name] = value
    known.setdefault("dead_reason", DeadReason.FAILED)
    job = NewJob(**new)
    record = JobRecord(id=job.id, state=State.DEAD, queue=job.queue, actor=job.actor, **known)
    assert store.import_dead([pack_dead(job, record)]) == [True]
    return job.id


def bury_many(store: Store, number: int, fields: Callable[[int], dict[str, Any]] = lambda i: {}) -> list[str]:
    """Many of them; the first died last."""
    items, ids = [], []
    for i in range(number):
        given = {"queue": "default", "actor": "train", **fields(i)}
        job = NewJob(id=new_id(), body=codec.encode_call([i], {}), **given)
        ids.append(job.id)
        record = JobRecord(**given, id=job.id, state=State.DEAD, created_at=NOW, finished_at=NOW - i, error=ERROR)
        items.append(pack_dead(job, record))
    for i in range(0, number, 500):
        store.import_dead(items[i : i + 500])
    return ids


class Hand:
    """A worker's side of the store, without a worker."""

    def __init__(self, store: Store, *actors: str) -> None:
        self.store = store
        self.name = uuid.uuid4().hex
        self.lanes = [store.lane("default", actor) for actor in actors]
        store.start_worker(self.name, {"functions": [], "function_queues": ["default"]}, {})

    def turn(self, want: int, *settles: Settle) -> Any:
        command = self.store.turn_command(self.name, uuid.uuid4().hex, want, self.lanes, settles)
        return self.store.read_turn(self.store.connector.execute(*command, script=script("turn")))


# Every reason


class Picky(dramatiq.Middleware):
    """Refuses jobs as long as it is told to."""

    refuses = True

    def before_process_message(self, broker: dramatiq.Broker, message: Any) -> None:
        if self.refuses:
            message.fail()
            raise SkipMessage("not today")


def failed(mlq: MLQ) -> str:
    broken = [True]

    @mlq.actor(max_retries=0)
    def work() -> str:
        if broken.pop():
            raise ValueError("once")
        return "mended"

    job = work.submit()
    drain(mlq)
    broken.append(False)
    return job.id


def crashed(mlq: MLQ) -> str:
    @mlq.actor
    def work() -> str:
        return "mended"

    job = work.with_options(max_crashes=1).submit()
    hand = Hand(mlq.store, "work")
    hand.turn(1)
    mlq.store.release(hand.name, "crash", "killed by signal 9")
    return job.id


def stalled(mlq: MLQ) -> str:
    @mlq.actor
    def work() -> str:
        return "mended"

    job = work.with_options(max_stalls=1).submit()
    hand = Hand(mlq.store, "work")
    hand.turn(1)
    mlq.store.release(hand.name, "stall", "host lost")
    return job.id


def expired(mlq: MLQ) -> str:
    @mlq.actor(max_age=600_000)
    def work() -> str:
        return "mended"

    job = work.submit()
    an_hour_ago = round(time.time() * 1000) - 3_600_000
    mlq.client.hset(f"{mlq.store.root}:j:{job.id}", "t", an_hour_ago)
    drain(mlq)
    return job.id


def undecodable(mlq: MLQ) -> str:
    @mlq.actor
    def work() -> str:
        return "mended"

    job = NewJob(id=new_id(), queue="default", actor="work", body=b"\xc1 no message")
    mlq.store.submit([job])
    drain(mlq)
    return job.id


def unstorable(mlq: MLQ) -> str:
    @mlq.actor
    def work() -> str:
        return "mended"

    job = work.submit()
    hand = Hand(mlq.store, "work")
    [held] = hand.turn(1).jobs
    hand.turn(0, Settle.bury(held.id, held.attempt, "unstorable", ERROR, common_of()))
    mlq.store.release(hand.name, "drain", "")
    return job.id


def rejected(mlq: MLQ) -> str:
    @mlq.actor
    def work() -> str:
        return "mended"

    picky = Picky()
    mlq.broker.add_middleware(picky)
    job = work.submit()
    drain(mlq)
    picky.refuses = False
    return job.id


def unknown_function(mlq: MLQ) -> str:
    job_id = mlq.post("hello", functions=["greet"])
    hand = Hand(mlq.store)
    eventually(lambda: mlq.store.sweep("s", 5).released.get(job_id) == "dead")
    mlq.store.release(hand.name, "drain", "")
    mlq._listeners.add(greet)
    return job_id


def greet(msg: object, utils: object) -> str:
    return "mended"


WAYS = (failed, crashed, stalled, expired, undecodable, unstorable, rejected, unknown_function)


def test_there_is_a_way_to_each_reason() -> None:
    assert {reason.value for reason in DeadReason} == {way.__name__ for way in WAYS}


@pytest.mark.parametrize("die", WAYS, ids=lambda way: way.__name__)
def test_whatever_it_died_of_a_letter_is_listed_and_requeued(mlq: MLQ, die: Callable[[MLQ], str]) -> None:
    job_id = die(mlq)
    reason = DeadReason(die.__name__)
    letters = mlq.dead_letters
    other = DeadReason.FAILED if reason is not DeadReason.FAILED else DeadReason.CRASHED
    assert [job_id] == [record.id for record in letters.list(reason=reason).letters]
    assert [] == letters.list(reason=other).letters
    letter = letters.show(job_id)
    assert (letter.reason, letter.record.state) == (reason, State.DEAD)
    assert letter.error is not None
    attempt = letter.record.attempt
    # What cannot be read must be said anew.
    letters.requeue(job_id, args=[] if reason is DeadReason.UNDECODABLE else None)
    record = mlq.job(job_id).record
    assert (record.state, record.dead_reason, record.attempt) == (State.QUEUED, None, attempt)
    assert (record.retries, record.crashes, record.stalls, record.timeouts) == (0, 0, 0, 0)
    assert [] == letters.list().letters
    drain(mlq)
    assert mlq.job(job_id).result(timeout=0) == "mended"
    assert mlq.job(job_id).record.attempt == attempt + 1


def test_what_is_dead_again_is_a_letter_again(mlq: MLQ) -> None:
    @mlq.actor(max_retries=1, min_backoff=1, max_backoff=1)
    def work() -> None:
        raise ValueError("always")

    job = work.submit()
    drain(mlq)
    died = job.record.finished_at
    mlq.dead_letters.requeue(job.id)
    drain(mlq)
    record = mlq.dead_letters.show(job.id).record
    assert (record.retries, record.attempt, len(record.attempts)) == (1, 4, 4)
    assert died is not None
    assert record.finished_at is not None
    assert record.finished_at > died
    assert [attempt.attempt for attempt in record.attempts] == [1, 2, 3, 4]


# Looking


def test_a_letter_has_its_message_its_error_and_its_attempts(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0, tags=["night"])
    def train(lr: float, image: Any, epochs: int = 1) -> None:
        raise ValueError("diverged")

    job = train.with_options(time_limit=60_000, callback="http://example.com/done").submit(0.1, np.eye(2), epochs=3)
    drain(mlq)
    letter = mlq.dead_letters.show(job.id)
    assert letter.args is not None
    assert (letter.args[0], letter.kwargs, letter.options) == (0.1, {"epochs": 3}, {"time_limit": 60_000})
    assert np.array_equal(letter.args[1], np.eye(2))
    assert (letter.id, letter.msg, letter.functions) == (job.id, None, ())
    assert letter.callback == "http://example.com/done"
    assert letter.record.tags == ("night",)
    assert letter.error is not None
    assert (letter.error.type, letter.error.message) == ("builtins.ValueError", "diverged")
    assert 'raise ValueError("diverged")' in letter.error.traceback
    [attempt] = letter.attempts
    assert (attempt.attempt, attempt.outcome, attempt.error) == (1, "failed", letter.error)
    assert attempt.worker == letter.record.worker
    assert attempt.started_at <= attempt.ended_at == letter.record.finished_at


def test_a_letter_of_mlq_listeners_has_the_message_that_was_posted(mlq: MLQ) -> None:
    letter = mlq.dead_letters.show(unknown_function(mlq))
    assert (letter.msg, letter.functions) == ("hello", ("greet",))
    mlq.dead_letters.requeue(letter.id, msg={"other": 1})
    assert codec.decode_call(mlq.store.body(letter.id))[0] == [{"other": 1}]
    assert mlq.job(letter.id).record.functions == ("greet",)


def test_a_job_that_is_not_dead_is_no_letter(mlq: MLQ) -> None:
    job = mlq.submit("train")
    with pytest.raises(JobNotFound, match=f"job {job.id} is queued, no dead letter"):
        mlq.dead_letters.show(job.id)
    with pytest.raises(InvalidTransition, match="is queued; only a dead job can be retried"):
        mlq.dead_letters.requeue(job.id)
    job.cancel()
    with pytest.raises(InvalidTransition, match="is cancelled; only a dead job can be retried"):
        mlq.dead_letters.requeue(job.id, args=[2])
    for look in (mlq.dead_letters.show, mlq.dead_letters.requeue):
        with pytest.raises(JobNotFound, match="no job 'nope'"):
            look("nope")


def test_letters_come_the_latest_death_first_whenever_they_were_submitted(mlq: MLQ) -> None:
    middle = bury(mlq.store, finished_at=NOW)
    oldest = bury(mlq.store, finished_at=NOW - 1)
    newest = bury(mlq.store, finished_at=NOW + 1)
    assert [newest, middle, oldest] == [record.id for record in mlq.dead_letters]
    assert [ERROR] * 3 == [record.error for record in mlq.dead_letters]


def test_pages_hold_while_letters_come_and_go(mlq: MLQ) -> None:
    ids = bury_many(mlq.store, 10, lambda i: {})
    page = mlq.dead_letters.list(limit=4)
    assert ids[:4] == [record.id for record in page.letters]
    assert (ids[:4], 4, ids[0]) == ([record.id for record in page], len(page), page[0].id)
    dead = mlq.jobs(state="dead")
    assert (10, set(ids), dead.jobs[0]) == (len(dead), {record.id for record in dead}, dead[0])
    mlq.dead_letters.purge([ids[3], ids[5]])  # the one to go on behind, and one that is still to come
    bury(mlq.store, finished_at=NOW + 1)
    page = mlq.dead_letters.list(limit=4, cursor=page.cursor)
    assert [ids[4], *ids[6:9]] == [record.id for record in page.letters]
    page = mlq.dead_letters.list(limit=1, cursor=page.cursor)
    assert ([ids[9]], None) == ([record.id for record in page.letters], page.cursor)


def test_a_cursor_leads_to_nothing_that_the_filters_exclude(mlq: MLQ) -> None:
    now = time.time()
    new = [bury(mlq.store, finished_at=now - i) for i in range(3)]
    old = [bury(mlq.store, finished_at=now - 7200 - i) for i in range(2)]
    page = mlq.dead_letters.list(limit=1)
    assert [new[0]] == [record.id for record in page.letters]
    assert old == [record.id for record in mlq.dead_letters.list(cursor=page.cursor, older_than=3600).letters]
    assert new[1:] == [record.id for record in mlq.dead_letters.list(cursor=page.cursor, newer_than=3600).letters]


def test_pages_hold_among_letters_that_died_in_the_same_millisecond(mlq: MLQ) -> None:
    # Names that sort otherwise by bytes than in most languages.
    names = ["a", "B", "b", "A", "_", "-", ".", "0", "aa", "aB", "AA", "a-"]
    for name in names:
        bury(mlq.store, id=name)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = mlq.dead_letters.list(limit=1, cursor=cursor)
        seen += [record.id for record in page.letters]
        mlq.dead_letters.purge(seen[-1])
        cursor = page.cursor
        if cursor is None:
            break
    assert sorted(names, reverse=True) == seen


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, {0, 1, 2, 3}),
        ({"actor": "train"}, {0, 1, 3}),
        ({"queue": "gpu: 1"}, {1, 2}),
        ({"reason": "crashed"}, {2, 3}),
        ({"reason": DeadReason.CRASHED, "actor": "train"}, {3}),
        ({"older_than": 1000}, {2, 3}),
        ({"newer_than": timedelta(seconds=1000)}, {0, 1}),
        ({"older_than": 50, "newer_than": 5000}, {1, 2}),
        ({"text": "NÖ WAY"}, {0, 1, 2}),
        ({"text": "STRASSE"}, {0, 1, 2}),
        ({"text": "valueerror"}, {0, 1, 2}),
        ({"text": "LINE 7"}, {0, 1, 2}),
        ({"text": "signal 9", "reason": "crashed"}, {3}),
        ({"text": "no such text"}, set()),
        ({"actor": "trai"}, set()),
        ({"queue": "gpu"}, set()),
    ],
    ids=str,
)
def test_letters_are_found_by_actor_reason_queue_age_and_text(mlq: MLQ, filters: Any, expected: set[int]) -> None:
    now = time.time()
    signal = JobError(type="", message="killed by signal 9")
    ids = [
        bury(mlq.store, finished_at=now - 10),
        bury(mlq.store, finished_at=now - 100, queue="gpu: 1"),
        bury(mlq.store, finished_at=now - 3600, queue="gpu: 1", actor="infer", dead_reason=DeadReason.CRASHED),
        bury(mlq.store, finished_at=now - 7200, error=signal, dead_reason=DeadReason.CRASHED),
    ]
    wanted = [ids[i] for i in sorted(expected)]
    letters = mlq.dead_letters
    assert wanted == [record.id for record in letters.list(**filters).letters]
    assert wanted == [record.id for record in letters.scan(**filters)]
    assert len(wanted) == letters.count(**filters)
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = letters.list(limit=1, cursor=cursor, **filters)
        found += [record.id for record in page.letters]
        cursor = page.cursor
        if cursor is None:
            break
    assert wanted == found


def test_callbacks_that_could_not_be_delivered_are_no_letters_of_yours(mlq: MLQ) -> None:
    mine = bury(mlq.store)
    bury(mlq.store, queue=CALLBACKS, actor=CALLBACK)
    assert [mine] == [record.id for record in mlq.dead_letters]
    assert (mlq.dead_letters.count(), mlq.dead_letters.count(reason="failed")) == (1, 1)
    assert mlq.dead_letters.count(queue=CALLBACKS, reason="failed") == 1


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"reason": "bored"}, "reason='bored': the reasons are failed, crashed, stalled"),
        ({"limit": 0}, "from 1 to 1,000"),
        ({"limit": 1001}, "from 1 to 1,000"),
        ({"cursor": "7"}, "give the cursor of the page before"),
        ({"cursor": 7}, "give the cursor of the page before"),
        ({"cursor": "9" * 30 + ":a"}, "give the cursor of the page before"),
        ({"older_than": -1}, "older_than=-1: a duration is a number of seconds"),
        ({"newer_than": "7d"}, "newer_than='7d': a duration is a number of seconds"),
    ],
    ids=str,
)
def test_a_filter_that_cannot_be_is_refused(mlq: MLQ, filters: Any, said: str) -> None:
    with pytest.raises(InvalidJob, match=said):
        mlq.dead_letters.list(**filters)


def test_an_unknown_filter_is_refused_before_anything_is_purged(mlq: MLQ) -> None:
    bury(mlq.store)
    with pytest.raises(TypeError, match="olderthan: no filter of dead letters; there are actor, reason, queue"):
        mlq.dead_letters.purge_all(olderthan=10)  # type: ignore[call-arg]
    assert mlq.dead_letters.count() == 1


# Putting back


def test_a_letter_is_put_back_with_other_arguments_and_the_same_options(mlq: MLQ) -> None:
    seen = []

    @mlq.actor(max_retries=0)
    def train(lr: float, epochs: int = 1) -> None:
        seen.append((lr, epochs))
        if lr > 0.5:
            raise ValueError("diverged")

    job = train.with_options(time_limit=60_000, tags=["night"], priority=5).submit(0.9, epochs=3)
    drain(mlq)
    mlq.dead_letters.requeue(job.id, args=[0.8])
    drain(mlq)
    mlq.dead_letters.requeue(job.id, kwargs={"lr": 0.1}, args=())
    drain(mlq)
    assert [(0.9, 3), (0.8, 3), (0.1, 1)] == seen
    assert job.state is State.SUCCEEDED
    assert codec.decode_call(mlq.store.body(job.id)) == ([], {"lr": 0.1}, {"time_limit": 60_000})
    assert (job.record.tags, job.record.priority, job.record.attempt) == (("night",), 5, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"args": "abc"}, r"args='abc': the arguments are a list, in their order: \['abc'\]"),
        ({"args": 3}, "args=3: the arguments are a list"),
        ({"args": {"lr": 1}}, "args={'lr': 1}: the arguments are a list"),
        ({"kwargs": [1]}, r"kwargs=\[1\]: the keyword arguments are a dict"),
        ({"kwargs": {1: 2}}, "kwargs={1: 2}: the keyword arguments are a dict"),
        ({"msg": "hello"}, "msg alone is for jobs that were posted for MLQ listeners; give args and kwargs"),
        ({"args": [{1, 2}]}, r"args\[0\]: a set cannot be sent"),
        ({"args": [b"x" * (17 * 2**20)]}, "cannot be sent; the largest part is"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_change_that_cannot_be_is_refused_and_the_letter_stays(mlq: MLQ, changes: Any, said: str) -> None:
    job_id = bury(mlq.store)
    with pytest.raises(InvalidJob, match=said):
        mlq.dead_letters.requeue(job_id, **changes)
    assert mlq.dead_letters.show(job_id).args == [1]


def test_a_letter_that_died_of_a_wrong_option_can_be_mended(mlq: MLQ) -> None:
    @mlq.actor
    def work(n: int) -> int:
        return n

    body = codec.encode_call([1], {}, {"throws": "ValueError", "time_limit": 60_000})
    job = NewJob(id=new_id(), queue="default", actor="work", body=body)
    mlq.store.submit([job])
    drain(mlq)
    assert mlq.dead_letters.show(job.id).options == {"throws": "ValueError", "time_limit": 60_000}
    mlq.dead_letters.requeue(job.id, args=[2])
    drain(mlq)
    assert mlq.job(job.id).result(timeout=0) == 2
    assert codec.decode_call(mlq.store.body(job.id))[2] == {"time_limit": 60_000}


def test_what_several_put_back_at_once_runs_once(mlq: MLQ) -> None:
    ids = bury_many(mlq.store, 20)
    ran: list[int] = []

    @mlq.actor(actor_name="train")
    def work(n: int) -> None:
        ran.append(n)

    done: list[str] = []
    begin = threading.Barrier(4)

    def put_back() -> None:
        begin.wait(10)
        for job_id in ids:
            try:
                mlq.dead_letters.requeue(job_id)
            except InvalidTransition:
                continue
            done.append(job_id)

    threads = [threading.Thread(target=put_back) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    drain(mlq)
    assert sorted(ids) == sorted(done)
    assert list(range(20)) == sorted(ran)


def test_of_many_those_are_put_back_that_are_dead(mlq: MLQ) -> None:
    one, two = bury_many(mlq.store, 2)
    queued = mlq.submit("train").id
    assert [two, one] == mlq.dead_letters.requeue_many([two, "nope", queued, one, two])
    assert [] == mlq.dead_letters.requeue_many([one, two])
    assert [] == mlq.dead_letters.requeue_many([])
    assert (0, 1, 2) == tuple(mlq.job(job_id).position for job_id in (queued, two, one))
    with pytest.raises(InvalidJob, match="give a list of ids, or use requeue for one"):
        mlq.dead_letters.requeue_many(one)


def test_all_are_put_back_in_the_order_of_their_deaths(mlq: MLQ) -> None:
    ids = bury_many(mlq.store, 7, lambda i: {"actor": "infer" if i == 3 else "train"})
    expected = [*ids[:3], *ids[4:]][::-1]
    assert expected == mlq.dead_letters.requeue_all(actor="train")
    assert list(range(6)) == [mlq.job(job_id).position for job_id in expected]
    assert [ids[3]] == [record.id for record in mlq.dead_letters]


# Ten thousand of them


@pytest.fixture(scope="module")
def crowd(server: Settings) -> Iterator[MLQ]:
    """A namespace with 10,000 dead letters; tests only look at them, but for the last."""
    with fresh_app(server) as app:
        bury_many(
            app.store,
            10_000,
            lambda i: {"actor": f"a{i % 50}", "queue": f"q{i % 5}"},
        )
        yield app


@pytest.fixture
def commands(crowd: MLQ) -> Iterator[Callable[[Callable[[MLQ], Any]], tuple[Any, int]]]:
    """Does something with the crowd: what it gave, and how many commands that took."""
    with counting_proxy(str(crowd.settings.url)) as proxy:
        app = MLQ(crowd.name, settings=dataclasses.replace(crowd.settings, url=proxy.url))
        app.dead_letters.count()  # connects, and has the scripts loaded

        def count(act: Callable[[MLQ], Any]) -> tuple[Any, int]:
            before = proxy.total
            return act(app), proxy.total - before

        yield count
        app.close()


def test_a_page_of_ten_thousand_takes_two_commands(commands: Any) -> None:
    page, number = commands(lambda mlq: mlq.dead_letters.list())
    assert (len(page.letters), number) == (50, 2)
    page, number = commands(lambda mlq: mlq.dead_letters.list(cursor=page.cursor, limit=10))
    assert (len(page.letters), number) == (10, 2)
    page, number = commands(lambda mlq: mlq.dead_letters.list(older_than=1_000))
    assert (len(page.letters), number) == (50, 2)


def test_a_look_through_ten_thousand_takes_few_commands_and_each_is_bounded(commands: Any) -> None:
    assert commands(lambda mlq: mlq.dead_letters.count()) == (10_000, 1)
    assert commands(lambda mlq: mlq.dead_letters.count(queue="q1")) == (2_000, 1)
    assert commands(lambda mlq: mlq.dead_letters.count(reason="failed")) == (10_000, 10_000 // LOOKS)
    page, number = commands(lambda mlq: mlq.dead_letters.list(actor="nobody"))
    assert ([], None, number) == (page.letters, page.cursor, 10_000 // LOOKS)
    ids, number = commands(lambda mlq: {record.id for record in mlq.dead_letters})
    assert (len(ids), number) == (10_000, 2 * 10_000 // PAGE)


def test_ten_thousand_are_put_back_and_forgotten_some_hundred_a_call(commands: Any) -> None:
    back, number = commands(lambda mlq: mlq.dead_letters.requeue_all(queue="q1"))
    assert (len(back), number) == (2_000, 10_000 // LOOKS + 2_000 // BATCH)
    gone, number = commands(lambda mlq: mlq.dead_letters.purge_all())
    assert (gone, number) == (8_000, 8_000 // LOOKS + 8_000 // BATCH)
    left, _ = commands(lambda mlq: (mlq.dead_letters.count(), mlq.job_count()))
    assert left == (0, 2_000)


# Forgetting


def test_only_dead_ones_are_purged(mlq: MLQ) -> None:
    one, two, back = bury_many(mlq.store, 3)
    mlq.dead_letters.requeue(back)
    assert mlq.dead_letters.purge([one, back, "nope", one]) == 1
    assert mlq.dead_letters.purge(two) == 1
    assert mlq.dead_letters.purge(two) == 0
    assert mlq.dead_letters.purge([]) == 0
    assert mlq.job(back).state is State.QUEUED
    with pytest.raises(JobNotFound):
        mlq.job(one)


def test_all_of_a_filter_are_purged_and_nothing_of_them_is_left(mlq: MLQ) -> None:
    before = set(mlq.client.scan_iter(f"{mlq.store.root}:*", count=1000))
    bury_many(mlq.store, 5)
    kept = bury(mlq.store, dead_reason=DeadReason.CRASHED)
    assert mlq.dead_letters.purge_all(reason="failed") == 5
    assert [kept] == [record.id for record in mlq.dead_letters]
    assert mlq.dead_letters.purge_all() == 1
    left = set(mlq.client.scan_iter(f"{mlq.store.root}:*", count=1000)) - before
    assert {key.decode().removeprefix(mlq.store.root) for key in left} <= {":seq", ":shelves", ":bell:default:train"}


def with_dead_ttl(server: Settings, name: str, ttl: float | None) -> MLQ:
    return MLQ(name, settings=dataclasses.replace(server, dead_ttl=ttl))


def test_letters_are_kept_for_ever_unless_it_is_said_how_long(server: Settings, mlq: MLQ) -> None:
    old, new = bury(mlq.store, finished_at=time.time() - 10**8), bury(mlq.store, finished_at=time.time() - 1000)
    mlq.store.sweep("s", 5)
    assert mlq.dead_letters.count() == 2
    brief = with_dead_ttl(server, mlq.name, 3600)
    try:
        brief.store.sweep("s", 5)
        assert [new] == [record.id for record in mlq.dead_letters]
        with pytest.raises(JobNotFound):
            mlq.job(old)
    finally:
        brief.close()


def test_a_letter_whose_callback_is_still_to_be_delivered_outlives_its_time(server: Settings, mlq: MLQ) -> None:
    job = mlq.submit("train", callback="http://example.com/")
    hand = Hand(mlq.store, "train")
    [held] = hand.turn(1).jobs
    hand.turn(0, Settle.bury(held.id, held.attempt, "failed", ERROR, common_of()))
    brief = with_dead_ttl(server, mlq.name, 1.0)
    try:
        mlq.client.zadd(f"{mlq.store.root}:dead", {job.id: 1})
        brief.store.sweep("s", 5)
        assert job.state is State.DEAD
        mlq.client.zadd(f"{mlq.store.root}:dead", {job.id: 1})
        mlq.store.note_callback(job.id, "d", b"")
        brief.store.sweep("s", 5)
        with pytest.raises(JobNotFound):
            _ = job.state
    finally:
        brief.close()


def test_an_old_letter_that_is_imported_is_not_forgotten_at_once(server: Settings, mlq: MLQ) -> None:
    job_id = bury(mlq.store, finished_at=time.time() - 7200)
    lines = io.StringIO()
    mlq.dead_letters.export(lines)
    mlq.dead_letters.purge(job_id)
    brief = with_dead_ttl(server, mlq.name, 3600)
    try:
        assert brief.dead_letters.import_(lines.getvalue().splitlines()).created == [job_id]
        brief.store.sweep("s", 5)
        assert [job_id] == [record.id for record in mlq.dead_letters]
    finally:
        brief.close()


# Files


def whole(mlq: MLQ, job_id: str) -> tuple[JobRecord, bytes]:
    letter = mlq.dead_letters.show(job_id)
    return letter.record, letter.body


def test_what_was_exported_is_imported_as_it_was(mlq: MLQ, server: Settings, tmp_path: Path) -> None:
    attempt = Attempt(attempt=1, worker="w1", started_at=NOW - 4, ended_at=NOW - 3, outcome="failed", error=ERROR)
    saved = SavedCheckpoint(attempt=1, saved_at=NOW - 3.5, size=7)
    stall = Attempt(
        attempt=2, worker="w2", started_at=NOW - 3, ended_at=NOW - 2, outcome="stalled", error=None, resumed_from=saved
    )
    ids = [
        bury(
            mlq.store,
            body=codec.encode_call([np.eye(3), b"\0\xff", math.inf], {"x": "ä\u2028"}, {"max_retries": 2, "eta": 5}),
            queue="gpu: 1",
            actor="f/g",
            priority=-7,
            tags=("night", "run 1"),
            parent="p-1",
            callback="http://example.com/?a=1",
            result_ttl=77.5,
            job_timeout=12.5,
            max_crashes=2,
            max_stalls=4,
            unique_key="ä: 1",
            dead_reason=DeadReason.STALLED,
            attempt=3,
            retries=1,
            stalls=1,
            timeouts=2,
            worker="w3",
            progress=math.inf,
            progress_note="nearly",
            resumed_from=dataclasses.replace(saved, attempt=2),
            attempts=(attempt, stall),
        ),
        bury(mlq.store, actor=LISTENER, functions=("greet", "count, twice")),
        bury(mlq.store, body=b"\xc1 no message", dead_reason=DeadReason.UNDECODABLE, started_at=None),
        bury(mlq.store, progress="half", error=JobError(type="", message="")),
    ]
    before = [whole(mlq, job_id) for job_id in ids]
    path = tmp_path / "dead.jsonl"
    assert mlq.dead_letters.export(path) == 4
    with fresh_app(server) as other:
        # One file imported twice: what is there is left alone.
        assert sorted(other.dead_letters.import_(path).created) == sorted(ids)
        assert other.dead_letters.import_(str(path)) == ([], [record.id for record in mlq.dead_letters])
        after = [whole(other, job_id) for job_id in ids]
        assert [record.id for record in other.dead_letters] == [record.id for record in mlq.dead_letters]
        assert sorted(other.dead_letters.requeue_all()) == sorted(ids)
        assert other.job(ids[0]).record.priority == -7
        assert [ids[0]] == [record.id for record in other.jobs(tag="run 1").jobs]
    assert before == after


def test_a_unique_key_travels_with_its_letter_and_counts_when_that_is_put_back(mlq: MLQ, server: Settings) -> None:
    job_id = bury(mlq.store, unique_key="k")
    lines = io.StringIO()
    mlq.dead_letters.export(lines)
    with fresh_app(server) as other:
        alive = other.submit("train", 1, unique_key="k")
        assert other.dead_letters.import_(lines.getvalue().splitlines()).created == [job_id]
        assert other.submit("train", 1, unique_key="k") == alive
        with pytest.raises(InvalidTransition, match=f"job {alive.id} has its unique key now"):
            other.dead_letters.requeue(job_id)
        alive.cancel()
        other.dead_letters.requeue(job_id)
        assert other.submit("train", 1, unique_key="k").id == job_id


def test_an_exported_line_can_be_read_by_people(mlq: MLQ) -> None:
    job_id = bury(mlq.store, body=codec.encode_call([0.1, b"hi"], {"epochs": 3}), tags=("night",))
    text = io.StringIO()
    assert mlq.dead_letters.export(text) == 1
    assert text.getvalue().count("\n") == 1
    entry = json.loads(text.getvalue())
    assert (entry["id"], entry["actor"], entry["tags"]) == (job_id, "train", ["night"])
    assert (entry["args"], entry["kwargs"]) == ([0.1, {"$bytes": "aGk="}], {"epochs": 3})
    assert entry["error"]["message"] == ERROR.message
    assert codec.decode_call(base64.b64decode(entry["body"]))[1] == {"epochs": 3}


def test_an_export_is_written_whole_or_not_at_all(mlq: MLQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bury_many(mlq.store, 30)
    path = tmp_path / "dead.jsonl"
    path.write_text("what was there\n")
    reads = []

    def fails_later(job_ids: Any) -> Any:
        reads.append(job_ids)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return found(job_ids)

    found = mlq.store.records_and_bodies
    monkeypatch.setattr(mlq.store, "records_and_bodies", fails_later)
    with pytest.raises(KeyboardInterrupt):
        mlq.dead_letters.export(path)
    assert ["dead.jsonl"] == [entry.name for entry in tmp_path.iterdir()]
    assert path.read_text() == "what was there\n"
    monkeypatch.undo()
    assert mlq.dead_letters.export(path, newer_than=1) == 0
    assert path.read_text() == ""


def test_only_what_the_filters_let_through_is_exported(mlq: MLQ) -> None:
    ids = bury_many(mlq.store, 25, lambda i: {"actor": "infer" if i % 2 else "train"})
    lines = io.StringIO()
    assert mlq.dead_letters.export(lines, actor="train", text="way") == 13
    assert ids[::2] == [json.loads(line)["id"] for line in lines.getvalue().splitlines()]
    assert mlq.dead_letters.count() == 25


def test_a_wrong_filter_is_refused_before_a_line_is_asked_for(mlq: MLQ) -> None:
    with pytest.raises(InvalidJob, match="the reasons are"):
        mlq.dead_letters.lines(reason="bored")


def exported(mlq: MLQ, **fields: Any) -> dict[str, Any]:
    """The entry of a letter, which is forgotten here."""
    job_id = bury(mlq.store, **fields)
    text = io.StringIO()
    mlq.dead_letters.export(text)
    mlq.dead_letters.purge(job_id)
    entry: dict[str, Any] = json.loads(text.getvalue())
    return entry


def body_with(**options: Any) -> str:
    return base64.b64encode(codec.encode_call([1], {}, options)).decode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "a b"}, "job id 'a b': an id is"),
        ({"id": None}, "id is missing: it is the id that the job had"),
        ({"actor": ""}, "actor is ''; it must be a text that is not empty"),
        ({"actor": "\ud800"}, "actor is '.ud800'; it must be a text"),
        ({"queue": 5}, "queue is 5; it must be a text"),
        ({"queue": CALLBACKS}, "is mlqueue's own"),
        ({"body": "%%%"}, "body is no base64"),
        ({"body": "ä"}, "body is no base64"),
        ({"body": None}, "body is None; it must be the message in base64"),
        ({"body": "QUFB" * 6_000_000}, "body has 18,000,000 bytes; allowed are 16,777,216 .MLQUEUE_MAX_MESSAGE_BYTES"),
        ({"priority": 5000}, "option priority=5000: it must be an int from -1,000 to 1,000"),
        ({"priority": True}, "option priority=True: it must be"),
        ({"tags": "night"}, "option tags='night': it must be a list"),
        ({"tags": ["\ud800"]}, "option tags=.*: it must be a list of texts"),
        ({"callback": "file:///etc/passwd"}, "option callback='file:///etc/passwd': it must be a URL"),
        ({"functions": "greet"}, "option functions='greet': it must be a list"),
        ({"result_ttl": 1e300}, "result_ttl=1e.300: a duration is"),
        ({"job_timeout": -1}, "option job_timeout=-1: it must be"),
        ({"max_crashes": 10**30}, "option max_crashes=1000000000000000000000000000000: it must be an int"),
        ({"parent": "a/b"}, "job id 'a/b': an id is"),
        ({"dead_reason": "bored"}, "dead_reason is 'bored'; it must be one of failed, crashed"),
        ({"dead_reason": {}}, "dead_reason is {}; it must be one of"),
        ({"attempt": -1}, "attempt is -1; it must be an int, 0 or more"),
        ({"retries": "many"}, "retries is 'many'; it must be an int"),
        ({"finished_at": None}, "created_at and finished_at are Unix seconds; one of them is missing"),
        ({"created_at": "today"}, "created_at='today': a time is"),
        ({"started_at": math.nan}, "started_at=nan: a time is"),
        ({"error": "bad"}, "error is 'bad'; it must be an object, or null"),
        ({"error": {"message": 5}}, "message is 5; it must be a text, or null"),
        ({"attempts": [5]}, r"attempts is \[5\]; it must be a list of at most 50 objects"),
        ({"attempts": [{}] * 51}, "it must be a list of at most 50 objects"),
        ({"attempts": [{"attempt": 1}]}, "outcome is missing; it must be a text"),
        ({"resumed_from": [1]}, r"resumed_from is \[1\]; it must be an object, or null"),
        ({"resumed_from": {"saved_at": 1.0, "size": 1}}, "attempt is missing; it must be an int, 0 or more"),
        ({"worker": 5}, "worker is 5; it must be a text, or null"),
        ({"progress": [1]}, r"progress is \[1\]; it must be a number, a text or null"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else next(iter(value)),
)
def test_a_line_that_is_no_letter_is_an_error_with_its_number_and_those_before_it_are_in(
    mlq: MLQ, change: dict[str, Any], said: str
) -> None:
    good = exported(mlq)
    there, new = bury(mlq.store), new_id()
    lines = [{**good, "id": there}, {**good, "id": new}, {**good, "id": new_id(), **change}, {**good, "id": new_id()}]
    with pytest.raises(InvalidJob, match=f"(?s)^line 4: .*{said}.*before it are in .1 new, 1 there before.*import the"):
        mlq.dead_letters.import_(["\n", *(json.dumps(line) for line in lines)])
    assert {there, new} == {record.id for record in mlq.dead_letters}
    assert mlq.dead_letters.show(new).args == [1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\xff\xfe", "it is no JSON"),
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[1]", "it is JSON, but a list; a dead letter is an object"),
        ("{}", "id is missing"),
    ],
    ids=["no UTF-8", "cut off", "too deep", "a list", "empty"],
)
def test_a_line_that_is_not_even_an_object_is_an_error_with_its_number(mlq: MLQ, line: Any, said: str) -> None:
    with pytest.raises(InvalidJob, match=f"^line 1: .*{said}"):
        mlq.dead_letters.import_([line])


FOREIGN = sorted(set(OPTION_CHECKS) - IMPORTABLE - LIFTED)


def test_the_options_that_start_something_else_are_foreign() -> None:
    assert {"pipe_target", "on_success", "on_failure", "group_completion_callbacks", "throws"} <= set(FOREIGN)


@pytest.mark.parametrize("name", [*FOREIGN, *sorted(LIFTED), "no_such_option"])
def test_nothing_is_imported_that_could_have_another_actor_run(mlq: MLQ, name: str) -> None:
    entry = exported(mlq) | {"id": new_id(), "body": body_with(**{name: "train"}), "options": {}}
    with pytest.raises(InvalidJob, match=f"line 1: its message has the options {name}, with which nothing is imported"):
        mlq.dead_letters.import_([json.dumps(entry)])
    assert mlq.dead_letters.count() == 0


@pytest.mark.parametrize("name", sorted(IMPORTABLE))
def test_what_says_how_the_job_itself_runs_is_imported(mlq: MLQ, name: str) -> None:
    entry = exported(mlq) | {"body": body_with(**{name: 1})}
    assert mlq.dead_letters.import_([json.dumps(entry)]).created == [entry["id"]]


def test_an_import_beside_a_live_worker_runs_nothing_and_calls_nobody_back(mlq: MLQ, worker: dramatiq.Worker) -> None:
    ran = []

    @mlq.actor(actor_name="train")
    def work(n: int) -> None:
        ran.append(n)

    entry = exported(mlq, callback="http://example.com/")
    lines = [json.dumps(entry | {"id": new_id()}) for _ in range(450)]
    assert len(mlq.dead_letters.import_(lines).created) == 450
    last = work.submit(0)
    last.result(timeout=10)
    assert (ran, mlq.dead_letters.count()) == ([0], 450)
    assert [] == mlq.store.page(queue=CALLBACKS).jobs
    mlq.dead_letters.purge_all()
    assert mlq.job_count() == 0


@pytest.mark.parametrize("size", [10, 9 * 2**20])
def test_a_checkpoint_travels_with_its_letter(mlq: MLQ, server: Settings, size: int) -> None:
    @mlq.actor(max_retries=0)
    def train() -> int:
        job = current_job()
        if job.attempt == 1:
            job.save_checkpoint({"w": b"x" * size})
            raise ValueError
        return len(job.load_checkpoint()["w"])

    job = train.submit()
    drain(mlq)
    lines = io.StringIO()
    mlq.dead_letters.export(lines)
    with fresh_app(server) as other:
        other.actor(train.fn.__wrapped__, actor_name="train", max_retries=0)
        assert other.dead_letters.import_(lines.getvalue().splitlines()).created == [job.id]
        assert other.job(job.id).record.has_checkpoint
        other.dead_letters.requeue(job.id)
        drain(other)
        assert other.job(job.id).result() == size
        other.dead_letters.purge_all()
    entry = json.loads(lines.getvalue())
    for wrong in (7, "no base64!", "wQ=="):
        with pytest.raises(InvalidJob, match="checkpoint"):
            mlq.dead_letters.import_([json.dumps({**entry, "id": "other", "checkpoint": wrong})])


def test_a_large_checkpoint_is_left_where_it_is(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlqueue.dead_letters.MAX_CHECKPOINT", 5)
    job_id = bury(mlq.store)
    mlq.client.hset(f"{mlq.store.root}:ck:{job_id}", mapping={"v": codec.encode("123456"), "g": "g", "z": 7})
    mlq.client.hset(f"{mlq.store.root}:j:{job_id}", "K", 1)
    lines = io.StringIO()
    mlq.dead_letters.export(lines)
    entry = json.loads(lines.getvalue())
    assert (entry["has_checkpoint"], "checkpoint" in entry) == (True, False)


def test_a_malformed_item_makes_no_job_that_would_run(mlq: MLQ) -> None:
    _, good = read_line(json.dumps(exported(mlq)), 1000, lambda job_id, data: (0, data, 0, ""))
    for cut in (good[:-3], b"", b"\x90", b"\xc0"):
        answer = mlq.store._run("import", -1, cut)
        assert answer[0].startswith(b"error "), cut
    assert (mlq.job_count(), mlq.dead_letters.count()) == (0, 0)
