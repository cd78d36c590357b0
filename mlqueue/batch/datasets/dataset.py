"""Fetching a data set: acquire its source files, verify them, convert them once into one file.

::

    SOURCE = DownloadSourceFile("usps.h5", url="https://...", sha256="ba768d9a...")

    @fetch_and_convert_dataset([SOURCE], "usps.h5")
    def fetch_usps(source_paths, target_path):
        shutil.move(source_paths[0], target_path)
        return target_path

    path = fetch_usps()

The target is all or nothing: the conversion writes into a folder of its own beside it, and the finished file is moved
into place. Source files lie in ``<data>/temp/<name of the target>/`` until then, so that two data sets whose files
have the same names (MNIST and Fashion-MNIST) do not take each other's. A lock per target lets one of several
processes fetch while the others wait and then use its file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mlqueue.batch import config
from mlqueue.batch.download import locked
from mlqueue.errors import MLQueueError

__all__ = [
    "AbstractSourceFile",
    "BadSourceFile",
    "CopySourceFile",
    "DatasetFetch",
    "DatasetUnavailable",
    "DownloadSourceFile",
    "ExistingSourceFile",
    "TemporarySourceFile",
    "classnames_from_h5",
    "delete_dataset_cache",
    "fetch_and_convert_dataset",
    "path_string",
]

_TEMP = "temp"
#: The folder within ``temp`` that belongs to the data set being fetched; empty outside a fetch.
_folder: ContextVar[str] = ContextVar("mlqueue_dataset_folder", default="")

Convert = Callable[[list[str], str], Any]


class DatasetUnavailable(MLQueueError, RuntimeError):
    """The data set could not be fetched."""


class BadSourceFile(MLQueueError, ValueError):
    """A source file is cut, damaged or not of the format it should be."""


class AbstractSourceFile:
    """One file that a data set is made of.

    Parameters
    ----------
    sha256:
        Its digest in hexadecimal; None when it is not to be verified (the digest is then printed).
    """

    def __init__(self, sha256: str | None = None) -> None:
        self.sha256 = sha256

    def acquire(self, **kwargs: Any) -> str | None:
        """Put the file where it can be read and return its path; None when it cannot be had.

        ``kwargs`` are those of the fetch function's call.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to acquire its file")

    def require(self, **kwargs: Any) -> str:
        """As :meth:`acquire`, but raises :class:`DatasetUnavailable` with the reason."""
        path = self.acquire(**kwargs)
        if path is None:
            raise DatasetUnavailable(f"could not acquire {self}")
        return path

    def clean_up(self) -> None:
        """Remove what :meth:`acquire` made; called after a conversion that went well. Here it is nothing."""


class TemporarySourceFile(AbstractSourceFile):
    """A file that is kept in the folder of the data sets until it has been converted."""

    def __init__(self, filename: str, sha256: str | None = None) -> None:
        super().__init__(sha256=sha256)
        self.filename = filename

    @property
    def temp_filename(self) -> str:
        """Where the file goes, relative to the folder of the data sets."""
        return os.path.join(_TEMP, _folder.get(), self.filename)  # noqa: PTH118 - text, as in BatchUp

    @property
    def path(self) -> str:
        """Where the file goes."""
        return config.get_data_path(self.temp_filename)

    def acquire(self, **kwargs: Any) -> str | None:
        try:
            return self.require(**kwargs)
        except DatasetUnavailable as failure:
            print(failure)
            return None

    def clean_up(self) -> None:
        Path(self.path).unlink(missing_ok=True)


class DownloadSourceFile(TemporarySourceFile):
    """A file to download.

    Parameters
    ----------
    filename:
        What it is called once it is here.
    url, base_url:
        Its address, or the address of the folder that holds ``filename``. One of the two; ``TypeError`` otherwise.
    sha256:
        Its digest in hexadecimal, or None.
    mirrors:
        Further addresses of the same file, tried in this order when those before do not give it. One that ends with
        a slash is a folder's.
    """

    def __init__(
        self,
        filename: str,
        url: str | None = None,
        base_url: str | None = None,
        sha256: str | None = None,
        *,
        mirrors: Iterable[str] = (),
    ) -> None:
        super().__init__(filename, sha256=sha256)
        if url is None and base_url is None:
            raise TypeError(
                f"a DownloadSourceFile needs its url or the base_url of its folder; {filename!r} has neither"
            )
        self.url = url if url is not None else f"{base_url}".rstrip("/") + "/" + filename
        self.mirrors = tuple(mirror + filename if mirror.endswith("/") else mirror for mirror in mirrors)

    def __str__(self) -> str:
        return f"{self.filename} from {self.url}"

    def require(self, **kwargs: Any) -> str:
        try:
            return config.obtain(self.path, [self.url, *self.mirrors], self.sha256)
        except config.DownloadFailed as failure:
            raise DatasetUnavailable(str(failure)) from failure

    def clean_up(self) -> None:
        super().clean_up()
        for suffix in (".part", ".part.json"):
            Path(self.path + suffix).unlink(missing_ok=True)


