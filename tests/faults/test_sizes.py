"""Arguments and results from nothing to gigabytes (F25): kept whole or refused clearly, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Fleet, wait_for
from servers import OwnServer

from mlqueue import EncodeError, JobFailed, Settings

MIB = 2**20

ACTORS = '''
import hashlib
import mlqueue

mlq = mlqueue.MLQ({namespace!r})


@mlq.actor(max_retries=0)
def digest(data):
    return [len(data), hashlib.blake2b(data).hexdigest()]


@mlq.actor(max_retries=0)
def make(size):
    return None if size is None else bytes(size)


@mlq.actor(max_retries=0)
def peak():
    """The most memory that this process ever had, in MiB."""
    text = open("/proc/self/status").read()
    return int(text.partition("VmHWM:")[2].split()[0]) // 1024


@mlq.actor(max_retries=0)
def quick():
    return 1
'''

#: What submits arguments of a size, all in one program, and prints the most memory that it had.
SUBMIT = """
import hashlib, sys
from jobs import digest
size = int(sys.argv[1])
data = b"\\x01" * size
found = digest.submit(data).result(timeout=200)
assert found == [size, hashlib.blake2b(data).hexdigest()], found
print(int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) // 1024)
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    with contextlib.ExitStack() as stack:
        server = OwnServer(tmp_path / "server", appendonly="no").start()
        stack.callback(server.close)

        def make(**settings: Any) -> Fleet:
            one = Fleet(tmp_path / "fleet", Settings.load({}, url=server.url), actors=ACTORS, **settings)
            stack.callback(one.close, forget=False)
            return one

        yield make


def peak_of(here: Fleet) -> int:
    return int(here.submit("peak").result(timeout=60))


def check_sizes(here: Fleet, sizes: list[int | None], *, factor: float) -> None:
    """Arguments and results of these sizes arrive, in at most `factor` times their size."""
    base = peak_of(here)
    for size in sizes:
        argument = here.program(SUBMIT, str(size or 0))
        printed, errors = argument.communicate(timeout=240)
        assert argument.returncode == 0, errors.decode()
        bound = base + 100 + factor * (size or 0) / MIB
        peaks = {"submitter": int(printed), "worker, argument": peak_of(here)}
        job = here.submit("make", size)
        # One other job goes on meanwhile.
        assert here.submit("quick").result(timeout=60) == 1
        assert job.wait(240)
        opened = here.mlq.store.open_result(job.id)
        read = sum(len(part) for part in opened.parts(0, opened.size))
        peaks["worker, result"] = peak_of(here)
        print(f"\n{size!r}: MiB {peaks}, bound {bound:.0f}")
        assert read == opened.size >= (size or 0)
        assert {name: peak for name, peak in peaks.items() if peak > bound} == {}
        here.mlq.store.clear()


@pytest.mark.faults
def test_arguments_and_results_of_every_size_arrive_whole_in_bounded_memory(fleet: Callable[..., Fleet]) -> None:
    here = fleet(max_message_bytes="256M", max_result_bytes="256M")
    here.worker(processes=1, threads=2)
    check_sizes(here, [None, 0, 1, MIB, 100 * MIB], factor=5)


def available() -> int:
    """How much memory the machine has for us, in bytes."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024


@pytest.mark.faults_long
def test_arguments_and_results_of_two_gigabytes_arrive_whole(fleet: Callable[..., Fleet]) -> None:
    # Submitter and worker at their peaks at once, and the server: 8 GB were measured.
    if available() < 5 * 2048 * MIB:
        pytest.skip(f"{available() / 2**30:.1f} GiB of memory are free; this takes 10")
    here = fleet(max_message_bytes="4G", max_result_bytes="4G", socket_timeout=30)
    here.worker(processes=1, threads=2)
    check_sizes(here, [511 * MIB, 513 * MIB, 2048 * MIB], factor=5)


@pytest.mark.faults
def test_what_is_larger_than_allowed_is_refused_at_once_and_harms_nobody(fleet: Callable[..., Fleet]) -> None:
    here = fleet(max_message_bytes="32M", max_result_bytes="32M")
    here.worker(processes=1, threads=2)
    with pytest.raises(EncodeError, match="max_message_bytes"):
        here.submit("digest", bytes(40 * MIB))
    job = here.submit("make", 40 * MIB)
    with pytest.raises(JobFailed, match="MLQUEUE_MAX_RESULT_BYTES"):
        job.result(timeout=60)
    assert here.submit("quick").result(timeout=60) == 1
    chunks = list(here.mlq.client.scan_iter(f"{here.mlq.store.root}:x:*", count=1000))
    assert chunks == []


@pytest.mark.faults
def test_of_a_submitter_that_is_killed_in_mid_argument_nothing_stays(fleet: Callable[..., Fleet]) -> None:
    here = fleet(max_message_bytes="256M")
    program = here.program(SUBMIT, str(200 * MIB))
    pattern = f"{here.mlq.store.root}:x:*"
    chunks: list[bytes] = []

    def some() -> bool:
        chunks[:] = here.mlq.client.scan_iter(pattern, count=1000)
        return len(chunks) >= 3

    wait_for(some)
    program.kill()
    program.wait()
    left = list(here.mlq.client.scan_iter(pattern, count=1000))
    assert all(0 < here.mlq.client.ttl(key) <= 3600 for key in left)
    assert here.mlq.store.counts() == []
