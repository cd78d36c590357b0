"""``mlqueue datasets``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import published
import pytest
from click.testing import CliRunner, Result
from fileserver import FileServer, Publish

from mlqueue.batch.cli import datasets
from mlqueue.batch.datasets import fashion_mnist, mnist


def run(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(datasets, arguments, input=answer, prog_name="mlqueue datasets")


@pytest.fixture
def digits(publish: Publish) -> None:
    """MNIST, of a few digits."""
    images, labels = np.zeros((10, 28, 28), np.uint8), np.arange(10)
    publish(mnist._SOURCES, [published.idx(array) for array in (images, labels, images, labels)])


@pytest.mark.usefixtures("digits")
def test_fetch_list_path_rm(data_home: Path, server: FileServer) -> None:
    path = data_home / "data" / "mnist.h5"
    listed = run("list")
    assert listed.exit_code == 0
    assert "mnist          MNIST             not here, 12 MB to fetch" in listed.stdout
    assert len(listed.stdout.splitlines()) == 8

    asked = run("path", "mnist")
    assert (asked.exit_code, asked.stdout) == (3, "")
    assert "run `mlqueue datasets fetch mnist`" in asked.stderr

    fetched = run("fetch", "mnist")
    assert (fetched.exit_code, fetched.stdout) == (0, f"{path}\n")
    assert path.exists()
    assert run("fetch", "mnist").stdout == f"{path}\n"
    assert len(server.requests) == 4

    assert run("path", "mnist").stdout == f"{path}\n"
    assert str(path) in run("list").stdout

    kept = run("rm", "mnist", answer="n\n")
    assert kept.exit_code == 1
    assert path.exists()
    removed = run("rm", "mnist", answer="y\n")
    assert removed.exit_code == 0
    assert "mnist: removed, 0.0 MB" in removed.stdout
    assert not path.exists()
    assert "mnist: was not here" in run("rm", "mnist").stdout


@pytest.mark.usefixtures("digits")
def test_list_for_programs() -> None:
    run("fetch", "mnist")
    facts = {entry["name"]: entry for entry in json.loads(run("list", "--json").stdout)}
    assert facts["mnist"]["fetched"] is True
    assert facts["mnist"]["bytes"] == Path(facts["mnist"]["path"]).stat().st_size
    assert facts["mnist"]["class"] == "mlqueue.batch.datasets.mnist.MNIST"
    assert (facts["stl"]["fetched"], facts["stl"]["bytes"]) == (False, None)


def test_path_without_a_name_is_the_folder(data_home: Path) -> None:
    assert run("path").stdout == f"{data_home / 'data'}\n"


def test_rm_all_removes_everything_without_asking_when_told(data_home: Path, publish: Publish) -> None:
    images, labels = np.zeros((10, 28, 28), np.uint8), np.arange(10)
    for module in (mnist, fashion_mnist):
        publish(module._SOURCES, [published.idx(array) for array in (images, labels, images, labels)])
        assert run("fetch", module.__name__.rpartition(".")[2]).exit_code == 0
    assert len(list((data_home / "data").iterdir())) == 2
    assert run("rm", "--all", "--yes").exit_code == 0
    assert list((data_home / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "minst"], "Did you mean mnist?"),
        (["path", "minst"], "Did you mean mnist?"),
        (["rm", "minst"], "Did you mean mnist?"),
        (["fetch"], "name data sets"),
        (["rm", "mnist", "--all"], "name data sets"),
    ],
)
def test_misuse_ends_with_2_and_says_what_there_is(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.usefixtures("digits")
def test_a_fetch_that_fails_ends_with_1_and_its_reason(server: FileServer) -> None:
    server.files.clear()
    result = run("fetch", "mnist")
    assert result.exit_code == 1
    assert "HTTP 404" in result.stderr
    assert result.stdout == ""


def test_a_home_that_is_a_file_is_told_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLQUEUE_DATA_HOME", str(tmp_path / "file"))
    result = run("list")
    assert result.exit_code == 1
    assert "from MLQUEUE_DATA_HOME" in result.stderr


def test_without_a_command_it_says_which_there_are() -> None:
    told = run()
    assert (told.exit_code, told.stdout) == (2, "")
    assert [line.split()[0] for line in told.stderr.splitlines()[-4:]] == ["fetch", "list", "path", "rm"]
