"""``mlqueue logs``: what a job has printed and logged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import click

from ..following import follow_log, read_log
from ..job import LogLine
from ..store import Store
from .call import Call, command
from .opening import open_store
from .text import clean_lines, iso


@command()
@click.argument("job_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("-n", "--tail", type=click.IntRange(1, 10**9), metavar="N", help="The last N lines [all that are kept].")
@click.option("-t", "--times", is_flag=True, help="Put the time, the attempt and the stream or level before each line.")
def logs(call: Call, job_id: str, follow: bool, tail: int | None, times: bool) -> None:
    """Show what a job has printed and logged, as far as it is kept (MLQUEUE_JOB_LOGS).

    With --json each line is an object on a line of its own.
    """
    for line in _lines(open_store(call), job_id, tail, follow=follow):
        if call.json:
            call.emit(dataclasses.asdict(line), one_line=True)
        else:
            head = f"{iso(line.at)} {line.attempt} {line.level or line.stream} " if times else ""
            call.write(f"{head}{clean_lines(line.text)}\n")


def _lines(store: Store, job_id: str, tail: int | None, *, follow: bool) -> Iterator[LogLine]:
    first = 0 if tail is None else -tail
    if follow:
        yield from follow_log(store, job_id, first)
    else:
        yield from read_log(store, job_id, first)[0]


__all__ = ["logs"]
