"""What one store carries, and what that costs: the figures of docs/scaling.md.

    python -P benchmarks/scaling.py [--jobs 20000] [--rounds 3] [--core-hour 0.04] [--gb-month 3.0] [--network-gb 0.01]

(-P, because of the queue.py that lies beside it.) One server on loopback TCP without persistence, workers of 2 x 8
threads, jobs that do nothing. What counts is the processor time of the server for each job, and its memory: they hardly
depend on what else the machine does, and say where one server ends, which has one thread for all commands. Prices are
those that are given, in any currency: a core for an hour, a gigabyte of memory for a month, a gigabyte over a network
that is paid for.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run as a script, this file's folder comes first: it would hide the standard library's `queue` behind a file of ours.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

import argparse
import contextlib
import hashlib
import importlib
import os
import resource
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import redis

from benchmarks.queue import server, used_memory_of_an_empty_server, workers
from mlqueue import Settings

#: The bytes of a batch: 64 images of 224 x 224 pixels, 3 channels, 8 bits.
BATCH = 64 * 3 * 224 * 224
#: What scripts send to themselves counts among the commands that the server has processed; these only clients send.
CALLS = ("evalsha", "eval", "blpop", "brpop", "fcall", "ping", "get", "set", "getdel", "hgetall", "hget", "zcard")

Figures = dict[str, float]


class Meter:
    """What a server did between two looks at it."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._begun = time.perf_counter()
        self._before = self._look()

    def _look(self) -> Figures:
        cpu, stats = self._client.info("cpu"), self._client.info("stats")
        commands = self._client.info("commandstats")
        return {
            "server": cpu["used_cpu_user"] + cpu["used_cpu_sys"],
            "in": stats["total_net_input_bytes"],
            "out": stats["total_net_output_bytes"],
            "commands": stats["total_commands_processed"],
            "calls": sum(commands.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in CALLS),
        }

    def read(self) -> Figures:
        """Seconds of processor time, bytes, commands, and seconds, since it was made."""
        seconds, now = time.perf_counter() - self._begun, self._look()
        return {**{name: now[name] - before for name, before in self._before.items()}, "seconds": seconds}


def family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def processor_time(pids: set[int]) -> float:
    """The seconds of processor time that these processes have had."""
    total = 0
    for pid in pids:
        for schedule in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(schedule.read_text().split()[0])
    return total / 1e9


# --- jobs ---


def jobs(client: Any, number: int) -> Figures:
    """One round of `number` jobs, submitted one by one, then run; what each costs the server and the others."""
    system = importlib.import_module("benchmarks.systems.ours")
    before = used_memory_of_an_empty_server(client)
    system.submit(100)  # connections, scripts and queues are made
    meter, own = Meter(client), time.process_time()
    system.submit(number)
    submitted, submitter = meter.read(), time.process_time() - own
    figures = {
        "submits a second": number / submitted["seconds"],
        "submit: server, us": submitted["server"] / number * 1e6,
        "submit: submitter, us": submitter / number * 1e6,
        "submit: bytes": (submitted["in"] + submitted["out"]) / number,
        "submit: calls": submitted["calls"] / number,
        "memory waiting, bytes": (client.info("memory")["used_memory"] - before) / (number + 100),
    }
    with workers(system, 2, 8):
        wait(lambda: system.remaining(client) <= number * 0.9)
        pids = family(os.getpid()) - {os.getpid()} - servers()
        left, meter, spent = system.remaining(client), Meter(client), processor_time(pids)
        wait(lambda: system.remaining(client) == 0)
        run, spent = meter.read(), processor_time(pids) - spent
        figures |= {
            "jobs a second": left / run["seconds"],
            "run: server, us": run["server"] / left * 1e6,
            "run: worker, us": spent / left * 1e6,
            "run: bytes": (run["in"] + run["out"]) / left,
            "run: calls": run["calls"] / left,
            "run: commands in scripts": (run["commands"] - run["calls"]) / left,
            "memory kept, bytes": (client.info("memory")["used_memory"] - before) / (number + 100),
        }
    figures["busy"] = run["server"] / run["seconds"]
    return figures


def servers() -> set[int]:
    """The store's process: what it costs is counted by itself."""
    found = set()
    for pid in family(os.getpid()):
        with contextlib.suppress(OSError):
            if "server" in Path(f"/proc/{pid}/comm").read_text():
                found.add(pid)
    return found


def wait(look: Callable[[], bool], within: float = 300.0) -> None:
    deadline = time.monotonic() + within
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within:g} s")
        time.sleep(0.01)


def full(client: Any, number: int) -> Figures:
    """What the server's one thread does at most: turns of 8 jobs from two clients, that do nothing with them."""
    system = importlib.import_module("benchmarks.systems.ours")
    client.flushall()
    system.submit_many(number)
    meter = Meter(client)
    program = "import sys; sys.path.insert(0, '.'); from benchmarks.scaling import turns; turns(*sys.argv[1:])"
    clients = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", program, f"client-{which}", str(number // 2)],
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
        )
        for which in range(2)
    ]
    seconds = max(float(one.communicate()[0]) for one in clients)
    run = meter.read()
    return {
        "jobs a second from two bare clients": number / seconds,
        "busy with two bare clients": run["server"] / seconds,
    }


