"""`local` in rounds: devices take turns, each trains privately, and the server averages what is private already.

A device's update is the output of DP-SGD on its own records (`stillroom_shared.local_mechanism`). Whatever is done with it
afterwards is post-processing: travelling as integers, the sum, the server's step, the release. So the same epsilon, for one
query, holds against readers of releases, peers, observers of the network, and the coordinator itself.

Guarantees (query level, adjacency zero-out):
    - In one federation a device trains at most `participations` times, each time under the constants of `training`, whoever
      sends the orders: `stillroom_client.separation` compares them with its ledger before it trains. An attempt that is asked
      for again after a crash of the server uses up a participation like any other, because what was answered before may have
      been seen. So one charge before the first round covers every retry.
    - The constants are those of the first order that a device joined. A coordinator that sends other ones to begin with, or
      orders of many federations, is bounded by the owner's limit over all of them, without which a device declines
      (`stillroom_client.participation`). A device whose ledger went back in time is held to what is left of it.
    - No amplification by cohort is claimed: whose turn it is, is public. That by the coins for records is in the event.
    - A device that declines, fails, or has nothing answers noise of the same distribution, drawn without reading a record.

| update | bounded to |
|---|---|
| beyond the range of the grid, +-128 in a value | that range, for all values alike a matter of post-processing |
| NaN or infinity anywhere | zero |
| wrong length or type | `ProtocolError` on the device, zero on the server |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.events import LocalGaussian
from stillroom_shared.local_mechanism import Local
from stillroom_shared.mechanism import NoPrivacy, Released, Total, Update
from stillroom_shared.randomness import Randomness
from stillroom_shared.toeplitz import require_cohorts, require_schedule


@dataclass(frozen=True, kw_only=True)
class LocalRounds:
    """A run of rounds whose devices train under `training`; it is charged as a whole, before its first round.

    Attributes:
        training: one device's DP-SGD of one round.
        rounds: of the run.
        participations: the most times that one device trains.
        separation: rounds from one turn of a device to its next; 1: everybody in every round.
        devices: how many are enrolled.

    >>> training = Local(clip_norm=0.5, noise_multiplier=2.0, sampling_rate=0.25, steps=3, records=16, dimension=2)
    >>> run = LocalRounds(training=training, rounds=8, participations=4, separation=2, devices=10)
    >>> total = sum(run.bound(np.array([0.5, -1.0], np.float32)).astype(np.int64) for _ in range(5))
    >>> run.release(total, Randomness()).update.tolist(), run.event().releases, run.participation_event().releases
    ([0.5, -1.0], 12, 3)
    """

    training: Local
    rounds: int
    participations: int
    separation: int
    devices: int
    name: Literal["local"] = "local"
    unit: Literal["query"] = "query"

    def __post_init__(self) -> None:
        require_schedule(self.rounds, self.participations, self.separation)
        require_cohorts(self.separation, self.devices)

    @property
    def dimension(self) -> int:
        """Number of adapter values."""
        return self.training.dimension

    @property
    def length(self) -> int:
        """The adapter values and nothing else."""
        return self.dimension

    def bound(self, delta: NDArray[np.float32]) -> Update:
        """Round a private update, (dimension,), to the grid on which it travels: a sum of integers is exact in any order."""
        return self._transport.bound(delta)

    def admit(self, update: NDArray[np.integer]) -> bool:
        """True when length and type hold."""
        return self._transport.admit(update)

    def release(self, total: Total, randomness: Randomness) -> Released:
        """The mean over the devices whose turn it is, to within one of them; the noise is in it already."""
        return self._transport.release(total, randomness)

    def event(self) -> LocalGaussian:
        """What the whole run costs a query of any device, against everybody; charged once, before the first round."""
        return self.training.event(participations=self.participations, rounds=self.rounds)

    def participation_event(self) -> LocalGaussian:
        """What one attempt at one round costs, for the device's own ledger."""
        return self.training.event()

    @property
    def _transport(self) -> NoPrivacy:
        return NoPrivacy(sampling_rate=1 / self.separation, devices=self.devices, dimension=self.dimension)
