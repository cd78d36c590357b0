"""Signatures: what they bind, what is refused, and how keys are changed."""

from __future__ import annotations

import pytest

from mlqueue import Settings, SettingsError, SignatureInvalid, SigningKeyMissing
from mlqueue.signing import SIZE, Keyring

OLD, NEW = "the-old-secret-of-this-site", "the-new-secret-of-this-site"


def keyring(keys: str, purpose: str = "posted function") -> Keyring:
    return Keyring.of(Settings(signing_key=keys), purpose)


def test_what_was_signed_is_verified() -> None:
    signature = keyring(OLD).sign(b"name", b"code")
    assert len(signature) == SIZE
    keyring(OLD).verify(signature, b"name", b"code")


@pytest.mark.parametrize("parts", [(b"name", b"c0de"), (b"namec", b"ode"), (b"name", b"code", b""), (b"code", b"name")])
def test_other_parts_are_refused(parts: tuple[bytes, ...]) -> None:
    signature = keyring(OLD).sign(b"name", b"code")
    with pytest.raises(SignatureInvalid, match="MLQUEUE_SIGNING_KEY"):
        keyring(OLD).verify(signature, *parts)


@pytest.mark.parametrize("signature", [b"", b"\0" * SIZE])
def test_what_is_no_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        keyring(OLD).verify(signature, b"code")


def test_a_signature_for_one_purpose_is_worth_nothing_for_another() -> None:
    signature = keyring(OLD).sign(b"code")
    with pytest.raises(SignatureInvalid, match="data source"):
        keyring(OLD, "data source").verify(signature, b"code")


def test_keys_are_changed_without_a_gap() -> None:
    before = keyring(OLD).sign(b"code")
    both = keyring(f"{NEW}, {OLD}")
    both.verify(before, b"code")
    keyring(NEW).verify(both.sign(b"code"), b"code")
    with pytest.raises(SignatureInvalid):
        keyring(NEW).verify(before, b"code")


def test_the_key_of_a_purpose_is_derived_as_rfc_5869_says() -> None:
    """HKDF-SHA256 with the salt b"mlqueue", of 32 bytes; the signature an HMAC over length and bytes of each part."""
    from cryptography.hazmat.primitives import hashes, hmac
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derived = HKDF(hashes.SHA256(), 32, salt=b"mlqueue", info=b"posted function").derive(OLD.encode())
    expected = hmac.HMAC(derived, hashes.SHA256())
    expected.update((4).to_bytes(8, "big") + b"code")
    assert keyring(OLD).sign(b"code") == expected.finalize()


def test_without_a_key_nothing_is_signed_or_verified() -> None:
    with pytest.raises(SigningKeyMissing, match=r"one is needed \(posted function\)"):
        Keyring.of(Settings(), "posted function")


@pytest.mark.parametrize("keys", ["short", f"{NEW},short", ","])
def test_keys_that_can_be_guessed_are_no_setting(keys: str) -> None:
    with pytest.raises(SettingsError, match="16 characters or more"):
        Settings(signing_key=keys)


def test_keys_show_nowhere() -> None:
    settings = Settings(signing_key=f"{NEW},{OLD}")
    shown = next(one.value for one in settings.describe() if one.name == "signing_key")
    assert shown == "***,***"
    assert NEW not in repr(settings)
