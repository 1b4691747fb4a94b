"""Searches to compare, each as its documentation sets it up: from the text of a question to the numbers of passages.

All but ours encode the question with Sentence Transformers (torch, float32), as their documentation does; passages come with
vectors of the same model, made once. What is measured is one process, one question at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_client.device import Device
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import MissingExtraError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]
Search = Callable[[str, int], list[int]]
_BATCH = 1_000


@dataclass(frozen=True)
class Engine:
    """A search that is ready; `how` says in a line how it was set up."""

    name: str
    how: str
    search: Search


def ours(device: Device, mode: Literal["hybrid", "dense", "bm25"]) -> Engine:
    """A device that holds the passages under their numbers."""
    kind = device.index_in_use()["kind"]

    def search(text: str, k: int) -> list[int]:
        return [int(hit.passage_id) for hit in device.search(text, k, mode=mode, cached=False)]

    return Engine(f"stillroom {mode}", f"query tower int8 on one core; {kind} index" if mode != "bm25" else "", search)


def fill(device: Device, texts: Sequence[str], vectors: Vectors, *, first: int = 0) -> None:
    """Add passages with their vectors to a device, as `index add` does: batch by batch, with checkpoints."""
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        passages = [Passage(str(first + start + n), "bench", text, "") for n, text in enumerate(part)]
        device.add(passages, vectors[start : start + _BATCH])
        device.checkpoint()


def faiss_flat(model: SentenceTransformer, vectors: Vectors) -> Engine:
    """Sentence Transformers with an exact FAISS index."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)

    def search(text: str, k: int) -> list[int]:
        found: list[int] = index.search(_encoded(model, text)[None], k)[1][0].tolist()
        return found

    return Engine("sentence-transformers + FAISS flat", "torch float32, IndexFlatIP", search)


def usearch(model: SentenceTransformer, vectors: Vectors) -> Engine:
    """usearch with its defaults: HNSW of connectivity 16, bfloat16."""
    try:
        from usearch.index import Index
    except ModuleNotFoundError:
        raise MissingExtraError("bench search", "compare", "usearch") from None
    index = Index(ndim=vectors.shape[1])
    index.add(np.arange(len(vectors)), vectors)

    def search(text: str, k: int) -> list[int]:
        found: list[int] = index.search(_encoded(model, text), k).keys.tolist()
        return found

    return Engine("usearch", "its defaults: HNSW, connectivity 16, bfloat16", search)


def sqlite_vec(model: SentenceTransformer, vectors: Vectors, file: Path) -> Engine:
    """SQLite with sqlite-vec: a vec0 table, exact."""
    try:
        import apsw
        import sqlite_vec as extension
    except ModuleNotFoundError:
        raise MissingExtraError("bench search", "compare", "sqlite-vec") from None
    file.unlink(missing_ok=True)
    db = apsw.Connection(str(file))
    db.enable_load_extension(True)
    db.load_extension(extension.loadable_path())
    db.execute(f"CREATE VIRTUAL TABLE items USING vec0(embedding float[{vectors.shape[1]}])")
    with db:
        db.executemany(
            "INSERT INTO items (rowid, embedding) VALUES (?, ?)", ((n, v.tobytes()) for n, v in enumerate(vectors))
        )

    def search(text: str, k: int) -> list[int]:
        query = "SELECT rowid FROM items WHERE embedding MATCH ? AND k = ? ORDER BY distance"
        return [int(row[0]) for row in db.execute(query, (_encoded(model, text).tobytes(), k))]

    return Engine("sqlite-vec", "vec0 table on disk, float32, exact", search)


def txtai(model: SentenceTransformer, texts: Sequence[str], vectors: Vectors, *, hybrid: bool) -> Engine:
    """txtai with its defaults, dense or hybrid; vectors through its `transform`."""
    try:
        from txtai import Embeddings
    except ModuleNotFoundError:
        raise MissingExtraError("bench search", "compare", "txtai") from None
    known = {text: n for n, text in enumerate(texts)}

    def transform(asked: Sequence[str]) -> Vectors:
        return np.stack([vectors[known[text]] if text in known else _encoded(model, text) for text in asked])

    index: Any = Embeddings(method="external", transform=transform, hybrid=hybrid)
    index.index((n, text, None) for n, text in enumerate(texts))
    components = json.dumps(index.config["build"]["settings"].get("components", "")).strip('"')

    def search(text: str, k: int) -> list[int]:
        return [int(number) for number, _ in index.search(text, k)]

    return Engine("txtai hybrid" if hybrid else "txtai", f"its defaults: FAISS {components}", search)


def _encoded(model: SentenceTransformer, text: str) -> Vectors:
    found: Vectors = model.encode(text, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)
    return found
