"""The teacher's vectors of all texts of a role, on disk, read block by block; and the nearest passages, exactly.

Vectors are made in pieces that are kept (`shards`) and mapped into memory, so that a million texts of 384 dimensions cost
1.5 GB of disk and the memory of two blocks. The search is exact: `faiss.knn` over each block of passages (a matrix product
and a heap), the best of all blocks merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom_server.distillery.data.shards import Shards
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.teachers.base import Embedder, FloatArray, Role
from stillroom_shared.errors import DataError
from stillroom_shared.workspace import key_of

PIECE = 512
"""Texts between two saves."""
BLOCK = 16_384
"""Passages in one matrix product."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors of the texts of one role, by position among `rows`.

    Attributes:
        rows: rows in the lessons, ascending, (texts,).
        pieces: mapped into memory, each (at most 512, dimension).
    """

    rows: NDArray[np.int64]
    pieces: list[FloatArray]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, FloatArray]]:
        """(position of the first, vectors), in order, some pieces together."""
        several = max(size // PIECE, 1)
        for first in range(0, len(self.pieces), several):
            yield first * PIECE, np.concatenate(self.pieces[first : first + several])

    def __getitem__(self, positions: NDArray[np.int64]) -> FloatArray:
        """Vectors at these positions, (n, dimension), copied."""
        homes, places = positions // PIECE, positions % PIECE
        found = np.empty((len(positions), self.pieces[0].shape[1]), np.float32)
        for home in np.unique(homes):
            found[homes == home] = self.pieces[home][places[homes == home]]
        return found


def vectors_of(
    embedder: Embedder,
    lessons: Lessons,
    role: Role,
    folder: Path,
    *,
    progress: Progress = lambda done, total: None,
) -> Vectors:
    """Vectors of all texts of a role, made or read back; `progress` counts texts.

    Raises:
        DataError: there is no text of that role, or a vector is not finite.
    """
    rows = lessons.rows(role)
    if not len(rows):
        raise DataError(f"there is no {role} to embed: add a source that has some")
    shards = Shards(folder / key_of(embedder.identity, lessons.identity, role))
    pieces = []
    for number, start in enumerate(range(0, len(rows), PIECE)):
        piece = rows[start : start + PIECE]
        table = shards.get(number, lambda piece=piece: _piece(embedder, lessons, piece, role))  # type: ignore[misc]
        [values] = table["vector"].chunks  # `combine_chunks` would copy what is only mapped
        pieces.append(values.flatten().to_numpy(zero_copy_only=True).reshape(len(piece), -1))
        progress(start + len(piece), len(rows))
    return Vectors(rows, pieces)


def _piece(embedder: Embedder, lessons: Lessons, rows: NDArray[np.int64], role: Role) -> pa.Table:
    vectors = np.ascontiguousarray(embedder.embed(lessons.texts(rows), role), np.float32)
    if not np.isfinite(vectors).all():
        wrong = int(rows[~np.isfinite(vectors).all(1)][0])
        raise DataError(f"the teacher's vector of text {wrong} is not finite: {lessons.texts([wrong])[0][:60]!r}")
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return pa.table({"vector": column})


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
