"""What a sequence of releases costs: events, and epsilon for them at a given delta.

Events compose through `dp-accounting`: privacy loss distributions (Sommer et al. 2019; Koskela et al. 2020), discretized
pessimistically in both directions of add-or-remove, and Renyi DP (Mironov 2017, arXiv 1702.07476; Poisson-sampled as in
Zhu and Wang 2019) as a cross-check that must never be smaller. Adjacency is zero-out: a device stays enrolled and its
contribution becomes zero; a Poisson-sampled sum then has the dominating pair of add-or-remove.

A search over settings is one event, `Selection`: the best of a random number of trials, as seen by whoever learns of the best
alone. Only Renyi DP bounds it (`stillroom_shared.repetitions`), so whatever is composed with it is composed by Renyi DP too:
every mechanism here has a Renyi bound, Renyi divergences of adaptive composition add up, and the result is never below what
PLD would say of the parts (`accountant_for` tells which one a figure comes from).

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
| a `Selection` among trials without noise, without events, or that are searches themselves | `BudgetError` at construction |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import BudgetError
from stillroom_shared.noise import rounding_distance
from stillroom_shared.repetitions import NegativeBinomial, Poisson, Repetitions

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
Trial = tuple[tuple[Gaussian, int], ...]
"""The events of one trial, each with how often it occurs: all rounds, and the private evaluation that scores it."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The best of a random number of trials (`stillroom_shared.repetitions`). Charged once, before the first trial.

    Candidates that cost differently stand side by side; a trial draws one of them blindly, so it costs at most the dearest
    one at each Renyi order. Noise is discrete: K trials are within K times `distance` of one of them from what is accounted
    for, given K, hence the mixture over K within `repetitions.mean` times it.

    Attributes:
        trials: what a trial may cost, once for each candidate that costs something else; make it with `selection_of`.
        repetitions: the distribution of the number of trials K.
        seen: False: only the best is seen, and neither K nor any other trial. True: every trial is seen, which is plain
            composition. K is random, so epsilon is that of the K that is passed with a hundredth of delta only.

    >>> step = SampledGaussian(noise_multiplier=16.0, sampling_rate=0.5, sigma=2**32, dimension=100)
    >>> search = selection_of([[step] * 10], Poisson(mean=4.0))
    >>> once, naive, best, seen = [step] * 10, [step] * 40, [search], [search.without_sampling()]
    >>> [round(epsilon(events, 1e-5), 2) for events in (once, naive, best, seen)]
    [0.34, 0.72, 0.6, 3.58]
    """

    trials: tuple[Trial, ...]
    repetitions: Repetitions
    seen: bool = False

    def __post_init__(self) -> None:
        if not self.trials or not all(self.trials):
            raise BudgetError("a search needs candidates, and events for each: a trial without events looks at nothing")
        for event, count in (part for trial in self.trials for part in trial):
            # Of a query's releases a score that is about users would be another unit: that search is not accounted for yet.
            if not isinstance(event, SampledGaussian | CorrelatedGaussian) or type(count) is not int or count < 1:
                raise BudgetError(
                    f"a trial that makes {event} {count} times cannot be selected from: give noisy releases at user level, at "
                    "least one of each; without noise no number of trials is private"
                )

    def __str__(self) -> str:
        return f"a search for the best of a number of trials that is drawn from {self.repetitions.words}"

    @property
    def distance(self) -> float:
        """Total variation distance of one trial to what is accounted for, of the candidate where it is largest."""
        return max(sum(event.distance * count for event, count in trial) for trial in self.trials)

    def without_sampling(self) -> Selection:
        """The same search for somebody who sees every trial, and who took part in it."""
        plain = [[(event.without_sampling(), count) for event, count in trial] for trial in self.trials]
        return replace(self, trials=tuple(dict.fromkeys(_trial(trial) for trial in plain)), seen=True)


def selection_of(candidates: Iterable[Iterable[Event]], repetitions: Repetitions) -> Selection:
    """The event of a search, given the events of one trial of each candidate, in any order.

    Raises `BudgetError` where a trial has no event, or one that selection cannot bound.
    """
    trials = [_trial(Counter(events).items()) for events in candidates]
    return Selection(trials=tuple(sorted(dict.fromkeys(trials), key=repr)), repetitions=repetitions)


def _trial(parts: Iterable[tuple[Any, int]]) -> Trial:
    counts: Counter[Any] = Counter()
    for event, count in parts:
        counts[event] += count
    return tuple(sorted(counts.items(), key=repr))


Event = Gaussian | Unprotected | Selection
_KINDS: dict[str, type[Gaussian] | type[Unprotected]] = {
    "correlated-gaussian": CorrelatedGaussian,
    "local-gaussian": LocalGaussian,
    "sampled-gaussian": SampledGaussian,
    "unprotected": Unprotected,
}
_REPETITIONS: dict[str, type[Repetitions]] = {"negative-binomial": NegativeBinomial, "poisson": Poisson}


def event_to_json(event: Event) -> dict[str, Any]:
    """A JSON object for the ledger; `event_from_json` is its inverse."""
    if isinstance(event, Selection):
        drawn = next(name for name, known in _REPETITIONS.items() if type(event.repetitions) is known)
        return {
            "kind": "selection",
            "trials": [[[event_to_json(part), count] for part, count in trial] for trial in event.trials],
            "repetitions": {"kind": drawn, **vars(event.repetitions)},
            "seen": event.seen,
        }
    kind = next(name for name, known in _KINDS.items() if type(event) is known)
    return {"kind": kind, **vars(event)}


def event_from_json(fields: Mapping[str, Any]) -> Event:
    """Read an event back; an unknown kind or field raises `BudgetError`."""
    given = {name: value for name, value in fields.items() if name != "kind"}
    try:
        if fields.get("kind") == "selection":
            return _selection_from_json(**given)
        kind = _KINDS.get(str(fields.get("kind")))
        if kind is None:
            raise BudgetError(
                f"event kind {fields.get('kind')!r} is unknown: known are {sorted([*_KINDS, 'selection'])}"
            )
        return kind(**given)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BudgetError(f"event {dict(fields)} does not have the fields of its kind: {error}") from error


def _selection_from_json(trials: Any, repetitions: Mapping[str, Any], seen: bool) -> Selection:
    drawn = _REPETITIONS[repetitions["kind"]](**{k: v for k, v in repetitions.items() if k != "kind"})
    read = tuple(tuple((event_from_json(part), count) for part, count in trial) for trial in trials)
    return Selection(trials=read, repetitions=drawn, seen=seen is True)  # type: ignore[arg-type]  # checked at birth


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
    if isinstance(event, Selection):
        halved = [[(_of_a_query(part), count) for part, count in trial] for trial in event.trials]
        return replace(event, trials=tuple(dict.fromkeys(_trial(trial) for trial in halved)))
    return replace(event.without_sampling(), noise_multiplier=event.noise_multiplier / 2)


def epsilon(events: Iterable[Event], delta: float, accountant: AccountantName = "PLD") -> float:
    """The epsilon that all events together cost at this delta, for readers who see only what was released.

    `accountant` is a wish: with a `Selection` it is Renyi DP, as `accountant_for` says.

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
    searches = sorted(((e, n) for e, n in counts.items() if isinstance(e, Selection)), key=repr)
    plain = {event: count for event, count in counts.items() if isinstance(event, Gaussian)}
    seen, tail = [], delta / 100 / max(1, sum(count for search, count in searches if search.seen))
    for search, count in searches:
        if search.seen:
            seen.append((search.trials, count * search.repetitions.most(tail)))
    apart = any(search.seen for search, _ in searches) * delta / 100
    for trials, times in seen:
        if len(trials) == 1:  # plain composition: any accountant adds it up
            for event, count in trials[0]:
                plain[event] = plain.get(event, 0) + times * count
    several = [(trials, times) for trials, times in seen if len(trials) > 1]
    hidden = [(search, count) for search, count in searches if not search.seen]
    inner = [(e, n * times) for trials, times in several for trial in trials for e, n in trial]
    inner += [(e, n) for search, _ in hidden for trial in search.trials for e, n in trial]
    if any(_hopeless(event, count * event.releases) for event, count in [*plain.items(), *inner]):
        return math.inf
    gaussians = tuple(sorted(plain.items(), key=repr))
    chosen = accountant_for(counts, accountant)
    return _epsilon(gaussians, tuple(several), tuple(hidden), delta - apart, chosen)


