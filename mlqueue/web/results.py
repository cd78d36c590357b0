"""Results over HTTP: bytes as they are, text as text, arrays as .npy, anything else as JSON.

A result is what somebody's job made of somebody's input: nothing in it may run in a browser. So the media type is one
of `SHOWN`, which browsers show or play and never run, or that of any bytes, for which they offer to save a file; and
every answer forbids them to guess another type, and all that a page may do. Large results go from the store to the
socket in chunks; an ETag and ranges let an interrupted download go on.
"""

from __future__ import annotations

import io
import itertools
import mimetypes
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from flask import Response
from werkzeug.http import is_resource_modified

from .. import codec
from ..errors import JobFailed, RangeNotSatisfiable, ResultMissing
from ..handle import Job
from ..job import JobRecord, State
from ..posted import failure_text
from ..store.store import StoredFile
from ..values import is_array, plain
from .auth import READ
from .call import Call, dump
from .operation import JSON, TEXT, Answer, operation
from .records import shown
from .shapes import text_or

__all__ = ["ENCODED", "read_result", "read_result_as", "send_result", "with_result"]

#: The media types of what a browser shows or plays, by extension. It runs none of it.
SHOWN: Final = {
    "avif": "image/avif",
    "bmp": "image/bmp",
    "gif": "image/gif",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "m4a": "audio/mp4",
    "mp3": "audio/mpeg",
    "oga": "audio/ogg",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "wav": "audio/wav",
    "m4v": "video/mp4",
    "mov": "video/quicktime",
    "mp4": "video/mp4",
    "mpeg": "video/mpeg",
    "ogv": "video/ogg",
    "webm": "video/webm",
    "csv": "text/csv; charset=utf-8",
    "json": JSON,
    "log": f"{TEXT}; charset=utf-8",
    "md": f"{TEXT}; charset=utf-8",
    "txt": f"{TEXT}; charset=utf-8",
}

#: The same by media type, without parameters: what a job may say of its bytes itself.
DECLARED: Final = {kind.partition(";")[0]: kind for kind in SHOWN.values()}

#: What any other bytes are.
BYTES: Final = "application/octet-stream"

#: The result as the store keeps it (see `mlqueue.codec`): for who asks with this in Accept, nothing is lost.
ENCODED: Final = "application/vnd.mlqueue.value"

#: What forbids a browser to do anything with it but to show an image, to play a film.
SAFELY: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; sandbox"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, no-cache",
}

#: Full results of at most so many bytes are part of the record of a job that was waited for.
SMALL: Final = 64 * 2**10

#: How many bytes of an encoding say what it holds.
HEAD: Final = 2**17

#: What stands in place of a result before there is one.
NO_RESULT: Final = "[no result]"

CONTENT: Final = {
    **text_or({}, "A text as it is; `[no result]` before the end; the error's text after a failure."),
    BYTES: {"type": "string", "format": "binary", "description": "Bytes, and arrays (as .npy)."},
    ENCODED: {"type": "string", "format": "binary"},
    **{kind: {"type": "string", "format": "binary"} for kind in dict.fromkeys(SHOWN.values()) if kind != JSON},
}
ANSWERS: Final = {
    200: Answer(
        "The result.", CONTENT, {"ETag": "Names this result.", "Content-Disposition": "Whether it is shown or saved."}
    ),
    206: Answer("The part of it that was asked for.", CONTENT, {"Content-Range": "Which part."}),
    304: Answer("It is the one that the client has."),
}
RESULT_ERRORS: Final = (ResultMissing, JobFailed, RangeNotSatisfiable)


@operation("GET", "/jobs/<job_id>/result", scope=READ, tag="results", text=True, errors=RESULT_ERRORS, answers=ANSWERS)
def read_result(call: Call, job_id: str) -> Response:
    """Read the full result of a job.

    Bytes as they are, with the media type that the job gave them if a browser would only show or play it; text as text;
    an array as .npy; any other value as JSON. Before the end it is `[no result]`, after a failure the error's text; who
    asks for JSON gets 404 and 409 then. `Accept: application/vnd.mlqueue.value` gives the stored encoding. Ranges and
    If-None-Match are honoured.
    """
    return send_result(call, job_id)


@operation(
    "GET",
    "/jobs/<job_id>/result.<extension>",
    scope=READ,
    tag="results",
    text=True,
    errors=RESULT_ERRORS,
    answers=ANSWERS,
)
def read_result_as(call: Call, job_id: str, extension: str) -> Response:
    """Read the full result of a job as a file with an extension.

    It says of which type the bytes are: images, sound, films, text and JSON are shown or played, anything else (.html,
    .svg, .pdf, .npy ...) is saved.
    """
    return send_result(call, job_id, extension.lower())


