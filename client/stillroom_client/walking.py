"""Which files there are below the paths that an owner named, and what was passed over.

| met on the way | what happens |
|---|---|
| a link to a file or folder, so also a loop | not followed: a line says so; a link that the owner names himself is |
| a folder that may not be read | a line; what is indexed of it stays |
| a pipe, socket or device | a line |
| hidden or lock files, caches, environments, homes of devices | counted; named by the owner, they are read |
| a folder with corpus.jsonl or corpus.jsonl.gz, named by the owner | stands for that file |
| other `.jsonl` files | a line: they are corpora only where the owner names them |
| a file that is met twice | read once |
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stillroom_client.reading import CORPORA, File, path_id

_CORPUS_NAMES = ("corpus.jsonl", "corpus.jsonl.gz")
_GENERATED = frozenset(("__pycache__", "node_modules", "__MACOSX"))
# A folder that holds one of these is an environment, a cache, or the home of a device.
_MARKS = ("pyvenv.cfg", "CACHEDIR.TAG", "store.sqlite3")


@dataclass(frozen=True, slots=True)
class Remark:
    """A line about a path. `failed`: the owner asked for it and did not get it; `skipped`: it is nothing to read;
    `note`: it was read, but."""

    kind: Literal["failed", "skipped", "note"]
    path: str
    text: str


@dataclass
class Walk:
    """What was found: files, remarks, how many hidden entries were passed over, and the folders that were walked."""

    files: dict[str, File] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    hidden: int = 0
    roots: list[str] = field(default_factory=list)

    def remark(self, kind: Literal["failed", "skipped", "note"], path: Path, text: str) -> None:
        """Add a line about a path."""
        self.remarks.append(Remark(kind, path_id(path), text))


def walk(paths: Iterable[Path]) -> Walk:
    """Find the files of some paths; nothing that is met raises."""
    found = Walk()
    for given in paths:
        try:
            path = given.resolve(strict=True)
            info = path.stat()
        except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
            missing = isinstance(error, FileNotFoundError)
            text = "does not exist: name a file or a folder" if missing else f"cannot be reached ({_why(error)})"
            found.remark("failed", given.absolute(), text)
            continue
        if stat.S_ISDIR(info.st_mode):
            if corpora := [path / name for name in _CORPUS_NAMES if (path / name).is_file()]:
                _add(found, corpora[0], corpora[0].stat())
            else:
                found.roots.append(path_id(path))
                _folder(found, path)
        elif stat.S_ISREG(info.st_mode):
            _add(found, path, info)
        else:
            found.remark("failed", path, "is no regular file (a pipe, socket or device): name a file or a folder")
    return found


def is_below(path: str, root: str) -> bool:
    """Whether a path lies in a folder."""
    return path.startswith(root.rstrip("/") + "/")


def is_gone(path: str) -> bool:
    """Whether a file is certainly no longer there; what cannot be looked at is not."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _folder(found: Walk, root: Path) -> None:
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.remark("failed", folder, f"cannot be read ({_why(error)}): what is indexed of it stays")
            continue
        if folder != root and any(entry.name in _MARKS or _is_sealed(entry) for entry in inside):
            found.hidden += 1
            continue
        pending += reversed(list(_folders(found, inside)))
        for entry in inside:
            _entry(found, entry)


def _is_sealed(entry: os.DirEntry[str]) -> bool:
    """Whether this is where an encrypted home keeps its files."""
    return entry.name == "sealed" and Path(entry, "key.json").exists()


def _folders(found: Walk, inside: list[os.DirEntry[str]]) -> Iterator[Path]:
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            if _hidden(entry.name):
                found.hidden += 1
            else:
                yield Path(entry.path)


def _entry(found: Walk, entry: os.DirEntry[str]) -> None:
    path = Path(entry.path)
    try:
        if entry.is_dir(follow_symlinks=False):
            return
        if _hidden(entry.name):
            found.hidden += 1
        elif entry.is_symlink():
            found.remark("skipped", path, _linked(path))
        elif not entry.is_file(follow_symlinks=False):
            found.remark("skipped", path, "is no regular file (a pipe, socket or device): skipped")
        elif entry.name.lower().endswith(CORPORA):
            found.remark("skipped", path, "holds one JSON object a line: name it itself to index it as a corpus")
        else:
            _add(found, path, entry.stat(follow_symlinks=False))
    except OSError as error:
        found.remark("failed", path, f"cannot be read ({_why(error)})")


def _add(found: Walk, path: Path, info: os.stat_result) -> None:
    name = path_id(path)
    found.files.setdefault(name, File(path, name, info.st_size, info.st_mtime_ns))


def _hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name in _GENERATED


def _linked(path: Path) -> str:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        return (
            "is a link to itself: skipped"
            if isinstance(error, RuntimeError)
            else "is a link that leads nowhere: skipped"
        )
    if target.is_dir() and target in (path.parent, *path.parents):
        return "is a link back to a folder that it lies in, a loop: not followed"
    return f"is a link to {path_id(target)}: not followed; name that to index it"


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or "a link that leads to itself"
