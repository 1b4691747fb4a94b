"""What a sequence of releases costs: events, and epsilon for them at a given delta.

Events compose through `dp-accounting`: privacy loss distributions (Sommer et al. 2019; Koskela et al. 2020), discretized
pessimistically in both directions of add-or-remove, and Renyi DP (Mironov 2017, arXiv 1702.07476; Poisson-sampled as in
Zhu and Wang 2019) as a cross-check that must never be smaller. Adjacency is zero-out: a device stays enrolled and its
contribution becomes zero; a Poisson-sampled sum then has the dominating pair of add-or-remove.

Guarantees:
    - The noise that is really added is discrete. `SampledGaussian.distance` bounds how far it is from a rounded Gaussian;
      by P[M] <= P[R] + tau on both neighbours, (epsilon, delta') for R is (epsilon, delta' + (1 + e^epsilon) tau) for M,
      and `epsilon` solves for exactly that delta.
    - The set of events is closed: what is not known here is refused, never guessed.

| case | result |
|---|---|
| no event | 0.0 |
| an `Unprotected` event, hardly any noise, or a grid too coarse to certify the delta | infinity |
| noise multiplier not above 0, sampling rate outside (0, 1] | `BudgetError` at construction |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

from stillroom_shared.errors import BudgetError
from stillroom_shared.noise import rounding_distance

AccountantName = Literal["PLD", "RDP"]
Unit = Literal["user", "query"]
"""What an epsilon is about: everything on one device, or one query of it."""
_LARGEST_MULTIPLIER = 2.0**20  # sums of noise and updates stay far inside int64

# Orders near 1 do not converge for Poisson sampling at small noise; a dense grid up to 12 decides everything else.
_RDP_ORDERS = [2 + step / 20 for step in range(200)] + list(range(12, 65)) + [128, 256, 512, 1024]


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """One noisy sum over a Poisson cohort.

    Attributes:
        noise_multiplier: standard deviation of the noise / L2 sensitivity of the sum.
        sampling_rate: probability with which each enrolled device takes part, in (0, 1]; 1 means no amplification.
        sigma: standard deviation of the discrete Gaussian, in grid steps.
        dimension: length of the released vector.
    """

    noise_multiplier: float
    sampling_rate: float
    sigma: int
    dimension: int
    releases: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _require_noise(self.noise_multiplier, self.sigma, self.dimension)
        _require_rate(self.sampling_rate)

    @property
    def distance(self) -> float:
        """Total variation distance to the mechanism that is accounted for."""
        return rounding_distance(self.sigma, self.dimension)

    def without_sampling(self) -> SampledGaussian:
        """The same release as seen by somebody who knows the cohort: amplification does not count."""
        return SampledGaussian(
            noise_multiplier=self.noise_multiplier, sampling_rate=1.0, sigma=self.sigma, dimension=self.dimension
        )


@dataclass(frozen=True, kw_only=True)
class CorrelatedGaussian:
    """All rows of one run with correlated noise (`stillroom_shared.correlated`): a single Gaussian release, no sampling.

    It is charged once, before the first row, and covers every row whether released or not. The discrete noise is drawn
    afresh for each value of each row; row by row the coupling with rounded Gaussian noise fails with at most the distance
    of one row, whatever came before, so the distance of a run is that of rounds * dimension independent values.

    Attributes:
        noise_multiplier: standard deviation of the noise / L2 sensitivity of all rows together.
        rounds: number of rows.
        participations: the most rows to which one device contributes an update.
        separation: the fewest rounds from one participation of a device to its next; the sensitivity rests on both.
        sigma: standard deviation of the discrete Gaussian in each row, in grid steps.
        dimension: length of a row.

    >>> run = CorrelatedGaussian(
    ...     noise_multiplier=2.0, rounds=64, participations=8, separation=8, sigma=2**40, dimension=9_216)
    >>> plain = SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, sigma=2**40, dimension=9_216)
    >>> round(epsilon([run], 1e-5), 2), round(epsilon([plain], 1e-5), 2)
    (1.99, 1.99)
    """

    noise_multiplier: float
    rounds: int
    participations: int
    separation: int
    sigma: int
    dimension: int
    sampling_rate: ClassVar[float] = 1.0
    releases: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _require_noise(self.noise_multiplier, self.sigma, self.dimension)
        if min(self.rounds, self.participations, self.separation) < 1:
            raise BudgetError(
                f"{self.rounds} rounds, {self.participations} participations, separation {self.separation}: "
                "each must be at least 1"
            )

    @property
    def distance(self) -> float:
        """Total variation distance to the mechanism that is accounted for."""
        return rounding_distance(self.sigma, self.rounds * self.dimension)

    def without_sampling(self) -> CorrelatedGaussian:
        """The same: nothing is sampled."""
        return self


@dataclass(frozen=True, kw_only=True)
class LocalGaussian:
    """All noisy sums of DP-SGD on one device (`stillroom_shared.local_mechanism`); what it costs one query of that device.

    They compose like independent Poisson-sampled releases: each step draws its own coins and its own noise, and may depend on
    the steps before. The coins choose records, never leave the device and so amplify against everybody.

    Attributes:
        noise_multiplier: standard deviation of the noise of one step / L2 sensitivity of its sum.
        sampling_rate: probability with which each record takes part in a step, in (0, 1].
        steps: noisy sums of one participation.
        participations: the most times that the device trains; its own ledger holds it to that.
        rounds: of the federation, in which these lie; costs nothing more.
        sigma: standard deviation of the discrete Gaussian of one step, in grid steps.
        dimension: length of a sum.

    >>> run = LocalGaussian(
    ...     noise_multiplier=1.0, sampling_rate=0.1, steps=4, participations=25, rounds=50, sigma=2**28, dimension=9_216)
    >>> step = SampledGaussian(noise_multiplier=1.0, sampling_rate=0.1, sigma=2**28, dimension=9_216)
    >>> epsilon([run], 1e-5) == epsilon([step] * 100, 1e-5), run.without_sampling() == run
    (True, True)
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    participations: int
    rounds: int
    sigma: int
    dimension: int

    def __post_init__(self) -> None:
        _require_noise(self.noise_multiplier, self.sigma, self.dimension)
        _require_rate(self.sampling_rate)
        if min(self.steps, self.participations, self.rounds) < 1:
            raise BudgetError(
                f"{self.steps} steps, {self.participations} participations, {self.rounds} rounds: each must be at least 1"
            )

    @property
    def releases(self) -> int:
        """How many noisy sums there are."""
        return self.steps * self.participations

    @property
    def distance(self) -> float:
        """Total variation distance to the mechanism that is accounted for."""
        return min(1.0, self.releases * rounding_distance(self.sigma, self.dimension))

    def without_sampling(self) -> LocalGaussian:
        """The same: cohorts count for nothing, and nobody sees which records were drawn."""
        return self


