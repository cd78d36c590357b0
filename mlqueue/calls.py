"""Calls that are sent as code: the actor that runs what `mlqueue.joblib` sends, in every worker that has a signing key.

A call is a pickle (cloudpickle), signed with the key of the sender over the namespace, the job's id and the call; its
large arrays lie beside it, each named by its SHA-256 and stored once however many calls use it. Nothing is unpickled
before the signature has been verified, and what the call gave goes back signed, too.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import dramatiq

from .delivery import current_delivery
from .errors import InvalidJob, MissingDependency
from .job import Result
from .signing import Keyring
from .store import Store

__all__ = ["CALL", "QUEUE", "buffer_key", "call_actor", "open_answer", "sign_call"]

#: The name of the actor, and its queue.
CALL: Final = "mlqueue.call"
QUEUE: Final = "joblib"

#: What is signed, and how the two are told apart.
CALL_PURPOSE: Final = "joblib call"
ANSWER_PURPOSE: Final = "joblib result"

#: How long the result of a call is kept, in seconds; whoever sent the call removes it sooner.
RESULT_TTL: Final = 24 * 3600

#: How many bytes of arrays a worker process keeps for the calls to come.
MOST_KEPT: Final = 256 * 2**20


def call_actor(broker: Any) -> dramatiq.Actor[..., Any]:
    """The actor that runs calls; declared where a signing key is set."""
    options = {"max_retries": 0, "result_ttl": RESULT_TTL}
    return dramatiq.Actor(run, broker=broker, actor_name=CALL, queue_name=QUEUE, priority=0, options=options)


def run(code: bytes, buffers: Sequence[str], signature: bytes) -> Result:
    """Does one call, and gives what it gave or raised, pickled and signed."""
    delivery = current_delivery.get()
    if delivery is None:
        raise RuntimeError(f"{CALL} was called outside a worker; `mlqueue.joblib` sends calls to one.")
    store, job_id = delivery.broker.store, delivery.held.id
    Keyring.of(store.settings, CALL_PURPOSE).verify(signature, *_parts(store, job_id, code, buffers))
    call = pickle.loads(code, buffers=[kept.get(store, key) for key in buffers])  # noqa: S301 - verified
    try:
        outcome = (True, call())
    except Exception as error:  # noqa: BLE001 - raised where the call came from
        error.add_note(f"Raised by job {job_id} in a worker:\n{traceback.format_exc()}")
        outcome = (False, error)
    answer = _pickled(outcome)
    return Result(None, [answer, Keyring.of(store.settings, ANSWER_PURPOSE).sign(job_id.encode(), answer)])


def sign_call(store: Store, job_id: str, code: bytes, buffers: Sequence[str]) -> bytes:
    """The signature with which workers run a call. Raises `SigningKeyMissing`."""
    return Keyring.of(store.settings, CALL_PURPOSE).sign(*_parts(store, job_id, code, buffers))


def open_answer(store: Store, job_id: str, full: Any) -> Any:
    """What a call gave; raises what it raised, and `SignatureInvalid` for an answer that no worker of ours wrote."""
    answer, signature = full
    Keyring.of(store.settings, ANSWER_PURPOSE).verify(signature, job_id.encode(), answer)
    well, value = pickle.loads(answer)  # noqa: S301 - verified
    if not well:
        raise value
    return value


def buffer_key(run_id: str, content: Any) -> str:
    """The key under which an array is stored: whose it is, and its SHA-256."""
    return f"{run_id}:{hashlib.sha256(content).hexdigest()}"


def _parts(store: Store, job_id: str, code: bytes, buffers: Sequence[str]) -> list[bytes]:
    return [store.namespace.encode(), job_id.encode(), code, *(key.encode() for key in buffers)]


def _pickled(outcome: tuple[bool, Any]) -> bytes:
    dumps = pickler()
    try:
        return dumps(outcome)
    except Exception as error:  # noqa: BLE001 - as the call's own
        text = f"what the call gave or raised cannot be sent back: {type(error).__name__}: {error}"
        return dumps((False, InvalidJob(text)))


def pickler() -> Callable[..., bytes]:
    """``cloudpickle.dumps``. Raises `MissingDependency`."""
    try:
        import cloudpickle  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependency("code is sent with cloudpickle: pip install 'mlqueue[batch]'") from error
    dumps: Callable[..., bytes] = cloudpickle.dumps
    return dumps


class _Kept:
    """Arrays that calls of this process have used, the latest last, by their SHA-256."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contents: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def get(self, store: Store, key: str) -> bytes:
        digest = key.rpartition(":")[2]
        with self._lock:
            content = self._contents.get(digest)
            if content is not None:
                self._contents.move_to_end(digest)
                return content
        content = store.get_data(key)
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            gone = "is not there any more" if content is None else "has been altered"
            raise InvalidJob(f"an argument of this call {gone}; whoever sent it has ended, or sends it again.")
        with self._lock:
            if digest not in self._contents:
                self._contents[digest] = content
                self._bytes += len(content)
            while self._bytes > MOST_KEPT and len(self._contents) > 1:
                self._bytes -= len(self._contents.popitem(last=False)[1])
        return content


kept = _Kept()
