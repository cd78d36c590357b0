"""What is wrong with a store, its server and its workers, and what to do about it.

Each check gives findings; none changes anything. What can be mended (`mend`) is what no job's life leads to: keys that
belong to no job, jobs that stand where nobody would find them. They come of an eviction, a restore from an old copy, a
cut append-only file, somebody's hand.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from typing import Any, Final

from .errors import MLQueueError, StoreError, StoreFull, StoreUnavailable
from .job import State
from .store import Store
from .store.scripts import script

__all__ = ["Finding", "Mended", "Severity", "examine", "mend"]

#: How far the server's clock may be from ours until that is noted, and until it is a warning, in seconds.
CLOCK_NOTED: Final = 1.0
CLOCK_OFF: Final = 10.0

#: Shares of its memory limit from which on it is a warning, and an error.
MEMORY_HIGH: Final = 0.75
MEMORY_FULL: Final = 0.9

#: Bytes of free disk below which it is a warning, and an error.
DISK_LOW: Final = 2**30
DISK_FULL: Final = 100 * 2**20

#: How long nobody may look after the workers while there are some, in seconds.
UNSWEPT: Final = 30.0

#: How many keys are looked at at once, and for how many seconds altogether.
STEP: Final = 500
LIMIT: Final = 10.0


class Severity(StrEnum):
    """How bad it is."""

    OK = "ok"
    #: Good to know.
    NOTE = "note"
    #: It works, and will not under some circumstances.
    WARNING = "warning"
    #: Jobs are lost or do not run, or may be at any moment.
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check has found."""

    #: The name of the check.
    check: str
    severity: Severity
    #: What is the case.
    text: str
    #: What to do; empty where nothing is.
    cure: str = ""


Findings = Iterator[Finding]


def examine(store: Store) -> list[Finding]:
    """All findings, in the order of the checks. Raises `StoreUnavailable` when there is no store to be asked."""
    store.connector.execute("PING")
    found: list[Finding] = []
    for check in CHECKS:
        name = check.__name__.removeprefix("_")
        try:
            found += check(store)
        except StoreUnavailable:
            raise
        except StoreError as error:
            found.append(
                Finding(
                    name,
                    Severity.WARNING,
                    f"it could not be checked: {error.message}",
                    "Let the user of MLQUEUE_URL run INFO and CONFIG GET for a check (+info +config|get).",
                )
            )
    return found


def _info(store: Store, section: str) -> dict[str, str]:
    text = store.connector.execute("INFO", section)
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


def _config(store: Store, name: str) -> str | None:
    """A setting of the server; None where it does not say, as managed ones do."""
    try:
        found = store.connector.execute("CONFIG", "GET", name)
    except StoreUnavailable:
        raise
    except StoreError:
        return None
    return found[1].decode() if found else None


# The server


def _server(store: Store) -> Findings:
    begun = time.perf_counter()
    store.connector.execute("PING")
    took = 1000 * (time.perf_counter() - begun)
    info = _info(store, "server")
    name = "valkey" if "valkey_version" in info else "redis"
    version = info.get(f"{name}_version", "?")
    # One that is too old was refused when we connected.
    yield Finding("server", Severity.OK, f"{name} {version} at {store.connector.where}, {took:.1f} ms away")


def _access(store: Store) -> Findings:
    """Whether our user may do what is done all the time."""
    probe = f"{store.root}:wb:doctor-{uuid.uuid4().hex}"
    run = store.connector.execute
    tries: list[tuple[str, Callable[[], Any]]] = [
        ("run scripts", store.counts),
        ("write", lambda: run("RPUSH", probe, 1)),
        ("wait", lambda: run("BLPOP", probe, 0.01)),
        ("scan", lambda: run("SCAN", 0, "COUNT", 1)),
        ("ask for the time", lambda: run("TIME")),
    ]
    refused = []
    for what, attempt in tries:
        try:
            attempt()
        except StoreUnavailable:
            raise
        except StoreFull as error:
            yield Finding(
                "access",
                Severity.ERROR,
                f"the server takes no writes: {error.message}",
                "Give it memory or disk; workers go on, nothing new can be submitted.",
            )
        except MLQueueError as error:
            refused.append(f"{what} ({error.message.partition('. Check user')[0]})")
    if refused:
        yield Finding(
            "access",
            Severity.ERROR,
            f"our user may not {'; nor '.join(refused)}",
            "Allow it +@scripting +@write +@read +@blocking +@connection +time +scan on keys mlq:*.",
        )
    else:
        yield Finding("access", Severity.OK, "our user may do all that is needed")


