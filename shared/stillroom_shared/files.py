"""Files of a home, a device's or a coordinator's: for their owner only, replaced in one step, durable on return."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file (mode 0600) in place of what was there: a crash leaves the old content or the new, never a mixture.

    One caller at a time for each path. A leftover of a crash, `path` with `.partial` added, is overwritten.
    """
    partial = path.with_name(f"{path.name}.partial")
    with open(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


@contextmanager
def private_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling to fill, which becomes `folder` (0700, files 0600) at the end, or vanishes with an exception.

    `OSError` when `folder` exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        yield partial
        for root, _, names in os.walk(partial):
            for name in names:
                os.chmod(Path(root, name), 0o600)
                sync(Path(root, name))
            os.chmod(root, 0o700)
            sync(Path(root))
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when the rename succeeded


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One thread of one process at a time, for all who ask for this folder. A crash gives it back; it does not nest."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
