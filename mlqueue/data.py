"""What jobs and programs keep for each other: texts and bytes of any size under keys of their namespace."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Final

from .errors import InvalidJob
from .job import seconds
from .store import Store

#: The longest key, in characters.
MAX_KEY: Final = 512


class Data:
    """The data of a namespace; ``mlq.data``. Keys of one namespace are not seen in another."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, data: str | bytes, key: str | None = None, expiry: float | timedelta | None = None) -> str:
        """Keeps text or bytes under `key`, instead of what was there; the key (one is made when None).

        Whoever reads meanwhile gets the old data or the new, whole. They are forgotten after `expiry` seconds; without
        it they are kept until they are deleted. At most ``MLQUEUE_MAX_DATA_BYTES``.
        """
        if not isinstance(data, str | bytes):
            raise InvalidJob(
                f"data of type {type(data).__name__} cannot be kept; give a str or bytes (mlqueue.codec.encode makes "
                "bytes of other values)."
            )
        name = uuid.uuid4().hex if key is None else _check_key(key)
        value = _utf8(data, "data") if isinstance(data, str) else data
        most = self._store.settings.max_data_bytes
        if len(value) > most:
            raise InvalidJob(
                f"data of {len(value):,} bytes cannot be kept; allowed are {most:,} (MLQUEUE_MAX_DATA_BYTES). Raise "
                "that, or keep the data where all can read it and put its path."
            )
        self._store.put_data(name, value, seconds(expiry, "expiry"))
        return name

    def get(self, key: str) -> bytes | None:
        """What is kept under `key`, as bytes; None when there is nothing."""
        return self._store.get_data(_check_key(key))

    def delete(self, key: str) -> bool:
        """Forgets what is kept under `key`; False when there was nothing."""
        return self._store.drop_data(_check_key(key))


def _check_key(key: object) -> str:
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY:
        got = f"{len(key):,} characters" if isinstance(key, str) else f"a {type(key).__name__}"
        raise InvalidJob(
            f"the key of data is a str of 1 to {MAX_KEY} characters; got {got}. Leave it out to get one that is unique."
        )
    _utf8(key, "the key of data")
    return key


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidJob(
            f"{what}: a text with a lone surrogate ({text[error.start]!r} at {error.start}) cannot be kept; for the "
            "name of a file give os.fsencode(name)."
        ) from None


__all__ = ["Data"]
