"""From a query to ranked rows: by vectors, by words, or by both, among all passages or those of a filter.

What each way is worth was measured: `fusion.py`. A filtered ranking is exact: both indexes are asked for the best
among the filter's rows, so k results come back when the filter leaves k passages (by words alone: k that have one of them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_client.documents import NOWHERE, Found, Metadata, Position
from stillroom_client.fusion import DEPTH, Fused, fuse

if TYPE_CHECKING:
    from stillroom_client.derived import Current

Mode = Literal["dense", "bm25", "hybrid"]


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found. Ranks begin at 1.

    `score` orders the hits: the cosine of the two vectors ("dense"), BM25 ("bm25"), or reciprocal rank fusion, where 1 is
    first in both lists ("hybrid"). Of hits that were read again it is relative to what was read, 0.5 its mean (`rerank.py`).
    `dense_rank` and `bm25_rank` are None where that list was not read or does not have it.
    `document` is the path of the document that it stands in, "" for one that was added alone; `position` says where, and
    `metadata` is what filters see (`documents.py`). `cached` is the earlier query whose answer this is (`cache.py`), None where
    it was found now; hits that differ in nothing else are equal.
    """

    rank: int
    score: float
    passage_id: str
    owner: str
    title: str
    text: str
    dense_rank: int | None = None
    bm25_rank: int | None = None
    document: str = ""
    position: Position = NOWHERE
    metadata: Metadata = field(default_factory=dict)
    cached: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, rank: int, fused: Fused, found: Found) -> Hit:
        """A ranked row and its passage."""
        p, ranks = found.passage, (fused.dense_rank, fused.bm25_rank)
        return cls(
            rank, fused.score, p.id, p.owner, p.title, p.text, *ranks, found.document, found.position, found.metadata
        )


def ranking(
    current: Current, mode: Mode, text: str, vectors: NDArray[np.float32] | None, k: int, rows: NDArray[np.int64] | None
) -> list[Fused]:
    """At most k rows, best first.

    Args:
        vectors: of the query, (1, dim); unused by "bm25".
        rows: of the filter, ascending; None for all.
    """
    depth = max(k, DEPTH) if mode == "hybrid" else k
    dense: list[int] = []
    words: list[int] = []
    if mode != "bm25" and current.vectors is not None and vectors is not None:
        scores, near = current.vectors.search(vectors, depth, rows)
        dense = near[0].tolist()
        if mode == "dense":
            return [Fused(row, float(s), n, None) for n, (row, s) in enumerate(zip(dense, scores[0], strict=True), 1)]
    if current.words is not None:
        weights, found = current.words.search(text, depth, rows)
        words = found.tolist()
        if mode == "bm25":
            return [Fused(row, float(s), None, n) for n, (row, s) in enumerate(zip(words, weights, strict=True), 1)]
    return fuse(dense, words)[:k]
