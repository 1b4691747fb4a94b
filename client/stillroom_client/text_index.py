"""The full-text index: BM25 by Tantivy, derived from the store, brought forward or built again, never trusted.

A home keeps it in `index.tantivy/STAMP/`, a folder for one generation of the store, named by that generation's stamp. It
appears whole: a new one is made beside the old, from hard links to the old one's files (Tantivy never writes into a file
that is finished), what came and what went since, and a seal; then it is renamed, then the old one goes. Killed at any point,
there is the old folder or the new one, and a leftover that the next writer removes.

The seal (`seal.json`) names the generation, up to where the store was read, and the SHA-256 of every file; its last line is
the hash of itself. As of the vector index (`index.py`), an index is used when all of this holds for the generation asked
for; otherwise it is "missing", "torn" or "stale". A stale one whose generation is in the store's past is brought forward, at a
cost that grows with what changed; any other is built from nothing.

The files hold words and how often they occur, not their order, and no text. The words of a removed passage stay in them until
Tantivy merges their segment, or until one passage in `1 / _DEAD_SHARE` is a removed one: then the index is built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tantivy import Document, Index, Occur, Query, Schema, SchemaBuilder

from stillroom_client import analysis
from stillroom_client.history import History, Mark
from stillroom_client.index_base import Fault
from stillroom_client.store import Generation, Store
from stillroom_shared.corpus import Passage
from stillroom_shared.files import private_folder

VERSION = 1
"""Of schema and analysis: another one is built anew."""

_SEAL = "seal.json"
_LOCKS = (".tantivy-meta.lock", ".tantivy-writer.lock")
_HEAP = 60_000_000  # bytes of one segment before it is written
_DEAD_SHARE = 0.05
_PUSHED = 2_000  # rows of a filter that Tantivy is given; with more, hits are read on until enough are among them


@dataclass(frozen=True, slots=True)
class Seal:
    """What a folder vouches for. `dead`: removed passages whose words may still be in it."""

    generation: Generation
    mark: Mark
    count: int
    dead: int
    files: dict[str, str]


@dataclass(frozen=True, eq=False)
class TextIndex:
    """The passages of one generation of a store, found by their words."""

    generation: Generation
    count: int
    _index: Index

    def search(
        self, text: str, depth: int, rows: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """BM25 scores and store rows, both (m,), best first, of at most `depth` passages with a term of a plain text.

        Args:
            rows: only these, ascending: what is found is what the whole ranking has of them, in its order.
        """
        query = self._query(text)
        if query is None or depth < 1 or (rows is not None and not len(rows)):
            return np.zeros(0, np.float32), np.zeros(0, np.int64)
        if rows is None:
            return self._best(query, depth)
        if len(rows) <= _PUSHED:
            among = Query.const_score_query(Query.term_set_query(self._index.schema, "row", rows.tolist()), 0.0)
            return self._best(Query.boolean_query([(Occur.Must, query), (Occur.Must, among)]), depth)
        limit = int(depth * self.count / len(rows) * 1.5) + depth
        while True:
            scores, found = self._best(query, limit)
            kept = rows[np.minimum(np.searchsorted(rows, found), len(rows) - 1)] == found
            if kept.sum() >= depth or len(found) < limit:
                return scores[kept][:depth], found[kept][:depth]
            limit *= 4

    def _best(self, query: Query, limit: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        searcher = self._index.searcher()
        hits = searcher.search(query, min(limit, max(self.count, 1)), count=False).hits
        rows = searcher.fast_field_values("row", [address for _, address in hits])
        return np.array([score for score, _ in hits], np.float32), np.array(rows, np.int64)

    def _query(self, text: str) -> Query | None:
        words, names = analysis.terms(text)
        schema = self._index.schema
        parts = [Query.term_query(schema, "words", word, "freq") for word in words]
        parts += [Query.term_query(schema, "names", name, "basic") for name in names]
        return Query.boolean_query([(Occur.Should, part) for part in parts]) if parts else None

    @classmethod
    def load(cls, folder: Path, generation: Generation) -> TextIndex | Fault:
        """The saved index of this generation, or why there is none."""
        place = folder / generation.stamp
        if not place.is_dir():
            return "stale" if any(_sealed(folder)) else "missing"
        seal = read_seal(place)
        if seal is None or seal.generation != generation:
            return "torn"
        try:
            return cls(generation, seal.count, _opened(place))
        except (OSError, ValueError):  # Tantivy's errors are ValueErrors
            return "torn"

    @classmethod
    def in_memory(cls, generation: Generation, passages: Iterable[tuple[int, Passage]]) -> TextIndex:
        """Of rows and passages, for when nothing can be written."""
        return cls._unsealed(Index(_schema()), generation, passages)

    @classmethod
    def in_folder(cls, folder: Path, generation: Generation, passages: Iterable[tuple[int, Passage]]) -> TextIndex:
        """The same in an empty folder of the caller's, without a seal: for measuring what it weighs."""
        return cls._unsealed(Index(_schema(), path=str(folder)), generation, passages)

    @classmethod
    def _unsealed(cls, made: Index, generation: Generation, passages: Iterable[tuple[int, Passage]]) -> TextIndex:
        index = _reading(made)
        _write(index, passages, ())
        index.reload()
        return cls(generation, index.searcher().num_docs, index)


