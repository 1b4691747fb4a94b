"""Coins that show heads with probability 2^h exp(-m^2 / (2 sigma^2)) exactly: floats decide almost all, integers the rest.

A coin compares a uniform U in [0, 1) with that probability p. U is never rounded: it is a stream of random bits of which 64
are drawn at first. A float p' with |p' - p| < MARGIN / 2 tells on which side of p the 64-bit prefix of U lies whenever the
two differ by more than MARGIN. Else `_decide` brackets p between integers and compares them with the same 64 bits, and with
further bits of the same U as long as prefix and bracket still touch. So every coin shows what infinite precision would:
the floats save time and move no probability, and whatever MARGIN, NumPy and processor, a seeded stream has the same coins.

Why |p' - p| < MARGIN / 2 = 2^-33. Let d = 2^-53 be the relative error of a float operation and x = m^2 / (2 sigma^2).
    - low, sigma, their sum with high 2^width (exact) and the quotient: r' = r (1 + 4d), to first order; squared and
      rounded, x' = x (1 + 9d). Callers have x >= h^2 log 2. So 2^h x exp(-x) <= 1 (h <= 1: at most 2 / e; h >= 2: 2^h is at
      most exp(x / 2), and x exp(-x / 2) <= 2 / e), and p moves by less than 10d < 2^-49.
    - `np.exp` may be wrong by any relative error up to 2^-34: half a million units in the last place, where NumPy and the
      C libraries document at most 4. A test measures it. Underflow and the power of two move p by less than 2^-900.
    - The prefix of U and its difference from p' are off by less than 2^-52.
Sources: lazily drawn uniforms are von Neumann's (1951), for exact Gaussians see Karney (arXiv 1303.6257).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.randomness import Randomness

MARGIN = 2.0**-32
"""Prefixes that are nearer to p' than this are compared in integers: one coin in two billion."""


def gaussian_coins(
    words: NDArray[np.uint64],
    high: NDArray[np.int64],
    low: NDArray[np.uint64],
    width: int,
    sigma: int,
    randomness: Randomness,
) -> NDArray[np.bool_]:
    """Whether U < 2^high exp(-m^2 / (2 sigma^2)) with m = high 2^width + low; each argument and the answer (coins,).

    `words` are the first 64 bits of each U; `randomness` gives further ones. Requires low < 2^width and
    2^(2 width) >= 2 log(2) sigma^2, so that no probability passes 1.
    """
    probability = float_probabilities(high, low, width, sigma)
    prefix = (words >> np.uint64(11)) * 2.0**-53  # of U, rounded down
    heads: NDArray[np.bool_] = prefix < probability
    for i in np.flatnonzero(np.abs(prefix - probability) <= MARGIN):
        magnitude = (int(high[i]) << width) + int(low[i])
        heads[i] = _decide(int(words[i]), int(high[i]), magnitude, sigma, randomness)
    return heads


def float_probabilities(
    high: NDArray[np.int64], low: NDArray[np.uint64], width: int, sigma: int
) -> NDArray[np.float64]:
    """The coins' probabilities to within MARGIN / 2, (coins,): p' of the module's docstring."""
    ratio = (high * float(1 << width) + low.astype(np.float64)) / float(sigma)
    with np.errstate(under="ignore"):
        return np.ldexp(np.exp(-0.5 * ratio * ratio), high)


def exponential_bounds(numerator: int, denominator: int, bits: int) -> tuple[int, int]:
    """Integers with lower <= 2^bits exp(-numerator / denominator) <= upper, mostly neighbours.

    With y the fraction halved until it is at most 1/2, the tails F_i = sum_k (-y)^k i! / (i + k)! of the alternating series
    lie in [0, 1] and F_(i-1) = 1 - (y / i) F_i. The recurrence is run on an interval from F_n in [0, 1] down to
    F_0 = exp(-y), which is then squared as often as the fraction was halved; each step rounds outwards.
    """
    halvings = (numerator // denominator).bit_length() + 1
    precision = bits + halvings + 64
    one = 1 << precision
    least = (numerator << precision) // (denominator << halvings)  # y in [least, least + 1] / one
    lower, upper = 0, one
    for i in range(32 + precision // 8, 0, -1):
        lower, upper = one + (-(least + 1) * upper // (i * one)), one - least * lower // (i * one)
    for _ in range(halvings):
        lower, upper = lower * lower >> precision, -(-upper * upper >> precision)
    return lower >> precision - bits, -(-upper >> precision - bits)


def _decide(word: int, high: int, magnitude: int, sigma: int, randomness: Randomness) -> bool:
    """The same coin in integers: is V = 2^-high U below exp(-x)? V has `high` zero bits, `word`, then further bits of U."""
    drawn = 64
    while True:
        lower, upper = exponential_bounds(magnitude * magnitude, 2 * sigma * sigma, high + drawn)
        if word >= upper or word < lower:  # V is in [word, word + 1) / 2^(high + drawn)
            return word < lower
        word, drawn = word << drawn | randomness.bits(drawn), 2 * drawn
