"""The dashboard, page by page, without a browser: what it shows, who may see and change what, what is noted."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import flask
import numpy as np
import pytest
from flask.testing import FlaskClient
from support import StartWorker, eventually
from werkzeug.test import EnvironBuilder

from mlqueue import MLQ, Result, Settings, State, current_job, web
from mlqueue.errors import SettingsError
from mlqueue.keys import ApiKeys
from mlqueue.web.dashboard import blueprint as dashboard
from mlqueue.web.dashboard import dead as dead_page
from mlqueue.web.dashboard import job as job_page
from mlqueue.web.dashboard import jobs as jobs_page
from mlqueue.web.dashboard import mount, render
from mlqueue.web.dashboard.visit import POLICY

PREFIX = "/ui"


def hosting(mlq: MLQ, auth: Any = None, **options: Any) -> flask.Flask:
    app = flask.Flask("host")
    app.testing = True
    app.register_blueprint(web.create_dashboard(mlq, auth, **options), url_prefix=PREFIX)
    return app


class Visitor:
    """Somebody with a browser that has no scripts."""

    def __init__(self, app: flask.Flask) -> None:
        self.client: FlaskClient = app.test_client()

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(PREFIX + path, **options)

    def page(self, path: str) -> str:
        answer = self.get(path)
        assert 200 == answer.status_code, answer.text
        return answer.text

    def post(self, path: str, **fields: Any) -> Any:
        """Sends a form with the token that the pages have."""
        if self.client.get_cookie("mlqueue_form", path=f"{PREFIX}/") is None:
            self.get("/")
        cookie = self.client.get_cookie("mlqueue_form", path=f"{PREFIX}/")
        assert cookie is not None
        return self.client.post(PREFIX + path, data={"token": cookie.value, **fields}, follow_redirects=True)

    def sign_in(self, key: str) -> Any:
        self.get("/sign-in")
        return self.post("/sign-in", key=key)


@pytest.fixture
def visitor(mlq: MLQ) -> Visitor:
    return Visitor(hosting(mlq, allow_anonymous=True))


def dies(mlq: MLQ, start_worker: StartWorker, *texts: str) -> list[str]:
    """Dead letters of an actor."""

    @mlq.actor(max_retries=0)
    def read(path: str, **more: Any) -> str:
        if path == "good":
            return "read"
        raise FileNotFoundError(f"no file {path}")

    jobs = [read.submit(text) for text in texts]
    start_worker()
    eventually(lambda: all(mlq.store.record(job.id).state is State.DEAD for job in jobs))
    return [job.id for job in jobs]


# Pages


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/jobs", "/dead", "/dead/letters", "/workers", "/queues", "/limits", "/functions", "/callbacks"),
        *("/actors", "/acts"),
    ],
)
def test_each_page_is_there_when_there_is_nothing(visitor: Visitor, path: str) -> None:
    answer = visitor.get(path)
    assert (200, "text/html; charset=utf-8") == (answer.status_code, answer.content_type)
    assert POLICY == answer.headers["Content-Security-Policy"]
    assert "unsafe" not in POLICY
    assert "nosniff" == answer.headers["X-Content-Type-Options"]
    assert "<h1>" in answer.text
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", answer.text)


def test_what_pages_load_is_theirs_and_kept(visitor: Visitor) -> None:
    html = visitor.page("/")
    paths = re.findall(r'(?:src|href)="([^"]*/static/[^"]*)"', html)
    assert len(paths) == 3
    for path in paths:
        assert path.startswith(PREFIX)
        with visitor.client.get(path) as answer:
            assert answer.status_code == 200
            assert "max-age=31536000" in answer.headers["Cache-Control"]
    assert 404 == visitor.get("/static/x/..%2fvisit.py").status_code


def test_the_overview_says_first_what_is_wrong(mlq: MLQ, visitor: Visitor) -> None:
    mlq.submit("transcribe", "x", queue_name="audio")
    mlq.store.pause("video")
    html = visitor.page("/")
    assert "No worker serves the queue audio: 1 job waits." in html
    assert "The queue video is paused." in html
    assert html.index("No worker serves") < html.index("The last hour")
    mlq.store.flush("audio")
    mlq.store.resume("video")
    eventually(lambda: "Nothing is wrong." in visitor.page("/"))


def test_jobs_are_filtered_paged_and_found(mlq: MLQ, visitor: Visitor) -> None:
    ids = [mlq.submit("first", n, tags=["even" if n % 2 == 0 else "odd"]).id for n in range(60)]
    other = mlq.submit("second", needle="a <b>haystack</b>", queue_name="slow").id
    mlq.store.cancel(ids[0])

    def shown(query: str) -> list[str]:
        return re.findall(r'name="id" value="([^"]+)"', visitor.page(f"/jobs{query}"))

    assert [other, *ids[:10:-1]] == shown("")
    older = re.search(r'rel="next" href="([^"]+)"', visitor.page("/jobs"))
    assert older is not None
    assert ids[10::-1] == shown(older[1].removeprefix(f"{PREFIX}/jobs").replace("&amp;", "&"))
    assert [ids[0]] == shown("?state=cancelled")
    assert [other] == shown("?actor=second")
    assert [other] == shown("?queue=slow")
    assert ids[::-2][:50] == shown("?tag=odd")
    assert [other] == shown("?text=HAYSTACK")
    assert [] == shown("?text=nowhere")
    assert [other] == shown("?since=1h&queue=slow")
    assert f"{PREFIX}/jobs/{other}" == visitor.get(f"/jobs?text={other}").headers["Location"]


def test_children_are_found_by_their_parent(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    @mlq.actor
    def child() -> None: ...

    @mlq.actor
    def parent() -> str:
        return child.submit().id

    job = parent.submit()
    start_worker()
    made = job.result(10)
    for path in (f"/jobs/{job.id}", f"/jobs?text=parent:{job.id}"):
        assert f'title="{made}"' in visitor.page(path)
    assert f'title="{job.id}"' in visitor.page(f"/jobs/{made}")
    # Whoever is forgotten forgets whom it submitted; and one that was forgotten is not shown.
    mlq.store.remove([made])
    assert f'title="{made}"' not in visitor.page(f"/jobs/{job.id}")
    assert ([made], 1) == mlq.store.children(job.id)
    mlq.store.remove([job.id])
    assert ([], 0) == mlq.store.children(job.id)


def test_a_job_shows_what_it_was_given_and_what_it_gave(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    @mlq.actor(http=True)
    def scale(rows: list[int], by: float = 2.0) -> object:
        return {"out": np.arange(500, dtype=np.float32), "image": np.eye(30), "n": float("nan"), "raw": b"\0\1"}

    @mlq.actor
    def draw() -> Result:
        return Result(short="drawn", full=b"\x89PNG\r\n\x1a\n", content_type="image/png")

    jobs = [scale.submit([1, 2], by=0.5), draw.submit()]
    start_worker()
    for job in jobs:
        job.result(10)
    html = visitor.page(f"/jobs/{jobs[0].id}")
    for text in ("<dt>rows</dt>", "<dt>by</dt>", "float32 array, 500", "from 0 to 499, mean 249.5", "2 bytes", ">nan<"):
        assert text in html, text
    assert 'class="plot"' in html
    assert 'src="data:image/png;base64,' in html
    html = visitor.page(f"/jobs/{jobs[1].id}")
    assert f'src="{PREFIX}/jobs/{jobs[1].id}/result"' in html
    assert "image/png" == visitor.get(f"/jobs/{jobs[1].id}/result").content_type


def test_a_job_says_from_which_checkpoint_each_attempt_went_on(
    mlq: MLQ, visitor: Visitor, start_worker: StartWorker
) -> None:
    @mlq.actor(min_backoff=1, max_backoff=1)
    def train() -> None:
        job = current_job()
        if job.attempt != 2:
            job.save_checkpoint(job.attempt)
        if job.attempt < 4:
            raise ValueError(f"at {job.attempt}")

    job = train.submit()
    start_worker()
    job.result(15)
    html = visitor.page(f"/jobs/{job.id}")
    parts = [part.partition("<li>")[0] for part in html.split('<span class="what">Attempt ')[1:]]
    found = [re.findall(r"from the checkpoint that attempt (\d) saved at <time", part) for part in parts]
    assert [[], ["1"], ["1"], ["3"]] == found


def test_a_job_says_why_it_waits(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    first, second = mlq.submit("a", queue_name="q"), mlq.submit("a", queue_name="q")
    assert "It waits for a worker: none is alive; <code>mlqueue worker MODULE</code> starts some." in visitor.page(
        f"/jobs/{first.id}"
    )

    @mlq.actor(queue_name="q")
    def a() -> None: ...

    mlq.store.pause("q", "ann")
    start_worker()
    eventually(lambda: any("q" in worker.info.get("queues", ()) for worker in mlq.store.workers()))
    for job in (first, second):
        assert "It waits: queue q is paused by ann since" in visitor.page(f"/jobs/{job.id}")
    mlq.store.resume("q")
    eventually(lambda: second.state is State.SUCCEEDED)
    assert "Why it waits" not in visitor.page(f"/jobs/{second.id}")
    assert "It should start in about 1 min." in visitor.page(f"/jobs/{mlq.submit('a', delay=60).id}")


def test_large_arguments_are_not_fetched_for_a_page(
    mlq: MLQ, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_page, "MOST_BYTES", 1000)
    job = mlq.submit("a", "x" * 2000)
    assert "too many to be shown here" in visitor.page(f"/jobs/{job.id}")


def test_a_search_looks_at_some_and_offers_to_go_on(
    mlq: MLQ, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_page, "BATCH", 4)
    monkeypatch.setattr(jobs_page, "LOOKS", 4)
    found = mlq.submit("a", "the needle").id
    for number in range(6):
        mlq.submit("a", number)
    html = visitor.page("/jobs?text=needle")
    assert found not in html
    assert "Looked at the newest 4 jobs; there are older ones." in html
    older = re.search(r'rel="next" href="([^"]+)"', html)
    assert older is not None
    assert found in visitor.page(older[1].removeprefix(PREFIX).replace("&amp;", "&"))


def test_dead_letters_are_looked_at_some_at_a_time_and_changed_all_at_once(
    mlq: MLQ, visitor: Visitor, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_page, "LOOKS", 3)
    ids = dies(mlq, start_worker, *[f"/data/{n}.csv" for n in range(5)])
    html = visitor.page("/dead")
    assert "Of 3 that died last, of 5 in all" in html
    older = re.search(r'rel="next" href="([^"]+)"', html)
    assert older is not None
    assert ["2"] == re.findall(r'<span class="n">(\d+)</span>', visitor.page(older[1].removeprefix(PREFIX)))
    assert 200 == visitor.get("/dead?text=nowhere").status_code
    # One by one, of those with a text, too.
    seen: list[str] = []
    path: str | None = "/dead/letters?text=data"
    while path:
        html = visitor.page(path)
        seen += re.findall(r'name="id" value="([^"]+)"', html)
        older = re.search(r'rel="next" href="([^"]+)"', html)
        path = older and older[1].removeprefix(PREFIX).replace("&amp;", "&")
    assert sorted(ids) == sorted(seen)
    pattern = re.search(r'name="pattern" value="([^"]*)"', visitor.page("/dead"))
    assert pattern is not None
    fields = {"actor": "read", "reason": "failed", "pattern": pattern[1], "act": "purge", "sure": "yes"}
    assert "Forgotten: 5." in visitor.post("/dead", **fields).text


def test_a_limit_is_set_and_unset(mlq: MLQ, visitor: Visitor) -> None:
    assert "It has 3 slots now." in visitor.post("/limits", limit="gpu", act="set", capacity="3").text
    html = visitor.page("/limits")
    assert "0 of 3 slots in use" in html
    assert "set by hand" in html
    assert 422 == visitor.post("/limits", limit="gpu", act="set", capacity="-1").status_code
    assert 422 == visitor.post("/limits", limit="gpu", act="set", capacity="many").status_code
    visitor.post("/limits", limit="gpu", act="unset", capacity="3")
    assert None is mlq.limits.get("gpu")
    assert ["unset limit", "set limit"] == [act.act for act in mlq.store.acts()]


# Pages that are followed


def events(answer: Any) -> Iterator[tuple[str, str]]:
    """The pages that a stream sends, each with its id."""
    text = ""
    for part in answer.response:
        text += part.decode()
        while "\n\n" in text:
            event, _, text = text.partition("\n\n")
            fields = dict(line.partition(": ")[::2] for line in event.splitlines())
            if fields.get("event") == "page":
                yield fields["id"], json.loads(fields["data"])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are looked at often."""
    monkeypatch.setattr(dashboard, "FOLLOWED", dict.fromkeys(dashboard.FOLLOWED, 0.02))
    monkeypatch.setattr(mount, "FRESH", 0.01)
    monkeypatch.setattr(mount, "SHARE", 1.0)


