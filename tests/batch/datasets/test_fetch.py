"""Source files, and the fetch that converts them all or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from children import Children
from fileserver import Fault, FileServer

from mlqueue.batch import config
from mlqueue.batch.datasets.dataset import (
    AbstractSourceFile,
    BadSourceFile,
    CopySourceFile,
    DatasetFetch,
    DatasetUnavailable,
    DownloadSourceFile,
    ExistingSourceFile,
    delete_dataset_cache,
    fetch_and_convert_dataset,
    path_string,
)

CONTENT = b"the numbers"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def tree(folder: Path) -> list[str]:
    """Every file below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def joined(source_paths: list[str], target_path: str) -> str:
    """A conversion: the sources one after the other."""
    Path(target_path).write_bytes(b"+".join(Path(path).read_bytes() for path in source_paths))
    return target_path


@pytest.fixture
def one(server: FileServer) -> DownloadSourceFile:
    server.files["one.gz"] = CONTENT
    return DownloadSourceFile("one.gz", base_url=server.url, sha256=DIGEST)


@pytest.fixture
def two(server: FileServer) -> DownloadSourceFile:
    server.files["elsewhere"] = b"more"
    return DownloadSourceFile("two.gz", url=server.url + "elsewhere", sha256=hashlib.sha256(b"more").hexdigest())


def test_a_fetch_converts_once_and_leaves_only_the_target(
    server: FileServer, data_home: Path, one: DownloadSourceFile, two: DownloadSourceFile
) -> None:
    fetch = fetch_and_convert_dataset([one, two], "set.bin")(joined)
    assert fetch.__name__ == "joined"
    path = fetch()
    assert path == str(data_home / "data" / "set.bin")
    assert Path(path).read_bytes() == CONTENT + b"+more"
    assert tree(data_home) == ["data/set.bin"]
    assert fetch() == path
    assert server.paths() == ["one.gz", "elsewhere"]
    delete_dataset_cache("set.bin")
    assert tree(data_home) == []
    assert fetch() == path
    assert len(server.requests) == 4


def test_the_target_may_be_named_by_a_function_and_lie_anywhere(tmp_path: Path, one: DownloadSourceFile) -> None:
    path = tmp_path / "other" / "set.bin"
    fetch = fetch_and_convert_dataset([one], lambda: str(path))(joined)
    assert fetch() == str(path)
    assert tree(path.parent) == ["set.bin"]


