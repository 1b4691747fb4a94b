"""What a release is, for the accountant: events, each with everything that its cost follows from. Nothing is computed here.

The set of events is closed: what is not known here is refused, never guessed. Ledgers and receipts hold events as JSON, and
`stillroom_shared.accounting` turns a sequence of them into an epsilon.

| case | result |
|---|---|
| noise multiplier not above 0, sampling rate outside (0, 1] | `BudgetError` at construction |
| a `Selection` among trials without noise, without events, or that are searches themselves | `BudgetError` at construction |
| JSON of an unknown kind, or with fields that its kind lacks | `BudgetError` |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from stillroom_shared.errors import BudgetError
from stillroom_shared.noise import rounding_distance
from stillroom_shared.repetitions import NegativeBinomial, Poisson, Repetitions

Unit = Literal["user", "query"]
"""What an epsilon is about: everything on one device, or one query of it."""
_LARGEST_MULTIPLIER = 2.0**20  # sums of noise and updates stay far inside int64


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

    >>> from stillroom_shared.accounting import epsilon
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

    >>> from stillroom_shared.accounting import epsilon
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

    >>> from stillroom_shared.accounting import epsilon
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
