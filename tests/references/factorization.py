"""Slow, obviously correct twins of correlated noise: dense matrices and every participation pattern."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray


def toeplitz(coefficients: Sequence[int], rounds: int) -> NDArray[np.int64]:
    """The strategy matrix C, (rounds, rounds), straight from its definition."""
    matrix = np.zeros((rounds, rounds), np.int64)
    for row in range(rounds):
        for column in range(rounds):
            if 0 <= row - column < len(coefficients):
                matrix[row, column] = coefficients[row - column]
    return matrix


def binary_tree(rounds: int) -> NDArray[np.int64]:
    """The strategy of the tree mechanism (Dwork et al. 2010; Chan et al. 2011): a row for each dyadic interval."""
    rows = []
    width = 1
    while width <= rounds:
        for start in range(0, rounds, width):
            row = np.zeros(rounds, np.int64)
            row[start : start + width] = 1
            rows.append(row)
        width *= 2
    return np.array(rows)


def patterns(rounds: int, participations: int, separation: int) -> Iterator[tuple[int, ...]]:
    """Every non-empty set of rounds (from 0) that the two limits allow."""
    for count in range(1, participations + 1):
        for chosen in combinations(range(rounds), count):
            if all(later - earlier >= separation for earlier, later in pairwise(chosen)):
                yield chosen


def squared_sensitivity(strategy: NDArray[np.int64], allowed: Iterator[tuple[int, ...]]) -> int:
    """The largest squared norm of C u over patterns and updates of norm 1, where no entry of C is negative.

    |C u|^2 = sum over pairs of (C^T C)_ij <u_i, u_j>; with no negative entry all u_i alike are the worst.
    """
    assert strategy.min() >= 0
    return max(int((strategy[:, list(chosen)].sum(axis=1) ** 2).sum()) for chosen in allowed)


def widest_pattern_sensitivity(strategy: NDArray[np.int64], rounds: int, participations: int, separation: int) -> float:
    """The same over evenly spaced patterns only: a lower bound on the squared sensitivity, for many rounds."""
    starts = range(rounds - (participations - 1) * separation)
    evenly = (tuple(start + i * separation for i in range(participations)) for start in starts)
    return float(squared_sensitivity(strategy, evenly))


def prefix_errors(strategy: NDArray[np.int64], squared_sensitivity: float) -> tuple[float, float]:
    """Root mean square and maximum of the noise in prefix sums at noise multiplier 1, with the least-squares decoder."""
    rounds = strategy.shape[1]
    decoder = np.tril(np.ones((rounds, rounds))) @ np.linalg.pinv(strategy.astype(np.float64))
    variances = (decoder**2).sum(axis=1) * squared_sensitivity
    return math.sqrt(variances.mean()), math.sqrt(variances.max())
