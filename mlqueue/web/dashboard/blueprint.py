"""`create_dashboard`: the pages as a Flask blueprint, with the routes of the HTTP interface that they use."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from flask import Blueprint, Response, abort, request, send_file
from werkzeug.exceptions import HTTPException
from werkzeug.urls import iri_to_uri

from ...app import MLQ
from ...errors import InvalidJob, MLQueueError, SettingsError, StoreError, Unauthorized
from ...keys import check_scopes
from ...overview import read_now
from .. import dead as api_dead
from .. import live, results, seen
from ..auth import READ, Hook, challenge, check_hooks
from ..blueprint import HEARTBEAT, GuardedBlueprint, check_bounds, check_path, view_of
from ..mount import mount_of_request
from ..operation import Operation
from ..problems import of_werkzeug
from ..streams import Streams
from . import actors, acts, callbacks, dead, functions, job, jobs, limits, overview, queues, signing, workers
from .follow import AGAIN, answer_again, follow, wants_events
from .mount import Dashboard, Recent
from .render import FILES, VERSION
from .visit import Visit, with_cookies

__all__ = ["create_dashboard"]

logger = logging.getLogger("mlqueue.web.dashboard")

#: The longest address of a page that one comes back to after signing in.
LONGEST_ADDRESS: Final = 2000

#: The largest form that is taken, in bytes, unless another bound is given.
MAX_BODY: Final = 2**20

#: The pages and what can be done by them. Whoever adds one adds it here.
PAGES: Final[tuple[Operation, ...]] = (
    overview.show_overview,
    jobs.list_jobs,
    jobs.change_jobs,
    job.show_job,
    job.cancel_job,
    job.retry_job,
    job.redeliver_callback,
    dead.list_dead_letters,
    dead.change_dead_group,
    dead.list_dead_group,
    dead.change_dead_letters,
    dead.show_dead_letter,
    dead.mend_dead_letter,
    workers.show_workers,
    workers.ask_worker,
    queues.show_queues,
    queues.change_queue,
    callbacks.show_callbacks,
    actors.list_actors,
    actors.show_actor,
    actors.submit_job,
    limits.show_limits,
    limits.change_limit,
    functions.show_functions,
    acts.show_acts,
    signing.show_sign_in,
    signing.sign_in,
    signing.sign_out,
)

#: Routes of the HTTP interface that pages load from, as they are.
LOADED: Final[tuple[Operation, ...]] = (
    live.stream_job_events,
    results.read_result,
    results.read_result_as,
    api_dead.export_dead_letters,
    seen.read_logs,
    seen.read_metrics,
)

#: Pages that can be followed, and how often each is looked at for that, in seconds.
FOLLOWED: Final[Mapping[str, float]] = {
    "show_overview": 2.0,
    "list_jobs": 1.0,
    "list_dead_letters": 5.0,
    "show_workers": 2.0,
    "show_queues": 2.0,
    "show_limits": 2.0,
    "show_functions": 2.0,
    "show_callbacks": 5.0,
}


def create_dashboard(
    mlq: MLQ,
    auth: Hook | Sequence[Hook] | None = None,
    *,
    allow_anonymous: bool = False,
    name: str = "mlqueue_dashboard",
    read_only: bool = False,
    values_scope: str = READ,
    max_body: int = MAX_BODY,
    max_streams: int | None = None,
    heartbeat: float = HEARTBEAT,
) -> Blueprint:
    """The dashboard of a namespace, to be registered at a ``url_prefix``.

    Parameters:
      mlq: The namespace. No task code is needed beside it.
      auth: Who may do what, as for `create_blueprint`. Where API keys are taken, people sign in with one on a page.
        Pages are for the scope ``read``; to submit, cancel and retry takes ``submit``, all else that changes something
        ``admin``.
      allow_anonymous: Everybody may do everything. Only where nobody else can reach it.
      name: The blueprint's name; another one for each that an app registers.
      read_only: Nothing can be changed by it, whoever asks.
      values_scope: The scope that shows arguments and results: ``submit`` or ``admin`` hides them from others. (The
        HTTP interface shows results to all who may read.)
      max_body: The largest form, in bytes.
      max_streams: How many streams of events a process has at a time, as for `create_blueprint`; beyond it pages ask
        again and again.
      heartbeat: After how many seconds a silent stream says that it is there.

    It refuses to be registered with neither `auth` nor `allow_anonymous`. Raises `SettingsError`.
    """
    if not isinstance(mlq, MLQ):
        raise SettingsError(f"create_dashboard({mlq!r}): give an MLQ, such as mlqueue.MLQ('vision').")
    check_bounds(max_body=max_body, max_streams=max_streams, heartbeat=heartbeat)
    hooks = with_cookies(check_hooks(auth))
    if hooks and allow_anonymous:
        raise SettingsError(
            "both auth and allow_anonymous=True were given: either everybody may do everything, or not."
        )
    try:
        [values_scope] = check_scopes(values_scope)
    except (InvalidJob, ValueError):
        raise SettingsError(f"values_scope={values_scope!r}: one of read, submit and admin.") from None

    def mounted(full_name: str) -> Dashboard:
        return Dashboard(
            name=full_name,
            mlq=mlq,
            hooks=hooks,
            cors_origins=(),
            max_body=max_body,
            max_wait=0.0,
            operations=(*PAGES, *LOADED),
            waits=threading.BoundedSemaphore(1),
            streams=Streams(max_streams),
            heartbeat=heartbeat,
            read_only=read_only,
            values_scope=values_scope,
            now=Recent(functools.partial(read_now, mlq.store)),
        )

    blueprint = GuardedBlueprint(
        name, guarded=bool(hooks) or allow_anonymous, mounted=mounted, made_by="create_dashboard"
    )
    for page in PAGES:
        blueprint.add_url_rule(page.rule, page.name, _page_view(page), methods=[page.method])
    for operation in LOADED:
        view = _guarded(operation, view_of(operation))
        blueprint.add_url_rule(operation.rule, operation.name, view, methods=[operation.method])
    blueprint.add_url_rule("/static/<version>/<file>", "send_static", _send_static)
    return blueprint


def _page_view(page: Operation) -> Callable[..., Response]:
    names = page.path_names

    def view(**values: Any) -> Response:
        mount = mount_of_request()
        request.max_content_length = request.max_form_memory_size = mount.max_body
        around = {name: value for name, value in values.items() if name not in names}
        visit = Visit.of(page, mount, request, around)
        try:
            visit.admit()
            check_path(page, values)
            answer = _answer(page, visit, {name: values[name] for name in names})
        except MLQueueError as error:
            answer = _refusal(visit, error)
        except HTTPException as error:
            ours = of_werkzeug(error, mount.max_body)
            if ours is None:
                raise  # of the host's own hook, which may redirect to its login
            answer = _refusal(visit, ours)
        return visit.finish(answer)

    view.__name__ = page.name
    return view


def _answer(page: Operation, visit: Visit, values: dict[str, Any]) -> Response:
    if page.name not in FOLLOWED:
        return page.function(visit, **values)

    def make(visit: Visit) -> Response:
        return page.function(visit, **values)

    if wants_events(visit):
        answer = follow(visit, make, FOLLOWED[page.name])
    else:
        answer = answer_again(visit, make) if AGAIN in visit.request.headers else make(visit)
    answer.vary.update(["Accept", AGAIN])
    return answer


def _refusal(visit: Visit, error: MLQueueError) -> Response:
    """The page that an error turns into; that to sign in, where it is for want of a key."""
    if isinstance(error, Unauthorized) and visit.keys is not None:
        return visit.go("show_sign_in", **_wanted(visit))
    if error.status >= 500:
        level = logging.WARNING if isinstance(error, StoreError) else logging.ERROR
        logger.log(level, "%s %s: %s: %s", visit.request.method, visit.request.path, type(error).__name__, error)
    response = visit.page("problem", error.status, error=error)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = challenge(visit.mount.hooks)
    return response


def _wanted(visit: Visit) -> dict[str, Any]:
    """The page to come back to after signing in, unless it is the one that comes anyway."""
    if visit.request.method != "GET":
        return {}
    wanted = iri_to_uri(visit.request.root_path + visit.request.full_path).rstrip("?")
    return {} if wanted == visit.url("show_overview") or len(wanted) > LONGEST_ADDRESS else {"next": wanted}


def _guarded(operation: Operation, view: Callable[..., Response]) -> Callable[..., Response]:
    """A route of the HTTP interface, which shows results to all who may read, behind the scope for these. (Records,
    which streams begin with, have short results.)"""

    def guarded(**values: Any) -> Response:
        visit = Visit.of(operation, mount_of_request(), request, {})
        try:
            visit.admit()
        except MLQueueError:
            return view(**values)  # it says so itself
        if not visit.sees_values:
            return Response("Your scopes do not show arguments and results.\n", 403, content_type="text/plain")
        return view(**values)

    guarded.__name__ = operation.name
    return guarded


def _send_static(version: str, file: str, **around: Any) -> Response:
    """A file of the pages. Who has it may keep it: another version has another address."""
    if file not in FILES:
        abort(404)
    response = send_file(FILES[file], max_age=31536000 if version == VERSION else 0)
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