def accountant_for(events: Iterable[Event], wish: AccountantName = "PLD") -> AccountantName:
    """Which accountant the composition of these events needs: PLD knows no bound for a search."""
    searches = [event for event in events if isinstance(event, Selection)]
    return "RDP" if any(not search.seen or len(search.trials) > 1 for search in searches) else wish


def _hopeless(event: Gaussian, count: int) -> bool:
    """Whether noise is so small that epsilon is in the hundreds: infinity is said at once, a number would take minutes.

    Infinity is always a sound answer; loss distributions of such events fill gigabytes.
    """
    if event.sampling_rate == 1:
        return event.noise_multiplier / math.sqrt(count) < 0.05
    return event.noise_multiplier < 0.25


@lru_cache(maxsize=4096)
def _epsilon(
    counts: Trial,
    several: tuple[tuple[tuple[Trial, ...], int], ...],
    hidden: tuple[tuple[Selection, int], ...],
    delta: float,
    accountant: AccountantName,
) -> float:
    """Solve for epsilon: `counts` composed, `several` of dearest trials, and searches of which only the best is seen."""
    distance = sum(event.distance * count for event, count in counts)
    distance += sum(max(sum(e.distance * n for e, n in trial) for trial in trials) * times for trials, times in several)
    distance += sum(search.distance * search.repetitions.mean * count for search, count in hidden)
    if accountant == "PLD":
        composed = _compose(counts, "PLD")
        at = composed.get_epsilon
    else:
        from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

        orders = np.array(_RDP_ORDERS, np.float64)
        total = _renyi(counts)
        total = total + sum(_dearest(trials) * times for trials, times in several)
        total = total + sum(search.repetitions.rdp(orders, _dearest(search.trials)) * count for search, count in hidden)

        def at(delta: float) -> float:
            return float(compute_epsilon(orders, total, delta)[0])

    remaining = delta
    for _ in range(32):
        found = float(at(remaining))
        needed = remaining + (1 + math.exp(min(found, 700.0))) * distance
        if needed <= delta:
            return found
        remaining = delta - (needed - remaining) * 1.001
        if remaining <= 0:
            break
    return math.inf  # the grid is too coarse to certify anything at this delta


