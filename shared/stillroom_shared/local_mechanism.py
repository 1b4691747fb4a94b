"""The `local` mechanism: query-level DP-SGD on the device, so that what leaves it is private already.

In each of `steps` steps the device tosses a coin for each of its records, clips the gradient of each chosen record to the
integer grid, sums them, adds exact discrete Gaussian noise and divides by a public number (Abadi et al. 2016,
arXiv 1607.00133). The update is the change of the adapter after the last step: a function of the noisy sums alone. `descend`
is the whole of it; where gradients come from is an argument: Opacus on a device, one batched pass in a simulation.

Unit: one query of one device, that is the one record mined from it (`RECORDS_PER_QUERY` in `stillroom_client.records`).
Adjacency is zero-out: the query keeps its place among the device's records and contributes the zero vector. The device's
documents are fixed; they, and the topic that all its queries share, are outside of the unit. There is no user-level claim.

Guarantees:
    - `bound` returns integers whose exact L2 norm is at most `RESOLUTION`, so one record moves a sum by at most that.
    - Sampling rate, steps, denominator and number of coins are public constants: none depends on what the device holds.
    - A device without records, and an empty batch, release noise at the same cost. It is, bit for bit, what `noise_alone`
      makes of the same stream, from whatever adapter: the change is added up from zero. A difference of two iterates would be
      rounded to the grid of the adapter's own floats, so that a huge adapter told which devices started from it.
    - Which records were chosen never leaves the device, so amplification by that choice counts against everybody, the
      coordinator included. Whether the device is in a round's cohort is another matter and is not in this event.
    - One participation is one event: its steps are charged together, or none of them.

| record's gradient | counts as |
|---|---|
| longer than the clip norm | scaled down onto it, rounded towards zero |
| zero, or NaN or infinity anywhere | zero |
| wrong length | `ProtocolError` |

A device that has asked more than `records` queries trains on the latest. There, zero-out is not the same as never having
asked: then the query before the oldest would take the free place, which is a change of two units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.accounting import smallest_noise_multiplier
from stillroom_shared.errors import BudgetError
from stillroom_shared.events import LocalGaussian
from stillroom_shared.mechanism import RESOLUTION, Total, Update, clip_to_grid, require_clip_and_noise
from stillroom_shared.noise import discrete_gaussian
from stillroom_shared.randomness import Randomness

_MOST_RECORDS = 1 << 20  # their sum and the noise stay far inside int64


@dataclass(frozen=True, kw_only=True)
class Local:
    """One device's DP-SGD of one round: public constants, the same for every device.

    Attributes:
        clip_norm: largest L2 norm of a record's gradient.
        noise_multiplier: standard deviation of the noise of one step / sensitivity of its sum.
        sampling_rate: probability with which each record takes part in a step, in (0, 1].
        steps: noisy sums of one round.
        records: most that a device trains on, its latest.
        dimension: trained values of the adapter.

    >>> local = Local(clip_norm=0.5, noise_multiplier=2.0, sampling_rate=0.25, steps=3, records=16, dimension=3)
    >>> (local.bound(np.array([3.0, 0.0, 4.0], np.float32)) / RESOLUTION).round(6).tolist(), local.denominator
    ([0.6, 0.0, 0.8], 4.0)
    >>> local.sigma == 2 * RESOLUTION, local.event().releases, local.event(participations=5).releases
    (True, 3, 15)
    """

    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    records: int
    dimension: int

    def __post_init__(self) -> None:
        require_clip_and_noise(self.clip_norm, self.noise_multiplier)
        if self.steps < 1 or not 1 <= self.records <= _MOST_RECORDS:
            raise BudgetError(
                f"{self.steps} steps over at most {self.records} records: choose at least one of each, and at most "
                f"{_MOST_RECORDS:,} records"
            )
        self.event()  # refuses an impossible noise multiplier, sampling rate or dimension

    @property
    def sensitivity(self) -> int:
        """L2 sensitivity of the sum of one step under zero-out of a record, in grid steps."""
        return RESOLUTION

    @property
    def sigma(self) -> int:
        """Standard deviation of the noise in grid steps, rounded up."""
        return math.ceil(self.noise_multiplier * self.sensitivity)

    @property
    def denominator(self) -> float:
        """Expected batch of a device that holds `records` records: public and fixed."""
        return self.sampling_rate * self.records

    def sample(self, randomness: Randomness) -> list[bool]:
        """One coin for each of the `records` places, taken or not, so that the coins tell nothing of their number."""
        numerator, denominator = float(self.sampling_rate).as_integer_ratio()
        return [randomness.bernoulli(numerator, denominator) for _ in range(self.records)]

    def bound(self, gradient: NDArray[np.float32]) -> Update:
        """One record's gradient, (dimension,), clipped to `clip_norm` and rounded towards zero."""
        return clip_to_grid(gradient, self.clip_norm, self.dimension)

    def release(self, total: Total, randomness: Randomness) -> NDArray[np.float64]:
        """The noisy mean gradient of a step, (dimension,); what follows is post-processing."""
        noisy = total + discrete_gaussian(self.sigma, self.dimension, randomness)
        return noisy.astype(np.float64) * (self.clip_norm / RESOLUTION / self.denominator)

    def event(self, *, participations: int = 1, rounds: int = 1) -> LocalGaussian:
        """What so many participations cost a query of the device, against everybody; every step of them."""
        return LocalGaussian(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps,
            participations=participations,
            rounds=rounds,
            sigma=self.sigma,
            dimension=self.dimension,
        )


