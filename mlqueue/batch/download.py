"""Downloads that survive cut connections, wrong bytes and each other.

One call, :func:`download`, leaves at its path either the whole file, with the digest asked for, or nothing. What has
come so far stays beside it in ``<path>.part``, and the next call, also of another process, goes on from there. One
lock per path makes two processes that want the same file at once share one download.

pooch, the well-kept library of this trade, was weighed: of what is needed here it has the digest and the progress
bar, and neither resume nor mirrors nor a lock between processes (1.9). Those three are most of this module, so it
stands on ``urllib`` alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mlqueue.errors import MLQueueError

__all__ = ["DownloadFailed", "Progress", "compute_sha256", "download", "locked", "same_digest"]

#: How often one address is tried, counting only the tries that brought nothing new.
MAX_TRIES = 3
#: Seconds before the second try of an address; doubled for each further one.
RETRY_PAUSE = 0.5
#: Seconds without a byte after which a connection is given up.
TIMEOUT = 60.0
#: A cut try that brought at least this many bytes does not count against :data:`MAX_TRIES`.
MIN_PROGRESS = 1 << 20

_BLOCK = 1 << 18
_DIGEST_BLOCK = 1 << 22
_RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})

#: Called with the number of bytes that have come and the number expected (None when the server does not say).
Progress = Callable[[int, int | None], None]


class DownloadFailed(MLQueueError, OSError):
    """The file could not be downloaded."""


class _Retry(Exception):
    """This try failed, the next may not."""


class _GiveUp(Exception):
    """This address will not give the file."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where a partial file came from: what makes it safe to go on with it."""

    #: The address that its bytes came from.
    url: str
    #: A strong ETag, else the Last-Modified date; empty when the server named neither.
    validator: str


