"""``mlqueue result``: bytes as they are, text as text, arrays as .npy, anything else as JSON."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click

from ..errors import MLQueueError, ResultTimeout
from ..files import replacing
from ..handle import Job
from ..job import Result, State
from ..store import Store
from . import types
from .call import Call, command
from .opening import open_store
from .text import on_terminal
from .values import is_array


class BinaryForTerminal(MLQueueError):
    """A result is binary and stdout is a terminal."""

    exit_code = 2


class CannotWrite(MLQueueError):
    """The file for a result cannot be written."""

    exit_code = 2


@command()
@click.argument("job_id", metavar="ID")
@click.option("-o", "--output", metavar="FILE", help="Write it to a file (- is stdout). An array is written as .npy.")
@click.option(
    "--timeout",
    type=types.duration,
    metavar="DURATION",
    help="How long to wait for the job's end; 0 does not wait [for ever].",
)
@click.option("--short", is_flag=True, help="The short result; the full one is not loaded.")
def result(call: Call, job_id: str, output: str | None, timeout: float | None, short: bool) -> int | None:
    """Wait for a job and print its result.

    Bytes are printed as they are (not on a terminal: use -o), text as text, anything else as JSON.
    """
    store = open_store(call)
    state = store.record(job_id, full=False).state
    if not state.ended and timeout != 0:
        call.talk(f"job {job_id} is {state}; waiting for its end. Ctrl-C ends the waiting, not the job.")
    print_result(call, store, job_id, output=output, timeout=timeout, short=short)
    return None


def print_result(
    call: Call,
    store: Store,
    job_id: str,
    *,
    output: str | None = None,
    timeout: float | None = None,
    short: bool = False,
) -> None:
    """Waits for a job and writes its result to stdout or to `output`."""
    job: Job[Any] = Job(store, job_id)
    found = Result(short=_short_result(job, timeout)) if short else job.full_result(timeout)
    value = found.short if short else found.full
    if output not in (None, "-"):
        data = as_file(call, value)
        _write_file(Path(str(output)), data)
        call.talk(f"wrote {len(data):,} bytes{f' ({found.content_type})' if found.content_type else ''} to {output}")
    elif call.json:
        call.emit({"id": job_id, "short": found.short} | ({} if short else _full(found)))
    elif isinstance(value, bytes):
        if output is None and on_terminal():
            kind = f" of {found.content_type}" if found.content_type else ""
            raise BinaryForTerminal(
                f"the result of job {job_id} is {len(value):,} bytes{kind}, which a terminal would not survive. Write "
                f"it to a file: mlqueue result {job_id} -o FILE (-o - does it anyway)."
            )
        call.write(value)
    elif isinstance(value, str):
        call.write(value if output == "-" or value.endswith("\n") else value + "\n")
    elif is_array(value) and output == "-":
        call.write(as_file(call, value))
    else:
        call.emit(value)


def _full(found: Result) -> dict[str, Any]:
    return {"full": found.full, "content_type": found.content_type}


def _short_result(job: Job[Any], timeout: float | None) -> Any:
    if not job.wait(timeout):
        raise ResultTimeout(f"job {job.id} is {job.state} after {timeout:g} s; it goes on. Wait again, or longer.")
    record = job.record
    if record.state is not State.SUCCEEDED:
        failure = job.exception(0)
        if failure is not None:
            raise failure
    return record.short_result


def as_file(call: Call, value: Any) -> bytes:
    """What a file with this value has in it."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if is_array(value):
        import numpy as np  # loaded already by who decoded an array; no other command waits for it

        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return buffer.getvalue()
    return call.dumps(value).encode()


def _write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; a device or a pipe as it is."""
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise CannotWrite(
            f"{path} cannot be written ({error.strerror or error}); the result is kept: try another FILE."
        ) from None


__all__ = ["BinaryForTerminal", "print_result", "result"]
