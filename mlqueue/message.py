"""Between Dramatiq's messages and the jobs of the store.

A message's arguments and options are the job's body; queue, actor, id and timestamp are fields of its record. Options
that the store itself acts on (priority, tags, result_ttl ...) are lifted out of the body.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from dramatiq import Message

from . import codec
from .errors import DecodeError, EncodeError, InvalidJob
from .job import NewJob, check_id
from .settings import Settings
from .store import Held
from .store.chunks import BodyReference
from .urlpolicy import MAX_URL, is_url
from .webhooks import Webhook

#: The actor that runs the functions of MLQ's listeners; its one argument is the message that was posted.
LISTENER: Final = "mlqueue.listener"

#: Options that become fields of the record rather than part of the body.
LIFTED: Final = frozenset(
    {
        "priority",
        "result_ttl",
        "tags",
        "parent",
        "max_crashes",
        "max_stalls",
        "callback",
        "webhook",
        "functions",
        "job_timeout",
        "queue_timeout",
        "concurrency_key",
        "fair_by",
        "unique_key",
        "unique_for",
        "unique_policy",
    }
)

#: Those of them that are keys: an actor may make them of the arguments, with a function.
KEYS: Final = ("concurrency_key", "fair_by", "unique_key")

#: The longest such key, in characters.
MAX_KEY: Final = 200

#: A value of ``fair_by`` that begins so names a tag: the rest of it, and what follows it there, is the value.
BY_TAG: Final = "tag:"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and bool(0 <= value < 2**31)


def _is_webhook(value: object) -> bool:
    try:
        Webhook.of(value)
    except InvalidJob:
        return False
    return True


def _are_functions(value: object) -> bool:
    return isinstance(value, list | tuple) and 0 < len(value) <= 100 and all(_is_text(name, 200) for name in value)


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("queue_name"), str)
        and isinstance(value.get("actor_name"), str)
        and isinstance(value.get("args"), list | tuple)
        and isinstance(value.get("kwargs"), dict)
        and isinstance(value.get("options"), dict)
    )


def is_key(value: object) -> bool:
    """Whether it may be a concurrency key, a unique key, or what jobs take turns by."""
    return value is None or _is_text(value, MAX_KEY)


def _is_text(value: object, most: int) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= most:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


_A_KEY: Final = f"a text of 1 to {MAX_KEY} characters, or None"


#: Dramatiq's options: what each must be. A wrong type would end a worker's thread where it is first used.
OPTION_CHECKS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "retries": (_is_count, "an int, 0 or more (below 2 ** 31)"),
    "max_retries": (lambda value: value is None or _is_count(value), "an int, 0 or more (below 2 ** 31), or None"),
    "min_backoff": (_is_number, "a number of milliseconds"),
    "max_backoff": (_is_number, "a number of milliseconds"),
    "max_age": (lambda value: value is None or _is_number(value), "a number of milliseconds, or None"),
    "time_limit": (lambda value: value is None or _is_number(value), "a number of milliseconds, or None"),
    "notify_shutdown": (lambda value: isinstance(value, bool), "a bool"),
    "on_success": (lambda value: value is None or isinstance(value, str), "an actor or its name"),
    "on_failure": (lambda value: value is None or isinstance(value, str), "an actor or its name"),
    "on_retry_exhausted": (lambda value: value is None or isinstance(value, str), "the name of an actor"),
    "pipe_ignore": (lambda value: isinstance(value, bool), "a bool"),
    "pipe_target": (lambda value: value is None or _is_message(value), "a message as a dict"),
    "delay": (lambda value: value is None or _is_number(value), "a number of milliseconds"),
    "eta": (lambda value: value is None or _is_number(value), "Unix milliseconds"),
    "store_results": (lambda value: isinstance(value, bool), "a bool"),
    "group_completion_uuid": (lambda value: isinstance(value, str), "a str"),
    "group_completion_callbacks": (
        lambda value: isinstance(value, list) and all(map(_is_message, value)),
        "a list of messages as dicts",
    ),
    "throws": (
        lambda value: False,
        "set on the actor (@actor(throws=ValueError)): classes cannot travel in a message",
    ),
    "result_ttl": (lambda value: value is None or (_is_number(value) and value >= 0), "seconds, or None for ever"),
    "priority": (lambda value: _is_whole(value) and -1000 <= value <= 1000, "an int from -1,000 to 1,000"),
    "tags": (
        lambda value: isinstance(value, list | tuple) and all(_is_text(tag, 100) for tag in value),
        "a list of texts of 1 to 100 characters",
    ),
    "max_crashes": (lambda value: _is_count(value) and value > 0, "an int, 1 or more (below 2 ** 31)"),
    "max_stalls": (lambda value: _is_count(value) and value > 0, "an int, 1 or more (below 2 ** 31)"),
    "callback": (
        lambda value: value is None or is_url(value),
        f"a URL, http:// or https:// with a host and without a user, of at most {MAX_URL:,} characters",
    ),
    "webhook": (
        lambda value: value is None or _is_webhook(value),
        "a URL, http:// or https://, or a Webhook(url, events=[...])",
    ),
    "functions": (
        lambda value: value is None or _are_functions(value),
        "a list of 1 to 100 names of functions, or None for all",
    ),
    "job_timeout": (lambda value: value is None or (_is_number(value) and value > 0), "seconds (more than 0), or None"),
    "queue_timeout": (
        lambda value: value is None or (_is_number(value) and value > 0),
        "seconds (more than 0), or None",
    ),
    "hard_time_limit": (
        lambda value: value is None or (_is_number(value) and value > 0),
        "seconds (more than 0), or None",
    ),
    "kill": (lambda value: isinstance(value, bool), "a bool"),
    "job_logs": (lambda value: value is None or isinstance(value, bool), "a bool, or None for what the settings say"),
    "waits_count": (lambda value: isinstance(value, bool), "a bool"),
    "concurrency_key": (is_key, _A_KEY),
    "fair_by": (is_key, _A_KEY),
    "unique_key": (is_key, _A_KEY),
    "unique_for": (
        lambda value: value in ("queued", "active") or (_is_number(value) and 0 < value < 1e10),
        "'queued', 'active' or a number of seconds (more than 0)",
    ),
    "unique_policy": (lambda value: value in ("return", "reject", "replace"), "'return', 'reject' or 'replace'"),
    "resources": (lambda value: False, "set on the actor: @actor(resources={'gpu': 1})"),
    "concurrency": (lambda value: False, "set on the actor: @actor(concurrency=2)"),
}


def check_options(options: Mapping[str, object]) -> None:
    """Raises `InvalidJob` for an option of a wrong type. Unknown options are the business of who reads them."""
    for name, value in options.items():
        check = OPTION_CHECKS.get(name)
        if check is not None and not check[0](value):
            raise InvalidJob(f"option {name}={value!r}: it must be {check[1]}.")


def encode_body(message: Message[Any], settings: Settings) -> bytes:
    """A message's arguments and options as the store keeps them. Errors carry the path: ``args[0]['x']``."""
    options = {name: value for name, value in message.options.items() if name not in LIFTED}
    return codec.encode_call(message.args, message.kwargs, options or None, max_bytes=settings.max_message_bytes)