class CopySourceFile(TemporarySourceFile):
    """A file to copy from elsewhere on this machine.

    Parameters
    ----------
    filename:
        What the copy is called.
    source_path:
        Where it is, as text or a function that returns the text; or
    arg_name:
        the name of the fetch function's keyword argument that says where it is. One of the two; ``TypeError``
        otherwise.
    sha256:
        Its digest in hexadecimal, or None.
    """

    def __init__(
        self,
        filename: str,
        source_path: str | Callable[[], str] | None = None,
        arg_name: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__(filename, sha256=sha256)
        if source_path is None and arg_name is None:
            raise TypeError(f"a CopySourceFile needs its source_path or an arg_name; {filename!r} has neither")
        self.source_path = source_path
        self.arg_name = arg_name

    def __str__(self) -> str:
        place = f"the argument {self.arg_name}" if self.source_path is None else path_string(self.source_path)
        return f"{self.filename}, a copy of {place}"

    def require(self, **kwargs: Any) -> str:
        """The path of the copy; ``KeyError`` when the fetch call lacks the argument ``arg_name``."""
        try:
            return config.obtain_copy(self.path, self._source(kwargs), self.sha256)
        except config.DownloadFailed as failure:
            raise DatasetUnavailable(f"could not copy {self.filename}: {failure}") from failure

    def _source(self, kwargs: dict[str, Any]) -> str:
        if self.source_path is not None:
            return path_string(self.source_path)
        if self.arg_name not in kwargs:
            raise KeyError(f"the fetch function takes the path of {self.filename} as its argument {self.arg_name}=")
        return str(os.fspath(kwargs[self.arg_name]))


class ExistingSourceFile(AbstractSourceFile):
    """A file that is read where it is, and never removed.

    Parameters
    ----------
    path:
        Where it is, as text or a function that returns the text; ``TypeError`` otherwise.
    sha256:
        Its digest in hexadecimal, or None.
    """

    def __init__(self, path: str | Callable[[], str], sha256: str | None = None) -> None:
        super().__init__(sha256=sha256)
        if not isinstance(path, str) and not callable(path):
            raise TypeError(f"path must be text or a function that returns text, not {type(path).__name__}")
        self._path = path

    @property
    def path(self) -> str:
        """Where the file is."""
        return path_string(self._path)

    def __str__(self) -> str:
        return f"the file {self.path}"

    def acquire(self, **kwargs: Any) -> str | None:
        return self.path if config.verify_file(self.path, self.sha256) else None

    def require(self, **kwargs: Any) -> str:
        path = self.acquire(**kwargs)
        if path is None:
            found = f"has not the SHA-256 {self.sha256}" if Path(self.path).is_file() else "does not exist"
            raise DatasetUnavailable(f"{self} {found}")
        return path

    def clean_up(self) -> None:
        """The file is yours: nothing is removed."""


class DatasetFetch:
    """A fetch function: what :func:`fetch_and_convert_dataset` makes of a conversion."""

    __name__: str

    def __init__(
        self, convert: Convert, source_files: Sequence[AbstractSourceFile], target: str | Callable[[], str]
    ) -> None:
        functools.update_wrapper(self, convert)
        self._convert = convert
        self._target = target
        #: The source files, in the order in which the conversion gets their paths.
        self.source_files = tuple(source_files)

    @property
    def target_path(self) -> str:
        """Where the converted file is, or will be."""
        return config.get_data_path(path_string(self._target))

    def __call__(self, **kwargs: Any) -> str | None:
        """The path of the converted file, which is fetched when it is missing.

        Keyword arguments go to the source files. A source that cannot be had is printed, and the answer None; what
        the conversion raises is passed on.
        """
        try:
            return self._fetch(kwargs)
        except DatasetUnavailable as failure:
            print(failure)
            return None

    def require(self, **kwargs: Any) -> str:
        """As calling it, but raises :class:`DatasetUnavailable` with the reason instead of printing it."""
        path = self._fetch(kwargs)
        if path is None:
            raise DatasetUnavailable(f"{self.__name__} gave up: the conversion returned None")
        return path

    def _fetch(self, kwargs: dict[str, Any]) -> str | None:
        target = Path(self.target_path)
        if target.exists():
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(target.name + ".lock"), f"{target.name}, which is being fetched"):
            if target.exists():
                return str(target)
            token = _folder.set(_folder_of(target))
            try:
                return self._make(target, kwargs)
            finally:
                _folder.reset(token)

    def _make(self, target: Path, kwargs: dict[str, Any]) -> str | None:
        paths: list[str] = []
        for source in self.source_files:
            path = source.require(**kwargs)
            if path in paths:
                raise ValueError(f"two source files of {self.__name__} have the path {path}; each needs its own name")
            paths.append(path)
        with _workplace(target) as unfinished:
            made = self._convert_into(paths, unfinished)
            if made is None:
                return None
            if Path(made) == unfinished:
                _put_in_place(unfinished, target)
                made = str(target)
        for source in self.source_files:
            source.clean_up()
        temp = Path(config.get_data_path(_TEMP))
        _remove_if_empty(temp / _folder_of(target), temp)
        return made

    def _convert_into(self, paths: list[str], unfinished: Path) -> str | None:
        print(f"mlqueue: converting {', '.join(Path(path).name for path in paths)}", file=sys.stderr)
        try:
            made = self._convert(paths, str(unfinished))
        except BadSourceFile:
            # Bad bytes that no digest vouches for would be found again by every later try.
            for source in self.source_files:
                if source.sha256 is None:
                    source.clean_up()
            raise
        return None if made is None else os.fspath(made)


