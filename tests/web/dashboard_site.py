"""A dashboard to look at: a store with jobs of all kinds, a supervisor with real workers, a web server. For the browser
tests, and for `python tests/web/dashboard_site.py FOLDER`, which makes screenshots of every page."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path += [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import flask
import msgpack
from support import eventually
from werkzeug.serving import WSGIRequestHandler, make_server
from worker_processes import Site

from mlqueue import MLQ, Settings, State
from mlqueue.testing import temporary_server
from mlqueue.web import create_dashboard

#: What the workers run.
MODULE = '''
import logging, os, signal, struct, time, zlib
import numpy as np
import mlqueue

mlq = mlqueue.MLQ({namespace!r})


def png(size=160):
    """A picture of a wave."""
    y, x = np.mgrid[0:size, 0:size]
    rgb = np.stack([127 + 120 * np.sin(x / 19), 127 + 120 * np.sin(y / 23 + 2), 90 + 80 * np.cos((x + y) / 31)], -1)
    lines = b"".join(b"\\0" + row.tobytes() for row in rgb.astype(np.uint8))
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\\x89PNG\\r\\n\\x1a\\n" + b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)


@mlq.actor(http=True, max_retries=0, queue_name="training")
def train(learning_rate: float = 0.01, epochs: int = 20, seconds: float = 20.0) -> str:
    """Trains a small network.

    Progress is told after each epoch."""
    job = mlqueue.current_job()
    rng = np.random.default_rng(3)
    state = job.load_checkpoint() or {{"epoch": 0, "best": None}}
    print(f"training on 50,000 images, learning rate {{learning_rate}}")
    for epoch in range(state["epoch"], epochs):
        time.sleep(seconds / epochs)
        loss = 2.3 * 0.93 ** epoch * (1 + 0.08 * rng.normal())
        accuracy = 1 - 0.9 * 0.94 ** epoch
        job.log_metrics(epoch + 1, loss=loss, accuracy=accuracy, learning_rate=learning_rate * 0.97 ** epoch)
        job.save_checkpoint({{"epoch": epoch + 1, "best": round(accuracy, 4)}})
        job.progress(100 * (epoch + 1) / epochs, f"epoch {{epoch + 1}} of {{epochs}}, loss {{loss:.3f}}")
        print(f"epoch {{epoch + 1}}: loss {{loss:.4f}}, accuracy {{accuracy:.4f}}")
        if epoch % 9 == 7:
            logging.getLogger("train").warning("loss has not fallen for 3 steps, halving the step")
        if job.cancelled:
            break
    return f"accuracy {{1 - 0.4 * 0.9 ** epochs:.3f}}"


@mlq.actor(http=True, max_retries=0)
def embed(text: str, dimensions: int = 64) -> object:
    """Embeds a text."""
    if not text.strip():
        raise ValueError("text is empty: nothing to embed")
    rng = np.random.default_rng(len(text))
    return np.cumsum(rng.normal(size=dimensions)).astype(np.float32)


@mlq.actor(http=True, max_retries=0)
def render(size: int = 160) -> object:
    return mlqueue.Result(short=f"{{size}} px", full=png(size), content_type="image/png")


@mlq.actor(max_retries=1, min_backoff=20, max_backoff=20)
def fetch(url: str, timeout: float = 3.0) -> str:
    raise ConnectionError(f"no route to {{url}} within {{timeout}} s")


@mlq.actor(max_retries=0)
def summarise(config: dict, image: object) -> dict:
    scores = np.array([0.83, 0.12, 0.05])
    return {{"classes": ["cat", "dog", "bird"], "scores": scores, "shape": list(image.shape), "config": config}}


@mlq.actor(max_retries=0)
def leaky(gigabytes: float = 2.0) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@mlq.actor(max_retries=0, http=True)
def echo(value: str = "") -> str:
    """Echoes it."""
    return value


@mlq.actor(max_retries=0)
def sweep(values: list) -> list:
    """Submits a job for each value."""
    return [echo.submit(str(value)).id for value in values]


@mlq.actor(max_retries=0, http=True, queue_name="gpus", resources={{"gpu": 1}})
def fine_tune(model: str = "vit-b16", seconds: float = 30.0) -> str:
    """Fine-tunes a model, on a GPU."""
    job, begun = mlqueue.current_job(), time.monotonic()
    while (gone := time.monotonic() - begun) < seconds and not job.cancelled:
        job.progress(100 * gone / seconds, "on gpu " + ", ".join(map(str, job.slots["gpu"])))
        time.sleep(0.2)
    return model


@mlq.actor(max_retries=0, http=True, queue_name="side")
def steps(seconds: float = 5.0) -> str:
    """Tells its progress often."""
    job, begun = mlqueue.current_job(), time.monotonic()
    while (gone := time.monotonic() - begun) < seconds and not job.cancelled:
        job.progress(100 * gone / seconds, f"step {{gone * 10:.0f}}")
        time.sleep(0.05)
    return "all steps"


@mlq.actor(max_retries=0, queue_name="side")
def aside() -> None:
    pass


@mlq.actor(max_retries=0)
def fails(number: int) -> None:
    raise RuntimeError(f"number {{number}} is none")


@mlq.actor(max_retries=0)
def carries(text: str, fail: bool = True, more: object = None) -> object:
    job = mlqueue.current_job()
    job.progress(text, text[:200])
    job.log_metrics(1, **{{text[:100]: 1.0}})
    print(text)
    logging.getLogger(text).error(text)
    if fail:
        raise ValueError(text)
    return more
'''

#: What posted functions are signed with.
KEY = "the-signing-key-of-these-pages"

#: Where the dashboard stands.
PREFIX = "/dashboard"


class Look(NamedTuple):
    """A dashboard to look at."""

    url: str
    mlq: MLQ
    site: Site
    #: Ends every stream of events, as a network that breaks.
    cut: Callable[[], None]


class Quiet(WSGIRequestHandler):
    """Keeps connections, and says nothing."""

    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        """As Werkzeug's."""