@dataclass(frozen=True, kw_only=True)
class Unprotected:
    """A release without noise: epsilon is infinite from here on."""

    dimension: int


def _require_noise(noise_multiplier: float, sigma: int, dimension: int) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0 and sigma >= 1):
        raise BudgetError(f"noise multiplier {noise_multiplier} gives no protection: choose a value above 0")
    if dimension < 1 or noise_multiplier > _LARGEST_MULTIPLIER:
        raise BudgetError(
            f"noise multiplier {noise_multiplier} on {dimension} values: choose at most {_LARGEST_MULTIPLIER:g}, "
            "and at least one value"
        )


def _require_rate(sampling_rate: float) -> None:
    if not 0 < sampling_rate <= 1:
        raise BudgetError(f"sampling rate {sampling_rate} is no probability: choose a value in (0, 1]")


Gaussian = SampledGaussian | CorrelatedGaussian | LocalGaussian
Event = Gaussian | Unprotected
_KINDS: dict[str, type[Gaussian] | type[Unprotected]] = {
    "correlated-gaussian": CorrelatedGaussian,
    "local-gaussian": LocalGaussian,
    "sampled-gaussian": SampledGaussian,
    "unprotected": Unprotected,
}


def event_to_json(event: Event) -> dict[str, Any]:
    """A flat JSON object for the ledger; `event_from_json` is its inverse."""
    kind = next(name for name, known in _KINDS.items() if type(event) is known)
    return {"kind": kind, **vars(event)}


def event_from_json(fields: Mapping[str, Any]) -> Event:
    """Read an event back; an unknown kind or field raises `BudgetError`."""
    kind = _KINDS.get(str(fields.get("kind")))
    if kind is None:
        raise BudgetError(f"event kind {fields.get('kind')!r} is unknown: known are {sorted(_KINDS)}")
    try:
        return kind(**{k: v for k, v in fields.items() if k != "kind"})
    except TypeError as error:
        raise BudgetError(f"event {dict(fields)} does not have the fields of its kind: {error}") from error


