"""Who may use the app: no accounts, no sessions, no cookies.

With a password (``DIGITS_PASSWORD``) everybody who knows it, by the login that browsers have themselves (HTTP Basic).
Without one, only this machine: the address of the visitor must be loopback, and the name by which he came here too, so
that no page of elsewhere whose name leads here can be read.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import Final

import flask
from flask import Request, Response

#: Names of this machine for itself.
LOCAL_NAMES: Final = ["localhost", "127.0.0.1", "[::1]"]

#: What a visitor of the pages may do through the HTTP interface.
SCOPES: Final = ("submit", "read")

SAFE: Final = ("GET", "HEAD", "OPTIONS")


class Visitors:
    """Lets visitors in."""

    def __init__(self, password: str | None) -> None:
        self._password = str(password) if password else None

    def scopes(self, request: Request) -> tuple[str, ...] | None:
        """What who makes this request may do through the HTTP interface; for `create_blueprint`."""
        return SCOPES if self._knows(request) else None

    def admit(self) -> Response | None:
        """Before each request of a page: who may not see it gets an answer here."""
        request = flask.request
        endpoint = request.endpoint or ""
        if endpoint.startswith(("mlqueue.", "mlqueue_dashboard.")) or endpoint in ("static", "orders.receive_callback"):
            return None  # the blueprints ask for themselves; the callback brings a token of its own
        if not self._knows(request):
            return self._refusal()
        if request.method not in SAFE and request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            return Response("This form was sent by a page of another site.\n", 403, content_type="text/plain")
        return None

    def _knows(self, request: Request) -> bool:
        if self._password is None:
            return request.remote_addr is not None and ipaddress.ip_address(request.remote_addr).is_loopback
        given = request.authorization
        if given is None or given.type != "basic":
            return False
        return hmac.compare_digest((given.password or "").encode(), self._password.encode())

    def _refusal(self) -> Response:
        if self._password is None:
            text = "This app serves its own machine alone, until DIGITS_PASSWORD is set.\n"
            return Response(text, 403, content_type="text/plain")
        headers = {"WWW-Authenticate": 'Basic realm="digits", charset="UTF-8"'}
        return Response("Which password?\n", 401, headers, content_type="text/plain")
