"""Correlated noise for populations that the server cannot sample: DP-FTRL with a banded Toeplitz strategy matrix.

Learning adds up rounds, so what hurts is the noise in prefix sums of the rounds' sums x_1..x_T. Instead of x_t + noise, row t
releases y_t = C_0 x_t + ... + C_{b-1} x_{t-b+1} + z_t with fresh independent z_t; whoever reads the rows inverts C, and noise
of neighbouring rounds partly cancels in prefix sums. (C: lower-triangular, banded, Toeplitz; Denisov et al. 2022, arXiv
2202.08312; multiple participations: Choquette-Choo et al. 2022, arXiv 2211.06530; bands and separation: arXiv 2306.08153.)
Everything private is an integer: sums on the grid of `RESOLUTION`, coefficients in units of 1 / `ONE`, exact discrete
Gaussian noise. Floating point starts after the rows, where their strategy is inverted: post-processing.

Guarantees (user level, adjacency zero-out; a device takes part at most `participations` times, any two at least
`separation` >= b rounds apart, enforced by `stillroom_server.cohort.Rotation` and, against the server, by
`stillroom_client.separation`):
    - Sensitivity: the participations of one device move disjoint rows, each at most b of them, by C_j u with |u| <=
      `RESOLUTION`; the worst pattern is known, and the sensitivity exact (`stillroom_shared.toeplitz.squared_sensitivity`).
    - Adaptivity: a device's update depends on earlier rows. z_t is independent of them, and on every path the squared moves
      of the rows' means add up to at most `squared_sensitivity`; such a sequence of continuous Gaussian releases costs no
      more than a single one of that sensitivity (arXiv 2202.08312; for moves that are themselves chosen adaptively, Smith
      and Thakurta 2022, arXiv 2210.17520). Rounding is post-processing; the discrete noise's distance from it is in the event.
    - One event covers all T rows, whether released or not: epsilon does not depend on how far a run came. Sampling does not
      enter, so readers of releases, peers and observers of the network face the same epsilon.

| case | result |
|---|---|
| a row is formed again after a crash | fresh noise; safe only if the first one was never seen: `stillroom_server.stream` |
| empty cohort | the sum is zero, the row is formed all the same |
| a sum of wrong shape, type or size | `ProtocolError`; nothing is formed |
| fewer rounds between participations than bands | refused at construction (`BudgetError`) |
| numbers that might pass int64 | refused at construction (`BudgetError`) |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.accounting import smallest_noise_multiplier
from stillroom_shared.errors import BudgetError, ProtocolError
from stillroom_shared.events import CorrelatedGaussian
from stillroom_shared.mechanism import RESOLUTION, Central, Total, Update, clip_to_grid
from stillroom_shared.noise import discrete_gaussian
from stillroom_shared.randomness import Randomness
from stillroom_shared.toeplitz import (
    Coefficients,
    Criterion,
    best_coefficients,
    next_estimate,
    require_coefficients,
    require_cohorts,
    require_schedule,
    squared_sensitivity,
)


@dataclass(frozen=True, eq=False)
class RunState:
    """A run after `row` rows.

    Attributes:
        row: number of rows formed; 0 before the first.
        noisy: y_row, (dimension,) int64, in 1 / ONE grid steps: what may be released.
        sums: private, the newest last, (min(row, bands - 1), dimension) int64; none after the last row.
        estimates: of the newest sums, from noisy rows alone, (min(row, max(bands - 1, 1)), dimension), in grid steps.
    """

    row: int
    noisy: NDArray[np.int64]
    sums: NDArray[np.int64]
    estimates: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Correlated:
    """User-level Gaussian mechanism over a whole run, with noise that is correlated between rounds.

    `coefficients` are C_0..C_{b-1} in units of 1 / ONE, C_0 = ONE, not increasing. Updates are bounded as in `Central`.
    `noise_multiplier` is the standard deviation of the noise / L2 sensitivity of all rows together.

    >>> from stillroom_shared.toeplitz import ONE
    >>> mechanism = Correlated(
    ...     clip_norm=0.5, noise_multiplier=1e-6, coefficients=(1024, 512), participations=2, separation=2, rounds=4,
    ...     devices=8, dimension=1)
    >>> update, state = mechanism.bound(np.array([0.5], np.float32)), mechanism.start()
    >>> for answers in (4, 1, 2, 1):
    ...     state = mechanism.step(state, answers * update.astype(np.int64), Randomness(seed=f"toy {answers}"))
    ...     print(state.row, (state.noisy / (ONE * RESOLUTION)).round(3).tolist(), mechanism.update(state).round(3).tolist())
    1 [4.0] [0.5]
    2 [3.0] [0.125]
    3 [2.5] [0.25]
    4 [2.0] [0.125]
    """

    clip_norm: float
    noise_multiplier: float
    coefficients: Coefficients
    participations: int
    separation: int
    rounds: int
    devices: int
    dimension: int
    name: Literal["correlated"] = "correlated"
    unit: Literal["user"] = "user"

    def __post_init__(self) -> None:
        require_coefficients(self.coefficients)
        require_schedule(self.rounds, self.participations, self.separation)
        require_cohorts(self.separation, self.devices)
        self._clipping.event()  # refuses a clip norm, a noise multiplier or a dimension that cannot be
        # Noise passes 64 sigma with a probability below e^-2000.
        if self.devices * RESOLUTION * sum(self.coefficients) + 64 * self.sigma >= 1 << 63:
            raise BudgetError(
                f"noise multiplier {self.noise_multiplier} with {self.bands} bands over {self.devices} devices passes 64 bits: "
                "use less noise or fewer bands"
            )

    @property
    def length(self) -> int:
        """The adapter values and nothing else."""
        return self.dimension

    @property
    def bands(self) -> int:
        """Number of coefficients b: how many rows a sum enters."""
        return len(self.coefficients)

    @property
    def squared_sensitivity(self) -> int:
        """Square of the L2 sensitivity of all rows together under zero-out, in (grid step / ONE)^2; exact."""
        return squared_sensitivity(self.coefficients, self.rounds, self.participations, self.separation) * RESOLUTION**2

    @cached_property
    def sigma(self) -> int:
        """Standard deviation of a row's noise in grid steps / ONE: the product with the sensitivity, rounded up."""
        square = Fraction(self.noise_multiplier) ** 2 * self.squared_sensitivity
        return math.isqrt(math.ceil(square) - 1) + 1

    @property
    def denominator(self) -> float:
        """Devices in a cohort of the rotation, to within one: public and fixed."""
        return self.devices / self.separation

    def bound(self, delta: NDArray[np.float32]) -> Update:
        """Device side: as `Central.bound`."""
        return clip_to_grid(delta, self.clip_norm, self.dimension)

    def admit(self, update: NDArray[np.integer]) -> bool:
        """Server side: as `Central.admit`."""
        return self._clipping.admit(update)

    def start(self) -> RunState:
        """Before the first row."""
        none = np.zeros((0, self.dimension))
        return RunState(0, np.zeros(self.dimension, np.int64), none.astype(np.int64), none)

    def step(self, state: RunState, total: Total, randomness: Randomness) -> RunState:
        """Form the next row of the round's sum, (dimension,) int64, with noise that is drawn here and kept nowhere."""
        if state.row >= self.rounds:
            raise BudgetError(f"row {state.row + 1} of {self.rounds}: the run was charged for {self.rounds} rows only")
        self._require_sum(total)
        row, sums = state.row + 1, np.vstack([state.sums, total])
        exact = np.array(self.coefficients[: len(sums)], np.int64) @ sums[::-1]  # int64: no BLAS, no rounding
        noisy = exact + discrete_gaussian(self.sigma, self.dimension, randomness)
        estimates = np.vstack([state.estimates, next_estimate(noisy, state.estimates, self.coefficients)])
        kept = min(row, self.bands - 1) if row < self.rounds else 0  # after the last row nothing needs a sum any more
        return RunState(
            row, noisy, sums[len(sums) - kept :].copy(), estimates[-min(row, max(self.bands - 1, 1)) :].copy()
        )

    def update(self, state: RunState) -> NDArray[np.float64]:
        """The noisy mean update of the state's round, (dimension,), in the units of the float updates: post-processing."""
        return np.asarray(state.estimates[-1] * (self.clip_norm / RESOLUTION / self.denominator), np.float64)

    def event(self) -> CorrelatedGaussian:
        """What the whole run costs; charged once, before the first row."""
        return CorrelatedGaussian(
            noise_multiplier=self.noise_multiplier,
            rounds=self.rounds,
            participations=self.participations,
            separation=self.separation,
            sigma=self.sigma,
            dimension=self.dimension,
        )

    def participation_event(self) -> CorrelatedGaussian:
        """What one participation costs the device itself, for its own ledger.

        It moves at most b rows, which no other participation moves; the other rows are post-processing for it. So n
        participations compose to a Gaussian with n times the square, and `participations` of them to at least the run's.
        """
        square = sum(c * c for c in self.coefficients) * RESOLUTION**2
        return CorrelatedGaussian(
            noise_multiplier=self.sigma / math.sqrt(square) * (1 - 2.0**-50),  # rounded down, never up
            rounds=self.bands,
            participations=1,
            separation=self.separation,
            sigma=self.sigma,
            dimension=self.dimension,
        )

    @property
    def _clipping(self) -> Central:
        return Central(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=1.0,
            devices=self.devices,
            dimension=self.dimension,
        )

    def _require_sum(self, total: Total) -> None:
        limit = self.devices * RESOLUTION
        fits = total.shape == (self.dimension,) and total.dtype == np.int64
        if not fits or int(total.max()) > limit or int(total.min()) < -limit:
            raise ProtocolError(
                f"a sum of shape {total.shape} and type {total.dtype}: expected ({self.dimension},) of int64, each value "
                f"within {self.devices} clip norms; add up admitted updates only"
            )


