"""`key.json` of an encrypted home: its data key, wrapped once for each way of unlocking it.

The data key is random and never changes; a way wraps it by AES-256-GCM (NIST SP 800-38D) under a key of its own. So another
passphrase rewrites this file and nothing else, and several ways may stand beside each other.

| way | the wrapping key is |
|---|---|
| `passphrase` | Argon2id of it (RFC 9106), version 1.3, with parameters and a random salt that stand in the file |
| `keyring` | 256 random bits in the system keyring, service "stillroom", under the id of the home |

New files take the second recommended option of RFC 9106, section 4: 3 passes over 64 MiB, 4 lanes, a salt of 128 bits; OWASP's
Password Storage Cheat Sheet asks for 19 MiB and 2 passes at least. What a file asks for is bounded on both sides: an altered
one must not keep a device busy, nor make it believe in a weak one.

Guarantees: a wrong passphrase and an altered file are refused by one message, from the tag of the wrapped key, before anything
of the home is opened. The id and the parameters are authenticated with it. Somebody who has an *older* copy of this file opens
the home with the passphrase of that time.
"""

from __future__ import annotations

import json
import secrets
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom_client import system_keyring
from stillroom_shared.errors import EncryptionError
from stillroom_shared.files import replace_file
from stillroom_shared.vault import KEY_BYTES

KEY_NAME = "key.json"
SHORTEST = 8  # characters, as NIST SP 800-63B asks of secrets that people choose
_NONCE_BYTES = 12
_Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=256)]


class _Way(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    nonce: _Hex = ""
    wrapped: _Hex = ""


class PassphraseWay(_Way):
    """Wrapped under Argon2id of a passphrase."""

    kind: Literal["passphrase"] = "passphrase"
    function: Literal["argon2id"] = "argon2id"
    passes: int = Field(default=3, ge=2, le=64)
    memory_kib: int = Field(default=1 << 16, ge=19 * 1024, le=1 << 21)
    lanes: int = Field(default=4, ge=1, le=16)
    salt: _Hex = Field(default_factory=lambda: secrets.token_hex(16), min_length=32)

    def key(self, passphrase: str) -> bytes:
        """The wrapping key; spellings that look alike are one passphrase (Unicode NFKC)."""
        from cryptography.hazmat.primitives.kdf.argon2 import Argon2id  # not in every version that the base takes

        secret = unicodedata.normalize("NFKC", passphrase).encode("utf-8", "surrogatepass")
        function = Argon2id(
            salt=bytes.fromhex(self.salt),
            length=KEY_BYTES,
            iterations=self.passes,
            lanes=self.lanes,
            memory_cost=self.memory_kib,
        )
        return function.derive(secret)


class KeyringWay(_Way):
    """Wrapped under a random key that the system keyring keeps."""

    kind: Literal["keyring"] = "keyring"


Way = Annotated[PassphraseWay | KeyringWay, Field(discriminator="kind")]


class KeyFile(BaseModel):
    """Content of `key.json`. `id` is random: it names the home in the keyring, wherever its folder is moved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    ways: tuple[Way, ...] = ()

    @classmethod
    def new(cls) -> KeyFile:
        """Of a home that nothing unlocks yet."""
        return cls(id=secrets.token_hex(16))

    @classmethod
    def load(cls, folder: Path) -> KeyFile:
        """Read it from the folder of sealed files."""
        path = folder / KEY_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise EncryptionError(
                f"{path} is gone, and without it nothing in {folder} can be read: restore it from a backup"
            ) from None
        except (OSError, ValidationError) as error:
            raise EncryptionError(f"{path} cannot be read: restore it from a backup of this home") from error

    def save(self, folder: Path) -> None:
        """Write it, in one step."""
        replace_file(folder / KEY_NAME, f"{self.model_dump_json(indent=1)}\n".encode())

    def has(self, kind: Literal["passphrase", "keyring"]) -> bool:
        """Whether this way is there."""
        return any(way.kind == kind for way in self.ways)

    def with_passphrase(self, data_key: bytes, passphrase: str) -> KeyFile:
        """The same home with this passphrase in place of another; `EncryptionError` when it is too short."""
        if len(passphrase) < SHORTEST:
            raise EncryptionError(
                f"a passphrase of {len(passphrase)} characters is guessed at once: take {SHORTEST} or more, better a sentence"
            )
        way = PassphraseWay()
        return self._with(way, way.key(passphrase), data_key)

    def with_keyring(self, data_key: bytes) -> KeyFile:
        """The same home with a new key for it in the system keyring; `EncryptionError` when there is none to trust."""
        return self._with(KeyringWay(), system_keyring.keep(self.id), data_key)

    def without_keyring(self) -> KeyFile:
        """The same home without that way; the keyring's key is forgotten by whoever saved this."""
        return self.model_copy(update={"ways": tuple(way for way in self.ways if way.kind != "keyring")})

    def by_passphrase(self, passphrase: str, folder: Path) -> bytes:
        """The data key; one message for all that can be wrong."""
        for way in self.ways:
            if isinstance(way, PassphraseWay) and (found := self._unwrapped(way, way.key(passphrase))):
                return found
        raise EncryptionError(f"this passphrase does not open {folder.parent}, or {folder / KEY_NAME} was altered")

    def by_keyring(self, folder: Path) -> bytes:
        """The data key; `EncryptionError` when the keyring does not give the key, or gives another."""
        for way in self.ways:
            if isinstance(way, KeyringWay) and (found := self._unwrapped(way, system_keyring.give(self.id))):
                return found
        raise EncryptionError(
            f"the key in the system keyring does not open {folder.parent}, or {folder / KEY_NAME} was altered"
        )

    def _with(self, way: PassphraseWay | KeyringWay, key: bytes, data_key: bytes) -> KeyFile:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        wrapped = AESGCM(key).encrypt(nonce, data_key, self._bound(way))
        made = way.model_copy(update={"nonce": nonce.hex(), "wrapped": wrapped.hex()})
        others = tuple(other for other in self.ways if other.kind != way.kind)
        return self.model_copy(update={"ways": (*others, made)})

    def _unwrapped(self, way: PassphraseWay | KeyringWay, key: bytes) -> bytes | None:
        try:
            found = AESGCM(key).decrypt(bytes.fromhex(way.nonce), bytes.fromhex(way.wrapped), self._bound(way))
        except (InvalidTag, ValueError):  # a nonce of another length is a ValueError
            return None
        return found if len(found) == KEY_BYTES else None

    def _bound(self, way: PassphraseWay | KeyringWay) -> bytes:
        """What the tag vouches for beside the key."""
        fields: dict[str, Any] = way.model_dump(exclude={"nonce", "wrapped"})
        return json.dumps({"schema_version": self.schema_version, "id": self.id, **fields}, sort_keys=True).encode()
