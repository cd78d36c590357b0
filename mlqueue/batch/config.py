"""Where data sets live on this machine, and how files get there.

The home folder is the first of

1. ``MLQUEUE_DATA_HOME`` in the environment,
2. ``BATCHUP_HOME`` in the environment,
3. ``data_dir`` in section ``[paths]`` of ``~/.batchup.cfg``,
4. ``~/.batchup``, where it exists,
5. the user's cache folder (``~/.cache/mlqueue`` on Linux, ``~/Library/Caches/mlqueue`` on macOS).

Data sets are files in ``<home>/data``, laid out as BatchUp lays them out, so that what BatchUp has fetched is used
again. Nothing is read or made at import, and every call reads the environment anew.
"""

from __future__ import annotations

import configparser
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mlqueue.batch import download as _download
from mlqueue.batch.download import DownloadFailed, Progress, compute_sha256, same_digest
from mlqueue.errors import MissingDependency, MLQueueError

__all__ = [
    "DataHomeError",
    "DownloadFailed",
    "compute_sha256",
    "copy_and_verify",
    "copy_data",
    "download",
    "download_and_verify",
    "download_data",
    "get_batchup_path",
    "get_config",
    "get_data_dir",
    "get_data_path",
    "obtain",
    "obtain_copy",
    "verify_file",
]

_ENVIRONMENT = ("MLQUEUE_DATA_HOME", "BATCHUP_HOME")
_DATA_DIR_NAME = "data"
_log = logging.getLogger(__name__)


class DataHomeError(MLQueueError, RuntimeError):
    """The folder for data sets cannot be used."""


def get_config() -> configparser.RawConfigParser:
    """What ``~/.batchup.cfg`` says; empty when there is no such file, or, with a warning, when it cannot be read."""
    path = Path("~/.batchup.cfg").expanduser()
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError, OSError) as error:
        _log.warning("ignoring %s, which cannot be read: %s", path, error)
        return configparser.RawConfigParser()
    return parser


def get_batchup_path() -> str:
    """The home folder (see the top of this module), which is made when it is missing.

    Raises :class:`DataHomeError`, a ``RuntimeError``, when it is not a folder or cannot be made.
    """
    home, said_by = _find_home()
    if home.exists() and not home.is_dir():
        raise DataHomeError(f"the folder for data sets, {home} ({said_by}), is a file; name a folder there instead")
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataHomeError(
            f"the folder for data sets, {home} ({said_by}), cannot be made: {error.strerror}; "
            "set MLQUEUE_DATA_HOME to a folder you may write to"
        ) from error
    return os.fspath(home)


def get_data_dir() -> str:
    """The folder of the data sets, ``<home>/data``."""
    return os.path.join(get_batchup_path(), _DATA_DIR_NAME)  # noqa: PTH118 - text in and out, as in BatchUp


def get_data_path(filename: str) -> str:
    """The path of ``filename`` within the folder of the data sets; an absolute one is returned as it is."""
    if Path(filename).is_absolute():
        return os.fspath(filename)  # the home folder may be one that cannot be had
    return os.path.join(get_data_dir(), filename)  # noqa: PTH118


def download(path: str, source_url: str, *, progress: Progress | None = None) -> str:
    """Download ``source_url`` to ``path`` unless there is a file already; returns ``path``.

    A download that was cut is continued by the next call. Raises :class:`DownloadFailed`, an ``OSError``, when the
    file cannot be had; ``path`` then does not exist.
    """
    _download.download([source_url], path, progress=progress)
    return path


def verify_file(path: str, sha256: str | None) -> bool:
    """Whether the file at ``path`` exists and has the SHA-256 digest given, in hexadecimal of either case.

    With None for the digest the file's own is printed, for you to put into your code, and the answer is True.
    """
    if not Path(path).is_file():
        return False
    digest = compute_sha256(path)
    if sha256 is None:
        print(f"SHA-256 of {path}: {digest}")
        return True
    return same_digest(digest, sha256)


def obtain(
    path: str,
    urls: Sequence[str],
    sha256: str | None,
    *,
    progress: Progress | None = None,
) -> str:
    """Download the file from the first of ``urls`` that gives it with the right digest; returns ``path``.

    A file that is there already is verified too, and replaced when it is not the one. Raises
    :class:`DownloadFailed` with the reason for each address.
    """
    _download.download(urls, path, sha256=sha256, progress=progress)
    if sha256 is None:
        verify_file(path, None)
    return path


def download_and_verify(path: str, source_url: str, sha256: str | None, *, mirrors: Sequence[str] = ()) -> str | None:
    """As :func:`obtain`, but a failure is printed and the answer None."""
    try:
        return obtain(path, [source_url, *mirrors], sha256)
    except DownloadFailed as failure:
        print(failure)
        return None


def obtain_copy(path: str, source_path: str, sha256: str | None) -> str:
    """Copy ``source_path`` to ``path`` and verify the copy; returns ``path``.

    A file that is there already with the right digest is kept. Raises :class:`DownloadFailed` when the source is
    missing or has another digest; ``path`` is then as it was before.
    """
    if not Path(path).exists() or not verify_file(path, sha256):
        _download.copy_file(Path(source_path), Path(path), sha256)
        if sha256 is None:
            verify_file(path, None)
    return path


def copy_and_verify(path: str, source_path: str, sha256: str | None) -> str | None:
    """As :func:`obtain_copy`, but a failure is printed and the answer None."""
    try:
        return obtain_copy(path, source_path, sha256)
    except DownloadFailed as failure:
        print(failure)
        return None


def download_data(filename: str, source_url: str, sha256: str | None, *, mirrors: Sequence[str] = ()) -> str | None:
    """:func:`download_and_verify` to ``filename`` in the folder of the data sets."""
    return download_and_verify(get_data_path(filename), source_url, sha256, mirrors=mirrors)


def copy_data(filename: str, source_path: str, sha256: str | None) -> str | None:
    """:func:`copy_and_verify` to ``filename`` in the folder of the data sets."""
    return copy_and_verify(get_data_path(filename), source_path, sha256)


def _find_home() -> tuple[Path, str]:
    """The home folder, and who said so."""
    for name in _ENVIRONMENT:
        if value := os.environ.get(name):
            return Path(value).expanduser(), f"from {name}"
    if value := get_config().get("paths", "data_dir", fallback=""):
        return Path(value).expanduser(), "from data_dir in ~/.batchup.cfg"
    old = Path("~/.batchup").expanduser()
    if old.exists():
        return old, "as BatchUp left it"
    try:
        import platformdirs
    except ImportError as error:
        raise MissingDependency(
            "platformdirs, which knows the user's cache folder, is not installed; "
            "run `pip install platformdirs` or set MLQUEUE_DATA_HOME"
        ) from error
    return platformdirs.user_cache_path("mlqueue", appauthor=False), "the user's cache folder"