def _dearest(trials: Iterable[Trial]) -> NDArray[np.float64]:
    """Renyi divergence of one trial at each order, whichever candidate it draws."""
    return np.asarray(np.max([_renyi(trial) for trial in trials], axis=0), np.float64)


@lru_cache(maxsize=1024)
def _renyi(counts: Trial) -> NDArray[np.float64]:
    """Renyi divergence of these events together, in either direction of add-or-remove, at each of `_RDP_ORDERS`."""
    return np.array(_compose(counts, "RDP")._rdp, np.float64)  # the library composes them, and shows epsilons only


def _compose(counts: Trial, accountant: AccountantName) -> Any:
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
    return composed


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

    found = least_multiplier(cost, target_epsilon)
    if found is None:
        raise BudgetError(
            f"epsilon {target_epsilon} at delta {delta} cannot be met by {rounds} rounds at sampling rate {sampling_rate}: "
            "plan fewer rounds, a lower sampling rate or a larger epsilon"
        )
    return found


def least_multiplier(cost: Callable[[float], float], target_epsilon: float) -> float | None:
    """The smallest noise multiplier (to 0.1%) whose cost stays within the target; None when not even 1,000 does."""
    high = 1_000.0
    if cost(high) > target_epsilon:
        return None
    # From above: much noise is quick to account for, too little noise over many rounds takes minutes.
    while cost(high / 2) <= target_epsilon:
        high /= 2
    low = high / 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > target_epsilon else (low, middle)
    return high