def turns(worker: str, jobs: str) -> None:
    """Fetches and ends so many jobs, and prints in how many seconds."""
    from mlqueue.job import Result
    from mlqueue.store import Settle
    from mlqueue.store.scripts import script
    from mlqueue.store.store import common_of, encode_result

    store = importlib.import_module("benchmarks.systems.ours").mlq.store
    store.start_worker(worker, {}, {})
    lanes, settles, done = [store.lane("default", "noop")], [], 0
    begun = time.perf_counter()
    while done < int(jobs):
        command = store.turn_command(worker, f"{done}", 8, lanes, settles)
        turn = store.read_turn(store.connector.execute(*command, script=script("turn")))
        settles = [Settle.finish(held.id, held.attempt, encode_result(Result(1, 1)), common_of()) for held in turn.jobs]
        done += max(1, len(turn.jobs))
    print(time.perf_counter() - begun)


def idle(client: Any) -> Figures:
    """What workers cost that have nothing to do, each process."""
    system = importlib.import_module("benchmarks.systems.ours")
    client.flushall()
    meter = Meter(client)
    time.sleep(10)
    alone = meter.read()  # what the server does for itself
    before = client.info("clients")["connected_clients"]
    with workers(system, 2, 8):
        system.one()
        time.sleep(2)
        connected = client.info("clients")["connected_clients"] - before
        meter = Meter(client)
        time.sleep(10)
        found = meter.read()
    return {
        "connections a worker process": connected / 2,
        "idle: calls a second and process": (found["calls"] - alone["calls"]) / found["seconds"] / 2,
        "idle: server, us a second and process": max(0.0, found["server"] - alone["server"])
        / found["seconds"]
        / 2
        * 1e6,
    }


# --- batches ---


def through_the_store(client: Any, settings: Any, gigabytes: float) -> Figures:
    """Batches as a worker stores and a trainer fetches them, one after the other; without the pool around them."""
    from mlqueue.batch.parts import PART, hands_on, raw, read_parts, write_parts
    from mlqueue.store.connection import Connector

    content, slot = memoryview(os.urandom(BATCH)), memoryview(bytearray(BATCH))
    count = int(gigabytes * 1e9 / BATCH)
    with contextlib.closing(Connector(settings)) as connector:
        out, back = connector.connection(), connector.connection()
        apart = hands_on(out)
        meter, own = Meter(client), time.process_time()
        for _ in range(count):
            write_parts(raw(out), "batch", content, apart=apart)
            read_parts(raw(back), "batch", slot)
        found, moved = meter.read(), count * BATCH
        own = time.process_time() - own
        out.disconnect()
        back.disconnect()
    return {
        "store: GB a second": moved / found["seconds"] / 1e9,
        "store: server, s a GB": found["server"] / moved * 1e9,
        "store: clients, s a GB": own / moved * 1e9,
        "store: calls a GB": 2 * -(-BATCH // PART) * count / moved * 1e9,
    }


def over_tcp(gigabytes: float) -> Figures:
    """A bare connection over loopback, received into memory that is used again."""
    count, content = int(gigabytes * 1e9 / BATCH), memoryview(os.urandom(BATCH))
    slot = memoryview(bytearray(BATCH))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as out:
        into = listener.accept()[0]

        def send() -> None:
            for _ in range(count):
                out.sendall(content)

        sender = threading.Thread(target=send)
        begun, own = time.perf_counter(), time.process_time()
        sender.start()
        for _ in range(count):
            got = 0
            while got < BATCH:
                got += into.recv_into(slot[got:])
        sender.join()
        into.close()
    moved = count * BATCH
    return {
        "tcp: GB a second": moved / (time.perf_counter() - begun) / 1e9,
        "tcp: both ends, s a GB": (time.process_time() - own) / moved * 1e9,
    }


def in_shared_memory(client: Any, gigabytes: float) -> Figures:
    """Batches that two workers gather from arrays in memory, in the order of a shuffle, for a trainer on their host."""
    from benchmarks.sources.scaling_sources import images, mlq
    from mlqueue.batch.actor_pool import ActorPool

    command = [sys.executable, "-m", "mlqueue", "worker", "benchmarks.sources.scaling_sources"]
    process = subprocess.Popen(
        [*command, "--queues", "batches", "--processes", "2", "--threads", "1"],
        cwd=HERE.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "MLQUEUE_LOG_LEVEL": "WARNING"},
    )
    try:
        with ActorPool(mlq, workers=2, alone_after=None) as pool:
            ds = pool.parallel_data_source(images(n=1024), 8, copy=False)
            for _ in ds.batch_iterator(64, shuffle=1):
                pass  # the sources are made, the slots have their pages
            moved, epoch, meter = 0, 0, Meter(client)
            while moved < gigabytes * 1e9:
                epoch += 1
                for (batch,) in ds.batch_iterator(64, shuffle=1, epoch=epoch):
                    moved += batch.nbytes
            found = meter.read()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        mlq.close()
    return {
        "shared memory: GB a second": moved / found["seconds"] / 1e9,
        "shared memory: store calls a GB": found["calls"] / moved * 1e9,
        "shared memory: server, s a GB": found["server"] / moved * 1e9,
    }


