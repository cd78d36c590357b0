"""The blueprint under real servers: threads, processes, forks and greenlets."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import waitress
from hosting import PREFIX, answers, free_port, gunicorn, mounted
from support import StartWorker, eventually
from waitress import wasyncore

from mlqueue import MLQ, current_job
from mlqueue.embedded import EmbeddedServer


def post_many(client: httpx.Client, count: int, threads: int = 8) -> list[str]:
    """Ids of jobs that were posted by so many threads at a time."""

    def post(number: int) -> str:
        answer = client.post("/jobs", json={"msg": number})
        assert 202 == answer.status_code, answer.text
        return answer.text

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(post, range(count)))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--worker-class", "sync", "--workers", "2"],
        ["--worker-class", "gthread", "--threads", "8"],
        # The app, its connections and its bell are made and used before the fork.
        ["--preload", "--worker-class", "gthread", "--threads", "4", "--workers", "2"],
        ["--worker-class", "gevent"],
    ],
    ids=["sync", "gthread", "preload", "gevent"],
)
def test_it_works_under_gunicorn(mlq: MLQ, tmp_path: Path, start_worker: StartWorker, arguments: list[str]) -> None:
    @mlq.actor(http=True)
    def double(n: int) -> int:
        return 2 * n

    start_worker()
    with gunicorn(mlq, tmp_path, *arguments, USED_BEFORE="1") as client:
        assert 60 == len(set(post_many(client, 60)))
        eventually(lambda: client.get("/actors").json()["actors"])
        answer = client.post("/actors/double", json={"args": [21]}, headers={"Prefer": "wait=10"})
        assert (200, 42) == (answer.status_code, answer.json()["result"])
    assert 60 == mlq.job_count()


def test_it_starts_the_embedded_server_under_gevent_which_has_patched_everything(mlq: MLQ, tmp_path: Path) -> None:
    """gevent's Popen forks in Python and waits for signals, and its close closes later."""
    home = tmp_path / "home"
    unset = {"MLQUEUE_URL": "", "MLQUEUE_HOME": str(home), "MLQUEUE_SERVER_GRACE": "1"}
    try:
        with gunicorn(mlq, tmp_path, "--worker-class", "gevent", **unset) as client:
            assert 60 == len(set(post_many(client, 60)))
            assert "60" == client.get("/jobs/count").text
    finally:
        EmbeddedServer(home).stop()
    assert 0 == mlq.job_count()


def test_it_works_under_waitress(mlq: MLQ) -> None:
    port = free_port()
    app = mounted(mlq, allow_anonymous=True)
    server: Any = waitress.create_server(app, host="127.0.0.1", port=port, threads=4)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}{PREFIX}", timeout=20) as client:
            eventually(lambda: answers(client))
            assert 40 == len(set(post_many(client, 40)))
            big = client.post(
                "/jobs", content=b'{"msg": "' + b"x" * 2**20 + b'"}', headers={"Content-Type": "application/json"}
            )
            assert 413 == big.status_code
        assert 40 == mlq.job_count()
    finally:
        # By its own thread: where another one closes the sockets, its select() fails.
        server.trigger.pull_trigger(lambda: wasyncore.close_all(server._map, ignore_all=True))
        thread.join(10)
        server.task_dispatcher.shutdown()
        assert not thread.is_alive()


def test_those_who_wait_leave_threads_for_others(mlq: MLQ, tmp_path: Path, start_worker: StartWorker) -> None:
    @mlq.actor(http=True)
    def slow() -> None:
        while not current_job().stopping:
            threading.Event().wait(0.01)

    start_worker(threads=1)
    eventually(lambda: mlq.store.published("slow"))
    with gunicorn(mlq, tmp_path, "--threads", "20") as client, ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(client.post, "/actors/slow", json={}, headers={"Prefer": "wait=1"}) for _ in range(16)]
        eventually(lambda: mlq.job_count() == 16)
        assert "ok" == client.get("/healthz").text
        # One more would have to wait, and is answered.
        last = client.post("/actors/slow", json={}, headers={"Prefer": "wait=1"})
        assert (202, None) == (last.status_code, last.headers.get("Preference-Applied"))
        assert [202] * 16 == [one.result().status_code for one in waiting]
