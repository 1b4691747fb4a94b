"""The paired randomisation test and Holm's correction by definition: every outcome of every coin, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product


def randomisation(sets: Sequence[Sequence[float]]) -> float:
    """The share of all sign changes whose mean over sets of mean differences is at least as far from 0."""

    def statistic(signs: Sequence[int]) -> float:
        total, place = 0.0, 0
        for own in sets:
            total += sum(s * d for s, d in zip(signs[place : place + len(own)], own, strict=True)) / len(own)
            place += len(own)
        return abs(total / len(sets))

    queries = sum(len(own) for own in sets)
    observed = statistic([1] * queries)
    outcomes = [statistic(signs) >= observed - 1e-9 for signs in product((1, -1), repeat=queries)]
    return sum(outcomes) / len(outcomes)


def holm(values: Sequence[float]) -> list[float]:
    """For each p-value, the smallest level at which the step-down procedure rejects its hypothesis."""
    ordered = sorted(values)

    def needed(place: int) -> float:
        return min(1.0, (len(ordered) - place) * ordered[place])

    return [max(needed(place) for place in range(ordered.index(value) + 1)) for value in values]
