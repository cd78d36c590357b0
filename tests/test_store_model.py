"""The store against a model of it in a dictionary: random operations of producers, workers and sweepers.

The model knows what DESIGN calls the life of a job. Whatever happens in whatever order, each job is in exactly one
state, only the attempt that holds it can move it, and listings, counts, held sets and leases say the same.
"""

from __future__ import annotations

import collections
import dataclasses
import uuid
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlqueue import MLQ, codec
from mlqueue.errors import InvalidTransition, JobExists, JobNotFound, StaleAttempt, WaitCycle
from mlqueue.job import DeadReason, JobError, NewJob, Result, State, new_id
from mlqueue.store import Held, Settle, Store
from mlqueue.store.records import decode_slots
from mlqueue.store.scripts import script
from mlqueue.store.store import Awaited, common_of, encode_result

ERROR = JobError(type="", message="x")
REASON = st.sampled_from(["crash", "stall", "drain"])
SLOT = st.integers(0, 2)
#: Mostly the newest: that is where things happen.
WHICH = st.one_of(st.integers(-3, -1), st.integers(0, 1000))
FAR = 3600.0


@dataclasses.dataclass
class Model:
    """What a job must look like."""

    number: int
    actor: str
    priority: int
    state: State = State.QUEUED
    attempt: int = 0
    retries: int = 0
    crashes: int = 0
    stalls: int = 0
    worker: str | None = None
    cancel: bool = False
    reason: DeadReason | None = None
    result: object = None
    progress: object = None
    checkpoint: bytes | None = None
    timeouts: int = 0
    waits: str | None = None
    #: Whether it has a queue timeout, whether that runs, and the attempt with which it was begun.
    hurried: bool = False
    in_time: bool = False
    began: int = 0
    extended: float = 0.0

    def start(self, worker: str) -> None:
        self.state, self.worker = State.RUNNING, worker
        self.attempt += 1
        self.progress = None if self.attempt > 1 else self.progress
        self.extended = 0.0
        if self.in_time:
            self.in_time, self.began = False, self.attempt

    def put_back_unbegun(self) -> None:
        self.state = State.QUEUED
        self.in_time = self.hurried and self.began == self.attempt

    #: Its concurrency key and what it takes turns by.
    group: tuple[str | None, str | None] | None = None
    unique: str | None = None
    #: What it holds: limit, slots, and the attempts that have lent them.
    slots: list[tuple[str, list[str], list[str]]] = dataclasses.field(default_factory=list)

    @property
    def score(self) -> tuple[int, int]:
        return self.priority, self.number

    @property
    def lane(self) -> str:
        return self.actor + ("|@" if self.group else "")


#: What a job of an actor needs: resources, and how many of its jobs (of one key) may run at a time.
NEEDS: Mapping[str, tuple[dict[str, int], int | None]] = {
    "a": ({}, None),
    "b": ({}, None),
    "c": ({}, None),
    "d": ({"gpu": 1}, None),
    "e": ({"gpu": 2}, 2),
    "f": ({}, 1),
}

#: The actors that workers know.
KNOWN = "abdef"


