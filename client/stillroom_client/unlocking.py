"""`unlock(home)`: where the private files of a home are and what seals them, of one in the clear and an encrypted one alike.

An encrypted home has a folder `sealed/` with `key.json` (`key_file.py`) and every private file; one in the clear has none, and
its private files beside `device.json`. Whoever reads or writes a private file asks here first, so one place finds the key:

| in this order | when |
|---|---|
| a passphrase that the caller gives | always, and nothing else is tried then |
| what this process has unlocked before | until `forget` |
| the file named by `--passphrase-file` or `STILLROOM_PASSPHRASE_FILE` | there is such a file and a passphrase for the home |
| the system keyring | the home has a key there, and it gives it |
| the terminal, three times | standard input is one, and the caller allows it |

No key in the end is an `EncryptionError` that names the ways. A passphrase is never an argument of a command, where other users
of the machine see it.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from getpass import getpass
from pathlib import Path

from stillroom_client.key_file import KeyFile
from stillroom_client.sweeping import finish
from stillroom_shared.errors import EncryptionError
from stillroom_shared.files import replace_file
from stillroom_shared.vault import PLAIN, Vault

SEALED_NAME = "sealed"
FILE_VARIABLE = "STILLROOM_PASSPHRASE_FILE"
PASSPHRASE_FILE: ContextVar[Path | None] = ContextVar("passphrase file", default=None)
"""What `--passphrase-file` says."""
_TRIES = 3
_LONGEST = 4096  # bytes of a passphrase file
_known: dict[str, bytes] = {}  # data keys by the ids of homes
_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class Private:
    """The private files of a home: the folder they are in, and what seals them there."""

    folder: Path
    vault: Vault

    def read(self, name: str) -> bytes:
        """A file that `write` wrote."""
        return self.vault.open(name, (self.folder / name).read_bytes())

    def write(self, name: str, content: bytes) -> None:
        """Replace a file in one step."""
        replace_file(self.folder / name, *self.vault.seal(name, content))


def is_encrypted(home: Path) -> bool:
    """Whether the private files of this home are sealed."""
    return (home / SEALED_NAME).is_dir()


def unlock(home: Path, *, passphrase: str | None = None, terminal: bool = True) -> Private:
    """The private files of a home; see the table of this module.

    Raises:
        EncryptionError: it is encrypted, and there is no key, or a wrong one.
    """
    if not is_encrypted(home):
        return Private(home, PLAIN)
    return Private(home / SEALED_NAME, Vault(data_key(home, passphrase=passphrase, terminal=terminal)))


def data_key(home: Path, *, passphrase: str | None = None, terminal: bool = True) -> bytes:
    """The data key of an encrypted home, found as `unlock` finds it."""
    finish(home, home / SEALED_NAME)
    folder = home / SEALED_NAME
    file = KeyFile.load(folder)
    with _lock:  # threads that open one home ask once
        if passphrase is None and file.id in _known:
            return _known[file.id]
        key = file.by_passphrase(passphrase, folder) if passphrase is not None else _found(file, folder, terminal)
        _known[file.id] = key
    return key


def remember(file: KeyFile, key: bytes) -> None:
    """Take note of a key that was just made."""
    with _lock:
        _known[file.id] = key


def forget() -> None:
    """Forget every key that this process has unlocked; what is open stays open."""
    with _lock:
        _known.clear()


def passphrase_file() -> Path | None:
    """The file that the command line or the environment names."""
    named = PASSPHRASE_FILE.get() or os.environ.get(FILE_VARIABLE)
    return Path(named) if named else None


def read_passphrase(path: Path) -> str:
    """The first line of a file that only its owner, this user or root, can read."""
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode) or state.st_mode & 0o077 or state.st_uid not in (os.geteuid(), 0):
                raise EncryptionError(
                    f"{path} can be read by others (mode {stat.filemode(state.st_mode)}, user {state.st_uid}): a passphrase "
                    f"belongs in a regular file of yours with mode 0600 (`chmod 600 {path}`)"
                )
            text = file.read(_LONGEST).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise EncryptionError(f"{path} cannot be read ({error.strerror}): name the file with the passphrase") from error
    line = (text.splitlines() or [""])[0]
    if not line:
        raise EncryptionError(f"the first line of {path} is empty: write the passphrase there")
    return line


def _found(file: KeyFile, folder: Path, terminal: bool) -> bytes:
    reasons: list[str] = []
    if (path := passphrase_file()) is not None and file.has("passphrase"):
        return file.by_passphrase(read_passphrase(path), folder)
    if file.has("keyring"):
        try:
            return file.by_keyring(folder)
        except EncryptionError as error:
            reasons.append(str(error))
    if file.has("passphrase"):
        if terminal and _is_terminal():
            return _asked(file, folder)
        reasons.append(
            f"for its passphrase name a file in {FILE_VARIABLE} or by --passphrase-file; there is no terminal"
        )
    raise EncryptionError(f"{folder.parent} is encrypted and stays locked: {'; '.join(reasons) or 'it has no way in'}")


def _asked(file: KeyFile, folder: Path) -> bytes:
    for left in reversed(range(_TRIES)):
        try:
            return file.by_passphrase(getpass(f"Passphrase of {folder.parent}: "), folder)
        except EncryptionError as error:
            if not left:
                raise
            print(f"{error}; again", file=sys.stderr)
    raise AssertionError


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