def follow(app: flask.Flask, path: str, heard: str = "") -> Any:
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": heard} if heard else {})
    return app.test_client().get(PREFIX + path, headers=headers, buffered=False)


def test_a_page_is_sent_again_when_it_has_changed(mlq: MLQ, quick: None) -> None:
    app = hosting(mlq, allow_anonymous=True, max_streams=1, heartbeat=0.01)
    with follow(app, "/queues") as answer:
        assert "text/event-stream" == answer.content_type
        assert "Accept" in answer.headers["Vary"]
        sent = events(answer)
        first, html = next(sent)
        assert "No queue yet" in html
        assert "</html>" in html
        mlq.submit("a", queue_name="new")
        second, html = next(found for found in sent if "Queue new" in found[1])
        assert first != second
        assert 503 == follow(app, "/queues").status_code  # there is one already
    # Who comes again hears nothing before there is something new.
    with follow(app, "/queues", heard=second) as answer:
        sent = events(answer)
        mlq.store.pause("new")
        assert any("paused" in html for _, html in sent)
    with follow(app, "/queues", heard="of another one") as answer:
        assert "Queue new" in next(events(answer))[1]
    # A page of one job, or with a filter by text, is no such page.
    assert "text/html" in follow(app, "/actors").content_type


def test_a_stream_ends_with_the_key_that_it_was_asked_with(mlq: MLQ, keys: ApiKeys, quick: None) -> None:
    app = hosting(mlq, web.keys(mlq), max_streams=2)
    token, key = keys.new("read")
    visitor = Visitor(app)
    visitor.sign_in(token)
    with visitor.get("/queues", headers={"Accept": "text/event-stream"}, buffered=False) as answer:
        sent = events(answer)
        next(sent)
        keys.revoke(key.id)
        assert [] == [html for _, html in sent if "Sign in" in html]
    assert 303 == visitor.get("/queues", headers={"Accept": "text/event-stream"}).status_code


