"""Bodies without measure: too large, too deep, too many values; and never more memory than a few times the limit."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from hosting import PREFIX, gunicorn, mounted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlqueue import MLQ, codec

KIB = 2**10
LIMIT = 2**20


@pytest.fixture
def small(mlq: MLQ) -> FlaskClient:
    return mounted(mlq, allow_anonymous=True, max_body=64 * KIB).test_client()


def test_a_body_larger_than_allowed_is_413_and_is_not_read(small: FlaskClient) -> None:
    class Body(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise AssertionError("a byte of it was read")

    for path in ("jobs", "jobs/bulk"):
        answer = small.post(
            f"{PREFIX}/{path}",
            input_stream=Body(),
            content_type="application/json",
            headers={"Accept": "application/json"},
            environ_overrides={"CONTENT_LENGTH": str(64 * KIB + 1)},
        )
        assert (413, "BodyTooLarge") == (answer.status_code, answer.json["code"])
        assert "65,536 bytes" in answer.json["detail"]


def test_a_body_as_large_as_allowed_is_taken(mlq: MLQ, small: FlaskClient) -> None:
    text = "x" * (64 * KIB - len('{"msg":""}'))
    answer = small.post(f"{PREFIX}/jobs", data=f'{{"msg":"{text}"}}', content_type="application/json")
    assert (202, text) == (answer.status_code, mlq.get_job(answer.text)["msg"])


@pytest.mark.parametrize("part", ["file", "text"])
def test_a_form_larger_than_allowed_is_413(small: FlaskClient, part: str) -> None:
    data = {"msg": (io.BytesIO(bytes(64 * KIB)), "a")} if part == "file" else {"msg": "x" * 64 * KIB}
    assert 413 == small.post(f"{PREFIX}/jobs", data=data, content_type="multipart/form-data").status_code


def test_a_form_of_more_parts_than_anybody_needs_is_413(small: FlaskClient) -> None:
    parts = b"".join(b'--b\r\nContent-Disposition: form-data; name="p"\r\n\r\n\r\n' for _ in range(1200))
    answer = small.post(f"{PREFIX}/jobs", data=parts + b"--b--", content_type="multipart/form-data; boundary=b")
    assert 413 == answer.status_code


def nested_json(depth: int) -> bytes:
    return b'{"msg": ' + b"[" * depth + b"]" * depth + b"}"


def nested_msgpack(depth: int) -> bytes:
    return b"\x81\xa3msg" + b"\x91" * depth + b"\xc0"


def test_depth_is_bounded(mlq: MLQ, client: FlaskClient) -> None:
    def post(body: bytes, kind: str) -> int:
        return client.post(f"{PREFIX}/jobs", data=body, content_type=kind).status_code

    assert 202 == post(nested_json(codec.MAX_DEPTH - 3), "application/json")
    for depth in (codec.MAX_DEPTH + 1, 900, 10_000, 400_000):
        assert 422 == post(nested_json(depth), "application/json"), depth
    for depth in (codec.MAX_DEPTH + 1, 900, 10_000, 400_000):
        assert 400 == post(nested_msgpack(depth), "application/msgpack"), depth
    assert 422 == post(b'{"msg": ' + b'{"a": ' * 900 + b"1" + b"}" * 900 + b"}", "application/json")


#: Bodies of about a MiB that would need many times as much: name, media type, what makes them.
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty lists": ("application/json", lambda: b'{"msg": [' + b"[]," * 340_000 + b"[]]}"),
    "empty objects": ("application/json", lambda: b'{"msg": [' + b"{}," * 340_000 + b"{}]}"),
    "numbers": ("application/json", lambda: b'{"msg": [' + b"999," * 255_000 + b"1]}"),
    "texts": ("application/json", lambda: b'{"msg": [' + b'"ab",' * 200_000 + b"1]}"),
    "keys": ("application/json", lambda: b'{"msg": {' + b",".join(b'"%x":0' % n for n in range(110_000)) + b"}}"),
    "objects of one": ("application/json", lambda: b'{"msg": [' + b'{"a":0},' * 120_000 + b"1]}"),
    "lists of one": ("application/json", lambda: b'{"msg": [' + b"[0]," * 250_000 + b"1]}"),
    "large numbers": ("application/json", lambda: b'{"msg": [' + b"9" * 900_000 + b"]}"),
    "empty maps": ("application/msgpack", lambda: b"\x81\xa3msg\xdd\x00\x0f\x00\x00" + b"\x80" * 0xF0000),
    "empty arrays": ("application/msgpack", lambda: b"\x81\xa3msg\xdd\x00\x0f\x00\x00" + b"\x90" * 0xF0000),
    "claims": ("application/msgpack", lambda: b"\x81\xa3msg" + b"\xdd\x00\x0f\x00\x00" * 60 + b"\x01" * 0xF0000),
    "claims of maps": (
        "application/msgpack",
        lambda: b"\x81\xa3msg" + b"\xdf\x00\x07\x00\x00" * 60 + b"\x01" * 0xF0000,
    ),
    "nested": ("application/msgpack", lambda: nested_msgpack(1_000_000)),
    "frame": ("application/msgpack", lambda: b"\xc1MQ1\x00\x00\x0f\x00" + b"\xdd\x00\x0e\x00\x00" + b"\x80" * 0xF0000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_body_that_is_refused_takes_more_than_three_times_the_limit(client: FlaskClient, name: str) -> None:
    """F26."""
    kind, make = BOMBS[name]
    body = make()
    assert 0.5 * LIMIT < len(body) <= LIMIT
    client.post(f"{PREFIX}/jobs", data=b"{}", content_type="application/json")  # what is imported late, is by now
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        answer = client.post(f"{PREFIX}/jobs", data=body, content_type=kind)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert answer.status_code in (400, 413, 422), answer.text
    assert peak < 3 * LIMIT, f"{peak / LIMIT:.1f} times the limit"


#: Bodies of about a MiB that are taken: name, media type, what makes them.
TAKEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "text": ("application/json", lambda: b'{"msg": "' + b"x" * (LIMIT - 100) + b'"}'),
    "texts": ("application/json", lambda: b'{"msg": ["' + b'","'.join([b"x" * 47] * 20_000) + b'"]}'),
    "escapes": ("application/json", lambda: b'{"msg": "' + b"\\u00e9" * 170_000 + b'"}'),
    "bytes": ("application/msgpack", lambda: b"\x81\xa3msg\xc6\x00\x0f\xf0\x00" + bytes(0xFF000)),
    "a file": (
        "multipart/form-data; boundary=b",
        lambda: (
            b'--b\r\nContent-Disposition: form-data; name="msg"; filename="a"\r\n\r\n'
            + b"x" * (LIMIT - 200)
            + b"\r\n--b--"
        ),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k", "Accept": "application/json"}], ids=["", "with key"])
def test_a_body_that_is_taken_takes_no_more_than_three_times_the_limit(
    client: FlaskClient, name: str, headers: dict[str, str]
) -> None:
    """F26. That is: what is parsed, what is sent, and the buffer in which that was encoded; of the last another half is
    asked for, but never touched."""
    kind, make = TAKEN[name]
    body = io.BytesIO(make())
    size = len(body.getvalue())
    assert 0.9 * LIMIT < size <= LIMIT
    client.post(f"{PREFIX}/jobs", json={"msg": 1})  # what is imported late, is by now
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        length: Any = {"CONTENT_LENGTH": str(size)}
        answer = client.post(
            f"{PREFIX}/jobs", input_stream=body, content_type=kind, headers=headers, environ_overrides=length
        )
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert 202 == answer.status_code, answer.text
    assert peak < 4.1 * LIMIT, f"{peak / LIMIT:.1f} times the limit"


def test_a_text_with_many_commas_is_not_many_values(mlq: MLQ, client: FlaskClient) -> None:
    text = ('1,2,[3],{4},\\"5\\",') * 10_000
    answer = client.post(f"{PREFIX}/jobs", data=f'{{"msg": "{text}"}}', content_type="application/json")
    assert (202, text.replace("\\", "")) == (answer.status_code, mlq.get_job(answer.text)["msg"])


def test_too_many_values_are_refused_with_the_cure(client: FlaskClient) -> None:
    answer = client.post(f"{PREFIX}/jobs", json={"msg": [1] * 100_000})
    assert (422, True) == (answer.status_code, "as bytes, or in a MessagePack body" in answer.text)


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=JSON_LIKE | st.fixed_dictionaries({"msg": JSON_LIKE}, optional={"tags": JSON_LIKE, "delay": JSON_LIKE}))
def test_whatever_json_comes_is_taken_or_refused(client: FlaskClient, body: Any) -> None:
    assert client.post(f"{PREFIX}/jobs", json=body).status_code in (202, 400, 415, 422)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: b"\x81\xa3msg" + tail),
    kind=st.sampled_from(["application/json", "application/msgpack", "multipart/form-data; boundary=b"]),
)
def test_whatever_bytes_come_are_taken_or_refused(client: FlaskClient, body: bytes, kind: str) -> None:
    answer = client.post(f"{PREFIX}/jobs", data=body, content_type=kind)
    assert answer.status_code in (202, 400, 415, 422), answer.text


# With a real server


@pytest.fixture
def served(mlq: MLQ, tmp_path: Path) -> Iterator[Any]:
    with gunicorn(mlq, tmp_path, "--threads", "4", MAX_BODY=str(64 * KIB)) as client:
        yield client


def test_a_server_reads_no_more_than_the_limit_of_a_body_without_a_length(served: Any) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += KIB
            yield b" " * KIB

    try:
        answer = served.post("/jobs", content=chunks(), headers={"Content-Type": "application/json"})
        assert 413 == answer.status_code, answer.text
    except OSError:
        pass  # it has closed the connection on us
    assert sent < 10_000 * KIB or answer.status_code == 413
    assert "ok" == served.get("/healthz").text
