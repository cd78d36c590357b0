"""How fast the queue is, against peers measured in the same run on the same server.

    python benchmarks/queue.py [--systems ours,dramatiq_results,...] [--jobs 20000] [--rounds 3] [--json FILE]

No-op jobs, the record and the result kept. One server on loopback TCP without persistence; workers are started by each
system's own command. Medians of rounds that are interleaved, so that a slow minute of the machine hits all systems.
Figures are good for ratios within one run, not for comparison between machines. `make bench` installs the peers.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run as a script, this file's folder comes first: it would hide the standard library's `queue` behind this file.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

import argparse
import contextlib
import importlib
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import redis

ALL = ["ours", "dramatiq_results", "celery_redis", "rq_fork", "huey_redis", "taskiq_redis"]


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A server of its own on a free port; its URL."""
    from mlqueue.embedded import find_binary

    binary, version = find_binary(os.environ.get("MLQUEUE_SERVER_BIN"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        client = redis.Redis(port=port)
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        print(f"server: {Path(binary).name} {version}", file=sys.stderr)
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def workers(system: Any, processes: int, threads: int, *, quiet: bool = True) -> Iterator[None]:
    """Worker processes of a system, in a group of their own that is ended at the end."""
    out = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(
        system.command(processes, threads), cwd=HERE.parent, stdout=out, stderr=out, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "MLQUEUE_LOG_LEVEL": "WARNING"},
    )  # fmt: skip
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def calls(client: Any) -> int:
    """Commands that clients sent, those inside scripts not counted."""
    stats = client.info("commandstats")
    inside = ("cmdstat_info", "cmdstat_ping", "cmdstat_client|", "cmdstat_hello", "cmdstat_config")
    top = ("cmdstat_evalsha", "cmdstat_eval", "cmdstat_blpop", "cmdstat_brpop", "cmdstat_brpoplpush", "cmdstat_multi")
    return sum(value["calls"] for key, value in stats.items() if key in top and not key.startswith(inside))


def drain(system: Any, client: Any, jobs: int, processes: int, threads: int) -> dict[str, float]:
    """Fills the queue, then starts workers; jobs a second between the first tenth and the end."""
    client.flushall()
    begin = time.perf_counter()
    (system.submit_many or system.submit)(jobs)
    filled = time.perf_counter() - begin
    client.config_resetstat()
    with workers(system, processes, threads):
        started, sent = None, 0
        deadline = time.monotonic() + 300
        while True:
            left = system.remaining(client)
            now = time.perf_counter()
            if started is None and left <= jobs * 0.9:
                started, from_left = now, left
                sent = calls(client)
            if left == 0:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{system.name}: {left} of {jobs} jobs left after 300 s")
            time.sleep(0.01)
        assert started is not None
        rate = from_left / (now - started)
        per_job = (calls(client) - sent) / from_left
    return {"drain": rate, "calls_per_job": per_job, "fill": jobs / filled}


def latency(system: Any, n: int, pause: float = 0.0) -> tuple[float, float]:
    """Median and 99th percentile of submit to result, ms."""
    for _ in range(5):
        system.one()
    times = []
    for _ in range(n):
        time.sleep(pause)
        begin = time.perf_counter()
        system.one()
        times.append((time.perf_counter() - begin) * 1000)
    times.sort()
    return statistics.median(times), times[min(len(times) - 1, int(len(times) * 0.99))]


def latencies(system: Any, client: Any, n: int) -> dict[str, float]:
    client.flushall()
    with workers(system, 2, 8):
        p50, p99 = latency(system, n)
        idle, _ = latency(system, 5, pause=2.0)
        figures = {"latency_p50": p50, "latency_p99": p99, "after_idle": idle}
        if system.occupy is not None:
            # More long jobs than processes, so that each has at least one.
            system.occupy(30, 8)
            time.sleep(2)
            try:
                figures["latency_occupied"], _ = latency(system, min(n, 100))
            except Exception as error:  # a peer that parks short jobs behind long ones has no figure
                print(f"{system.name}: no answer while long jobs run: {error}", flush=True)
        return figures


def idle_commands(system: Any, client: Any, seconds: float = 10.0) -> dict[str, float]:
    """Commands a second that an idle set of 2 worker processes sends."""
    client.flushall()
    with workers(system, 2, 8):
        system.one()
        time.sleep(2)
        before = client.info("stats")["total_commands_processed"]
        stats = client.info("commandstats")
        inner = sum(value["calls"] for key, value in stats.items() if key in INNER)
        time.sleep(seconds)
        sent = client.info("stats")["total_commands_processed"] - before - 2
        stats = client.info("commandstats")
        inner = sum(value["calls"] for key, value in stats.items() if key in INNER) - inner
        return {"idle_per_second": (sent - inner) / seconds / 2}


#: Commands that only scripts of ours send: the server counts them as processed too.
INNER = {
    "cmdstat_time", "cmdstat_hmget", "cmdstat_hset", "cmdstat_zadd", "cmdstat_zrange", "cmdstat_zrangebyscore",
    "cmdstat_exists", "cmdstat_scard", "cmdstat_smembers", "cmdstat_sadd", "cmdstat_srem", "cmdstat_srandmember",
    "cmdstat_zcard", "cmdstat_hget", "cmdstat_sismember", "cmdstat_zrem",
}  # fmt: skip


def submitting(system: Any, client: Any, n: int) -> dict[str, float]:
    client.flushall()
    begin = time.perf_counter()
    system.submit(n)
    figures = {"submit": n / (time.perf_counter() - begin)}
    if system.submit_many is not None:
        client.flushall()
        begin = time.perf_counter()
        system.submit_many(n)
        figures["submit_many"] = n / (time.perf_counter() - begin)
    for key, fill in (("bytes_int", system.submit), ("bytes_url", system.submit_url)):
        fill(100)  # connections, scripts and queues are made
        before = used_memory_of_an_empty_server(client)
        fill(n)
        figures[key] = (client.info("memory")["used_memory"] - before) / n
    return figures


def used_memory_of_an_empty_server(client: Any) -> int:
    """Bytes, once the server has given back what it held."""
    client.flushall()
    last, deadline = -1, time.monotonic() + 5
    while (now := client.info("memory")["used_memory"]) != last and time.monotonic() < deadline:
        last = now
        time.sleep(0.2)
    return int(last)


def ping_pong(url: str) -> float:
    """A bare LPUSH/BLPOP between two processes after 2 s of idling, median ms: what no queue can beat."""
    code = (
        f"import redis; r = redis.Redis.from_url({url!r})\n"
        "while True:\n  token = r.blpop('pp:a', 60)\n  r.lpush('pp:b', token[1])\n  if token[1] == b'end': break\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code])
    client = redis.Redis.from_url(url)
    client.lpush("pp:a", "warm")
    client.blpop("pp:b", 60)
    times = []
    for _ in range(5):
        time.sleep(2)
        begin = time.perf_counter()
        client.lpush("pp:a", "x")
        client.blpop("pp:b", 60)
        times.append((time.perf_counter() - begin) * 1000)
    client.lpush("pp:a", "end")
    other.wait(10)
    return statistics.median(times)


def flat(client: Any, sizes: tuple[int, int] = (10_000, 1_000_000)) -> dict[int, dict[str, float]]:
    """Whether costs grow with the number of waiting jobs: operations a second of ours at two lengths of the queue."""
    system = importlib.import_module("benchmarks.systems.ours")
    found: dict[int, dict[str, float]] = {}
    for size in sizes:
        client.flushall()
        for start in range(0, size, 50_000):
            system.submit_many(min(50_000, size - start))
        last = system.noop.submit(0)
        figures = {
            "submit": rate(lambda: system.noop.submit(1), 1000),
            "position": rate(lambda job=last: job.position, 300),
            "page": rate(lambda: system.mlq.jobs(limit=50), 100),
            "fetch_finish": fetch_and_finish(system, 4000),
        }
        waiting = system.remaining(client)
        with workers(system, 2, 8):
            deadline = time.monotonic() + 60
            while (left := system.remaining(client)) > waiting - 1000 and time.monotonic() < deadline:
                time.sleep(0.005)
            begin = time.perf_counter()
            goal = left - min(30_000, size // 2)
            while (now_left := system.remaining(client)) > goal and time.monotonic() < deadline:
                time.sleep(0.005)
            figures["drain"] = (left - now_left) / (time.perf_counter() - begin)
        found[size] = figures
    return found


def rate(act: Any, n: int) -> float:
    begin = time.perf_counter()
    for _ in range(n):
        act()
    return n / (time.perf_counter() - begin)


def fetch_and_finish(system: Any, n: int) -> float:
    """Jobs a second through turns of 8, without a worker's threads."""
    from mlqueue.job import Result
    from mlqueue.store import Settle
    from mlqueue.store.scripts import script
    from mlqueue.store.store import common_of, encode_result

    store = system.mlq.store
    store.start_worker("bench", {}, {})
    lanes = [store.lane("default", "noop")]
    settles: list[Any] = []
    begin = time.perf_counter()
    for number in range(n // 8):
        command = store.turn_command("bench", f"{number}", 8, lanes, settles)
        turn = store.read_turn(store.connector.execute(*command, script=script("turn")))
        settles = [Settle.finish(held.id, held.attempt, encode_result(Result(1, 1)), common_of()) for held in turn.jobs]
    spent = time.perf_counter() - begin
    store.release("bench", "drain", "")
    return n / spent


def show_flat(found: dict[int, dict[str, float]]) -> None:
    small, large = found
    print(f"\n| with so many jobs waiting | {small:,} | {large:,} | ratio |\n|---|---|---|---|")
    for name, value in found[small].items():
        print(f"| {name}, per second | {value:,.0f} | {found[large][name]:,.0f} | {found[large][name] / value:.2f} |")


ROWS = [
    ("drain", "drain 2 x 8, jobs/s", "{:,.0f}", "more"),
    ("drain_t1", "drain 2 x 1, jobs/s", "{:,.0f}", "more"),
    ("calls_per_job", "store calls a job, drain 2 x 8", "{:.2f}", "less"),
    ("submit", "submit, jobs/s", "{:,.0f}", "more"),
    ("submit_many", "submit_many, jobs/s", "{:,.0f}", "more"),
    ("latency_p50", "submit to result p50, ms", "{:.2f}", "less"),
    ("latency_p99", "submit to result p99, ms", "{:.2f}", "less"),
    ("after_idle", "after 2 s of idling p50, ms", "{:.2f}", "less"),
    ("latency_occupied", "while long jobs run p50, ms", "{:.2f}", "less"),
    ("bytes_int", "bytes a waiting job (int)", "{:,.0f}", "less"),
    ("bytes_url", "bytes a waiting job (URL, dict)", "{:,.0f}", "less"),
    ("idle_per_second", "commands/s, idle worker process", "{:.2f}", "less"),
]


def measure(names: list[str], jobs: int, rounds: int, url: str, only: set[str]) -> dict[str, dict[str, float]]:
    client = redis.Redis.from_url(url)
    systems = {name: importlib.import_module(f"benchmarks.systems.{name}") for name in names}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}

    def note(name: str, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            found[name].setdefault(key, []).append(value)

    for turn in range(rounds):
        for name, system in systems.items():
            print(f"round {turn + 1} of {rounds}: {system.name}", file=sys.stderr)
            if "submit" in only:
                note(name, submitting(system, client, jobs // 4))
            if "drain" in only:
                share = getattr(system, "share", 1.0)
                note(name, drain(system, client, int(jobs * share), 2, 8))
                note(name, {"drain_t1": drain(system, client, int(jobs * share / 4), 2, 1)["drain"]})
            if "latency" in only:
                note(name, latencies(system, client, 300))
            if "idle" in only and turn == 0:
                note(name, idle_commands(system, client))
    return {
        name: {key: statistics.median(values) for key, values in figures.items()} for name, figures in found.items()
    }


def show(medians: dict[str, dict[str, float]], titles: dict[str, str]) -> None:
    names = list(medians)
    print("| |", " | ".join(titles[name] for name in names), "| ours / others |")
    print("|---" * (len(names) + 2) + "|")
    for key, title, form, _ in ROWS:
        values = [medians[name].get(key) for name in names]
        cells = [form.format(value) if value is not None else "-" for value in values]
        first = values[0]
        ratios = [f"{first / value:.2f}" if first is not None and value else "-" for value in values[1:]]
        print(f"| {title} |", " | ".join(cells), "|", " ".join(ratios), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", default="ours,dramatiq_results")
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="submit,drain,latency,idle", help="also: flat (fills a million jobs)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = ALL if options.systems == "all" else options.systems.split(",")
    with server() as url:
        os.environ["BENCH_URL"] = url
        medians = measure(names, options.jobs, options.rounds, url, set(options.only.split(",")))
        bare = ping_pong(url) if "latency" in options.only else None
        growth = flat(redis.Redis.from_url(url)) if "flat" in options.only else None
    titles = {name: sys.modules[f"benchmarks.systems.{name}"].name for name in names}
    show(medians, titles)
    if bare is not None:
        print(f"\nbare LPUSH/BLPOP after 2 s of idling: {bare:.2f} ms")
    if growth is not None:
        show_flat(growth)
    if options.json:
        found = {"medians": medians, "titles": titles, "ping_pong": bare, "flat": growth}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
