"""A bi-encoder's vectors, each computed once: kept by content, and laid out as the texts of lessons are.

The key of a vector is a hash of text and role, and a store of its own for each embedder's identity (`store.py` says what is
guaranteed: bounded memory, nothing torn, several processes at once). Missing texts are computed in shards of `SHARD`, sorted by
length within windows of `WINDOW`, so that texts of a batch are of like length: an interrupted run loses at most one shard.

Stored as float16: half the bytes. Measured on all-MiniLM-L6-v2, 384 dimensions, 300 SciFact passages and 30 queries: the
cosine to the float32 vector is 1 - 1.2e-7, and a score moves by at most 6e-5; bfloat16 arithmetic moves it by 1.5e-3.
float32 keeps every bit.

| case | what happens |
|---|---|
| a text asked for as a query and as a passage | two vectors |
| the same text twice | computed once |
| a vector that is not finite, or beyond float16 | `DataError`; nothing of that shard is kept |
| a row of lessons that was not asked for | NaN, which no text that was embedded has |
| `out` exists | replaced, whole, when the new one is done |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_server.distillery.arrays import new_array, open_array
from stillroom_server.distillery.lessons import ROLES, Lessons, batches
from stillroom_server.distillery.store import ContentStore, as_keys, distinct, text_digest
from stillroom_server.distillery.teachers.base import Embedder, FloatArray, Role
from stillroom_shared.errors import DataError

SHARD = 1_024
WINDOW = 16 * SHARD
Storage = Literal["float16", "float32"]


class VectorCache:
    """Vectors of any embedders in one folder.

    Attributes:
        folder: where they lie, in `vectors/EMBEDDER-STORAGE/`; a `ScoreCache` of the same folder shares them.
        storage: the type of stored numbers.
    """

    def __init__(self, folder: Path, storage: Storage = "float16") -> None:
        self.folder = folder
        self.storage: Storage = storage
        self._stores: dict[str, ContentStore] = {}

    def store(self, embedder: Embedder) -> ContentStore:
        """Where this embedder's vectors lie."""
        identity = embedder.identity
        if identity not in self._stores:
            place = self.folder / "vectors" / f"{identity[:32]}-{self.storage}"
            self._stores[identity] = ContentStore(place, width=embedder.dimension, dtype=self.storage, label=identity)
        return self._stores[identity]

    def embed(
        self,
        embedder: Embedder,
        texts: Sequence[str],
        role: Role,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> FloatArray:
        """What `embedder.embed` gives, rounded as stored: (n, dimension) float32 in the order of `texts`."""
        found = np.empty((len(texts), embedder.dimension), np.float32)
        for start in range(0, len(texts), WINDOW):
            window = texts[start : start + WINDOW]
            found[start : start + WINDOW] = self.window(
                embedder,
                window,
                role,
                lambda done, start=start: progress(start + done, len(texts)),  # type: ignore[misc]
            )
        return found

    def window(
        self, embedder: Embedder, texts: Sequence[str], role: Role, done: Callable[[int], None] = lambda done: None
    ) -> NDArray[Any]:
        """As many texts as may be held at once, as stored; `done` is told how many are there."""
        store = self.store(embedder)
        keys = as_keys(
            [hashlib.blake2b(text_digest(text), digest_size=16, person=role.encode()).digest() for text in texts]
        )
        missing = np.flatnonzero(~store.get(keys)[0])
        missing = missing[distinct(keys[missing])]
        missing = missing[np.argsort([-len(texts[row]) for row in missing.tolist()], kind="stable")]
        done(len(texts) - len(missing))
        for start in range(0, len(missing), SHARD):
            shard = missing[start : start + SHARD]
            with np.errstate(over="ignore"):
                vectors = embedder.embed([texts[row] for row in shard.tolist()], role).astype(self.storage)
            if not np.isfinite(vectors).all():
                wrong = texts[int(shard[~np.isfinite(vectors).all(1)][0])]
                raise DataError(
                    f"the vector of {role} {wrong[:60]!r} is not finite as {self.storage}: embed in float32, or mend the model"
                )
            store.put(keys[shard], vectors)
            done(len(texts) - len(missing) + start + len(shard))
        return store.all(keys)


def embed_lessons(
    embedder: Embedder,
    lessons: Lessons,
    cache: VectorCache,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[Any]:
    """The vector of every text in its own role, (texts, dimension), memory-mapped from the `.npy` file `out`.

    In the order of `lessons` and of the type that the cache stores. Memory: the texts and vectors of one window.

    Args:
        rows: of the texts that are embedded, ascending; none: all. The others are NaN.
    """
    wanted = np.arange(len(lessons)) if rows is None else rows
    finished = 0
    with new_array(out, (len(lessons), embedder.dimension), cache.storage) as array:
        if len(wanted) < len(lessons):
            for start in range(0, len(lessons), WINDOW):
                array[start : start + WINDOW] = np.nan
        for number, role in enumerate(ROLES):
            for part in batches(wanted[lessons.roles[wanted] == number], WINDOW):
                array[part] = cache.window(
                    embedder,
                    lessons.texts(part),
                    role,
                    lambda done, before=finished: progress(before + done, len(wanted)),  # type: ignore[misc]
                )
                finished += len(part)
    return open_array(out)
