"""How a job is shown in a notebook: in a real kernel, and by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

from support import StartWorker, eventually
from worker_processes import ROOT

from mlqueue import MLQ, Settings, State, current_job
from mlqueue.notebook import line_of, markup_of
from mlqueue.testing import drain

#: Runs a cell in a kernel and prints what it shows, a line of JSON each, until a job has succeeded; then what comes
#: in half a second more. A program of its own: a client of a kernel leaves threads and sockets behind.
PROGRAM = """
import json, queue, sys
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel(startup_timeout=60)
client.execute(sys.argv[1])
patience = 40
while True:
    try:
        message = client.get_iopub_msg(timeout=patience)
    except queue.Empty:
        break
    if message["msg_type"] in ("display_data", "update_display_data", "error"):
        print(json.dumps([message["msg_type"], message["content"]]), flush=True)
        if "succeeded" in str(message["content"]):
            patience = 0.5
client.stop_channels()
manager.shutdown_kernel(now=True)
"""

#: What the cell of the notebook holds.
CELL = """
import mlqueue
mlq = mlqueue.MLQ({namespace!r}, settings=mlqueue.Settings.load({{}}, {where}))
mlq.job({job!r})
"""


def test_a_job_in_a_notebook_is_a_bar_that_moves_to_its_end(
    mlq: MLQ, server: Settings, start_worker: StartWorker
) -> None:
    @mlq.actor
    def train() -> str:
        job = current_job()
        for percent in range(0, 101, 20):
            job.progress(percent, f"<epoch {percent}>")
            time.sleep(0.2)
        return "accuracy 0.9"

    first, job = train.submit(), train.submit()
    where = f"url={server.url!r}" if server.url else f"home={str(server.home)!r}"
    cell = CELL.format(namespace=mlq.name, where=where, job=job.id)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, cell], stdout=subprocess.PIPE, cwd=ROOT, text=True, start_new_session=True
    )
    try:
        assert program.stdout is not None
        shown = [json.loads(program.stdout.readline())]
        start_worker(threads=1)
        shown += [json.loads(line) for line in program.stdout]
        assert 0 == program.wait(20)
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        if program.stdout is not None:
            program.stdout.close()
    assert first.done
    assert ["display_data", "update_display_data"] == sorted({kind for kind, _ in shown})
    assert ("display_data", 1) == (shown[0][0], len({content["transient"]["display_id"] for _, content in shown}))
    bundles = [content["data"] for _, content in shown]
    assert "queued, 1 ahead of it" in bundles[0]["text/html"]
    assert f"<Job {job.id} queued, 1 ahead of it>" == bundles[0]["text/plain"]
    assert "succeeded, accuracy 0.9" in bundles[-1]["text/html"]
    text = "".join(bundle["text/html"] for bundle in bundles)
    assert "&lt;epoch " in text
    assert "<epoch " not in text
    seen = [float(found) for bundle in bundles for found in re.findall(r"width:([\d.]+)%", bundle["text/html"])]
    assert sorted(seen) == seen
    assert {0.0, 100.0} < set(seen)


def test_without_ipython_a_job_is_html_and_a_line(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def fails() -> None:
        current_job().progress(40, "half <way>")
        raise ValueError("<script>")

    job = fails.submit()
    assert "queued, next" in job._repr_html_()
    bundle = job._repr_mimebundle_()
    assert f"<Job {job.id} queued, next>" == bundle["text/plain"]
    drain(mlq)
    shown = job._repr_html_()
    assert "dead (failed)" in shown
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown
    mlq.store.remove([job.id])
    assert "not there any more" in job._repr_html_()
    assert f"<Job {job.id} not there any more>" == line_of(None, job.id)
    assert markup_of(None, job.id) == job._repr_html_()


def test_a_job_that_waits_says_when_it_will_start(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        pass

    job = work.with_options(delay=3600).submit()
    assert re.search(r"scheduled, starts about \d\d:\d\d:\d\d", job._repr_html_())
    eventually(lambda: job.state is State.SCHEDULED)
