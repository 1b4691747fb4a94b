"""A teacher without weights: a vector counts the words of a text by a hash. Equal words, near vectors; the same everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stillroom_server.distillery.teachers.base import FloatArray, Role


@dataclass
class HashedWords:
    """An `Embedder`.

    Attributes:
        texts: how many texts were embedded so far, to see what was done again.
    """

    dimension: int = 256
    identity: str = "hashed words"
    texts: int = field(default=0)

    def embed(self, texts: Sequence[str], role: Role) -> FloatArray:
        """Unit vectors, (n, dimension)."""
        self.texts += len(texts)
        vectors = np.full((len(texts), self.dimension), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().replace("?", " ").replace(".", " ").split():
                vectors[row, int(hashlib.md5(word.encode()).hexdigest(), 16) % self.dimension] += 1
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
        """Inner products."""
        pairs = zip(queries, passages, strict=True)
        return [self.embed(several, "passage") @ self.embed([query], "query")[0] for query, several in pairs]


@dataclass
class SharedWords:
    """A `Teacher` without vectors: the share of the query's words that a passage has, minus 0.5 (so it may be negative)."""

    identity: str = "shared words"
    calls: int = field(default=0)

    def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
        """Shares in -0.5 to 0.5."""
        self.calls += 1
        found = []
        for query, several in zip(queries, passages, strict=True):
            words = set(query.lower().split())
            shares = [len(words & set(text.lower().replace(".", " ").split())) / len(words) for text in several]
            found.append(np.array(shares, np.float32) - np.float32(0.5))
        return found
