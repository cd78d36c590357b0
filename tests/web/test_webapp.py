"""The reference app: its factory, who may use it, its pages, and its orders with their callback."""

from __future__ import annotations

import ast
import base64
import json
import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlsplit

import flask
import pytest
from flask.testing import FlaskClient
from hosting import ROOT, bearer

import webapp
from mlqueue import MLQ, State
from mlqueue.keys import ApiKeys

PAGES = ("/", "/training", "/orders")
FILES = sorted((ROOT / "webapp").rglob("*.*"))


@pytest.fixture
def app(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> flask.Flask:
    monkeypatch.delenv("DIGITS_PASSWORD", raising=False)
    return webapp.create_app(mlq)


@pytest.fixture
def locked(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    """The app with a password."""
    monkeypatch.setenv("DIGITS_PASSWORD", "1234")
    return webapp.create_app(mlq).test_client()


@pytest.fixture
def trained(mlq: MLQ) -> MLQ:
    """The namespace, in which a worker has declared the actor that the orders are for."""
    mlq.store.start_worker("gone", {}, {"train_digits": "train"}, {})
    mlq.store.release("gone", "drain", "")
    return mlq


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


# The factory


def test_there_is_no_app_before_the_factory_is_called() -> None:
    for path in FILES:
        if path.suffix == ".py":
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr):
                    called = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
                    assert not called & {"Flask", "flask.Flask", "create_app", "MLQ", "mlqueue.MLQ"}, path


def test_the_factory_makes_apps_that_share_nothing(mlq: MLQ) -> None:
    one, other = webapp.create_app(mlq), webapp.create_app(mlq)
    assert one is not other
    assert one.extensions["mlqueue"]["mlqueue"] is not other.extensions["mlqueue"]["mlqueue"]


# Who may


def test_without_a_password_it_serves_this_machine_under_its_own_names(client: FlaskClient) -> None:
    for page in (*PAGES, "/api/jobs"):
        assert 200 == client.get(page).status_code
        assert 400 == client.get(page, headers={"Host": "digits.evil.test"}).status_code
        assert client.get(page, environ_overrides={"REMOTE_ADDR": "10.0.0.1"}).status_code in (401, 403)


def test_with_a_password_it_serves_who_knows_it(locked: FlaskClient) -> None:
    for page in (*PAGES, "/api/jobs"):
        for headers in ({}, basic("wrong"), basic(""), {"Authorization": "Bearer x"}):
            assert 401 == locked.get(page, headers=headers, base_url="https://digits.test").status_code
        assert 200 == locked.get(page, headers=basic("1234"), base_url="https://digits.test").status_code
    assert locked.get("/").headers["WWW-Authenticate"].startswith("Basic ")


def test_visitors_submit_and_read_and_keys_do_what_they_are_for(client: FlaskClient, mlq: MLQ, keys: ApiKeys) -> None:
    job_id = client.post("/api/jobs", json={"msg": 1}).text
    assert 200 == client.get(f"/api/jobs/{job_id}").status_code
    assert 403 == client.post("/api/dead/purge", json={}).status_code
    assert 403 != client.post("/api/dead/purge", json={}, headers=bearer(keys, "admin")).status_code


def test_no_page_of_elsewhere_can_have_its_visitor_change_anything(
    client: FlaskClient, locked: FlaskClient, trained: MLQ
) -> None:
    # A browser adds the password that it knows to any request of any page.
    for browser, headers in ((client, {}), (locked, basic("1234"))):
        foreign = {**headers, "Sec-Fetch-Site": "cross-site", "Origin": "https://evil.test"}
        own = {**headers, "Sec-Fetch-Site": "same-origin"}
        assert 403 == browser.post("/orders", data={"epochs": 1}, headers=foreign).status_code
        assert 403 == browser.post("/api/jobs", json={"msg": 1}, headers=foreign).status_code
        assert 303 == browser.post("/orders", data={"epochs": 1}, headers=own).status_code
        assert 202 == browser.post("/api/jobs", json={"msg": 1}, headers=own).status_code


# Its pages


class Page(HTMLParser):
    """What a page has in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text_of: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text_of[self._open[-1]] = self.text_of.get(self._open[-1], "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_runs_and_loads_nothing_but_what_the_app_has(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = Page(answer.text)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    assert "style" not in page.text_of
    assert all(script.get("src") for script in page.all("script"))
    loaded = [tag.get("src") or tag.get("href") for _, tag in page.tags if tag.get("src") or tag.get("href")]
    for url in loaded:
        assert not urlsplit(str(url)).netloc, url
        with client.get(str(url)) as found:
            assert 200 == found.status_code, url
    assert "Set-Cookie" not in answer.headers


def test_no_file_names_another_site() -> None:
    for path in FILES:
        if path.suffix in (".html", ".css", ".js"):
            assert not re.search(r"(https?:)?//[a-z]", path.read_text().replace("// ", "")), path


@pytest.mark.parametrize("path", PAGES)
def test_what_can_be_filled_in_or_seen_has_a_name(client: FlaskClient, path: str) -> None:
    page = Page(client.get(path).text)
    labels = {label["for"] for label in page.all("label")}
    for field in (*page.all("input"), *page.all("progress")):
        assert field["id"] in labels, field
    for picture in (*page.all("canvas"), *page.all("svg")):
        assert picture.get("aria-label"), picture
    for picture in page.all("img"):
        assert picture.get("alt"), picture
    assert ("en", 1) == (page.all("html")[0]["lang"], len(page.all("h1")))
    for referred in re.findall(r'aria-labelledby="([^"]+)"', client.get(path).text):
        assert referred in {attributes.get("id") for _, attributes in page.tags}


def test_results_keep_the_policy_of_the_blueprint(client: FlaskClient, mlq: MLQ) -> None:
    job_id = client.post("/api/jobs", json={"msg": 1}).text
    assert "frame-ancestors" in client.get(f"/api/jobs/{job_id}").headers["Content-Security-Policy"]
    assert "style-src 'sha256-" in client.get("/api/docs").headers["Content-Security-Policy"]


# Orders


def order(client: FlaskClient, **form: Any) -> Any:
    return client.post("/orders", data={"name": "<b>Mine</b>", "epochs": 3, **form})


def test_an_order_is_answered_at_once_and_done_when_the_worker_has_called_back(
    client: FlaskClient, trained: MLQ
) -> None:
    answer = order(client)
    assert (303, True) == (answer.status_code, answer.location.startswith("/orders/"))
    page = client.get(answer.location)
    assert "processing" in page.text
    assert "&lt;b&gt;Mine&lt;/b&gt;" in page.text
    [record] = trained.jobs().jobs
    record = trained.job(record.id).record
    assert ("train_digits", "train", State.QUEUED) == (record.actor, record.queue, record.state)
    callback = urlsplit(str(record.callback))
    assert ("http", "localhost", f"{answer.location}/done") == (callback.scheme, callback.netloc, callback.path)
    state = f"{answer.location}/state"
    assert {"state": "processing", "short_result": None} == client.get(state).json
    told = f"{callback.path}?{callback.query}&success=1&job_id={record.id}&short_result=accuracy%200.9"
    for _ in range(2):  # delivered at least once
        assert 200 == client.get(told).status_code
    assert {"state": "done", "short_result": "accuracy 0.9"} == client.get(state).json
    done = client.get(answer.location).text
    assert ("accuracy 0.9" in done, "order.js" in done) == (True, False)


def test_a_callback_needs_the_token_of_its_order_but_no_password(locked: FlaskClient, trained: MLQ) -> None:
    answer = locked.post("/orders", data={"epochs": 1}, headers=basic("1234"))
    record = trained.job(trained.jobs().jobs[0].id).record
    callback = urlsplit(str(record.callback))
    told = f"success=0&job_id={record.id}&short_result=no"
    for query in (told, f"token=wrong&{told}", f"{callback.query}&success=1&job_id=other"):
        assert locked.get(f"{callback.path}?{query}").status_code in (400, 403)
    assert 200 == locked.get(f"{callback.path}?{callback.query}&{told}").status_code
    assert "failed" == json.loads(locked.get(f"{answer.location}/state", headers=basic("1234")).text)["state"]


@pytest.mark.parametrize("form", [{"epochs": "0"}, {"epochs": "51"}, {"epochs": "x"}, {"epochs": ""}])
def test_an_order_that_makes_no_sense_is_refused(client: FlaskClient, trained: MLQ, form: dict[str, str]) -> None:
    assert 400 == order(client, **form).status_code
    assert [] == trained.jobs().jobs


@pytest.mark.parametrize("name", ["x" * 22, "a", "..%2F..", "*", "order:1"])
def test_an_order_that_nobody_made_is_not_found(client: FlaskClient, name: str) -> None:
    assert 404 == client.get(f"/orders/{name}").status_code
