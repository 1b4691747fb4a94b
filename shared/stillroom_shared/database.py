"""The one place where SQLite files of a home are opened: in the clear by Python's `sqlite3`, sealed ones by SQLCipher.

SQLCipher (https://www.zetetic.net/sqlcipher/design/) encrypts every page of the file, of its write-ahead log and of its
rollback journal by AES-256-CBC under a fresh initialization vector, with an HMAC-SHA512 beside it; it is compiled to keep
temporary tables in memory. `sqlcipher3` has the interface of `sqlite3`, but errors of its own: catch `errors()`.

Two SQLite libraries must not open one file in one process: the locks of one go when the other closes it.
"""

from __future__ import annotations

import sqlite3
import sys
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from stillroom_shared.errors import DataError, MissingExtraError

MODULE = "sqlcipher3.dbapi2"


def connect(path: Path, key: str | None = None, *, timeout: float, shared: bool = False) -> sqlite3.Connection:
    """Open an existing file in autocommit mode; it is never created.

    Args:
        key: `Vault.database_key`; None for a file in the clear.
        timeout: seconds to wait for another process.
        shared: threads may share it, taking turns.
    """
    library = sqlite3 if key is None else sqlcipher()
    place = f"file:{quote(str(path.absolute()))}?mode=rw"
    db = library.connect(place, uri=True, timeout=timeout, isolation_level=None, check_same_thread=not shared)
    if key is not None:
        try:
            db.execute("PRAGMA cipher_log_level = NONE")  # it writes to standard error, where a refused key is our news
            db.execute(f'PRAGMA key = "{key}"')
        except BaseException:
            db.close()
            raise
    return cast(sqlite3.Connection, db)


def errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What either library raises, and `others`; for `except`, where it is called only when something was raised."""
    loaded = sys.modules.get(MODULE)
    return (sqlite3.Error, *others) if loaded is None else (sqlite3.Error, loaded.Error, *others)


def sqlcipher() -> Any:
    """The module, loaded when a sealed file is first opened."""
    try:
        return import_module(MODULE)
    except ModuleNotFoundError as error:
        raise MissingExtraError("an encrypted home", "encrypted", "sqlcipher3") from error


def copy(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Everything that is in one database into an empty other one, whatever library has opened each.

    Values keep their types and rows their order; what is made of rows (indexes, triggers, views) comes after them.
    """
    made = source.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid").fetchall()
    target.execute("BEGIN")
    for kind, name, sql in made:
        if kind == "table" and not name.startswith("sqlite_"):
            target.execute(sql)
            _copy_rows(source, target, name)
    if any(name == "sqlite_sequence" for _, name, _ in made):
        target.execute("DELETE FROM sqlite_sequence")
        _copy_rows(source, target, "sqlite_sequence")
    for kind, _, sql in made:
        if kind != "table":
            target.execute(sql)
    target.execute("COMMIT")


def require_same(one: sqlite3.Connection, other: sqlite3.Connection) -> None:
    """`DataError` unless both hold the same tables with the same rows in the same order."""
    query = "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY type, name"
    tables = [name for kind, name, _ in one.execute(query) if kind == "table"]
    queries = [query, *(f'SELECT * FROM "{name}"' for name in tables)]
    for each in queries:
        for row, copied in zip_longest(one.execute(each), other.execute(each)):
            if row != copied:
                raise DataError(
                    f"a copy differs from what it was made of ({each}): nothing was changed; check the disk"
                )


def _copy_rows(source: sqlite3.Connection, target: sqlite3.Connection, table: str) -> None:
    rows = source.execute(f'SELECT * FROM "{table}"')
    slots = ", ".join("?" for _ in rows.description)
    while some := rows.fetchmany(1000):
        target.executemany(f'INSERT INTO "{table}" VALUES ({slots})', some)