def fetch_and_convert_dataset(
    source_files: Sequence[AbstractSourceFile], target_filename: str | Callable[[], str]
) -> Callable[[Convert], DatasetFetch]:
    """Make a conversion into a fetch function.

    Parameters
    ----------
    source_files:
        The files that the data set is made of.
    target_filename:
        The name of the converted file in the folder of the data sets (an absolute path is taken as it is), or a
        function that returns it.

    Returns
    -------
    A decorator for ``convert(source_paths, target_path)``, which writes ``target_path`` and returns it, or None when
    it gives up. ``target_path`` is a place of its own with the target's name: when the conversion has returned it,
    the file is moved to the target and the source files that were downloaded or copied are removed. After a failure
    there is no target, and the verified source files are kept for the next try.

    Raises
    ------
    TypeError
        ``target_filename`` or an entry of ``source_files`` is of another type.
    """
    if not isinstance(target_filename, str) and not callable(target_filename):
        raise TypeError(
            f"target_filename must be text or a function that returns text, not {type(target_filename).__name__}"
        )
    for source in source_files:
        if not isinstance(source, AbstractSourceFile):
            raise TypeError(f"source_files must hold AbstractSourceFile instances, not {type(source).__name__}")

    def decorate(convert: Convert) -> DatasetFetch:
        return DatasetFetch(convert, source_files, target_filename)

    return decorate


def delete_dataset_cache(*filenames: str | Callable[[], str]) -> None:
    """Remove the converted files of these names, with what is left of unfinished fetches of them.

    A process that has a file open keeps reading the old one.
    """
    for filename in filenames:
        target = Path(config.get_data_path(path_string(filename)))
        if not target.parent.is_dir():
            continue
        with locked(target.with_name(target.name + ".lock"), f"{target.name}, which is being fetched"):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            _remove_unfinished(target)
            temp = Path(config.get_data_path(_TEMP))
            shutil.rmtree(temp / _folder_of(target), ignore_errors=True)
            _remove_if_empty(temp)


def classnames_from_h5(class_names: Iterable[bytes]) -> list[str]:
    """Names of classes, which HDF5 files hold as bytes (latin-1), as text."""
    return [bytes(name).decode("latin1") for name in class_names]


def path_string(path: str | Callable[[], str]) -> str:
    """``path`` itself, or what it returns when it is a function; ``TypeError`` for anything else."""
    if isinstance(path, str):
        return path
    if callable(path):
        return path()
    raise TypeError(f"a path must be text or a function that returns text, not {type(path).__name__}")


def _folder_of(target: Path) -> str:
    """The name of the folder for the source files of ``target``."""
    if target.parent == Path(config.get_data_dir()):
        return target.name
    # Two targets outside the folder of the data sets may share a name.
    return f"{target.name}-{hashlib.sha256(os.fsencode(target)).hexdigest()[:8]}"


@contextlib.contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A path with the target's name, in a folder of its own on the target's file system.

    The caller holds the target's lock, so that folders found here are of processes that were killed.
    """
    _remove_unfinished(target)
    folder = tempfile.mkdtemp(prefix=_unfinished_prefix(target), dir=target.parent)
    try:
        yield Path(folder, target.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unfinished_prefix(target: Path) -> str:
    return f".{target.name}.unfinished-"


def _remove_unfinished(target: Path) -> None:
    for folder in target.parent.iterdir():
        if folder.name.startswith(_unfinished_prefix(target)):
            shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(unfinished: Path, target: Path) -> None:
    if not unfinished.exists():
        raise FileNotFoundError(f"the conversion returned {unfinished} but did not write it")
    if unfinished.is_file():
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
    unfinished.replace(target)


def _remove_if_empty(*folders: Path) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
