"""GridSearchCV on the digits over two workers: joblib's own processes (loky) and the backend of mlqueue, in one run.

    python -P benchmarks/grid_search.py [--rounds 5] [--workers 2]

(-P, because of the queue.py that lies beside it.) Both have their processes running and have done one search that does
not count; then they take turns. The store is a server of its own on loopback TCP.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run as a script, this file's folder comes first: it would hide the standard library's `queue` behind a file of ours.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import joblib
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

from benchmarks.queue import server

#: What is searched: an estimator and its grid. Fits of some 100 ms, and of some 20 ms, where what is around them
#: counts.
SEARCHES: dict[str, tuple[Any, dict[str, list[Any]]]] = {
    "SVC": (SVC(), {"C": [0.1, 1, 10], "gamma": [0.0005, 0.001, 0.002]}),
    "forest of 10 trees": (
        RandomForestClassifier(10, random_state=0),
        {"max_depth": [4, 8, 16, None], "min_samples_leaf": [1, 2, 4, 8]},
    ),
}


@contextlib.contextmanager
def workers(number: int) -> Iterator[None]:
    """Worker processes of one thread each, which are ready."""
    command = [sys.executable, "-m", "mlqueue", "worker", "benchmarks.sources.search", "--queues", "joblib"]
    process = subprocess.Popen(
        [*command, "--processes", str(number), "--threads", "1"],
        cwd=HERE.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    os.environ |= {"MLQUEUE_SIGNING_KEY": "a key of this benchmark alone", "OMP_NUM_THREADS": "1"}
    with server() as url, contextlib.ExitStack() as closing:
        os.environ["MLQUEUE_URL"] = url
        # Only now: it reads the settings, and makes the backend known to joblib.
        import mlqueue.joblib  # noqa: F401
        from benchmarks.sources.search import mlq

        closing.enter_context(workers(options.workers))
        ways: dict[str, dict[str, Any]] = {"loky": {"backend": "loky"}, "mlqueue": {"backend": "mlqueue", "mlq": mlq}}
        print("| search, 5 folds | fits | loky, s | mlqueue, s | ratio | same best parameters |")
        print("|---|---|---|---|---|---|")
        for name, (estimator, grid) in SEARCHES.items():

            def search(way: dict[str, Any], estimator: Any = estimator, grid: Any = grid) -> tuple[float, Any]:
                found = GridSearchCV(estimator, grid, cv=5)
                begun = time.perf_counter()
                with joblib.parallel_config(n_jobs=options.workers, **way):
                    found.fit(images, labels)
                return time.perf_counter() - begun, found

            times, best = measure(search, ways, options.rounds)
            medians = {way: statistics.median(values) for way, values in times.items()}
            ratio = statistics.median([b / a for a, b in zip(times["loky"], times["mlqueue"], strict=True)])
            fits = 5 * len(best["loky"].cv_results_["params"])
            same = best["loky"].best_params_ == best["mlqueue"].best_params_
            row = f"{medians['loky']:.2f} | {medians['mlqueue']:.2f} | {ratio:.2f} | {'yes' if same else 'NO'}"
            print(f"| {name} | {fits} | {row} |", flush=True)
        mlq.close()


def measure(
    search: Callable[[dict[str, Any]], tuple[float, Any]], ways: dict[str, dict[str, Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The seconds of each way in each round, after one that does not count, and what it found."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Any] = {}
    for number in range(rounds + 1):
        for way, given in ways.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seconds, found[way] = search(given)
            if number:
                times[way].append(seconds)
    return times, found


if __name__ == "__main__":
    main()
