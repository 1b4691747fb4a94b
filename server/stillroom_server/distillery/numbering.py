"""Keys numbered in the order in which they first came: "was this here before, and which was it" without holding any of them.

The keys lie in a table of SQLite on disk (a B-tree ordered by key), of which `_HELD` bytes are in memory however many there are:
a `dict` of 16-byte keys to numbers takes some 150 bytes of memory for each, this one 28 bytes of disk. A call takes
a few microseconds.

The file is scratch: nothing makes it durable, no process opens what another one left, and it is removed when it is closed. So it
belongs into a folder that a killed process leaves under a name nobody looks for (`sealed.new_folder`).

| case | what happens |
|---|---|
| a key that was here before | its number; the table stays as it is |
| keys of different lengths, also empty | different keys |
| a file that is there already | `DataError`: it is of a run that was cut off |
| no space left on the disk | `DataError` |
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Self

from stillroom_shared.errors import DataError

_HELD = 8 << 20
"""Bytes of the table that are in memory."""
_PRAGMAS = ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", f"cache_size = -{_HELD >> 10}")
_FIRST = "INSERT INTO keys VALUES (?, ?) ON CONFLICT DO NOTHING"
_KNOWN = "SELECT number FROM keys WHERE key = ?"


class Numbering:
    """Open while its `with` block lasts, for one thread.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Numbering(folder / "animals") as animals:
    ...     [animals.number(key) for key in (b"tapir", b"zebra", b"tapir", b"yak")], len(animals)
    ([0, 1, 0, 2], 3)
    >>> list(folder.iterdir())
    []
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0

    def __enter__(self) -> Self:
        if self._path.exists():
            raise DataError(f"{self._path} is there already, left by a run that was cut off: remove it")
        self._db = sqlite3.connect(self._path, isolation_level=None)
        for pragma in _PRAGMAS:
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE keys (key BLOB PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID")
        self._db.execute("BEGIN")  # never committed: pages are written when the cache is full
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._path.unlink(missing_ok=True)

    def number(self, key: bytes) -> int:
        """The key's number: `len` as it was before, if the key is new."""
        try:
            if self._db.execute(_FIRST, (key, self._count)).rowcount:
                self._count += 1
                return self._count - 1
            return int(self._db.execute(_KNOWN, (key,)).fetchone()[0])
        except sqlite3.OperationalError as error:
            raise DataError(f"{self._path} cannot be written ({error}): free some space there, and run again") from error

    def __len__(self) -> int:
        """How many different keys came."""
        return self._count
