"""Signatures under the keys of the setting ``signing_key``: what was signed was written by who has the key, for the
purpose it is used for.

The setting may hold several keys, parted by commas, newest first: the first one signs, each of them verifies, so a key
is changed by putting the new one in front and taking the old one out when nothing signed with it is left. For each
purpose a key of its own is derived (HKDF, RFC 5869), so that what is signed for one is worth nothing for another.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from .errors import SignatureInvalid, SigningKeyMissing
from .settings import Settings

__all__ = ["Keyring"]

#: Bytes of a signature, and of a derived key.
SIZE: Final = 32

#: HKDF's salt: fixed, so that every process derives the same keys.
SALT: Final = b"mlqueue"


class Keyring:
    """The keys for one purpose, as ``posted function``."""

    def __init__(self, keys: Sequence[str], purpose: str) -> None:
        """Raises `SigningKeyMissing` when there are no keys."""
        if not keys:
            raise SigningKeyMissing(
                f"No signing key is set, and one is needed ({purpose}): code is only loaded from who has it. Set "
                f"MLQUEUE_SIGNING_KEY to the same secret for whoever sends and for the workers, for example the output "
                f"of: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        self.purpose = purpose
        self._keys = tuple(_derived(key.encode(), purpose.encode()) for key in keys)

    @classmethod
    def of(cls, settings: Settings, purpose: str) -> Keyring:
        return cls(settings.signing_keys, purpose)

    def sign(self, *parts: bytes) -> bytes:
        """The signature of these parts, in this order: 32 bytes."""
        return _mac(self._keys[0], parts)

    def verify(self, signature: bytes, *parts: bytes) -> None:
        """Raises `SignatureInvalid` unless one of the keys has signed these parts."""
        # All keys are tried, so that the time taken does not tell which one it was.
        if not sum(hmac.compare_digest(_mac(key, parts), signature) for key in self._keys):
            raise SignatureInvalid(
                f"The signature of this {self.purpose} is not of a key that is set here; nothing of it was loaded. "
                f"Whoever signed it needs the MLQUEUE_SIGNING_KEY of this process."
            )


def _derived(key: bytes, purpose: bytes) -> bytes:
    """HKDF-SHA256 for one block of output."""
    extracted = hmac.digest(SALT, key, hashlib.sha256)
    return hmac.digest(extracted, purpose + b"\x01", hashlib.sha256)


def _mac(key: bytes, parts: Sequence[bytes]) -> bytes:
    # With their lengths, so that no two lists of parts are one text.
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "big"))
        mac.update(part)
    return mac.digest()
