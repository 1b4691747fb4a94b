"""Who takes part in a round: an independent coin for each enrolled device, or whose turn it is.

Poisson sampling, because that is what the accountant amplifies; a cohort of fixed size is another mechanism. The coin's
probability is the exact rational value of the sampling rate, from the cryptographic generator. The rotation is for noise that
is correlated between rounds (`stillroom_shared.correlated`), where nothing is amplified and what counts is that a device's
participations are few and far apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from stillroom_shared.errors import BudgetError
from stillroom_shared.randomness import Randomness


def poisson_cohort(enrolled: Sequence[str], sampling_rate: float, randomness: Randomness) -> tuple[str, ...]:
    """The sampled devices, in order; possibly none.

    >>> len(poisson_cohort([f"device-{i}" for i in range(1_000)], 0.2, Randomness(seed="toy")))
    213
    """
    numerator, denominator = float(sampling_rate).as_integer_ratio()
    return tuple(name for name in enrolled if randomness.bernoulli(numerator, denominator))


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Enrolled devices in `separation` groups that take turns: round t is the turn of group (t - 1) mod separation.

    Groups are dealt from the names in the order of their hashes, so their sizes differ by at most one and everybody can
    compute them. They depend on nothing private: who answers, who failed and what was retried changes no later cohort. A
    device's rounds are thus known in advance, exactly `separation` apart, and at most `participations` of them.

    >>> rotation = Rotation(federation="toy", enrolled=("ada", "bob", "cyd", "dan", "eve"), separation=2, participations=2)
    >>> [rotation.cohort(number) for number in (1, 2, 3, 4)]
    [('ada', 'cyd', 'eve'), ('bob', 'dan'), ('ada', 'cyd', 'eve'), ('bob', 'dan')]
    """

    federation: str
    enrolled: tuple[str, ...]
    separation: int
    participations: int

    def __post_init__(self) -> None:
        if not 1 <= self.separation <= len(self.enrolled):
            raise BudgetError(
                f"separation {self.separation} for {len(self.enrolled)} devices: choose from 1 to the number of devices"
            )
        if len(set(self.enrolled)) != len(self.enrolled):
            raise BudgetError("enrolled: a name occurs twice, and a device in two groups breaks the separation")

    def cohort(self, round_number: int) -> tuple[str, ...]:
        """The devices whose turn it is, in the order of enrolment; `BudgetError` outside the rounds that the cap allows."""
        last = self.separation * self.participations
        if not 1 <= round_number <= last:
            raise BudgetError(
                f"round {round_number} would be participation {(round_number - 1) // self.separation + 1} of its devices: with "
                f"{self.participations} participations there are rounds 1 to {last}"
            )
        group = (round_number - 1) % self.separation
        return tuple(name for name in self.enrolled if self._groups[name] == group)

    @cached_property
    def _groups(self) -> dict[str, int]:
        ranked = sorted(self.enrolled, key=self._rank)
        return {name: place % self.separation for place, name in enumerate(ranked)}

    def _rank(self, name: str) -> bytes:
        return hashlib.sha256(json.dumps(["rotation", self.federation, name]).encode()).digest()
