"""The metrics by definition, for one query: slow, without any library, obviously correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2


def ndcg(ranking: Sequence[str], grades: Mapping[str, int], cutoff: int = 10) -> float:
    """Sum of grade / log2(rank + 1) over the first `cutoff` ranks, divided by the same sum of the best ranking."""
    gains = [max(0, grades.get(passage, 0)) for passage in ranking[:cutoff]]
    best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:cutoff]
    return _discounted(gains) / _discounted(best)


def recall(ranking: Sequence[str], grades: Mapping[str, int], cutoff: int = 10) -> float:
    """Share of all relevant passages that are among the first `cutoff`."""
    relevant = {passage for passage, grade in grades.items() if grade > 0}
    return len(relevant & set(ranking[:cutoff])) / len(relevant)


def reciprocal_rank(ranking: Sequence[str], grades: Mapping[str, int], cutoff: int = 10) -> float:
    """1 / rank of the first relevant passage, 0 when there is none among the first `cutoff`."""
    for rank, passage in enumerate(ranking[:cutoff], start=1):
        if grades.get(passage, 0) > 0:
            return 1 / rank
    return 0.0


def average_precision(ranking: Sequence[str], grades: Mapping[str, int], cutoff: int = 1_000) -> float:
    """Precision at the rank of each relevant passage among the first `cutoff`, summed, over the number of all relevant ones."""
    relevant = {passage for passage, grade in grades.items() if grade > 0}
    total, found = 0.0, 0
    for rank, passage in enumerate(ranking[:cutoff], start=1):
        if passage in relevant:
            found += 1
            total += found / rank
    return total / len(relevant)


def _discounted(gains: Sequence[int]) -> float:
    total = 0.0
    for rank, gain in enumerate(gains, start=1):
        total += gain / log2(rank + 1)
    return total
