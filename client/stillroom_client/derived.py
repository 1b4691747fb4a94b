"""The indexes of an open home: each is used for the generation that the store shows, and made when there is none.

Vectors. Up to `FLAT_LIMIT` passages the index is small: whoever searches first after a change builds it whole, as a writer of
the store, in less than 0.2 s. A larger one is brought forward by `refresh` alone, which keeps nobody waiting: it reads through
a connection of its own, and until it is done the file of before answers, with what came since beside it (`index.py`). So a
search never builds a large index, not even after a crash.

Words. Whoever searches first after a change brings them forward, as a writer; while documents are added, `checkpoint` sees to
it that this is never much.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_client.described import select
from stillroom_client.filters import Condition
from stillroom_client.history import History, Mark
from stillroom_client.home import INDEX_NAME, TEXT_INDEX_NAME
from stillroom_client.index import VectorIndex
from stillroom_client.index_base import Base, Fault, Rows, Vectors
from stillroom_client.index_plan import FLAT_LIMIT, SAMPLE, Effort, IndexSettings, Kind, lists_for
from stillroom_client.sealed_words import load_words, tidy_words, write_words
from stillroom_client.store import Generation, Store
from stillroom_client.text_index import TextIndex
from stillroom_shared.files import exclusive

State = Literal["current"] | Fault

Replacing = Callable[[], AbstractContextManager[Callable[[Store, Callable[[], None]], None]]]

_FILTERS = 8  # row sets that are kept: at 100,000 passages one takes up to 0.8 MB
_TAIL, _TAIL_SHARE = 1_000, 0.125  # rows that may have come, at least and as a share, before an index takes them in
_GONE_SHARE = 0.1  # of rows that went, above which it is built from nothing
_MORE_LISTS = 2.0  # times as many as it has, when it is built from nothing
_AHEAD, _AHEAD_SHARE = 10_000, 0.25  # rows that may come, at least and as a share, before a checkpoint refreshes
_SETTINGS = "index"  # key in `meta`
_NONE: Rows = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Current:
    """Indexes of one generation; None for one that was not asked for."""

    generation: Generation
    vectors: Dense | None
    words: TextIndex | None


@dataclass(frozen=True, eq=False)
class Dense:
    """A vector index, how thoroughly it is searched, and the store whose vectors it re-ranks by."""

    index: VectorIndex
    effort: Effort
    store: Store

    def search(self, queries: Vectors, k: int, rows: Rows | None = None) -> tuple[Vectors, Rows]:
        """See `VectorIndex.search`; ask inside the transaction that it belongs to."""
        return self.index.search(queries, k, rows, effort=self.effort, stored=lambda rows: self.store.vectors(rows)[1])

    def described(self) -> dict[str, int | str]:
        """What it is, for the owner to read."""
        base, effort = self.index.base, self.effort
        shown: dict[str, int | str] = {
            "kind": base.kind,
            "passages": self.index.count,
            "beside": len(self.index.tail.rows),
        }
        if base.kind == "hnsw":
            shown["ef_search"] = effort.ef_search
        if base.lists:
            shown |= {"lists": base.lists, "nprobe": effort.nprobe}
        return shown | ({"candidates": effort.candidates} if effort.candidates else {})


class Indexes:
    """The derived files in the folder of a store, sealed by its vault. Threads may share it."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._vectors_file, self._words_folder = folder / INDEX_NAME, folder / TEXT_INDEX_NAME
        self._ready = folder / f"{INDEX_NAME}.next"
        self._store, self._vault = store, store.vault
        self._history = History(store)
        self._vectors: VectorIndex | None = None
        self._looked_at: tuple[int, int, int] | None = None
        self._refused: Generation | None = None  # of the file that was looked at, when it was of another history
        self._words: TextIndex | None = None
        self._selected: OrderedDict[tuple[Generation, Condition], NDArray[np.int64]] = OrderedDict()

    @property
    def settings(self) -> IndexSettings:
        """What the owner asks of the vector index."""
        found = self._store.query("SELECT value FROM meta WHERE key = ?", (_SETTINGS,))
        return _settings_of(found[0][0] if found else "{}")

    @settings.setter
    def settings(self, asked: IndexSettings) -> None:
        with self._store.writing():
            self._store.query("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_SETTINGS, asked.model_dump_json()))

    @contextmanager
    def vectors(self) -> Iterator[Dense]:
        """The index of vectors of the generation that the store shows inside."""
        with self.current(dense=True, text=False) as current:
            assert current.vectors is not None
            yield current.vectors

    @contextmanager
    def current(self, *, dense: bool, text: bool) -> Iterator[Current]:
        """The indexes that are asked for, of the generation that the store shows inside, loaded or made when need be."""
        with self._store.reading() as generation:
            vectors = self._vectors_of(generation) if dense else None
            words = self._loaded_words(generation) if text else None
            if (vectors or not dense) and (words or not text):
                yield Current(generation, self._dense(vectors), words)
                return
        with self._store.writing() as generation:
            if dense and not (vectors := self._vectors_of(generation)):
                base = build(self._store, generation, self.settings.kind_for(self._store.count()))
                vectors = self._vectors = VectorIndex.of(base, _NONE)
                with suppress(OSError):  # a full disk must not stop the search; the next one builds again
                    base.save(self._vectors_file, self._vault)
            if text and not (words := self._loaded_words(generation)):
                with suppress(OSError):
                    write_words(self._words_folder, self._store, generation)
                words = self._loaded_words(generation) or TextIndex.in_memory(
                    generation, self._history.passages(Mark())
                )
                self._words = words
            yield Current(generation, self._dense(vectors), words)

    def refresh(self) -> None:
        """Bring both files forward now, so that no search need do it. One process at a time; searches and writers go on."""
        with self._alone(), self._store.twin() as store:
            with store.reading() as generation:
                base = self._forward(store, generation)
            if base is not None:
                self._lay(base)
                self._vectors = None  # read again by the next search, which knows what of it is gone
        with self.current(dense=True, text=True):
            pass

    def checkpoint(self) -> None:
        """Refresh if much has come since the files were made: what a crash leaves to the next search stays small."""
        with self._store.reading():
            row, count = (self._vectors.base.mark.row, self._vectors.count) if self._vectors else (0, 0)
            due = self._history.mark().row - row > max(_AHEAD, _AHEAD_SHARE * count)
        if due:
            self.refresh()

    @contextmanager
    def replacing(self) -> Iterator[Callable[[Store, Callable[[], None]], None]]:
        """For whoever replaces all vectors by those of the table `reembedded`: their index is made first, and laid ready.

        What is handed out is to be called inside `writing` of the store given, with what replaces them: it begins
        generations from which on no earlier index of vectors is used.
        """
        with self._alone():
            with self._store.twin() as store, store.reading() as generation:
                base = build(store, generation, self.settings.kind_for(store.count()), table="reembedded")

            def switch(store: Store, replace_them: Callable[[], None]) -> None:
                replace_them()
                first = store.advance(store.generation())
                store.query("INSERT OR REPLACE INTO meta VALUES ('vectors_from', ?)", (first.number,))
                store.advance(first)  # what came after the index was made is beside it, as after any other generation
                with suppress(OSError):
                    replace(base, generation=first).save(self._ready, self._vault)

            yield switch
            with suppress(OSError):  # killed before: everything is searched without an index until the next refresh
                self._ready.replace(self._vectors_file)

    def compact(self) -> None:
        """Build both files from nothing, without what was removed, and forget how the store came to be what it is.

        This is a generation of its own: until it is committed, the files of before stay, and stay valid.
        """
        with self._alone(), self._store.twin() as store:
            with store.reading() as generation:
                base = build(store, generation, self.settings.kind_for(store.count()))
            self._lay(base)
            with store.writing() as generation:
                following = store.advance(generation)
                write_words(self._words_folder, store, following, afresh=True)
                History(store).forget(base.generation, base.mark)
            tidy_words(self._words_folder, following)
            store.shrink()
        with self.current(dense=True, text=True):
            pass

    def selected(self, condition: Condition, generation: Generation) -> NDArray[np.int64]:
        """Rows of a filter, ascending; ask inside `current`. Kept, because a filter is typed once and searched with often."""
        key = (generation, condition)
        rows = self._selected.pop(key, None)
        if rows is None:
            rows = select(self._store, condition.sql, condition.values)
        self._selected[key] = rows
        while len(self._selected) > _FILTERS:
            self._selected.popitem(last=False)
        return rows

    def states(self, generation: Generation) -> tuple[State, State]:
        """Of the files as they are now: vectors, words. A "current" one is searched as it is."""
        words = load_words(self._words_folder, generation, self._vault)
        return self._state(generation), "current" if isinstance(words, TextIndex) else words

    def _state(self, generation: Generation) -> State:
        base = Base.load(self._vectors_file, self._vault)
        if not isinstance(base, Base):
            return base
        count = self._store.count()
        if not self._history.has_vectors_of(base.generation) or (
            self._is_small(count) and base.generation != generation
        ):
            return "stale"
        return "current" if self._is_small(count) or not _far(base, self._store, self.settings, count) else "stale"

    def _is_small(self, count: int) -> bool:
        return count <= FLAT_LIMIT and self.settings.kind_for(count) == "flat"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._words_folder.mkdir(mode=0o700, exist_ok=True)
        with exclusive(self._words_folder):
            yield

    def _lay(self, base: Base) -> None:
        """Put a file in place, inside `_alone`; by a name of its own, as a small one is saved under the right to write."""
        base.save(self._ready, self._vault)
        self._ready.replace(self._vectors_file)

    def _forward(self, store: Store, generation: Generation) -> Base | None:
        """What to save in place of the file; None when it will do. A small index is left to the next search."""
        count, base, history = store.count(), Base.load(self._vectors_file, self._vault), History(store)
        if self._is_small(count):
            return None
        if isinstance(base, Base) and history.has_vectors_of(base.generation):
            far = _far(base, store, self.settings, count)
            if far != "built":
                return base.extended(generation, history.mark(), history.vectors(base.mark)) if far else None
        return build(store, generation, self.settings.kind_for(count))

    def _vectors_of(self, generation: Generation) -> VectorIndex | None:
        """The index of this generation; None when it is small and must be built."""
        held = self._vectors
        if held is not None and held.generation == generation:
            return held
        # Of its base too: a compaction elsewhere forgot what went since an earlier one was built.
        if held is not None and not all(map(self._history.has_vectors_of, (held.generation, held.base.generation))):
            held = None
        if (base := self._changed_file()) is not None:
            held = VectorIndex.of(base, self._went(base))
        if self._is_small(self._store.count()):
            self._vectors = held if held is not None and held.generation == generation else None
            return self._vectors
        if held is None:
            held = VectorIndex.of(_nothing(self._store, generation), _NONE)
        if held.generation != generation or held.row < self._history.mark().row:
            held = held.advanced(generation, self._history.vectors(Mark(held.row)), self._went(held.base))
        self._vectors = held
        return held

    def _went(self, base: Base) -> Rows:
        """Rows that went since a base was built from nothing, ascending."""
        return np.sort(np.array(self._history.removed(base.mark), np.int64))

    def _changed_file(self) -> Base | None:
        """The saved index, if it is another than when last looked at, whole, and of this store.

        One of a generation that this view of the store does not see yet is looked at again when it does.
        """
        try:
            found = self._vectors_file.stat()
        except OSError:
            return None
        signature = (found.st_ino, found.st_mtime_ns, found.st_size)
        if signature == self._looked_at and not (self._refused and self._history.has_vectors_of(self._refused)):
            return None
        base = Base.load(self._vectors_file, self._vault)
        known = isinstance(base, Base) and self._history.has_vectors_of(base.generation)
        self._looked_at, self._refused = signature, base.generation if isinstance(base, Base) and not known else None
        return base if isinstance(base, Base) and known else None

    def _dense(self, index: VectorIndex | None) -> Dense | None:
        if index is None:
            return None
        return Dense(index, self.settings.effort(index.base.kind, index.base.lists), self._store)

    def _loaded_words(self, generation: Generation) -> TextIndex | None:
        if self._words is None or self._words.generation != generation:
            found = load_words(self._words_folder, generation, self._vault)
            self._words = found if isinstance(found, TextIndex) else None
        return self._words


@lru_cache(maxsize=8)
def _settings_of(text: str) -> IndexSettings:
    return IndexSettings.model_validate_json(text)


def build(store: Store, generation: Generation, kind: Kind, *, table: str = "vectors") -> Base:
    """A vector index of all vectors of a table: ask inside one of the store's transactions."""
    history = History(store, table)
    mark = history.mark()
    if table != "vectors":  # passages that came last may not be in it yet
        mark = Mark(history.last(), mark.removal)
    return Base.build(kind, generation, mark, history.count(Mark()), history.sample(SAMPLE), history.vectors(Mark()))


def _nothing(store: Store, generation: Generation) -> Base:
    """Of a store, without any of its rows: everything is in the tail."""
    sample = np.zeros((0, store.in_use().dimension), np.float32)
    return Base.build("flat", generation, Mark(0, History(store).mark().removal), 0, sample, ())


def _far(base: Base, store: Store, settings: IndexSettings, count: int) -> Literal["extended", "built"] | None:
    """What an index needs: nothing, the rows that came since, or to be built from nothing."""
    history = History(store)
    gone = len(history.removed(base.mark))
    if base.kind != settings.kind_for(count) or gone > _GONE_SHARE * count:
        return "built"
    if base.lists and lists_for(count) > _MORE_LISTS * base.lists:
        return "built"
    came = history.count(base.mark)
    return "extended" if came > max(_TAIL, _TAIL_SHARE * count) else None