def to_job(
    message: Message[Any],
    settings: Settings,
    *,
    delay: float | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> NewJob:
    """The job that a message stands for. `delay` in seconds; `defaults` are its actor's options, for `LIFTED`."""
    check_options(message.options)
    if not isinstance(message.queue_name, str) or not message.queue_name:
        raise InvalidJob(f"queue_name={message.queue_name!r}: the name of a queue is a str that is not empty.")
    if not isinstance(message.actor_name, str) or not message.actor_name:
        raise InvalidJob(f"actor_name={message.actor_name!r}: the name of an actor is a str that is not empty.")
    options: dict[str, Any] = {"result_ttl": settings.result_ttl, **(defaults or {}), **message.options}
    eta, webhook = options.get("eta"), options.get("webhook")
    return NewJob(
        id=check_id(message.message_id),
        queue=message.queue_name,
        actor=message.actor_name,
        body=encode_body(message, settings),
        priority=options.get("priority", 0),
        delay=delay if eta is None else None,
        eta=eta / 1000 if eta is not None else None,
        result_ttl=options["result_ttl"],
        parent=options.get("parent"),
        tags=tuple(options.get("tags", ())),
        max_crashes=options.get("max_crashes"),
        max_stalls=options.get("max_stalls"),
        callback=options.get("callback"),
        webhook=None if webhook is None else Webhook.of(webhook),
        functions=tuple(options.get("functions") or ()),
        job_timeout=options.get("job_timeout"),
        queue_timeout=options.get("queue_timeout"),
        concurrency_key=options.get("concurrency_key"),
        fair_by=_fair_by(options),
        **_unique(options),
    )


def _fair_by(options: Mapping[str, Any]) -> str | None:
    value: str | None = options.get("fair_by")
    if value is None or not value.startswith(BY_TAG):
        return value
    prefix = value.removeprefix(BY_TAG)
    return next((tag for tag in options.get("tags", ()) if tag.startswith(prefix)), None)


def _unique(options: Mapping[str, Any]) -> dict[str, Any]:
    if options.get("unique_key") is None:
        return {}
    holds, kept = options.get("unique_for", "active"), options["result_ttl"]
    if not isinstance(holds, str) and kept is not None and kept < holds:
        raise InvalidJob(
            f"unique_for={holds:g}: the job is kept for {kept:g} s only after its end (result_ttl), so that nobody "
            "would know of it any more. Raise result_ttl, or lower unique_for."
        )
    return {
        "unique_key": options["unique_key"],
        "unique_for": holds,
        "unique_policy": options.get("unique_policy", "return"),
    }


def from_job(held: Held, body: bytes | memoryview | None = None) -> Message[Any]:
    """The message of a job that a worker holds; without arguments and options where these are in chunks, and `body`
    is not given, which is all of it. Raises `DecodeError` or `InvalidJob` for one that cannot be run."""
    absent = body is None and BodyReference.of(held.body) is not None
    args, kwargs, options = ([], {}, {}) if absent else decode_body(held.body if body is None else body)
    options.pop("eta", None)
    if held.retries:
        options["retries"] = held.retries
    return Message(
        queue_name=held.queue,
        actor_name=held.actor,
        args=tuple(args),
        kwargs=kwargs,
        options=options,
        message_id=held.id,
        message_timestamp=held.created_ms,
    )


def decode_body(body: bytes | memoryview) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Arguments, keyword arguments and options of a job. Raises `DecodeError` or `InvalidJob`."""
    args, kwargs, options = codec.decode_call(body)
    check_options(options)
    return args, kwargs, options


__all__ = ["DecodeError", "EncodeError", "check_options", "decode_body", "encode_body", "from_job", "to_job"]
