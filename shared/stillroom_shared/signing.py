"""Ed25519 signatures (RFC 8032) over bytes: what ties a release, an adapter or a ledger to the key that vouches for it.

Keys and signatures travel as lower-case hexadecimal text, so that they fit in JSON and on a command line. A signature
says who wrote the bytes, not what kind of bytes they are: whoever signs puts the kind inside (see `sealed.py`).
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from stillroom_shared.errors import ReleaseError
from stillroom_shared.files import sync
from stillroom_shared.vault import PLAIN, Vault


@dataclass(frozen=True)
class SigningKey:
    """A private Ed25519 key. Its representation never shows the secret.

    >>> key = SigningKey.generate()
    >>> verify(key.public, key.sign(b"release"), b"release"), verify(key.public, key.sign(b"release"), b"other")
    (True, False)
    """

    _secret: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path, *, vault: Vault = PLAIN) -> SigningKey:
        """Read what `save` wrote."""
        try:
            secret = load_pem_private_key(vault.open(path.name, path.read_bytes()), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise ReleaseError(f"{path} holds no signing key ({error}): name a file that Stillroom wrote") from error
        if not isinstance(secret, Ed25519PrivateKey):
            raise ReleaseError(f"{path} holds a {type(secret).__name__}, not an Ed25519 key: name another key file")
        return cls(secret)

    @classmethod
    def load_or_generate(cls, path: Path) -> SigningKey:
        """The key in this file; a new one, saved there, when there is no file."""
        if not path.exists():
            cls.generate().save(path)
        return cls.load(path)

    def save(self, path: Path, *, vault: Vault = PLAIN) -> None:
        """Write the key as PKCS#8 PEM, sealed by the vault, readable by its owner only; refuse to overwrite a file.

        Overwriting would lose the only key that existing releases, or a ledger, can be continued with.
        """
        text = self._secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.writelines(vault.seal(path.name, text))
                file.flush()
                os.fsync(file.fileno())
            # Whole or absent, and never over another key: a torn one could not be used or replaced.
            os.link(partial, path)
        except FileExistsError:
            raise ReleaseError(f"{path} exists: load that key, or choose another file for the new one") from None
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)

    @cached_property
    def public(self) -> str:
        """The public key, 64 hexadecimal digits."""
        return self._secret.public_key().public_bytes_raw().hex()

    def derive(self, *uses: str) -> SigningKey:
        """A key for one use, always the same one; nobody can tell that two of them come from one key (HKDF, RFC 5869)."""
        info = json.dumps(uses).encode()
        return SigningKey(
            Ed25519PrivateKey.from_private_bytes(
                HKDF(SHA256(), 32, salt=None, info=info).derive(self._secret.private_bytes_raw())
            )
        )

    def sign(self, data: bytes) -> str:
        """The signature of `data`, 128 hexadecimal digits."""
        return self._secret.sign(data).hex()


def verify(public_hex: str, signature_hex: str, data: bytes) -> bool:
    """Whether the signature is that key's signature of `data`; a malformed signature is simply not one.

    Raises:
        ReleaseError: `public_hex` is not a public key, so no answer would mean anything.
    """
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex))
    except ValueError as error:
        raise ReleaseError(
            f"{public_hex!r} is not an Ed25519 public key ({error}): give the 64 hexadecimal digits its owner published"
        ) from error
    try:
        public.verify(bytes.fromhex(signature_hex), data)
    except (InvalidSignature, ValueError):
        return False
    return True
