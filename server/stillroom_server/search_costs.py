"""What a search over settings costs before it is run, and the least noise at which the whole of it meets a target.

| figure | counts | holds |
|---|---|---|
| one trial | a single trial that was fixed beforehand | only where nothing was searched for |
| the search | the best of a random, hidden number of trials, and reserved retries | against readers of releases |
| every trial | as many trials as the mean, all seen, and reserved retries | where all outcomes, or their number, are public |
| uncharged | what is written when the search is left out | never: labelled wrong wherever it is shown |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stillroom_shared.accounting import AccountantName, epsilon, least_multiplier
from stillroom_shared.comparison import Comparison
from stillroom_shared.errors import BudgetError, SettingsError
from stillroom_shared.events import Event, selection_of
from stillroom_shared.mechanism import Central
from stillroom_shared.repetitions import NegativeBinomial, Poisson, Repetitions
from stillroom_shared.statement import READERS, printed_epsilon

CandidateEvents = Sequence[Sequence[Event]]
"""The events of one trial, for each candidate."""
_KINDS = ("negative-binomial", "poisson")
_SHOWN = (("negative-binomial", 0.0), ("negative-binomial", 1.0), ("poisson", 0.0))
_DIMENSION = 10_000
"""Of an adapter, roughly: enters through the rounding of noise only, about 1e-14 of delta."""


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """Epsilons at one delta, user level, against readers of releases; infinity where nothing can be certified.

    Attributes:
        one_trial: of the dearest candidate, by PLD; without a retry.
        search: of the best of a random number of trials and what is charged beside it, by Renyi DP.
        every_trial: of as many trials as the mean, rounded up, of the dearest candidate, and the same beside, by PLD.
    """

    repetitions: Repetitions
    one_trial: float
    search: float
    every_trial: float


def search_cost(
    candidates: CandidateEvents, repetitions: Repetitions, delta: float, *, beside: Sequence[Event] = ()
) -> SearchCost:
    """What trying these candidates costs, by each way of counting. `beside`: reserved retries, charged used or not.

    >>> from stillroom_shared.events import SampledGaussian
    >>> step = SampledGaussian(noise_multiplier=4.0, sampling_rate=0.2, sigma=2**30, dimension=9_216)
    >>> found = search_cost([[step] * 15], repetitions_of("negative-binomial", 10.0, shape=0.0), 1e-5)
    >>> [round(value, 2) for value in (found.one_trial, found.search, found.every_trial)]
    [0.78, 1.54, 2.62]
    """
    times = math.ceil(repetitions.mean)
    return SearchCost(
        repetitions=repetitions,
        one_trial=max(epsilon(events, delta) for events in candidates),
        search=epsilon([*beside, selection_of(candidates, repetitions)], delta),
        every_trial=max(epsilon([*[*events] * times, *beside], delta) for events in candidates),
    )


def repetitions_of(kind: str, mean: float, *, shape: float = 0.0) -> Repetitions:
    """The distribution of a kind with this mean. Raises `SettingsError` for another kind, `BudgetError` for what cannot be."""
    if kind == "poisson":
        return Poisson(mean=mean)
    if kind == "negative-binomial":
        return NegativeBinomial.with_mean(mean, shape=shape)
    raise SettingsError(f"distribution {kind!r} of the number of trials is unknown: choose one of {', '.join(_KINDS)}")


def calibrate_search(
    *,
    target_epsilon: float,
    delta: float,
    repetitions: Repetitions,
    candidates: Callable[[float], CandidateEvents],
    beside: Callable[[float], Sequence[Event]] = lambda noise: (),
) -> float:
    """The smallest noise multiplier (to 0.1%) at which the whole search stays within the target.

    Args:
        candidates: events of one trial of each candidate, at a noise multiplier.
        beside: what is charged besides the search, at a noise multiplier: reserved retries, earlier releases.

    Raises:
        BudgetError: naming what cannot be met, and why.
    """
    if not target_epsilon > 0:
        raise BudgetError(f"target epsilon {target_epsilon}: choose a number above 0")

    def cost(noise: float, accountant: AccountantName = "PLD") -> float:
        return epsilon([selection_of(candidates(noise), repetitions), *beside(noise)], delta, accountant)

    found = least_multiplier(cost, target_epsilon)
    if found is None:
        floor = cost(1_000.0)
        raise BudgetError(
            f"epsilon {target_epsilon} at delta {delta} cannot be met by a search whose number of trials is "
            f"{repetitions.words}: even at noise multiplier 1,000 it costs {floor:.3f}, for hiding the number of trials, for "
            "noise that does not grow with it (an evaluation's), and for the delta; plan fewer trials, more noise in the "
            "evaluation, a larger epsilon or a larger delta"
        )
    return found


def planning_table(costs: Sequence[SearchCost], delta: float) -> str:
    """What an operator reads before he searches."""
    lines = [
        f"epsilon (user level, delta {delta:.1e}, against {READERS}; against the coordinator: none) of a search over settings",
        "",
        f"{'number of trials':<42} {'one trial':>10} {'the search':>11} {'every trial':>12} {'uncharged: WRONG':>17}",
    ]
    for cost in costs:
        figures = (cost.one_trial, cost.search, cost.every_trial, cost.one_trial)
        shown = [printed_epsilon(value) if math.isfinite(value) else "none" for value in figures]
        lines.append(f"{cost.repetitions.words:<42} {shown[0]:>10} {shown[1]:>11} {shown[2]:>12} {shown[3]:>17}")
    lines += [
        "",
        "one trial    settings fixed beforehand, nothing searched for",
        "the search   the best of a random, hidden number of trials, and reserved retries; Renyi DP (arXiv 2110.03620)",
        "every trial  as many trials as the mean, all of them seen, and reserved retries: plain composition",
        "uncharged    what a search that is not charged for would claim; it does not hold",
    ]
    return "\n".join(lines)


def plan_tuning(
    *,
    devices: int,
    rounds: int,
    sampling_rate: float,
    noise_multiplier: float,
    evaluation_noise: float,
    delta: float | None,
    trials: str,
    retries: int,
    target_epsilon: float | None,
) -> str:
    """The page of `stillroom plan tuning`: rounds under `central`, evaluated once by every device.

    A retry is a round and an evaluation, as `stillroom tune` reserves them.

    Raises `SettingsError` or `BudgetError` for numbers that cannot be.
    """
    at = 1 / (10 * devices) if delta is None else delta
    try:
        means = [float(mean) for mean in trials.split(",")]
    except ValueError:
        raise SettingsError(f"--trials {trials!r} is no list of numbers: write it as 2,5,10") from None

    if retries < 0 or rounds < 1:
        raise SettingsError(f"--retries {retries} --rounds {rounds}: choose at least 0 retries, and at least 1 round")
    judged = Comparison(bound=1.0, noise_multiplier=evaluation_noise, sampling_rate=1.0, devices=devices)
    score = judged.mechanism.event()

    def step(noise: float) -> Event:
        return Central(
            clip_norm=1.0, noise_multiplier=noise, sampling_rate=sampling_rate, devices=devices, dimension=_DIMENSION
        ).event()

    def trial(noise: float) -> list[list[Event]]:
        return [[*[step(noise)] * rounds, score]]

    def reserved(noise: float) -> list[Event]:
        return [step(noise), score] * retries

    drawn = [repetitions_of(kind, mean, shape=shape) for mean in means for kind, shape in _SHOWN]
    beside = reserved(noise_multiplier)
    page = planning_table([search_cost(trial(noise_multiplier), own, at, beside=beside) for own in drawn], at)
    if target_epsilon is None:
        return page
    lines = [page, "", f"least noise multiplier of a round at which the whole search costs epsilon {target_epsilon:g}"]
    lines[-1] += f" (user level, delta {at:.1e}, against {READERS}; against the coordinator: none)"
    for own in drawn:
        try:
            noise = calibrate_search(
                target_epsilon=target_epsilon, delta=at, repetitions=own, candidates=trial, beside=reserved
            )
            lines.append(f"{own.words:<42} {noise:>10.3f}")
        except BudgetError as error:
            lines.append(f"{own.words:<42} {'none':>10}  {error}")
    return "\n".join(lines)
