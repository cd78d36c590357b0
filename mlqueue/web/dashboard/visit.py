"""`Visit`: a request for a page, with who makes it, what he may do, and the ways to answer.

Changes are POSTs. Each carries a token that stands in a cookie too, which a page of another site can neither read nor
set, and comes from a page of this site, as its browser says; so it is wherever the host keeps its sessions, and where
there are none. What somebody changes is noted in the store.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from flask import Request, Response

from ...errors import Forbidden, InvalidArguments, StoreError
from ...job import State
from ...overview import Now
from ..auth import ADMIN, BearerKeys, Hook, Principal
from ..blueprint import admit
from ..call import Call
from ..operation import Operation
from .mount import Dashboard
from .render import template

__all__ = ["PLACE_OF_TOKEN", "CookieKeys", "Visit", "with_cookies"]

#: The cookie that has the token of forms, and the one that has an API key.
FORM: Final = "mlqueue_form"
KEY: Final = "mlqueue_key"

#: For how long a browser keeps a key, in seconds.
KEY_HOLDS: Final = 30 * 86400

#: What a page may load: what the dashboard has, and nothing that stands in a page itself. `data:` is for the small
#: pictures of arrays.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

#: What pages that are made for several visitors have in the place of the token of forms; no visitor has it.
PLACE_OF_TOKEN: Final = secrets.token_hex(16)

#: The longest text of a form's field that is looked at as a name.
MAX_NAME: Final = 300


class CookieKeys:
    """Takes API keys from a header, or from the cookie of who has signed in with one."""

    def __init__(self, keys: BearerKeys) -> None:
        self._keys = keys

    def __call__(self, request: Request) -> Principal | None:
        if "Authorization" in request.headers:
            return self._keys(request)
        return self.principal_of(request.cookies.get(KEY, ""))

    def principal_of(self, token: str) -> Principal | None:
        """Who has this key."""
        return self._keys.principal_of(token)


def with_cookies(hooks: Sequence[Hook]) -> tuple[Hook, ...]:
    """The hooks, those of API keys with a way to sign in by a page."""
    return tuple(CookieKeys(hook) if isinstance(hook, BearerKeys) else hook for hook in hooks)


class Visit(Call):
    """A request for a page."""

    def __init__(self, operation: Operation, mount: Dashboard, request: Request, around: Mapping[str, Any]) -> None:
        super().__init__(operation, mount, request, around)
        self.dashboard = mount
        self._cookies: dict[str, tuple[str, int | None]] = {}
        known = request.cookies.get(FORM, "")
        #: What forms carry.
        self.token = known if re.fullmatch(r"[0-9a-f]{32}", known) else secrets.token_hex(16)
        if self.token != known:
            self._cookies[FORM] = (self.token, None)

    # Who it is

    @property
    def keys(self) -> CookieKeys | None:
        """Where one signs in with a key; None where the host says who it is."""
        return next((hook for hook in self.mount.hooks if isinstance(hook, CookieKeys)), None)

    @property
    def who(self) -> str:
        """Who it is, for the notes of what was done."""
        name = self.principal.name if self.principal else ""
        address = self.request.remote_addr or ""
        return f"{name} ({address})" if name and address else name or address or "somebody"

    @property
    def has_signed_in(self) -> bool:
        """Whether it is by a key in a cookie."""
        return self.keys is not None and KEY in self.request.cookies

    def may(self, scope: str) -> bool:
        """Whether a change that asks for this scope may be made from here, by who asks."""
        return not self.dashboard.read_only and self.principal is not None and self.principal.may(scope)

    @property
    def sees_values(self) -> bool:
        """Whether arguments and results are shown."""
        return self.principal is not None and self.principal.may(self.dashboard.values_scope)

    def admit(self) -> None:
        """Raises `Unauthorized` or `Forbidden` unless the request may do what it asks for."""
        admit(self)
        if self.request.method in ("GET", "HEAD"):
            return
        if self.dashboard.read_only and self.operation.scope is not None:
            raise Forbidden("this dashboard is read-only: nothing can be changed by it.")
        self.check_token()

    def check_token(self) -> None:
        """Raises `Forbidden` for a form that is none of ours."""
        given = self.request.form.get("token", "")
        if FORM not in self.request.cookies or not hmac.compare_digest(given.encode(), self.token.encode()):
            raise Forbidden("this form has expired, or is none of ours. Go back, load the page anew, and try again.")

    # What is asked for

    def asked(self, name: str) -> str:
        """A text of the query, without what surrounds it; empty when there is none."""
        return self.request.args.get(name, "")[:MAX_NAME].strip()

    def view(self, names: Iterable[str]) -> dict[str, list[str]]:
        """What the query has of these, to come back to the same view: filters, and a place in a list."""
        found = {name: [text for text in self.request.args.getlist(name) if text] for name in names}
        return {name: texts for name, texts in found.items() if texts}

    def number(self, name: str) -> int | None:
        """A number of the query; None when there is none."""
        text = self.asked(name)
        return int(text) if re.fullmatch(r"\d{1,16}", text) else None

    def field(self, name: str) -> str:
        """A text of the form that must be there."""
        text = self.request.form.get(name, "")
        if not text or len(text) > MAX_NAME:
            fault = "is missing" if not text else "is too long"
            raise InvalidArguments(f"{name} {fault}.", faults=[(name, fault)])
        return text

    def is_sure(self) -> bool:
        """Whether a change that cannot be undone was confirmed."""
        return self.request.form.get("sure") == "yes"

    @property
    def clock(self) -> float:
        """The time, in Unix seconds."""
        return time.time()

    @property
    def available(self) -> frozenset[str]:
        """The names of the pages that there are for who asks."""
        assert self.principal is not None
        names = {page.name for page in self.mount.operations if page.tag == "pages"}
        return frozenset(names if self.principal.may(ADMIN) else names - {"show_acts"})

    #: Pages that stand below another one in the navigation.
    under: Mapping[str, str] = {
        "list_jobs": "show_job",
        "list_dead_letters": "show_dead_letter",
        "list_actors": "show_actor",
    }

    @property
    def dead_count(self) -> int:
        """How many dead letters there are; nought where the store does not answer."""
        try:
            return self.now.counts.get(State.DEAD, 0)
        except StoreError:
            return 0

    @property
    def now(self) -> Now:
        """How the namespace stands, as of a second ago at most."""
        return self.dashboard.now()

    # Answers

    def page(self, name: str, status: int = 200, **values: Any) -> Response:
        """An answer that is a page, of the template of this name."""
        html = template(name).render(visit=self, told=_told(self), **values)
        return Response(html, status, content_type="text/html; charset=utf-8")

    def ask_whether_sure(self, question: str, act: str, fields: Mapping[str, Any], back: str) -> Response:
        """A page that asks whether that is meant: it sends the same form once more, lists as fields of one name."""
        return self.page("sure", question=question, act=act, fields=fields, back=back)

    def note(self, act: str, what: str) -> None:
        """Notes what is about to be done: whatever becomes of it then, it was asked for."""
        self.store.note_act(self.who[:200], act, what[:500])
        self.dashboard.forget()

    def go(self, name: str, told: str = "", number: int | None = None, **values: Any) -> Response:
        """An answer that leads to a page; `told` names what that page says of what was done (see `TOLD`)."""
        self.dashboard.forget()
        more = {"told": told} if told else {}
        url = self.url(name, **values, **more, **({"n": number} if number is not None else {}))
        return Response(status=303, headers={"Location": url})

    def keep_key(self, token: str | None) -> None:
        """Has the browser keep a key, or forget it."""
        self._cookies[KEY] = ("", 0) if token is None else (token, KEY_HOLDS)

    def finish(self, response: Response) -> Response:
        """The answer with what all pages have."""
        for name, (value, age) in self._cookies.items():
            response.set_cookie(
                name,
                value,
                max_age=age,
                path=self.url("show_overview"),
                secure=self.request.is_secure,
                httponly=True,
                samesite="Lax",
            )
        response.headers.setdefault("Content-Security-Policy", POLICY)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Referrer-Policy", "same-origin")
        response.headers.setdefault("Cache-Control", "no-store")
        response.vary.add("Cookie")
        return response

    @classmethod
    def of(cls, operation: Operation, mount: object, request: Request, around: Mapping[str, Any]) -> Visit:
        """The visit that a request is."""
        return cls(operation, cast(Dashboard, mount), request, around)


#: What a page says of what was done just before, by the name in its address; `{n}` is how many.
TOLD: Final[Mapping[str, str]] = {
    "cancelled": "Cancelled: {n}. One that runs is told to stop, and ends when it heeds that.",
    "retried": "Back in the queue: {n}.",
    "requeued": "Back in the queue: {n}.",
    "purged": "Forgotten: {n}.",
    "redelivered": "The callback is delivered again.",
    "submitted": "Submitted.",
    "paused": "Paused. Jobs that run go on; none is started until it is resumed.",
    "resumed": "Resumed.",
    "drained": "Drained: {n} waiting jobs were forgotten.",
    "asked": "The worker is asked. Its supervisor hears of that with its next sign of life.",
    "limit": "It has {n} slots now.",
    "nothing": "Nothing was selected.",
}


def _told(visit: Visit) -> str:
    text = TOLD.get(visit.asked("told"), "")
    return text.format(n=f"{visit.number('n') or 0:,}")
