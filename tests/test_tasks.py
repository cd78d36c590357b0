"""The tasks of this repository: what they compute, and that a training survives what happens to its worker."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq.broker
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import mlqueue
from mlqueue import Settings, State, codec
from mlqueue.progress import ProgressWriter
from mlqueue.store import Connector
from mlqueue.testing import eager, isolated, temporary_server
from mlqueue.waiting import close_bell

_global_broker = dramatiq.broker.global_broker
from tasks import demo, mlq, predict_digits, train_digits  # noqa: E402
from tasks.data import SIDE, load_digits, with_shifts  # noqa: E402
from tasks.network import Network  # noqa: E402
from tasks.training import Training, digits_source, model_key  # noqa: E402

dramatiq.broker.global_broker = _global_broker  # the app has taken a place that belongs to other tests

ROOT = Path(__file__).resolve().parent.parent

#: A training that is long enough to be interrupted, and short enough for a test.
QUICK: dict[str, Any] = {"lr": 0.05, "epochs": 12, "hidden": 128, "batch_size": 64}

#: How long worker processes may take for a training, in seconds.
PATIENCE = 60


# What is computed


def test_the_split_keeps_1437_images_for_training_and_360_for_the_test_the_same_each_time() -> None:
    digits, again = load_digits(), load_digits()
    assert (1437, SIDE, SIDE) == digits.train_images.shape
    assert (360, SIDE, SIDE) == digits.test_images.shape
    assert all(np.array_equal(one, other) for one, other in zip(digits, again, strict=True))
    assert (0.0, 1.0) == (digits.train_images.min(), digits.train_images.max())
    assert set(range(10)) == set(digits.test_labels.tolist())


def test_with_shifts_moves_the_image_by_a_pixel_in_each_direction() -> None:
    image = np.zeros((1, SIDE, SIDE), np.float32)
    image[0, 3, 5] = 1
    images, labels = with_shifts(image, np.array([7]))
    assert [7] * 9 == labels.tolist()
    places = {(int(row), int(column)) for _, row, column in np.argwhere(images)}
    assert {(row, column) for row in (2, 3, 4) for column in (4, 5, 6)} == places


def test_a_step_goes_down_the_gradient_of_the_loss() -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.random((20, SIDE, SIDE)), generator.integers(0, 10, 20)
    network = Network.new(5, generator)
    before = [value.copy() for value in network.parameters]
    network.step(images, labels, lr=1.0, momentum=0.0)
    slopes = [old - new for old, new in zip(before, network.parameters, strict=True)]

    def loss(changed: int, index: tuple[int, ...], by: float) -> float:
        other = Network(before)
        other.parameters[changed][index] += by
        chosen = other.probabilities(images)[np.arange(20), labels]
        return -float(np.log(chosen.astype(np.float64)).mean())

    for number, slope in enumerate(slopes):
        index = tuple(int(i) for i in np.unravel_index(int(np.abs(slope).argmax()), slope.shape))
        measured = (loss(number, index, 1e-2) - loss(number, index, -1e-2)) / 2e-2
        assert measured == pytest.approx(float(slope[index]), rel=0.02, abs=1e-4)


def test_a_training_that_is_resumed_ends_with_the_same_network_as_one_that_was_not() -> None:
    digits = load_digits()
    with threadpool_limits(limits=1):
        whole = Training(digits, hidden=16, seed=3)
        parts = Training(digits, hidden=16, seed=3)
        for epoch in range(3):
            whole.run_epoch(0.05, 128, 1)
            parts.run_epoch(0.05, 128, 1)
            checkpoint = codec.decode(codec.encode(parts.state()))
            parts = Training(digits, hidden=16, seed=99 + epoch, checkpoint=checkpoint)
    assert 3 == parts.epoch
    assert whole.history == parts.history
    for one, other in zip(whole.network.parameters, parts.network.parameters, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# As jobs, in this process


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs run in this thread, on a throw-away server."""
    progress = ProgressWriter(mlq.store)  # the app's own keeps its thread as long as the app lives
    monkeypatch.setattr(mlq.broker, "progress", progress)
    with isolated(mlq), eager(mlq):
        yield
    progress.close()


@pytest.mark.usefixtures("here")
def test_the_defaults_reach_an_accuracy_of_95_percent_and_predict_the_test_digits() -> None:
    digits = load_digits()
    job = train_digits.submit(epochs=6)
    result = job.full_result(timeout=1)
    record = job.record
    accuracy = float(str(result.short).removeprefix("accuracy "))
    assert accuracy >= 0.95
    assert ("image/png", b"\x89PNG\r\n\x1a\n") == (result.content_type, result.full[:8])
    assert 100 == record.progress
    assert str(record.progress_note).startswith("epoch 6 of 6: loss 0.")
    metrics = job.metrics()
    assert [1, 2, 3, 4, 5, 6] == [point.step for point in metrics["loss"]]
    assert accuracy == pytest.approx(metrics["accuracy"][-1].value, abs=5e-4)
    answer = predict_digits.submit(digits.test_images, model=job.id).result(timeout=1)
    assert accuracy == pytest.approx(float(np.mean(answer["digits"] == digits.test_labels)), abs=5e-4)
    assert answer["confidence"].min() > 0.1
    newest = predict_digits.submit(digits.test_images[:3]).result(timeout=1)
    assert np.array_equal(answer["digits"][:3], newest["digits"])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"hidden": 0}, {"batch_size": -1}, {"lr": float("nan")}])
def test_wrong_arguments_are_an_error_that_is_not_retried(wrong: dict[str, Any]) -> None:
    job = train_digits.submit(**wrong)
    error = job.exception(timeout=1)
    assert error is not None
    assert "all must be above 0" in str(error)
    assert 1 == job.record.attempt