def in_one_unit(events: Sequence[Event]) -> tuple[Unit, list[Event]]:
    """The unit that all events together are about, and what each of them costs that unit.

    A user, unless a `LocalGaussian` is among them, which promises nothing for a user as a whole. Then it is a query, and an
    event at user level counts with half its noise: a query that is zeroed out turns the device's bounded update into another
    one, not into zero, and two of those are up to twice the sensitivity apart. For that pair sampling is not credited.

    >>> user = SampledGaussian(noise_multiplier=4.0, sampling_rate=1.0, sigma=2**30, dimension=9)
    >>> query = LocalGaussian(
    ...     noise_multiplier=2.0, sampling_rate=0.1, steps=1, participations=1, rounds=1, sigma=2**30, dimension=9)
    >>> in_one_unit([user]) == ("user", [user])
    True
    >>> unit, events = in_one_unit([user, query])
    >>> unit, [event.noise_multiplier for event in events]
    ('query', [2.0, 2.0])
    """
    if not any(isinstance(event, LocalGaussian) for event in events):
        return "user", list(events)
    return "query", [_of_a_query(event) for event in events]


def _of_a_query(event: Event) -> Event:
    if isinstance(event, LocalGaussian | Unprotected):
        return event
    return replace(event.without_sampling(), noise_multiplier=event.noise_multiplier / 2)


def epsilon(events: Iterable[Event], delta: float, accountant: AccountantName = "PLD") -> float:
    """The epsilon that all events together cost at this delta, for readers who see only what was released.

    >>> step = SampledGaussian(noise_multiplier=1.0, sampling_rate=0.1, sigma=2**28, dimension=9_216)
    >>> round(epsilon([step] * 100, 1e-5), 2), round(epsilon([step] * 100, 1e-5, "RDP"), 2)
    (7.05, 7.9)
    >>> epsilon([], 1e-5), epsilon([step, Unprotected(dimension=1)], 1e-5)
    (0.0, inf)
    """
    if not 0 < delta < 1:
        raise BudgetError(f"delta {delta} is no probability: choose about 1 / (10 * enrolled devices)")
    counts = Counter(events)
    if not counts:
        return 0.0
    if any(isinstance(event, Unprotected) for event in counts):
        return math.inf
    if any(_hopeless(event, count * event.releases) for event, count in counts.items() if isinstance(event, Gaussian)):
        return math.inf
    sampled = tuple(sorted(((e, n) for e, n in counts.items() if isinstance(e, Gaussian)), key=repr))
    return _epsilon(sampled, delta, accountant)


def _hopeless(event: Gaussian, count: int) -> bool:
    """Whether noise is so small that epsilon is in the hundreds: infinity is said at once, a number would take minutes.

    Infinity is always a sound answer; loss distributions of such events fill gigabytes.
    """
    if event.sampling_rate == 1:
        return event.noise_multiplier / math.sqrt(count) < 0.05
    return event.noise_multiplier < 0.25


@lru_cache(maxsize=4096)
def _epsilon(counts: tuple[tuple[Gaussian, int], ...], delta: float, accountant: AccountantName) -> float:
    # Imported here: devices hold events and never compose them, and the library takes a second to load.
    import dp_accounting
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    composed = PLDAccountant() if accountant == "PLD" else RdpAccountant(_RDP_ORDERS)
    for event, count in counts:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        # At rate 1 both spellings mean the same; the plain one has a closed form.
        plain = event.sampling_rate == 1
        composed.compose(
            gaussian if plain else dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian),
            count * event.releases,
        )
    distance = sum(event.distance * count for event, count in counts)
    remaining = delta
    for _ in range(32):
        found = float(composed.get_epsilon(remaining))
        needed = remaining + (1 + math.exp(min(found, 700.0))) * distance
        if needed <= delta:
            return found
        remaining = delta - (needed - remaining) * 1.001
        if remaining <= 0:
            break
    return math.inf  # the grid is too coarse to certify anything at this delta


def smallest_noise_multiplier(
    *, target_epsilon: float, delta: float, rounds: int, sampling_rate: float, dimension: int, resolution: int
) -> float:
    """The smallest noise multiplier (to 0.1%) that keeps `rounds` releases within the target, by PLD.

    Raises `BudgetError` when even a multiplier of 1,000 does not.
    """
    if target_epsilon <= 0 or rounds < 1:
        raise BudgetError(f"target epsilon {target_epsilon} over {rounds} rounds: both must be positive")

    def cost(multiplier: float) -> float:
        event = SampledGaussian(
            noise_multiplier=multiplier,
            sampling_rate=sampling_rate,
            sigma=math.ceil(multiplier * resolution),
            dimension=dimension,
        )
        return epsilon([event] * rounds, delta)

    high = 1_000.0
    if cost(high) > target_epsilon:
        raise BudgetError(
            f"epsilon {target_epsilon} at delta {delta} cannot be met by {rounds} rounds at sampling rate {sampling_rate}: "
            "plan fewer rounds, a lower sampling rate or a larger epsilon"
        )
    # From above: much noise is quick to account for, too little noise over many rounds takes minutes.
    while cost(high / 2) <= target_epsilon:
        high /= 2
    low = high / 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > target_epsilon else (low, middle)
    return high
