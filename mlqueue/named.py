"""Data sources by name: what `MLQ.data_source` registers, and the actor that prepares batches of them.

A source that has a name travels to workers as that name: they have imported the factory, and make the source of it.
Nothing here knows what a data source is; that is the business of :mod:`mlqueue.batch`, which a worker imports with its
first job of the kind.
"""

from __future__ import annotations

import hashlib
import importlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Generic, NamedTuple, ParamSpec, TypeVar

from . import codec
from .errors import InvalidJob

__all__ = ["BATCHES", "NamedSource", "Reference", "code_digest", "serving_actor"]

P = ParamSpec("P")
S = TypeVar("S")

#: The queue in which batches are prepared, unless another is given.
BATCHES: Final = "batches"

#: The longest name of a source, in characters.
MAX_NAME: Final = 200


class Reference(NamedTuple):
    """How a source that was made by name is named: on the source it is the attribute ``reference``."""

    name: str
    #: The keyword arguments of the factory, as the codec writes them.
    kwargs: bytes


class NamedSource(Generic[P, S]):
    """The factory of a data source that workers know by its name; made by `MLQ.data_source`.

    Called as the function that it was, it makes the source here.
    """

    def __init__(self, name: str, factory: Callable[P, S], version: str | Callable[..., object] | None = None) -> None:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise InvalidJob(f"data_source({name!r}): the name is a text of 1 to {MAX_NAME} characters.")
        self.name, self.factory = name, factory
        self._version = version
        self.__doc__ = factory.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> S:
        """The source, made here. Only keyword arguments, of values that the codec carries: they name it."""
        if args:
            raise TypeError(f"{self.name}(...): give keyword arguments only; workers are told of them by name.")
        source = self.factory(*args, **kwargs)
        if not hasattr(source, "batch_iterator"):
            raise TypeError(
                f"the factory of data source {self.name!r} returned a {type(source).__name__}, not a data source; make "
                "it return one, as mlqueue.batch.data_source.ArrayDataSource([x, y])."
            )
        source.reference = Reference(self.name, codec.encode(kwargs, path=f"source {self.name}"))  # type: ignore[attr-defined]
        return source

    def make(self, kwargs: bytes) -> S:
        """The source of these arguments, as a `Reference` has them."""
        make: Callable[..., S] = self
        return make(**codec.decode(kwargs))

    def version(self, kwargs: bytes) -> str:
        """What has to be the same in trainer and worker: the factory's code, and what ``version=`` says now."""
        given = self._version(**codec.decode(kwargs)) if callable(self._version) else self._version
        return f"{code_digest(self.factory)}/{given}"


def code_digest(function: Callable[..., Any]) -> str:
    """A text that is the same for the same code of a function: its bytecode, constants, names and defaults, those of
    the functions in it too; not that of what it calls."""
    digest = hashlib.sha256()
    code = getattr(function, "__code__", None)
    if code is None:
        return hashlib.sha256(f"{type(function).__module__}.{type(function).__qualname__}".encode()).hexdigest()[:16]
    for text in _parts(code):
        digest.update(text + b"\0")
    defaults = getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)
    digest.update(repr(defaults).encode())
    return digest.hexdigest()[:16]


def _parts(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr((code.co_names, code.co_varnames, code.co_freevars)).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _parts(constant)
        elif isinstance(constant, frozenset):
            yield repr(sorted(map(repr, constant))).encode()  # their order is another one in each process
        else:
            yield repr(constant).encode()


def actor_name_of(queue_name: str) -> str:
    """The actor that prepares the batches of a queue."""
    return "mlqueue.batches" if queue_name == BATCHES else f"mlqueue.batches.{queue_name}"


def serving_actor(app: Any, queue_name: str) -> str:
    """Declares the actor that prepares batches, unless there is one; its name."""
    name = actor_name_of(queue_name)
    if name not in app.broker.actors:
        sources: Mapping[str, NamedSource[..., Any]] = app.sources
        broker = app.broker

        def prepare_batches(address: dict[str, Any], terms: dict[str, Any]) -> int:
            """Prepares batches for a trainer until it has none for a while; how many."""
            # With its first job only: it needs numpy, which a worker of other queues does not.
            serving = importlib.import_module("mlqueue.batch.serving")
            prepared: int = serving.serve(broker, sources, address, terms)
            return prepared

        app.actor(prepare_batches, actor_name=name, queue_name=queue_name, max_retries=0, result_ttl=0)
    return name