def test_pages_are_made_once_for_all_who_look_but_for_what_is_their_own(mlq: MLQ, quick: None) -> None:
    app = hosting(mlq, allow_anonymous=True)
    mlq.submit("a")
    again = {"X-MLQueue-Again": "1"}
    texts = []
    for visitor in (Visitor(app), Visitor(app)):
        visitor.page("/")
        cookie = visitor.client.get_cookie("mlqueue_form", path=f"{PREFIX}/")
        assert cookie is not None
        text = visitor.get("/queues", headers=again).text
        assert f'name="token" value="{cookie.value}"' in text
        texts.append(text.replace(cookie.value, ""))
    assert re.sub(r"\d+ ms|[\d.]+ s", "", texts[0]) == re.sub(r"\d+ ms|[\d.]+ s", "", texts[1])
    mlq.store.flush()
    answer = visitor.get("/queues", headers=again)
    tag = answer.headers["ETag"]
    assert 304 == visitor.get("/queues", headers=again | {"If-None-Match": tag}).status_code


def test_those_who_follow_take_a_bounded_part_of_the_processor() -> None:
    pages = mount.Pages()
    assert 0 == pages.wait
    pages.keep("one", b"", took=0.1)
    assert 0.5 < pages.wait <= 0.9
    pages.keep("other", b"", took=0.1)
    assert 1.5 < pages.wait <= 1.8
    assert b"" == pages.recent("one")
    pages.forget()
    assert None is pages.recent("one")