@pytest.mark.usefixtures("here")
def test_predicting_without_a_model_or_images_says_what_is_missing() -> None:
    image = np.zeros((1, SIDE, SIDE), np.float32)
    assert "submit train_digits first" in str(predict_digits.submit(image).exception(timeout=1))
    assert "no model of job 'nobody'" in str(predict_digits.submit(image, model="nobody").exception(timeout=1))
    assert "it must be (n, 8, 8)" in str(predict_digits.submit(image[0]).exception(timeout=1))


@pytest.mark.usefixtures("here")
def test_the_demo_notices_that_nothing_was_killed() -> None:
    job = train_digits.submit(epochs=1)
    with pytest.raises(demo.Failed, match="before its worker could be killed"):
        demo.follow(job, demo.time.monotonic() + 10)


def test_the_demo_fails_when_there_is_no_store(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "MLQUEUE_URL": "redis://127.0.0.1:1/0",
        "MLQUEUE_COMMAND_TIMEOUT": "0.1",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, "-m", "tasks.demo"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert 1 == run.returncode
    assert "FAILED: " in run.stdout
    assert "all of it happened" not in run.stdout


# As jobs, in worker processes


@dataclasses.dataclass
class Crew:
    """`mlqueue worker tasks` in a folder of its own."""

    folder: Path
    settings: Settings

    @contextlib.contextmanager
    def working(self, processes: int) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "mlqueue", "worker", "tasks", "--processes", str(processes), "--threads", "2"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLQUEUE_")}
        environment |= {"MLQUEUE_URL": str(self.settings.url), "PYTHONPATH": str(ROOT)}
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    folder = Path(tempfile.mkdtemp(prefix="mlq-"))
    with temporary_server() as settings:
        connector = Connector(settings)
        monkeypatch.setattr(mlq.store, "connector", connector)
        try:
            yield Crew(folder, settings)
        finally:
            close_bell(mlq.store)
            connector.close()
            shutil.rmtree(folder, ignore_errors=True)


def wait_for_epoch(job: mlqueue.Job[Any], epoch: int) -> None:
    """Returns when the job has reported this epoch."""
    for event in job.events(timeout=PATIENCE):
        if isinstance(event.progress, int | float) and event.progress * QUICK["epochs"] / 100 >= epoch - 1e-6:
            assert not event.state.ended, "it ended before it could be interrupted"
            return
    raise AssertionError(f"no epoch {epoch} after {PATIENCE} s")


def history_of(job: mlqueue.Job[Any]) -> list[dict[str, Any]]:
    data = mlq.store.get_data(model_key(job.id))
    assert data is not None
    history: list[dict[str, Any]] = codec.decode(data)["history"]
    return history


def test_a_training_whose_process_is_killed_goes_on_from_its_checkpoint_in_another_one(crew: Crew) -> None:
    with crew.working(2):
        job = train_digits.submit(**QUICK)
        wait_for_epoch(job, 4)
        first = next(worker for worker in mlq.store.workers() if job.id in worker.jobs)
        os.kill(first.info["pid"], signal.SIGKILL)
        assert str(job.full_result(timeout=PATIENCE).short).startswith("accuracy 0.9"), crew.log()
        record = job.record
        assert (State.SUCCEEDED, 2, 1) == (record.state, record.attempt, record.crashes)
        assert first.id != record.worker
    history = history_of(job)
    assert list(range(1, QUICK["epochs"] + 1)) == [entry["epoch"] for entry in history]
    attempts = [entry["attempt"] for entry in history]
    assert sorted(attempts) == attempts
    assert {1, 2} == set(attempts)
    assert attempts.count(1) >= 4


def test_a_training_on_batches_of_a_pool_goes_on_within_an_epoch_and_uses_each_batch_once(crew: Crew) -> None:
    arguments = {**QUICK, "epochs": 6, "hidden": 512, "batch_size": 16, "pool": True}
    with crew.working(2):
        job = train_digits.submit(**arguments)
        for event in job.events(timeout=PATIENCE):
            if isinstance(event.progress, int | float) and event.progress > 30:
                break
        trainer = next(worker for worker in mlq.store.workers() if job.id in worker.jobs)
        os.kill(trainer.info["pid"], signal.SIGKILL)
        job.result(timeout=PATIENCE)
        assert (2, 1) == (job.record.attempt, job.record.crashes), crew.log()
    with threadpool_limits(limits=1):
        alone = Training(load_digits(), arguments["hidden"], 1)
        for epoch in range(arguments["epochs"]):
            for images, labels in digits_source().batch_iterator(arguments["batch_size"], shuffle=1, epoch=epoch):
                alone._step(images, labels, arguments["lr"])
            alone._end_epoch(1)
    assert [entry["loss"] for entry in alone.history] == pytest.approx(
        [entry["loss"] for entry in history_of(job)], 1e-4
    )


def test_a_training_whose_worker_is_stopped_goes_back_without_a_strike_and_is_resumed(crew: Crew) -> None:
    job = train_digits.submit(**QUICK)
    with crew.working(1) as process:
        wait_for_epoch(job, 3)
        process.terminate()
        assert 0 == process.wait(PATIENCE), crew.log()
    record = job.record
    assert (State.QUEUED, 0, 0, 0) == (record.state, record.crashes, record.stalls, record.retries)
    assert record.has_checkpoint
    with crew.working(1):
        job.result(timeout=PATIENCE)
    assert (2, 0) == (job.record.attempt, job.record.crashes)
    assert list(range(1, QUICK["epochs"] + 1)) == [entry["epoch"] for entry in history_of(job)]