Record = TypeVar("Record")
Gradients = Callable[[NDArray[np.float32], Sequence[Sequence[Record]]], Iterable[tuple[int, NDArray[np.float32]]]]
"""From each device's adapter values, (devices, dimension), and its chosen records, to (device, gradient) of every record
whose gradient there is, in any order; each gradient, (dimension,), of its own record alone. One that is left out is zero."""


def descend(
    mechanism: Local,
    start: NDArray[np.float32],
    records: Sequence[Sequence[Record]],
    gradients: Gradients[Record],
    *,
    learning_rate: float,
    randomness: Sequence[Randomness],
) -> NDArray[np.float32]:
    """DP-SGD on each device, side by side: the change of its adapter values, (devices, dimension), private already.

    What this costs must be in each device's ledger before. A device without records gets noise alone.

    >>> local = Local(clip_norm=1.0, noise_multiplier=1e-6, sampling_rate=1.0, steps=2, records=2, dimension=1)
    >>> def towards(values, chosen):  # the gradient of (value - record)^2 / 2
    ...     return [(i, values[i] - record) for i, own in enumerate(chosen) for record in own]
    >>> records, streams = [[3.0, 0.5], [0.24], []], [Randomness(seed=f"toy {i}") for i in range(3)]
    >>> made = descend(local, np.zeros(1, np.float32), records, towards, learning_rate=1.0, randomness=streams)
    >>> [round(float(value), 3) for value in made[:, 0]]
    [1.125, 0.18, 0.0]

    Args:
        start: adapter values, (dimension,), from which every device starts.
        records: of each device, the latest last; what is beyond `mechanism.records` is left out.
        learning_rate: step along the noisy mean gradient.
        randomness: of each device, for its coins and its noise.
    """
    latest = [own[-mechanism.records :] for own in records]
    changes = np.zeros((len(records), mechanism.dimension))  # (devices, dimension)
    for _ in range(mechanism.steps):
        chosen = [
            [record for record, taken in zip(own, mechanism.sample(stream), strict=False) if taken]
            for own, stream in zip(latest, randomness, strict=True)
        ]
        totals = np.zeros(changes.shape, np.int64)
        for device, gradient in gradients(_finite(start + changes), chosen):
            totals[device] += mechanism.bound(gradient)
        for device, stream in enumerate(randomness):
            changes[device] -= learning_rate * mechanism.release(totals[device], stream)
    with np.errstate(over="ignore"):  # too long a step ends in infinity, with records or without
        return changes.astype(np.float32)


def _finite(iterates: NDArray[np.float64]) -> NDArray[np.float32]:
    """As float32 that an adapter can hold, (devices, dimension): a source of gradients that refuses what is not finite would
    make a device fail, and answer afresh, that a device without records does not."""
    largest = float(np.finfo(np.float32).max)
    return np.clip(np.nan_to_num(iterates), -largest, largest).astype(np.float32)


def noise_alone(mechanism: Local, *, learning_rate: float, randomness: Randomness) -> NDArray[np.float32]:
    """What a device without records answers from any adapter, (dimension,): no record is read, so it costs nothing."""
    nothing: Sequence[Sequence[None]] = [()]
    start = np.zeros(mechanism.dimension, np.float32)
    change = descend(
        mechanism, start, nothing, lambda values, chosen: (), learning_rate=learning_rate, randomness=[randomness]
    )
    return np.asarray(change[0], np.float32)


def calibrate_local(
    *,
    target_epsilon: float,
    delta: float,
    rounds: int,
    clip_norm: float,
    sampling_rate: float,
    steps: int,
    records: int,
    dimension: int,
) -> Local:
    """The `Local` mechanism with the least noise that keeps a device in `rounds` rounds within the target.

    `rounds` is the number of rounds a device may take part in, not the number of rounds of the federation.

    Raises `BudgetError` with the reason when no noise multiplier up to 1,000 does.
    """
    if rounds < 1 or steps < 1:
        raise BudgetError(f"{rounds} rounds of {steps} steps: plan at least one of each")
    try:
        multiplier = smallest_noise_multiplier(
            target_epsilon=target_epsilon,
            delta=delta,
            rounds=rounds * steps,
            sampling_rate=sampling_rate,
            dimension=dimension,
            resolution=RESOLUTION,
        )
    except BudgetError as error:
        raise BudgetError(f"{rounds} rounds of {steps} local steps, each step one release: {error}") from error
    return Local(
        clip_norm=clip_norm,
        noise_multiplier=multiplier,
        sampling_rate=sampling_rate,
        steps=steps,
        records=records,
        dimension=dimension,
    )