def test_a_job_that_is_not_there_is_a_page_too(visitor: Visitor) -> None:
    answer = visitor.get("/jobs/nobody")
    assert 404 == answer.status_code
    assert "text/html" in answer.content_type
    assert "<p>No job &#39;nobody&#39; in " in answer.text
    assert "<code>mlqueue jobs</code> lists those that exist." in answer.text
    assert f'<a class="button" href="{PREFIX}/jobs">All jobs</a>' in answer.text


def test_an_error_is_a_sentence() -> None:
    assert "Give <code>&lt;b&gt;</code>, or none." == render.sentence("give `<b>`, or none.")
    assert "One ` &amp; no more" == render.sentence("one ` & no more")


# Changes


def test_selected_jobs_are_cancelled_and_retried(mlq: MLQ, visitor: Visitor) -> None:
    ids = [mlq.submit("a").id for _ in range(3)]
    assert "Cancelled: 2." in visitor.post("/jobs", id=ids[:2], act="cancel").text
    states = [mlq.store.record(job_id).state for job_id in ids]
    assert [State.CANCELLED, State.CANCELLED, State.QUEUED] == states
    assert "Back in the queue: 2." in visitor.post("/jobs", id=[*ids, "gone"], act="retry").text
    assert "Nothing was selected." in visitor.post("/jobs", act="retry").text
    notes = [(act.act, act.what) for act in mlq.store.acts()]
    assert [("retry", ", ".join([*ids, "gone"])), ("cancel", ", ".join(ids[:2]))] == notes
    page = visitor.page("/acts")
    assert "127.0.0.1" in page
    assert ids[0] in page


def test_who_changes_jobs_of_a_view_stays_in_it(mlq: MLQ, visitor: Visitor) -> None:
    for _ in range(51):
        job = mlq.submit("mine", tags=["night shift"])
    mlq.submit("other")
    for view in ("?actor=mine&tag=night+shift&state=queued&state=cancelled", "?actor=mine", ""):
        html = visitor.page(f"/jobs{view}")
        older = re.search(r'href="([^"]*)">Older', html)
        assert older is not None
        for path in (f"{PREFIX}/jobs{view}", older[1].replace("&amp;", "&")):
            html = visitor.page(path.removeprefix(PREFIX))
            form = re.search(r'method="post" action="([^"]*)" data-select', html)
            assert form is not None
            answer = visitor.post(form[1].replace("&amp;", "&").removeprefix(PREFIX), id=job.id, act="cancel")
            asked = {name: answer.request.args.getlist(name) for name in answer.request.args}
            given = EnvironBuilder(path).get_request().args.to_dict(flat=False)
            assert {name: asked[name] for name in asked if name not in ("told", "n")} == given


