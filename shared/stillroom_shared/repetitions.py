"""How many trials a private search makes: a random number that nobody may learn, and what keeping only the best then costs.

Whoever tries settings on private data and publishes the best outcome has asked the data several times. When the number of
trials K is random, drawn without looking at data, and hidden, the best of K costs little more than one trial (Liu and
Talwar 2019, arXiv 1811.07971; here in Renyi DP: Papernot and Steinke 2022, arXiv 2110.03620). Let one trial be
(order, rdp(order))-Renyi-DP in both directions of the adjacency, and its outcomes be totally ordered. Then the best of K is

    negative binomial (theorem 2), for any order' >= 1:
        rdp(order) + (1 + shape) ((1 - 1/order') rdp(order') + log(1/gamma) / order') + log(E[K]) / (order - 1)
    Poisson (theorem 6), for any delta' at which a trial is (log(1 + 1/(order - 1)), delta')-DP:
        log(e^-mean + mean e^((order - 1) (rdp(order) + mean delta'))) / (order - 1)

The theorem states the second without e^-mean; that term is the outcome "nothing was selected" (K = 0), kept here because
the proof of the first factor does not cover it, and it is hardly anything.

Assumptions, which whoever runs the search has to keep (`stillroom_server.search` does):
    - K and the settings of each trial are drawn independently of the data, the settings alike in every trial.
    - Trials are independent and alike: the same devices, the same data, fresh cohorts and noise.
    - Only the best leaves: neither K, nor how long it took, nor any other trial. Conditioned on K = k there is no discount.
    - Ties are broken by who came first. Trials are exchangeable, so this is a fair draw among equals, which a random last
      digit of each score would have decided: a total order.

Draws are exact: parameters are floats, hence fractions, and every coin compares random integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import BudgetError
from stillroom_shared.randomness import Randomness

_MOST_TRIALS = 10_000.0
"""Largest mean: a search that could not be run is a typing error."""


@dataclass(frozen=True, kw_only=True)
class NegativeBinomial:
    """K >= 1 with probability proportional to `(1 - gamma)^k` times the product of `(l + shape) / (l + 1)` for l = 1..k-1.

    Attributes:
        shape: above -1; 1 is the geometric distribution, 0 the logarithmic one. Smaller: cheaper, and more often K = 1.
        gamma: in (0, 1); the smaller, the more trials.

    >>> geometric = NegativeBinomial(shape=1.0, gamma=0.125)
    >>> round(geometric.mean, 6), geometric.most(0.01), round((1 - 0.125) ** 35, 4)
    (8.0, 35, 0.0093)
    >>> round(NegativeBinomial.with_mean(8.0, shape=0.5).mean, 6)
    8.0
    """

    shape: float
    gamma: float

    def __post_init__(self) -> None:
        if not (-1 < self.shape <= 100 and 0 < self.gamma < 1):
            raise BudgetError(
                f"negative binomial of shape {self.shape} and gamma {self.gamma}: choose a shape above -1 and at most 100, "
                "and gamma inside (0, 1)"
            )
        _require_mean(self.mean)

    @classmethod
    def with_mean(cls, mean: float, *, shape: float) -> NegativeBinomial:
        """The distribution of this shape whose mean is the given one, above 1, to within rounding."""
        _require_mean(mean)
        if mean <= 1:
            raise BudgetError(f"mean {mean} of trials: choose a number above 1")
        low, high = 1e-12, 1 - 1e-12
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if _mean(shape, middle) > mean else (low, middle)
        return cls(shape=shape, gamma=high)

    @property
    def mean(self) -> float:
        """Expected number of trials."""
        return _mean(self.shape, self.gamma)

    @property
    def words(self) -> str:
        """For a statement."""
        return f"negative binomial of shape {self.shape:g}, mean {self.mean:.3g}"

    def most(self, tail: float) -> int:
        """A number of trials that is passed with probability at most `tail`."""
        probability = self.shape / math.expm1(-self.shape * math.log(self.gamma)) if self.shape else 0.0
        probability = (1 - self.gamma) * (probability or -1 / math.log(self.gamma))  # of K = 1
        trials = 1
        while True:
            probability *= (1 - self.gamma) * (trials + self.shape) / (trials + 1)  # of K = trials + 1
            # From here on each probability is at most `ratio` times the one before it.
            ratio = (1 - self.gamma) * max(1.0, (trials + 1 + self.shape) / (trials + 2))
            if ratio < 1 and probability <= tail * (1 - ratio):
                return trials
            trials += 1

    def draw(self, randomness: Randomness) -> int:
        """K, exactly: a negative binomial of the next whole shape, thinned to this one by coins of rational bias."""
        shape, halt = Fraction(self.shape), Fraction(self.gamma)
        whole = max(1, math.ceil(shape))
        while True:
            trials = sum(_failures(halt, randomness) for _ in range(whole))
            if trials and all(_coin((step + shape) / (step + whole), randomness) for step in range(1, trials)):
                return trials

    def rdp(self, orders: NDArray[np.float64], trial: NDArray[np.float64]) -> NDArray[np.float64]:
        """Renyi divergence of the best of K at each order, given that of one trial: theorem 2. (orders,) -> (orders,)"""
        if not np.isfinite(trial).any():
            return np.full_like(trial, math.inf)
        # Order' = 1 costs log(1/gamma) whatever a trial costs, and makes K = 1 the limit of gamma = 1.
        hidden = min(float(np.min((1 - 1 / orders) * trial - math.log(self.gamma) / orders)), -math.log(self.gamma))
        best = trial + (1 + self.shape) * hidden + math.log(self.mean) / (orders - 1)
        # Divergences grow with the order: a lower order costs no more than a higher one.
        return np.asarray(np.minimum.accumulate(best[::-1])[::-1])


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """K >= 0 of a Poisson distribution; K = 0 releases nothing. `mean` is at least 1.

    >>> Poisson(mean=8.0).most(0.01), Poisson(mean=8.0).words
    (15, 'Poisson, mean 8')
    """

    mean: float

    def __post_init__(self) -> None:
        _require_mean(self.mean)

    @property
    def words(self) -> str:
        """For a statement."""
        return f"Poisson, mean {self.mean:.3g}"

    def most(self, tail: float) -> int:
        """A number of trials that is passed with probability at most `tail`."""
        trials = 0
        while True:
            # Of K = trials + 1; through logarithms, as e^-mean alone may underflow.
            after = math.exp((trials + 1) * math.log(self.mean) - self.mean - math.lgamma(trials + 2))
            ratio = self.mean / (trials + 2)
            if ratio < 1 and after <= tail * (1 - ratio):
                return trials
            trials += 1

    def draw(self, randomness: Randomness) -> int:
        """K, exactly: a sum of parts of mean at most 1/2, each a geometric draw thinned by coins of rational bias."""
        mean = Fraction(self.mean)
        parts = math.ceil(2 * mean)
        return sum(_small_poisson(mean / parts, randomness) for _ in range(parts))

    def rdp(self, orders: NDArray[np.float64], trial: NDArray[np.float64]) -> NDArray[np.float64]:
        """Renyi divergence of the best of K at each order, given that of one trial: theorem 6. (orders,) -> (orders,)"""
        from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

        best = np.full_like(trial, math.inf)
        for place, (order, cost) in enumerate(zip(orders, trial, strict=True)):
            if math.isfinite(cost):
                slack, _ = compute_delta(orders, trial, math.log1p(1 / (order - 1)))
                selected = math.log(self.mean) + (order - 1) * (cost + self.mean * slack)
                best[place] = np.logaddexp(-self.mean, selected) / (order - 1)
        return np.asarray(np.minimum.accumulate(best[::-1])[::-1])


Repetitions = NegativeBinomial | Poisson


def _require_mean(mean: float) -> None:
    if not 1 <= mean <= _MOST_TRIALS:
        raise BudgetError(f"mean {mean} of trials: choose a number from 1 to {_MOST_TRIALS:,.0f}")


def _mean(shape: float, gamma: float) -> float:
    odds = (1 - gamma) / gamma
    return odds * (shape / -math.expm1(shape * math.log(gamma)) if shape else -1 / math.log(gamma))


def _coin(bias: Fraction, randomness: Randomness) -> bool:
    return randomness.bernoulli(bias.numerator, bias.denominator)


def _failures(halt: Fraction, randomness: Randomness) -> int:
    """Failures before the first success of probability `halt`."""
    failures = 0
    while not _coin(halt, randomness):
        failures += 1
    return failures


def _small_poisson(mean: Fraction, randomness: Randomness) -> int:
    """Poisson with mean at most 1/2: a fair geometric draw k, kept with probability (2 mean)^k / k!."""
    while True:
        count = 0
        while randomness.bits(1):
            count += 1
        if all(_coin(2 * mean / factor, randomness) for factor in range(1, count + 1)):
            return count
