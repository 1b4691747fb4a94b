"""The best of a random number of trials, from the definitions: probabilities, bounds and exact privacy losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def negative_binomial_pmf(shape: float, gamma: float, reach: int) -> NDArray[np.float64]:
    """Probabilities of 0..reach: definition 1 of arXiv 2110.03620, with products spelt out."""
    found, product = [0.0], 1.0
    for k in range(1, reach + 1):
        product *= (k - 1 + shape) / k
        if shape == 0:
            found.append((1 - gamma) ** k / (k * math.log(1 / gamma)))
        else:
            found.append((1 - gamma) ** k / (gamma**-shape - 1) * product)
    return np.array(found)


def poisson_pmf(mean: float, reach: int) -> NDArray[np.float64]:
    """Probabilities of 0..reach."""
    return np.array([math.exp(-mean) * mean**k / math.factorial(k) for k in range(reach + 1)])


def theorem_2(order: float, cost: float, other: float, cost_at_other: float, shape: float, gamma: float) -> float:
    """Renyi divergence of the best of a negative binomial number of trials, for one choice of the other order."""
    mean = 1 / gamma if shape == 1 else shape * (1 - gamma) / (gamma * (1 - gamma**shape))
    return (
        cost
        + (1 + shape) * (1 - 1 / other) * cost_at_other
        + (1 + shape) * math.log(1 / gamma) / other
        + math.log(mean) / (order - 1)
    )


def best_of(outcomes: NDArray[np.float64], pmf: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distribution of the best outcome, (outcomes + 1,); outcomes come worst first, and "nothing" stands before them."""
    below = np.concatenate([[0.0], np.cumsum(outcomes)])
    below = below / below[-1]
    generating = sum(p * below**k for k, p in enumerate(pmf))
    return np.concatenate([[pmf[0]], np.diff(np.asarray(generating))])


def exact_delta(one: NDArray[np.float64], other: NDArray[np.float64], epsilon: float) -> float:
    """The larger of the two hockey-stick divergences."""
    ways: list[Callable[[], float]] = [
        lambda: float(np.maximum(one - math.exp(epsilon) * other, 0).sum()),
        lambda: float(np.maximum(other - math.exp(epsilon) * one, 0).sum()),
    ]
    return max(way() for way in ways)