# --- names over stores ---


def store_of(name: str, stores: list[str]) -> str:
    """The store of a name: that of the highest hash of both (rendezvous hashing)."""
    return max(stores, key=lambda url: hashlib.blake2b(f"{url} {name}".encode()).digest())


def spread(names: int, stores: int) -> Figures:
    """How evenly names lie on stores, and how many move when one store is added."""
    urls = [f"redis://store-{number}:6379/0" for number in range(stores)]
    found = [store_of(f"team-{number}", urls) for number in range(names)]
    moved = sum(store_of(f"team-{n}", [*urls, "redis://store-new:6379/0"]) != url for n, url in enumerate(found))
    counts = [found.count(url) for url in urls]
    return {"fewest names on a store": min(counts), "most names on a store": max(counts), "names that move": moved}


# --- what it costs ---


def costs(found: Figures, core_hour: float, gb_month: float, network_gb: float) -> list[tuple[str, str]]:
    """Rows of what a million jobs and a terabyte of batches cost, at these prices."""

    def core(us_a_job: float) -> str:
        return f"{us_a_job:,.0f} core-s, {us_a_job / 3600 * core_hour:.4f}"

    jobs_bytes = found["submit: bytes"] + found["run: bytes"]
    kept = found["memory kept, bytes"]
    server_us = found["submit: server, us"] + found["run: server, us"]
    tcp = found["tcp: both ends, s a GB"] * 1e3
    store = (found["store: server, s a GB"] + found["store: clients, s a GB"]) * 1e3
    over_tcp = tcp / 3600 * core_hour + 1e3 * network_gb
    over_store = store / 3600 * core_hour + 2e3 * network_gb
    return [
        ("a million jobs: store's thread", core(server_us)),
        ("a million jobs: submitting one by one", core(found["submit: submitter, us"])),
        ("a million jobs: workers, beside the work itself", core(found["run: worker, us"])),
        ("a million jobs: over the network", f"{jobs_bytes / 1e3:.2f} GB, {jobs_bytes / 1e3 * network_gb:.4f}"),
        ("a million jobs: record and result for 30 days", f"{kept / 1e3:.2f} GB, {kept / 1e3 * gb_month:.2f}"),
        ("a terabyte of batches: shared memory", "0"),
        ("a terabyte of batches: TCP", f"{tcp:,.0f} core-s and the network, {over_tcp:.2f}"),
        ("a terabyte of batches: through the store", f"{store:,.0f} core-s and twice the network, {over_store:.2f}"),
        ("jobs a second that one server's thread has time for", f"{1e6 / server_us:,.0f}"),
        ("jobs that 4 GB of memory keep", f"{4e9 / kept:,.0f}, or {4e9 / kept / 86400 / 30:.1f} a second for 30 days"),
    ]


def rounds(measure: Callable[[], Figures], number: int) -> Figures:
    """The medians."""
    found = [measure() for _ in range(number)]
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of batches, each way")
    parser.add_argument("--core-hour", type=float, default=0.04)
    parser.add_argument("--gb-month", type=float, default=3.0)
    parser.add_argument("--network-gb", type=float, default=0.01)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"Python {sys.version.split()[0]}, numpy {np.__version__}, {machine}")
    with server() as url:
        os.environ["BENCH_URL"] = os.environ["MLQUEUE_URL"] = url
        client = redis.Redis.from_url(url)
        found = rounds(lambda: jobs(client, options.jobs), options.rounds)
        found |= rounds(lambda: full(client, options.jobs), options.rounds)
        found |= idle(client)
        found |= rounds(
            lambda: through_the_store(client, Settings.load({}, url=url), options.gigabytes), options.rounds
        )
        found |= rounds(lambda: over_tcp(options.gigabytes), options.rounds)
        found |= rounds(lambda: in_shared_memory(client, options.gigabytes), 1)
    found |= spread(1000, 4)
    print("\n| measured | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,.0f} |" if value >= 100 else f"| {name} | {value:.3g} |")
    prices = f"{options.core_hour} a core-hour, {options.gb_month} a GB-month, {options.network_gb} a GB of network"
    print(f"\n| at {prices} | |\n|---|---|")
    for name, text in costs(found, options.core_hour, options.gb_month, options.network_gb):
        print(f"| {name} | {text} |")


if __name__ == "__main__":
    main()
