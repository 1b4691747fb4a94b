"""What a derived index needs to be brought forward: which passages came and went since it was built.

`history` has the stamp of every generation: an index of a generation that is not there is of another history (a backup was
restored) and cannot be brought forward. `removed` has the rows that are gone, in the order of going, by a trigger, so that
no way of removing a passage can forget it. Rows that came have a number above every earlier one.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.corpus import Passage

if TYPE_CHECKING:
    from stillroom_client.store import Generation, Store

TABLES = (
    "CREATE TABLE IF NOT EXISTS history (number INTEGER PRIMARY KEY, stamp TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS removed (place INTEGER PRIMARY KEY AUTOINCREMENT, row INTEGER NOT NULL)",
    "CREATE TRIGGER IF NOT EXISTS passage_removed AFTER DELETE ON passages "
    "BEGIN INSERT INTO removed (row) VALUES (old.row); END",
    "INSERT OR IGNORE INTO history SELECT (SELECT value FROM meta WHERE key = 'generation'), value FROM meta "
    "WHERE key = 'stamp'",
)

_AMONG = "IN (SELECT value FROM json_each(?))"  # as in store.py
_BATCH = 20_000  # vectors at once: 30 MB


@dataclass(frozen=True, slots=True)
class Mark:
    """Up to where an index has read a store: its largest row, and the place of the latest removal."""

    row: int = 0
    removal: int = 0


def begin(db: sqlite3.Connection) -> None:
    """Keep a history from now on, inside the caller's transaction; harmless where there is one."""
    for statement in TABLES:
        db.execute(statement)


class History:
    """What came and went in a store; ask inside one of its transactions."""

    def __init__(self, store: Store, table: str = "vectors") -> None:
        self._store = store
        self._table = table  # of vectors

    def mark(self) -> Mark:
        """Up to where the store has come."""
        rows = "SELECT (SELECT coalesce(max(row), 0) FROM passages), (SELECT coalesce(max(place), 0) FROM removed)"
        return Mark(*self._store.query(rows)[0])

    def knows(self, generation: Generation) -> bool:
        """Whether that generation is one of this store's own past, or its present."""
        query = "SELECT 1 FROM history WHERE (number, stamp) = (?, ?)"
        return bool(self._store.query(query, (generation.number, generation.stamp)))

    def has_vectors_of(self, generation: Generation) -> bool:
        """Whether the vectors of that generation's passages are still theirs: of this past, and by the same document tower."""
        query = "SELECT 1 FROM meta WHERE key = 'vectors_from' AND value > ?"
        return self.knows(generation) and not self._store.query(query, (generation.number,))

    def passages(self, mark: Mark) -> Iterator[tuple[int, Passage]]:
        """Rows and passages that came after `mark` and are still here, ascending."""
        last, query = mark.row, "SELECT row, id, owner, text, title FROM passages WHERE row > ? ORDER BY row LIMIT 1000"
        while found := self._store.query(query, (last,)):
            yield from ((row[0], Passage(*row[1:])) for row in found)
            last = found[-1][0]

    def vectors(self, mark: Mark) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Rows (n,) and vectors (n, dim) that came after `mark` and are still here, ascending, in batches."""
        last = mark.row
        while len((batch := self._vectors("WHERE row > ? ORDER BY row LIMIT ?", last, _BATCH))[0]):
            yield batch
            last = int(batch[0][-1])

    def count(self, mark: Mark) -> int:
        """Passages that came after `mark` and are still here."""
        return int(self._store.query(f"SELECT count(*) FROM {self._table} WHERE row > ?", (mark.row,))[0][0])

    def last(self) -> int:
        """The largest row that has a vector; 0 without any."""
        return int(self._store.query(f"SELECT coalesce(max(row), 0) FROM {self._table}")[0][0])

    def sample(self, size: int) -> NDArray[np.float32]:
        """Vectors (m, dim) of `size` rows that are drawn evenly, the same ones each time; of all rows if there are fewer."""
        rows = [row for (row,) in self._store.query(f"SELECT row FROM {self._table} ORDER BY row")]
        if len(rows) > size:
            rows = [rows[place] for place in np.random.default_rng(0).choice(len(rows), size, replace=False)]
        return self._vectors(f"WHERE row {_AMONG} ORDER BY row", json.dumps(rows))[1]

    def _vectors(self, which: str, *values: object) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return self._store.vectors_where(which, values, table=self._table)

    def removed(self, mark: Mark) -> list[int]:
        """Rows that went after `mark`."""
        return [row[0] for row in self._store.query("SELECT row FROM removed WHERE place > ?", (mark.removal,))]

    def forget(self, generation: Generation, mark: Mark) -> None:
        """Keep nothing from before a generation and a mark: an index that was built earlier is unknown from then on."""
        self._store.query("DELETE FROM history WHERE number < ?", (generation.number,))
        self._store.query("DELETE FROM removed WHERE place <= ?", (mark.removal,))
