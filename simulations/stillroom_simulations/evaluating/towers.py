"""One vector a text: a query tower and a passage tower that share a space, searched exactly.

| the model compares by | its vectors become | and are compared by |
|---|---|---|
| cosine | unit vectors | dot product |
| dot product | as they are | dot product |
| Euclidean distance | a query q is (q, 1), a passage p is (p, -|p|^2 / 2) | dot product: the same order |

Vectors cut to their first dimensions (Matryoshka, Kusupati et al. 2022, arXiv 2205.13147) are made unit vectors again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_client.encoder import Encoder
from stillroom_shared.corpus import Passage, Query
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.release import Precision, Release
from stillroom_simulations.evaluate import Run, dense_run
from stillroom_simulations.evaluating.kept import Kept
from stillroom_simulations.evaluating.systems import Bytes, Progress, Ranking, silent

Vectors = NDArray[np.float32]
Similarity = Literal["cosine", "dot", "euclidean"]
Role = Literal["query", "passage"]
_SHARD = 512


@dataclass(frozen=True, eq=False)
class Tower:
    """One side of a bi-encoder.

    Attributes:
        identity: a hash of all that its vectors depend on beside the text.
        weights: bytes of its weights.
        embed: n texts to (n, dim) float32, before `last`.
        full: length of whole vectors.
        dimension: the first values that are compared; None for all.
        last: a linear map, (full, dim), that stands apart so that models which differ in it alone share what is kept.
    """

    role: Role
    identity: str
    weights: int
    embed: Callable[[Sequence[str]], Vectors]
    similarity: Similarity
    full: int
    dimension: int | None = None
    last: Vectors | None = None

    def shortened(self, dimension: int | None) -> Tower:
        """The same with shorter vectors; `SettingsError` when it has no vectors of that length."""
        if dimension is None:
            return self
        if not 0 < dimension <= self.full or self.similarity != "cosine":
            raise SettingsError(
                f"@{dimension}: vectors of {self.full} values compared by {self.similarity} cannot be cut to that; "
                f"cosine ones can, to 1 to {self.full}"
            )
        return replace(self, dimension=dimension)

    def comparable(self, vectors: Vectors) -> Vectors:
        """Vectors of `embed` as a dot product compares them; see the table of this module."""
        if self.last is not None:
            vectors = vectors @ self.last.T
        if self.similarity == "cosine":
            return unit(vectors[:, : self.dimension])
        if self.similarity == "dot":
            return vectors
        last = np.ones(len(vectors)) if self.role == "query" else -(vectors.astype(np.float64) ** 2).sum(axis=1) / 2
        return np.concatenate([vectors, last[:, None].astype(np.float32)], axis=1)


def unit(vectors: Vectors) -> Vectors:
    """(n, dim) divided by their norms; a zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms, norms, 1), np.float32)


def release_tower(release: Release, encoder: Encoder, precision: Precision, role: Role) -> Tower:
    """A tower of a release as a device runs it: ONNX Runtime, a text at a time, the release's own adapter."""
    queries = role == "query"
    tower = release.manifest.query_tower_hash if queries else release.document_tower_hash
    path = release.query_onnx(precision) if queries else release.document_onnx(precision)
    embed = encoder.encode_queries if queries else encoder.encode_documents
    return Tower(role, f"{role} {precision} {tower}", path.stat().st_size, embed, "cosine", release.dimension)


@dataclass(frozen=True, eq=False)
class BiEncoder:
    """Two towers of one space; `shared` says that they are one model."""

    name: str
    how: str
    query: Tower
    passage: Tower
    shared: bool

    def __post_init__(self) -> None:
        query, passage = self.query, self.passage
        if query.similarity != passage.similarity:
            raise SettingsError(
                f"{self.name}: queries are compared by {query.similarity}, passages by {passage.similarity}: "
                "both towers must be of one space"
            )
        lengths = [tower.dimension or tower.full for tower in (query, passage)]
        if lengths[0] != lengths[1]:
            raise SettingsError(
                f"{self.name}: query vectors have {lengths[0]} dimensions and passage vectors {lengths[1]}: "
                "both towers must be of one space"
            )

    def index(self, passages: Sequence[Passage], kept: Kept, progress: Progress = silent) -> DenseSearcher:
        """Embed the passages, or read back what was embedded."""
        texts = [passage.full_text for passage in passages]
        rows = kept.arrays(self.passage.identity, texts, _rows_of(self.passage), shard=_SHARD, progress=progress)
        ids = [passage.id for passage in passages]
        return DenseSearcher(self, ids, self.passage.comparable(np.concatenate(rows)), kept)


@dataclass(frozen=True, eq=False)
class DenseSearcher:
    """Every passage compared with every query. vectors: (passages, dim)."""

    system: BiEncoder
    ids: Sequence[str]
    vectors: Vectors
    kept: Kept

    @property
    def bytes(self) -> Bytes:
        """Vectors are float32."""
        passage = 0 if self.system.shared else self.system.passage.weights
        return Bytes(self.system.query.weights, passage, float(self.vectors.shape[1] * 4))

    def run(self, queries: Sequence[Query], depth: int, progress: Progress = silent) -> Run:
        """`dense_run` of all."""
        texts, tower = [query.text for query in queries], self.system.query
        rows = self.kept.arrays(tower.identity, texts, _rows_of(tower), shard=_SHARD, progress=progress)
        asked = tower.comparable(np.concatenate(rows))
        if asked.shape[1] != self.vectors.shape[1]:
            raise DataError(f"{self.system.name}: towers of {asked.shape[1]} and {self.vectors.shape[1]} dimensions")
        return dense_run(asked, [query.id for query in queries], self.vectors, self.ids, k=depth)

    def encode(self, text: str) -> Vectors:
        """(dim,)."""
        vector: Vectors = self.system.query.comparable(self.system.query.embed([text]))[0]
        return vector

    def search(self, encoded: Vectors, k: int) -> Ranking:
        """One float32 product and the best of it."""
        scores = self.vectors @ encoded
        k = min(k, len(scores))
        near = np.argpartition(scores, -k)[-k:]
        near = near[np.argsort(-scores[near], kind="stable")]
        return list(zip([self.ids[row] for row in near], scores[near].tolist(), strict=True))


def _rows_of(tower: Tower) -> Callable[[Sequence[str]], list[Vectors]]:
    """As `Kept` wants it: an array (1, dim) for each text."""

    def compute(texts: Sequence[str]) -> list[Vectors]:
        return [row[None] for row in tower.embed(texts)]

    return compute
