"""Teachers' scores, each computed once: kept by content, and laid out as the lists of lessons are.

The key of a score is a hash of query and passage, and a store of its own for each teacher's identity (`store.py` says what is
guaranteed: bounded memory, nothing torn, several processes at once). A call computes what is missing in shards of `SHARD`
pairs, each durable before the next begins, so an interrupted run loses at most one.

Of a weighted set each member's raw scores are kept: other weights, temperatures or another normalisation compute nothing again.
A bi-encoder's scores are products of its vectors, so those are kept instead (`vectors.py`), and a text is read once however
many lists it stands in.

| case | what happens |
|---|---|
| a query with the same passage twice | computed once |
| a teacher gives a score that is not finite | `DataError`; nothing of that shard is kept |
| `out` exists | replaced, whole, when the new one is done |
| no lists | an array of (0, k) |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom_server.distillery.arrays import new_array, open_array
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.store import ContentStore, as_keys, distinct, text_digest
from stillroom_server.distillery.teachers.base import Embedder, FloatArray, Teacher
from stillroom_server.distillery.teachers.teacher_set import TeacherSet
from stillroom_server.distillery.vectors import VectorCache, embed_lessons
from stillroom_shared.errors import DataError

SHARD = 4_096


class ScoreCache:
    """Scores of any teachers in one folder.

    >>> import tempfile
    >>> from stillroom_server.distillery.teachers.bm25 import Bm25
    >>> from stillroom_server.distillery.teachers.settings import TeacherSettings
    >>> teacher = Bm25(["The tapir eats leaves.", "Rivers run."], TeacherSettings(kind="bm25"))
    >>> cache = ScoreCache(Path(tempfile.mkdtemp()))
    >>> print(cache.score(teacher, ["eat leaves"], [["The tapir eats leaves.", "Rivers run."]])[0].round(2))
    [1.22 0.  ]

    Attributes:
        folder: where they lie, in `scores/TEACHER/`.
        vectors: of bi-encoders, in the same folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vectors = VectorCache(folder)
        self._stores: dict[str, ContentStore] = {}

    def store(self, teacher: Teacher) -> ContentStore:
        """Where this teacher's scores lie."""
        identity = teacher.identity
        if identity not in self._stores:
            place = self.folder / "scores" / identity[:32]
            self._stores[identity] = ContentStore(place, width=1, label=identity)
        return self._stores[identity]

    def score(
        self,
        teacher: Teacher,
        queries: Sequence[str],
        passages: Sequence[Sequence[str]],
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[FloatArray]:
        """What `teacher.score` gives, read back or computed; `progress` counts pairs."""
        if isinstance(teacher, TeacherSet):
            raw = [self.score(one.teacher, queries, passages, progress=progress) for one in teacher.members]
            return [teacher.combine([own[None] for own in one])[0] for one in zip(*raw, strict=True)]
        keys = _keys(queries, passages)
        store = self.store(teacher)
        missing = np.flatnonzero(~store.get(keys)[0])
        missing = missing[np.sort(distinct(keys[missing]))]
        owner = np.repeat(np.arange(len(passages)), [len(own) for own in passages])
        place = np.concatenate([np.arange(len(own)) for own in passages]) if len(keys) else owner
        progress(len(keys) - len(missing), len(keys))
        for start in range(0, len(missing), SHARD):
            shard = missing[start : start + SHARD]
            asked, first = np.unique(owner[shard], return_index=True)
            lists = [[passages[owner[pair]][place[pair]] for pair in part] for part in np.split(shard, first[1:])]
            computed = np.concatenate(teacher.score([queries[number] for number in asked], lists))
            if not np.isfinite(computed).all():
                raise DataError(
                    f"teacher {type(teacher).__name__} gave a score that is not finite: try float32, or mend it"
                )
            store.put(keys[shard], computed[:, None])
            progress(len(keys) - len(missing) + start + len(shard), len(keys))
        values = store.all(keys)[:, 0]
        return np.split(values, np.cumsum([len(own) for own in passages])[:-1]) if len(passages) else []


def score_lessons(
    teacher: Teacher,
    lessons: Lessons,
    cache: ScoreCache,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:
    """The teacher's scores of every list, (lists, k), memory-mapped from the `.npy` file `out`, in the order of `lessons`.

    `progress` counts lists (of each member of a set in turn). Memory: the texts of one shard, and what the teacher needs.
    """
    if isinstance(teacher, TeacherSet):
        parts = [out.with_suffix(f".member-{number}.npy") for number in range(len(teacher.members))]
        raw = [
            score_lessons(one.teacher, lessons, cache, part, progress)
            for one, part in zip(teacher.members, parts, strict=True)
        ]
        chunks = (teacher.combine([one[chunk] for one in raw]) for chunk in _chunks(lessons))
    elif isinstance(teacher, Embedder):
        rows = np.union1d(lessons.queries, lessons.passages)
        vectors = embed_lessons(teacher, lessons, cache.vectors, out.with_suffix(".vectors.npy"), progress, rows=rows)
        return score_by_vectors(vectors, lessons, out, progress)
    else:
        chunks = (_scored(teacher, lessons, cache, chunk) for chunk in _chunks(lessons))
    return _laid_out(chunks, lessons, out, progress)


def score_by_vectors(
    vectors: NDArray[Any],
    lessons: Lessons,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:
    """Inner products of every list's query and passages, (lists, k), laid out as scores are; `vectors`: (texts, dim)."""
    return _laid_out((_products(vectors, lessons, chunk) for chunk in _chunks(lessons)), lessons, out, progress)


def _laid_out(
    chunks: Iterator[FloatArray], lessons: Lessons, out: Path, progress: Callable[[int, int], None]
) -> NDArray[np.float32]:
    with new_array(out, (lessons.lists, lessons.candidates), np.float32) as array:
        for chunk, scores in zip(_chunks(lessons), chunks, strict=True):
            array[chunk] = scores
            progress(chunk.stop, lessons.lists)
    return open_array(out)


def _keys(queries: Sequence[str], passages: Sequence[Sequence[str]]) -> NDArray[np.uint64]:
    """A key for each pair, list after list."""
    digests: list[bytes] = []
    known: dict[str, bytes] = {}
    for query, own in zip(queries, passages, strict=True):
        asked = text_digest(query)
        for text in own:
            digest = known.get(text) or known.setdefault(text, text_digest(text))
            digests.append(hashlib.blake2b(asked + digest, digest_size=16).digest())
    return as_keys(digests)


def _chunks(lessons: Lessons) -> Iterator[slice]:
    step = max(1, SHARD // lessons.candidates)
    for start in range(0, lessons.lists, step):
        yield slice(start, min(start + step, lessons.lists))


def _scored(teacher: Teacher, lessons: Lessons, cache: ScoreCache, chunk: slice) -> FloatArray:
    queries = lessons.texts(lessons.queries[chunk])
    rows = lessons.passages[chunk]
    flat = lessons.texts(rows.ravel())
    width = lessons.candidates
    lists = [flat[start : start + width] for start in range(0, len(flat), width)]
    return np.stack(cache.score(teacher, queries, lists))


def _products(vectors: NDArray[Any], lessons: Lessons, chunk: slice) -> FloatArray:
    asked = vectors[lessons.queries[chunk]].astype(np.float32)  # (lists, dim)
    read = vectors[lessons.passages[chunk]].astype(np.float32)  # (lists, k, dim)
    return np.asarray(np.matmul(read, asked[:, :, None])[:, :, 0], np.float32)
