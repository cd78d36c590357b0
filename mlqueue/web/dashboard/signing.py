"""Signing in with an API key, and out again."""

from __future__ import annotations

import re

from flask import Response

from ..operation import operation
from .visit import Visit

__all__ = ["show_sign_in", "sign_in", "sign_out"]


@operation("GET", "/sign-in", scope=None, tag="pages", answers={})
def show_sign_in(visit: Visit) -> Response:
    """Ask for a key."""
    return visit.page("sign_in", wrong=False) if visit.keys else visit.go("show_overview")


@operation("POST", "/sign-in", scope=None, tag="pages", answers={})
def sign_in(visit: Visit) -> Response:
    """Take a key: the browser keeps it, where no script of a page can read it. Then comes what was asked for first."""
    token = visit.request.form.get("key", "").strip()[:300]
    if visit.keys is None or visit.keys.principal_of(token) is None:
        return visit.page("sign_in", 403, wrong=True)
    visit.keep_key(token)
    wanted = visit.request.args.get("next", "")
    if wanted.startswith(visit.url("show_overview")) and re.fullmatch(r"/(?!/)[!-\[\]-~]*", wanted):
        return Response(status=303, headers={"Location": wanted})  # a page of this dashboard, and no other site's
    return visit.go("show_overview")


@operation("POST", "/sign-out", scope=None, tag="pages", answers={})
def sign_out(visit: Visit) -> Response:
    """Have the browser forget the key."""
    visit.keep_key(None)
    return visit.go("show_sign_in")
