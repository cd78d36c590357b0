"""The main job, end to end: `make demo`.

Starts two worker processes, trains on handwritten digits, ends the process that trains with kill -9 half-way, and sees
the job go on from its checkpoint in the other one. Each step is checked; the exit status is 0 only if all of it did.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mlqueue
from mlqueue import codec

from . import mlq, predict_digits, train_digits
from .data import load_digits
from .training import model_key

EPOCHS = 50

#: The share of epochs after which the worker is killed.
KILL_AT = 0.5

#: What the training must reach, and how long the whole may take, in seconds.
ACCURACY = 0.95
LIMIT = 120

OUT = Path("out")


class Failed(Exception):
    """A step of the demo did not happen."""


def main() -> int:
    """Runs the demo; its exit status."""
    begun = time.monotonic()
    try:
        with store(), workers():
            train_and_predict(begun + LIMIT)
    except (Failed, mlqueue.MLQueueError) as error:
        end_line()
        say(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        end_line()
        say("FAILED: interrupted")
        return 130
    say(f"all of it happened, in {time.monotonic() - begun:.0f} s")
    return 0


def train_and_predict(deadline: float) -> None:
    """Every step but the start of the workers."""
    step("submit", f"a training over {EPOCHS} epochs on {len(load_digits().train_images):,} images of digits")
    job = train_digits.submit(epochs=EPOCHS)
    say(f"   job {job.id} in {mlq.store.connector.where}")
    with cancelled_unless_done(job):
        killed_at = follow(job, deadline)
    check_history(job, killed_at)
    record = job.record
    check(record.state is mlqueue.State.SUCCEEDED, f"the job is {record.state}: {record.error}")
    check(
        record.crashes == 1 and record.attempt == 2,
        f"crashes {record.crashes}, attempt {record.attempt}; 1 and 2 expected",
    )
    result = job.full_result(timeout=10)
    step("result", str(result.short))
    check(float(str(result.short).split()[-1]) >= ACCURACY, f"the accuracy is below {ACCURACY}")
    check(bytes(result.full[:8]) == b"\x89PNG\r\n\x1a\n", "the full result is not a PNG")
    path = OUT / f"training-{job.id}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(result.full)
    say(f"   learning curve and confusion matrix: {path} ({len(result.full):,} bytes)")
    say(f"   killed after epoch {killed_at}; {record.attempts[0].error.message if record.attempts[0].error else ''}")
    predict(job.id)


def follow(job: mlqueue.Job[Any], deadline: float) -> int:
    """Shows the job's progress and kills its worker half-way; the last epoch that was reported before."""
    killed: tuple[int, int] | None = None  # pid, epoch
    for event in job.events(timeout=deadline - time.monotonic()):
        epoch = epoch_of(event)
        show(event)
        if killed is None and event.state is mlqueue.State.RUNNING and epoch >= EPOCHS * KILL_AT:
            killed = kill_worker(job), epoch
        elif killed is not None and event.attempt == 2 and epoch:
            check(epoch >= killed[1], f"attempt 2 began at epoch {epoch}, behind the checkpoint of epoch {killed[1]}")
    end_line()
    check(job.done, f"the training did not end within {LIMIT} s")
    check(killed is not None, "the training ended before its worker could be killed")
    assert killed is not None
    check(worker_of(job)["pid"] != killed[0], "the job ended in the process that was killed")
    say(f"   resumed from its checkpoint in process {worker_of(job)['pid']}")
    return killed[1]


def check_history(job: mlqueue.Job[Any], killed_at: int) -> None:
    """Every epoch was trained once: those before the kill by attempt 1, those behind the checkpoint by attempt 2."""
    data = mlq.store.get_data(model_key(job.id))
    check(data is not None, "the training has kept no model")
    history = codec.decode(data or b"")["history"]
    check([entry["epoch"] for entry in history] == list(range(1, EPOCHS + 1)), "epochs were left out or trained twice")
    attempts = [entry["attempt"] for entry in history]
    first = attempts.count(1)
    check(attempts == [1] * first + [2] * (EPOCHS - first), f"the epochs were trained by attempts {attempts}")
    check(killed_at <= first < EPOCHS, f"attempt 1 trained {first} epochs, but had reported {killed_at}")
    say(f"   epochs 1 to {first} by attempt 1, {first + 1} to {EPOCHS} by attempt 2, none twice")


