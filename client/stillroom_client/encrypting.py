"""Encrypt a home, and decrypt it again, in one step each: killed at any point, it is the old home or the new one.

Everything private is written anew beside what there is, and read back; one rename of the folder `sealed` says which of the two
counts; then the other goes. What a kill leaves in the clear is removed when the home is next opened (`sweeping.py`). Derived
indexes are not carried over: the next search builds them.

Nobody else may have the home open meanwhile, or what he writes would be lost: both hold SQLite's exclusive locks
throughout, and what is still open elsewhere makes them refuse.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stillroom_client import system_keyring
from stillroom_client.key_file import KeyFile
from stillroom_client.sweeping import UNFINISHED_NAME, note_unfinished, private_names, wipe
from stillroom_client.unlocking import SEALED_NAME, Private, is_encrypted, remember, unlock
from stillroom_shared import database
from stillroom_shared.errors import DataError, EncryptionError
from stillroom_shared.files import exclusive, private_folder, sync
from stillroom_shared.vault import KEY_BYTES, PLAIN, Vault

# Files of SQLite with the use of their keys, and whether readers go on beside a writer.
_DATABASES = {"store.sqlite3": ("store", True), "ledger.sqlite3": ("ledger", False)}
_DERIVED = "index."
_DAMAGED = ".damaged-"
_BESIDE = ("-wal", "-shm", "-journal", ".partial")
_WAIT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Protection:
    """How a home is to be unlocked: by a passphrase, by the system keyring, or by either. `EncryptionError` for neither."""

    passphrase: str | None = field(default=None, repr=False)
    keyring: bool = False

    def __post_init__(self) -> None:
        if self.passphrase is None and not self.keyring:
            raise EncryptionError("nothing would unlock this home: give a passphrase, or use the system keyring")


@contextmanager
def new_private(folder: Path, protection: Protection) -> Iterator[Private]:
    """An empty folder with a key file of its own, to fill; whoever leaves by an exception leaves no key in the keyring."""
    key, file = secrets.token_bytes(KEY_BYTES), KeyFile.new()
    try:
        if protection.passphrase is not None:
            file = file.with_passphrase(key, protection.passphrase)
        if protection.keyring:
            file = file.with_keyring(key)
        file.save(folder)
        yield Private(folder, Vault(key))
    except BaseException:
        if protection.keyring:
            system_keyring.forget(file.id)
        raise
    remember(file, key)


def encrypt(home: Path, protection: Protection) -> None:
    """Seal the private files of a home in the clear.

    Raises:
        EncryptionError: it is encrypted already, or open elsewhere.
        DataError: its files cannot be read: nothing was changed.
    """
    with exclusive(home):
        if is_encrypted(home):
            raise EncryptionError(
                f"{home} is encrypted already; `stillroom index passphrase` changes how it is unlocked"
            )
        for leftover in home.glob(f".{SEALED_NAME}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        plain = Private(home, PLAIN)
        with _held(plain) as held:
            with private_folder(home / SEALED_NAME) as partial, new_private(partial, protection) as sealed:
                _carry(plain, sealed, held)
                note_unfinished(partial)
            # Leaving committed: the folder has its name. Still held, so who waits for the old files finds them empty.
            wipe(home, private_names(home))
            (home / SEALED_NAME / UNFINISHED_NAME).unlink()
            sync(home / SEALED_NAME)


def decrypt(home: Path) -> None:
    """Lay the private files of an encrypted home open again. The same errors, and those of `unlock`.

    Its key stays in the keyring: a backup of the encrypted home may have no other.
    """
    if not is_encrypted(home):
        raise EncryptionError(f"{home} is not encrypted")
    sealed = unlock(home)
    with exclusive(home):
        if not is_encrypted(home):
            raise EncryptionError(f"{home} is not encrypted any more")
        with _held(sealed) as held:
            if found := private_names(home):
                raise EncryptionError(f"{home} holds {', '.join(found)} in the clear already: move them away first")
            note_unfinished(sealed.folder)
            _carry(sealed, Private(home, PLAIN), held)
            gone = home / f".{SEALED_NAME}.{secrets.token_hex(8)}.partial"
            sealed.folder.rename(gone)  # commits
            sync(home)
            wipe(home, [gone.name])


@contextmanager
def _held(private: Private) -> Iterator[dict[str, sqlite3.Connection]]:
    """The databases of a home, open, and locked against everybody."""
    held: dict[str, sqlite3.Connection] = {}
    try:
        for name, (use, _) in _DATABASES.items():
            if (private.folder / name).exists():
                held[name] = db = database.connect(
                    private.folder / name, private.vault.database_key(use), timeout=_WAIT_SECONDS
                )
                db.execute("PRAGMA locking_mode=EXCLUSIVE")
                db.execute("BEGIN EXCLUSIVE")  # the lock stays after the transaction
                db.execute("COMMIT")
        yield held
    except database.errors() as error:
        raise DataError(
            f"the files in {private.folder} cannot be used ({error}), and nothing was changed: end whatever has this home "
            "open; where a ledger is damaged, recover it first (`stillroom budget --recover`)"
        ) from error
    finally:
        for db in held.values():
            db.close()


def _carry(source: Private, target: Private, held: dict[str, sqlite3.Connection]) -> None:
    """Write every private file of `source` anew in `target`, and read it back."""
    for name, db in held.items():
        use, beside_writers = _DATABASES[name]
        os.close(os.open(target.folder / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with closing(
            database.connect(target.folder / name, target.vault.database_key(use), timeout=_WAIT_SECONDS)
        ) as made:
            made.execute("PRAGMA journal_mode=WAL" if beside_writers else "PRAGMA journal_mode=DELETE")
            database.copy(db, made)
            database.require_same(db, made)
        sync(target.folder / name)
    for name in private_names(source.folder):
        if name.startswith((_DERIVED, ".")) or name in held or name.endswith(_BESIDE):
            continue
        try:
            content = source.read(name)
        except EncryptionError:
            if _DAMAGED in name:  # kept as it was found; what could be read of it was taken over then
                continue
            raise
        target.write(name, content)
        if target.read(name) != content:
            raise DataError(
                f"{target.folder / name} does not read as it was written: nothing was changed; check the disk"
            )
    sync(target.folder)