def calibrate_correlated(
    *,
    target_epsilon: float,
    delta: float,
    rounds: int,
    participations: int,
    separation: int,
    clip_norm: float,
    devices: int,
    dimension: int,
    bands: int | None = None,
    criterion: Criterion = "mean",
) -> Correlated:
    """The `Correlated` mechanism with the least noise whose whole run stays within the target; as many bands as fit.

    `BudgetError` names the reason when no noise multiplier up to 1,000 meets it, or the schedule cannot be. What it is worth at
    the same epsilon: noise in prefix sums (root mean square, in clip norms, same expected cohorts) with every eighth device
    in each of 64 rounds, by rotation and correlated noise / by rotation and independent noise / by Poisson sampling:

    >>> from stillroom_shared.mechanism import calibrate
    >>> from stillroom_shared.toeplitz import ONE, prefix_error
    >>> common = {"target_epsilon": 2.0, "delta": 1e-5, "clip_norm": 1.0, "devices": 1_000, "dimension": 1_000, "rounds": 64}
    >>> schedule = {"rounds": 64, "participations": 8, "separation": 8}
    >>> made = calibrate_correlated(**common, participations=8, separation=8)
    >>> sampled = calibrate(**common, sampling_rate=1 / 8)
    >>> [round(made.noise_multiplier * prefix_error(c, **schedule), 1) for c in (made.coefficients, (ONE,))]
    [15.0, 32.2]
    >>> round(sampled.noise_multiplier * math.sqrt((64 + 1) / 2), 1)
    13.0
    """
    require_schedule(rounds, participations, separation)
    try:
        multiplier = smallest_noise_multiplier(
            target_epsilon=target_epsilon,
            delta=delta,
            rounds=1,  # one event; its rounding distance is that of all values of all rows
            sampling_rate=1.0,
            dimension=rounds * dimension,
            resolution=RESOLUTION,
        )
    except BudgetError as error:
        raise BudgetError(
            f"{error}; here the {rounds} rows of a run are one release without sampling: only a larger epsilon or delta helps"
        ) from error
    width = min(separation, rounds) if bands is None else bands
    return Correlated(
        clip_norm=clip_norm,
        noise_multiplier=multiplier,
        coefficients=best_coefficients(width, rounds, participations, separation, criterion),
        participations=participations,
        separation=separation,
        rounds=rounds,
        devices=devices,
        dimension=dimension,
    )