class StoreMachine(RuleBasedStateMachine):
    """Operations on a fresh namespace, each made in the store and in the model."""

    app: MLQ  # set by the test

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(self.app.store.connector, f"model-{uuid.uuid4().hex[:12]}", self.app.settings)
        self.model: dict[str, Model] = {}
        self.alive: set[str] = set()
        self.lanes = [self.store.lane("default", actor) for actor in KNOWN]
        self.lanes += [self.store.lane("default", actor, turns=True) for actor in KNOWN]
        self.store.declare_limits({}, NEEDS)
        #: How many slots each limit has, and who holds them: id and attempt.
        self.capacity = {"gpu": 1, "@e": 2, "@f": 1}
        self.held: dict[str, dict[str, str]] = collections.defaultdict(dict)
        #: Jobs that somebody waits for who may lend them slots, and who that is.
        self.lent: dict[str, str] = {}
        #: The job that each unique key of an actor leads to.
        self.unique: dict[tuple[str, str], str] = {}
        self.numbers = 0
        #: What operations choose from, by an index that is taken modulo the length: most choices then do something.
        self.jobs: list[str] = []
        self.workers = [self.new_worker() for _ in range(3)]
        self.attempts: list[Held] = []
        #: The job that each worker must run alone, as long as it holds it.
        self.alone: dict[str, str] = {}

    def new_worker(self) -> str:
        worker = uuid.uuid4().hex
        self.store.start_worker(worker, {}, {})
        self.alive.add(worker)
        return worker

    @initialize()
    def begin_with_some_jobs(self) -> None:
        for i in range(6):
            self.submit("abdefd"[i], 0, False, None)

    def teardown(self) -> None:
        client = self.store.connector.client
        for key in client.scan_iter(f"{self.store.root}:*", count=1000):
            client.unlink(key)

    # Producers

    @rule(
        actor=st.sampled_from("abcdef"),
        priority=st.integers(-1, 1),
        delayed=st.booleans(),
        group=st.one_of(st.none(), st.tuples(st.sampled_from([None, "k", "l"]), st.sampled_from([None, "x", "y z"]))),
        hurried=st.booleans(),
    )
    def submit(
        self,
        actor: str,
        priority: int,
        delayed: bool,
        group: tuple[str | None, str | None] | None,
        hurried: bool = True,
    ) -> None:
        job_id = new_id()
        self.numbers += 1
        key, value = group or (None, None)
        group = group if key or value else None
        new = NewJob(
            id=job_id,
            queue="default",
            actor=actor,
            body=codec.encode_call([self.numbers], {}),
            priority=priority,
            delay=FAR if delayed else None,
            job_timeout=FAR,
            queue_timeout=FAR if hurried else None,
            concurrency_key=key,
            fair_by=value,
        )
        assert [True] == self.store.submit([new])
        assert [False] == self.store.submit([new])
        state = State.SCHEDULED if delayed else State.QUEUED
        self.model[job_id] = Model(self.numbers, actor, priority, state, group=group, hurried=hurried, in_time=hurried)
        self.jobs.append(job_id)

    @rule(
        actor=st.sampled_from("ad"),
        key=st.sampled_from("xy"),
        holds=st.sampled_from(["queued", "active", FAR]),
        policy=st.sampled_from(["return", "reject", "replace"]),
    )
    def submit_unique(self, actor: str, key: str, holds: str | float, policy: str) -> None:
        job_id = new_id()
        new = NewJob(
            id=job_id,
            queue="default",
            actor=actor,
            body=codec.encode_call([0], {}),
            job_timeout=FAR,
            unique_key=key,
            unique_for=holds,
            unique_policy=policy,
        )
        there = self.unique.get((actor, key))
        job = self.model.get(there or "")
        counts = {
            "queued": (State.QUEUED, State.SCHEDULED),
            "active": (State.QUEUED, State.SCHEDULED, State.RUNNING),
            FAR: (State.QUEUED, State.SCHEDULED, State.RUNNING, State.SUCCEEDED),
        }
        if there is not None and job is not None and job.state in counts[holds]:
            if policy == "return":
                assert [there] == self.store.submit_unique([new])
                return
            if policy == "reject":
                with pytest.raises(JobExists) as raised:
                    self.store.submit_unique([new])
                assert there == raised.value.job_id
                return
            if job.state is State.RUNNING:
                job.cancel = True
            elif not job.state.ended:
                job.state, job.checkpoint, job.in_time = State.CANCELLED, None, False
        for _ in range(2):
            assert [job_id] == self.store.submit_unique([new])
        self.numbers += 1
        self.model[job_id] = Model(self.numbers, actor, 0, unique=key)
        self.jobs.append(job_id)
        self.unique[actor, key] = job_id

    # Limits

    @rule(name=st.sampled_from(["gpu", "gpu", "@e", "@f"]), capacity=st.integers(0, 3))
    def set_limit(self, name: str, capacity: int) -> None:
        self.store.set_limit(name, capacity)
        self.capacity[name] = capacity

    def needs(self, job: Model) -> list[tuple[str, int]]:
        resources, most = NEEDS[job.actor]
        key = job.group[0] if job.group else None
        needs = list(resources.items())
        if most is not None or key:
            needs.append((f"@{job.actor}" + (f"/{key}" if key else ""), 1))
        return needs

    def room(self, name: str) -> int:
        return self.most(name) - len(self.held[name])

    def most(self, name: str) -> int:
        return self.capacity.get(name.partition("/")[0], 1)

    def lacking(self, job: Model) -> list[tuple[str, int]]:
        return [(name, number) for name, number in self.needs(job) if number > self.room(name)]

    def waits_for(self, lacking: list[tuple[str, int]]) -> str:
        """The one of those limits that it waits for: one of which there never is as much, else the last."""
        never = [name for name, number in lacking if number > self.most(name)]
        return never[0] if never else lacking[-1][0]

    def acquire(self, job_id: str, lent: dict[str, tuple[list[str], list[str]]] | None = None) -> None:
        job = self.model[job_id]
        job.slots = []
        for name, number in self.needs(job):
            slots, lenders = (lent or {}).get(name, ([], []))
            if not slots and name.startswith("@"):
                slots = [job_id]
            elif not slots:
                slots = [str(slot) for slot in range(100) if str(slot) not in self.held[name]][:number]
            for slot in slots:
                self.held[name][slot] = f"{job_id} {job.attempt}"
            job.slots.append((name, slots, lenders))

    def runs(self, holder: str) -> bool:
        job_id, _, attempt = holder.partition(" ")
        job = self.model.get(job_id)
        return job is not None and job.state is State.RUNNING and str(job.attempt) == attempt

    def release_slots(self) -> None:
        """Takes their slots from jobs that do not run any more."""
        gone = [(job_id, job) for job_id, job in self.model.items() if job.slots and job.state is not State.RUNNING]
        for job_id, job in gone:
            for name, slots, lenders in job.slots:
                back = next((lender for lender in lenders if self.runs(lender)), None)
                for slot in slots:
                    if self.held[name].get(slot) == f"{job_id} {job.attempt}":
                        del self.held[name][slot]
                        if back:
                            self.held[name][slot] = back
            job.slots = []

    def loans(self, job: Model, waiter_id: str) -> tuple[dict[str, tuple[list[str], list[str]]] | None, bool]:
        """What a waiting job lends to one that lacks it; and whether it may lend some later."""
        waiter, found, later, all_ = self.model.get(waiter_id), {}, False, True
        for name, number in self.lacking(job):
            if not all_:
                break
            items = waiter.slots if waiter and waiter.state is State.RUNNING else []
            own = f"{waiter_id} {waiter.attempt}" if waiter else ""
            for limit, slots, lenders in items:
                if limit == name:
                    later = True
                    mine = [slot for slot in slots if self.held[name].get(slot) == own][:number]
                    if waiter and waiter.waits and len(mine) == number:
                        found[name] = (mine, [own, *lenders])
            all_ = name in found
        return (found if all_ else None), later

    def startable(self, *, isolated: bool = False) -> dict[str, list[str]]:
        """The lanes from which a job may be started now, and the jobs that it may be."""
        lanes: dict[str, list[str]] = collections.defaultdict(list)
        for job_id, job in sorted(self.model.items(), key=lambda item: item[1].score):
            if job.state is State.QUEUED and job.actor in KNOWN and (job.crashes >= 2) is isolated:
                lanes[job.lane].append(job_id)
        found: dict[str, list[str]] = {}
        claimed: set[str] = set()
        for lane in sorted(lanes, key=lambda lane: self.model[lanes[lane][0]].score):
            heads = lanes[lane][:1]
            if "@" in lane and not isolated:
                groups = {self.model[job_id].group: job_id for job_id in reversed(lanes[lane])}
                heads = list(groups.values())
            lacking = {job_id: self.lacking(self.model[job_id]) for job_id in heads}
            free = [
                job_id
                for job_id in heads
                if not lacking[job_id] and not claimed.intersection(name for name, _ in self.needs(self.model[job_id]))
            ]
            if free:
                found[lane] = free
            else:
                for lacks in filter(None, lacking.values()):
                    name = self.waits_for(lacks)
                    if dict(lacks)[name] <= self.most(name) and "/" not in name:
                        claimed.add(name)
        return found

    # Workers

    @rule(slot=SLOT)
    def restart_worker(self, slot: int) -> None:
        self.workers[slot] = self.new_worker()

    def check_fetched(self, worker: str, want: int, fetched: list[Held]) -> None:
        """Notes what a worker was given, if it is what it must get: one after the other."""
        left = list(fetched)
        held = {job_id for job_id, job in self.model.items() if job.worker == worker and job.state is State.RUNNING}

        def started(lent: dict[str, tuple[list[str], list[str]]] | None = None) -> None:
            held = left.pop(0)
            job = self.model[held.id]
            job.start(worker)
            assert (job.attempt, job.retries, job.crashes) == (held.attempt, held.retries, held.crashes)
            self.acquire(held.id, lent)
            slots = {name: tuple(map(int, slots)) for name, slots, _ in job.slots if name[0] != "@"}
            assert slots == (decode_slots(held.slots) if held.slots else {})

        if self.alone.get(worker) in held:
            assert left == []
            return
        isolated = {} if held else self.startable(isolated=True)
        if isolated:
            first = min((jobs[0] for jobs in isolated.values()), key=lambda job_id: self.model[job_id].score)
            assert [first] == [held.id for held in left]
            self.alone[worker] = first
            started()
            return
        self.lent = {job_id: by for job_id, by in self.lent.items() if self.model_state(job_id) is State.QUEUED}
        while left and left[0].id in self.lent:
            loans, _ = self.loans(self.model[left[0].id], self.lent[left[0].id])
            if not loans:
                break
            del self.lent[left[0].id]
            started(loans)
        if len(fetched) < want:
            for job_id, waiter in self.lent.items():
                job = self.model[job_id]
                assert job.actor not in KNOWN or job.crashes >= 2 or not self.loans(job, waiter)[0], job_id
        while len(fetched) - len(left) < want:
            lanes = self.startable()
            waiting = [job for job in self.model.values() if job.state is State.QUEUED and job.crashes < 2]
            if not lanes:
                break
            first = min(lanes, key=lambda lane: min(job.score for job in waiting if job.lane == lane))
            assert left, f"one of {lanes[first]} may start"
            assert left[0].id in lanes[first]
            started()
        assert left == []

    def model_state(self, job_id: str) -> State | None:
        job = self.model.get(job_id)
        return job.state if job else None

    @rule(slot=SLOT, want=st.integers(1, 3), twice=st.booleans())
    def fetch(self, slot: int, want: int, twice: bool) -> None:
        worker = self.workers[slot]
        if worker not in self.alive:
            # One that was thought dead goes on: it is welcome again, once it has said hello.
            command = self.store.turn_command(worker, uuid.uuid4().hex, want, self.lanes, [])
            turn = self.store.read_turn(self.store.connector.execute(*command, script=script("turn")))
            assert ([], False) == (turn.jobs, turn.known)
            self.store.start_worker(worker, {}, {})
            self.alive.add(worker)
        self.release_slots()
        command = self.store.turn_command(worker, uuid.uuid4().hex, want, self.lanes, [])
        client = self.store.connector.client
        client.unlink(*map(self.store.bell, self.lanes))  # it has heard them
        client.unlink(f"{self.store.root}:lim:next:gpu", *(f"{self.store.root}:lim:next:@{actor}" for actor in KNOWN))
        turns = [
            self.store.read_turn(self.store.connector.execute(*command, script=script("turn")))
            for _ in range(1 + twice)
        ]
        self.check_fetched(worker, want, turns[0].jobs)
        for turn in turns:
            assert sorted(turns[0].jobs) == sorted(turn.jobs)
        self.attempts += turns[0].jobs

    def holds(self, held: Held) -> Model | None:
        job = self.model.get(held.id)
        return job if job and job.state is State.RUNNING and job.attempt == held.attempt else None

    def settle(self, settle: Settle, held: Held) -> Model | None:
        """Sends it; the job when it must have been accepted and the flag was not set, else None."""
        job = self.holds(held)
        assert self.store.settle([settle]) == ([] if job else [(0, "stale")])
        if job is None:
            return None
        job.waits = None
        if job.cancel:
            job.state = State.CANCELLED
            job.checkpoint = None
            return None
        return job

    @precondition(lambda self: self.attempts)
    @rule(which=WHICH, value=st.sampled_from([None, 1, "x" * 100]))
    def finish(self, which: int, value: object) -> None:
        held = self.attempts[which % len(self.attempts)]
        result = encode_result(Result.of(value))
        job = self.settle(Settle.finish(held.id, held.attempt, result, common_of()), held)
        if job:
            job.state, job.result, job.checkpoint = State.SUCCEEDED, value, None

    @precondition(lambda self: self.attempts)
    @rule(which=WHICH, delayed=st.booleans())
    def fail_with_retry(self, which: int, delayed: bool) -> None:
        held = self.attempts[which % len(self.attempts)]
        delay = FAR if delayed else 0
        job = self.settle(Settle.reschedule(held.id, held.attempt, delay, ERROR, common_of()), held)
        if job:
            job.state = State.SCHEDULED if delayed else State.QUEUED
            job.retries += 1

    @precondition(lambda self: self.attempts)
    @rule(which=WHICH)
    def fail_for_good(self, which: int) -> None:
        held = self.attempts[which % len(self.attempts)]
        job = self.settle(Settle.bury(held.id, held.attempt, DeadReason.FAILED, ERROR, common_of()), held)
        if job:
            job.state, job.reason = State.DEAD, DeadReason.FAILED

    @precondition(lambda self: self.attempts)
    @rule(which=WHICH, begun=st.booleans())
    def give_back(self, which: int, begun: bool) -> None:
        held = self.attempts[which % len(self.attempts)]
        job = self.settle(Settle.give_back(held.id, held.attempt, common_of(), begun=begun), held)
        if job and begun:
            job.state = State.QUEUED
        elif job:
            job.put_back_unbegun()

    @precondition(lambda self: self.attempts)
    @rule(which=WHICH, by=st.integers(1, 100), from_within=st.booleans())
    def extend(self, which: int, by: int, from_within: bool) -> None:
        held = self.attempts[which % len(self.attempts)]
        job = self.holds(held) if from_within else self.model.get(held.id)
        if job is None or job.state is not State.RUNNING:
            error = StaleAttempt if from_within else InvalidTransition
            with pytest.raises(error if held.id in self.model else JobNotFound):
                self.store.extend(held.id, by, attempt=held.attempt if from_within else None)
            return
        job.extended += by
        assert job.extended == self.store.extend(held.id, by, attempt=held.attempt if from_within else None)

    @precondition(lambda self: self.attempts)
    @rule(which=WHICH, value=st.integers(0, 100))
    def report(self, which: int, value: int) -> None:
        held = self.attempts[which % len(self.attempts)]
        job = self.holds(held)
        answer = self.store.touch([(held.id, held.attempt, codec.encode(value), "")])
        assert answer == [0 if job is None else 2 if job.cancel else 1]
        if job:
            job.progress = value

    @precondition(lambda self: self.attempts)
    @rule(which=WHICH, data=st.binary(max_size=20))
    def save(self, which: int, data: bytes) -> None:
        held = self.attempts[which % len(self.attempts)]
        job = self.holds(held)
        try:
            assert self.store.save_checkpoint(held.id, held.attempt, data, uuid.uuid4().hex[:8]) == (job and job.cancel)
        except StaleAttempt:
            assert job is None
        if job:
            job.checkpoint = data

    # What goes wrong

    @rule(slot=SLOT, reason=REASON, unbegun=st.integers(0, 2), doomed=st.booleans())
    def lose_worker(self, slot: int, reason: str, unbegun: int = 0, doomed: bool = False) -> None:
        worker = self.workers[slot]
        held = [job_id for job_id, job in self.model.items() if job.worker == worker and job.state is State.RUNNING]
        begun = {job_id: self.model[job_id].attempt for job_id in held[unbegun:]}
        # For the last that has begun the process was killed.
        doom = list(begun)[-1] if doomed and begun else None
        outcomes = self.store.release(
            worker,
            reason,
            "gone",
            begun=begun if unbegun else None,
            dooms=None if doom is None else {doom: (begun[doom], "too long")},
        )
        assert set(held) == set(outcomes)
        self.alive.discard(worker)
        # One that waits for another has begun, whether that was said or not.
        begun |= {job_id: self.model[job_id].attempt for job_id in held if self.model[job_id].waits is not None}
        if reason == "crash" and not begun:
            begun = dict.fromkeys(held, 0)  # where none had begun any may be the reason
        self.lose_all(held, reason, [job_id for job_id in held if job_id not in begun], doom)

    def lose_all(self, held: Iterable[str], reason: str, unbegun: Iterable[str] = (), doom: str | None = None) -> None:
        held = [job_id for job_id in held if job_id not in unbegun]
        for job in (self.model[job_id] for job_id in unbegun):
            if job.cancel:
                job.state, job.checkpoint = State.CANCELLED, None
            else:
                job.put_back_unbegun()
        jobs = [self.model[job_id] for job_id in held]
        if doom is not None:
            self.run_out(self.model[doom])
        active = sum(job.waits is None for job in jobs)
        for job_id, job in zip(held, jobs, strict=True):
            # One that only waits for another has not killed its worker, where another ran.
            blamed = job.waits is None or active == 0
            if job_id != doom:
                self.lose(job, reason if blamed else "drain", active == 1 or len(jobs) == 1)
            job.waits = None

    @rule(slot=SLOT, want=st.integers(1, 2), times=st.integers(1, 3))
    def crash_again_and_again(self, slot: int, want: int, times: int) -> None:
        for _ in range(times):
            self.fetch(slot, want, False)
            self.lose_worker(slot, "crash")

    def lose(self, job: Model, reason: str, alone: bool) -> None:
        if job.cancel:
            job.state, job.checkpoint = State.CANCELLED, None
            return
        job.state = State.QUEUED
        if reason == "crash":
            job.crashes += 1
            if alone and job.crashes >= 3:
                job.state, job.reason = State.DEAD, DeadReason.CRASHED
        elif reason == "stall":
            job.stalls += 1
            if job.stalls >= 5:
                job.state, job.reason = State.DEAD, DeadReason.STALLED

    @rule(slot=SLOT, gap=st.booleans())
    def lease_ends(self, slot: int, gap: bool) -> None:
        worker = self.workers[slot]
        client = self.store.connector.client
        self.store.sweep("s", 0)
        if worker not in self.alive:
            return
        client.zadd(f"{self.store.root}:workers", {worker: 1})
        if gap:
            client.hincrby(f"{self.store.root}:sweep", "last", -6000)
        released = self.store.sweep("s", 0).released
        if gap:
            assert released == {}
            return
        held = {job_id for job_id, job in self.model.items() if job.worker == worker and job.state is State.RUNNING}
        assert held == set(released)
        self.alive.discard(worker)
        self.lose_all(held, "stall")

    @precondition(lambda self: self.attempts)
    @rule(which=WHICH)
    def run_too_long(self, which: int) -> None:
        """The time of an attempt is over."""
        held = self.attempts[which % len(self.attempts)]
        job = self.holds(held)
        client, root = self.store.connector.client, self.store.root
        client.zadd(f"{root}:late", {held.id: 1}, xx=True)
        if job:
            client.hset(f"{root}:j:{held.id}", "u", 1)
        released = self.store.sweep("s", 0).released
        assert set(released) == ({held.id} if job else set())
        if job is None:
            return
        job.waits = None
        self.run_out(job)

    def run_out(self, job: Model) -> None:
        if job.cancel:
            job.state, job.checkpoint = State.CANCELLED, None
        elif job.timeouts >= 5:
            job.state, job.reason = State.DEAD, DeadReason.STALLED
        else:
            job.state = State.QUEUED
            job.timeouts += 1

    @rule(which=WHICH, slot=SLOT, want=st.integers(1, 3), fetched=st.booleans())
    def wait_too_long(self, which: int, slot: int, want: int, fetched: bool) -> None:
        """The queue timeout of a job is over: it is dead at the next sweep, and before that nobody starts it."""
        job_id = self.jobs[which % len(self.jobs)]
        job = self.model.get(job_id)
        if not job or not job.in_time or job.state is not State.QUEUED:
            return
        client, root = self.store.connector.client, self.store.root
        client.zadd(f"{root}:qt", {job_id: 1})
        client.hset(f"{root}:j:{job_id}", "U", 1)
        job.state, job.reason, job.in_time = State.DEAD, DeadReason.EXPIRED, False
        self.release_slots()
        if fetched and not self.lacking(job):
            # One that lacks slots holds up others until the next sweep, as it would if there were time left.
            self.fetch(slot, want, False)
        self.store.sweep("s", 0)

    @precondition(lambda self: self.attempts)
    @rule(which=WHICH, other=WHICH, may_start=st.booleans(), twice=st.booleans())
    def wait_for_another(self, which: int, other: int, may_start: bool, twice: bool) -> None:
        held = self.attempts[which % len(self.attempts)]
        waiter, target_id = self.holds(held), self.jobs[other % len(self.jobs)]
        target = self.model.get(target_id)
        if waiter is None:
            return  # an attempt that was taken over asks in vain, whatever it hears
        assert waiter.worker is not None
        nonce = uuid.uuid4().hex

        def ask() -> Awaited:
            return self.store.await_job(
                (held.id, held.attempt), target_id, "bell", worker=str(waiter.worker), nonce=nonce,
                may_start=may_start, lanes=self.lanes,
            )  # fmt: skip

        if target is None:
            with pytest.raises(JobNotFound):
                ask()
            return
        if not target.state.ended and self.leads_to(target_id, held.id):
            with pytest.raises(WaitCycle):
                ask()
            return
        expected = target.state
        answer = ask()
        assert expected is answer.state
        if target.state.ended:
            assert answer.jobs == []
            return
        waiter.waits = target_id
        held_here = [job for job in self.model.values() if job.worker == waiter.worker and job.state is State.RUNNING]
        startable = may_start and target.state is State.QUEUED and target.actor in KNOWN and waiter.worker in self.alive
        if target.crashes >= 2:
            startable = startable and all(job.waits for job in held_here)
        loans, later = self.loans(target, held.id) if target.state is State.QUEUED else (None, False)
        startable = startable and loans is not None
        if later and not startable:
            self.lent[target_id] = held.id
        assert [job.id for job in answer.jobs] == ([target_id] if startable else [])
        if startable:
            if twice:
                assert ask().jobs == answer.jobs  # the answer was lost
            target.start(waiter.worker)
            self.acquire(target_id, loans)
            self.lent.pop(target_id, None)
            self.attempts += answer.jobs
            holding = {job_id for job_id, job in self.model.items() if job in held_here}
            if target.crashes >= 2 and self.alone.get(waiter.worker) not in holding:
                self.alone[waiter.worker] = target_id

    def leads_to(self, job_id: str, goal: str) -> bool:
        at: str | None = job_id
        while at is not None and at != goal:
            job = self.model.get(at)
            at = job.waits if job and job.state is State.RUNNING else None
        return at == goal

    @rule(which=WHICH)
    def time_comes(self, which: int) -> None:
        """What was scheduled is due."""
        job_id = self.jobs[which % len(self.jobs)]
        job = self.model.get(job_id)
        if job and job.state is State.SCHEDULED:
            self.store.connector.client.zadd(f"{self.store.root}:sched", {job_id: 1})
            self.store.sweep("s", 0)
            job.state = State.QUEUED

    # Steering

    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        job_id = self.jobs[which % len(self.jobs)]
        job = self.model.get(job_id)
        if job is None:
            with pytest.raises(JobNotFound):
                self.store.cancel(job_id)
            return
        assert self.store.cancel(job_id) is job.state
        if job.state in (State.QUEUED, State.SCHEDULED):
            job.state, job.checkpoint, job.in_time = State.CANCELLED, None, False
        elif job.state is State.RUNNING:
            job.cancel = True

    @rule(which=WHICH)
    def retry(self, which: int) -> None:
        job_id = self.jobs[which % len(self.jobs)]
        job = self.model.get(job_id)
        if job is None:
            return
        if job.state not in (State.DEAD, State.CANCELLED):
            with pytest.raises(InvalidTransition):
                self.store.retry(job_id)
            return
        if job.unique:
            other = self.unique.get((job.actor, job.unique), job_id)
            beside = self.model_state(other)
            if other != job_id and beside is not None and not beside.ended:
                with pytest.raises(InvalidTransition, match=other):
                    self.store.retry(job_id)
                return
            self.unique[job.actor, job.unique] = job_id
        self.store.retry(job_id)
        self.numbers += 1
        job.number, job.state, job.cancel, job.reason = self.numbers, State.QUEUED, False, None
        job.retries = job.crashes = job.stalls = job.timeouts = 0
        job.progress = job.result = None
        job.in_time = job.hurried

    @rule(which=WHICH)
    def remove(self, which: int) -> None:
        job_id = self.jobs[which % len(self.jobs)]
        job = self.model.get(job_id)
        running = job is not None and job.state is State.RUNNING
        assert self.store.remove([job_id]) == (0 if running or job is None else 1)
        if not running:
            self.model.pop(job_id, None)
            self.unique = {key: leads_to for key, leads_to in self.unique.items() if leads_to != job_id}

    # What must hold after each step

    @invariant()
    def slots_are_held_by_those_who_run(self) -> None:
        self.release_slots()
        held = {name: holders for name, _, _, holders in self.store.limits() if holders}
        expected = {
            name: {slot: holder.partition(" ")[0] for slot, holder in slots.items()}
            for name, slots in self.held.items()
            if slots
        }
        assert expected == held

    @invariant()
    def who_may_start_is_told(self) -> None:
        self.release_slots()
        client = self.store.connector.client
        for lane in self.startable():
            assert client.exists(self.store.bell(("default", lane))), lane

    @invariant()
    def the_records_are_as_the_model_says(self) -> None:
        records = self.store.records(list(self.model), full=False)
        for (job_id, job), record in zip(self.model.items(), records, strict=True):
            assert record is not None, job_id
            assert (job.state, job.attempt, job.retries, job.crashes, job.stalls) == (
                record.state, record.attempt, record.retries, record.crashes, record.stalls,
            )  # fmt: skip
            assert (job.reason, job.progress) == (record.dead_reason, record.progress)
            assert (job.timeouts, job.waits) == (record.timeouts, record.waits_for)
            assert job.extended == record.extended_by
            assert (job.cancel and job.state is State.RUNNING) == (
                record.cancel_requested_at is not None and record.state is State.RUNNING
            )
            assert (job.checkpoint is not None) == record.has_checkpoint
            assert job.checkpoint == self.store.load_checkpoint(job_id)
            if job.state is State.SUCCEEDED:
                outcome = self.store.outcome(job_id)
                assert outcome.result is not None
                assert job.result == outcome.result.full

    @invariant()
    def the_indexes_say_the_same(self) -> None:
        expected = sorted(((job.number, job_id) for job_id, job in self.model.items()), reverse=True)
        assert [job_id for _, job_id in expected] == [record.id for record in self.store.scan(limit=3)]
        counted: dict[State, int] = {}
        for count in self.store.counts():
            counted[count.state] = counted.get(count.state, 0) + count.number
        states = [job.state for job in self.model.values()]
        assert {state: states.count(state) for state in set(states)} == counted
        hurry = {job_id.decode() for job_id in self.store.connector.client.zrange(f"{self.store.root}:qt", 0, -1)}
        assert hurry == {job_id for job_id, job in self.model.items() if job.in_time}
        held = {job_id: worker.id for worker in self.store.workers() for job_id in worker.jobs}
        assert held == {job_id: job.worker for job_id, job in self.model.items() if job.state is State.RUNNING}

    @invariant()
    def positions_are_ranks(self) -> None:
        waiting = sorted(
            (job.priority, job.number, job_id) for job_id, job in self.model.items() if job.state is State.QUEUED
        )
        for rank, (_, _, job_id) in enumerate(waiting):
            assert rank == self.store.record(job_id, full=False).position


def run_machine(mlq: MLQ, examples: int, steps: int, *, same: bool = True) -> None:
    StoreMachine.app = mlq
    case = StoreMachine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        # The same examples each time, but in the long run, which looks for new ones.
        derandomize=same,
        database=None if same else DirectoryBasedExampleDatabase(".hypothesis/examples"),
    )
    case().runTest()


def test_the_store_behaves_as_its_model(mlq: MLQ) -> None:
    run_machine(mlq, examples=25, steps=30)


@pytest.mark.faults
def test_the_store_behaves_as_its_model_over_many_examples(mlq: MLQ) -> None:
    run_machine(mlq, examples=120, steps=40)


@pytest.mark.faults_long
def test_the_store_behaves_as_its_model_over_examples_that_no_run_had(mlq: MLQ) -> None:
    run_machine(mlq, examples=2000, steps=50, same=False)
