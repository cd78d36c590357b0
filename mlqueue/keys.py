"""API keys: who may use the HTTP interface of a namespace, and for what.

A key is ``mlq_<id>_<secret>``. The store keeps the SHA-256 of the secret (which is random and long, so nothing slower
is needed), its scopes and its label; the key itself is shown once, when it is made. Every request asks the store, in
the call that it makes anyway where it can (see `ApiKeys.recall`), so a revoked key is refused from the next request
on, by every web process.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable
from typing import Final

from . import codec
from .errors import InvalidJob
from .store import Store
from .store.store import SeenKey

__all__ = ["SCOPES", "ApiKey", "ApiKeys", "check_scopes"]

#: What a key may be for: ``functions`` is to post and remove functions. ``admin`` includes the others.
SCOPES: Final = ("submit", "read", "functions", "admin")

#: How many keys a process remembers.
MOST_REMEMBERED: Final = 1024

_TOKEN: Final = re.compile(r"mlq_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_ID: Final = re.compile(r"[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key, as far as the store knows it: all but its secret."""

    #: What it is named by: 12 hex digits, the second part of the key.
    id: str
    scopes: tuple[str, ...]
    #: What its maker called it.
    label: str
    #: Unix seconds.
    created_at: float


class ApiKeys:
    """The API keys of a namespace."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._name = f"{store.root}:keys"
        #: What the store knew of keys that were right, by their ids.
        self._remembered: dict[str, bytes] = {}

    def new(self, scopes: Iterable[str], label: str = "") -> tuple[str, ApiKey]:
        """Makes a key: its text, which nobody can show again, and what is known of it."""
        key = ApiKey(id=secrets.token_hex(6), scopes=check_scopes(scopes), label=label[:200], created_at=time.time())
        secret = secrets.token_urlsafe(32)
        self._store.connector.execute("HSET", self._name, key.id, _encode(key, _digest(secret)))
        return f"mlq_{key.id}_{secret}", key

    def list(self) -> list[ApiKey]:
        """All keys, oldest first."""
        answer = self._store.connector.execute("HGETALL", self._name)
        keys = [_decode(key_id.decode(), data)[0] for key_id, data in zip(answer[::2], answer[1::2], strict=True)]
        return sorted(keys, key=lambda key: key.created_at)

    def revoke(self, key_id: str) -> bool:
        """Ends a key, from the next request on; False when there is none of this id."""
        if not _ID.fullmatch(key_id):
            raise InvalidJob(
                f"key {key_id[:4]}...: the id of a key is 12 hex digits, the part between the underscores of "
                "mlq_<id>_<secret>. `mlqueue key ls` lists them."
            )
        return bool(self._store.connector.execute("HDEL", self._name, key_id))

    def verify(self, token: str) -> ApiKey | None:
        """The key whose text this is, or None. Takes as long for a wrong secret as for a right one."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        data = self._store.connector.execute("HGET", self._name, match[1])
        if data is None:
            self._remembered.pop(match[1], None)
            return None
        key, digest = _decode(match[1], data)
        if not hmac.compare_digest(digest, _digest(match[2])):
            return None
        if len(self._remembered) >= MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[key.id] = data
        return key

    def recall(self, token: str) -> tuple[ApiKey, SeenKey] | None:
        """The key whose text this is as this process has seen it before, without asking the store; None where it has
        not. Whoever acts on it has the store see whether it is so still, as `Store.submit_once` and `Store.record_for`
        do."""
        match = _TOKEN.fullmatch(token)
        data = self._remembered.get(match[1]) if match else None
        if match is None or data is None:
            return None
        key, digest = _decode(match[1], data)
        return (key, (key.id, data)) if hmac.compare_digest(digest, _digest(match[2])) else None


def check_scopes(scopes: Iterable[str]) -> tuple[str, ...]:
    """Names of scopes (a text: parted by commas), checked, in the order of `SCOPES`."""
    names = set(re.split(r"[,\s]+", scopes.strip()) if isinstance(scopes, str) else scopes)
    if not names or not names <= set(SCOPES):
        got = ", ".join(sorted(map(str, names))) or "nothing"
        raise InvalidJob(f"scopes {got}: a key is for one or more of {', '.join(SCOPES)}; admin includes the others.")
    return tuple(name for name in SCOPES if name in names)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _encode(key: ApiKey, digest: bytes) -> bytes:
    return codec.encode([digest, list(key.scopes), key.label, key.created_at])


@functools.lru_cache(maxsize=MOST_REMEMBERED)
def _decode(key_id: str, data: bytes) -> tuple[ApiKey, bytes]:
    digest, scopes, label, created = codec.decode(data)
    return ApiKey(id=key_id, scopes=tuple(scopes), label=label, created_at=created), digest
