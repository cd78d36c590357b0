"""Results over HTTP: their types, what a browser may do with them, ranges, ETags, and large ones in parts."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flask.testing import FlaskClient
from hosting import PREFIX, gunicorn, mounted
from support import StartWorker, fresh_app

from mlqueue import MLQ, Job, Result, Settings, codec
from mlqueue.store.scripts import script
from mlqueue.store.store import CHUNK, Settle, common_of, encode_result
from mlqueue.web.results import ENCODED, SHOWN

JSON = {"Accept": "application/json"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
OCTETS = "application/octet-stream"

#: Media types that a browser shows or plays, and never runs.
INERT = ("image/avif", "image/bmp", "image/gif", "image/jpeg", "image/png", "image/webp", "audio/", "video/")
TEXTS = ("text/plain; charset=utf-8", "text/csv; charset=utf-8", "application/json")


@pytest.fixture(scope="module")
def one_mlq(server: Settings) -> Iterator[MLQ]:
    """A namespace for all tests that look at a job of their own and nothing else."""
    with fresh_app(server) as app:
        app.store.connector.execute("PING")  # its connection is none that a test leaves behind
        yield app


@pytest.fixture(scope="module")
def one_client(one_mlq: MLQ) -> FlaskClient:
    return mounted(one_mlq, allow_anonymous=True).test_client()


def ended(mlq: MLQ, value: object) -> str:
    """The id of a job that has ended with this, through the store alone."""
    actor = mlq.actor(lambda: None, actor_name="ended")
    job_id = actor.submit().id
    mlq.store.start_worker("w", {}, {"ended": "default"})
    command = mlq.store.turn_command("w", job_id, 1, [mlq.store.lane("default", "ended")], [])
    [held] = mlq.store.read_turn(mlq.store.connector.execute(*command, script=script("turn"))).jobs
    stored = encode_result(Result.of(value))
    if stored.chunks:
        mlq.store.write_chunks(held.id, f"r{held.attempt}", stored.chunks)
    assert [] == mlq.store.settle([Settle.finish(held.id, held.attempt, stored, common_of())])
    return held.id


def get(client: FlaskClient, job_id: str, end: str = "", **headers: str) -> Any:
    return client.get(
        f"{PREFIX}/jobs/{job_id}/result{end}", headers={name.replace("_", "-"): v for name, v in headers.items()}
    )


# What comes as what


@pytest.mark.parametrize(
    ("value", "kind", "body"),
    [
        (18, "application/json", b"18"),
        (0, "application/json", b"0"),
        (False, "application/json", b"false"),
        (None, "application/json", b"null"),
        (2.5, "application/json", b"2.5"),
        (float("nan"), "application/json", b'{"$float":"nan"}'),
        ("", "text/plain; charset=utf-8", b""),
        ("f\u00fcnf <b>", "text/plain; charset=utf-8", "f\u00fcnf <b>".encode()),
        ("x" * 3000, "text/plain; charset=utf-8", b"x" * 3000),
        ("\u00fc" * 40_000, "text/plain; charset=utf-8", ("\u00fc" * 40_000).encode()),
        ([1, "a"], "application/json", b'[1,"a"]'),
        ({"a": [None]}, "application/json", b'{"a":[null]}'),
        ({"a": b"x"}, "application/json", b'{"a":{"$bytes":"eA=="}}'),
        (datetime(2026, 1, 1, tzinfo=UTC), "application/json", b'{"$datetime":"2026-01-01T00:00:00+00:00"}'),
        (np.float32(0.5), "application/json", b"0.5"),
        (b"", OCTETS, b""),
        (b"x", OCTETS, b"x"),
        (PNG * 300, OCTETS, PNG * 300),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_result_comes_as_what_it_is(
    one_mlq: MLQ, one_client: FlaskClient, value: Any, kind: str, body: bytes
) -> None:
    answer = get(one_client, ended(one_mlq, value))
    assert (200, kind, body) == (answer.status_code, answer.content_type, answer.data)
    assert str(len(body)) == answer.headers["Content-Length"]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype="<f4").reshape(2, 3),
        np.arange(60_000, dtype="<i8").reshape(200, 300),
        np.asfortranarray(np.arange(60_000, dtype="<f8").reshape(200, 300)),
        np.arange(60_000)[::2],
        np.zeros((0, 5)),
        np.array([(1, 2.5)] * 1000, dtype=[("a", "<i4"), ("b", "<f8")]),
        np.arange(20_000).astype("datetime64[s]"),
        np.arange(2 * CHUNK // 8 + 1000, dtype="<f8"),
    ],
    ids=lambda array: f"{array.shape} {array.dtype} {'F' if array.flags.f_contiguous else 'C'}",
)
def test_an_array_comes_as_npy(mlq: MLQ, client: FlaskClient, array: Any) -> None:
    job_id = ended(mlq, array)
    answer = get(client, job_id)
    found = np.load(io.BytesIO(answer.data), allow_pickle=False)
    assert (200, OCTETS, f"attachment; filename={job_id}.npy") == (
        answer.status_code,
        answer.content_type,
        answer.headers["Content-Disposition"],
    )
    assert (array.dtype, array.shape, array.tobytes()) == (found.dtype, found.shape, found.tobytes())


def test_who_asks_for_json_gets_texts_and_arrays_as_json_and_bytes_as_they_are(mlq: MLQ, client: FlaskClient) -> None:
    assert "a text" == get(client, ended(mlq, "a text"), **JSON).json
    assert {"dtype", "shape", "data"} == set(get(client, ended(mlq, np.arange(3)), **JSON).json["$ndarray"])
    assert b"\x00\x01" == get(client, ended(mlq, b"\x00\x01"), **JSON).data


def test_who_asks_for_the_stored_encoding_loses_nothing(mlq: MLQ, client: FlaskClient) -> None:
    values: list[Any] = [
        (1, 2),
        {1: b"x"},
        datetime(2026, 1, 1, tzinfo=UTC),
        "text",
        b"bytes",
        np.arange(10_000.0),
        None,
    ]
    for value in values:
        answer = get(client, ended(mlq, value), Accept=ENCODED)
        assert ENCODED == answer.content_type
        found = codec.decode(answer.data)
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, found)
        else:
            assert (list(value) if isinstance(value, tuple) else value) == found


# Before the end, and other ends


def test_before_the_end_there_is_no_result(mlq: MLQ, client: FlaskClient) -> None:
    job_id = mlq.post(1)
    for end in ("/result", "/result.png", "/short_result"):
        answer = client.get(f"{PREFIX}/jobs/{job_id}{end}")
        assert (200, "[no result]", "text/plain; charset=utf-8") == (
            answer.status_code,
            answer.text,
            answer.content_type,
        )
    answer = get(client, job_id, **JSON)
    assert (404, "ResultMissing") == (answer.status_code, answer.json["code"])
    assert client.get(f"{PREFIX}/jobs/{job_id}/short_result", headers=JSON).json is None


def test_after_a_failure_the_error_stands_in_its_place(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker
) -> None:
    @mlq.actor(max_retries=0)
    def bad() -> None:
        raise ValueError("first line\nsecond line")

    job = bad.submit()
    start_worker()
    job.wait(10)
    assert "ValueError: first line\nsecond line" == get(client, job.id).text
    assert "ValueError: first line" == client.get(f"{PREFIX}/jobs/{job.id}/short_result").text
    answer = get(client, job.id, **JSON)
    assert (409, "JobFailed", job.id, "failed", "builtins.ValueError") == (
        answer.status_code,
        *(answer.json[name] for name in ("code", "job_id", "reason", "error_type")),
    )
    assert "in bad" in answer.json["remote_traceback"]


def test_a_cancelled_job_has_no_result(mlq: MLQ, client: FlaskClient) -> None:
    job_id = mlq.post(1)
    mlq.job(job_id).cancel()
    assert "cancelled" == get(client, job_id).text
    assert (409, "JobCancelled") == ((answer := get(client, job_id, **JSON)).status_code, answer.json["code"])


def test_a_result_that_has_been_removed_is_404(mlq: MLQ, client: FlaskClient) -> None:
    large, chunked = ended(mlq, bytes(10_000)), ended(mlq, bytes(CHUNK + 1))
    mlq.client.unlink(f"{mlq.store.root}:r:{large}", f"{mlq.store.root}:x:{chunked}:r1:0")
    for job_id in (large, chunked):
        answer = get(client, job_id)
        assert (404, "text/plain; charset=utf-8") == (answer.status_code, answer.content_type)


# What a browser may do with it


@pytest.mark.parametrize("extension", sorted(SHOWN))
def test_images_sound_films_and_text_are_shown(one_mlq: MLQ, one_client: FlaskClient, extension: str) -> None:
    answer = get(one_client, ended(one_mlq, PNG), f".{extension}")
    assert (SHOWN[extension], "inline") == (answer.content_type, answer.headers["Content-Disposition"])
    assert answer.content_type.startswith(INERT) or answer.content_type in TEXTS


@pytest.mark.parametrize(
    "extension",
    [
        *("html", "htm", "xhtml", "xht", "shtml", "svg", "svgz", "xml", "xsl", "xslt", "rss", "atom", "mht", "mhtml"),
        *("pdf", "js", "mjs", "css", "swf", "wasm", "hta", "htc", "bin", "exe", "zip", "npy", "HTML", "Svg", "pht"),
    ],
)
def test_what_a_browser_would_run_is_saved(one_mlq: MLQ, one_client: FlaskClient, extension: str) -> None:
    job_id = ended(one_mlq, b"<script>alert(1)</script>")
    answer = get(one_client, job_id, f".{extension}")
    assert (OCTETS, f"attachment; filename={job_id}.{extension.lower()}") == (
        answer.content_type,
        answer.headers["Content-Disposition"],
    )


@pytest.mark.parametrize(
    ("declared", "shown"),
    [
        ("image/png", "image/png"),
        ("IMAGE/PNG", "image/png"),
        ("video/mp4", "video/mp4"),
        ("application/json", "application/json"),
        ("text/plain; charset=latin-1", "text/plain; charset=utf-8"),
        ("text/html", None),
        ("image/svg+xml", None),
        ("application/pdf", None),
        ("text/javascript", None),
        ("application/xhtml+xml", None),
        ("multipart/x-mixed-replace; boundary=x", None),
        ("x/y", None),
    ],
)
def test_the_type_that_a_job_declares_is_used_only_if_a_browser_runs_none_of_it(
    one_mlq: MLQ, one_client: FlaskClient, declared: str, shown: str | None
) -> None:
    job_id = ended(one_mlq, Result(None, b"<script>alert(1)</script>", declared))
    answer = get(one_client, job_id)
    assert (shown or OCTETS) == answer.content_type
    assert ("inline" if shown else "attachment") == answer.headers["Content-Disposition"].partition(";")[0]


SCRIPT = b"<script>document.title='run'</script>"
#: Bytes that are several things at once, and what a result may be named.
POLYGLOTS: dict[str, bytes] = {
    "html": b"<!doctype html>" + SCRIPT,
    "html after a space": b" \n\t<html>" + SCRIPT,
    "html after a bom": b"\xef\xbb\xbf<html>" + SCRIPT,
    "html in utf-16": b"\xff\xfe" + "<html><script>alert(1)</script>".encode("utf-16-le"),
    "html in utf-7": b"+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "html in a comment": b"<!--x-->" + SCRIPT,
    "gif and script": b"GIF89a/*" + b"\x00" * 8 + b"*/=1;alert(1)//" + SCRIPT,
    "gif and html": b"GIF89a" + SCRIPT,
    "jpeg and html": b"\xff\xd8\xff\xe0\x00\x10JFIF" + SCRIPT,
    "jpeg and script": b"\xff\xd8\xff\xe0/*\x00\x10JFIF*/=alert(1)",
    "png and html": b"\x89PNG\r\n\x1a\n" + SCRIPT,
    "bmp and script": b"BM/*\x00\x00*/=1;alert(1)",
    "webp and html": b"RIFF\x00\x00\x00\x00WEBP" + SCRIPT,
    "wav and html": b"RIFF\x00\x00\x00\x00WAVE" + SCRIPT,
    "mp4 and html": b"\x00\x00\x00\x18ftypmp42" + SCRIPT,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "svg with an entity": b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "b">]><svg onload="alert(1)"/>',
    "xml with xslt": b'<?xml version="1.0"?><?xml-stylesheet type="text/xsl" href="#"?><x/>',
    "xhtml": b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><script>alert(1)</script></html>',
    "mathml": b'<math href="javascript:alert(1)">x</math>',
    "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(app.alert(1))>>>>",
    "pdf after html": b"<html>%PDF-1.7" + SCRIPT,
    "script": b"alert(1)",
    "jsonp": b"callback({})",
    "json with html": b'{"a": "' + SCRIPT + b'"}',
    "css": b"body{background:url(javascript:alert(1))}",
    "flash": b"FWS\x09",
    "zip and html": b"PK\x03\x04" + SCRIPT,
    "mhtml": b"MIME-Version: 1.0\nContent-Type: multipart/related\n\n<html>" + SCRIPT,
    "feed": b'<?xml version="1.0"?><rss version="2.0"><channel><title>' + SCRIPT + b"</title></channel></rss>",
    "headers": b"\r\nContent-Type: text/html\r\n\r\n" + SCRIPT,
}
NAMES = ("", ".html", ".jpg", ".png", ".gif", ".svg", ".xml", ".pdf", ".js", ".txt", ".json", ".mp4", ".css", ".csv")


@pytest.mark.parametrize("name", POLYGLOTS)
def test_no_polyglot_comes_as_anything_that_a_browser_would_run(
    one_mlq: MLQ, one_client: FlaskClient, name: str
) -> None:
    assert len(POLYGLOTS) >= 30
    content = POLYGLOTS[name]
    text = content.decode("latin-1")
    declared = ["text/html", "image/jpeg", "application/pdf"]
    ids = [ended(one_mlq, value) for value in (content, text, *(Result(None, content, kind) for kind in declared))]
    for job_id in ids:
        for end in NAMES:
            for accept in ("text/html", "application/json", ENCODED) if end in NAMES[:3] else ("*/*",):
                answer = get(one_client, job_id, end, Accept=accept)
                headers = answer.headers
                assert (200, "nosniff") == (answer.status_code, headers["X-Content-Type-Options"])
                assert "default-src 'none'" in headers["Content-Security-Policy"]
                assert headers["Content-Security-Policy"].endswith("; sandbox")
                assert "same-origin" == headers["Cross-Origin-Resource-Policy"]
                shown = answer.content_type.startswith(INERT) or answer.content_type in TEXTS
                saved = answer.content_type in (OCTETS, ENCODED)
                assert (shown, saved) == (
                    "inline" == headers["Content-Disposition"],
                    headers["Content-Disposition"].startswith("attachment; filename="),
                )


# Again, and in parts


def test_a_result_that_the_client_has_is_not_sent_again(mlq: MLQ, client: FlaskClient) -> None:
    job_id = ended(mlq, PNG)
    first = get(client, job_id)
    etag = first.headers["ETag"]
    for value in (etag, f'"x", {etag}', f"W/{etag}", "*"):
        again = get(client, job_id, If_None_Match=value)
        assert (304, b"", etag, None) == (again.status_code, again.data, again.headers["ETag"], again.content_type)
    assert 200 == get(client, job_id, If_None_Match='"x"').status_code
    assert etag != get(client, ended(mlq, PNG)).headers["ETag"]
    assert "private, no-cache" == first.headers["Cache-Control"]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("0-0", 0, 1), ("0-9", 0, 10), ("5-", 5, 264), ("-4", 260, 264), ("260-999", 260, 264), ("0-", 0, 264)],
)
def test_a_part_is_sent_where_a_part_is_asked_for(
    mlq: MLQ, client: FlaskClient, asked: str, first: int, last: int
) -> None:
    answer = get(client, ended(mlq, PNG), ".png", Range=f"bytes={asked}")
    assert (206, PNG[first:last], f"bytes {first}-{last - 1}/264") == (
        answer.status_code,
        answer.data,
        answer.headers["Content-Range"],
    )
    assert (str(last - first), "bytes") == (answer.headers["Content-Length"], answer.headers["Accept-Ranges"])


def test_a_part_that_is_not_there_is_416(mlq: MLQ, client: FlaskClient) -> None:
    for asked in ("bytes=264-", "bytes=999-1000"):
        answer = get(client, ended(mlq, PNG), Range=asked, Accept="application/json")
        assert (416, "RangeNotSatisfiable", "bytes */264") == (
            answer.status_code,
            answer.json["code"],
            answer.headers["Content-Range"],
        )


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-6", "bytes=-0", "items=0-5", "bytes=x", "0-5", "bytes=5-1", "bytes=" + "9" * 4000]
)
def test_a_range_that_is_none_of_one_part_is_left_aside(mlq: MLQ, client: FlaskClient, asked: str) -> None:
    answer = get(client, ended(mlq, PNG), Range=asked)
    assert answer.status_code in (200, 416)
    assert (answer.data if answer.status_code == 200 else PNG) == PNG


def test_a_download_goes_on_only_if_it_is_the_same_result(mlq: MLQ, client: FlaskClient) -> None:
    job_id = ended(mlq, PNG)
    etag = get(client, job_id).headers["ETag"]
    assert 206 == get(client, job_id, Range="bytes=10-", If_Range=etag).status_code
    assert (200, PNG) == (
        (answer := get(client, job_id, Range="bytes=10-", If_Range='"other"')).status_code,
        answer.data,
    )


def test_texts_arrays_and_json_have_ranges_too(mlq: MLQ, client: FlaskClient) -> None:
    array = np.arange(5000.0)
    for value in ("x" * 500 + "y", array, {"a": 1}):
        job_id = ended(mlq, value)
        whole = get(client, job_id).data
        for first, last in ((0, 3), (100, 200), (len(whole) - 5, len(whole))):
            part = get(client, job_id, Range=f"bytes={first}-{last - 1}")
            if first < len(whole):
                assert (206, whole[first:last]) == (part.status_code, part.data)


def test_head_has_the_headers_and_no_body(mlq: MLQ, client: FlaskClient) -> None:
    job_id = ended(mlq, PNG)
    answer = client.head(f"{PREFIX}/jobs/{job_id}/result.png")
    assert (200, b"", "264", "image/png") == (
        answer.status_code,
        answer.data,
        answer.headers["Content-Length"],
        answer.content_type,
    )


@pytest.mark.parametrize("size", [CHUNK - 6, CHUNK - 5, CHUNK - 4, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 17])
def test_a_result_in_chunks_is_whole_and_has_ranges_across_them(mlq: MLQ, client: FlaskClient, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    job_id = ended(mlq, content)
    assert content == get(client, job_id).data
    for first, last in ((CHUNK - 10, CHUNK + 10), (size - 3, size), (0, 1), (CHUNK - 5, CHUNK - 4)):
        if first < size:
            assert content[first:last] == get(client, job_id, Range=f"bytes={first}-{last - 1}").data


def test_a_large_result_is_not_held_in_memory(mlq: MLQ, client: FlaskClient) -> None:
    size = 64 * 2**20
    job_id = ended(mlq, bytes(size))
    client.get(f"{PREFIX}/healthz")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        answer = client.get(f"{PREFIX}/jobs/{job_id}/result", buffered=False)
        sent = sum(len(part) for part in answer.iter_encoded())
        peak = tracemalloc.get_traced_memory()[1] - before
        answer.close()
    finally:
        tracemalloc.stop()
    assert (str(size), size) == (answer.headers["Content-Length"], sent)
    assert peak < 20 * 2**20, f"{peak / 2**20:.0f} MiB"


# With a real server


@pytest.fixture
def served(mlq: MLQ, tmp_path: Path) -> Iterator[Any]:
    with gunicorn(mlq, tmp_path, "--threads", "4") as client:
        yield client


def test_a_server_streams_it_and_an_interrupted_download_goes_on(mlq: MLQ, served: Any) -> None:
    content = np.random.default_rng(0).bytes(3 * CHUNK + 1000)
    job_id = ended(mlq, content)
    with served.stream("GET", f"/jobs/{job_id}/result") as answer:
        got = b""
        for part in answer.iter_bytes():
            got += part
            if len(got) > CHUNK + 5000:
                break
        etag = answer.headers["ETag"]
    rest = served.get(f"/jobs/{job_id}/result", headers={"Range": f"bytes={len(got)}-", "If-Range": etag})
    assert (206, True) == (rest.status_code, got + rest.content == content)


def test_a_result_that_goes_while_it_is_sent_breaks_the_download_off(mlq: MLQ, served: Any) -> None:
    job_id = ended(mlq, bytes(6 * CHUNK))
    got = 0
    with served.stream("GET", f"/jobs/{job_id}/result") as answer:
        parts = answer.iter_bytes()
        got += len(next(parts))
        mlq.store.remove([job_id])
        with pytest.raises(httpx.RemoteProtocolError):
            got += sum(map(len, parts))
    assert "ok" == served.get("/healthz").text


def test_two_results_of_one_job_have_two_etags(mlq: MLQ, client: FlaskClient, start_worker: StartWorker) -> None:
    runs = []

    @mlq.actor(max_retries=1, min_backoff=1)
    def twice() -> str:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("once")
        return "done"

    job: Job[str] = twice.submit()
    start_worker()
    assert "done" == job.result(10)
    assert f'"{job.id}.2"' == get(client, job.id).headers["ETag"]
