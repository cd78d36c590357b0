"""`create_blueprint`: the routes of `mlqueue.web.table` as a Flask blueprint.

Nothing of the host is touched: there are no error handlers, no ``before_request``, no JSON provider of ours. What is
raised in an operation becomes an answer in its own view; what else goes wrong (a bug) is the host's to handle.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from flask import Blueprint, Response, request
from flask.sansio.app import App
from flask.sansio.blueprints import BlueprintSetupState
from werkzeug.exceptions import HTTPException

from ..app import MLQ
from ..errors import (
    ActorNotFound,
    Forbidden,
    InvalidArguments,
    JobNotFound,
    MLQueueError,
    SettingsError,
    StoreError,
    TooManyStreams,
    Unauthorized,
)
from ..schema import check
from .auth import ANYBODY, BearerKeys, Hook, challenge, check_hooks, refuse_foreign, refuse_unknown, who, who_by_memory
from .call import Call
from .mount import EXTENSION, Mount, mount_of_request
from .operation import PATHS, Operation
from .problems import answer_of, of_werkzeug
from .streams import Streams
from .table import OPERATIONS

__all__ = ["HEARTBEAT", "GuardedBlueprint", "admit", "check_bounds", "check_path", "create_blueprint", "view_of"]

logger = logging.getLogger("mlqueue.web")

#: The largest body, unless another bound is given.
MAX_BODY: Final = 2**20

#: How long ``Prefer: wait`` may wait, in seconds, and how many requests may wait at a time.
MAX_WAIT: Final = 60.0
MAX_WAITS: Final = 16

#: After how many seconds a silent stream says that it is there: proxies cut after a minute, or half.
HEARTBEAT: Final = 10.0


def create_blueprint(
    mlq: MLQ,
    auth: Hook | Sequence[Hook] | None = None,
    *,
    allow_anonymous: bool = False,
    name: str = "mlqueue",
    cors_origins: Sequence[str] = (),
    max_body: int = MAX_BODY,
    max_wait: float = MAX_WAIT,
    max_waits: int = MAX_WAITS,
    max_streams: int | None = None,
    heartbeat: float = HEARTBEAT,
) -> Blueprint:
    """The HTTP interface of a namespace, to be registered at any ``url_prefix``.

    Parameters:
      mlq: The namespace. No task code is needed beside it.
      auth: Who may do what: ``mlqueue.web.keys(mlq)`` for API keys, a function of the request that returns the scopes
        of the host's own user (``["read", "submit"]``, None for nobody), or a list of these, asked in order.
      allow_anonymous: Everybody may do everything. Only where nobody else can reach it.
      name: The blueprint's name; another one for each that an app registers.
      cors_origins: Origins (``https://example.com``) whose pages may use it. They send keys; cookies are not allowed.
      max_body: The largest body of a request, in bytes.
      max_wait: How long ``Prefer: wait=N`` may wait for the end of a job, in seconds.
      max_waits: How many requests of a process may wait at a time; one more is answered at once. Fewer than the threads
        of the server, else nobody else would be answered.
      max_streams: How many streams of events a process has at a time; one more is answered 503. None: two where each
        takes a thread (fewer than the server has, else nobody else would be answered), hundreds with gevent, none
        where the server does one thing at a time.
      heartbeat: After how many seconds a silent stream says that it is there.

    It refuses to be registered with neither `auth` nor `allow_anonymous`. Raises `SettingsError`.
    """
    if not isinstance(mlq, MLQ):
        raise SettingsError(f"create_blueprint({mlq!r}): give an MLQ, such as mlqueue.MLQ('vision').")
    hooks = check_hooks(auth)
    if hooks and allow_anonymous:
        raise SettingsError(
            "both auth and allow_anonymous=True were given: either everybody may do everything, or not."
        )
    for origin in cors_origins:
        if not isinstance(origin, str) or not origin.startswith(("http://", "https://")) or origin.endswith("/"):
            raise SettingsError(
                f"cors_origins: {origin!r} is no origin; write it as https://example.com, with no path."
            )
    check_bounds(
        max_body=max_body, max_waits=max_waits, max_streams=max_streams, max_wait=max_wait, heartbeat=heartbeat
    )

    def mounted(full_name: str) -> Mount:
        return Mount(
            name=full_name,
            mlq=mlq,
            hooks=hooks,
            cors_origins=tuple(cors_origins),
            max_body=max_body,
            max_wait=max_wait,
            operations=OPERATIONS,
            waits=threading.BoundedSemaphore(max_waits),
            streams=Streams(max_streams),
            heartbeat=heartbeat,
        )

    blueprint = GuardedBlueprint(name, guarded=bool(hooks) or allow_anonymous, mounted=mounted)
    for operation in OPERATIONS:
        blueprint.add_url_rule(operation.rule, operation.name, view_of(operation), methods=[operation.method])
    if cors_origins:
        blueprint.after_request(_allow_origins)
    return blueprint


#: What bounds what a blueprint does: whether it is a whole number, and what it is at least (of seconds: more than).
BOUNDS: Final[Mapping[str, tuple[bool, float]]] = {
    "max_body": (True, 1),
    "max_waits": (True, 0),
    "max_streams": (True, 0),
    "max_wait": (False, 0),
    "heartbeat": (False, 0.001),
}


def check_bounds(**given: Any) -> None:
    """Raises `SettingsError` for what is no such bound. ``max_streams`` may be None."""
    for name, value in given.items():
        if value is None and name == "max_streams":
            continue
        whole, least = BOUNDS[name]
        of_kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not of_kind or not value >= least:
            raise SettingsError(f"{name}={value!r}: give {'an int' if whole else 'seconds'}, {least} or more.")


class GuardedBlueprint(Blueprint):
    """A blueprint that is not registered unless it is known who may use it."""

    def __init__(
        self, name: str, *, guarded: bool, mounted: Callable[[str], Mount], made_by: str = "create_blueprint"
    ) -> None:
        super().__init__(name, __name__)
        self._guarded = guarded
        self._made_by = made_by
        self.record(functools.partial(_remember, mounted))

    def register(self, app: App, options: dict[str, Any]) -> None:
        """As Flask's."""
        if not self._guarded:
            raise SettingsError(
                "this blueprint would let everybody submit jobs and read results. Say who may, in one of three ways: "
                f"{self._made_by}(mlq, mlqueue.web.keys(mlq)) takes API keys (`mlqueue key new` makes them); "
                f'{self._made_by}(mlq, auth=lambda request: ["read"] if ... else None) asks your own login; '
                f"{self._made_by}(mlq, allow_anonymous=True) lets everybody, for a server that nobody else can reach."
            )
        super().register(app, options)


def _remember(mounted: Callable[[str], Mount], state: BlueprintSetupState) -> None:
    full_name = f"{state.name_prefix}.{state.name}".lstrip(".")
    state.app.extensions.setdefault(EXTENSION, {})[full_name] = mounted(full_name)


def view_of(operation: Operation) -> Callable[..., Response]:
    """The view of an operation, for the blueprint that the request comes to."""
    names = operation.path_names

    def view(**values: Any) -> Response:
        mount = mount_of_request()
        asked = request._get_current_object()  # type: ignore[attr-defined] # each look through the proxy costs 1 us
        # Of this request alone; a body is bounded before a byte of it is read.
        asked.max_content_length = asked.max_form_memory_size = mount.max_body
        around = {name: value for name, value in values.items() if name not in names}
        call = Call(operation, mount, asked, around)
        try:
            try:
                admit(call)
                check_path(operation, values)
                return operation.function(call, **{name: values[name] for name in names})
            finally:
                # Nothing is told, no fault in the request either, to who has a key no more. A refusal here takes the
                # place of what would have been answered.
                call.confirm()
        except MLQueueError as error:
            return _refusal(call, error)
        except HTTPException as error:
            ours = of_werkzeug(error, mount.max_body)
            if ours is None:
                raise  # of the host's own hook, which may redirect to its login
            return _refusal(call, ours)

    view.__name__ = operation.name
    return view


def admit(call: Call) -> None:
    """Raises `Unauthorized` or `Forbidden` unless the request may do what it asks for."""
    mount, scope = call.mount, call.operation.scope
    if scope is None:
        return
    # Where somebody has to log in, a page of another origin sends a key; it must not profit from a cookie.
    refuse_foreign(call.request, () if mount.hooks else mount.cors_origins)
    found = who_by_memory(mount.hooks, call.request) if call.operation.confirms_keys else None
    if found is not None:
        call.principal, call.unconfirmed = found
    else:
        call.principal = who(mount.hooks, call.request) if mount.hooks else ANYBODY
    if call.principal is None:
        raise refuse_unknown(mount.hooks, call.request)
    if not call.principal.may(scope):
        has = ", ".join(sorted(call.principal.scopes)) or "none"
        cure = f" `mlqueue key new --scope {scope}` makes a key that has it." if _takes_keys(mount) else ""
        raise Forbidden(f"this needs the scope {scope}; yours are: {has}.{cure}")


def _takes_keys(mount: Mount) -> bool:
    return any(isinstance(hook, BearerKeys) for hook in mount.hooks)


def check_path(operation: Operation, values: Mapping[str, Any]) -> None:
    """Raises the error for what is no id or no name, as for one that is not there."""
    for name in operation.path_names:
        schema, what = PATHS[name]
        try:
            check(schema, values[name], name)
        except InvalidArguments as error:
            text = f"{what} {error.message}"
            raise NOT_FOUND[name](text) if name in NOT_FOUND else InvalidArguments(text, faults=error.faults) from None


#: What names in a path stand for, that may not be there.
NOT_FOUND: Final[Mapping[str, type[MLQueueError]]] = {"job_id": JobNotFound, "actor": ActorNotFound}


def _refusal(call: Call, error: MLQueueError) -> Response:
    if error.status >= 500:
        # Nobody else hears of it: for the host this is an answer like any other.
        logger.log(
            logging.WARNING if isinstance(error, StoreError | TooManyStreams) else logging.ERROR,
            "%s %s: %s: %s",
            *(call.request.method, call.request.path, type(error).__name__, error.message),
        )
    response = answer_of(error, call.operation, call.request)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = challenge(call.mount.hooks)
    elif isinstance(error, Forbidden) and call.principal is not None and not call.principal.may(call.operation.scope):
        response.headers["WWW-Authenticate"] = challenge(call.mount.hooks, call.operation.scope)
    return response


#: Headers of ours that a page of another origin may send and read.
SENT: Final = "Authorization, Content-Type, Idempotency-Key, If-None-Match, Last-Event-ID, Prefer, Range"
READ: Final = (
    "Content-Disposition, Content-Range, ETag, Idempotent-Replayed, Link, Location, Preference-Applied, Retry-After"
)


def _allow_origins(response: Response) -> Response:
    """Lets pages of the listed origins use it. Flask itself answers OPTIONS."""
    origins = mount_of_request().cors_origins
    response.vary.add("Origin")
    if request.headers.get("Origin") in origins:
        response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        response.headers["Access-Control-Expose-Headers"] = READ
        if request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Headers"] = SENT
            response.headers["Access-Control-Allow-Methods"] = response.headers.get("Allow", "")
            response.headers["Access-Control-Max-Age"] = "600"
    return response
