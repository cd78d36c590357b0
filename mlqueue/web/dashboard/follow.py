"""Pages that stay up to date: made once for all who look, and sent again when they have changed.

A browser asks for the page that it shows once more, as server-sent events (``Accept: text/event-stream``): it is sent
the page whenever another one has come of it. An event's id stands for the page, so that who was cut off and comes again
is sent nothing until there is something new. Where there is no stream to be had it asks for the page again and again.

The events of all jobs (`mlqueue.web.live`) are no help here: while somebody listens to these, each move of each job is
written down once more, and a queue that is drained has thousands of them a second, of which a page can show the last
only.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Final

from flask import Response, current_app

from ...errors import MLQueueError
from ..call import dump
from ..live import EVENTS, HEARTBEAT
from .visit import PLACE_OF_TOKEN, Visit

__all__ = ["AGAIN", "answer_again", "follow", "wants_events"]

#: The header by which a script says that it has the page already.
AGAIN: Final = "X-MLQueue-Again"

#: How long a stream lasts, in seconds: the browser comes again, by all that the host has before its views.
LIFE: Final = 300.0

#: How long a browser waits until it comes again, in milliseconds.
RETRY: Final = 1000

#: Makes the page that a request asks for, for a visit.
Make = Callable[[Visit], Response]


def wants_events(visit: Visit) -> bool:
    """Whether the page is to be sent as a stream."""
    return EVENTS in visit.request.headers.get("Accept", "")


def answer_again(visit: Visit, make: Make) -> Response:
    """The page for a script that has it already; 304 where that is the same."""
    html = _recent(visit, make)
    response = Response(html, content_type="text/html; charset=utf-8")
    response.set_etag(_tag(html), weak=True)
    response.make_conditional(visit.request)
    return response


def _recent(visit: Visit, make: Make) -> bytes:
    """The page, made within the last second or now, with the visitor's own token in its forms."""
    pages, key = visit.dashboard.pages, _key(visit)
    html = pages.recent(key)
    if html is None:
        begun = time.monotonic()
        token, visit.token = visit.token, PLACE_OF_TOKEN
        html = make(visit).get_data()
        visit.token = token
        pages.keep(key, html, time.monotonic() - begun)
    return html.replace(PLACE_OF_TOKEN.encode(), visit.token.encode())


def _key(visit: Visit) -> Hashable:
    """What a page depends on, beside how all stands: what is asked for and where, and what may be done."""
    assert visit.principal is not None
    request = visit.request
    return request.host, request.root_path, request.full_path, visit.principal.scopes, visit.has_signed_in


def _tag(html: bytes) -> str:
    return hashlib.sha256(html).hexdigest()[:24]


def follow(visit: Visit, make: Make, every: float) -> Response:
    """The page as a stream: looked at every so many seconds, sent when it has changed. Raises `TooManyStreams`."""
    stream = visit.mount.streams.admit(visit.request.environ)
    app, environ = current_app._get_current_object(), visit.request.environ  # type: ignore[attr-defined]

    def page() -> bytes:
        # As a new request: who asks is looked at again, and addresses are those that he came by.
        with app.request_context(environ) as context:
            again = Visit.of(visit.operation, visit.mount, context.request, visit.around)
            again.token = visit.token
            again.admit()
            return _recent(again, make)

    heard = visit.request.headers.get("Last-Event-ID", "")
    return stream.answer(_parts(visit, page, every, heard, stream.over))


def _parts(visit: Visit, page: Callable[[], bytes], every: float, heard: str, over: threading.Event) -> Iterator[bytes]:
    heartbeat, pages = visit.mount.heartbeat, visit.dashboard.pages
    ends, silent_since = time.monotonic() + LIFE, time.monotonic()
    yield f"retry: {RETRY}\n\n".encode()
    while time.monotonic() < ends:
        try:
            html = page()
        except MLQueueError:
            return  # it comes again, and is told why
        tag = _tag(html)
        if tag != heard:
            heard, silent_since = tag, time.monotonic()
            yield f"id: {tag}\nevent: page\ndata: ".encode() + dump(html.decode()) + b"\n\n"
        elif time.monotonic() - silent_since >= heartbeat:
            silent_since = time.monotonic()
            yield HEARTBEAT
        if over.wait(max(every, pages.wait)):
            return
