"""Limits: how many jobs that need the same thing run at a time, and what an actor says of that.

A *resource* is anything of which there are so many: ``@mlq.actor(resources={"gpu": 1})`` needs a slot of ``gpu``, and
``mlqueue limit gpu 2`` says that there are two. ``@mlq.actor(concurrency=3)`` limits the jobs of that actor (with a
``concurrency_key`` those of each key); that limit is called ``@`` and the actor's name. A job without a slot for it
waits in its queue and costs nothing; the end of another one has it started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Final, cast

from .errors import InvalidJob
from .message import KEYS, MAX_KEY, is_key
from .store import Store

__all__ = [
    "MAX_CAPACITY",
    "Limit",
    "Limits",
    "check_actor",
    "check_keys",
    "check_limit",
    "key_functions",
    "key_of",
    "takes_turns",
]

#: The most slots that a limit may have.
MAX_CAPACITY: Final = 10_000

#: The longest name of a resource, in characters.
MAX_NAME: Final = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit, as it stands."""

    #: The resource, or ``@`` and the name of an actor (and ``/`` and a concurrency key, while jobs of that run).
    name: str
    #: How many slots it has.
    capacity: int
    #: Who said so: ``hand`` (`Limits.set`, ``mlqueue limit``), ``worker`` (its settings, or an actor's ``concurrency``)
    #: or ``default``: nobody did, so that there is one.
    source: str
    #: The job that holds each slot that is in use; those of a resource are numbers from 0 on.
    held_by: Mapping[str, str]

    @property
    def used(self) -> int:
        """How many slots are in use. More than there are, for a while, when there were more before."""
        return len(self.held_by)


class Limits:
    """The limits of a namespace; ``mlq.limits``."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, name: str, capacity: int) -> None:
        """Sets how many slots there are: of a resource, or with ``@`` and its name for the jobs of an actor.

        It goes before what settings and actors say. Jobs that run go on, whatever their number; 0 lets no other start.
        """
        self._store.set_limit(check_limit(name), check_capacity(capacity, name))

    def unset(self, name: str) -> int:
        """Forgets what was `set`: what settings or the actor say counts again. How many slots there are now."""
        return self._store.set_limit(check_limit(name), None)

    def list(self) -> list[Limit]:
        """All limits that were set, that a worker has told of, or that are in use."""
        return [
            Limit(name=name, capacity=capacity, source=source or "default", held_by=held)
            for name, capacity, source, held in self._store.limits()
        ]

    def get(self, name: str) -> Limit | None:
        """The limit of this name; None when nobody has spoken of it."""
        return next((limit for limit in self.list() if limit.name == name), None)


def check_limit(name: object) -> str:
    """The name of a limit, checked."""
    if not isinstance(name, str) or not 0 < len(name.removeprefix("@")) <= MAX_NAME or not name.isprintable():
        raise InvalidJob(
            f"limit {name!r}: a limit is called as its resource (1 to {MAX_NAME} characters), or '@' and the name of "
            "an actor."
        )
    return name


def check_capacity(capacity: object, name: str) -> int:
    """How many slots a limit has, checked."""
    if not isinstance(capacity, int) or isinstance(capacity, bool) or not 0 <= capacity <= MAX_CAPACITY:
        raise InvalidJob(f"limit {name}: got {capacity!r}; a limit has from 0 to {MAX_CAPACITY:,} slots.")
    return capacity


def check_actor(name: str, options: Mapping[str, Any]) -> None:
    """Raises `InvalidJob` for options about limits that an actor cannot have."""
    resources = options.get("resources")
    if resources is not None:
        if not isinstance(resources, Mapping) or not resources:
            raise InvalidJob(f"actor {name}: resources={resources!r}; give names and numbers: resources={{'gpu': 1}}.")
        for resource, number in resources.items():
            if not isinstance(resource, str) or resource.startswith("@"):
                raise InvalidJob(f"actor {name}: resources={resources!r}: {resource!r} is no name of a resource.")
            check_limit(resource)
            if not _is_number(number):
                raise InvalidJob(
                    f"actor {name}: resources={resources!r}: a job needs from 1 to {MAX_CAPACITY:,} slots of "
                    f"{resource}; leave it out when it needs none."
                )
    most = options.get("concurrency")
    if most is not None and not _is_number(most):
        raise InvalidJob(f"actor {name}: concurrency={most!r}; give a number from 1 to {MAX_CAPACITY:,}, or None.")
    for key in ("concurrency_key", "unique_key"):
        if isinstance(options.get(key), str):
            raise InvalidJob(
                f"actor {name}: {key}={options[key]!r} would be that of all its jobs; give a function of their "
                f"arguments (lambda path: path), or give it when you submit: submit(..., {key}=...)."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_CAPACITY


def key_functions(options: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """The functions by which an actor makes keys of the arguments of its jobs."""
    return {name: options[name] for name in KEYS if callable(options.get(name))}


def check_keys(actor: str, keys: Iterable[str], given: Container[str]) -> None:
    """Raises `InvalidJob` for a key that an actor makes of the arguments where its function is not, and which was not
    given: without it the job would not be the only one, say."""
    for name in keys:
        if name not in given:
            raise InvalidJob(
                f"the {name} of a job of {actor} is made of its arguments by a function of the actor, which is not "
                f"here; give it when you submit: {name}=... (None for none), or --{name.replace('_', '-')} TEXT "
                "('' for none)."
            )


def takes_turns(options: Mapping[str, Any]) -> bool:
    """Whether an actor says that its jobs are to be told from each other when one is chosen to be started."""
    return options.get("fair_by") is not None or options.get("concurrency_key") is not None


def key_of(actor: str, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> str | None:
    """What an actor's function makes of arguments. Raises `InvalidJob` where that is no key."""
    try:
        value = function(*args, **kwargs)
    except Exception as error:
        raise InvalidJob(
            f"the {name} of actor {actor} could not be made: {type(error).__name__}: {error}. Its function is called "
            f"with the arguments of the job; or give {name}=... when you submit."
        ) from error
    if is_key(value):
        return cast(str | None, value)
    got = f"text of {len(value):,} characters" if isinstance(value, str) else type(value).__name__
    raise InvalidJob(
        f"the {name} of actor {actor} is a {got}; a text of 1 to {MAX_KEY} characters or None is allowed: str(...)."
    )
