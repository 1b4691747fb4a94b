"""What seals the private files of a home, and its twin that does nothing, for a home in the clear.

A vault holds the data key of one home: 256 random bits, which no passphrase is needed to use and none can change. From it come
keys for single uses (HKDF-SHA256, RFC 5869): one for each SQLite file, which SQLCipher encrypts page by page, and one for
each time that a file is sealed whole.

A sealed file is a mark, 32 random bytes, then AES-256-GCM (NIST SP 800-38D) over pieces of 4 MiB. Its key comes from the
data key, the random bytes and the file's name, so no two writes share a key and the nonce can count: number of the piece and
whether it is the last (STREAM; Hoang, Reyhanitabar, Rogaway and Vizar 2015, https://eprint.iacr.org/2015/189).

Guarantees: what `open` returns is what `seal` was given under this name by this home, whole. Cut short, extended, reordered,
altered, of another name or of another home: `EncryptionError`, and nothing is returned. An *older* file of the same name and
home opens: whoever reads it must know its generation (derived indexes do).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from stillroom_shared.errors import EncryptionError

KEY_BYTES = 32
MARK = b"stillroom sealed 1\n"
_SALT_BYTES = 32
_PIECE = 1 << 22  # AESGCM takes at most 2 GiB at once, and an index may be larger
_TAG_BYTES = 16


@dataclass(frozen=True)
class Vault:
    """Seals with a data key of 32 bytes; without one it hands everything through. Its representation never shows the key.

    >>> vault = Vault(bytes(32))
    >>> sealed = b"".join(vault.seal("index.faiss", b"some ", b"vectors"))
    >>> vault.open("index.faiss", sealed), b"vectors" in sealed
    (b'some vectors', False)
    >>> PLAIN.seal("index.faiss", b"some ", b"vectors"), PLAIN.open("index.faiss", b"some vectors")
    ((b'some ', b'vectors'), b'some vectors')
    """

    _key: bytes | None = field(default=None, repr=False)

    @property
    def is_plain(self) -> bool:
        """Whether it does nothing."""
        return self._key is None

    def seal(self, name: str, *parts: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
        """What to write for content that is given in parts, in order; `name` is that of the file, not its path."""
        if self._key is None:
            return parts
        salt = secrets.token_bytes(_SALT_BYTES)
        content = memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
        cipher = AESGCM(self._derived("file", name, salt=salt))
        return (MARK + salt, *(cipher.encrypt(nonce, content[a:b], None) for nonce, a, b in _pieces(len(content))))

    def open(self, name: str, sealed: bytes) -> bytes:
        """The content of a file; `EncryptionError` when it is not what this vault sealed under this name."""
        if self._key is None:
            return sealed
        head = len(MARK) + _SALT_BYTES
        if sealed[: len(MARK)] == MARK and len(sealed) >= head + _TAG_BYTES:
            cipher = AESGCM(self._derived("file", name, salt=sealed[len(MARK) : head]))
            body = memoryview(sealed)[head:]
            try:
                return b"".join(
                    cipher.decrypt(nonce, body[a:b], None) for nonce, a, b in _pieces(len(body), _TAG_BYTES)
                )
            except InvalidTag:
                pass
        raise EncryptionError(f"{name} was altered, or is of another home: restore the file from a backup of this home")

    def database_key(self, use: str) -> str | None:
        """The raw key of a SQLite file, as SQLCipher takes it; None for one in the clear."""
        return None if self._key is None else f"x'{self._derived('database', use).hex()}'"

    def _derived(self, *uses: str, salt: bytes | None = None) -> bytes:
        assert self._key is not None
        return HKDF(SHA256(), KEY_BYTES, salt=salt, info=json.dumps(["stillroom", *uses]).encode()).derive(self._key)


PLAIN = Vault()
"""Of a home in the clear."""


def _pieces(length: int, overhead: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Nonce, begin and end of each piece of so many bytes; an empty content is one empty piece."""
    step = _PIECE + overhead
    count = max(1, -(-length // step))
    for number in range(count):
        last = number == count - 1
        yield number.to_bytes(11) + bytes([last]), number * step, min((number + 1) * step, length)
