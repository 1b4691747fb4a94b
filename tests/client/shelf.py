"""A store with documents and vectors that depend on the text alone: what tests need that need no tower."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_client.adding import Added, Adding
from stillroom_client.catalog import Catalog, Embedded
from stillroom_client.reading import Parser
from stillroom_client.store import Store
from stillroom_shared.corpus import Passage

DIM = 16


class Shelf:
    """An open store in a folder; `embedded` lists every text that was embedded, in order."""

    def __init__(self, folder: Path) -> None:
        path = folder / "store.sqlite3"
        if not path.exists():
            Store.create(path, dimension=DIM)
        self.store = Store(path)
        self.catalog = Catalog(self.store)
        self.embedded: list[str] = []

    def embed(self, passages: Sequence[Passage]) -> Embedded:
        self.embedded += [passage.text for passage in passages]
        return Embedded(np.array([vector(p) for p in passages], np.float32).reshape(-1, DIM), "")

    def adding(self, parser: Parser, *paths: Path, limit: int = 1_000_000) -> Adding:
        return Adding(self.catalog, paths, embed=self.embed, owner="me", parser=parser, limit=limit)

    def add(self, parser: Parser, *paths: Path, limit: int = 1_000_000) -> Added:
        self.embedded.clear()
        return self.adding(parser, *paths, limit=limit).run()

    def texts(self) -> set[str]:
        return {found.passage.text for path in self.catalog.documents() for found in self.catalog.passages_of(path)}


def vector(passage: Passage) -> NDArray[np.float32]:
    seed = int.from_bytes(hashlib.sha256(passage.full_text.encode()).digest()[:8], "big")
    values = np.random.default_rng(seed).standard_normal(DIM)
    return np.asarray(values / np.linalg.norm(values), np.float32)