@contextlib.contextmanager
def serving(mlq: MLQ, **options: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """A web server with the dashboard: its address, and what ends its streams."""
    app = flask.Flask("host")
    who = {} if "auth" in options else {"allow_anonymous": True}
    app.register_blueprint(create_dashboard(mlq, **who, **options), url_prefix=PREFIX)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    [mount] = app.extensions["mlqueue"].values()

    def cut() -> None:
        for stream in list(mount.streams._open):
            stream.shut()

    try:
        yield f"http://127.0.0.1:{server.port}{PREFIX}", cut
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()


@contextlib.contextmanager
def looking(settings: Settings, namespace: str = "", **worker: Any) -> Iterator[Look]:
    """All of it, with workers that serve every queue."""
    with tempfile.TemporaryDirectory(prefix="mlq-look-") as folder:
        named = {"namespace": namespace} if namespace else {}
        site = Site(Path(folder), settings, lease=2.0, sweep_interval=0.3, drain=2.0, signing_key=KEY, **named)
        (Path(folder) / "jobs.py").write_text(MODULE.format(namespace=site.namespace))
        try:
            supervised = site.supervise(**{"processes": 2, "threads": 6, **worker})
            eventually(lambda: len(site.mlq.store.workers()) == worker.get("processes", 2))
            with serving(site.mlq) as (url, cut):
                yield Look(url, site.mlq, site, cut)
            supervised.stop()
        finally:
            site.close()


def fill(mlq: MLQ) -> dict[str, str]:
    """Jobs of all kinds; the ids of some, by what they are."""
    import numpy as np

    ids: dict[str, str] = {}

    def submit(actor: str, *args: Any, **kwargs: Any) -> str:
        return mlq.submit(actor, *args, **kwargs).id

    for number in range(30):
        submit("embed", f"sentence {number}", tags=["batch-7"])
    ids["array"] = submit("embed", "the quick brown fox", 240)
    ids["image"] = submit("render", 160, tags=["poster"])
    image = np.add.outer(np.sin(np.arange(64) / 7), np.cos(np.arange(64) / 5)).astype(np.float32)
    config = {"model": "resnet18", "augment": {"flip": True, "crop": [224, 224]}, "seed": 7, "notes": None}
    ids["json"] = submit("summarise", config=config, image=image, tags=["nightly", "resnet"])
    for host in ("db.internal", "db.internal", "cache.internal", "db.internal"):
        ids["fetch"] = submit("fetch", f"http://{host}:{random.randint(2000, 9000)}/rows", timeout=3.0)
    for _ in range(5):
        ids["empty"] = submit("embed", "  ")
    ids["crash"] = submit("leaky", 2.0, max_crashes=1)
    eventually(lambda: mlq.store.record(ids["crash"]).state is State.DEAD, 30)
    eventually(lambda: mlq.store.record(ids["fetch"]).state is State.DEAD, 30)
    ids["sweep"] = submit("sweep", [0.1, 0.03, 0.01], tags=["nightly"])
    mlq.limits.set("gpu", 1)
    mlq.limits.set("licence", 4)
    ids["holder"] = submit("fine_tune", "vit-b16", 600.0)
    eventually(lambda: mlq.store.record(ids["holder"]).state is State.RUNNING, 30)
    ids["parked"] = submit("fine_tune", "vit-l14", 600.0)
    submit("fine_tune", "convnext", 600.0)
    eventually(lambda: mlq.store.parked().get("gpu"), 30)
    mlq.register_function(lambda msg, utils: msg, "caption")
    # Of a module that the workers do not have.
    mlq.register_function(eventually, "segment")
    eventually(lambda: any(one.error for one in mlq.functions()), 30)
    ids["callback"] = submit("echo", "done", callback="http://127.0.0.1:9/done")
    for actor in ("embed", "echo"):
        ids["scheduled"] = submit(actor, "later", delay=3600)
    ids["running"] = submit("train", 0.01, 60, 60.0, tags=["resnet"])
    submit("train", 0.003, 60, 90.0)
    submit("train", 0.03, 60, 75.0)
    for number in range(12):
        submit("train", 0.1 / (number + 1), 40, 60.0)
    ids["queued"] = submit("train", 1.0, 40, 60.0)
    ids["deserted"] = submit("transcribe", "talk.wav", queue_name="audio")
    gone = submit("echo", "never", delay=7200)
    mlq.store.cancel(gone)
    ids["cancelled"] = gone
    eventually(lambda: mlq.store.record(ids["running"]).progress is not None, 30)
    eventually(lambda: mlq.store.record(ids["json"]).state is State.SUCCEEDED, 30)
    return ids


def remember_an_hour(mlq: MLQ) -> None:
    """What the charts show of the time before these jobs."""
    now = time.time()
    done, dead, retries, crashes = 20_000, 30, 40, 2
    rng = random.Random(7)
    entries = []
    for step in range(236):
        at = now - 3540 + step * 15
        busy = 1 + 0.6 * math.sin(step / 19) + (1.1 if 120 < step < 150 else 0)
        done += int(rng.gauss(11 * busy, 2))
        if 128 < step < 142 or rng.random() < 0.02:
            dead, retries = dead + rng.randint(0, 2), retries + rng.randint(1, 5)
        queued = int(max(0, rng.gauss(14 * busy, 4)) + (90 if 124 < step < 138 else 0))
        running = min(4, int(2.4 * busy + rng.random() * 1.6))
        numbers = (queued, 2, running, done, dead, 3, retries, crashes, 0, 0, 0, 0, 0)
        entries.append(msgpack.packb([int(at * 1000), *numbers]))
    key = f"{mlq.store.root}:course"
    mlq.client.delete(key)
    mlq.client.lpush(key, *entries)


#: The pages, by the name of their picture.
PAGES = {
    "overview": "/",
    "jobs": "/jobs",
    "job-running": "/jobs/{running}",
    "job-image": "/jobs/{image}",
    "job-array": "/jobs/{array}",
    "job-json": "/jobs/{json}",
    "job-dead": "/jobs/{fetch}",
    "job-queued": "/jobs/{deserted}",
    "job-waits": "/jobs/{parked}",
    "dead": "/dead",
    "dead-letters": "/dead/letters?actor=embed",
    "dead-letter": "/dead/{empty}",
    "workers": "/workers",
    "queues": "/queues",
    "limits": "/limits",
    "functions": "/functions",
    "callbacks": "/callbacks",
    "submit": "/actors",
    "submit-train": "/actors/train",
    "changes": "/acts",
}


#: Takes the folders of this machine out of tracebacks.
HOMELESS = r"""document.querySelectorAll("pre:not(.log)").forEach(pre => {
  pre.textContent = pre.textContent.replace(/"\/[^"]*\/([^"\/]+\/[^"\/]+)"/g, '"$1"').replace(/mlq-look-\w+\//g, "");
})"""


def main(folder: Path, widths: tuple[int, ...], names: list[str]) -> None:
    """Makes the pictures."""
    import shutil

    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with temporary_server() as settings, looking(settings, "vision", threads=2) as look, sync_playwright() as driver:
        ids = fill(look.mlq)
        remember_an_hour(look.mlq)
        look.mlq.store.pause("evaluation", "ann (10.0.0.7)")
        for who, act, what in (
            ("ann (10.0.0.7)", "pause", "evaluation"),
            ("key 5f31c0 (10.0.0.9)", "cancel", ids["cancelled"]),
        ):
            look.mlq.store.note_act(who, act, what)
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width in widths:
                context = browser.new_context(
                    viewport={"width": width, "height": 844 if width < 700 else 900}, color_scheme=scheme
                )
                page = context.new_page()
                for name, path in PAGES.items():
                    if names and name not in names:
                        continue
                    page.goto(look.url + path.format(**ids))
                    page.wait_for_load_state("load")
                    page.evaluate(HOMELESS)
                    end = "" if widths == (1280,) else f"-{width}"
                    page.screenshot(path=str(folder / f"{name}-{scheme}{end}.png"), full_page=name != "jobs")
                context.close()
        browser.close()


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        tuple(int(width) for width in sys.argv[2].split(",")) if len(sys.argv) > 2 else (1280,),
        sys.argv[3].split(",") if len(sys.argv) > 3 else [],
    )