def test_one_job_is_cancelled_and_retried(mlq: MLQ, visitor: Visitor) -> None:
    job = mlq.submit("a")
    visitor.post(f"/jobs/{job.id}/cancel")
    assert State.CANCELLED is job.state
    visitor.post(f"/jobs/{job.id}/retry")
    assert State.QUEUED is job.state
    answer = visitor.post(f"/jobs/{job.id}/retry")
    assert 409 == answer.status_code
    assert "only a dead or cancelled job" in answer.text


def test_what_died_of_the_same_stands_together_and_is_put_back_or_forgotten_together(
    mlq: MLQ, visitor: Visitor, start_worker: StartWorker
) -> None:
    ids = dies(mlq, start_worker, *[f"/data/{n}.csv" for n in range(5)], "'x'")
    html = visitor.page("/dead")
    assert ["5", "1"] == re.findall(r'<span class="n">(\d+)</span>', html)
    pattern = re.search(r'name="pattern" value="([^"]*)"', html)
    assert pattern is not None
    group = {"actor": "read", "reason": "failed", "pattern": pattern[1]}
    assert "Are you sure?" in visitor.post("/dead", **group, act="purge").text
    assert 6 == mlq.dead_letters.count()
    mlq.store.pause("default")
    assert "Back in the queue: 5." in visitor.post("/dead", **group, act="requeue").text
    assert [ids[5]] == [record.id for record in mlq.dead_letters]
    other = re.search(r'name="pattern" value="([^"]*)"', visitor.page("/dead"))
    assert other is not None
    fields = {**group, "pattern": other[1], "act": "purge", "sure": "yes"}
    assert "Forgotten: 1." in visitor.post("/dead", **fields).text
    assert 0 == mlq.dead_letters.count()


