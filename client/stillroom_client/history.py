"""What a derived index needs to be brought forward: which passages came and went since it was built.

`history` has the stamp of every generation: an index of a generation that is not there is of another history (a backup was
restored) and cannot be brought forward. `removed` has the rows that are gone, in the order of going, by a trigger, so that
no way of removing a passage can forget it. Rows that came have a number above every earlier one.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

TABLES = (
    "CREATE TABLE IF NOT EXISTS history (number INTEGER PRIMARY KEY, stamp TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS removed (place INTEGER PRIMARY KEY AUTOINCREMENT, row INTEGER NOT NULL)",
    "CREATE TRIGGER IF NOT EXISTS passage_removed AFTER DELETE ON passages "
    "BEGIN INSERT INTO removed (row) VALUES (old.row); END",
    "INSERT OR IGNORE INTO history SELECT (SELECT value FROM meta WHERE key = 'generation'), value FROM meta "
    "WHERE key = 'stamp'",
)


@dataclass(frozen=True, slots=True)
class Mark:
    """Up to where an index has read a store: its largest row, and the place of the latest removal."""

    row: int = 0
    removal: int = 0


def begin(db: sqlite3.Connection) -> None:
    """Keep a history from now on, inside the caller's transaction; harmless where there is one."""
    for statement in TABLES:
        db.execute(statement)