def test_a_source_that_cannot_be_had_is_told_and_the_others_are_kept(
    server: FileServer, data_home: Path, one: DownloadSourceFile, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = DownloadSourceFile("two.gz", base_url=server.url)
    fetch = fetch_and_convert_dataset([one, missing], "set.bin")(joined)
    assert fetch() is None
    assert "two.gz: HTTP 404" in capsys.readouterr().out
    assert tree(data_home) == ["data/temp/set.bin/one.gz"]
    with pytest.raises(DatasetUnavailable, match=r"two.gz: HTTP 404"):
        fetch.require()
    server.files["two.gz"] = b"now"
    assert fetch() is not None
    assert server.paths().count("one.gz") == 1
    assert tree(data_home) == ["data/set.bin"]


def test_a_conversion_that_fails_leaves_no_target(server: FileServer, data_home: Path, one: DownloadSourceFile) -> None:
    failures: list[BaseException | None] = [RuntimeError("stumbled"), KeyboardInterrupt(), None]

    def convert(source_paths: list[str], target_path: str) -> str | None:
        Path(target_path).write_bytes(b"half")
        if (failure := failures.pop(0)) is not None:
            raise failure
        return None

    fetch = fetch_and_convert_dataset([one], "set.bin")(convert)
    with pytest.raises(RuntimeError, match="stumbled"):
        fetch()
    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert fetch() is None
    assert tree(data_home) == ["data/temp/set.bin/one.gz"]
    assert server.paths() == ["one.gz"]  # verified, and therefore used again


def test_a_bad_source_without_a_digest_is_not_kept(server: FileServer, data_home: Path) -> None:
    def convert(source_paths: list[str], target_path: str) -> str:
        if Path(source_paths[0]).read_bytes() != CONTENT:
            raise BadSourceFile("one.gz is damaged")
        return joined(source_paths, target_path)

    server.files["one.gz"] = b"rubbish"
    fetch = fetch_and_convert_dataset([DownloadSourceFile("one.gz", base_url=server.url)], "set.bin")(convert)
    with pytest.raises(BadSourceFile):
        fetch()
    assert tree(data_home) == []
    server.files["one.gz"] = CONTENT
    assert fetch() is not None


def test_a_conversion_that_returns_the_target_unwritten_is_an_error(data_home: Path, one: DownloadSourceFile) -> None:
    fetch = fetch_and_convert_dataset([one], "set.bin")(lambda source_paths, target_path: target_path)
    with pytest.raises(FileNotFoundError, match="did not write it"):
        fetch()
    assert not (data_home / "data" / "set.bin").exists()


def test_a_conversion_may_move_its_source(data_home: Path, one: DownloadSourceFile) -> None:
    def move(source_paths: list[str], target_path: str) -> str:
        shutil.move(source_paths[0], target_path)
        return target_path

    assert fetch_and_convert_dataset([one], "set.bin")(move)() == str(data_home / "data" / "set.bin")
    assert tree(data_home) == ["data/set.bin"]


def test_a_conversion_may_name_another_place_or_give_up(
    tmp_path: Path, data_home: Path, one: DownloadSourceFile
) -> None:
    def elsewhere(source_paths: list[str], target_path: str) -> Path:
        return Path(shutil.copy(source_paths[0], tmp_path / "elsewhere"))

    assert fetch_and_convert_dataset([one], "set.bin")(elsewhere)() == str(tmp_path / "elsewhere")
    assert tree(data_home) == []
    fetch = fetch_and_convert_dataset([one], "set.bin")(lambda source_paths, target_path: None)
    with pytest.raises(DatasetUnavailable, match="the conversion returned None"):
        fetch.require()


def test_a_target_may_be_a_folder(data_home: Path, one: DownloadSourceFile) -> None:
    def unpack(source_paths: list[str], target_path: str) -> str:
        Path(target_path).mkdir()
        shutil.copy(source_paths[0], Path(target_path, "inside"))
        return target_path

    path = fetch_and_convert_dataset([one], "folder")(unpack)()
    assert path is not None
    assert (Path(path) / "inside").read_bytes() == CONTENT
    delete_dataset_cache("folder")
    assert not Path(path).exists()


def test_two_sets_with_files_of_one_name_do_not_take_each_others(server: FileServer, data_home: Path) -> None:
    server.files |= {"digits/images.gz": b"digits", "clothes/images.gz": b"clothes"}
    digits = fetch_and_convert_dataset(
        [
            DownloadSourceFile("images.gz", base_url=server.url + "digits/"),
            DownloadSourceFile("labels.gz", base_url=server.url + "digits/"),
        ],
        "digits.bin",
    )(joined)
    clothes = fetch_and_convert_dataset(
        [DownloadSourceFile("images.gz", base_url=server.url + "clothes/")], "clothes.bin"
    )(joined)
    assert digits() is None  # its images are here now, its labels cannot be had
    assert "data/temp/digits.bin/images.gz" in tree(data_home)
    path = clothes()
    assert path is not None
    assert Path(path).read_bytes() == b"clothes"


def test_two_targets_of_one_name_in_different_folders_keep_their_sources_apart(
    tmp_path: Path, server: FileServer
) -> None:
    places: list[str] = []

    def note(source_paths: list[str], target_path: str) -> None:
        places.extend(source_paths)

    server.files["x"] = b"x"
    for folder in ("a", "b"):
        source = DownloadSourceFile("x", base_url=server.url)
        assert fetch_and_convert_dataset([source], str(tmp_path / folder / "set.bin"))(note)() is None
    assert len(set(places)) == 2


def test_two_sources_at_one_path_are_refused(server: FileServer, one: DownloadSourceFile) -> None:
    fetch = fetch_and_convert_dataset([one, one], "set.bin")(joined)
    with pytest.raises(ValueError, match="two source files"):
        fetch()


def test_misuse_raises_when_decorating(one: DownloadSourceFile) -> None:
    with pytest.raises(TypeError, match="target_filename"):
        fetch_and_convert_dataset([one], 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="AbstractSourceFile instances, not str"):
        fetch_and_convert_dataset(["one.gz"], "set.bin")  # type: ignore[list-item]


def test_sources_are_checked_when_made() -> None:
    with pytest.raises(TypeError, match="url or the base_url"):
        DownloadSourceFile("x")
    with pytest.raises(TypeError, match="source_path or an arg_name"):
        CopySourceFile("x")
    with pytest.raises(TypeError, match="path must be text"):
        ExistingSourceFile(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a path must be"):
        path_string(3)  # type: ignore[arg-type]


def test_the_addresses_of_a_download() -> None:
    source = DownloadSourceFile("x.gz", base_url="https://a/b", mirrors=["https://m/", "https://n/y.gz"])
    assert source.url == "https://a/b/x.gz"
    assert source.mirrors == ("https://m/x.gz", "https://n/y.gz")
    assert DownloadSourceFile("x.gz", base_url="https://a/b/").url == "https://a/b/x.gz"
    assert "x.gz from https://a/b/x.gz" in str(source)


def test_a_download_alone_lies_in_temp_until_it_is_cleaned_up(data_home: Path, one: DownloadSourceFile) -> None:
    path = one.acquire()
    assert path == one.path == str(data_home / "data" / "temp" / "one.gz")
    assert Path(path).read_bytes() == CONTENT
    one.clean_up()
    assert tree(data_home) == []
    one.clean_up()


def test_a_copy_comes_from_a_fixed_place_or_from_an_argument(
    tmp_path: Path, data_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = tmp_path / "original"
    original.write_bytes(CONTENT)
    fixed = CopySourceFile("fixed", source_path=str(original), sha256=DIGEST)
    called = CopySourceFile("called", source_path=lambda: str(original), sha256=DIGEST)
    given = CopySourceFile("given", arg_name="place", sha256=DIGEST)
    fetch = fetch_and_convert_dataset([fixed, called, given], "set.bin")(joined)
    with pytest.raises(KeyError, match="place="):
        fetch()
    assert fetch(place=tmp_path / "nowhere") is None
    assert "could not copy given: there is no file" in capsys.readouterr().out
    path = fetch(place=original)
    assert path is not None
    assert Path(path).read_bytes() == b"+".join([CONTENT] * 3)
    assert original.exists()
    assert tree(data_home) == ["data/set.bin"]


def test_an_existing_file_is_verified_in_place_and_never_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = tmp_path / "original"
    fetch = fetch_and_convert_dataset([ExistingSourceFile(lambda: str(original), sha256=DIGEST)], "set.bin")(joined)
    assert fetch() is None
    assert "does not exist" in capsys.readouterr().out
    original.write_bytes(b"wrong")
    assert fetch() is None
    assert f"has not the SHA-256 {DIGEST}" in capsys.readouterr().out
    original.write_bytes(CONTENT)
    assert fetch() is not None
    assert original.read_bytes() == CONTENT


def test_a_source_of_ones_own_needs_only_the_two_methods(tmp_path: Path) -> None:
    class Made(AbstractSourceFile):
        cleaned = 0

        def acquire(self, **kwargs: Any) -> str | None:
            if kwargs.get("fail"):
                return None
            path = tmp_path / "made"
            path.write_bytes(kwargs["text"])
            return str(path)

        def clean_up(self) -> None:
            self.cleaned += 1

    source = Made()
    fetch = fetch_and_convert_dataset([source], "set.bin")(joined)
    assert fetch(fail=True) is None
    assert source.cleaned == 0
    path = fetch(text=b"own")
    assert path is not None
    assert Path(path).read_bytes() == b"own"
    assert source.cleaned == 1
    with pytest.raises(NotImplementedError):
        AbstractSourceFile().acquire()


def _fetch_in_child(url: str, home: str) -> None:
    os.environ["MLQUEUE_DATA_HOME"] = home
    source = DownloadSourceFile("one.gz", url=url, sha256=DIGEST)
    path = fetch_and_convert_dataset([source], "set.bin")(joined)()
    assert path is not None
    assert Path(path).read_bytes() == CONTENT


def test_two_processes_that_fetch_at_once_make_one_download_and_one_conversion(
    server: FileServer, data_home: Path
) -> None:
    answer = threading.Event()
    server.files["one.gz"] = CONTENT
    server.faults["one.gz"] = [Fault(until=answer)]
    children = Children(2, _fetch_in_child, server.url + "one.gz", str(data_home))
    children.hear("waiting for set.bin")
    answer.set()
    assert children.end() == [0, 0]
    assert server.paths() == ["one.gz"]
    assert children.said.count("converting one.gz") == 1
    assert tree(data_home) == ["data/set.bin"]


def _convert_for_ever(home: str, source: str) -> None:
    os.environ["MLQUEUE_DATA_HOME"] = home

    def convert(source_paths: list[str], target_path: str) -> str:
        Path(target_path).write_bytes(b"half")
        print("half written", file=sys.stderr)
        threading.Event().wait(60)
        return target_path

    fetch_and_convert_dataset([ExistingSourceFile(source)], "set.bin")(convert)()


def test_a_process_killed_while_it_converts_leaves_nothing_that_counts(tmp_path: Path, data_home: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    children = Children(1, _convert_for_ever, str(data_home), str(source))
    children.hear("half written")
    (process,) = children.processes
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert children.end() == [-signal.SIGKILL]
    assert not (data_home / "data" / "set.bin").exists()
    fetch = fetch_and_convert_dataset([ExistingSourceFile(str(source))], "set.bin")(joined)
    path = fetch()
    assert path is not None
    assert Path(path).read_bytes() == CONTENT
    assert tree(data_home) == ["data/set.bin"]


def test_removing_a_set_removes_what_an_unfinished_fetch_left(
    server: FileServer, data_home: Path, one: DownloadSourceFile
) -> None:
    missing = DownloadSourceFile("two.gz", base_url=server.url)
    fetch = fetch_and_convert_dataset([one, missing], "set.bin")(joined)
    server.faults["one.gz"] = [Fault(cut_after=4)]
    assert fetch() is None
    assert tree(data_home) != []
    delete_dataset_cache("set.bin", "never.bin")
    assert tree(data_home) == []


def test_a_set_in_a_folder_that_cannot_be_written_is_used(
    data_home: Path, one: DownloadSourceFile, server: FileServer
) -> None:
    fetch = fetch_and_convert_dataset([one], "set.bin")(joined)
    assert isinstance(fetch, DatasetFetch)
    path = fetch()
    (data_home / "data").chmod(0o500)
    try:
        assert fetch() == path == fetch.target_path == config.get_data_path("set.bin")
    finally:
        (data_home / "data").chmod(0o700)


def test_a_source_file_of_ones_own_needs_no_clean_up(tmp_path: Path, data_home: Path) -> None:
    class There(AbstractSourceFile):
        def acquire(self, **kwargs: Any) -> str:
            return str(tmp_path / "there")

    (tmp_path / "there").write_bytes(CONTENT)
    path = fetch_and_convert_dataset([There()], "set.bin")(joined)()
    assert path is not None
    assert Path(path).read_bytes() == CONTENT
    assert (tmp_path / "there").exists()
