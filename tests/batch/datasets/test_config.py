"""Where data sets live, and the functions of BatchUp's config module."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from fileserver import FileServer

from mlqueue.batch import config

CONTENT = b"some content"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, without the variable that all other tests set."""
    monkeypatch.delenv("MLQUEUE_DATA_HOME")
    home = tmp_path / "home"
    home.mkdir()
    return home


def test_the_first_that_names_a_home_wins(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mlqueue"
    assert config.get_batchup_path() == str(cache)
    (home / ".batchup").mkdir()
    assert config.get_batchup_path() == str(home / ".batchup")
    (home / ".batchup.cfg").write_text(f"[paths]\ndata_dir = {tmp_path / 'from_cfg'}\n")
    assert config.get_batchup_path() == str(tmp_path / "from_cfg")
    monkeypatch.setenv("BATCHUP_HOME", str(tmp_path / "from_batchup"))
    assert config.get_batchup_path() == str(tmp_path / "from_batchup")
    monkeypatch.setenv("MLQUEUE_DATA_HOME", str(tmp_path / "from_mlqueue"))
    assert config.get_batchup_path() == str(tmp_path / "from_mlqueue")


def test_the_home_is_made_and_data_lie_below_it(data_home: Path) -> None:
    assert config.get_data_dir() == str(data_home / "data")
    assert data_home.is_dir()
    assert config.get_data_path("x.h5") == str(data_home / "data" / "x.h5")
    assert config.get_data_path("/elsewhere/x.h5") == "/elsewhere/x.h5"


def test_a_tilde_is_the_users_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHUP_HOME", "~/sets")
    assert config.get_batchup_path() == str(home / "sets")


def test_a_home_that_is_a_file_is_an_error_that_says_who_named_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BATCHUP_HOME", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"from BATCHUP_HOME.* is a file"):
        config.get_batchup_path()


def test_a_home_that_cannot_be_made_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLQUEUE_DATA_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(RuntimeError, match="set MLQUEUE_DATA_HOME"):
        config.get_batchup_path()


@pytest.mark.parametrize("text", ["no section", "[paths]\ndata_dir", "[paths\n"])
def test_a_config_file_that_cannot_be_read_is_ignored_with_a_warning(
    home: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (home / ".batchup.cfg").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert config.get_config().sections() == []
    assert ".batchup.cfg" in caplog.text
    assert config.get_batchup_path().endswith("mlqueue")


def test_importing_everything_makes_no_file_and_imports_nothing_heavy(home: Path) -> None:
    program = (
        "import sys\n"
        "from mlqueue.batch import config, download\n"
        "from mlqueue.batch.image import utils\n"
        "from mlqueue.batch.datasets import (\n"
        "    catalogue, cifar10, cifar100, dataset, fashion_mnist, formats, hdf5, mnist, stl, svhn, usps)\n"
        "heavy = {'tables', 'scipy', 'h5py', 'platformdirs', 'click', 'requests', 'pooch', 'PIL', 'joblib', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert answer.stdout == "[]\n"
    assert list(home.iterdir()) == []


def test_compute_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    assert not config.verify_file(str(path), DIGEST)
    path.write_bytes(CONTENT)
    assert config.compute_sha256(str(path)) == DIGEST
    assert config.verify_file(str(path), DIGEST)
    assert config.verify_file(str(path), DIGEST.upper())
    assert not config.verify_file(str(path), "0" * 64)
    assert capsys.readouterr().out == ""
    assert config.verify_file(str(path), None)
    assert DIGEST in capsys.readouterr().out


def test_download_returns_at_once_when_there_is_a_file(server: FileServer, tmp_path: Path) -> None:
    server.files["x"] = CONTENT
    path = tmp_path / "new" / "x"
    assert config.download(str(path), server.url + "x") == str(path)
    assert path.read_bytes() == CONTENT
    path.write_bytes(b"mine")
    assert config.download(str(path), server.url + "x") == str(path)
    assert path.read_bytes() == b"mine"
    assert server.paths() == ["x"]


def test_download_data_and_copy_data_go_below_the_home(
    server: FileServer, data_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["x"] = CONTENT
    (tmp_path / "source").write_bytes(CONTENT)
    assert config.download_data("a/x", server.url + "x", DIGEST) == str(data_home / "data" / "a" / "x")
    assert config.copy_data("b/x", str(tmp_path / "source"), None) == str(data_home / "data" / "b" / "x")
    assert DIGEST in capsys.readouterr().out
    assert (data_home / "data" / "a" / "x").read_bytes() == CONTENT
    assert (data_home / "data" / "b" / "x").read_bytes() == CONTENT
    assert config.download_data("x", server.url + "gone", DIGEST) is None
    assert "HTTP 404" in capsys.readouterr().out


def test_a_copy_is_verified_and_all_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, copy = tmp_path / "source", tmp_path / "folder" / "copy"
    assert config.copy_and_verify(str(copy), str(source), DIGEST) is None
    assert "there is no file" in capsys.readouterr().out
    source.write_bytes(b"wrong")
    assert config.copy_and_verify(str(copy), str(source), DIGEST) is None
    assert "expected" in capsys.readouterr().out
    assert list(copy.parent.iterdir()) == []
    source.write_bytes(CONTENT)
    assert config.copy_and_verify(str(copy), str(source), DIGEST) == str(copy)
    source.unlink()
    assert config.copy_and_verify(str(copy), str(source), DIGEST) == str(copy)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_an_absolute_path_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MLQUEUE_DATA_HOME", str(tmp_path / "file"))
    assert config.get_data_path(str(tmp_path / "elsewhere")) == str(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="is a file"):
        config.get_data_path("here")
