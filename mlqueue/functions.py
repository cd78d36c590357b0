"""Posted functions: listener functions that are sent to the workers of a name, instead of standing in their program.

A function travels as cloudpickle has it, which is code that runs when it is unpickled. So it travels signed: by an
HMAC under a key derived from the setting ``signing_key``, over the namespace and queue, the function's name, a serial
number, the time and the code. Nothing is unpickled here; who does that (`mlqueue.loading`) verifies first.

Serial numbers rise: what was once sent is refused when somebody sends it again, also after its removal, which leaves
the number behind. They are the microseconds of the signer's clock, so that signers need not know each other.
"""

from __future__ import annotations

import base64
import binascii
import functools
import inspect
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import FunctionNotFound, InvalidJob, MissingDependency, SignatureInvalid
from .settings import Settings
from .signing import Keyring
from .store import Store
from .store.functions import FunctionStore, StoredFunction

__all__ = ["Functions", "PostedFunction", "keyring", "name_of", "sign_function", "verify"]

#: What the keys are derived for.
PURPOSE: Final = "posted function"

#: The queue whose workers run what is posted.
QUEUE: Final = "default"

#: The namespace of an app that is given no name.
DEFAULT_NAMESPACE: Final = "default"

#: How far the time of a function that comes over HTTP may be from the clock here, in seconds.
TOLERANCE: Final = 300.0

#: The longest name, in characters.
MAX_NAME: Final = 200

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PostedFunction:
    """A posted function, as the store knows it."""

    name: str
    #: Higher with each time that the name is posted.
    serial: int
    #: When it was signed; Unix seconds by the signer's clock.
    time: float
    #: When it was posted; Unix seconds by the store's clock.
    posted_at: float
    #: How many bytes its code has.
    size: int
    #: Why a worker could not load it; None when none has said so.
    error: str | None = None