def test_a_dead_letter_is_mended_and_done(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    [job_id] = dies(mlq, start_worker, "bad")
    html = visitor.page(f"/dead/{job_id}")
    assert "FileNotFoundError: no file bad" in html
    assert "&#34;bad&#34;</textarea>" in html
    answer = visitor.post(f"/dead/{job_id}", act="requeue", **{"arg.0": "{not json"})
    assert 422 == answer.status_code
    assert "the body is not JSON" in answer.text
    assert "{not json</textarea>" in answer.text
    visitor.post(f"/dead/{job_id}", act="requeue", **{"arg.0": '"good"'})
    eventually(lambda: mlq.store.record(job_id).state is State.SUCCEEDED)
    assert "with other argument 1" in mlq.store.acts()[0].what


def test_what_json_has_no_form_for_stays_what_it_was(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0)
    def crop(image: Any, size: int) -> Any:
        if size < 1:
            raise ValueError("too small")
        return [str(image.dtype), size]

    job = crop.submit(np.zeros((2, 2)), 0)
    start_worker()
    eventually(lambda: job.state is State.DEAD)
    html = visitor.page(f"/dead/{job.id}")
    assert 'name="arg.0"' not in html
    assert "float64 array, 2 × 2" in html
    visitor.post(f"/dead/{job.id}", act="requeue", **{"arg.1": "4"})
    assert ["float64", 4] == job.result(10)


def test_selected_dead_letters_are_put_back_or_forgotten(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    ids = dies(mlq, start_worker, "a", "b", "c")
    assert all(job_id in visitor.page("/dead/letters?actor=read") for job_id in ids)
    mlq.store.pause("default")
    assert "Back in the queue: 1." in visitor.post("/dead/letters", id=ids[0], act="requeue").text
    assert f'action="{PREFIX}/dead/letters?actor=read"' in visitor.page("/dead/letters?actor=read")
    asks = visitor.post("/dead/letters?actor=read", id=ids[1:], act="purge").text
    assert "Forget these 2 dead letters?" in asks
    assert ids[1:] == re.findall(r'name="id" value="([^"]*)"', asks)
    assert 2 == mlq.dead_letters.count()
    answer = visitor.post("/dead/letters?actor=read", id=ids, act="purge", sure="yes")
    assert "Forgotten: 2." in answer.text
    assert "read" == answer.request.args["actor"]
    assert State.QUEUED is mlq.store.record(ids[0]).state


def test_a_dead_letter_is_forgotten_when_that_is_meant(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    [job_id] = dies(mlq, start_worker, "a")
    assert "That cannot be undone." in visitor.post(f"/dead/{job_id}", act="purge").text
    assert State.DEAD is mlq.store.record(job_id).state
    assert "Forgotten: 1." in visitor.post(f"/dead/{job_id}", act="purge", sure="yes").text
    # In another tab it is still there.
    for act in ("purge", "requeue"):
        answer = visitor.post(f"/dead/{job_id}", act=act)
        assert (404, True) == (answer.status_code, "It is not there" in answer.text)


def test_dead_letters_are_exported(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    [job_id] = dies(mlq, start_worker, "a")
    answer = visitor.get("/dead/export?actor=read")
    assert job_id in answer.text
    assert "attachment" in answer.headers["Content-Disposition"]


def test_a_queue_is_paused_resumed_and_drained(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    @mlq.actor
    def work() -> int:
        return 1

    start_worker()
    assert 1 == work.submit().result(10)
    assert "paused" in visitor.post("/queues", queue="default", act="pause").text
    job = work.submit()
    assert State.QUEUED is job.state
    visitor.post("/queues", queue="default", act="resume")
    assert 1 == job.result(10)
    visitor.post("/queues", queue="default", act="pause")
    jobs = [work.submit(), work.with_options(delay=60).submit()]
    assert "Are you sure?" in visitor.post("/queues", queue="default", act="drain").text
    assert State.QUEUED is jobs[0].state
    assert "2 waiting jobs were forgotten" in visitor.post("/queues", queue="default", act="drain", sure="yes").text
    assert 422 == visitor.post("/queues", queue="default", act="burn").status_code


def test_callbacks_are_seen_and_delivered_again(mlq: MLQ, visitor: Visitor) -> None:
    job = mlq.submit("a", callback="http://127.0.0.1:9/x?<i>")
    mlq.store.cancel(job.id)
    html = visitor.page("/callbacks")
    assert "http://127.0.0.1:9/x?&lt;i&gt;" in html
    assert "pending" in html
    assert "delivered again" in visitor.post(f"/jobs/{job.id}/redeliver").text


def test_a_job_is_submitted_by_a_form(mlq: MLQ, visitor: Visitor, start_worker: StartWorker) -> None:
    @mlq.actor(http=True)
    def mix(
        count: int, rate: float = 0.5, names: list[str] | None = None, fast: bool = False, blob: bytes = b""
    ) -> Any:
        """Mixes it."""
        return [count, rate, names, fast, blob]

    start_worker()
    eventually(lambda: mlq.store.published("mix"))
    assert "Mixes it." in visitor.page("/actors")
    html = visitor.page("/actors/mix")
    assert 'type="number" step="1"' in html
    assert 'type="file"' in html
    fields = {"arg.count": "3", "arg.rate": "0.25", "arg.names": '["a"]', "arg.fast": "true", "tags": "x, y"}
    answer = visitor.post("/actors/mix", **fields, **{"arg.blob": (io.BytesIO(b"\0z"), "b.bin")})
    job_id = answer.request.path.rpartition("/")[2]
    assert [3, 0.25, ["a"], True, b"\0z"] == mlq.job(job_id).result(10)
    assert ("x", "y") == mlq.store.record(job_id).tags
    answer = visitor.post("/actors/mix", **{"arg.count": "many", "arg.rate": "0.125"})
    assert 422 == answer.status_code
    assert 'value="0.125"' in answer.text
    assert "That cannot be submitted" in answer.text
    assert 404 == visitor.get("/actors/nobody").status_code


# Who may do what


def test_it_is_not_registered_until_it_is_known_who_may_use_it(mlq: MLQ) -> None:
    with pytest.raises(SettingsError, match=r"create_dashboard\(mlq, allow_anonymous=True\)"):
        hosting(mlq)
    with pytest.raises(SettingsError, match="values_scope='all'"):
        web.create_dashboard(mlq, allow_anonymous=True, values_scope="all")


def test_one_signs_in_with_a_key_and_out_again(mlq: MLQ, keys: ApiKeys) -> None:
    visitor = Visitor(hosting(mlq, web.keys(mlq)))
    token, key = keys.new("read")
    assert f"{PREFIX}/sign-in" == visitor.get("/").headers["Location"]
    answer = visitor.post("/sign-in", key="mlq_0_0")
    assert 403 == answer.status_code
    assert "not valid" in answer.text
    answer = visitor.sign_in(token)
    assert "<h1>Overview</h1>" in answer.text
    cookie = visitor.client.get_cookie("mlqueue_key", path=f"{PREFIX}/")
    assert cookie is not None
    assert cookie.http_only
    assert "Lax" == cookie.same_site
    assert token not in answer.text
    visitor.post("/sign-out")
    assert 303 == visitor.get("/").status_code
    visitor.sign_in(token)
    keys.revoke(key.id)
    assert 303 == visitor.get("/").status_code


def test_who_signs_in_comes_to_the_page_that_was_asked_for(mlq: MLQ, keys: ApiKeys) -> None:
    visitor = Visitor(hosting(mlq, web.keys(mlq)))
    token, _ = keys.new("read")
    visitor.get("/sign-in")
    for path in ("/jobs?actor=mine&tag=n%C3%A4chtlich&name=x&_scheme=y", "/queues"):
        asked = visitor.get(path).headers["Location"].removeprefix(PREFIX)
        assert "not valid" in visitor.post(asked, key="mlq_0_0").text
        answer = visitor.post(asked, key=token)
        assert PREFIX + path == answer.request.full_path.rstrip("?")
        visitor.post("/sign-out")
    for elsewhere in (
        "//evil.example/ui/",
        "https://evil.example/",
        f"{PREFIX}/\\evil",
        "/elsewhere",
        f"{PREFIX}/\r\nA: b",
    ):
        answer = visitor.post(f"/sign-in?{urlencode({'next': elsewhere})}", key=token)
        assert (200, f"{PREFIX}/") == (answer.status_code, answer.request.path), elsewhere
        visitor.post("/sign-out")


@pytest.mark.parametrize(
    ("scope", "path", "fields", "allowed"),
    [
        ("read", "/jobs", {"act": "cancel"}, False),
        ("submit,read", "/jobs", {"act": "cancel"}, True),
        ("submit,read", "/queues", {"act": "pause", "queue": "q"}, False),
        ("submit,read", "/dead/letters", {"act": "requeue"}, False),
        ("submit,read", "/workers", {"act": "stop", "worker": "w"}, False),
        ("submit,read", "/limits", {"act": "set", "limit": "gpu", "capacity": "1"}, False),
        ("admin", "/limits", {"act": "set", "limit": "gpu", "capacity": "1"}, True),
        ("admin", "/queues", {"act": "pause", "queue": "q"}, True),
    ],
)
def test_changes_ask_for_their_scope(
    mlq: MLQ, keys: ApiKeys, scope: str, path: str, fields: dict[str, str], allowed: bool
) -> None:
    visitor = Visitor(hosting(mlq, web.keys(mlq)))
    visitor.sign_in(keys.new(scope)[0])
    assert (200 if allowed else 403) == visitor.post(path, **fields).status_code
    buttons = {"/jobs": "Cancel selected", "/queues": ">Pause<"}
    mlq.submit("a")
    eventually(lambda: ">a</" in visitor.page("/queues"))
    if path in buttons:
        assert allowed == (buttons[path] in visitor.page(path).replace(">Resume<", ">Pause<"))


def test_the_host_says_who_it_is_and_that_is_noted(mlq: MLQ) -> None:
    def login(request: flask.Request) -> Any:
        name = request.cookies.get("user")
        return web.Principal(name, frozenset({"admin"})) if name else None

    visitor = Visitor(hosting(mlq, login))
    answer = visitor.get("/")
    assert 401 == answer.status_code
    visitor.client.set_cookie("user", "ann")
    visitor.post("/queues", queue="q", act="pause")
    assert "ann (127.0.0.1)" == mlq.store.acts()[0].who
    assert "ann" in mlq.store.paused()["q"].who


def test_forms_of_elsewhere_change_nothing(mlq: MLQ, visitor: Visitor) -> None:
    job = mlq.submit("a")
    client = visitor.client
    path = f"{PREFIX}/jobs/{job.id}/cancel"
    assert 403 == client.post(path).status_code
    visitor.get("/")
    assert 403 == client.post(path, data={"token": "0" * 32}).status_code
    token = client.get_cookie("mlqueue_form", path=f"{PREFIX}/")
    assert token is not None
    for header in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
        assert 403 == client.post(path, data={"token": token.value}, headers=header).status_code
    assert State.QUEUED is job.state
    assert [] == mlq.store.acts()
    assert 303 == client.post(path, data={"token": token.value}, headers={"Sec-Fetch-Site": "same-origin"}).status_code


def test_nothing_is_changed_by_a_get(mlq: MLQ, visitor: Visitor) -> None:
    job = mlq.submit("a")
    for path in ("/cancel", "/retry", "/redeliver"):
        assert 405 == visitor.get(f"/jobs/{job.id}{path}").status_code


def test_a_read_only_dashboard_changes_nothing_and_offers_nothing(mlq: MLQ) -> None:
    visitor = Visitor(hosting(mlq, allow_anonymous=True, read_only=True))
    job = mlq.submit("a")
    mlq.limits.set("gpu", 1)
    for path in ("/", "/jobs", f"/jobs/{job.id}", "/queues", "/workers", "/dead", "/limits"):
        assert 'method="post"' not in visitor.page(path)
    answer = visitor.post(f"/jobs/{job.id}/cancel")
    assert 403 == answer.status_code
    assert "read-only" in answer.text
    assert State.QUEUED is job.state


def test_arguments_and_results_are_hidden_from_those_without_the_scope(
    mlq: MLQ, keys: ApiKeys, start_worker: StartWorker
) -> None:
    @mlq.actor
    def keep(secret: str) -> str:
        return secret

    job = keep.submit("hunter2")
    start_worker()
    job.result(10)
    visitor = Visitor(hosting(mlq, web.keys(mlq), values_scope="admin"))
    visitor.sign_in(keys.new("submit,read")[0])
    paths = [f"/jobs/{job.id}", "/jobs", "/jobs?text=keep", "/dead", "/"]
    assert not [path for path in paths if "hunter2" in visitor.page(path)]
    assert f"{job.id}" not in visitor.page("/jobs?text=hunter2")
    for path in (f"/jobs/{job.id}/result", f"/jobs/{job.id}/result.txt", f"/jobs/{job.id}/events", "/dead/export"):
        assert 403 == visitor.get(path).status_code
    visitor.sign_in(keys.new("admin")[0])
    assert "hunter2" in visitor.page(f"/jobs/{job.id}")
    assert "hunter2" == visitor.get(f"/jobs/{job.id}/result").text


def test_two_dashboards_stand_in_one_app(mlq: MLQ) -> None:
    app = flask.Flask("host")
    for name in ("one", "two"):
        dashboard = web.create_dashboard(mlq, allow_anonymous=True, name=name, read_only=name == "two")
        app.register_blueprint(dashboard, url_prefix=f"/{name}/<team>")
    client = app.test_client()
    html = client.get("/two/vision/jobs").text
    assert "/two/vision/queues" in html
    assert "/one/" not in html
    assert "read-only" in html


#: Texts that would run where they are not quoted.
EVIL = [
    "<script>fetch('/ran')</script>",
    "\"><img src=x onerror=fetch('/ran')>",
    "'-alert(1)-'",
    "</textarea><svg onload=fetch('/ran')>",
    "{{ 7 * 7 }}",
    "javascript:fetch('/ran')",
]


@pytest.fixture
def poisoned(mlq: MLQ, start_worker: StartWorker) -> Iterator[list[str]]:
    """Jobs that carry such texts wherever a job can."""

    @mlq.actor(max_retries=0, queue_name="default", http=True)
    def boom(text: str, **more: Any) -> Any:
        import mlqueue

        job = mlqueue.current_job()
        job.progress(text, text[:200])
        job.log_metrics(1, **{text[:100]: 1.0})
        print(text)
        if more:
            return {text: [text, {text: text}]}
        raise ValueError(text)

    mlq.limits.set(EVIL[0].replace("/", "!"), 1)
    jobs = []
    for text in EVIL:
        callback = "http://127.0.0.1:9/" + text.replace(" ", "")
        jobs.append(boom.submit(text, tags=[text[:100]], callback=callback))
        jobs.append(boom.submit(text, **{text: text}))
    start_worker()
    eventually(lambda: all(mlq.store.record(job.id).state.ended for job in jobs))
    for text in EVIL:
        mlq.submit(text[:100], queue_name=text[:100])
        mlq.store.note_act(text, text, text)
    return [job.id for job in jobs]


def test_nothing_that_a_job_carries_becomes_markup(mlq: MLQ, visitor: Visitor, poisoned: list[str]) -> None:
    paths = ["/", "/jobs", "/dead", "/dead/letters", "/callbacks", "/queues", "/workers", "/acts", "/actors/boom"]
    paths += ["/limits", "/functions"]
    paths += [f"/jobs/{job_id}" for job_id in poisoned]
    paths += [f"/dead/{job_id}" for job_id in poisoned[::2]]
    for path in paths:
        html = visitor.page(path)
        for text in ("<script>fetch", "<img src=x", "<svg onload", ">49<"):
            assert text not in html, (path, text)
        assert not re.search(r'href="javascript:', html), path
    for text in EVIL:
        assert "<script>f" not in visitor.get("/jobs", query_string={"text": text, "actor": text, "tag": text}).text


def test_the_pages_of_a_store_that_is_down_say_so() -> None:
    settings = Settings.load({}, url="redis://127.0.0.1:9", command_timeout=0.2)
    with contextlib.closing(MLQ("down", settings=settings)) as down:
        answer = Visitor(hosting(down, allow_anonymous=True)).get("/")
    assert 503 == answer.status_code
    assert "The store does not answer" in answer.text
