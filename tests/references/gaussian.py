"""Slow, obviously correct twins of the privacy core."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def discrete_gaussian_pmf(sigma: float, reach: int) -> NDArray[np.float64]:
    """Probabilities of -reach..reach, straight from the definition."""
    weights = np.exp(-(np.arange(-reach, reach + 1, dtype=np.float64) ** 2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum(), np.float64)


def rounded_gaussian_pmf(sigma: float, reach: int) -> NDArray[np.float64]:
    """Probabilities of -reach..reach after rounding N(0, sigma^2)."""
    edges = (np.arange(-reach, reach + 2) - 0.5) / (sigma * math.sqrt(2))
    cumulative = np.array([0.5 * math.erfc(-edge) for edge in edges])
    return np.diff(cumulative)


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """Exact delta of one Gaussian release without sampling (Balle and Wang 2018, theorem 8)."""

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    mu = 1 / noise_multiplier
    return cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)


def exact_norm_at_most(steps: NDArray[np.integer], bound: int) -> bool:
    """Whether the L2 norm is at most `bound`, in rational arithmetic."""
    return sum(Fraction(int(x)) ** 2 for x in steps) <= Fraction(bound) ** 2
