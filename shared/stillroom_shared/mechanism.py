"""Mechanisms: what a device sends, what the server may release, and the event it costs.

A round releases `(sum of bounded updates + noise) / fixed public number`. Everything summed is an integer on a grid, so the
sum is exact in any order and its sensitivity is what arithmetic says, not what floating point does to it
(arXiv 2207.10635). The non-private baseline goes through the same interface.

Guarantees (`Central`, user level, adjacency zero-out: a device's update becomes the zero vector):
    - `bound` returns integers whose exact L2 norm is at most `RESOLUTION`, whatever it is given; `admit` checks that again
      on the server, so a defective device costs its own update and nobody's privacy.
    - The sum's sensitivity is therefore `RESOLUTION` grid steps, and `sigma` is computed from it.
    - The denominator is `sampling_rate * devices`, both public: never a count of who answered.
    - With `norm_bit`, an update carries one more integer: plus or minus a fixed number, for "was not clipped" or "was". It is
      part of the vector that sensitivity, noise and event are computed for, so it costs what the event says and nothing else
      (adaptive clipping: Andrew et al. 2021, arXiv 1905.03871).

| update | bounded to |
|---|---|
| longer than the clip norm | scaled down onto it, rounded towards zero |
| zero, or NaN or infinity anywhere | zero |
| wrong length | `ProtocolError` on the device, zero on the server |
| no update at all (empty cohort) | the release is noise alone, at the same cost |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.accounting import smallest_noise_multiplier
from stillroom_shared.errors import BudgetError, ProtocolError
from stillroom_shared.events import Event, SampledGaussian, Unprotected
from stillroom_shared.noise import discrete_gaussian
from stillroom_shared.randomness import Randomness

RESOLUTION = 1 << 28
"""Grid steps in one clip norm: rounding costs a delta of about 1e-15, and an update fits int32."""

MechanismName = Literal["none", "central", "correlated", "local"]
Update = NDArray[np.int32]
Total = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Released:
    """What a round makes public.

    Attributes:
        update: the noisy mean update, (dimension,), in the units of the float updates.
        unclipped: the noisy share of the expected cohort whose updates were not clipped, a number near [0, 1]; a device that
            sent zero counts half. None where the mechanism does not ask.
    """

    update: NDArray[np.float64]
    unclipped: float | None = None


class Mechanism(Protocol):
    """One way to bound device updates and to account for what is made of their sum. Implementations are frozen values."""

    @property
    def name(self) -> MechanismName:
        """What settings and messages call it."""
        ...

    @property
    def unit(self) -> str:
        """What is protected: "user", "query", or "none"."""
        ...

    @property
    def dimension(self) -> int:
        """Number of adapter values."""
        ...

    @property
    def length(self) -> int:
        """Length of an update as it travels."""
        ...

    def bound(self, delta: NDArray[np.float32]) -> Update:
        """Device side: a float update, (dimension,), as bounded grid integers, (length,)."""
        ...

    def admit(self, update: NDArray[np.integer]) -> bool:
        """Server side: whether an arrived update may enter the sum; one that may not counts as zero."""
        ...

    def event(self) -> Event:
        """What is charged to a reader of releases: one round, or a whole run whose rounds cannot be told apart."""
        ...

    def participation_event(self) -> Event:
        """What taking part in one round costs a device by its own account: sampling does not count."""
        ...


class RoundMechanism(Mechanism, Protocol):
    """A mechanism that releases each round by itself."""

    def release(self, total: Total, randomness: Randomness) -> Released:
        """The noisy mean of the updates whose exact sum, (length,), is given."""
        ...


@dataclass(frozen=True, kw_only=True)
class Central:
    """User-level Gaussian mechanism, noise added once by the server.

    Attributes:
        clip_norm: largest L2 norm of an update.
        noise_multiplier: standard deviation of the noise / sensitivity.
        sampling_rate: probability with which a device is in a cohort.
        devices: how many are enrolled.
        dimension: number of adapter values.
        norm_bit: size of the bit that says whether an update was clipped, in clip norms; 0: no such bit. At 0.1 it lengthens
            the sensitivity by half a percent.

    >>> mechanism = Central(clip_norm=0.5, noise_multiplier=2.0, sampling_rate=0.5, devices=100, dimension=3)
    >>> update = mechanism.bound(np.array([3.0, 0.0, 4.0], np.float32))
    >>> (update / RESOLUTION).round(6).tolist(), mechanism.sigma == 2 * RESOLUTION, mechanism.denominator
    ([0.6, 0.0, 0.8], True, 50.0)
    """

    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    devices: int
    dimension: int
    norm_bit: float = 0.0
    name: Literal["central"] = "central"
    unit: Literal["user"] = "user"

    def __post_init__(self) -> None:
        require_clip_and_noise(self.clip_norm, self.noise_multiplier)
        if self.devices < 1 or self.dimension < 1:
            raise BudgetError(f"{self.devices} devices and {self.dimension} values: both must be at least 1")
        if not 0 <= self.norm_bit <= 1:
            raise BudgetError(
                f"norm bit {self.norm_bit} is no share of the clip norm: choose a value from 0 to 1, e.g. 0.1"
            )
        self.event()  # refuses an impossible noise multiplier or sampling rate

    @property
    def length(self) -> int:
        """The adapter values, and the norm bit if there is one."""
        return self.dimension + (self.norm_bit > 0)

    @property
    def sensitivity(self) -> int:
        """L2 sensitivity of the sum under zero-out, in grid steps, rounded up: a clipped update and its bit."""
        squared = RESOLUTION**2 + self._bit**2
        return RESOLUTION if squared == RESOLUTION**2 else math.isqrt(squared - 1) + 1

    @property
    def sigma(self) -> int:
        """Standard deviation of the noise in grid steps, rounded up."""
        return math.ceil(Fraction(self.noise_multiplier) * self.sensitivity)  # a product of floats can be rounded down

    @property
    def denominator(self) -> float:
        """Expected cohort size: public and fixed."""
        return self.sampling_rate * self.devices

    @property
    def _bit(self) -> int:
        """The norm bit in grid steps."""
        return math.floor(self.norm_bit * RESOLUTION)

    def bound(self, delta: NDArray[np.float32]) -> Update:
        """Clip to `clip_norm` and round towards zero, so that rounding never lengthens an update."""
        steps = clip_to_grid(delta, self.clip_norm, self.dimension)
        if not self.norm_bit:
            return steps
        length = float(np.linalg.norm(_finite(delta, self.dimension)))
        sign = (length > 0) - 2 * (length > self.clip_norm)  # zero, short, long: 0, 1, -1
        return np.append(steps, np.int32(sign * self._bit))

    def admit(self, update: NDArray[np.integer]) -> bool:
        """True when length, type, the exact norm and the bit hold."""
        if update.shape != (self.length,) or update.dtype != np.int32:
            return False
        steps = update.astype(np.int64)
        return _fits(steps[: self.dimension]) and set(np.abs(steps[self.dimension :]).tolist()) <= {0, self._bit}

    def release(self, total: Total, randomness: Randomness) -> Released:
        """Add exact discrete Gaussian noise, then leave the grid; the rest is post-processing."""
        noisy = (total + discrete_gaussian(self.sigma, self.length, randomness)).astype(np.float64) / self.denominator
        update = noisy[: self.dimension] * (self.clip_norm / RESOLUTION)
        return Released(update, 0.5 + float(noisy[-1]) / (2 * self._bit) if self.norm_bit else None)

    def event(self) -> SampledGaussian:
        """One Poisson-sampled Gaussian release."""
        return SampledGaussian(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            sigma=self.sigma,
            dimension=self.length,
        )

    def participation_event(self) -> SampledGaussian:
        """The same, known to have taken part."""
        return self.event().without_sampling()


@dataclass(frozen=True, kw_only=True)
class NoPrivacy:
    """The non-private baseline: no clipping, no noise, the same grid, the same fixed denominator."""

    sampling_rate: float
    devices: int
    dimension: int
    name: Literal["none"] = "none"
    unit: Literal["none"] = "none"

    _STEP = 2.0**-24  # a range of +-128, far beyond any update of a low-rank adapter

    @property
    def length(self) -> int:
        """The adapter values and nothing else."""
        return self.dimension

    @property
    def denominator(self) -> float:
        """Expected cohort size, as in `Central`."""
        return self.sampling_rate * self.devices

    def bound(self, delta: NDArray[np.float32]) -> Update:
        """Round to the grid; saturate at its range."""
        limit = np.iinfo(np.int32).max
        return np.clip(np.rint(_finite(delta, self.dimension) / self._STEP), -limit, limit).astype(np.int32)

    def admit(self, update: NDArray[np.integer]) -> bool:
        """True when length and type hold."""
        return update.shape == (self.dimension,) and update.dtype == np.int32

    def release(self, total: Total, randomness: Randomness) -> Released:
        """The exact mean over the expected cohort."""
        return Released(total.astype(np.float64) * (self._STEP / self.denominator))

    def event(self) -> Unprotected:
        """No noise: nothing is promised."""
        return Unprotected(dimension=self.dimension)

    def participation_event(self) -> Unprotected:
        """The same."""
        return self.event()


def calibrate(
    *,
    target_epsilon: float,
    delta: float,
    rounds: int,
    clip_norm: float,
    sampling_rate: float,
    devices: int,
    dimension: int,
) -> Central:
    """The `Central` mechanism with the least noise whose `rounds` releases stay within the target.

    Raises `BudgetError` with the reason when no noise multiplier up to 1,000 does.
    """
    multiplier = smallest_noise_multiplier(
        target_epsilon=target_epsilon,
        delta=delta,
        rounds=rounds,
        sampling_rate=sampling_rate,
        dimension=dimension,
        resolution=RESOLUTION,
    )
    return Central(
        clip_norm=clip_norm,
        noise_multiplier=multiplier,
        sampling_rate=sampling_rate,
        devices=devices,
        dimension=dimension,
    )


def require_clip_and_noise(clip_norm: float, noise_multiplier: float) -> None:
    """Raise `BudgetError` unless the clip norm bounds something and the noise is some."""
    if not 1e-12 <= clip_norm <= 1e12:
        raise BudgetError(f"clip norm {clip_norm} bounds nothing: choose a number from 1e-12 to 1e12, e.g. 0.3")
    if not 0 < noise_multiplier < math.inf:
        raise BudgetError(f"noise multiplier {noise_multiplier} gives no protection: choose a value above 0")


def clip_to_grid(values: NDArray[np.float32], clip_norm: float, dimension: int) -> Update:
    """Values, (dimension,), as grid integers of exact L2 norm at most `RESOLUTION`, which stands for `clip_norm`.

    Raises `ProtocolError` on another shape; NaN or infinity anywhere makes all of it zero.
    """
    scaled = _finite(values, dimension) * (RESOLUTION / clip_norm)
    norm = float(np.linalg.norm(scaled))
    shrink = min(1.0, RESOLUTION / norm) if norm else 1.0
    while True:
        steps = np.trunc(scaled * shrink).astype(np.int64)
        if _fits(steps):
            return steps.astype(np.int32)
        shrink *= 1 - 2.0**-40  # the float norm was short by a rounding error: decide by the exact one


def _finite(delta: NDArray[np.float32], dimension: int) -> NDArray[np.float64]:
    """The update in float64; one with NaN or infinity anywhere is zero as a whole."""
    if delta.shape != (dimension,):
        raise ProtocolError(f"update has shape {delta.shape}: the round's adapter needs ({dimension},)")
    values = delta.astype(np.float64)
    return values if np.isfinite(values).all() else np.zeros(dimension)


def _fits(steps: NDArray[np.int64]) -> bool:
    """Whether the exact L2 norm is at most `RESOLUTION`; Python integers cannot overflow."""
    if steps.size and (int(steps.max()) > RESOLUTION or int(steps.min()) < -RESOLUTION):
        return False
    # Below that bound a square is at most 2**56, so 64 of them fit int64; sum the partial sums exactly.
    squares = np.add.reduceat(steps * steps, np.arange(0, steps.size, 64)) if steps.size else steps
    return bool(sum(squares.tolist()) <= RESOLUTION * RESOLUTION)
