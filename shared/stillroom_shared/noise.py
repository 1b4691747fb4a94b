"""Exact discrete Gaussian noise on the integers, and what its exactness is worth.

Sampler: rejection with exact coins. A trial takes three random words and proposes an integer k as follows.
    - `high`: how many fair coins show zero before the first one, so h with probability 2^-(h + 1);
    - `low`: uniform in [0, s), where s = 2^width > 1.2 sigma; m = high s + low;
    - a fair sign: k = m or -m, and a negative zero is no candidate.
k is accepted when a coin of probability 2^high exp(-m^2 / (2 sigma^2)) shows heads (`stillroom_shared.gaussian_coins`).

Theorem. An accepted k has probability proportional to exp(-k^2 / (2 sigma^2)), over all integers.
Proof. The coin's probability is at most 1: m >= high s, so m^2 / (2 sigma^2) >= 0.72 high^2 >= high log 2. A trial therefore
yields k, zero included, with probability 1/2 * 2^-(high + 1) * 1/s * 2^high exp(-k^2 / (2 sigma^2)), which is
exp(-k^2 / (2 sigma^2)) / (4 s): the power of two is gone, and what is left depends on k by the exponential alone. Trials
are independent, and the accepted ones are taken in their order. QED. 26% to 52% of the trials are accepted.

Nothing is rounded on the way: proposals are integers, their probabilities powers of two, and the coins are exact although
floats decide most of them. So the attack of Mironov (CCS 2012) on the low bits of floating-point noise has nothing to
read; the only assumption is that the random bits are independent and fair. The sampler of Canonne, Kamath and Steinke
(arXiv 2004.00010) has the same distribution; it is the slow twin in `tests/references`.

Time: how many trials are rejected does not depend on the accepted values, and no other branch is taken for a single value,
but for one coin in two billion. Nothing is claimed about caches, or about single instructions taking constant time.

Why the Gaussian's privacy loss distribution may stand for it (`rounding_distance`): a continuous Gaussian added to an
integer vector and rounded to the nearest integers is post-processing of the Gaussian mechanism, because rounding commutes
with integer shifts. The exact discrete Gaussian differs from that rounded Gaussian by a total variation distance of at
most 1 / (23 sigma^2) a coordinate, which accounting adds to delta.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.gaussian_coins import gaussian_coins
from stillroom_shared.randomness import Randomness

LARGEST_SIGMA = 1 << 58
"""Noise passes 2^63, 32 standard deviations, with a probability below 2^-730."""

_MOST_TRIALS = 1 << 14  # at a time: their words fit a processor's cache


def discrete_gaussian(sigma: int, count: int, randomness: Randomness) -> NDArray[np.int64]:
    """Independent samples of N_Z(0, sigma^2), (count,) int64, exact up to the randomness.

    Probability of k is proportional to exp(-k^2 / (2 sigma^2)). `sigma` is an integer number of grid steps from 1 to
    2^58, else `ValueError`; a sample beyond 64 bits raises `OverflowError`.

    >>> discrete_gaussian(3, 8, Randomness(seed="toy")).tolist()
    [0, 3, 0, -7, 0, 8, -6, -2]
    """
    if not 1 <= sigma <= LARGEST_SIGMA:
        raise ValueError(f"sigma {sigma}: choose an integer from 1 to 2^58")
    samples, filled = np.empty(count, np.int64), 0
    while filled < count:
        missing = count - filled
        width = (6 * sigma // 5).bit_length()
        expected = -(
            -missing * 5 * (1 << width) // (3 * sigma)
        )  # trials, with 4% to spare; in integers: part of the stream
        accepted = _trials(sigma, width, min(expected + 32, _MOST_TRIALS), randomness)[:missing]
        samples[filled : filled + len(accepted)] = accepted
        filled += len(accepted)
    return samples


def rounding_distance(sigma: int, count: int) -> float:
    """Upper bound on the total variation distance between `count` draws and as many rounded N(0, sigma^2).

    Let p be the discrete Gaussian, f the N(0, sigma^2) density and q(k) = integral of f over [k - 1/2, k + 1/2].
    Poisson summation gives sum_k f(k) = 1 + 2 sum_j exp(-2 pi^2 sigma^2 j^2) >= 1, so p(k) <= f(k). Pairing k + u with
    k - u, q(k) = f(k) * integral over |u| <= 1/2 of exp(-u^2 / (2 sigma^2)) cosh(k u / sigma^2) >= f(k) (1 - 1 / (24 sigma^2)).
    Hence TV = sum (p - q)^+ <= sum f(k) / (24 sigma^2) <= 1 / (23 sigma^2) for sigma >= 1, and TV adds over coordinates.
    """
    return min(1.0, count / (23.0 * float(sigma) ** 2))


def _trials(sigma: int, width: int, trials: int, randomness: Randomness) -> NDArray[np.int64]:
    """The accepted values of `trials` trials, in their order, (at most trials,)."""
    low, coins, uniform = randomness.words(3 * trials).reshape(3, trials)
    low = low >> np.uint64(64 - width)
    high = _zeros_before_the_first_one(coins, randomness)
    negative = coins >> np.uint64(63) == 1
    candidate = ~(negative & (high == 0) & (low == 0))  # zero would otherwise be drawn twice as often
    keep = candidate & gaussian_coins(uniform, high, low, width, sigma, randomness)
    if np.any(high[keep] >> (63 - width)):
        raise OverflowError(f"a sample at sigma {sigma} passes 64 bits")
    magnitude = (high[keep] << width) + low[keep].astype(np.int64)
    return np.asarray(np.where(negative[keep], -magnitude, magnitude), np.int64)


def _zeros_before_the_first_one(coins: NDArray[np.uint64], randomness: Randomness) -> NDArray[np.int64]:
    """Zeros below the lowest one of each word's 63 low bits; where all are zero, the count goes on with further bits."""
    top = np.uint64(1 << 63)
    ended = coins | top
    zeros = np.bitwise_count(~ended & (ended - np.uint64(1))).astype(np.int64)
    for i in np.flatnonzero(zeros == 63):
        while not randomness.bits(1):
            zeros[i] += 1
    return zeros
