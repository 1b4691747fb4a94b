"""Where each key was first seen, without holding any of them: what a `dict` of keys to numbers is for, of any size.

The keys lie in a temporary database of SQLite, a B-tree ordered by key, of which `_HELD` bytes are in memory however many there
are. A `dict` of 16-byte keys takes some 150 bytes of memory for each, this 28 bytes of disk; a call takes a few microseconds.

The file is SQLite's own temporary one (under `SQLITE_TMPDIR`, `TMPDIR` or /var/tmp), without a name as soon as it is open:
nobody opens it again, and nothing is left of a process that is killed. Keys lie there in the clear: this is for public text.

| case | what happens |
|---|---|
| a key that was here before | its number; the one that is given is not looked at |
| an empty key, or one that another begins with | a key like any other |
| no space left on the disk | `DataError` |
"""

from __future__ import annotations

import sqlite3
from types import TracebackType
from typing import Self

from stillroom_shared.errors import DataError

_HELD = 8 << 20
"""Bytes of the table that are in memory."""
_PRAGMAS = ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_HELD >> 10}")
_FIRST = "INSERT INTO keys VALUES (?, ?) ON CONFLICT DO NOTHING"
_KNOWN = "SELECT number FROM keys WHERE key = ?"


class FirstSeen:
    """Open while its `with` block lasts, for one thread.

    >>> with FirstSeen() as lines:
    ...     [lines.setdefault(key, line) for line, key in enumerate((b"tapir", b"zebra", b"tapir", b"yak"), start=1)]
    [1, 2, 1, 4]
    """

    def __enter__(self) -> Self:
        self._db = sqlite3.connect("", isolation_level=None)
        for pragma in _PRAGMAS:
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE keys (key BLOB PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID")
        self._db.execute("BEGIN")  # never committed: pages are written when the cache is full
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def setdefault(self, key: bytes, number: int) -> int:
        """The number that the key came with first: this one, if it is new."""
        try:
            if self._db.execute(_FIRST, (key, number)).rowcount:
                return number
            return int(self._db.execute(_KNOWN, (key,)).fetchone()[0])
        except sqlite3.OperationalError as error:
            raise DataError(
                f"the temporary table of what was seen cannot be written ({error}): free some space, or name a folder "
                "that has some in SQLITE_TMPDIR"
            ) from error
