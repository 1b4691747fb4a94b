"""Slow, obviously correct twins of the one-run audit."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np


def tail(guesses: int, odds: int, at_least: int) -> Fraction:
    """P[Binomial(guesses, odds / (1 + odds)) >= at_least], in rational arithmetic."""
    ways = sum(math.comb(guesses, right) * odds**right for right in range(max(0, at_least), guesses + 1))
    return Fraction(ways, (1 + odds) ** guesses)


def p_value(*, canaries: int, guesses: int, correct: int, odds: int, delta: Fraction) -> Fraction:
    """The theorem of arXiv 2305.08846 word for word, for epsilon = log(odds), over every i."""
    known = tail(guesses, odds, correct)
    steepest = max((tail(guesses, odds, correct - i) - known) / i for i in range(1, canaries + 1))
    return min(Fraction(1), known + 2 * canaries * delta * steepest)


def revealing(*, canaries: int, guesses: int, correct: int, odds: int, delta: Fraction, revealed: int) -> Fraction:
    """P[at least `correct` right guesses] for a mechanism that is (log odds, delta)-DP and as leaky as that allows.

    Randomized response on each coin; but with probability delta * canaries / revealed, the coins of a random set of
    `revealed` canaries are published. Changing one coin matters to the second part with probability delta.
    """
    chance = delta * canaries / revealed
    assert chance <= 1 and revealed <= guesses
    return (1 - chance) * tail(guesses, odds, correct) + chance * tail(guesses - revealed, odds, correct - revealed)


def gaussian_divergence(mean: float, deviation: float, epsilon: float) -> float:
    """Integral of (p - e^epsilon q)^+ for p = N(mean, deviation^2), q = N(0, 1), on a fine grid."""
    reach = 12 * max(1.0, deviation) + abs(mean)
    x, step = np.linspace(-reach, reach, 2_000_001, retstep=True)
    p = np.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
    q = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * step)


def cohort_size_p_value(sizes: list[int], *, devices: int, rate: Fraction) -> Fraction:
    """Two-sided p-value of the sum of squared distances from the rounded mean, over every possible list of sizes."""
    centre = round(devices * rate)
    observed = sum((size - centre) ** 2 for size in sizes)
    at_most = at_least = Fraction(0)
    for other in itertools.product(range(devices + 1), repeat=len(sizes)):
        chance = Fraction(1)
        for size in other:
            chance *= math.comb(devices, size) * rate**size * (1 - rate) ** (devices - size)
        distance = sum((size - centre) ** 2 for size in other)
        at_most += chance * (distance <= observed)
        at_least += chance * (distance >= observed)
    return min(Fraction(1), 2 * min(at_most, at_least))