@contextlib.contextmanager
def cancelled_unless_done(job: mlqueue.Job[Any]) -> Iterator[None]:
    """Cancels the job when something goes wrong within the block, so that no later worker finds it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(mlqueue.MLQueueError):
            job.cancel()
        raise


def epoch_of(event: mlqueue.JobEvent) -> int:
    """The number of epochs that an event reports, 0 when it reports none."""
    return round(event.progress * EPOCHS / 100) if isinstance(event.progress, int | float) else 0


def kill_worker(job: mlqueue.Job[Any]) -> int:
    """kill -9 of the process that runs the job; its pid."""
    pid = int(worker_of(job)["pid"])
    end_line()
    step("kill -9", f"process {pid}, which runs the training")
    os.kill(pid, signal.SIGKILL)
    return pid


def worker_of(job: mlqueue.Job[Any]) -> dict[str, Any]:
    """What the worker that holds a job, or held it last, said of itself."""
    name = job.record.worker
    for worker in mlq.store.workers():
        if worker.id == name:
            return worker.info
    raise Failed(f"the worker {name} of the job is unknown")


def predict(model: str) -> None:
    """Has some of the test digits recognized and draws them."""
    digits = load_digits()
    images, labels = digits.test_images[:6], digits.test_labels[:6]
    answer = predict_digits.submit(images, model=model).result(timeout=30)
    found = answer["digits"]
    step("predict", f"{len(labels)} test digits: {' '.join(map(str, found))} (they are {' '.join(map(str, labels))})")
    shades = np.array(list(" .:-=+*#%@"))
    for row in range(images.shape[1]):
        say("   " + "  ".join("".join(shades[(image[row] * 9).round().astype(int)].repeat(2)) for image in images))
    right = int(np.sum(found == labels))
    check(right >= len(labels) - 1, f"only {right} of {len(labels)} digits were recognized")


@contextlib.contextmanager
def store() -> Iterator[None]:
    """The store, whichever it is; an embedded server that was started for the demo ends with it."""
    embedded = mlq.store.connector.embedded
    started = embedded is not None and embedded.status() is None
    try:
        yield
    finally:
        mlq.close()
        if embedded is not None and started:
            status = embedded.status()
            if status is not None and not status.clients:
                embedded.stop()


@contextlib.contextmanager
def workers() -> Iterator[None]:
    """`mlqueue worker tasks` with two processes, as a user would start it, until the end of the block."""
    command = [sys.executable, "-m", "mlqueue", "worker", "tasks", "--processes", "2", "--threads", "2"]
    step("workers", "mlqueue worker tasks --processes 2 --threads 2")
    others = {worker.id for worker in mlq.store.workers()}
    check(not others, f"{len(others)} workers of {mlq!r} are alive already: stop them, they would take the job")
    OUT.mkdir(exist_ok=True)
    with (OUT / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for_workers(process)
            yield
        finally:
            process.terminate()
            try:
                status = process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
    check(status == 0, f"the workers ended with status {status}; see {OUT / 'worker.log'}")


def wait_for_workers(process: subprocess.Popen[bytes]) -> None:
    """Returns when both processes have said hello."""
    deadline = time.monotonic() + 30
    while sum(worker.info.get("supervised", False) for worker in mlq.store.workers()) < 2:
        check(process.poll() is None, f"the workers ended with status {process.poll()}; see {OUT / 'worker.log'}")
        check(time.monotonic() < deadline, f"no two workers after 30 s; see {OUT / 'worker.log'}")
        time.sleep(0.05)


# Talk

_line_open = False


def show(event: mlqueue.JobEvent) -> None:
    """A live bar on a terminal, a line for every tenth epoch elsewhere."""
    global _line_open
    epoch = epoch_of(event)
    text = f"attempt {event.attempt}  {event.state:<9}  {event.note or ''}"
    if sys.stdout.isatty():
        width = 30
        filled = width * epoch // EPOCHS
        columns = shutil.get_terminal_size().columns - 1
        print("\r" + f"   [{'#' * filled}{'.' * (width - filled)}] {text}".ljust(columns)[:columns], end="", flush=True)
        _line_open = True
    elif epoch % 10 == 0 or event.kind == "state":
        say("   " + text)


def end_line() -> None:
    """Leaves the bar as it is."""
    global _line_open
    if _line_open:
        print()
        _line_open = False


def step(name: str, text: str) -> None:
    """Announces a step."""
    say(f"-- {name}: {text}")


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


def check(well: bool, otherwise: str) -> None:
    """Raises `Failed` unless the step happened."""
    if not well:
        raise Failed(otherwise)


if __name__ == "__main__":
    sys.exit(main())
