"""Whether a store and its home are what they were when they were written: each check, and what to do about what it finds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillroom_client.home import RELEASE_NAME
from stillroom_client.store import Store, digest_of
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError

_RESTORE = "restore the store from a backup, or make the device anew and add its documents"
_AGAIN = "remove those documents (`stillroom index remove`) and add them again"
_DAY_NS = "86400000000000"

# (query that counts, what is counted, what to do)
_COUNTED = (
    ("SELECT count(*) FROM passages WHERE row NOT IN (SELECT row FROM vectors)", "passages have no vector", _AGAIN),
    ("SELECT count(*) FROM vectors WHERE row NOT IN (SELECT row FROM passages)", "vectors have no passage", _RESTORE),
    (
        "SELECT count(*) FROM vectors WHERE length(codes) != (SELECT value FROM meta WHERE key = 'dimension') "
        "OR typeof(scale) != 'real' OR scale < 0 OR scale > 1",
        "vectors are not of the store's dimension, or have no scale",
        _RESTORE,
    ),
    (
        "SELECT count(*) FROM feedback WHERE passage_id NOT IN (SELECT id FROM passages)",
        "opened results are of passages that are gone",
        _RESTORE,
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a device, and what to do."""

    level: Literal["wrong", "remark"]
    text: str
    remedy: str


def check_store(store: Store) -> Iterator[Finding]:
    """SQLite's own check of every page and index, what belongs together, and the digest of every passage."""
    try:
        with store.reading():
            yield from _check(store)
    except DataError as error:
        yield Finding("wrong", str(error), _RESTORE)


def _check(store: Store) -> Iterator[Finding]:
    if (said := [row[0] for row in store.query("PRAGMA integrity_check(3)")]) != ["ok"]:
        yield Finding("wrong", f"SQLite finds {store.path} damaged: {'; '.join(map(str, said))}", _RESTORE)
    if broken := store.query("PRAGMA foreign_key_check"):
        yield Finding("wrong", f"{len(broken):,} rows of {broken[0][0]} point to nothing", _RESTORE)
    for query, text, remedy in _COUNTED:
        if count := int(store.query(query)[0][0]):
            yield Finding("wrong", f"{count:,} {text}", remedy)
    if changed := list(_changed(store)):
        named = ", ".join(repr(name) for name in changed[:3])
        yield Finding("wrong", f"{len(changed):,} passages are not what was stored: {named}", _AGAIN)
    old = "SELECT count(*) FROM staged WHERE staged_ns < CAST(strftime('%s', 'now') AS INTEGER) * 1000000000 - "
    if count := int(store.query(old + _DAY_NS)[0][0]):
        text = f"{count:,} vectors wait for documents that were not finished for a day"
        yield Finding("remark", text, "`stillroom index add` with those documents uses them, or clears them")


def _changed(store: Store) -> Iterator[str]:
    last, query = -1, "SELECT row, digest, id, owner, text, title FROM passages WHERE row > ? ORDER BY row LIMIT 1000"
    while found := store.query(query, (last,)):
        yield from (row[2] for row in found if digest_of(Passage(*row[2:])) != bytes(row[1]))
        last = found[-1][0]


def check_files(home: Path) -> Iterator[Finding]:
    """Whether anybody but the owner may read what is in a home; the release is public."""
    if os.name != "posix":
        return
    if home.stat().st_mode & 0o077:
        yield Finding("wrong", f"others may look into {home}", f"chmod 700 {home}")
    open_files = [
        path.name
        for path in sorted(home.iterdir())
        if path.name != RELEASE_NAME and not path.is_symlink() and path.is_file() and path.stat().st_mode & 0o077
    ]
    # In a home that nobody else may enter, what its files allow says nothing.
    if open_files and home.stat().st_mode & 0o077:
        yield Finding("wrong", f"others may read {', '.join(open_files[:3])} in {home}", "chmod 600 these files")
