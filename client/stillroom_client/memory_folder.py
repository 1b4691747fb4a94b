"""A folder that lies in memory, for what has to be a file for a moment and must not reach a disk.

Linux keeps `tmpfs` in memory (https://docs.kernel.org/filesystems/tmpfs.html); what kind of file system a folder is on is
read from `/proc/self/mountinfo`, by its device number. Elsewhere, and where no `tmpfs` can be written to, there is none. The
kernel may move memory to swap: encrypt that, or have none.

A folder is held by a lock while it is used; what a killed process left is removed by the next one that asks for a folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stillroom_shared.files import exclusive

_MOUNTS = Path("/proc/self/mountinfo")
_KINDS = ("tmpfs", "ramfs")


@contextmanager
def memory_folder() -> Iterator[Path | None]:
    """A new empty folder of this user alone, removed at the end; None where memory has no folders."""
    base = _base()
    if base is None:
        yield None
        return
    with exclusive(base):
        _sweep(base)
        folder = Path(tempfile.mkdtemp(dir=base))
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _base() -> Path | None:
    """The folder of this user in memory; others may write beside it, so it is trusted only as it should be."""
    for place in (os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm"):
        if not place or not Path(place).is_dir() or not in_memory(Path(place)):
            continue
        base = Path(place) / f"stillroom-{os.geteuid()}"
        with suppress(OSError):
            with suppress(FileExistsError):
                base.mkdir(mode=0o700)
            found = base.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077:
                return base
    return None


def in_memory(folder: Path) -> bool:
    """Whether what is written into this folder stays in memory."""
    try:
        device = folder.stat().st_dev
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:  # id parent major:minor root mountpoint options [tags] - type source options
        fields = line.split(" ")
        if fields[2] == wanted and "-" in fields:
            return fields[fields.index("-") + 1] in _KINDS
    return False


def _sweep(base: Path) -> None:
    """Remove the folders that nobody holds."""
    for left in base.iterdir():
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)
