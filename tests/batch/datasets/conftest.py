"""A folder for data sets of each test's own, a file server, and small data sets published on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fileserver import FileServer, Publish

from mlqueue.batch import download
from mlqueue.batch.datasets.dataset import DownloadSourceFile


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder for data sets; nothing of the user's is seen or touched."""
    home = tmp_path / "home" / "sets"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLQUEUE_DATA_HOME", str(home))
    monkeypatch.delenv("BATCHUP_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(download, "RETRY_PAUSE", 0.0)
    return home


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture
def publish(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Serve these contents as the files of shipped sources, whose address and digest are made theirs."""

    def publish(sources: Sequence[DownloadSourceFile], contents: Sequence[bytes]) -> None:
        for number, (source, content) in enumerate(zip(sources, contents, strict=True)):
            name = f"{number}/{source.filename}"
            server.files[name] = content
            monkeypatch.setattr(source, "url", server.url + name)
            monkeypatch.setattr(source, "mirrors", ())
            monkeypatch.setattr(source, "sha256", hashlib.sha256(content).hexdigest())

    return publish
