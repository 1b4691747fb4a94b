"""The passages that a teacher thinks best for a query, whatever the teacher is.

A teacher with vectors looks at all passages, exactly (`vectors.nearest`). Any other scorer (cross-encoder, late
interaction, BM25, sets of them) re-scores what a search finds: the dense search of another teacher that has vectors, or BM25
over the passages' words (tantivy, on disk). A passage that it would like and the search does not find is missed. A teacher
with vectors may look at what words find too, and then at fewer of its own. Without a teacher the search alone ranks, and
relevant passages score infinity: no margin can be kept to them.

Candidates come in pieces that are kept. Each query's own relevant passages are scored too.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import tantivy
from numpy.typing import NDArray

from stillroom_server.distillery.data.shards import Shards
from stillroom_server.distillery.data.vectors import Vectors, nearest, vectors_of
from stillroom_server.distillery.lessons import Lessons, batches
from stillroom_server.distillery.teachers.base import Embedder, FloatArray, Teacher
from stillroom_server.distillery.vectors import VectorCache
from stillroom_shared.errors import DataError
from stillroom_shared.workspace import key_of

PIECE = 512
"""Queries between two saves."""
_HEAP = 64 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Judged:
    """Queries with their known relevant passages, by rows of the lessons.

    Attributes:
        queries: different queries, ascending, (n,).
        starts: where the relevant passages of each begin in `passages`, and the end of all, (n + 1,).
        passages: ascending for each query, (judgements,).
        grades: of these judgements, above 0, (judgements,).
        sources: number of the source of each judgement, (judgements,).
    """

    queries: NDArray[np.int64]
    starts: NDArray[np.int64]
    passages: NDArray[np.int64]
    grades: NDArray[np.int8]
    sources: NDArray[np.uint16]

    @classmethod
    def of(cls, lessons: Lessons) -> Judged:
        """The judgements above 0 of lessons of any number of candidates; the first counts where one is repeated."""
        positive = lessons.grades > 0  # (lists, k)
        pairs = np.stack([np.repeat(lessons.queries, positive.sum(1)), lessons.passages[positive]], 1)
        different, first = np.unique(pairs, axis=0, return_index=True)
        sources = np.repeat(lessons.list_sources, positive.sum(1))
        return cls._grouped(different, lessons.grades[positive][first], sources[first])

    @classmethod
    def _grouped(cls, pairs: NDArray[np.int64], grades: NDArray[np.int8], sources: NDArray[np.uint16]) -> Judged:
        queries, starts = np.unique(pairs[:, 0], return_index=True)
        passages = np.ascontiguousarray(pairs[:, 1])  # a view would hold the pairs
        return cls(queries, np.append(starts, len(pairs)).astype(np.int64), passages, grades, sources)

    def keep(self, mask: NDArray[np.bool_]) -> Judged:
        """Only some of the judgements, (judgements,)."""
        pairs = np.stack([np.repeat(self.queries, np.diff(self.starts)), self.passages], 1)
        return self._grouped(pairs[mask], self.grades[mask], self.sources[mask])

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def most(self) -> int:
        """Relevant passages of the query that has the most."""
        return int(np.diff(self.starts).max(initial=0))

    @property
    def identity(self) -> str:
        """A hash of which passages are relevant to which queries."""
        return hashlib.sha256(b"".join(map(np.ndarray.tobytes, (self.queries, self.starts, self.passages)))).hexdigest()

    def source(self, query: int, passage: int) -> int:
        """The number of the source of a judgement."""
        number = int(np.searchsorted(self.queries, query))
        return int(self.sources[self.starts[number] + np.searchsorted(self.relevant(number), passage)])

    def relevant(self, number: int) -> NDArray[np.int64]:
        """Rows of the relevant passages of the query at that position."""
        return self.passages[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True, eq=False)
class Ranked:
    """What the teacher says about one query.

    Attributes:
        query: its row.
        relevant: rows of its relevant passages.
        relevant_scores: the teacher's scores of them.
        candidates: rows of passages, best first; relevant ones may be among them.
        scores: the teacher's scores of them.
    """

    query: int
    relevant: NDArray[np.int64]
    relevant_scores: FloatArray
    candidates: NDArray[np.int64]
    scores: FloatArray

    @property
    def others(self) -> NDArray[np.bool_]:
        """Which candidates are not known to be relevant."""
        return ~np.isin(self.candidates, self.relevant)


class Finder(Protocol):
    """Finds passages by their rows in the lessons."""

    @property
    def identity(self) -> str:
        """Changes with what is found."""

    def find(self, queries: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        """Rows of at most `count` passages for each query (by row), best first."""


@dataclass(frozen=True, eq=False)
class Dense:
    """Exact search by a teacher's vectors."""

    embedder: Embedder
    queries: Vectors
    passages: Vectors

    @classmethod
    def prepare(
        cls, embedder: Embedder, lessons: Lessons, folder: Path, cache: VectorCache, progress: Progress
    ) -> Dense:
        """Embed queries and passages; `progress` counts texts of both."""
        found = vectors_of(embedder, lessons, folder, cache, progress=progress)
        return cls(embedder, found["query"], found["passage"])

    @property
    def identity(self) -> str:
        """The teacher's, and how its vectors are rounded."""
        return f"{self.embedder.identity} {self.passages.stored.dtype}"

    def vectors(self, queries: NDArray[np.int64]) -> FloatArray:
        """Of queries by row, (n, dimension)."""
        return self.queries[np.searchsorted(self.queries.rows, queries)]

    def find(self, queries: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        """Rows of the nearest passages."""
        return list(self.passages.rows[nearest(self.vectors(queries), self.passages, count)[0]])


class Lexical:
    """BM25 (k1 = 1.2, b = 0.75, English stems) over the passages' words, in an index on disk."""

    identity = "tantivy bm25 en_stem"

    def __init__(self, lessons: Lessons, folder: Path, *, progress: Progress = lambda done, total: None) -> None:
        self._lessons = lessons
        whole = folder / key_of(self.identity, lessons.identity)
        if not whole.exists():
            _build(lessons, whole, progress)
        self._index = tantivy.Index.open(str(whole))
        self._searcher = self._index.searcher()

    def find(self, queries: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        """Rows of passages that share words with the query."""
        found = []
        for text in self._lessons.texts(queries):
            words = "".join(letter if letter.isalnum() else " " for letter in text).lower()
            hits = self._searcher.search(self._index.parse_query(words, ["text"]), count).hits if words.strip() else []
            # Equal scores by row: segments are merged at random times.
            rows = [(-score, self._searcher.doc(place)["row"][0]) for score, place in hits]
            found.append(np.array([row for _, row in sorted(rows)], np.int64))
        return found


@dataclass(frozen=True, eq=False)
class Mixed(Dense):
    """Half of the passages by vectors and half by words, each once: what either finds, for lists that both are to rank."""

    lexical: Lexical

    @classmethod
    def of(cls, dense: Dense, lexical: Lexical) -> Mixed:
        """Both searches over the same passages."""
        return cls(dense.embedder, dense.queries, dense.passages, lexical)

    @property
    def identity(self) -> str:
        """Of both."""
        return f"{super().identity} and {self.lexical.identity}"

    def find(self, queries: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        """Rows of at most `count` passages for each query."""
        dense, lexical = super().find(queries, count - count // 2), self.lexical.find(queries, count // 2)
        return [np.concatenate([one, other[~np.isin(other, one)]]) for one, other in zip(dense, lexical, strict=True)]


def _build(lessons: Lessons, whole: Path, progress: Progress) -> None:
    partial = whole.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    schema = tantivy.SchemaBuilder()
    schema.add_text_field("text", tokenizer_name="en_stem")
    schema.add_unsigned_field("row", stored=True)
    writer = tantivy.Index(schema.build(), path=str(partial)).writer(_HEAP, 1)
    rows, done = lessons.rows("passage"), 0
    for piece in batches(rows, 4_096):
        for row, text in zip(piece.tolist(), lessons.texts(piece), strict=True):
            writer.add_document(tantivy.Document(text=text, row=row))
        done += len(piece)
        progress(done, len(rows))
    writer.commit()
    writer.wait_merging_threads()
    partial.rename(whole)


def ranked(
    teacher: Teacher | None,
    finder: Finder,
    lessons: Lessons,
    judged: Judged,
    count: int,
    folder: Path,
    *,
    progress: Progress = lambda done, total: None,
) -> Iterator[Ranked]:
    """The teacher's best passages of each query, and its scores of the relevant ones, query by query.

    Args:
        finder: a `Dense` of the same teacher makes it exact; with any other the teacher scores `count` found ones.
        count: candidates of each query; fewer where fewer are found.
        progress: (done, total) queries.
    """
    shards = Shards(
        folder
        / key_of(teacher.identity if teacher else None, finder.identity, lessons.identity, judged.identity, count)
    )
    for piece, start in enumerate(range(0, len(judged), PIECE)):
        part = range(start, min(start + PIECE, len(judged)))
        table = shards.get(piece, lambda part=part: _piece(teacher, finder, lessons, judged, part, count))  # type: ignore[misc]
        columns = [table[name] for name in ("relevant_scores", "candidates", "scores")]
        for number, *values in zip(part, *columns, strict=True):
            yield Ranked(
                int(judged.queries[number]), judged.relevant(number), *(one.values.to_numpy() for one in values)
            )
        progress(part.stop, len(judged))


def _piece(
    teacher: Teacher | None, finder: Finder, lessons: Lessons, judged: Judged, part: range, count: int
) -> pa.Table:
    queries = judged.queries[part.start : part.stop]
    relevant = [judged.relevant(number) for number in part]
    found = finder.find(queries, count)
    if teacher is None:
        pairs = zip(relevant, found, strict=True)
        scores = [np.concatenate([np.full(len(known), np.inf), -np.arange(len(rows))]) for known, rows in pairs]
    elif isinstance(finder, Dense) and finder.embedder is teacher:
        scores = _products(finder, queries, relevant, found)
    else:
        scores = _scored(teacher, lessons, queries, relevant, found)
    lines = []
    for known, candidates, values in zip(relevant, found, scores, strict=True):
        others = values[len(known) :]
        order = np.lexsort((candidates, -others))
        lines.append((values[: len(known)], candidates[order], others[order]))
    fields = ("relevant_scores", pa.float32()), ("candidates", pa.int64()), ("scores", pa.float32())
    return pa.table(
        {name: pa.array([line[i] for line in lines], pa.list_(kind)) for i, (name, kind) in enumerate(fields)}
    )


_Rows = Sequence[NDArray[np.int64]]


def _products(finder: Dense, queries: NDArray[np.int64], relevant: _Rows, found: _Rows) -> list[FloatArray]:
    """Inner products of each query with its relevant passages and with what was found, one after the other."""
    scores = []
    for vector, known, candidates in zip(finder.vectors(queries), relevant, found, strict=True):
        positions = np.searchsorted(finder.passages.rows, np.concatenate([known, candidates]))
        scores.append(finder.passages[positions] @ vector)
    return scores


def _scored(
    teacher: Teacher, lessons: Lessons, queries: NDArray[np.int64], relevant: _Rows, found: _Rows
) -> list[FloatArray]:
    """The same by the teacher's own word."""
    lists = [np.concatenate(pair) for pair in zip(relevant, found, strict=True)]
    scores = teacher.score(lessons.texts(queries), [lessons.texts(rows) for rows in lists])
    for query, values in zip(queries, scores, strict=True):
        if not np.isfinite(values).all():
            raise DataError(f"the teacher's score for query {lessons.texts([query])[0][:60]!r} is not finite: check it")
    return scores