def _persistence(store: Store) -> Findings:
    info = _info(store, "persistence")
    for name, what in (("aof_last_write_status", "append-only file"), ("rdb_last_bgsave_status", "snapshot")):
        if info.get(name, "ok") != "ok":
            yield Finding(
                "persistence",
                Severity.ERROR,
                f"the last write of the {what} failed",
                "Look into the server's log; mostly its disk is full.",
            )
    if info.get("aof_enabled") == "1":
        if store.connector.embedded is not None:
            # Its keeper does the syncing.
            yield Finding("persistence", Severity.OK, f"append-only file, synced: {store.settings.durability}")
            return
        fsync = _config(store, "appendfsync")
        risk = Severity.WARNING if fsync == "no" else Severity.OK
        cure = "CONFIG SET appendfsync everysec: a power cut costs what was not synced." if fsync == "no" else ""
        yield Finding("persistence", risk, f"append-only file, appendfsync {fsync or 'unknown'}", cure)
        return
    saves = _config(store, "save")
    cure = "Switch it on: CONFIG SET appendonly yes, and appendonly yes in its configuration."
    if saves:
        yield Finding(
            "persistence",
            Severity.WARNING,
            f"snapshots alone (save {saves}): when the server dies, all jobs since the last one are lost",
            cure,
        )
    else:
        yield Finding(
            "persistence", Severity.ERROR, "nothing reaches the disk: when the server ends, all jobs are lost", cure
        )


def _memory(store: Store) -> Findings:
    info = _info(store, "memory")
    used, limit = int(info["used_memory"]), int(info.get("maxmemory", 0))
    policy = info.get("maxmemory_policy") or _config(store, "maxmemory-policy") or "unknown"
    if policy != "noeviction":
        yield Finding(
            "memory",
            Severity.ERROR if limit else Severity.WARNING,
            f"maxmemory-policy is {policy}: a full server throws jobs away",
            "CONFIG SET maxmemory-policy noeviction, and the same in its configuration; or use a server of your own.",
        )
    room = limit or int(info.get("total_system_memory", 0))
    share = used / room if room else 0.0
    severity = Severity.ERROR if share >= MEMORY_FULL else Severity.WARNING if share >= MEMORY_HIGH else Severity.OK
    whole = f"of {_size(room)} ({'maxmemory' if limit else 'the machine'})" if room else "(no limit is known)"
    cure = "Give it more memory, shorten result_ttl, or forget jobs (`mlqueue clear`)." if severity != "ok" else ""
    yield Finding("memory", severity, f"{_size(used)} {whole} in use", cure)


def _disk(store: Store) -> Findings:
    server = store.connector.embedded
    if server is None:
        return  # of another machine's we only hear when it is full
    free = shutil.disk_usage(server.home).free
    severity = Severity.ERROR if free < DISK_FULL else Severity.WARNING if free < DISK_LOW else Severity.OK
    cure = "Make room, or move the folder (MLQUEUE_HOME)." if severity != "ok" else ""
    yield Finding("disk", severity, f"{_size(free)} free in {server.home}", cure)


def _clock(store: Store) -> Findings:
    before = time.time()
    seconds, microseconds = store.connector.execute("TIME")
    after = time.time()
    offset = int(seconds) + int(microseconds) / 1e6 - (before + after) / 2
    size = abs(offset)
    severity = Severity.WARNING if size > CLOCK_OFF else Severity.NOTE if size > CLOCK_NOTED else Severity.OK
    ahead = "ahead of" if offset > 0 else "behind"
    cure = (
        "Have both clocks set by NTP. Only the server's counts, but times here and in logs will not fit."
        if severity != "ok"
        else ""
    )
    yield Finding("clock", severity, f"the server's is {size:.3f} s {ahead} ours", cure)


def _replication(store: Store) -> Findings:
    if store.connector.place is None:
        return
    replicas = int(_info(store, "replication").get("connected_slaves", 0))
    if replicas:
        yield Finding("replication", Severity.OK, f"{replicas} replica{'' if replicas == 1 else 's'} of our server")
    else:
        yield Finding(
            "replication",
            Severity.WARNING,
            "our server has no replica: nobody can take over from it",
            "Start one, or wait until the one that was lost is back.",
        )


# The jobs


