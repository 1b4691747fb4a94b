"""Search by vector: the saved index (`index_base.py`), the passages that came since, and without those that went.

An approximate index is dear to build and cheap to keep: what came after it was saved is searched beside it, each vector of
it (`_Tail`, 16 bits a component, nothing to learn), and what went is masked. So an answer is always of one generation of the
store, whatever the age of the file. When the tail has grown long, `derived.py` brings the file forward.

What a filter costs. A narrow one is answered by looking at each of its vectors, which is exact. A wide one goes through the
graph or the lists, more thoroughly the narrower it is (FAISS' `IDSelectorBitmap` skips rows as it goes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from stillroom_client.index_base import Base, Batches, Rows, Vectors, one_thread
from stillroom_client.index_plan import Effort
from stillroom_client.store import Generation
from stillroom_shared.errors import DataError, SettingsError

Stored = Callable[[Rows], Vectors]
"""The stored vectors (n, dim) of rows (n,) that exist, ascending."""

_GRAPH_COST = 30  # looking at one vector through the graph, in vectors read one after the other (measured: 20 to 40)


@dataclass(frozen=True, eq=False)
class _Tail:
    """Rows (n,), ascending, that the base does not have, and an exact index of their positions."""

    rows: Rows
    faiss: faiss.Index

    @classmethod
    def of(cls, rows: Rows, vectors: Vectors) -> _Tail:
        index = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index.add(np.ascontiguousarray(vectors))
        return cls(rows, index)

    def extended(self, rows: Rows, vectors: Vectors) -> _Tail:
        """A longer one; this one stays, for whoever is searching it."""
        index = faiss.clone_index(self.faiss)
        index.add(np.ascontiguousarray(vectors))
        return _Tail(np.concatenate([self.rows, rows]), index)


@dataclass(frozen=True, eq=False)
class VectorIndex:
    """The vectors of one generation of a store, found by inner product. Never changed; threads share it.

    Attributes:
        row: the last one of the store that was read.
        count: rows that can be found.
        gone: rows of base or tail that are no longer in the store, ascending.
    """

    generation: Generation
    row: int
    count: int
    base: Base
    tail: _Tail
    gone: Rows

    @classmethod
    def of(cls, base: Base, went: Rows) -> VectorIndex:
        """What a base holds, without the rows that went since it was built from nothing, ascending."""
        nothing = _Tail.of(np.zeros(0, np.int64), np.zeros((0, base.faiss.d), np.float32))
        gone = went[_known(base.rows, went)]
        return cls(base.generation, base.mark.row, len(base.rows) - len(gone), base, nothing, gone)

    def advanced(self, generation: Generation, came: Batches, went: Rows) -> VectorIndex:
        """For a later generation: what came since this one's, and all that went since the base was built, ascending."""
        tail, row = self.tail, self.row
        for rows, vectors in came:
            tail, row = tail.extended(rows, vectors), int(rows[-1])
        gone = np.concatenate([went[_known(self.base.rows, went)], went[_known(tail.rows, went)]])
        count = len(self.base.rows) + len(tail.rows) - len(gone)
        return VectorIndex(generation, row, count, self.base, tail, gone)

    def search(
        self,
        queries: Vectors,
        k: int,
        rows: Rows | None = None,
        *,
        effort: Effort,
        stored: Stored,
    ) -> tuple[Vectors, Rows]:
        """Scores and store rows, both (q, min(k, count)), best first, of the rows nearest to `queries` (q, dim).

        Args:
            rows: search only these, of this generation, ascending; then at most min(k, m) are found.
            effort: how thoroughly.
            stored: of kinds that are re-ranked, where the vectors to do so are.
        """
        if k < 1:
            raise SettingsError(f"k = {k} is out of range: ask for at least 1 result")
        if queries.ndim != 2 or queries.shape[1] != self.base.faiss.d or not np.isfinite(queries).all():
            raise DataError(
                f"query vectors of shape {queries.shape} cannot be searched: give finite ones, (n, {self.base.faiss.d})"
            )
        k = min(k, self.count if rows is None else len(rows))
        if k == 0 or not len(queries):
            return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
        wanted = np.ascontiguousarray(queries, np.float32)
        with one_thread():
            near = self._in_base(wanted, k, rows, effort, stored)
            if (some := self._live_tail if rows is None else _Part.of(self.tail.rows, rows)).count:
                walk = _Walk(self.tail.faiss, faiss.SearchParameters, {})
                scores, places = walk.nearest(wanted, min(k, some.count), some)
                near = _merged(near, (scores, self.tail.rows[places]), k)
        return near

    def _in_base(self, queries: Vectors, k: int, rows: Rows | None, effort: Effort, stored: Stored) -> _Near:
        base, some = self.base, self._live if rows is None else _Part.of(self.base.rows, rows)
        k = min(k, some.count)
        depth = min(max(k, effort.candidates), some.count)
        if k == 0:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        scores, places = _Walk.of(base, effort, some).nearest(queries, depth, some)
        # Where the graph or the lists were left before so many were met, everything is looked at.
        if (short := (places < 0).any(axis=1)).any():
            scores[short], places[short] = _Walk.exhaustive(base).nearest(queries[short], depth, some)
        return _reranked(queries, base.rows[places], k, stored) if effort.candidates else (scores, base.rows[places])

    @cached_property
    def _live(self) -> _Part:
        return _Part.but(self.base.rows, self.gone)

    @cached_property
    def _live_tail(self) -> _Part:
        return _Part.but(self.tail.rows, self.gone)


