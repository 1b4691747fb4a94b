"""The teacher's vectors of all texts, on disk, read block by block; and the nearest passages, exactly.

Each text is embedded once, whoever asks first: vectors are those of the cache that training reads too (`vectors.py`), laid out
as a file beside the lessons. As it stores float16 by default, a score moves by at most 6e-5 (measured there), far below any
margin. A million texts of 384 dimensions cost 0.8 GB of disk, and the memory of two blocks. The search is exact: `faiss.knn`
over each block of passages (a matrix product and a heap), the best of all blocks merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from stillroom_server.distillery.arrays import open_array
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.teachers.base import Embedder, FloatArray, Role
from stillroom_server.distillery.vectors import VectorCache, embed_lessons
from stillroom_shared.errors import DataError
from stillroom_shared.workspace import key_of

BLOCK = 16_384
"""Passages in one matrix product."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors of the texts of one role, by position among `rows`.

    Attributes:
        rows: rows in the lessons, ascending, (texts,).
        stored: of all texts of the lessons, mapped into memory, of any float type.
    """

    rows: NDArray[np.int64]
    stored: NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, FloatArray]]:
        """(position of the first, vectors), in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield first, np.asarray(self.stored[self.rows[first : first + size]], np.float32)

    def __getitem__(self, positions: NDArray[np.int64]) -> FloatArray:
        """Vectors at these positions, (n, dimension), copied."""
        return np.asarray(self.stored[self.rows[positions]], np.float32)


def vectors_of(
    embedder: Embedder,
    lessons: Lessons,
    folder: Path,
    cache: VectorCache,
    *,
    progress: Progress = lambda done, total: None,
) -> dict[Role, Vectors]:
    """Vectors of all texts by role, read back from `folder` or laid out there from the cache; `progress` counts texts.

    Raises:
        DataError: there is no query or no passage, or a vector is not finite.
    """
    roles: tuple[Role, ...] = ("query", "passage")
    rows = {role: lessons.rows(role) for role in roles}
    if absent := [role for role in roles if not len(rows[role])]:
        raise DataError(f"there is no {absent[0]} to embed: add a source that has some")
    path = folder / f"{key_of(embedder.identity, cache.storage, lessons.identity)}.npy"
    stored = open_array(path) if path.exists() else embed_lessons(embedder, lessons, cache, path, progress)
    return {role: Vectors(rows[role], stored) for role in roles}


def nearest(queries: FloatArray, passages: Vectors, count: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Positions and inner products of the best passages, best first; equal ones by position.

    Args:
        queries: (n, dimension).
        count: passages for each query; fewer where there are fewer.

    Returns:
        Two arrays (n, min(count, passages)).
    """
    found = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for first, block in passages.blocks():
        # With a tie at the edge of a block's best, which of the equal ones stays is up to the heap.
        best, places = faiss.knn(queries, block, min(count, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        found, scores = np.hstack([found, places + first]), np.hstack([scores, best])
        order = np.lexsort((found, -scores), axis=1)[:, :count]
        found, scores = np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)
    return found, scores