class Functions:
    """The posted functions of a namespace."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept = FunctionStore(store)

    def register(self, function: Function, name: str | None = None) -> PostedFunction:
        """Signs a function and posts it. Raises `SigningKeyMissing`, `InvalidJob`, `MissingDependency`."""
        ring = keyring(self._store.settings)
        chosen = check_name(name_of(function) if name is None else name)
        code = dumps(function, chosen, self._store.settings.max_message_bytes)
        serial = max(_now(), self._kept.serial(chosen) + 1)
        return self._put(_signed(ring, self._store.namespace, chosen, serial, code))

    def take(self, name: str, serial: int, moment: int, code: bytes, signature: bytes) -> PostedFunction:
        """Posts what somebody else has signed. Raises `SigningKeyMissing`, and `SignatureInvalid` when it was signed
        by another key or for another namespace, is too old, or has been sent before."""
        item = StoredFunction(check_name(name), serial, moment, code, signature)
        verify(keyring(self._store.settings), self._store.namespace, item)
        away = time.time() - moment
        if abs(away) > TOLERANCE:
            raise SignatureInvalid(
                f"the function {name!r} was signed {abs(away):.0f} s {'ago' if away > 0 else 'in the future'}; "
                f"{TOLERANCE:g} s are allowed. Sign it anew, just before it is sent; or a clock is wrong."
            )
        return self._put(item)

    def _put(self, item: StoredFunction) -> PostedFunction:
        newest = self._kept.put(item, uuid.uuid4().hex)
        if newest:
            raise SignatureInvalid(
                f"the function {item.name!r} has the serial {item.serial}, and one of {newest} has been posted or "
                "removed: it was sent before, or the clock of who signed it is behind. Sign it anew."
            )
        return PostedFunction(
            name=item.name,
            serial=item.serial,
            time=float(item.time),
            posted_at=self._store.now(),
            size=len(item.code),
        )

    def remove(self, name: str) -> None:
        """Takes a function from all workers. Raises `FunctionNotFound`."""
        if not self._kept.drop(check_name(name)):
            raise FunctionNotFound(
                f"no function {name!r} has been posted to {self._store.namespace!r}; `mlqueue functions ls` lists "
                "those that have."
            )

    def list(self) -> list[PostedFunction]:
        """All of them, in the order in which they run."""
        return [
            PostedFunction(
                name=one.name,
                serial=one.serial,
                time=float(one.time),
                posted_at=one.posted_ms / 1000,
                size=one.size,
                error=one.error,
            )
            for one in self._kept.list()
        ]


def sign_function(function: Function, key: str, *, name: str | None = None, namespace: str = DEFAULT_NAMESPACE) -> str:
    """A function as ``POST /consumer`` takes it: JSON with its name, code, serial, time and signature.

    Parameters:
      function: Called as ``function(msg, utils)``. One that is defined in the main program or a notebook travels with
        its code; one of a module by the name of that, which the workers need then.
      key: The signing key of the workers, or their newest.
      name: Its name, instead of the function's own.
      namespace: The namespace of the workers.

    It is taken for five minutes, once.
    """
    chosen = check_name(name_of(function) if name is None else name)
    code = dumps(function, chosen, Settings.max_message_bytes)
    ring = Keyring(Settings(signing_key=key).signing_keys, PURPOSE)
    item = _signed(ring, namespace, chosen, _now(), code)
    return json.dumps(
        {
            "name": item.name,
            "serial": item.serial,
            "time": item.time,
            "code": base64.b64encode(item.code).decode(),
            "signature": base64.b64encode(item.signature).decode(),
        }
    )


def read_signed(text: str) -> Mapping[str, Any]:
    """What `sign_function` gave, its code and signature as bytes. Raises `InvalidJob`."""
    try:
        given = json.loads(text)
        parts = {name: base64.b64decode(given[name], validate=True) for name in ("code", "signature")}
        return {**{name: given[name] for name in ("name", "serial", "time")}, **parts}
    except (ValueError, KeyError, TypeError, binascii.Error):
        raise InvalidJob("this is not what sign_function() gives.") from None


def keyring(settings: Settings) -> Keyring:
    """The keys for posted functions. Raises `SigningKeyMissing`."""
    return Keyring.of(settings, PURPOSE)


def verify(ring: Keyring, namespace: str, item: StoredFunction) -> None:
    """Raises `SignatureInvalid` unless one of the keys has signed this function for this namespace."""
    try:
        ring.verify(item.signature, *_parts(namespace, item))
    except SignatureInvalid:
        raise SignatureInvalid(
            f"the signature of the function {item.name!r} is of another key than those that are set here "
            f"(MLQUEUE_SIGNING_KEY), or for another namespace than {namespace!r}; nothing of it was loaded. Sign it "
            f"with that key for this one: sign_function(fn, key, namespace={namespace!r})."
        ) from None


def _signed(ring: Keyring, namespace: str, name: str, serial: int, code: bytes) -> StoredFunction:
    item = StoredFunction(name, serial, int(time.time()), code, b"")
    return item._replace(signature=ring.sign(*_parts(namespace, item)))


def _parts(namespace: str, item: StoredFunction) -> tuple[bytes, ...]:
    """What is signed. The purpose is in the key."""
    texts = (f"{namespace}/{QUEUE}", item.name, str(item.serial), str(item.time))
    return (*(text.encode() for text in texts), item.code)


def _now() -> int:
    return time.time_ns() // 1000


def dumps(function: Function, name: str, most: int) -> bytes:
    """The code of a function."""
    check_listener(function, name)
    try:
        import cloudpickle
    except ImportError as error:
        raise MissingDependency(
            "cloudpickle is not installed, and functions are sent with it: pip install 'mlqueue[functions]'"
        ) from error
    try:
        code: bytes = cloudpickle.dumps(function)
    except Exception as error:  # whatever the objects say that it refers to
        raise InvalidJob(
            f"the function {name!r} cannot be sent, since it refers to something that cannot be pickled "
            f"({type(error).__name__}: {error}). Make or open that within the function."
        ) from error
    if len(code) > most:
        raise InvalidJob(
            f"the function {name!r} has {len(code):,} bytes; {most:,} are allowed (MLQUEUE_MAX_MESSAGE_BYTES). What is "
            "large that it refers to is sent along: load that within the function."
        )
    return code


def check_name(name: object) -> str:
    """A name, checked."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable() or name == "<lambda>":
        raise InvalidJob(
            f"a function's name is {name!r}; it must be a text of 1 to {MAX_NAME} characters. Give one: "
            "register_function(fn, name='...')."
        )
    return name


def name_of(function: object) -> str:
    """The name of a listener's function."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    if not callable(function):
        raise InvalidJob(
            f"a listener is {function!r}; it must be a function that is called with the message and a dict: "
            "def listener(msg, utils): ..."
        )
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def check_listener(function: Function, name: str) -> None:
    """Raises `InvalidJob` unless a function can be called with a message and a dict."""
    name_of(function)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # one of C has none
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise InvalidJob(
            f"listener {name}{signature} cannot be called with the message and a dict ({error}): write it as "
            f"def {name}(msg, utils), or def {name}(msg, *args)."
        ) from None
