"""The indexes of an open home: each is used for the generation that it was built from, and made when there is none.

Whoever searches first after a change makes them, as a writer of the store: others wait for it, and nothing changes meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_client.filters import Condition
from stillroom_client.home import INDEX_NAME, TEXT_INDEX_NAME
from stillroom_client.index import Fault, VectorIndex
from stillroom_client.store import Generation, Store
from stillroom_client.text_index import TextIndex, write_index

State = Literal["current"] | Fault

_FILTERS = 8  # row sets that are kept: at 100,000 passages one takes up to 0.8 MB


@dataclass(frozen=True, eq=False)
class Current:
    """Indexes of one generation; None for one that was not asked for."""

    generation: Generation
    vectors: VectorIndex | None
    words: TextIndex | None


class Indexes:
    """The derived files of a home. Threads may share it."""

    def __init__(self, home: Path, store: Store) -> None:
        self._vectors_file, self._words_folder = home / INDEX_NAME, home / TEXT_INDEX_NAME
        self._store = store
        self._vectors: VectorIndex | None = None
        self._words: TextIndex | None = None
        self._selected: OrderedDict[tuple[Generation, Condition], NDArray[np.int64]] = OrderedDict()

    @contextmanager
    def vectors(self) -> Iterator[VectorIndex]:
        """The index of vectors of the generation that the store shows inside."""
        with self.current(dense=True, text=False) as current:
            assert current.vectors is not None
            yield current.vectors

    @contextmanager
    def current(self, *, dense: bool, text: bool) -> Iterator[Current]:
        """The indexes that are asked for, of the generation that the store shows inside, loaded or made when need be."""
        with self._store.reading() as generation:
            vectors = self._loaded_vectors(generation) if dense else None
            words = self._loaded_words(generation) if text else None
            if (vectors or not dense) and (words or not text):
                yield Current(generation, vectors, words)
                return
        with self._store.writing() as generation:
            if dense and not (vectors := self._loaded_vectors(generation)):
                vectors = self._vectors = VectorIndex.build(*self._store.vectors(), generation)
                with suppress(OSError):  # a full disk must not stop the search; the next one builds again
                    vectors.save(self._vectors_file)
            if text and not (words := self._loaded_words(generation)):
                with suppress(OSError):
                    write_index(self._words_folder, self._store, generation)
                words = self._loaded_words(generation) or TextIndex.in_memory(self._store, generation)
                self._words = words
            yield Current(generation, vectors, words)

    def selected(self, condition: Condition, generation: Generation) -> NDArray[np.int64]:
        """Rows of a filter, ascending; ask inside `current`. Kept, because a filter is typed once and searched with often."""
        key = (generation, condition)
        rows = self._selected.pop(key, None)
        if rows is None:
            rows = self._store.select(condition.sql, condition.values)
        self._selected[key] = rows
        while len(self._selected) > _FILTERS:
            self._selected.popitem(last=False)
        return rows

    def states(self, generation: Generation) -> tuple[State, State]:
        """Of the files as they are now: vectors, words."""
        vectors = VectorIndex.load(self._vectors_file, generation)
        words = TextIndex.load(self._words_folder, generation)
        return (
            "current" if isinstance(vectors, VectorIndex) else vectors,
            "current" if isinstance(words, TextIndex) else words,
        )

    def _loaded_vectors(self, generation: Generation) -> VectorIndex | None:
        if self._vectors is None or self._vectors.generation != generation:
            found = VectorIndex.load(self._vectors_file, generation)
            self._vectors = found if isinstance(found, VectorIndex) else None
        return self._vectors

    def _loaded_words(self, generation: Generation) -> TextIndex | None:
        if self._words is None or self._words.generation != generation:
            found = TextIndex.load(self._words_folder, generation)
            self._words = found if isinstance(found, TextIndex) else None
        return self._words