def write_index(folder: Path, store: Store, generation: Generation, *, afresh: bool = False) -> None:
    """Bring the index in `folder` to the present generation: ask inside `store.writing()`. `OSError`: nothing changed.

    Args:
        afresh: build it from nothing, for a generation that is not committed: the folders of before stay (`tidy`).
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    old = next((found for found in _sealed(folder) if (found[1]) and History(store).knows(found[1].generation)), None)
    if old is not None and old[1] is not None:
        gone = History(store).removed(old[1].mark)
        if afresh or old[1].dead + len(gone) > _DEAD_SHARE * store.count():
            old = None
    try:
        _write_folder(folder / generation.stamp, store, generation, old)
    except ValueError as error:  # Tantivy's: a full disk, a folder that somebody removed, or a base that is no index
        raise OSError(f"{folder} cannot be written: {error}") from error
    if not afresh:
        tidy(folder, generation)


def tidy(folder: Path, generation: Generation) -> None:
    """Remove every index but that of a committed generation."""
    for other in folder.iterdir():
        if other.name != generation.stamp:
            shutil.rmtree(other, ignore_errors=True)


def _write_folder(place: Path, store: Store, generation: Generation, old: tuple[Path, Seal | None] | None) -> None:
    if place.exists():  # torn, or it would not be written
        shutil.rmtree(place)
    with private_folder(place) as partial:
        known: dict[str, str] = {}
        base, dead, gone = Mark(), 0, []
        if old is not None and old[1] is not None:
            base, known = old[1].mark, old[1].files
            gone = History(store).removed(base)
            dead = old[1].dead + len(gone)
            for name in known:
                _link(old[0] / name, partial / name)
            index = _reading(Index.open(str(partial)))
        else:
            index = _reading(Index(_schema(), path=str(partial)))
        _write(index, History(store).passages(base), gone)
        files = {
            name: known[name] if name in known and _finished(name) else _digest(partial / name)
            for name in sorted(os.listdir(partial))
            if name not in _LOCKS
        }
        for name in _LOCKS:  # Tantivy makes them when it reads too, then readable by others
            (partial / name).touch()
        seal = Seal(generation, History(store).mark(), store.count(), dead, files)
        body = json.dumps({"version": VERSION, **asdict(seal)}).encode()
        (partial / _SEAL).write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode())


def _write(index: Index, added: Iterable[tuple[int, Passage]], gone: Sequence[int]) -> None:
    schema = index.schema
    writer = index.writer(heap_size=_HEAP, num_threads=1)
    for row in gone:
        # Not delete_documents_by_term: it takes every number for a signed one, and finds none in this field.
        writer.delete_documents_by_query(Query.term_query(schema, "row", row))
    for row, passage in added:
        text = analysis.spelled_out(passage.full_text)
        names = " ".join(dict.fromkeys(analysis.identifiers(passage.full_text)))
        writer.add_document(Document.from_dict({"row": row, "words": text, "names": names}, schema))
    writer.commit()
    writer.wait_merging_threads()


def read_seal(place: Path) -> Seal | None:
    """The seal of a folder whose files are all as it says; None when one is not."""
    try:
        body, _, digest = (place / _SEAL).read_bytes().rpartition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        found: dict[str, Any] = json.loads(body)
        if found.pop("version") != VERSION or any(_digest(place / n) != d for n, d in found["files"].items()):
            return None
    except OSError:
        return None
    return Seal(Generation(**found["generation"]), Mark(**found["mark"]), found["count"], found["dead"], found["files"])


def _sealed(folder: Path) -> list[tuple[Path, Seal | None]]:
    """Folders in it that carry a seal, the whole ones first."""
    found = [(place.parent, read_seal(place.parent)) for place in folder.glob(f"[!.]*/{_SEAL}")]
    return sorted(found, key=lambda pair: pair[1] is None)


def _schema() -> Schema:
    builder = SchemaBuilder()
    builder.add_unsigned_field("row", indexed=True, fast=True)
    builder.add_text_field("words", tokenizer_name="words", index_option="freq")
    builder.add_text_field("names", tokenizer_name="names", index_option="basic")
    return builder.build()


def _opened(place: Path) -> Index:
    return _reading(Index.open(str(place)))


def _reading(index: Index) -> Index:
    index.register_tokenizer("words", analysis.words())
    index.register_tokenizer("names", analysis.whole())
    index.config_reader(reload_policy="manual")  # "commit" starts a thread that looks at the folder twice a second
    return index


def _finished(name: str) -> bool:
    """Whether Tantivy never writes a file of this name again; it replaces the others."""
    return name not in ("meta.json", ".managed.json")


def _link(source: Path, target: Path) -> None:
    if _finished(source.name):
        with suppress(OSError):  # a file system without links
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