def send_result(
    call: Call, job_id: str, extension: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """The result of a job, or what stands in its place."""
    file = call.store.open_result(job_id)
    outcome = file.outcome
    if outcome.state is State.SUCCEEDED:
        found = _open(call, file, job_id, extension)
        return _send(call, found, f'"{job_id}.{file.attempt}"', headers)
    if call.wants_json:
        failure = Job(call.store, job_id).exception(0) if outcome.state.ended else None
        raise failure or ResultMissing(
            f"job {job_id} is {outcome.state}; it has no result yet. Ask again later, or wait with `Prefer: wait=60` "
            "when you ask for its record."
        )
    text = NO_RESULT if not outcome.state.ended else failure_text(outcome)
    return call.text(text, headers=headers)


def with_result(call: Call, record: JobRecord) -> dict[str, Any]:
    """The record of a job that has ended, with its result if it is small."""
    found = shown(call, record)
    if record.state is State.SUCCEEDED:
        file = call.store.open_result(record.id)
        if file.size <= SMALL:
            found["result"] = plain(codec.decode(file.read(file.size)))
    return found


class _Found(NamedTuple):
    """What is sent: some bytes, and behind them a part of the stored encoding."""

    file: StoredFile
    media_type: str
    #: The name under which it is saved; None when it is shown.
    filename: str | None
    prefix: bytes
    start: int = 0
    length: int = 0

    @property
    def size(self) -> int:
        return len(self.prefix) + self.length

    def parts(self, first: int, last: int) -> Iterator[bytes]:
        """The bytes from `first` up to `last`."""
        if first < len(self.prefix):
            yield self.prefix[first:last]
        begin, end = max(first - len(self.prefix), 0), last - len(self.prefix)
        if end > begin:
            yield from self.file.parts(self.start + begin, self.start + end)


def _open(call: Call, file: StoredFile, job_id: str, extension: str | None) -> _Found:
    if ENCODED in call.request.accept_mimetypes.values():
        return _Found(file, ENCODED, job_id, b"", 0, file.size)
    raw = codec.raw_of(file.read(HEAD), file.size)
    if raw is not None and raw.kind == "bytes":
        kind, filename = _kind_of_bytes(file, job_id, extension)
        return _Found(file, kind, filename, b"", raw.start, raw.size)
    if raw is not None and raw.kind == "text" and not call.wants_json:
        kind, filename = _kind(extension, f"{TEXT}; charset=utf-8", job_id)
        return _Found(file, kind, filename, b"", raw.start, raw.size)
    if raw is not None and raw.kind == "array" and not call.wants_json:
        return _Found(file, BYTES, f"{job_id}.npy", _npy_header(raw), raw.start, raw.size)
    value = codec.decode(file.read(file.size))
    if is_array(value) and value.shape and not call.wants_json:
        return _Found(file, BYTES, f"{job_id}.npy", _npy(value))
    kind, filename = _kind(extension, JSON, job_id)
    return _Found(file, kind, filename, dump(plain(value)))


def _kind(extension: str | None, otherwise: str, job_id: str) -> tuple[str, str | None]:
    """Media type and, when it is to be saved, the file's name."""
    if extension is None:
        return otherwise, None
    shown_as = SHOWN.get(extension)
    return (shown_as, None) if shown_as else (BYTES, f"{job_id}.{extension}")


def _kind_of_bytes(file: StoredFile, job_id: str, extension: str | None) -> tuple[str, str | None]:
    declared = (file.outcome.result and file.outcome.result.content_type) or ""
    name = declared.partition(";")[0].strip().lower()
    if extension is None and name in DECLARED:
        return DECLARED[name], None
    if extension is None:
        return BYTES, job_id + (mimetypes.guess_extension(name) or "")
    return _kind(extension, BYTES, job_id)


def _npy_header(raw: codec.Raw) -> bytes:
    import numpy as np

    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(raw.dtype)),
        "fortran_order": raw.order == "F",
        "shape": raw.shape,
    }
    buffer = io.BytesIO()
    np.lib.format.write_array_header_2_0(buffer, header)
    return buffer.getvalue()


def _npy(value: Any) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=False)
    return buffer.getvalue()


def _send(call: Call, found: _Found, etag: str, headers: Mapping[str, str] | None) -> Response:
    request, size = call.request, found.size
    response = Response(content_type=found.media_type)
    response.headers.update({**SAFELY, "ETag": etag, "Accept-Ranges": "bytes", "Vary": "Accept", **(headers or {})})
    if found.filename is not None:
        response.headers.set("Content-Disposition", "attachment", filename=found.filename)
    else:
        response.headers["Content-Disposition"] = "inline"
    if request.method in ("GET", "HEAD") and not is_resource_modified(request.environ, etag):
        response.status_code = 304
        del response.headers["Content-Type"]
        return response
    first, last = 0, size
    if request.method == "GET" and request.range is not None and _range_holds(call, etag):
        asked = request.range
        if asked.units == "bytes" and len(asked.ranges) == 1:
            part = asked.range_for_length(size)
            if part is None:
                text = f"{request.headers['Range'][:100]}: the result has {size:,} bytes, and none of these."
                raise RangeNotSatisfiable(text, size=size)
            first, last = part
            response.status_code = 206
            response.headers["Content-Range"] = f"bytes {first}-{last - 1}/{size}"
    response.headers["Content-Length"] = str(last - first)
    parts = found.parts(first, last)
    # A result that has been removed meanwhile is an answer, as long as nothing has been sent.
    response.response = itertools.chain(list(itertools.islice(parts, 1)), parts)
    return response


def _range_holds(call: Call, etag: str) -> bool:
    """Whether the range is asked of this very result."""
    condition = call.request.headers.get("If-Range")
    return condition is None or condition.strip() == etag
