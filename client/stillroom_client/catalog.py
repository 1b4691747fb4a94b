"""The documents of a store: which there are, in what state they were read, and where in them their passages stand.

Guarantees
- A document appears, changes and disappears whole: its passages, their vectors and its own row are one generation.
- A passage that says what it said before keeps its row and its vector, though its place or its metadata may change.
- A vector that was made is not made again: what is embedded waits in `staged` until its document is complete, over a crash
  too, and a file that was moved takes the vectors of the text it had.

| what is put | what happens |
|---|---|
| a document that is stored already | its passages are replaced by these, those that did not change stay |
| a passage id of another document | `DataError`, and nothing is written |
| a passage id that was added alone, or by a Stillroom before documents | the document takes it over |
| a document without passages | kept, so that an empty file is not read again |
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillroom_client.documents import Document, Found, Located, Metadata, Position
from stillroom_client.quantization import quantize
from stillroom_client.store import AMONG, Change, Store, digest_of, refuse_repeated_ids
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError

_COLUMNS = "path, type, title, size, modified_ns, read_ns, digest, reader, metadata"
_DAY_NS = 86_400 * 10**9
_PLACE = "place, page, line, start, stop"


class Embedded(NamedTuple):
    """Vectors (n, dim) and the hash of the document tower that made them."""

    vectors: NDArray[np.float32]
    tower: str


class Catalog:
    """The documents of an open store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def documents(self) -> dict[str, Document]:
        """Every document by its path."""
        found = (_document(row) for row in self._store.query(f"SELECT {_COLUMNS} FROM documents ORDER BY path"))
        return {document.path: document for document in found}

    def states(self) -> dict[str, Document]:
        """The same without titles and metadata: what tells whether a file changed, for many documents at once."""
        query = "SELECT path, type, size, modified_ns, read_ns, digest, reader FROM documents"
        return {
            path: Document(
                path=path,
                type=kind,
                title="",
                size=size,
                modified_ns=modified,
                read_ns=read,
                digest=digest,
                reader=reader,
            )
            for path, kind, size, modified, read, digest, reader in self._store.query(query)
        }

    def document(self, path: str) -> Document | None:
        """The document of this path."""
        found = self._store.query(f"SELECT {_COLUMNS} FROM documents WHERE path = ?", (path,))
        return _document(found[0]) if found else None

    def count(self, paths: Iterable[str] | None = None) -> int:
        """Passages of these documents; of all documents without an argument."""
        if paths is None:
            return int(self._store.query("SELECT count(*) FROM passages WHERE document IS NOT NULL")[0][0])
        query = f"SELECT count(*) FROM passages p JOIN documents d ON d.number = p.document WHERE d.path {AMONG}"
        return int(self._store.query(query, (json.dumps(list(paths)),))[0][0])

    def types(self) -> dict[str, int]:
        """Documents of each type, most first."""
        query = "SELECT type, count(*) FROM documents GROUP BY type ORDER BY count(*) DESC, type"
        return dict(self._store.query(query))

    def found(self, rows: Iterable[int]) -> dict[int, Found]:
        """The passages of these rows with all that is known of them; rows that do not exist are left out."""
        return self._found(f"p.row {AMONG}", json.dumps([int(row) for row in rows]))

    def passages_of(self, path: str) -> list[Found]:
        """The passages of a document in its order."""
        return sorted(self._found("d.path = ?", path).values(), key=lambda found: found.position.place)

    def around(self, passage_id: str, reach: int) -> list[Found]:
        """A passage with at most `reach` neighbours on each side in its document, in order; empty if it is not stored."""
        rows = self._store.query(
            "SELECT n.row FROM passages p JOIN passages n ON n.row = p.row OR "
            "(n.document = p.document AND n.place BETWEEN p.place - ?2 AND p.place + ?2) WHERE p.id = ?1",
            (passage_id, reach),
        )
        return sorted(self.found(row for (row,) in rows).values(), key=lambda found: found.position.place)

    def lacking(self, passages: Sequence[Passage]) -> list[Passage]:
        """Those of which no vector is known, under any id: the ones to embed and `stage` before `put`.

        A vector that is stored under another id is staged here, so that it outlives the document that it is of.
        """
        stored = self._store.digests(passages)
        wanted = {digest: p for p in passages if stored.get(p.id) != (digest := digest_of(p))}
        lacking: list[tuple[bytes, Passage]] = []
        elsewhere: list[tuple[bytes, Passage]] = []
        for digest, passage in wanted.items():
            if not self._store.query("SELECT 1 FROM staged WHERE digest = ?", (digest,)):
                known = self._store.query("SELECT 1 FROM passages WHERE digest = ? LIMIT 1", (digest,))
                (elsewhere if known else lacking).append((digest, passage))
        if elsewhere:
            with self._store.writing():
                self._store.execute_many(
                    "INSERT OR IGNORE INTO staged SELECT digest, scale, codes, ? FROM passages JOIN vectors USING (row) "
                    "WHERE digest = ? LIMIT 1",
                    ((time.time_ns(), digest) for digest, _ in elsewhere),
                )
        return [passage for _, passage in lacking]

    def stage(self, passages: Sequence[Passage], embedded: Embedded) -> None:
        """Keep the vectors of passages whose document is not complete yet; no generation of its own.

        Raises:
            TowerChangedError: they are by a document tower that is no longer in use.
        """
        codes, scales = quantize(self._store.checked(passages, embedded.vectors))
        with self._store.writing():
            self._store.refuse_other_tower(embedded.tower)
            self._store.execute_many(
                "INSERT OR REPLACE INTO staged VALUES (?, ?, ?, ?)",
                ((digest_of(p), float(scales[n]), codes[n].tobytes(), time.time_ns()) for n, p in enumerate(passages)),
            )

    def unstage(self) -> None:
        """Forget vectors that no document came for within a day: younger ones may be another process' work."""
        with self._store.writing():
            self._store.query("DELETE FROM staged WHERE staged_ns < ?", (time.time_ns() - _DAY_NS,))

    def put(self, document: Document, passages: Sequence[Located], *, whole: bool = True) -> Change:
        """Store a document with its passages, of which all vectors are known (`lacking`), as one generation.

        Args:
            whole: these are all its passages, others of its are removed. False adds to what there is: for a file that is
                too long to hold at once, whose digest stays empty until `finish`.

        Raises:
            DataError: an id belongs to another document, or occurs twice, or a vector is missing.
        """
        refuse_repeated_ids([located.passage for located in passages])
        if not whole:
            document = dataclasses.replace(document, digest=b"")
        with self._store.writing() as generation:
            number = generation.number + 1
            key, changed = self._put_row(document, number)
            known = self._known(passages, key, document.path)
            removed = self._remove_others(key, document.path, passages) if whole else 0
            fresh, replaced, moved = self._lay(passages, known, key, number)
            if fresh or moved or removed or changed:
                self._store.advance(generation)
        return Change(fresh - replaced, replaced, len(passages) - fresh, removed)

    def put_lone(self, passages: Sequence[Located]) -> Change:
        """The same for passages that stand in no document; `DataError` for an id of a document's passage too."""
        refuse_repeated_ids([located.passage for located in passages])
        with self._store.writing() as generation:
            known = self._known(passages, None, "what is added alone")
            fresh, replaced, moved = self._lay(passages, known, None, generation.number + 1)
            if fresh or moved:
                self._store.advance(generation)
        return Change(fresh - replaced, replaced, len(passages) - fresh)

    def finish(self, document: Document, ids: Iterable[str]) -> int:
        """Say that `ids` are all passages of a document that was put in parts; how many others were removed."""
        with self._store.writing() as generation:
            key, changed = self._put_row(document, generation.number + 1)
            kept = set(ids)
            removed = self._delete([i for i in self._ids_of(key) if i not in kept])
            if removed or changed:
                self._store.advance(generation)
        return removed

    def seen(self, document: Document) -> None:
        """Note that a file was read again and says the same: neither a change nor a generation."""
        values = (document.modified_ns, document.read_ns, document.reader, document.path)
        with self._store.writing():
            self._store.query("UPDATE documents SET (modified_ns, read_ns, reader) = (?, ?, ?) WHERE path = ?", values)

    def remove(self, paths: Iterable[str]) -> int:
        """Remove documents with their passages, vectors and feedback, as one generation; how many passages there were."""
        with self._store.writing() as generation:
            removed, wanted = 0, json.dumps(list(paths))
            query = f"SELECT number FROM documents WHERE path {AMONG}"
            keys = [key for (key,) in self._store.query(query, (wanted,))]
            for key in keys:
                removed += self._delete(self._ids_of(key))
            self._store.query(f"DELETE FROM documents WHERE path {AMONG}", (wanted,))
            if keys:
                self._store.advance(generation)
        return removed

    def _found(self, where: str, value: str) -> dict[int, Found]:
        rows = self._store.query(
            f"SELECT p.row, p.id, p.owner, p.text, p.title, coalesce(d.path, ''), p.{_PLACE.replace(', ', ', p.')}, "
            f"d.metadata, p.metadata FROM passages p LEFT JOIN documents d ON d.number = p.document WHERE {where}",
            (value,),
        )
        return {
            row[0]: Found(Passage(*row[1:5]), row[5], _position(row[6:11]), _merged(row[11], row[12], row[2]))
            for row in rows
        }

    def _put_row(self, document: Document, number: int) -> tuple[int, bool]:
        """The document's number, and whether its row says something new to who filters or shows it."""
        before = self.document(document.path)
        if before is None:
            self._store.query(
                f"INSERT INTO documents ({_COLUMNS}, generation) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*_row(document), number),
            )
        else:
            self._store.query(
                f"UPDATE documents SET ({_COLUMNS}) = (?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE path = ?",
                (*_row(document), document.path),
            )
        changed = before is None or _described(before) != _described(document)
        if changed:
            self._store.query("UPDATE documents SET generation = ? WHERE path = ?", (number, document.path))
        [(key,)] = self._store.query("SELECT number FROM documents WHERE path = ?", (document.path,))
        return int(key), changed

    def _known(self, passages: Sequence[Located], key: int | None, path: str) -> dict[str, tuple[Any, ...]]:
        """Of each id that is stored: digest, document and place."""
        wanted = json.dumps([located.passage.id for located in passages])
        query = f"SELECT id, digest, document, {_PLACE}, metadata FROM passages WHERE id {AMONG}"
        known = {row[0]: row[1:] for row in self._store.query(query, (wanted,))}
        if taken := next((i for i, row in known.items() if row[1] not in (None, key)), None):
            [(other,)] = self._store.query("SELECT path FROM documents WHERE number = ?", (known[taken][1],))
            raise DataError(f"passage id {taken!r} occurs in {other} and in {path}: add them to different homes")
        return known

    def _remove_others(self, key: int, path: str, passages: Sequence[Located]) -> int:
        kept, prefix = {located.passage.id for located in passages}, f"{path}#"
        # What a Stillroom before documents read from this file has its path as a prefix, and no document.
        query = "SELECT id FROM passages WHERE document IS NULL AND substr(id, 1, ?) = ?"
        orphans = [row[0] for row in self._store.query(query, (len(prefix), prefix))]
        return self._delete([i for i in self._ids_of(key) + orphans if i not in kept])

    def _ids_of(self, key: int) -> list[str]:
        return [row[0] for row in self._store.query("SELECT id FROM passages WHERE document = ?", (key,))]

    def _delete(self, ids: Sequence[str]) -> int:
        for table, column in (("feedback", "passage_id"), ("passages", "id")):
            self._store.query(f"DELETE FROM {table} WHERE {column} {AMONG}", (json.dumps(ids),))
        return len(ids)

    def _lay(
        self, passages: Sequence[Located], known: dict[str, tuple[Any, ...]], key: int | None, number: int
    ) -> tuple[int, int, int]:
        """Write what differs from what is `known`: how many have a new text, how many of them had another, how many moved."""
        fresh = [item for item in passages if known.get(item.passage.id, (None,))[0] != digest_of(item.passage)]
        replaced = [item.passage.id for item in fresh if item.passage.id in known]
        self._insert(fresh, replaced, key, number)
        moved = [
            (key, *_place(item), item.passage.id)
            for item in passages
            if item.passage.id in known and known[item.passage.id][1:] != (key, *_place(item))
        ]
        self._store.execute_many(
            f"UPDATE passages SET (document, {_PLACE}, metadata) = (?, ?, ?, ?, ?, ?, ?) WHERE id = ?", moved
        )
        return len(fresh), len(replaced), len(moved)

    def _insert(self, fresh: Sequence[Located], replaced: Sequence[str], key: int | None, number: int) -> None:
        vectors = {item.passage.id: self._vector(item.passage) for item in fresh}
        self._store.query(f"DELETE FROM passages WHERE id {AMONG}", (json.dumps(replaced),))
        self._store.execute_many(
            f"INSERT INTO passages (id, owner, title, text, digest, generation, document, {_PLACE}, metadata) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (p.id, p.owner, p.title, p.text, digest_of(p), number, key, *_place(item))
                for item in fresh
                for p in (item.passage,)
            ),
        )
        self._store.execute_many(
            "INSERT INTO vectors SELECT row, ?, ? FROM passages WHERE id = ?",
            ((*vector, i) for i, vector in vectors.items()),
        )
        self._store.execute_many("DELETE FROM staged WHERE digest = ?", ((digest_of(i.passage),) for i in fresh))

    def _vector(self, passage: Passage) -> tuple[float, bytes]:
        digest = digest_of(passage)
        for query in (
            "SELECT scale, codes FROM staged WHERE digest = ?",
            "SELECT scale, codes FROM vectors JOIN passages USING (row) WHERE digest = ? LIMIT 1",
        ):
            if found := self._store.query(query, (digest,)):
                return found[0][0], found[0][1]
        raise DataError(f"passage {passage.id!r} lost its vector to another process: add its document again")


def _document(row: tuple[Any, ...]) -> Document:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return Document(**{**values, "digest": bytes(values["digest"]), "metadata": json.loads(values["metadata"])})


def _row(document: Document) -> tuple[object, ...]:
    d = document
    return (
        d.path, d.type, d.title, d.size, d.modified_ns, d.read_ns, d.digest, d.reader, _json(d.metadata),
    )  # fmt: skip


def _described(document: Document) -> tuple[object, ...]:
    return document.type, document.title, _json(document.metadata)


def _place(located: Located) -> tuple[object, ...]:
    position = located.position
    return position.place, position.page, position.line, position.start, position.stop, _json(located.metadata)


def _json(metadata: Metadata) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True)


def _position(columns: Sequence[Any]) -> Position:
    place, page, line, start, stop = columns
    return Position(place=place, page=page, line=line, start=start, stop=stop)


def _merged(document: str | None, passage: str, owner: str) -> Metadata:
    """What the view `described` shows, in less time: most passages have no metadata of their own."""
    found = json.loads(document) if document else {}
    return {**found, **(json.loads(passage) if passage != "{}" else {}), "owner": owner}
