"""The system keyring, by the `keyring` library (https://keyring.readthedocs.io): Secret Service, KWallet, macOS Keychain,
Windows Credential Locker, or whatever backend the owner configured.

It keeps one random key a home. A backend that keeps nothing, or keeps it unencrypted in a file, is refused: that file would lie
on the disk that the encryption is for.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Any

from stillroom_shared.errors import EncryptionError, MissingExtraError

SERVICE = "stillroom"
_KEY_BYTES = 32
_UNSAFE = ("plaintext", "null", "uncrypted")


def keep(name: str) -> bytes:
    """Put a new random key of 32 bytes into the keyring under this name; `EncryptionError` when it cannot be kept there."""
    keyring = _library()
    key = secrets.token_bytes(_KEY_BYTES)
    backend = keyring.get_keyring()
    for each in getattr(backend, "backends", [backend]):  # a chain writes to the first that it can
        kind = f"{type(each).__module__}.{type(each).__qualname__}"
        if any(word in kind.lower() for word in _UNSAFE):
            raise EncryptionError(f"the system keyring is {kind}, which keeps nothing safe: take a passphrase")
    try:
        keyring.set_password(SERVICE, name, key.hex())
        kept = keyring.get_password(SERVICE, name)
    except Exception as error:  # backends raise what their services raise
        raise EncryptionError(f"{_why(error)}: take a passphrase, or set a keyring up") from error
    if kept != key.hex():
        raise EncryptionError("the system keyring did not keep the key: take a passphrase")
    return key


def give(name: str) -> bytes:
    """The key under this name; `EncryptionError` when the keyring cannot be asked or has none."""
    try:
        found = _library().get_password(SERVICE, name)
    except MissingExtraError:
        raise
    except Exception as error:
        raise EncryptionError(_why(error)) from error
    try:
        key = bytes.fromhex(found or "")
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise EncryptionError(f"the system keyring has no key under {SERVICE!r}, {name!r}")
    return key


def forget(name: str) -> None:
    """Take the key out of the keyring, if it is there and the keyring can be asked."""
    with suppress(Exception):
        _library().delete_password(SERVICE, name)


def _library() -> Any:
    try:
        import keyring
    except ModuleNotFoundError as error:
        raise MissingExtraError("the system keyring", "encrypted", "keyring") from error
    return keyring


def _why(error: Exception) -> str:
    said = str(error).strip().splitlines()[:1] or [""]
    return f"the system keyring cannot be used ({type(error).__name__}{': ' if said[0] else ''}{said[0][:200]})"
