"""Is the candidate better than what is published? A private mean of per-device differences, with an honest interval.

Each device sends one point: its own mean difference of nDCG@10, clipped, and the square of that, on the integer grid. The
points go through `Central` like any update, so one evaluation costs one event. The square is what makes the interval
honest: the spread between devices is private too, and has to be estimated from the same release.

Guarantees (user level, adjacency zero-out):
    - For a difference d clipped to [-c, c] the point is (d, L d^2 / c) with L = `SPREAD`. Its norm is at most
      c sqrt(1 + L^2), reached at |d| = c, and that is the clip norm of `mechanism`: no honest point is shortened. What a
      hostile device sends is held to the same ball by `Central.admit`.
    - A device without held-back queries, one that declines and one that fails send zeros. They count as a difference of
      zero, and the mean is over all enrolled devices: who has something to say is private.

Interval. Let d_1, ..., d_N be the clipped differences (zeros included) of N devices drawn from a population with mean m and
second moment s, b_i the coins of rate q, z_1 and z_2 the noise. The release holds X = (sum b_i d_i + z_1) / (q N) and
S = (sum b_i d_i^2 + z_2 c / L) / (q N), with E X = m, E S = s and

    Var X = (s / q - m^2) / N + v   <=  s / (q N) + v,            v = (sigma / (q N))^2, known
    Var S  = (E d^4 / q - s^2) / N + (c / L)^2 v  <=  c^2 s / (q N) + (c / L)^2 v,   because d^4 <= c^2 d^2

The second gives an upper bound on s that holds but for `_MISSED`: the larger root of s = S + z sqrt(Var S). The interval is
X +- z' sqrt(bound / (q N) + v), normal at what is left of 5% (union bound). Noise is Gaussian to within 1e-15; sums over
devices are so by the central limit theorem, which is why coverage is also tested by simulation. Accounting for the noise
and the sampling together follows Karwa and Vadhan (arXiv 1711.03908) and Du et al. (arXiv 2001.02285).
Where devices differ by much less than c, the bound on s is loose and the interval wider than need be: take a smaller c.

| case | result |
|---|---|
| difference beyond the bound | clipped to it; the mean is of clipped differences |
| None (nothing to score), NaN, infinity | zeros |
| nobody answers | noise alone: an interval around 0, at the same cost |
| a negative S, which noise can make | counts as 0 before the bound is taken |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import BudgetError
from stillroom_shared.mechanism import Central, Update

SPREAD = 0.5
"""Length of the squared coordinate in bounds: costs the difference 12% more noise, and keeps its own small."""

LEVEL = 0.95
_MISSED = 0.005  # of the 5%: chance that the bound on the second moment does not hold


@dataclass(frozen=True)
class Estimate:
    """What an evaluation found, in nDCG. `low` to `high` is the 95% interval; `noise` the standard deviation of the noise.

    Attributes:
        second_moment: released estimate of the mean squared difference, which noise can make negative.
    """

    difference: float
    low: float
    high: float
    noise: float
    second_moment: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The public constants of one evaluation.

    Attributes:
        bound: c, the largest difference of one device that counts, in nDCG.
        noise_multiplier, sampling_rate, devices: as in `Central`.

    >>> comparison = Comparison(bound=0.2, noise_multiplier=4.0, sampling_rate=1.0, devices=1_000)
    >>> point = comparison.answer(0.1)
    >>> comparison.mechanism.admit(point), comparison.answer(None).tolist()
    (True, [0, 0])
    >>> found = comparison.estimate(np.array([0.03, 0.01]))
    >>> f"{found.difference:.3f} ({found.low:.3f} to {found.high:.3f})"
    '0.030 (0.025 to 0.035)'
    """

    bound: float
    noise_multiplier: float
    sampling_rate: float
    devices: int

    def __post_init__(self) -> None:
        if not 0 < self.bound <= 1:
            raise BudgetError(f"bound {self.bound} on a difference of nDCG: choose a value in (0, 1], e.g. 0.2")

    @cached_property
    def mechanism(self) -> Central:
        """What bounds, sums and adds noise: a vector of two values."""
        return Central(
            clip_norm=self.bound * math.sqrt(1 + SPREAD**2),
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            devices=self.devices,
            dimension=2,
        )

    def answer(self, difference: float | None) -> Update:
        """What a device sends, (2,)."""
        if difference is None or not math.isfinite(difference):
            return np.zeros(2, np.int32)
        clipped = min(max(difference, -self.bound), self.bound)
        return self.mechanism.bound(np.array([clipped, SPREAD * clipped**2 / self.bound], np.float32))

    def estimate(self, released: NDArray[np.float64]) -> Estimate:
        """The difference with its interval, from what the mechanism released, (2,)."""
        mechanism = self.mechanism
        noise = mechanism.sigma * mechanism.clip_norm / mechanism.sensitivity / mechanism.denominator
        stretch = self.bound / SPREAD  # from the second coordinate to a mean square
        difference, second = float(released[0]), float(released[1]) * stretch
        largest = _upper(second, self.bound**2 / mechanism.denominator, (noise * stretch) ** 2, self.bound**2)
        half = _normal((1 - LEVEL - _MISSED) / 2) * math.sqrt(largest / mechanism.denominator + noise**2)
        return Estimate(difference, difference - half, difference + half, noise, second)


def _upper(second: float, slope: float, constant: float, most: float) -> float:
    """Upper bound on s from S = `second` with variance at most `slope` s + `constant`; s is at most `most` in any case."""
    z, seen = _normal(_MISSED), max(second, 0.0)
    root = seen + z**2 * slope / 2 + z * math.sqrt(z**2 * slope**2 / 4 + slope * seen + constant)
    return min(root, most)


def _normal(tail: float) -> float:
    """The quantile that a standard normal passes with this chance."""
    return NormalDist().inv_cdf(1 - tail)
