"""Late interaction: a vector for each token, MaxSim over every passage, exactly (Khattab and Zaharia 2020, arXiv 2004.12832).

The score of a passage is the sum, over the tokens of the query, of the largest product with a token of the passage. No
candidates are picked beforehand, so what is measured is the model, not an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import MultiVectorEncoder

from stillroom_shared.corpus import Passage, Query
from stillroom_simulations.evaluate import Run
from stillroom_simulations.evaluating.kept import Kept
from stillroom_simulations.evaluating.systems import Bytes, Progress, Ranking, best, silent

Vectors = NDArray[np.float32]
_SHARD = 128
_BLOCK = 100_000  # passage tokens that are compared at a time


@dataclass(frozen=True, eq=False)
class LateInteraction:
    """A multi-vector model. `identity` is a hash of it, `weights` its bytes."""

    name: str
    how: str
    model: MultiVectorEncoder
    identity: str
    weights: int

    def index(self, passages: Sequence[Passage], kept: Kept, progress: Progress = silent) -> LateSearcher:
        """Embed the tokens of the passages, or read them back."""
        texts = [passage.full_text for passage in passages]
        found = kept.arrays(f"passage {self.identity}", texts, self._passages, shard=_SHARD, progress=progress)
        starts = np.cumsum([0, *(len(one) for one in found)])
        return LateSearcher(self, [passage.id for passage in passages], np.concatenate(found), starts, kept)

    def queries(self, texts: Sequence[str]) -> list[Vectors]:
        """(tokens, dim) of each."""
        found = self.model.encode_query(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return [np.asarray(one, np.float32) for one in found]

    def _passages(self, texts: Sequence[str]) -> list[Vectors]:
        found = self.model.encode_document(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return [np.asarray(one, np.float32) for one in found]


@dataclass(frozen=True, eq=False)
class LateSearcher:
    """All tokens of all passages: (tokens, dim); passage i has those from starts[i] up to starts[i + 1]."""

    system: LateInteraction
    ids: Sequence[str]
    tokens: Vectors
    starts: NDArray[np.int64]
    kept: Kept

    @property
    def bytes(self) -> Bytes:
        """Token vectors are float32, uncompressed."""
        return Bytes(self.system.weights, 0, self.tokens.nbytes / len(self.ids))

    def run(self, queries: Sequence[Query], depth: int, progress: Progress = silent) -> Run:
        """The best of MaxSim over all passages."""
        texts, identity = [query.text for query in queries], f"query {self.system.identity}"
        encoded = self.kept.arrays(identity, texts, self.system.queries, shard=_SHARD)
        run: Run = {}
        for done, (query, vectors) in enumerate(zip(queries, encoded, strict=True), start=1):
            run[query.id] = dict(best(maxsim(vectors, self.tokens, self.starts), self.ids, depth))
            progress(done, len(queries))
        return run

    def encode(self, text: str) -> Vectors:
        """(tokens, dim)."""
        return self.system.queries([text])[0]

    def search(self, encoded: Vectors, k: int) -> Ranking:
        """MaxSim with every passage."""
        return best(maxsim(encoded, self.tokens, self.starts), self.ids, k)


def maxsim(query: Vectors, tokens: Vectors, starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(passages,) the sum over query tokens of the largest product; a passage without tokens scores 0.

    >>> maxsim(np.eye(2, dtype=np.float32), np.float32([[1, 0], [0, 1], [.5, .5]]), np.array([0, 2, 2, 3])).tolist()
    [2.0, 0.0, 1.0]

    Args:
        query: (query tokens, dim).
        tokens: (all tokens, dim).
        starts: (passages + 1,) as `LateSearcher` has them.
    """
    scores = np.zeros(len(starts) - 1)
    filled = np.flatnonzero(np.diff(starts))  # `reduceat` gives the next segment's value for an empty one
    first = 0
    while first < len(filled):
        begin = starts[filled[first]]
        last = max(first + 1, int(np.searchsorted(starts[filled + 1], begin + _BLOCK, side="right")))
        rows = filled[first:last]
        products = query @ tokens[begin : starts[rows[-1] + 1]].T  # (query tokens, tokens of the block)
        largest = np.maximum.reduceat(products, starts[rows] - begin, axis=1)  # (query tokens, passages of the block)
        scores[rows] = largest.sum(axis=0, dtype=np.float64)
        first = last
    return scores