_Near = tuple[Vectors, Rows]


@dataclass(frozen=True, eq=False)
class _Part:
    """Which of an index's positions may be found: how many, and one bit each; None for all."""

    count: int
    of_count: int
    bits: NDArray[np.uint8] | None

    @classmethod
    def of(cls, known: Rows, rows: Rows) -> _Part:
        """Those of these rows, ascending, that the index knows."""
        marked = np.zeros(len(known), bool)
        marked[_positions(known, rows)] = True
        return cls(int(marked.sum()), len(known), np.packbits(marked, bitorder="little"))

    @classmethod
    def but(cls, known: Rows, gone: Rows) -> _Part:
        """All but those."""
        marked = np.ones(len(known), bool)
        marked[_positions(known, gone)] = False
        count = int(marked.sum())
        return cls(count, len(known), None if count == len(known) else np.packbits(marked, bitorder="little"))

    @property
    def share(self) -> float:
        return self.count / max(self.of_count, 1)


def _known(known: Rows, rows: Rows) -> NDArray[np.bool_]:
    """Which of these rows are among the known, (n,)."""
    places = np.searchsorted(known, rows)
    return known[np.minimum(places, len(known) - 1)] == rows if len(known) else np.zeros(len(rows), bool)


def _positions(known: Rows, rows: Rows) -> Rows:
    return np.searchsorted(known, rows[_known(known, rows)])


@dataclass(frozen=True)
class _Walk:
    """How FAISS is asked: which of its indexes, which type of parameters, and their values."""

    index: faiss.Index
    parameters: type[faiss.SearchParameters]
    values: dict[str, int]

    @classmethod
    def of(cls, base: Base, effort: Effort, some: _Part) -> _Walk:
        """The narrower the part, the more thoroughly, so that as much of it is met."""
        if base.kind == "hnsw":
            # A graph is walked past what is left out: k results cost 1 / share as many steps.
            if some.bits is not None and some.count**2 < _GRAPH_COST * effort.ef_search * some.of_count:
                return cls.exhaustive(base)
            parameters = faiss.SearchParametersHNSW  # type: ignore[attr-defined]  # FAISS' types lack it
            return cls(base.faiss, parameters, {"efSearch": int(effort.ef_search / some.share)})
        if base.lists:
            probed = min(base.lists, int(effort.nprobe / some.share))
            return cls(base.faiss, faiss.SearchParametersIVF, {"nprobe": probed})
        return cls(base.faiss, faiss.SearchParameters, {})

    @classmethod
    def exhaustive(cls, base: Base) -> _Walk:
        """Every vector of the part."""
        if base.kind == "hnsw":
            storage = base.faiss.storage  # type: ignore[attr-defined]
            return cls(faiss.downcast_index(storage), faiss.SearchParameters, {})
        if base.lists:
            return cls(base.faiss, faiss.SearchParametersIVF, {"nprobe": base.lists})
        return cls(base.faiss, faiss.SearchParameters, {})

    def nearest(self, queries: Vectors, k: int, some: _Part) -> tuple[Vectors, Rows]:
        """Scores and positions, (q, k), best first; a position is -1 where the walk met nothing more."""
        values: dict[str, Any] = dict(self.values)
        if some.bits is not None:
            # FAISS' types describe its C++ side; its Python side takes an array, and keyword arguments.
            values["sel"] = faiss.IDSelectorBitmap(some.bits)  # type: ignore[call-arg,arg-type]
        scores, places = self.index.search(queries, k, params=self.parameters(**values))
        if self.index.metric_type == faiss.METRIC_L2:  # |q - x|^2 = |q|^2 + 1 - 2 qx, as stored vectors have norm 1
            scores = ((queries**2).sum(axis=1, keepdims=True) + 1 - scores) / 2
        return scores, places


def _merged(one: _Near, other: _Near, k: int) -> _Near:
    """The best k of two, for each query."""
    return _best(np.concatenate([one[0], other[0]], axis=1), np.concatenate([one[1], other[1]], axis=1), k)


def _reranked(queries: Vectors, rows: Rows, k: int, stored: Stored) -> _Near:
    """The best k of candidate rows (q, n), by their stored vectors."""
    rows = np.sort(rows, axis=1)  # each row of a query once, so that stored vectors come in their order
    return _best(np.stack([stored(own) @ query for query, own in zip(queries, rows, strict=True)]), rows, k)


def _best(scores: Vectors, rows: Rows, k: int) -> _Near:
    """The k rows (q, k) of the highest scores among (q, n), best first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
