"""The backend of joblib: the results of other backends, from worker processes; code that is signed, and no other."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from joblib import delayed
from support import eventually
from worker_processes import Site

import mlqueue.joblib
from mlqueue import DeadReason, JobFailed, MissingDependency, Settings, SettingsError, SigningKeyMissing, State
from mlqueue.calls import CALL, QUEUE, sign_call

KEY = "a-secret-of-this-site"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, server: Settings) -> Iterator[Site]:
    """A worker of two processes with one thread each."""
    here = Site(tmp_path_factory.mktemp("joblib"), server, signing_key=KEY, lease=5)
    here.supervise(processes=2, threads=1)
    yield here
    here.close()


@pytest.fixture(autouse=True)
def connections_are_let_go(site: Site) -> Iterator[None]:
    yield
    site.mlq.close()


@pytest.fixture
def parallel(site: Site) -> Iterator[joblib.Parallel]:
    with joblib.parallel_config(backend="mlqueue", mlq=site.mlq, n_jobs=2):
        yield joblib.Parallel()
    assert eventually(lambda: nothing_left(site))


def nothing_left(site: Site) -> bool:
    """Whether the store has no call and no array any more."""
    keys = set(site.mlq.client.scan_iter(f"{site.mlq.store.root}:*", count=1000))
    return not any(b":j:" in key or b":data:" in key or b":r:" in key for key in keys)


def test_results_come_in_order_from_several_processes(parallel: joblib.Parallel) -> None:
    found = parallel(delayed(lambda n: (n * n, os.getpid(), time.sleep(0.02)))(n) for n in range(30))
    assert [square for square, *_ in found] == [n * n for n in range(30)]
    assert len({pid for _, pid, _ in found}) == 2
    assert os.getpid() not in {pid for _, pid, _ in found}


def test_all_threads_of_the_workers_are_counted(site: Site) -> None:
    backend = mlqueue.joblib.MLQueueBackend(site.mlq)
    assert [backend.effective_n_jobs(n) for n in (-1, -2, 5, None)] == [2, 1, 5, 1]
    with pytest.raises(ValueError, match="no meaning"):
        backend.effective_n_jobs(0)


def test_an_error_is_raised_with_its_type_and_where_it_was_raised(parallel: joblib.Parallel) -> None:
    def fails(n: int) -> int:
        return 1 // (n - 3)

    with pytest.raises(ZeroDivisionError) as raised:
        parallel(delayed(fails)(n) for n in range(8))
    assert "in fails" in "".join(raised.value.__notes__)


def test_what_cannot_be_sent_back_is_an_error(parallel: joblib.Parallel) -> None:
    with pytest.raises(mlqueue.InvalidJob, match="cannot be sent back"):
        parallel([delayed(lambda: (n for n in range(3)))()])


def test_a_large_array_is_stored_once_and_arrives_as_it_is(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[int] = []
    put = site.mlq.store.put_data

    def counted(key: str, value: bytes, expiry: float) -> None:
        stored.append(len(value))
        put(key, value, expiry)

    monkeypatch.setattr(site.mlq.store, "put_data", counted)
    rows = np.random.default_rng(0).random((200, 100))
    other = np.asfortranarray(rows)
    with joblib.parallel_config(backend="mlqueue", mlq=site.mlq, n_jobs=2):
        found = joblib.Parallel()(delayed(lambda x, y, n: (x[n], y[n]))(rows, other, n) for n in range(20))
    for n, (row, column) in enumerate(found):
        np.testing.assert_array_equal(row, rows[n])
        np.testing.assert_array_equal(column, rows[n])
    assert stored == [rows.nbytes, rows.nbytes]
    assert eventually(lambda: nothing_left(site))


def test_a_generator_gives_results_as_they_come(site: Site) -> None:
    with joblib.parallel_config(backend="mlqueue", mlq=site.mlq, n_jobs=2):
        found = joblib.Parallel(return_as="generator")(delayed(pow)(n, 2) for n in range(10))
        assert next(found) == 0
        assert list(found) == [n * n for n in range(1, 10)]


def test_a_call_whose_worker_dies_runs_again(parallel: joblib.Parallel, tmp_path: Path) -> None:
    flag = tmp_path / "died"

    def dies_once(n: int) -> int:
        if n == 4 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    assert parallel(delayed(dies_once)(n) for n in range(8)) == list(range(8))


def test_a_call_that_kills_every_worker_is_an_error(site: Site) -> None:
    with joblib.parallel_config(backend="mlqueue", mlq=site.mlq, n_jobs=2), pytest.raises(JobFailed, match="crashed"):
        joblib.Parallel()([delayed(lambda: os.kill(os.getpid(), signal.SIGKILL))()])
    assert [DeadReason.CRASHED] == [letter.dead_reason for letter in site.mlq.dead_letters]
    site.mlq.dead_letters.purge_all()


def test_a_grid_search_finds_what_it_finds_elsewhere(site: Site) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    images, labels = load_digits(return_X_y=True)
    images, labels = images[:600], labels[:600]
    grid = {"C": [0.1, 1, 10], "gamma": [0.0005, 0.002]}

    def search() -> GridSearchCV:
        return GridSearchCV(SVC(), grid, cv=3, n_jobs=2).fit(images, labels)

    with joblib.parallel_config(backend="mlqueue", mlq=site.mlq):
        found = search()
    expected = GridSearchCV(SVC(), grid, cv=3).fit(images, labels)
    assert found.best_params_ == expected.best_params_
    np.testing.assert_allclose(found.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"])


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("forge", ["unsigned", "of another key", "of another job", "altered", "with another array"])
def test_a_call_that_is_not_signed_is_never_unpickled(site: Site, tmp_path: Path, forge: str) -> None:
    path = tmp_path / "canary"
    code, keys, job_id = pickle.dumps(Canary(path)), ["run:" + "0" * 64], mlqueue.joblib.new_id()
    store = site.mlq.store
    signature = sign_call(store, job_id, code, keys)
    if forge == "unsigned":
        signature = b""
    elif forge == "of another key":
        other = mlqueue.MLQ(site.namespace, settings=Settings.load(site.environment, signing_key="another" * 4))
        signature = sign_call(other.store, job_id, code, keys)
        other.close()
    elif forge == "of another job":
        signature = sign_call(store, mlqueue.joblib.new_id(), code, keys)
    elif forge == "altered":
        code = pickle.dumps(Canary(path), protocol=2)
    else:
        keys = ["run:" + "1" * 64]
    job = site.mlq.submit(CALL, code, keys, signature, job_id=job_id, queue_name=QUEUE)
    with pytest.raises(JobFailed) as raised:
        job.result(timeout=15)
    assert raised.value.error_type == "mlqueue.errors.SignatureInvalid"
    assert not path.exists()
    assert job.record.retries == 0
    store.remove([job.id])


def test_an_array_that_was_altered_is_refused(site: Site) -> None:
    store, job_id = site.mlq.store, mlqueue.joblib.new_id()
    store.put_data("run:" + "2" * 64, b"something else")
    code, keys = pickle.dumps(abs), ["run:" + "2" * 64]
    job = site.mlq.submit(CALL, code, keys, sign_call(store, job_id, code, keys), job_id=job_id, queue_name=QUEUE)
    with pytest.raises(JobFailed, match="altered"):
        job.result(timeout=15)
    store.remove([job.id])
    store.drop_data("run:" + "2" * 64)


def test_an_answer_that_no_worker_signed_is_never_unpickled(site: Site, tmp_path: Path) -> None:
    backend = mlqueue.joblib.MLQueueBackend(site.mlq)
    call = mlqueue.joblib._Pending(mlqueue.joblib.new_id(), None)
    call.full = [pickle.dumps((True, Canary(tmp_path / "canary"))), b"\0" * 32]
    with pytest.raises(mlqueue.SignatureInvalid):
        backend.retrieve_result_callback(call)
    assert not (tmp_path / "canary").exists()


def test_without_a_key_nothing_is_sent(server: Settings) -> None:
    app = mlqueue.MLQ("no-key", settings=server)
    with joblib.parallel_config(backend="mlqueue", mlq=app, n_jobs=2), pytest.raises(SigningKeyMissing):
        joblib.Parallel()([delayed(abs)(1), delayed(abs)(2)])
    assert CALL not in app.broker.actors
    app.close()


def test_calls_under_way_are_cancelled_when_one_fails(site: Site) -> None:
    def fails_or_waits(n: int) -> None:
        if n == 0:
            raise ValueError("no")
        for _ in range(3000):
            time.sleep(0.01)

    with (
        joblib.parallel_config(backend="mlqueue", mlq=site.mlq, n_jobs=2),
        pytest.raises(ValueError, match="no"),
    ):
        joblib.Parallel()(delayed(fails_or_waits)(n) for n in range(6))
    eventually(lambda: not site.mlq.jobs(state=[State.RUNNING, State.QUEUED]).jobs)
    site.mlq.store.remove([record.id for record in site.mlq.jobs(state=State.CANCELLED).jobs])


def test_anything_but_an_app_is_refused() -> None:
    with pytest.raises(SettingsError, match="is no MLQ"):
        mlqueue.joblib.MLQueueBackend("vision")  # type: ignore[arg-type]
    assert issubclass(MissingDependency, ImportError)
