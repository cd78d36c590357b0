"""Downloads: whole and verified, or nothing; resumed, mirrored, shared."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from children import Children, Telling
from fileserver import Fault, FileServer

from mlqueue.batch import config, download
from mlqueue.batch.download import DownloadFailed

CONTENT = np.random.default_rng(0).bytes(700_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "file.bin"


@pytest.fixture(autouse=True)
def content(server: FileServer) -> None:
    server.files["file.bin"] = CONTENT


def left_behind(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_a_file_comes_whole_and_nothing_lies_beside_it(server: FileServer, target: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    download.download([server.url + "file.bin"], target, sha256=DIGEST.upper(), progress=lambda *at: seen.append(at))
    assert target.read_bytes() == CONTENT
    assert left_behind(target) == []
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(
    server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal in (True, False):
        written: list[str] = []
        stream = Telling(written.append)
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        server.faults["file.bin"] = [Fault(cut_after=300_000)]
        download.download([server.url + "file.bin"], target)
        assert ("100%" in "".join(written), "file.bin" in "".join(written)) == (terminal, terminal)
        target.unlink()


def test_a_length_that_is_not_said_is_none(server: FileServer, target: Path) -> None:
    server.lengths = False
    totals: list[int | None] = []
    download.download([server.url + "file.bin"], target, progress=lambda done, total: totals.append(total))
    assert target.read_bytes() == CONTENT
    assert set(totals) == {None}


def test_a_cut_connection_is_resumed_where_it_was(server: FileServer, target: Path) -> None:
    server.faults["file.bin"] = [Fault(cut_after=300_000), Fault(cut_after=200_000)]
    download.download([server.url + "file.bin"], target)
    assert target.read_bytes() == CONTENT
    assert [request.range for request in server.requests] == [None, "bytes=300000-", "bytes=500000-"]
    assert [request.status for request in server.requests] == [200, 206, 206]


def test_a_later_call_goes_on_from_what_an_earlier_one_left(server: FileServer, target: Path) -> None:
    server.faults["file.bin"] = [Fault(cut_after=300_000)] + [Fault(status=503)] * 2
    with pytest.raises(DownloadFailed, match=r"HTTP 503.*tried 3 times"):
        download.download([server.url + "file.bin"], target)
    assert not target.exists()
    download.download([server.url + "file.bin"], target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1].range == "bytes=300000-"
    assert left_behind(target) == []


def test_a_file_that_changed_on_the_server_is_not_mixed_with_its_old_half(server: FileServer, target: Path) -> None:
    server.faults["file.bin"] = [Fault(cut_after=300_000)] + [Fault(status=500)] * 2
    with pytest.raises(DownloadFailed):
        download.download([server.url + "file.bin"], target)
    server.files["file.bin"] = changed = CONTENT[::-1]
    download.download([server.url + "file.bin"], target)
    assert target.read_bytes() == changed
    assert server.requests[-1].if_range is not None


def test_halves_of_two_files_are_found_out_by_the_digest_and_fetched_afresh(server: FileServer, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes(b"x" * 300_000)
    server.etags = False
    download.download([server.url + "file.bin"], target, sha256=DIGEST)
    assert target.read_bytes() == CONTENT
    assert [request.range for request in server.requests] == ["bytes=300000-", None]


def test_without_digest_and_entity_tag_a_half_is_not_trusted(server: FileServer, target: Path) -> None:
    server.etags = False
    server.faults["file.bin"] = [Fault(cut_after=300_000)]
    download.download([server.url + "file.bin"], target)
    assert target.read_bytes() == CONTENT
    assert [request.range for request in server.requests] == [None, None]


def test_a_server_without_ranges_sends_it_all_again(server: FileServer, target: Path) -> None:
    server.ranges = False
    server.faults["file.bin"] = [Fault(cut_after=300_000)]
    download.download([server.url + "file.bin"], target, sha256=DIGEST)
    assert target.read_bytes() == CONTENT
    assert [request.status for request in server.requests] == [200, 200]


def test_a_part_that_was_whole_already_needs_no_byte_more(server: FileServer, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes(CONTENT)
    download.download([server.url + "file.bin"], target, sha256=DIGEST)
    assert target.read_bytes() == CONTENT
    assert [request.status for request in server.requests] == [416]


def test_a_part_longer_than_the_file_is_thrown_away(server: FileServer, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes(CONTENT + b"more")
    download.download([server.url + "file.bin"], target, sha256=DIGEST)
    assert target.read_bytes() == CONTENT
    assert [request.status for request in server.requests] == [416, 200]


def test_a_part_that_grew_longer_than_the_file_is_thrown_away_without_a_digest_too(
    server: FileServer, target: Path
) -> None:
    server.faults["file.bin"] = [Fault(cut_after=300_000)] + [Fault(status=500)] * 2
    with pytest.raises(DownloadFailed):
        download.download([server.url + "file.bin"], target)
    with target.with_name("file.bin.part").open("ab") as part:
        part.write(bytes(len(CONTENT)))
    download.download([server.url + "file.bin"], target)
    assert target.read_bytes() == CONTENT
    assert [request.status for request in server.requests[-2:]] == [416, 200]


def test_a_range_other_than_the_one_asked_for_is_not_appended(server: FileServer, target: Path) -> None:
    server.faults["file.bin"] = [Fault(cut_after=300_000), Fault(shifted=1000)]
    download.download([server.url + "file.bin"], target)
    assert target.read_bytes() == CONTENT
    assert [request.status for request in server.requests] == [200, 206, 200]


def test_tries_that_get_further_do_not_count(server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MIN_PROGRESS", 50_000)
    server.faults["file.bin"] = [Fault(cut_after=100_000)] * 6
    download.download([server.url + "file.bin"], target)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 7


def test_mirrors_are_tried_in_order_and_a_missing_file_is_not_asked_for_twice(server: FileServer, target: Path) -> None:
    server.files["wrong/file.bin"] = b"something else"
    urls = [server.url + name for name in ("gone/file.bin", "wrong/file.bin", "file.bin")]
    download.download(urls, target, sha256=DIGEST)
    assert target.read_bytes() == CONTENT
    assert server.paths() == ["gone/file.bin", "wrong/file.bin", "file.bin"]


def test_a_mirror_continues_what_the_first_address_began(server: FileServer, target: Path) -> None:
    server.files["mirror/file.bin"] = CONTENT
    server.faults["file.bin"] = [Fault(cut_after=300_000)] + [Fault(status=500)] * 2
    download.download([server.url + "file.bin", server.url + "mirror/file.bin"], target, sha256=DIGEST)
    assert target.read_bytes() == CONTENT
    assert (server.requests[-1].path, server.requests[-1].range) == ("mirror/file.bin", "bytes=300000-")


def test_a_failure_names_every_address_and_its_reason(server: FileServer, target: Path) -> None:
    server.files["wrong.bin"] = b"something else"
    urls = [server.url + "gone.bin", server.url + "wrong.bin", "nonsense"]
    with pytest.raises(DownloadFailed) as failure:
        download.download(urls, target, sha256=DIGEST)
    message = str(failure.value)
    assert "gone.bin: HTTP 404" in message
    assert f"has the SHA-256 {hashlib.sha256(b'something else').hexdigest()}, expected {DIGEST}" in message
    assert "nonsense: unknown url type" in message
    assert isinstance(failure.value, OSError)
    assert left_behind(target) == []
    assert not target.exists()


def test_a_server_that_is_not_there_is_an_error_with_its_reason(target: Path) -> None:
    with pytest.raises(DownloadFailed, match="refused"):
        download.download(["http://127.0.0.1:9/file.bin"], target)


def test_a_server_that_falls_silent_is_given_up(server: FileServer, target: Path) -> None:
    answer = threading.Event()
    server.faults["file.bin"] = [Fault(until=answer)] * 3
    try:
        with pytest.raises(DownloadFailed, match="timed out"):
            download.download([server.url + "file.bin"], target, timeout=0.05)
    finally:
        answer.set()


def test_a_file_that_is_there_with_the_right_digest_is_not_fetched(server: FileServer, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    assert config.download_and_verify(str(target), server.url + "file.bin", DIGEST) == str(target)
    assert server.requests == []


def test_a_file_that_is_there_with_a_wrong_digest_is_replaced(server: FileServer, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"half of it")
    assert config.download_and_verify(str(target), server.url + "file.bin", DIGEST) == str(target)
    assert target.read_bytes() == CONTENT


def test_a_wrong_file_stays_where_it_is_when_no_right_one_can_be_had(target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"the user's own")
    assert config.download_and_verify(str(target), "http://127.0.0.1:9/file.bin", DIGEST) is None
    assert target.read_bytes() == b"the user's own"


def test_addresses_of_local_files_work(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(CONTENT)
    assert config.download(str(target), source.as_uri()) == str(target)
    assert target.read_bytes() == CONTENT


def test_a_redirect_is_followed_but_not_from_https_to_http() -> None:
    handler = download._NoDowngrade()
    secure = urllib.request.Request("https://a/x")
    followed = handler.redirect_request(secure, io.BytesIO(), 302, "Found", {}, "https://b/x")
    assert followed is not None
    assert followed.full_url == "https://b/x"
    with (
        pytest.raises(urllib.error.HTTPError, match="redirected from https to http://b/x") as refused,
        io.BytesIO() as body,
    ):
        handler.redirect_request(secure, body, 302, "Found", {}, "http://b/x")
    refused.value.close()


def test_urls_must_be_a_sequence(target: Path) -> None:
    with pytest.raises(ValueError, match="sequence"):
        download.download("http://127.0.0.1:9/file.bin", target)


def _download(url: str, target: Path) -> None:
    download.download([url], target, sha256=DIGEST)


def test_two_processes_make_one_download(server: FileServer, target: Path) -> None:
    answer = threading.Event()
    server.faults["file.bin"] = [Fault(until=answer)]
    children = Children(2, _download, server.url + "file.bin", target)
    children.hear("waiting for the download of file.bin")  # one has asked, the other is at the lock
    answer.set()
    assert children.end() == [0, 0]
    assert target.read_bytes() == CONTENT
    assert server.paths() == ["file.bin"]
    assert left_behind(target) == []


def test_a_lock_is_waited_for_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.lock"
    order: list[str] = []
    inside, leave, waiting = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "stderr", Telling(lambda text: "waiting for x" in text and waiting.set()))

    def hold() -> None:
        with download.locked(path, "x"):
            inside.set()
            leave.wait(20)
            order.append("first")

    def wait() -> None:
        with download.locked(path, "x"):
            order.append("second")

    threads = [threading.Thread(target=hold), threading.Thread(target=wait)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    assert waiting.wait(20)
    leave.set()
    for thread in threads:
        thread.join(20)
    assert order == ["first", "second"]
    assert not path.exists()


def test_a_lock_file_of_a_dead_process_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.touch()
    with download.locked(path, "x"):
        assert path.exists()
    assert not path.exists()


def test_a_lock_excludes_under_contention(tmp_path: Path) -> None:
    path, counter = tmp_path / "x.lock", tmp_path / "counter"
    counter.write_text("0")

    def count() -> None:
        for _ in range(50):
            with download.locked(path, "x"):
                value = int(counter.read_text())
                os.sched_yield()
                counter.write_text(str(value + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counter.read_text() == "200"
