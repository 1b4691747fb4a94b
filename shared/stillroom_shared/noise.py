"""Exact discrete Gaussian noise on the integers, and what its exactness is worth.

Sampler: Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy" (arXiv 2004.00010), algorithms 1 to
3, in integer arithmetic only: no floating-point number is rounded anywhere, so the attack of Mironov (CCS 2012) on the
low bits of floating-point noise has nothing to read.

Why the Gaussian's privacy loss distribution may stand for it (`rounding_distance`): a continuous Gaussian added to an
integer vector and rounded to the nearest integers is post-processing of the Gaussian mechanism, because rounding commutes
with integer shifts. The exact discrete Gaussian differs from that rounded Gaussian by a total variation distance of at
most 1 / (23 sigma^2) a coordinate, which accounting adds to delta.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.randomness import Randomness


def discrete_gaussian(sigma: int, count: int, randomness: Randomness) -> NDArray[np.int64]:
    """Independent samples of N_Z(0, sigma^2), (count,) int64, exact up to the randomness.

    Probability of k is proportional to exp(-k^2 / (2 sigma^2)). `sigma` is a positive integer number of grid steps.
    """
    return np.array([_one(sigma, randomness) for _ in range(count)], np.int64)


def rounding_distance(sigma: int, count: int) -> float:
    """Upper bound on the total variation distance between `count` draws and as many rounded N(0, sigma^2).

    Let p be the discrete Gaussian, f the N(0, sigma^2) density and q(k) = integral of f over [k - 1/2, k + 1/2].
    Poisson summation gives sum_k f(k) = 1 + 2 sum_j exp(-2 pi^2 sigma^2 j^2) >= 1, so p(k) <= f(k). Pairing k + u with
    k - u, q(k) = f(k) * integral over |u| <= 1/2 of exp(-u^2 / (2 sigma^2)) cosh(k u / sigma^2) >= f(k) (1 - 1 / (24 sigma^2)).
    Hence TV = sum (p - q)^+ <= sum f(k) / (24 sigma^2) <= 1 / (23 sigma^2) for sigma >= 1, and TV adds over coordinates.
    """
    return min(1.0, count / (23.0 * float(sigma) ** 2))


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
