"""Exact search over the stored vectors, and how much of its answer an index finds.

The truth is the int8 vectors of the store, in float32: what an index can know of a passage. What int8 itself costs against
the tower's own vectors is in `quantization.py`.

Recall@k of a query is the share of its k found rows whose exact score is at least that of the k-th exact one, less 1e-6 (as in
ANN-Benchmarks; Aumueller, Bernhardsson and Faithfull 2020): of two passages with one vector either will do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillroom_client.quantization import dequantize
from stillroom_client.store import Store

_BLOCK = 20_000  # vectors at once: 31 MB in float32 at 384 dimensions
_TIES = 1e-6
_NORMAL = 1.959963984540054  # 97.5% of a standard normal lies below


@dataclass(frozen=True, eq=False)
class Exact:
    """Scores and rows of the k nearest, both (q, k), best first, and seconds of each query that was timed, (t,)."""

    scores: NDArray[np.float32]
    rows: NDArray[np.int64]
    seconds: NDArray[np.float64]


def exact_search(store: Store, queries: NDArray[np.float32], k: int, *, timed: int = 0) -> Exact:
    """Compare `queries` (q, dim) with every stored vector; ask inside a transaction of the store.

    Args:
        timed: of so many queries the time is taken, each alone, without what reading the store takes.
    """
    scores, rows = np.full((len(queries), 0), 0, np.float32), np.full((len(queries), 0), 0, np.int64)
    seconds = np.zeros(min(timed, len(queries)))
    for known, vectors in stored_blocks(store):
        for number in range(len(seconds)):
            begun = time.perf_counter()
            _nearest((queries[number] @ vectors.T)[None], k)
            seconds[number] += time.perf_counter() - begun
        near = np.asarray(queries @ vectors.T, np.float32)  # (q, block)
        best = _nearest(near, k)
        scores = np.concatenate([scores, np.take_along_axis(near, best, 1)], axis=1)
        rows = np.concatenate([rows, known[best]], axis=1)
        kept = _nearest(scores, k)
        scores, rows = np.take_along_axis(scores, kept, 1), np.take_along_axis(rows, kept, 1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return Exact(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1), seconds)


def stored_blocks(store: Store) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Rows (n,), ascending, and vectors (n, dim) of the whole store, a block at a time."""
    last = -1
    query = "SELECT row, scale, codes FROM vectors WHERE row > ? ORDER BY row LIMIT ?"
    while found := store.query(query, (last, _BLOCK)):
        codes = np.frombuffer(b"".join(row[2] for row in found), np.int8).reshape(-1, store.dimension)
        yield (
            np.array([row[0] for row in found], np.int64),
            dequantize(codes, np.array([row[1] for row in found], np.float64)),
        )
        last = found[-1][0]


def recalls(store: Store, queries: NDArray[np.float32], found: NDArray[np.int64], exact: Exact) -> NDArray[np.float64]:
    """Recall of each query, (q,): of found rows (q, k) that exist in the store, against as many exact ones."""
    known, vectors = store.vectors(np.unique(found))
    own = vectors[np.searchsorted(known, found)]  # (q, k, dim)
    scores = np.einsum("qd,qkd->qk", queries, own)
    return np.asarray((scores >= exact.scores[:, -1:] - _TIES).mean(axis=1), np.float64)


@dataclass(frozen=True, slots=True)
class Share:
    """A mean share over queries with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share_of(values: NDArray[np.float64], each: int) -> Share:
    """The mean of shares (q,), each of `each` trials, with Wilson's interval (1927) for clustered trials.

    The ten results of one query succeed and fail together, so they are worth fewer than ten trials. How many all queries are
    worth follows from the variance between queries (the effective sample size of Korn and Graubard 1998), and is at least one
    a query, also where all agree. Unlike a bootstrap it does not call 30 perfect queries certainty.

    >>> print(share_of(np.ones(30), 10)), print(share_of(np.array([1.0, 0.9] * 50), 10))
    1.000 [0.886, 1.000]
    0.950 [0.935, 0.962]
    (None, None)
    """
    queries, mean = len(values), float(values.mean())
    variance = float(values.var(ddof=1)) / queries if queries > 1 else 0.0
    trials = mean * (1 - mean) / variance if variance > 0 else queries
    trials = min(max(trials, queries), queries * each)
    weight = _NORMAL**2 / trials
    middle = (mean + weight / 2) / (1 + weight)
    half = _NORMAL / (1 + weight) * math.sqrt(mean * (1 - mean) / trials + weight / (4 * trials))
    return Share(mean, max(0.0, middle - half), min(1.0, middle + half))


def _nearest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions of the k largest of each row, in any order."""
    if scores.shape[1] <= k:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.argpartition(-scores, k - 1, axis=1)[:, :k]