def download(
    urls: Sequence[str],
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> None:
    """Bring the file to ``path`` from the first of ``urls`` that gives it.

    A file that is at ``path`` already is left alone when its digest is right (or none is asked for), and replaced,
    once the new one is complete, when it is wrong.

    Parameters
    ----------
    urls:
        Addresses (http, https, file, ftp) of the same file, the preferred one first.
    path:
        The file to make; folders on the way are made too.
    sha256:
        The digest in hexadecimal, in either case. Without one a cut connection is still noticed where the server
        states a length, and a partial file is only continued when the server vouches for it (ETag, Last-Modified).
    progress:
        Called after every block; without one a bar is drawn on standard error when that is a terminal.
    timeout:
        Seconds without a byte after which a connection is given up; :data:`TIMEOUT` when None.

    Raises
    ------
    DownloadFailed
        No address gave the file; the message holds the reason for each. ``path`` is as it was before.
    """
    if isinstance(urls, str) or not urls:
        raise ValueError(f"urls must be a sequence of at least one address, not {urls!r}")
    target = Path(path)
    if _is_there(target, sha256):  # before the lock: the folder may be one that nobody here can write to
        return
    with locked(target.with_name(target.name + ".part.lock"), f"the download of {target.name}"):
        if not _is_there(target, sha256):
            _Download(target, sha256, progress, TIMEOUT if timeout is None else timeout).run(urls)


def _is_there(path: Path, sha256: str | None) -> bool:
    return path.is_file() and (sha256 is None or same_digest(compute_sha256(path), sha256))


class _Download:
    def __init__(self, target: Path, sha256: str | None, progress: Progress | None, timeout: float) -> None:
        self.target = target
        self.part = target.with_name(target.name + ".part")
        self.note = target.with_name(target.name + ".part.json")
        self.sha256 = sha256
        self.progress = progress
        self.timeout = timeout

    def run(self, urls: Sequence[str]) -> None:
        reasons = []
        for url in urls:
            reason = self._try_address(url)
            if reason is None:
                _sync(self.part)
                self.part.replace(self.target)
                self.note.unlink(missing_ok=True)
                return
            reasons.append(f"{url}: {reason}")
        raise DownloadFailed(
            f"could not download {self.target.name}; " + "; ".join(reasons) + ". "
            "What has come is kept and the next try goes on from there: look at the connection and try again, "
            f"or put the file at {self.target} yourself."
        )

    def _try_address(self, url: str) -> str | None:
        """None when the whole file is in the partial file, else why not."""
        tries, pause = 0, RETRY_PAUSE
        while True:
            before = self._size()
            try:
                self._once(url)
                return None
            except _GiveUp as failure:
                return str(failure)
            except _Retry as failure:
                tries = 1 if self._size() - before >= MIN_PROGRESS else tries + 1
                if tries >= MAX_TRIES:
                    return f"{failure} (tried {tries} times)"
            time.sleep(pause * 2 ** (tries - 1))

    def _once(self, url: str) -> None:
        start = self._size() if self._may_continue(url) else 0
        try:
            with _open(url, start, self._validator(url) if start else "", self.timeout) as response:
                resumed = self._receive(url, response, start)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and start:
                resumed = self._range_refused(error, start)
            elif error.code in _RETRIED_STATUSES:
                raise _Retry(f"HTTP {error.code} {error.reason}") from error
            else:
                raise _GiveUp(f"HTTP {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(_reason(error)) from error
        self._check_digest(resumed)

    def _receive(self, url: str, response: Any, start: int) -> bool:
        """Write the body to the partial file; True when it was appended to what had come before."""
        resumed, total = self._plan(response, start)
        if not resumed:
            origin = _Origin(url=url, validator=_validator_of(response))
            self.part.unlink(missing_ok=True)
            self.note.write_text(json.dumps(asdict(origin)), encoding="utf-8")
        done = start if resumed else 0
        with self.part.open("ab") as file, _reporting(self.progress, self.target.name, total) as report:
            report(done, total)
            while block := response.read(_BLOCK):
                file.write(block)
                done += len(block)
                report(done, total)
        if total is not None and done != total:
            raise _Retry(f"the connection was cut after {done} of {total} bytes")
        return resumed

    def _plan(self, response: Any, start: int) -> tuple[bool, int | None]:
        """Whether the body continues the partial file, and the size of the whole."""
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            if match is None or int(match[1]) != start:
                self._discard()
                raise _Retry(f"the server sent {response.headers.get('Content-Range')!r} for bytes from {start}")
            return True, None if match[2] == "*" else int(match[2])
        length = response.headers.get("Content-Length")
        return False, int(length) if length is not None and length.isdigit() else None

    def _range_refused(self, error: urllib.error.HTTPError, start: int) -> bool:
        """The server has nothing from ``start`` on: the partial file is whole, or it is not of this file."""
        if error.headers.get("Content-Range", "").strip() == f"bytes */{start}":
            return True
        self._discard()
        raise _Retry(f"the server has no bytes from {start} on")

    def _check_digest(self, resumed: bool) -> None:
        if self.sha256 is None:
            return
        digest = compute_sha256(self.part)
        if same_digest(digest, self.sha256):
            return
        self._discard()
        message = f"the file has the SHA-256 {digest}, expected {self.sha256}"
        if resumed:  # perhaps the two halves are of two files: once more, from the start
            raise _Retry(message)
        raise _GiveUp(message)

    def _may_continue(self, url: str) -> bool:
        if not self._size():
            return False
        # The digest will tell whether the halves fit; without it only the server can.
        return self.sha256 is not None or bool(self._validator(url))

    def _validator(self, url: str) -> str:
        """What the server must still say of ``url`` for the partial file to be continued; empty when unknown."""
        try:
            origin = json.loads(self.note.read_text(encoding="utf-8"))
            return str(origin["validator"]) if origin["url"] == url else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _size(self) -> int:
        try:
            return self.part.stat().st_size
        except FileNotFoundError:
            return 0

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.full_url.lower().startswith("https:") and not newurl.lower().startswith("https:"):
            raise urllib.error.HTTPError(newurl, code, f"redirected from https to {newurl}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, start: int, validator: str, timeout: float) -> Any:
    # Identity: a .gz sent "gzip-encoded" would otherwise arrive in another shape than the digest is of.
    headers = {"User-Agent": "mlqueue", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the caller's own address, file: included
    except ValueError as error:
        raise _GiveUp(f"{error}; an address starts with http://, https://, ftp:// or file://") from error
    return urllib.request.build_opener(_NoDowngrade).open(request, timeout=timeout)


def _validator_of(response: Any) -> str:
    etag = str(response.headers.get("ETag") or "")
    if etag and not etag.startswith("W/"):
        return etag
    return str(response.headers.get("Last-Modified") or "")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError):
        return str(error.reason) or "no answer"
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _reporting(progress: Progress | None, name: str, total: int | None) -> Iterator[Progress]:
    """The caller's progress function, else a bar on a terminal, else nothing."""
    if progress is not None:
        yield progress
    elif total is None or not sys.stderr.isatty():
        yield lambda done, total: None
    else:
        import click  # where it is drawn: the batch side imports numpy alone

        with click.progressbar(length=total, label=name, file=sys.stderr, width=40) as bar:
            yield lambda done, total: bar.update(done - bar.pos)


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` (flock), waiting for as long as another process or thread has it.

    The file is removed at the end. A holder that dies gives the lock up with it; the file it leaves does no harm.
    ``what`` is named on standard error when there is someone to wait for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path, what)
    try:
        yield
    finally:
        # Unlinked while it is held, so that who waits for this file finds (in _acquire) that it is no longer the one.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, what: str) -> int:
    said = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not said:
                    print(f"mlqueue: waiting for {what} in another process", file=sys.stderr)
                    said = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def compute_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of the file at ``path``, as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_DIGEST_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def same_digest(one: str, other: str) -> bool:
    """Whether two hexadecimal digests are equal; case and surrounding blanks do not count."""
    return one.strip().lower() == other.strip().lower()


def copy_file(source: Path, target: Path, sha256: str | None) -> None:
    """Copy ``source`` to ``target``, which then holds all of it, with the digest asked for, or is as it was before.

    Raises :class:`DownloadFailed` when the source is missing or has another digest.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with locked(target.with_name(target.name + ".part.lock"), f"the copy of {target.name}"):
        try:
            shutil.copyfile(source, part)
            digest = compute_sha256(part)
            if sha256 is not None and not same_digest(digest, sha256):
                raise DownloadFailed(f"{source} has the SHA-256 {digest}, expected {sha256}")
            _sync(part)
            part.replace(target)
        except FileNotFoundError as error:
            raise DownloadFailed(f"there is no file {source}") from error
        finally:
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
