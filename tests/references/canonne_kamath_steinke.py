"""The exact discrete Gaussian one sample at a time, in integers only: the slow twin of `stillroom_shared.noise`.

Algorithms 1 to 3 of Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy" (arXiv 2004.00010).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.randomness import Randomness


def discrete_gaussian(sigma: int, count: int, randomness: Randomness) -> NDArray[np.int64]:
    """Independent samples of N_Z(0, sigma^2), (count,) int64."""
    return np.array([_one(sigma, randomness) for _ in range(count)], np.int64)


def _one(sigma: int, randomness: Randomness) -> int:
    variance, scale = sigma * sigma, sigma + 1
    while True:
        candidate = _discrete_laplace(scale, randomness)
        numerator = (abs(candidate) * scale - variance) ** 2
        if _bernoulli_exp(numerator, 2 * variance * scale * scale, randomness):
            return candidate


def _discrete_laplace(scale: int, randomness: Randomness) -> int:
    """Probability of k proportional to exp(-|k| / scale)."""
    while True:
        low = randomness.below(scale)
        if not _bernoulli_exp(low, scale, randomness):
            continue
        high = 0
        while _bernoulli_exp(1, 1, randomness):
            high += 1
        magnitude = low + scale * high
        negative = randomness.bits(1)
        if magnitude or not negative:  # zero would otherwise be drawn twice as often
            return -magnitude if negative else magnitude


def _bernoulli_exp(numerator: int, denominator: int, randomness: Randomness) -> bool:
    """True with probability exp(-numerator / denominator), for a non-negative fraction."""
    whole, rest = divmod(numerator, denominator)
    if not all(_bernoulli_exp_unit(1, 1, randomness) for _ in range(whole)):
        return False
    return _bernoulli_exp_unit(rest, denominator, randomness)


def _bernoulli_exp_unit(numerator: int, denominator: int, randomness: Randomness) -> bool:
    """The same for a fraction of at most one: the parity of the first failure in a run of shrinking coins."""
    trial = 1
    while randomness.bernoulli(numerator, denominator * trial):
        trial += 1
    return trial % 2 == 1
