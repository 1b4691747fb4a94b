"""Is the candidate better than what is published? A private mean of per-device differences, with an honest interval.

Each device sends one point on the integer grid: its own mean difference of nDCG@10, clipped; the square of that; and that it
had something to score. The points go through `Central` like any update, so one evaluation costs one event. The square is what
makes the interval honest: the spread between devices is private too, and has to be estimated from the same release. The third
value tells silence from no difference: without it a mean of zeros, where hardly anybody answers, would look like a good sign.

Guarantees (user level, adjacency zero-out):
    - For a difference d clipped to [-c, c] the point is (d, L d^2 / c, K c) with L = `SPREAD`, K = `PRESENCE`. Its norm is at
      most c sqrt(1 + L^2 + K^2), reached at |d| = c, and that is the clip norm of `mechanism`: no honest point is shortened.
      What a hostile device sends is held to the same ball by `Central.admit`.
    - A device without held-back queries, one that declines, one that fails and one that is offline add zeros. They count as a
      difference of zero, and means are over all enrolled devices: who has something to say is private.

Interval. Let d_1, ..., d_N be the clipped differences (zeros included) of N devices drawn from a population with mean m and
second moment s, of whom a share p scores; b_i the coins of rate q, z_1 to z_3 the noise. The release holds
X = (sum b_i d_i + z_1) / (q N), S = (sum b_i d_i^2 + z_2 c / L) / (q N) and P = (sum b_i a_i + z_3 / (K c)) / (q N), with
a_i in {0, 1}, E X = m, E S = s, E P = p and

    Var X = (s / q - m^2) / N + v   <=  s / (q N) + v,            v = (sigma / (q N))^2, known
    Var S  = (E d^4 / q - s^2) / N + (c / L)^2 v  <=  c^2 s / (q N) + (c / L)^2 v,   because d^4 <= c^2 d^2
    Var P  = (p / q - p^2) / N + v / (K c)^2  <=  p / (q N) + v / (K c)^2

The second gives an upper bound on s that holds but for `_MISSED`: the larger root of s = S + z sqrt(Var S); the third a lower
bound on p, likewise: the smaller root of p = P - z sqrt(Var P), the least share that answered. The interval is
X +- z' sqrt(bound / (q N) + v), normal at what is left of 5% (union bound). Noise is Gaussian to within 1e-15; sums over
devices are so by the central limit theorem, which is why coverage is also tested by simulation. Accounting for the noise
and the sampling together follows Karwa and Vadhan (arXiv 1711.03908) and Du et al. (arXiv 2001.02285).
Where devices differ by much less than c, the bound on s is loose and the interval wider than need be: take a smaller c.

| case | result |
|---|---|
| difference beyond the bound | clipped to it; the mean is of clipped differences |
| None (nothing to score), NaN, infinity | zeros |
| nobody answers | noise alone: an interval around 0 and hardly a share that answered, at the same cost |
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

PRESENCE = 0.25
"""Length of "I scored" in bounds: 2.5% more noise."""

LEVEL = 0.95
_MISSED = 0.005  # chance that the bound on the second moment does not hold, of the 5%; likewise that on the share
_VALUES = 3


@dataclass(frozen=True)
class Estimate:
    """What an evaluation found, in nDCG. `low` to `high` is the 95% interval; `noise` the standard deviation of the noise.

    Attributes:
        second_moment: released estimate of the mean squared difference, which noise can make negative.
        answered, least_answered: released estimate of the share of devices that scored something, and its lower bound
            (99.5%, one-sided). Noise can make both negative, and the estimate more than 1.
    """

    difference: float
    low: float
    high: float
    noise: float
    second_moment: float
    answered: float
    least_answered: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The public constants of one evaluation.

    Attributes:
        bound: c, the largest difference of one device that counts, in nDCG.
        noise_multiplier, sampling_rate, devices: as in `Central`.

    >>> comparison = Comparison(bound=0.2, noise_multiplier=4.0, sampling_rate=1.0, devices=1_000)
    >>> point = comparison.answer(0.1)
    >>> comparison.mechanism.admit(point), comparison.answer(None).tolist()
    (True, [0, 0, 0])
    >>> found = comparison.estimate(np.array([0.03, 0.01, 0.04]))
    >>> f"{found.difference:.3f} ({found.low:.3f} to {found.high:.3f})"
    '0.030 (0.025 to 0.035)'
    >>> f"{found.answered:.0%} scored, at least {found.least_answered:.0%}"
    '80% scored, at least 72%'
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
        """What bounds, sums and adds noise: a vector of three values."""
        return Central(
            clip_norm=self.bound * math.sqrt(1 + SPREAD**2 + PRESENCE**2),
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            devices=self.devices,
            dimension=_VALUES,
        )

    def answer(self, difference: float | None) -> Update:
        """What a device sends, (3,)."""
        if difference is None or not math.isfinite(difference):
            return np.zeros(_VALUES, np.int32)
        clipped = min(max(difference, -self.bound), self.bound)
        point = [clipped, SPREAD * clipped**2 / self.bound, PRESENCE * self.bound]
        return self.mechanism.bound(np.array(point, np.float32))

    def estimate(self, released: NDArray[np.float64]) -> Estimate:
        """The difference with its interval, from what the mechanism released, (3,)."""
        mechanism = self.mechanism
        noise = mechanism.sigma * mechanism.clip_norm / mechanism.sensitivity / mechanism.denominator
        unit, stretch = 1 / mechanism.denominator, self.bound / SPREAD  # from the second coordinate to a mean square
        difference, second, answered = float(released[0]), float(released[1]) * stretch, released[2] / self._presence
        largest = _bound(second, self.bound**2 * unit, (noise * stretch) ** 2, _normal(_MISSED))
        half = _normal((1 - LEVEL - _MISSED) / 2) * math.sqrt(min(largest, self.bound**2) * unit + noise**2)
        least = _bound(answered, unit, (noise / self._presence) ** 2, -_normal(_MISSED))
        return Estimate(
            difference=difference,
            low=difference - half,
            high=difference + half,
            noise=noise,
            second_moment=second,
            answered=float(answered),
            least_answered=least,
        )

    @property
    def _presence(self) -> float:
        return PRESENCE * self.bound


def _bound(estimate: float, slope: float, constant: float, z: float) -> float:
    """Where a mean of squares or of shares may still lie whose estimate has a variance of at most `slope` of it + `constant`.

    The root x of (x - estimate)^2 = z^2 (slope x + constant) on the side of z's sign. A negative estimate counts as 0 for
    what it says about its own variance.
    """
    seen = max(estimate, 0.0)
    root = z**2 * slope / 2 + z * math.sqrt(z**2 * slope**2 / 4 + slope * seen + constant)
    return (seen if z > 0 else estimate) + root


def _normal(tail: float) -> float:
    """The quantile that a standard normal passes with this chance."""
    return NormalDist().inv_cdf(1 - tail)
