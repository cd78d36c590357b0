"""What a trainer asks of an actor that prepares batches, and what it is told of errors, as bytes.

Index batches travel as values of the codec. Functions, and index batches of classes of the user's own, are pickled and
signed: nobody who lacks the signing key can have code loaded.
"""

from __future__ import annotations

import builtins
import pickle
from typing import Any

import numpy as np

from mlqueue import codec
from mlqueue.batch import errors
from mlqueue.batch import pool_worker as worker
from mlqueue.batch.crew import BatchCall, Work, is_plain
from mlqueue.batch.iteration import ChoiceBatch, SeededBatch
from mlqueue.batch.pickling import pickle_code
from mlqueue.batch.process_crew import WorkerError
from mlqueue.errors import SignatureInvalid
from mlqueue.signing import SIZE, Keyring

__all__ = ["PURPOSE", "decode_request", "describe_error", "encode_request", "rebuild_error"]

#: What the keys are derived for that sign sources, functions, and what comes back from those.
PURPOSE = "data source"

#: Modules whose exceptions are made of their text alone, without anything being loaded.
KNOWN = {module.__name__: module for module in (builtins, errors)}

_PLAIN, _SIGNED = b"p", b"s"


def encode_request(work: Work, keys: tuple[str, ...]) -> bytes:
    """The request for a piece of work. Raises `SigningKeyMissing` where it needs a key and there is none."""
    if isinstance(work, BatchCall):
        if is_plain(work.index_batch):
            key = [int(part) for part in work.key]
            return _PLAIN + codec.encode(["batch", work.source.number, tagged(work.index_batch), key])
        request: tuple[Any, ...] = ("batch", work.source.number, work.index_batch, work.key)
    else:
        request = ("call", work.function, work.args, work.kwargs)
    keyring = Keyring(keys, PURPOSE)
    pickled = pickle_code(request, whole=True)[0]
    return _SIGNED + keyring.sign(b"request", pickled) + pickled


def decode_request(data: bytes, keys: tuple[str, ...]) -> tuple[Any, ...]:
    """The request that :func:`encode_request` wrote, as ``pool_worker.perform`` takes it."""
    if data[:1] == _PLAIN:
        kind, number, index_batch, key = codec.decode(data[1:])
        return kind, number, untagged(index_batch), tuple(key)
    signature, pickled = data[1 : 1 + SIZE], data[1 + SIZE :]
    Keyring(keys, PURPOSE).verify(signature, b"request", pickled)
    request: tuple[Any, ...] = worker.load(pickled)
    return request


def tagged(index_batch: Any) -> Any:
    """An index batch as a value that the codec carries."""
    kind = type(index_batch)
    if kind is SeededBatch:
        return ["s", tagged(index_batch.sample_indices), [int(part) for part in index_batch.key]]
    if kind is ChoiceBatch:
        return ["c", tagged(index_batch.sample_indices), index_batch.ds_index]
    if kind in (tuple, list):
        return ["t" if kind is tuple else "l", [tagged(part) for part in index_batch]]
    return index_batch


def untagged(value: Any) -> Any:
    """The inverse of :func:`tagged`."""
    if not isinstance(value, list):
        # The codec's arrays are views of the message; samplers' are the caller's own.
        return value.copy() if isinstance(value, np.ndarray) else value
    kind, rest, *more = value
    if kind == "s":
        return SeededBatch(untagged(rest), tuple(more[0]))
    if kind == "c":
        return ChoiceBatch(untagged(rest), more[0])
    parts = [untagged(part) for part in rest]
    return tuple(parts) if kind == "t" else parts


def describe_error(error: BaseException, keys: tuple[str, ...]) -> dict[str, Any]:
    """What a trainer needs to raise the error; itself, pickled, only with a signature."""
    described = worker.describe_error(error)
    pickled = described.pop("pickled")
    if pickled is not None and keys:
        described["pickled"] = pickled
        described["signature"] = signature_of(b"error", pickled.tobytes(), keys)
    return described


def signature_of(what: bytes, pickled: bytes, keys: tuple[str, ...]) -> np.ndarray:
    """A signature as what can travel in a batch."""
    return np.frombuffer(Keyring(keys, PURPOSE).sign(what, pickled), np.uint8)


def load_signed(what: bytes, described: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """What came pickled with its signature."""
    pickled = described["pickled"].tobytes()
    Keyring(keys, PURPOSE).verify(described["signature"].tobytes(), what, pickled)
    return worker.load(pickled)


def rebuild_error(described: dict[str, Any], work: Work, keys: tuple[str, ...]) -> BaseException:
    """The exception that a worker described, with its traceback there as a note.

    One of Python's own or of ours comes as itself; any other only where a signing key is set, else it is a
    ``WorkerError``.
    """
    error: BaseException | None = None
    if "pickled" in described:
        try:
            error = load_signed(b"error", described, keys)
        except (SignatureInvalid, pickle.UnpicklingError):
            error = None
        except Exception:  # noqa: BLE001 - an exception class may do anything when it is copied
            error = None
    else:
        module, _, name = described["type"].rpartition(".")
        kind = getattr(KNOWN.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            error = kind(described["text"])
    if not isinstance(error, BaseException):
        error = WorkerError(f"{described['type']}: {described['text']}")
    error.add_note(f"Raised in worker process {described['pid']} of host {described['host']} by {work}.")
    error.add_note("The traceback there:\n" + described["traceback"].rstrip())
    return error
