"""SQLite is the truth of a device: its passages, their vectors, and which results its owner opened.

Everything else in a device's home is derived from this file or can be fetched again.

Guarantees
- One transaction is one generation. A reader sees a whole generation or none of it (write-ahead log,
  https://sqlite.org/wal.html), and what is committed survives a power failure (`synchronous=FULL`).
- A row number means one content for ever: a replaced passage gets a new row, and numbers are never used again.
- A passage whose owner, title and text are unchanged is not touched, so it is not embedded again.
- What is removed or erased is overwritten, not only unlinked (`secure_delete`). In the log, what is erased goes at once, what
  is removed at the next compaction, erasure, or end of the last process that has the file open.

Any number of processes may read while one writes; writers wait for each other. Within a process the threads of one
`Store` take turns.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillroom_client import schema
from stillroom_client.quantization import dequantize, quantize
from stillroom_shared import database
from stillroom_shared.closing import Closing
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError, NotFoundError, StoreError
from stillroom_shared.vault import PLAIN, Vault

_WAIT_SECONDS = 60.0  # for another process' write; embedding happens outside, so a write is short
FIRST_RELEASE = "release"  # folder in the home
_FREE_SHARE = 0.1
_NORM_TOLERANCE = 0.01
AMONG = "IN (SELECT value FROM json_each(?))"  # one parameter for any number of values


@dataclass(frozen=True, slots=True)
class Generation:
    """One committed state. The stamp is random: a restored backup that counts on from an old number is told apart."""

    number: int
    stamp: str


@dataclass(frozen=True, slots=True)
class Change:
    """What `put` did, in passages."""

    added: int
    replaced: int
    unchanged: int
    removed: int = 0


@dataclass(frozen=True, slots=True)
class InUse:
    """The release that a store's vectors belong to: its folder in the home, its document tower, and their dimension.

    A store from before releases could be replaced names neither: `tower` is "" and the folder the first one.
    """

    folder: str
    tower: str
    dimension: int


class TowerChangedError(DataError):
    """Vectors of a document tower that is no longer in use: embed again, and try again."""


class Feedback(NamedTuple):
    """The owner searched for `query` and opened this passage."""

    query: str
    passage_id: str


class Store(Closing):
    """The open store of one device.

    Args:
        path: a file that `Store.create` made; one of an earlier version is upgraded (`schema.py`). `DataError` when it is
            missing, damaged or of a later version.
        vault: encrypts the file, here as at its creation.
    """

    def __init__(self, path: Path, vault: Vault = PLAIN) -> None:
        self.path, self.vault = path, vault
        self._lock = threading.RLock()
        if not path.is_file():
            raise DataError(f"{path} does not exist: create the device again with `stillroom index create`")
        self._db = _connect(path, vault)
        try:
            for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "temp_store=MEMORY"):
                self.query(f"PRAGMA {pragma}")
            version, self.dimension = int(self._meta("schema")), int(self._meta("dimension"))
            cut = self.query("SELECT value FROM meta WHERE key = 'full_dimension'")
            self._cut_from = int(cut[0][0]) if cut else None
            if version > schema.VERSION:
                raise DataError(
                    f"{path} has schema {version}, this Stillroom reads {schema.VERSION}: upgrade Stillroom"
                )
            if version < schema.VERSION:
                with self.writing():  # another process may have been first
                    schema.upgrade(self._db, int(self._meta("schema")))
        except DataError:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, *, dimension: int, full_dimension: int | None = None, vault: Vault = PLAIN) -> None:
        """Make an empty store for vectors of this dimension, readable by its owner only.

        Args:
            full_dimension: of the vectors that those in the store are cut from (`matryoshka.py`), where they are.
        """
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        db = _connect(path, vault)
        try:
            # Nobody can see the file yet, so one fsync by the caller at the end is enough.
            db.execute("PRAGMA synchronous=OFF")
            db.execute("PRAGMA journal_mode=WAL")
            meta = {"dimension": dimension, "generation": 0, "stamp": secrets.token_hex(16)}
            if full_dimension not in (None, dimension):
                meta["full_dimension"] = full_dimension
            db.execute("BEGIN")
            db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID")
            db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            schema.upgrade(db, 0)
            db.execute("COMMIT")
        finally:
            db.close()

    @property
    def full_dimension(self) -> int:
        """Of the vectors that those here are cut from; their own where they are whole."""
        return self._cut_from or self.dimension

    @contextmanager
    def reading(self) -> Iterator[Generation]:
        """One unchanging view: whatever is read inside belongs to the generation that is handed out."""
        with self._transaction("DEFERRED") as generation:
            yield generation

    @contextmanager
    def writing(self) -> Iterator[Generation]:
        """The right to write, one holder at a time over all processes; an exception undoes what was written."""
        with self._transaction("IMMEDIATE") as generation:
            yield generation

    def changed(self, passages: Sequence[Passage]) -> list[Passage]:
        """Those that are new or differ from what is stored: the ones that need a vector."""
        refuse_repeated_ids(passages)
        known = self.digests(passages)
        return [passage for passage in passages if known.get(passage.id) != digest_of(passage)]

    def in_use(self) -> InUse:
        """The release that the vectors belong to."""
        known = dict(self.query("SELECT key, value FROM meta WHERE key IN ('release', 'tower', 'dimension')"))
        self.dimension = int(known["dimension"])
        return InUse(known.get("release", FIRST_RELEASE), known.get("tower", ""), self.dimension)

    def refuse_other_tower(self, tower: str | None) -> None:
        """`TowerChangedError` unless new vectors are by the tower in use: ask inside `writing`. None: not known."""
        now = self.in_use().tower
        if tower and now and tower != now:
            raise TowerChangedError(f"the index moved on to document tower {now} while {tower} embedded: try again")

    def put(self, passages: Sequence[Passage], vectors: NDArray[np.float32], *, tower: str | None = None) -> Change:
        """Add or replace passages with their unit vectors (n, dim), as one generation; none when nothing changed.

        Args:
            tower: hash of the document tower that made them; `TowerChangedError` if another one is in use by now.
        """
        refuse_repeated_ids(passages)
        codes, scales = quantize(self.checked(passages, vectors))
        with self.writing() as generation:
            self.refuse_other_tower(tower)
            known = self.digests(passages)
            fresh = [n for n, passage in enumerate(passages) if known.get(passage.id) != digest_of(passage)]
            replaced = [passages[n].id for n in fresh if passages[n].id in known]
            if fresh:
                number = self.advance(generation).number
                self._db.execute(f"DELETE FROM passages WHERE id {AMONG}", (json.dumps(replaced),))
                self._db.executemany(
                    "INSERT INTO passages (id, owner, title, text, digest, generation) VALUES (?, ?, ?, ?, ?, ?)",
                    ((p.id, p.owner, p.title, p.text, digest_of(p), number) for p in (passages[n] for n in fresh)),
                )
                self._db.executemany(
                    "INSERT INTO vectors SELECT row, ?, ? FROM passages WHERE id = ?",
                    ((float(scales[n]), codes[n].tobytes(), passages[n].id) for n in fresh),
                )
        return Change(len(fresh) - len(replaced), len(replaced), len(passages) - len(fresh))

    def remove(self, ids: Iterable[str]) -> int:
        """Remove passages, their vectors and what was opened of them, as one generation; how many there were."""
        wanted = json.dumps(list(ids))
        with self.writing() as generation:
            # A document that loses a passage is no longer stored whole: whoever reads its file next stores it again.
            self._db.execute(
                f"UPDATE documents SET digest = x'' WHERE number IN (SELECT document FROM passages WHERE id {AMONG})",
                (wanted,),
            )
            removed = self._db.execute(f"DELETE FROM passages WHERE id {AMONG}", (wanted,)).rowcount
            if removed:
                self._db.execute(f"DELETE FROM feedback WHERE passage_id {AMONG}", (wanted,))
                self.advance(generation)
        return removed

    def count(self) -> int:
        """Passages in the store."""
        return int(self.query("SELECT count(*) FROM vectors")[0][0])

    def owners(self) -> dict[str, int]:
        """Passages of each owner, most first."""
        return dict(self.query("SELECT owner, count(*) FROM passages GROUP BY owner ORDER BY count(*) DESC, owner"))

    def has(self, passage_id: str) -> bool:
        """Whether a passage of this id is stored."""
        return bool(self.query("SELECT 1 FROM passages WHERE id = ?", (passage_id,)))

    def ids(self, prefix: str = "") -> list[str]:
        """Passage ids that begin with `prefix`, in the order they were added."""
        query = "SELECT id FROM passages WHERE substr(id, 1, ?) = ? ORDER BY row"
        return [row[0] for row in self.query(query, (len(prefix), prefix))]

    def passages(self, rows: Iterable[int]) -> dict[int, Passage]:
        """The passages of these rows; rows that do not exist are left out."""
        query = f"SELECT row, id, owner, text, title FROM passages WHERE row {AMONG}"
        return {row[0]: Passage(*row[1:]) for row in self.query(query, (json.dumps([int(r) for r in rows]),))}

    def names(self, rows: Iterable[int]) -> dict[int, str]:
        """The passage ids of these rows."""
        query = f"SELECT row, id FROM passages WHERE row {AMONG}"
        return dict(self.query(query, (json.dumps([int(r) for r in rows]),)))

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The row of each id; `DataError` names the first that is not in the store."""
        found = dict(self.query(f"SELECT id, row FROM passages WHERE id {AMONG}", (json.dumps(list(ids)),)))
        if missing := next((i for i in ids if i not in found), None):
            raise NotFoundError(f"passage {missing!r} is not in this index: take an id that search shows, or add it")
        return np.array([found[i] for i in ids], np.int64)

    def vectors(self, rows: Iterable[int] | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows (m,), ascending and distinct, and their vectors (m, dim); all of them without an argument."""
        which, values = ("", ()) if rows is None else (f"WHERE row {AMONG}", (json.dumps([int(r) for r in rows]),))
        return self.vectors_where(f"{which} ORDER BY row", values)

    def shrink(self) -> None:
        """Give space back to the disk when a good part of the file is empty (`VACUUM`: whole or not at all); empty the log."""
        free, pages = (int(self.query(f"PRAGMA {name}")[0][0]) for name in ("freelist_count", "page_count"))
        if free > _FREE_SHARE * pages:
            self.query("VACUUM")
        self.query("PRAGMA wal_checkpoint(TRUNCATE)")

    def vectors_where(
        self, which: str, values: tuple[object, ...], *, table: str = "vectors"
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows and vectors that a clause in SQL chooses and orders. For the modules that read here beside this one."""
        found = self.query(f"SELECT row, scale, codes FROM {table} {which}", values)
        width = len(found[0][2]) if found else self.dimension
        codes = np.frombuffer(b"".join(row[2] for row in found), np.int8).reshape(-1, width)
        scales = np.array([row[1] for row in found], np.float64)
        return np.array([row[0] for row in found], np.int64), dequantize(codes, scales)

    def record(self, feedback: Iterable[Feedback]) -> None:
        """Keep which results were opened, each pair once, at its latest. `DataError` for an unknown passage."""
        pairs = list(feedback)
        with self.writing():
            self.rows([item.passage_id for item in pairs])
            self._db.executemany("INSERT OR REPLACE INTO feedback VALUES (?, ?)", pairs)

    def feedback(self) -> list[Feedback]:
        """Everything that was opened, latest last."""
        return [Feedback(*row) for row in self.query("SELECT query, passage_id FROM feedback ORDER BY rowid")]

    def erase_feedback(self, opened: Feedback | None = None) -> int:
        """Forget every opened result, or this one, on the disk too; how many there were."""
        which, values = ("", ()) if opened is None else (" WHERE (query, passage_id) = (?, ?)", tuple(opened))
        with self.writing():
            erased = self._db.execute(f"DELETE FROM feedback{which}", values).rowcount
        if self.query("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]:
            raise StoreError(f"feedback is erased, but another process holds {self.path}-wal: end it, then erase again")
        return erased

    def secret(self, name: str, *, first: bytes | None = None) -> bytes:
        """A random value of this store, 32 bytes, made when first asked for, and then always the same.

        `first`: taken in place of a random one, if there is none yet.
        """
        with self.writing():
            made = first or secrets.token_bytes(32)
            self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, made))
            return bytes(self._meta(name))

    def twin(self) -> Store:
        """Another connection to the same file, for work that is too long to keep this one's threads waiting."""
        return Store(self.path, self.vault)

    def close(self) -> None:
        """Give the file back; closing twice is harmless."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[Generation]:
        with self._lock:
            try:
                self._db.execute(f"BEGIN {kind}")
                try:
                    # A deferred transaction takes its view of the file at this first read.
                    yield self.generation()
                    self._db.execute("COMMIT")
                finally:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
            except database.errors() as error:
                raise self._damaged(error) from error

    def generation(self) -> Generation:
        """The present one; it stays inside a transaction."""
        # One statement sees one state, also outside of a transaction.
        (number,), (stamp,) = self.query("SELECT value FROM meta WHERE key IN ('generation', 'stamp') ORDER BY key")
        return Generation(int(number), str(stamp))

    def advance(self, generation: Generation) -> Generation:
        """Begin the next generation, inside `writing`. For the modules that write here beside this one."""
        following = Generation(generation.number + 1, secrets.token_hex(16))
        pairs = (("generation", following.number), ("stamp", following.stamp))
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", pairs)
        self._db.execute("INSERT INTO history VALUES (?, ?)", (following.number, following.stamp))
        return following

    def _meta(self, key: str) -> Any:
        return self.query("SELECT value FROM meta WHERE key = ?", (key,))[0][0]

    def digests(self, passages: Sequence[Passage]) -> dict[str, bytes]:
        """What is stored under the ids of these passages, as `digest_of` says it."""
        wanted = json.dumps([passage.id for passage in passages])
        return dict(self.query(f"SELECT id, digest FROM passages WHERE id {AMONG}", (wanted,)))

    def query(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        """The rows that a statement gives. For the modules that read and write here beside this one."""
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except database.errors() as error:
                raise self._damaged(error) from error

    def execute_many(self, query: str, values: Iterable[tuple[object, ...]]) -> None:
        """Run a statement for each tuple of values, inside `writing`."""
        self._db.executemany(query, values)

    def _damaged(self, error: Exception) -> StoreError:
        return StoreError(
            f"the store {self.path} cannot be used ({error}): free disk space, end the process that blocks it, "
            "or restore the file from a backup"
        )

    def checked(self, passages: Sequence[Passage], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """The vectors, if they are finite, of this store's dimension and of norm 1; else `DataError`."""
        expected = (len(passages), self.dimension)
        if vectors.shape != expected:
            raise DataError(f"vectors have shape {vectors.shape}: {expected[0]} passages of this index need {expected}")
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        # Written so that NaN fails it too.
        if (bad := np.flatnonzero(~(np.abs(norms - 1) <= _NORM_TOLERANCE))).size:
            raise DataError(
                f"the vector of passage {passages[bad[0]].id!r} has norm {norms[bad[0]]}: "
                "pass finite, L2-normalized vectors"
            )
        return vectors


def _connect(path: Path, vault: Vault) -> sqlite3.Connection:
    return database.connect(path, vault.database_key("store"), timeout=_WAIT_SECONDS, shared=True)


def digest_of(passage: Passage) -> bytes:
    """What a passage says, as 32 bytes: the same digest, the same vector."""
    return hashlib.sha256(json.dumps([passage.owner, passage.title, passage.text]).encode()).digest()


def refuse_repeated_ids(passages: Sequence[Passage]) -> None:
    """`DataError` names the first id that occurs twice."""
    seen: set[str] = set()
    for passage in passages:
        if passage.id in seen:
            raise DataError(f"passage id {passage.id!r} occurs twice in one call: give each passage an id of its own")
        seen.add(passage.id)
