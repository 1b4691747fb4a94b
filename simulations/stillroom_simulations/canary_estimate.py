"""An estimate of epsilon from the scores of canaries: Andrew et al. 2023, arXiv 2302.03098. An estimate, never a bound.

The attacker's scores of present and of absent canaries are each taken for Gaussian, and epsilon is what tells these two
Gaussians apart at the given delta. The paper's statistic is the cosine with the final model, whose distribution for an
absent canary is N(0, 1 / dimension) once the dimension is far larger than the number of canaries. Here the canaries may
fill half of the space, so that Gaussian is fitted too, to the canaries that are absent; and since dividing all scores by
one length moves both Gaussians alike, inner products serve as well as cosines.

Not covered: under Poisson sampling the scores of present canaries are a mixture, which no Gaussian fits in its tail, and
at delta 1e-5 the tail is extrapolated from a few hundred scores.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import SettingsError

_LARGEST = 200.0  # what is told apart beyond this is told apart by the naked eye


def estimate_epsilon(present: NDArray[np.float64], absent: NDArray[np.float64], *, delta: float) -> float:
    """The epsilon of two Gaussians fitted to the scores; infinity where it would exceed 200, or absent scores do not vary.

    >>> generator = np.random.default_rng(0)
    >>> present, absent = generator.normal(1.0, 1.0, 50_000), generator.normal(0.0, 1.0, 50_000)
    >>> round(estimate_epsilon(present, absent, delta=1e-5), 1), round(gaussian_epsilon(1.0, 1.0, delta=1e-5), 1)
    (4.5, 4.4)

    Args:
        present, absent: scores of the canaries, at least two each.
    """
    if min(len(present), len(absent)) < 2:
        raise SettingsError(
            f"{len(present)} present and {len(absent)} absent canaries: a Gaussian needs two of each, use more canaries"
        )
    spread = float(absent.std(ddof=1))
    if spread == 0:
        return 0.0 if present.std() == 0 and present.mean() == absent.mean() else math.inf
    return gaussian_epsilon(
        float(present.mean() - absent.mean()) / spread, float(present.std(ddof=1)) / spread, delta=delta
    )


def gaussian_epsilon(mean: float, deviation: float, *, delta: float) -> float:
    """The least epsilon >= 0 at which N(mean, deviation^2) and N(0, 1) are (epsilon, delta)-close in both directions.

    Infinity above 200, and for a deviation of zero.
    """
    if not deviation > 0:
        return math.inf

    def needed(epsilon: float) -> float:
        there = gaussian_divergence(mean, deviation, epsilon)
        # Divided by its deviation, the first becomes the standard one.
        return max(there, gaussian_divergence(-mean / deviation, 1 / deviation, epsilon))

    low, high = 0.0, _LARGEST
    if needed(high) > delta:
        return math.inf
    if needed(low) <= delta:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) > delta else (low, middle)
    return high


def gaussian_divergence(mean: float, deviation: float, epsilon: float) -> float:
    """The hockey-stick divergence, sup over sets of P[set] - e^epsilon Q[set], of P = N(mean, deviation^2), Q = N(0, 1).

    The best set is where the log likelihood ratio a x^2 + b x + c exceeds epsilon: a half-line, an interval, the outside of
    one, or nothing.
    """
    variance = deviation * deviation
    a = (1 - 1 / variance) / 2
    b = mean / variance
    c = -mean * mean / (2 * variance) - math.log(deviation) - epsilon
    discriminant = b * b - 4 * a * c

    def gain(*intervals: tuple[float, float]) -> float:
        here = sum(_mass(interval, mean, deviation) for interval in intervals)
        return max(0.0, here - math.exp(epsilon) * sum(_mass(interval, 0.0, 1.0) for interval in intervals))

    if abs(a) < 1e-12:  # equal deviations: the ratio is a line
        if b == 0:
            return 0.0
        return gain((-c / b, math.inf) if b > 0 else (-math.inf, -c / b))
    if discriminant <= 0:  # everywhere or nowhere, and over the whole line P and Q both weigh 1
        return 0.0
    # The root of larger size first; the other by their product, so that neither is a difference of near numbers.
    first = (-b - math.copysign(math.sqrt(discriminant), b)) / (2 * a)
    second = c / (a * first)
    low, high = min(first, second), max(first, second)
    return gain((low, high)) if a < 0 else gain((-math.inf, low), (high, math.inf))


def _mass(edges: tuple[float, float], mean: float, deviation: float) -> float:
    """P[low < N(mean, deviation^2) < high], from the tail that is nearer, where no digits cancel."""
    low, high = ((edge - mean) / (deviation * math.sqrt(2)) for edge in edges)
    if low > 0:
        low, high = -high, -low
    return (math.erfc(-high) - math.erfc(-low)) / 2
