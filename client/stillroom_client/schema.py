"""The tables of a store, by version: a new store runs every step, an older one those that it lacks, in one transaction.

| table | holds |
|---|---|
| `meta` | schema version, dimension, generation, secrets |
| `documents` | one row a file (or message, or whatever has a path): what it is, and in what state it was read |
| `passages` | one row a passage; `document` is NULL for one that was added alone (`Device.add`) |
| `vectors` | the int8 vector of each passage |
| `staged` | vectors of passages whose document is not complete yet, by the passage's digest |
| `reembedded` | vectors by the document tower of a release that will replace this one (`upgrade.py`) |
| `feedback` | what was opened |
| `history`, `removed` | what derived indexes are brought forward by (`history.py`) |

`described` is a view for filters: for each passage's row one JSON object of names and scalars, the document's metadata
with the passage's own laid over it, and the owner:

    SELECT row FROM described WHERE json_extract(metadata, '$.type') = 'pdf' AND json_extract(metadata, '$.year') >= 2020

A row number means one text for ever, but where a passage stands and what describes it may change under the same row: then
`documents.generation` is the generation of that change, as `passages.generation` is that of the row's birth.
"""

from __future__ import annotations

import sqlite3

from stillroom_client import history

# Step n leads from version n to version n + 1. Never edit one that was released: add another.
STEPS = (
    """
CREATE TABLE passages (
    row INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, title TEXT NOT NULL,
    text TEXT NOT NULL, digest BLOB NOT NULL, generation INTEGER NOT NULL);
CREATE TABLE vectors (
    row INTEGER PRIMARY KEY REFERENCES passages (row) ON DELETE CASCADE, scale REAL NOT NULL, codes BLOB NOT NULL);
CREATE TABLE feedback (query TEXT NOT NULL, passage_id TEXT NOT NULL, UNIQUE (query, passage_id));
""",
    """
CREATE TABLE documents (
    number INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE, type TEXT NOT NULL, title TEXT NOT NULL,
    size INTEGER NOT NULL, modified_ns INTEGER NOT NULL, read_ns INTEGER NOT NULL, digest BLOB NOT NULL,
    reader TEXT NOT NULL, metadata TEXT NOT NULL, generation INTEGER NOT NULL);
ALTER TABLE passages ADD COLUMN document INTEGER REFERENCES documents (number) ON DELETE CASCADE;
ALTER TABLE passages ADD COLUMN place INTEGER NOT NULL DEFAULT 0;
ALTER TABLE passages ADD COLUMN page INTEGER;
ALTER TABLE passages ADD COLUMN line INTEGER;
ALTER TABLE passages ADD COLUMN start INTEGER;
ALTER TABLE passages ADD COLUMN stop INTEGER;
ALTER TABLE passages ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}';
CREATE INDEX passages_of_document ON passages (document, place);
CREATE INDEX passages_by_digest ON passages (digest);
CREATE TABLE staged (
    digest BLOB PRIMARY KEY, scale REAL NOT NULL, codes BLOB NOT NULL, staged_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE VIEW described AS
    SELECT p.row AS row, json_set(json_patch(coalesce(d.metadata, '{}'), p.metadata), '$.owner', p.owner) AS metadata
    FROM passages p LEFT JOIN documents d ON d.number = p.document;
""",
    "",  # `history`, `removed` and their trigger: history.py
    """
CREATE TABLE reembedded (
    row INTEGER PRIMARY KEY REFERENCES passages (row) ON DELETE CASCADE, scale REAL NOT NULL, codes BLOB NOT NULL);
""",
)
VERSION = len(STEPS)


def upgrade(db: sqlite3.Connection, version: int) -> None:
    """Bring the tables from `version` (0: none but `meta`) to `VERSION`, inside the caller's transaction."""
    for step in STEPS[version:]:
        for statement in filter(str.strip, step.split(";")):  # executescript would commit
            db.execute(statement)
    history.begin(db)
    db.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (VERSION,))
