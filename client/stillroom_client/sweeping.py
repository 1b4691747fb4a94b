"""What a home is left with when it was killed between being encrypted, or decrypted, and being done: files in the clear.

`unfinished` in the folder of sealed files names them. It is there before the first of them can be in the wrong place, and goes
after the last of them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from stillroom_shared.files import replace_file, sync

UNFINISHED_NAME = "unfinished"
_BLOCK = 1 << 20
# Prefixes of the names of private files at the root of a home in the clear, with their journals, leftovers and copies.
_PRIVATE = (
    "store.sqlite3",
    "ledger.sqlite3",
    "device.key",
    ".device.key.",
    "consent.json",
    "sent.json",
    "index.",
    ".index.",
)


def private_names(home: Path) -> list[str]:
    """The private files and folders at the root of a home."""
    return sorted(name for name in os.listdir(home) if name.startswith(_PRIVATE))


def note_unfinished(sealed: Path) -> None:
    """From now on, private files at the root are to be removed."""
    replace_file(sealed / UNFINISHED_NAME, b"remove the private files beside this folder\n")


def finish(home: Path, sealed: Path) -> None:
    """Remove what a killed process left in the clear; nothing while another one is at it."""
    if not (sealed / UNFINISHED_NAME).exists():
        return
    handle = os.open(home, os.O_RDONLY)
    try:
        with suppress(
            BlockingIOError
        ):  # whoever encrypts or decrypts holds it (`files.exclusive`), and finishes himself
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (sealed / UNFINISHED_NAME).exists():
                wipe(home, private_names(home))
                (sealed / UNFINISHED_NAME).unlink()
                sync(sealed)
    finally:
        os.close(handle)


def wipe(folder: Path, names: Iterable[str]) -> None:
    """Overwrite files and folders of this folder, then remove them.

    Overwriting reaches the old blocks on a disk that writes in place. Drives that spread wear, file systems that copy on write,
    snapshots and backups keep them: only the encryption of everything from the beginning keeps a text off a disk.
    """
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            wipe(path, os.listdir(path))
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and not path.is_symlink():
            _overwrite(path)
            path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
    sync(folder)


def _overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        if os.fstat(file.fileno()).st_nlink > 1:
            return  # a link to something that stays: only the name goes
        left = os.fstat(file.fileno()).st_size
        while left > 0:
            left -= file.write(bytes(min(left, _BLOCK)))
        file.flush()
        os.fsync(file.fileno())
        file.truncate(0)
