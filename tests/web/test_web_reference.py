"""What the OpenAPI document, the page and the manual say of the routes is so; schemathesis finds nothing else."""

from __future__ import annotations

import ast
import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from flask.testing import FlaskClient
from hosting import PREFIX, ROOT, gunicorn
from support import StartWorker

from mlqueue import MLQ, Settings, errors
from mlqueue.keys import ApiKeys
from mlqueue.web.operation import PATHS
from mlqueue.web.shapes import OPTIONS
from mlqueue.web.table import OPERATIONS

MANUAL = ROOT / "docs/reference/http.md"
HOWTO = ROOT / "docs/howto/mount-the-blueprint.md"


@pytest.fixture
def document(client: FlaskClient) -> Any:
    return client.get(f"{PREFIX}/openapi.json").json


def parts(value: Any) -> Iterator[Any]:
    yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(part)


# The document


def test_every_route_stands_in_the_document_with_its_statuses(document: Any) -> None:
    told = {
        (method.upper(), path, int(status))
        for path, methods in document["paths"].items()
        for method, one in methods.items()
        for status in one["responses"]
    }
    expected = {
        (one.method, re.sub(r"<(\w+)>", r"{\1}", one.rule), status)
        for one in OPERATIONS
        for status in {*one.answers, *(kind.status for kind in one.all_errors)}
    }
    assert expected == told


def test_references_lead_somewhere_and_names_are_unique(document: Any) -> None:
    references = {part["$ref"] for part in parts(document) if isinstance(part, dict) and "$ref" in part}
    components = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references <= components
    assert "$defs" not in {key for part in parts(document) if isinstance(part, dict) for key in part}
    names = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(OPERATIONS) == len(set(names))
    linked = {
        name
        for part in parts(document)
        if isinstance(part, dict) and isinstance(part.get("links"), dict)
        for name in part["links"]
        if isinstance(part["links"][name], dict)
    }
    assert {"submit_job", "show_dead_letter"} <= linked
    assert "3.1.0" == document["openapi"]


def test_every_schema_is_a_json_schema(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema_rs.meta.validate({"$defs": schemas, **schema})


def test_every_operation_says_what_it_does() -> None:
    for one in OPERATIONS:
        assert one.summary.endswith("."), one.name
        assert len(one.summary) <= 120, one.name
    assert set(PATHS) == {name for one in OPERATIONS for name in one.path_names}


def test_the_type_of_an_error_names_its_class(client: FlaskClient) -> None:
    problem = client.get(f"{PREFIX}/jobs/nope").json
    assert ("urn:mlqueue:error:JobNotFound", "Not Found", 404) == tuple(
        problem[name] for name in ("type", "title", "status")
    )
    assert problem["code"] in errors.__all__


# The page


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_loads_nothing_runs_nothing_and_shows_everything(client: FlaskClient) -> None:
    answer = client.get(f"{PREFIX}/docs")
    page = Elements()
    page.feed(answer.text)
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    names = {name for _, attributes in page.found for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("style", "src", "srcset")}
    targets = {attributes["href"] for tag, attributes in page.found if tag == "a"}
    assert {f"#{one.name}" for one in OPERATIONS} | {f"{PREFIX}/openapi.json"} == targets
    ids = {attributes["id"] for _, attributes in page.found if "id" in attributes}
    assert {target[1:] for target in targets if target and target.startswith("#")} <= ids
    for one in OPERATIONS:
        path = one.rule.replace("<", "{").replace(">", "}")
        assert f"{one.method} {PREFIX}{path}" in answer.text
    style = re.search(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


# The manual


def test_the_manual_has_every_route_with_scope_and_statuses() -> None:
    told = {}
    for line in MANUAL.read_text().splitlines():
        match = re.fullmatch(r"\| `([A-Z]+) (/\S+)` \| (\w*) \| (.+) \| ([\d, ]+) \|", line)
        if match:
            told[match[1], match[2]] = (match[3], [int(status) for status in match[5].split(", ")])
    assert {
        (one.method, one.rule): (
            one.scope or "",
            sorted({*one.answers, *(kind.status for kind in one.all_errors)}),
        )
        for one in OPERATIONS
    } == told


def test_the_manual_of_options_has_those_that_are_taken() -> None:
    section = MANUAL.read_text().partition("\n## Options\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == OPTIONS


def test_the_apps_of_the_how_to_stand_where_it_says(server: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLQUEUE_URL", str(server.url))
    programs = re.findall(r"^```python\n(.*?)^```$", HOWTO.read_text(), re.MULTILINE | re.DOTALL)
    found = []
    for program in programs:
        if not program.startswith("# "):  # those that are files are run by test_docs.py
            names: dict[str, Any] = {"__name__": "site"}
            exec(compile(ast.parse(program), "howto", "exec"), names)
            client = names["app"].test_client()
            for rule in names["app"].url_map.iter_rules():
                if rule.rule.endswith("/healthz"):
                    found.append(rule.rule)
                    assert "ok" == client.get(rule.rule).text
                    assert 401 == client.get(rule.rule.replace("healthz", "jobs")).status_code
    assert ["/queue/healthz", "/speech/healthz", "/vision/healthz"] == sorted(found)


# Schemathesis


#: Checks that do not hold by design: DELETE cancels a job, whose record stays; ``/jobs/count`` is also the place of a
#: job of that id, so its Allow has DELETE; and what a URL or a set of filters must be, no schema says in full.
EXCLUDED = "use_after_free,allow_header_conformance,positive_data_acceptance"


def run_schemathesis(mlq: MLQ, folder: Path, start_worker: StartWorker, *arguments: str) -> int:
    """How many cases were sent, whose answers were all as documented."""

    @mlq.actor(http=True)
    def add(a: int, b: int = 2) -> int:
        return a + b

    @mlq.actor(max_retries=0)
    def bad() -> None:
        raise ValueError("no")

    start_worker()
    for job in [bad.submit() for _ in range(5)]:
        job.wait(10)
    token, _ = ApiKeys(mlq.store).new("admin")
    with gunicorn(mlq, folder, "--threads", "8", WITH_KEYS="1") as client:
        run = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{client.base_url}openapi.json", "--no-color"),
                *("--checks", "all", "--exclude-checks", EXCLUDED, "--header", f"Authorization: Bearer {token}"),
                # A stream of events has no end.
                *("--exclude-path-regex", "(events|logs|jobs/.*/metrics)$", *arguments),
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert 0 == run.returncode, run.stdout[-6000:] + run.stderr[-2000:]
    found = re.search(r"([\d,]+) generated, ([\d,]+) passed", run.stdout)
    assert found, run.stdout
    return int(found[1].replace(",", ""))


def test_schemathesis_finds_no_answer_that_is_not_documented(
    mlq: MLQ, tmp_path: Path, start_worker: StartWorker
) -> None:
    """F31, of a size for every run; the seed is fixed, the full one draws its own."""
    size = ("--phases", "examples,fuzzing,stateful", "--max-examples", "3", "--seed", "1")
    assert run_schemathesis(mlq, tmp_path, start_worker, *size) >= 100


@pytest.mark.faults
def test_schemathesis_finds_no_answer_that_is_not_documented_in_1000_cases(
    mlq: MLQ, tmp_path: Path, start_worker: StartWorker
) -> None:
    """F31."""
    assert run_schemathesis(mlq, tmp_path, start_worker, "--max-examples", "30") >= 1000
