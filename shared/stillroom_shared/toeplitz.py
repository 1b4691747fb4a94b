"""Banded Toeplitz strategies for correlated noise: their coefficients, their sensitivity and what they are worth.

A strategy C turns the sums x_1..x_T of rounds into the rows y = C x + z that are released; C is lower-triangular with C_j on
the j-th subdiagonal, j < b. Coefficients are integers in units of 1 / ONE. What is done here with rows is post-processing; what
is said about sensitivity holds for devices that take part at most `participations` times, in rounds at least `separation` >= b
apart (arXiv 2211.06530, 2306.08153).
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import BudgetError

ONE = 1 << 10
"""The coefficient 1: rounding to 1 / ONE raises the error of prefix sums by less than 0.01% up to 64 bands."""

Criterion = Literal["mean", "max"]
Coefficients = tuple[int, ...]


def squared_sensitivity(coefficients: Coefficients, rounds: int, participations: int, separation: int) -> int:
    """Square of the L2 sensitivity of the rows, in (1 / ONE)^2, for updates of norm 1; an exact maximum over all patterns.

    A participation in round t moves the rows t..t+b-1, by C_0 u..C_{b-1} u; rows after the last one do not exist. Two
    participations move disjoint rows, so squares add. The earlier a participation, the more rows it moves, so rounds
    1, 1 + separation, 1 + 2 separation, ... are the worst pattern.

    >>> squared_sensitivity((1024, 512), rounds=5, participations=3, separation=2) == (2 * (2**2 + 1) + 2**2) * 512**2
    True
    """
    require_schedule(rounds, participations, separation)
    if len(coefficients) > min(separation, rounds):
        raise BudgetError(
            f"{len(coefficients)} bands: participations only {separation} rounds apart, in {rounds} rounds, would share rows; "
            f"choose at most {min(separation, rounds)} bands"
        )
    starts = range(0, participations * separation, separation)
    return sum(c * c for start in starts for c in coefficients[: rounds - start])


def reconstruct(noisy: NDArray[np.int64], coefficients: Coefficients) -> NDArray[np.float64]:
    """Estimates of the rounds' sums from rows 1..t, C^-1 y, (t, dimension), in grid steps: post-processing, in float64.

    Coefficients that do not increase keep errors from growing exponentially: no root of their polynomial lies inside the unit
    circle (Enestroem-Kakeya). Without noise, sums below 2^53 / (sum of the coefficients) come back exactly.
    """
    estimates = np.zeros(noisy.shape)
    for row, values in enumerate(noisy):
        estimates[row] = next_estimate(values, estimates[:row], coefficients)
    return estimates


def prefix_error(
    coefficients: Coefficients, *, rounds: int, participations: int, separation: int, criterion: Criterion = "mean"
) -> float:
    """Standard deviation of the noise in one value of the prefix sums, in clip norms at noise multiplier 1.

    `criterion` "mean" is the root of the mean square over all prefixes, "max" the worst prefix, which is the last one. The
    strategy (ONE,) is independent noise in every round: `Central` without sampling. At equal noise multiplier, and so at
    equal epsilon:

    >>> schedule = {"rounds": 64, "participations": 8, "separation": 8}
    >>> for coefficients in ((ONE,), best_coefficients(8, **schedule)):
    ...     print(*(round(prefix_error(coefficients, **schedule, criterion=c), 2) for c in ("mean", "max")))
    16.12 22.63
    7.54 9.76
    """
    impulse = np.zeros((rounds, 1), np.int64)
    impulse[0] = 1
    column = reconstruct(impulse, coefficients).cumsum()  # of prefix sums times C^-1, which is Toeplitz too
    times = np.arange(rounds, 0, -1) / rounds if criterion == "mean" else np.ones(rounds)
    square = squared_sensitivity(coefficients, rounds, participations, separation)
    return math.sqrt(square * float(times @ column**2))


@lru_cache(maxsize=64)
def best_coefficients(
    bands: int, rounds: int, participations: int, separation: int, criterion: Criterion = "mean"
) -> Coefficients:
    """The coefficients, within a family, with the least `prefix_error`.

    The family is the power series of (1 - x)^-a, a in hundredths from 0 (independent noise) to 1: not increasing, and exact
    rationals, so the rounded coefficients do not depend on the machine. a = 1/2 is the square root of the prefix-sum matrix,
    near-optimal for as many bands as rounds (arXiv 2404.16706) and proposed with fewer in arXiv 2405.13763; fewer bands want a
    larger a. Measured against coefficients optimized freely by BFGS, both criteria, 16 to 1,024 rounds, 4 bands to half the
    rounds (at most 32): the family is up to 0.4% above the optimum, a = 1/2 up to 17%. With as many bands as rounds these are
    1.5% and 2.7%.

    >>> best_coefficients(4, rounds=32, participations=8, separation=4)
    (1024, 614, 492, 426)
    """
    if not 1 <= bands <= rounds:
        raise BudgetError(f"{bands} bands in {rounds} rounds: choose from 1 to {rounds}")
    schedule = {"rounds": rounds, "participations": participations, "separation": separation}
    family = [_power_series(Fraction(hundredths, 100), bands) for hundredths in range(101)]
    return min(family, key=lambda c: prefix_error(c, **schedule, criterion=criterion))


def next_estimate(
    noisy: NDArray[np.int64], earlier: NDArray[np.float64], coefficients: Coefficients
) -> NDArray[np.float64]:
    """One step of `reconstruct`, from a row, (dimension,), and the estimates before it, the newest last."""
    depth = min(len(earlier), len(coefficients) - 1)
    known = np.array(coefficients[1 : depth + 1], np.float64) @ earlier[len(earlier) - depth :][::-1]
    return np.asarray((noisy - known) / coefficients[0], np.float64)


def require_coefficients(coefficients: Coefficients) -> None:
    """`BudgetError` unless they are integers that fall from ONE to at least 0."""
    ordered = list(coefficients) == sorted(coefficients, reverse=True)
    exact = all(isinstance(coefficient, int) for coefficient in coefficients)
    if not coefficients or coefficients[0] != ONE or coefficients[-1] < 0 or not ordered or not exact:
        raise BudgetError(
            f"coefficients {coefficients} are no integers that fall from {ONE} to at least 0: take those of best_coefficients"
        )


def require_schedule(rounds: int, participations: int, separation: int) -> None:
    """`BudgetError` unless so many participations, so far apart, fit into the rounds."""
    if min(rounds, participations, separation) < 1:
        raise BudgetError(
            f"{rounds} rounds, {participations} participations, separation {separation}: each must be at least 1"
        )
    if participations > (most := math.ceil(rounds / separation)):
        raise BudgetError(
            f"{participations} participations, {separation} rounds apart, do not fit into {rounds} rounds: at most {most} do"
        )


def require_cohorts(separation: int, devices: int) -> None:
    """`BudgetError` unless every round is the turn of somebody."""
    if separation > devices:
        raise BudgetError(
            f"separation {separation} leaves rounds without a cohort among {devices} devices: choose at most {devices}"
        )


def _power_series(exponent: Fraction, bands: int) -> Coefficients:
    """The first coefficients of (1 - x)^-exponent, rounded to 1 / ONE."""
    series = [Fraction(1)]
    for order in range(1, bands):
        series.append(series[-1] * (exponent + order - 1) / order)
    return tuple(round(ONE * coefficient) for coefficient in series)