def _workers(store: Store) -> Findings:
    workers = store.workers()
    stale = [worker for worker in workers if worker.lease_left < 0]
    if stale:
        names = ", ".join(f"{worker.info.get('host', '?')}:{worker.info.get('pid', '?')}" for worker in stale)
        held = sum(len(worker.jobs) for worker in stale)
        yield Finding(
            "workers",
            Severity.WARNING,
            f"{len(stale)} gave no sign of life for longer than their lease, and hold {held} jobs: {names}",
            "Any running worker takes their jobs back; start one.",
        )
    swept = store.connector.execute("HGET", f"{store.root}:sweep", "last")
    age = None if swept is None else int(store.connector.execute("TIME")[0]) - int(swept) / 1000
    if workers and (age is None or age > UNSWEPT):
        since = "since they are there" if age is None else f"for {age:.0f} s"
        yield Finding(
            "workers",
            Severity.ERROR,
            f"nobody has looked after them {since}",
            "Start a worker (`mlqueue worker`): its supervisor does.",
        )
    counts = store.counts()
    waiting = [count for count in counts if count.state is State.QUEUED]
    known = {
        (queue, actor) for worker in workers for queue in _texts(worker, "queues") for actor in _texts(worker, "actors")
    }
    for count in waiting:
        if (count.queue, count.actor) not in known:
            yield Finding(
                "workers",
                Severity.WARNING,
                f"{count.number:,} job{' of ' if count.number == 1 else 's of '}{count.actor} "
                f"wait{'s' if count.number == 1 else ''} in queue {count.queue}; no worker runs it there",
                "Start a worker with the module that declares it.",
            )
    living = len(workers) - len(stale)
    running = sum(count.number for count in counts if count.state is State.RUNNING)
    queued = sum(count.number for count in waiting)
    yield Finding("workers", Severity.OK, f"{living} alive, {running:,} jobs running, {queued:,} waiting")


def _texts(worker: Any, name: str) -> list[str]:
    found = worker.info.get(name)
    return found if isinstance(found, list) else []


def _migration(store: Store) -> Findings:
    number = store.connector.execute("SCARD", f"{store.root}:mig")
    if number:
        yield Finding(
            "migration",
            Severity.WARNING,
            f"{number:,} jobs are on their way to another store",
            "Let `mlqueue migrate` go on, or call it again.",
        )


def _orphans(store: Store) -> Findings:
    orphans = astray = 0
    complete = True
    for keys, in_time in _keys(store):
        complete = in_time
        orphans += len(_orphans_among(store, keys, remove=False))
        astray += len(_astray_among(store, keys))
    if astray:
        yield Finding(
            "orphans", Severity.ERROR, f"{astray:,} jobs stand where nobody finds them", "`mlqueue repair` mends that."
        )
    if orphans:
        yield Finding(
            "orphans", Severity.WARNING, f"{orphans:,} keys belong to no job", "`mlqueue repair` removes them."
        )
    if not complete:
        yield Finding("orphans", Severity.NOTE, f"so many keys that {LIMIT:g} s were not enough to look at all")
    elif not astray and not orphans:
        yield Finding("orphans", Severity.OK, "every key belongs to a job, every job is where it is looked for")


#: In this order.
CHECKS: Final[tuple[Callable[[Store], Iterable[Finding]], ...]] = (
    _server,
    _access,
    _persistence,
    _memory,
    _disk,
    _clock,
    _replication,
    _workers,
    _migration,
    _orphans,
)


# Mending


@dataclasses.dataclass(frozen=True)
class Mended:
    """What `mend` did, or would have done."""

    #: Keys that belonged to nothing, without the namespace's part.
    removed: list[str]
    #: Ids of jobs that were put where they belong.
    put_back: list[str]


def mend(store: Store, *, dry_run: bool = False) -> Mended:
    """Puts jobs back that nobody would find, and removes keys that belong to none; looks at all keys."""
    removed: list[str] = []
    put_back: list[str] = []
    for keys, _ in _keys(store, limit=None):
        astray = _astray_among(store, keys)
        put_back += [job_id for job_id, _ in astray]
        if astray and not dry_run:
            _run(store, "mend", *[part for pair in astray for part in pair])
    for keys, _ in _keys(store, limit=None):
        # After that: a lost worker's list is needed until then.
        found = _orphans_among(store, keys, remove=not dry_run)
        removed += [key.decode(errors="replace").removeprefix(f"{store.root}:") for key in found]
    return Mended(sorted(removed), sorted(put_back))


def _keys(store: Store, limit: float | None = LIMIT) -> Iterator[tuple[list[bytes], bool]]:
    """The keys of the namespace, some at a time, each with whether time was enough so far."""
    deadline = None if limit is None else time.monotonic() + limit
    for page in store.connector.scan(f"{store.root}:*", STEP):
        # One of several servers may have answered with another's.
        keys = [key for key in page if key.startswith(f"{store.root}:".encode())]
        in_time = deadline is None or time.monotonic() < deadline
        if keys:
            yield keys, in_time
        if not in_time:
            return


def _orphans_among(store: Store, keys: list[bytes], *, remove: bool) -> list[bytes]:
    found: list[bytes] = _run(store, "orphans", int(remove), *keys) if keys else []
    return found


def _astray_among(store: Store, keys: list[bytes]) -> list[tuple[str, str]]:
    prefix = f"{store.root}:j:".encode()
    ids = [key.removeprefix(prefix).decode() for key in keys if key.startswith(prefix)]
    found = _run(store, "astray", *ids) if ids else []
    return [(job_id.decode(), wrong.decode()) for job_id, wrong in zip(found[::2], found[1::2], strict=True)]


def _run(store: Store, name: str, *args: Any) -> Any:
    return store.connector.run(script(name), store.root, *args)


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
