"""Who asks, and what for: keys, the host's own login, and the scopes that routes ask for.

Whatever says who asks is a function of the request: it gives the scopes that the one who asks has (names, or a
`Principal`), or None when it does not know him.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from flask import Request

from ..app import MLQ
from ..errors import Forbidden, SettingsError, Unauthorized
from ..keys import SCOPES, ApiKey, ApiKeys
from ..store.store import KEY_CURE, KEY_REFUSED, SeenKey

__all__ = [
    "ADMIN",
    "ANYBODY",
    "FUNCTIONS",
    "READ",
    "SUBMIT",
    "BearerKeys",
    "Hook",
    "Principal",
    "challenge",
    "check_hooks",
    "keys",
    "refuse_foreign",
    "refuse_unknown",
    "who",
    "who_by_memory",
]

SUBMIT: Final = "submit"
READ: Final = "read"
FUNCTIONS: Final = "functions"
ADMIN: Final = "admin"

#: The longest Authorization header that is looked at, in characters.
MAX_HEADER: Final = 512

#: Methods that change nothing.
SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})

#: What ``auth=`` takes: a function of the request that gives scopes, a `Principal` or None.
Hook = Callable[[Request], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who asks: a name that tells him from others (his idempotency keys are his own), and his scopes."""

    name: str
    scopes: frozenset[str]

    def may(self, scope: str | None) -> bool:
        """Whether he may use a route that asks for this scope."""
        return scope is None or scope in self.scopes or ADMIN in self.scopes


#: Who asks where everybody may do everything.
ANYBODY: Final = Principal("", frozenset(SCOPES))


class BearerKeys:
    """Takes ``Authorization: Bearer mlq_...``; see `keys`."""

    #: What a 401 answer asks for.
    challenge = "Bearer"

    def __init__(self, api_keys: ApiKeys) -> None:
        self._keys = api_keys

    def __call__(self, request: Request) -> Principal | None:
        token = _token_of(request)
        return self.principal_of(token) if token else None

    def principal_of(self, token: str) -> Principal | None:
        """Who has this key; None when it is none, or has been revoked."""
        key = self._keys.verify(token)
        return None if key is None else _principal(key)

    def recall(self, request: Request) -> tuple[Principal, SeenKey] | None:
        """Who comes with a key that was right when it was looked at last; see `ApiKeys.recall`."""
        token = _token_of(request)
        found = self._keys.recall(token) if token else None
        return None if found is None else (_principal(found[0]), found[1])


def _token_of(request: Request) -> str:
    kind, _, token = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" and len(token) <= MAX_HEADER else ""


def _principal(key: ApiKey) -> Principal:
    return Principal(f"key {key.id}", frozenset(key.scopes))


def keys(mlq: MLQ) -> BearerKeys:
    """The API keys of a namespace as ``auth=``; `mlqueue key new` makes them."""
    return BearerKeys(ApiKeys(mlq.store))


def check_hooks(auth: Hook | Sequence[Hook] | None) -> tuple[Hook, ...]:
    """What was given as ``auth=``, as functions to ask in order."""
    hooks: tuple[Any, ...] = (auth,)
    if auth is None or isinstance(auth, list | tuple):
        hooks = tuple(auth or ())
    for hook in hooks:
        if not callable(hook):
            raise SettingsError(
                f"auth={hook!r}: give a function of the request that returns its scopes (or None), "
                "mlqueue.web.keys(mlq), or a list of these."
            )
    return hooks


def who(hooks: Sequence[Hook], request: Request) -> Principal | None:
    """The first whom one of the hooks knows."""
    for hook in hooks:
        found = hook(request)
        if found is not None and found is not False:
            return found if isinstance(found, Principal) else Principal("", _scopes(found, hook))
    return None


def who_by_memory(hooks: Sequence[Hook], request: Request) -> tuple[Principal, SeenKey] | None:
    """Who comes with a key that was right last time: whoever uses this has the store look whether it is so still. Only
    where no other hook is there to be asked when it is not."""
    if len(hooks) == 1 and isinstance(hooks[0], BearerKeys):
        return hooks[0].recall(request)
    return None


def _scopes(found: Any, hook: Hook) -> frozenset[str]:
    names = found.replace(",", " ").split() if isinstance(found, str) else found
    if isinstance(names, Iterable):
        scopes = frozenset(names)
        if scopes <= frozenset(SCOPES):
            return scopes
    name = getattr(hook, "__qualname__", type(hook).__name__)
    raise SettingsError(
        f"the auth hook {name!r} returned a {type(found).__name__} that is no list of scopes: it returns None, a "
        f"Principal, or names among {', '.join(SCOPES)}."
    )


def refuse_unknown(hooks: Sequence[Hook], request: Request) -> Unauthorized:
    """The error for a request of nobody whom the hooks know."""
    if any(isinstance(hook, BearerKeys) for hook in hooks):
        return Unauthorized(KEY_REFUSED if "Authorization" in request.headers else f"there is no key; {KEY_CURE}")
    return Unauthorized("you are not logged in; log in at the site that this belongs to.")


def challenge(hooks: Sequence[Hook], scope: str | None = None) -> str:
    """The WWW-Authenticate header: of a 401 answer, and of a 403 answer for want of `scope`."""
    kind = next((hook.challenge for hook in hooks if isinstance(hook, BearerKeys)), "Session")
    return f'{kind} realm="mlqueue"' + (f', error="insufficient_scope", scope="{scope}"' if scope else "")


def refuse_foreign(request: Request, origins: Sequence[str]) -> None:
    """Raises `Forbidden` for a change that a page of another site, none of `origins`, has a visitor's browser ask for.

    A browser adds cookies to such a request, and a password that its user gave it (HTTP Basic), but never a bearer
    token. It says where the page is from, in Sec-Fetch-Site or Origin; programs that are no browsers say neither.
    """
    headers = request.environ  # a third of the time that request.headers takes
    if request.method in SAFE or headers.get("HTTP_AUTHORIZATION", "")[:7].lower() == "bearer ":
        return
    origin = headers.get("HTTP_ORIGIN")
    if origin in origins:
        return
    site = headers.get("HTTP_SEC_FETCH_SITE")
    own = site in ("same-origin", "none") if site else origin is None or urlsplit(origin).netloc == request.host
    if not own:
        raise Forbidden(
            f"this request comes from a page of {(origin or 'another site')[:200]}, which may not make it. List that "
            "in create_blueprint(cors_origins=[...]) and send a key, if it should."
        )
