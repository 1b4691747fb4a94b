"""What is evaluated: a system, which indexes passages, and the searcher that this gives.

A searcher answers twice. `run` ranks many queries exactly and reproducibly: it is what quality is measured on. `encode` and
`search` answer one query as somebody who waits would have it answered: they are what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.corpus import Passage, Query
from stillroom_simulations.evaluate import Run
from stillroom_simulations.evaluating.kept import Kept

Progress = Callable[[int, int], None]
Ranking = list[tuple[str, float]]
"""Ids of passages with their scores, best first."""


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """What a system weighs.

    Attributes:
        query_model: weights that answering a query needs, as their file holds them; without tokenizers.
        passage_model: weights that embedding passages needs; 0 where nothing is embedded or it is the same model.
        each_passage: of the index, for one passage.
    """

    query_model: int
    passage_model: int
    each_passage: float


class Searcher(Protocol):
    """A system that holds passages."""

    @property
    def bytes(self) -> Bytes:
        """What it weighs with these passages."""

    def run(self, queries: Sequence[Query], depth: int, progress: Progress) -> Run:
        """Scores of the best passages of each query: `depth` of them, or as many as it finds."""

    def encode(self, text: str) -> Any:
        """What `search` needs of one query."""

    def search(self, encoded: Any, k: int) -> Ranking:
        """The ids of the k best passages with their scores, best first."""


class System(Protocol):
    """A search before it has passages."""

    @property
    def name(self) -> str:
        """A short name, for tables."""

    @property
    def how(self) -> str:
        """How it was set up, in a line."""

    def index(self, passages: Sequence[Passage], kept: Kept, progress: Progress) -> Searcher:
        """Hold these passages; `kept` has what an earlier run computed."""


def best(scores: NDArray[np.floating], ids: Sequence[str], k: int) -> Ranking:
    """The k largest of (m,) scores with their ids, best first; ties go to the smaller id.

    >>> best(np.array([0.5, 0.9, 0.5]), ["b", "c", "a"], 2)
    [('c', 0.9), ('a', 0.5)]
    """
    k = min(k, len(scores))
    floor = np.partition(scores, -k)[-k] if k else 0.0
    near = np.flatnonzero(scores >= floor)
    ranked = sorted((-score, ids[row]) for row, score in zip(near.tolist(), scores[near].tolist(), strict=True))
    return [(passage, -negated) for negated, passage in ranked[:k]]


def as_run(ranking: Sequence[str]) -> dict[str, float]:
    """A ranking as scores that keep its order: m, m - 1, ..., 1."""
    return {passage: float(len(ranking) - place) for place, passage in enumerate(ranking)}


def without_identical_ids(run: Run) -> Run:
    """A run without the passages whose id is that of their query.

    >>> without_identical_ids({"a": {"a": 0.9, "b": 0.5}, "c": {"a": 0.1}})
    {'a': {'b': 0.5}, 'c': {'a': 0.1}}
    """
    return {query: {passage: s for passage, s in found.items() if passage != query} for query, found in run.items()}
