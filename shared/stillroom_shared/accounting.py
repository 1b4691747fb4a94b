"""What a sequence of releases costs: epsilon for their events (`stillroom_shared.events`) at a given delta.

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

| case | result |
|---|---|
| no event | 0.0 |
| an `Unprotected` event, hardly any noise, or a grid too coarse to certify the delta | infinity |
| a delta outside (0, 1) | `BudgetError` |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import BudgetError
from stillroom_shared.events import Event, Gaussian, SampledGaussian, Selection, Trial, Unprotected

AccountantName = Literal["PLD", "RDP"]

# Orders near 1 do not converge for Poisson sampling at small noise; a dense grid up to 12 decides everything else.
_RDP_ORDERS = [2 + step / 20 for step in range(200)] + list(range(12, 65)) + [128, 256, 512, 1024]

_LEAST_DIVERGENCE = 1e-15
"""A larger bound is a bound too; of one that is lost beside 1 the library takes the logarithm of zero."""

_SHARE_OF_TAILS = 0.01
"""Of delta: for searches that make more trials than are counted, where every trial is seen."""


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
    noisy = {event: count for event, count in counts.items() if not isinstance(event, Unprotected)}
    if len(noisy) < len(counts):
        return math.inf
    seen = sum(count for event, count in noisy.items() if isinstance(event, Selection) and event.seen)
    apart = delta * _SHARE_OF_TAILS if seen else 0.0
    parts = _Parts.of(noisy, tail=apart / max(1, seen))
    if any(_hopeless(event, count) for event, count in parts.releases()):
        return math.inf
    return _solve(parts, delta - apart, accountant_for(noisy, accountant))


def accountant_for(events: Iterable[Event], wish: AccountantName = "PLD") -> AccountantName:
    """Which accountant the composition of these events needs: PLD knows no bound for a search."""
    searches = [event for event in events if isinstance(event, Selection)]
    return "RDP" if any(not search.seen or len(search.trials) > 1 for search in searches) else wish


@dataclass(frozen=True)
class _Parts:
    """What composes, each with how often. Hashable: solving for epsilon is cached.

    Attributes:
        gaussians: releases.
        blind: trials of searches whose trials are seen; each draws one of several candidates blindly.
        searches: those of which only the best is seen.
    """

    gaussians: Trial
    blind: tuple[tuple[tuple[Trial, ...], int], ...]
    searches: tuple[tuple[Selection, int], ...]

    @classmethod
    def of(cls, counts: Mapping[Gaussian | Selection, int], *, tail: float) -> _Parts:
        """`tail`: probability with which each search whose trials are seen may make more of them than are counted."""
        gaussians: Counter[Gaussian] = Counter()
        blind, searches = [], []
        for event, count in sorted(counts.items(), key=repr):
            if not isinstance(event, Selection):
                gaussians[event] += count
            elif not event.seen:
                searches.append((event, count))
            else:
                times = count * event.repetitions.most(tail)
                if len(event.trials) == 1:  # plain composition: any accountant adds it up
                    gaussians.update({part: times * number for part, number in event.trials[0]})
                else:
                    blind.append((event.trials, times))
        return cls(tuple(sorted(gaussians.items(), key=repr)), tuple(blind), tuple(searches))

    def releases(self) -> Iterator[tuple[Gaussian, int]]:
        """Every kind of noisy sum, with how often it occurs beside its like; of a search, in one trial."""
        inner = [(trial, times) for trials, times in self.blind for trial in trials]
        inner += [(trial, 1) for search, _ in self.searches for trial in search.trials]
        for trial, times in [(self.gaussians, 1), *inner]:
            for event, count in trial:
                yield event, count * times * event.releases

    @property
    def distance(self) -> float:
        """Total variation distance of all of it to what is accounted for."""
        found = _distance(self.gaussians)
        found += sum(max(map(_distance, trials)) * times for trials, times in self.blind)
        return found + sum(search.distance * search.repetitions.mean * count for search, count in self.searches)

    def renyi(self) -> NDArray[np.float64]:
        """Renyi divergence of all of it at each of `_RDP_ORDERS`."""
        found = _renyi(self.gaussians)
        for trials, times in self.blind:
            found = found + _dearest(trials) * times
        for search, count in self.searches:
            found = found + search.repetitions.rdp(np.array(_RDP_ORDERS), _dearest(search.trials)) * count
        return found


def _hopeless(event: Gaussian, count: int) -> bool:
    """Whether noise is so small that epsilon is in the hundreds: infinity is said at once, a number would take minutes.

    Infinity is always a sound answer; loss distributions of such events fill gigabytes.
    """
    if event.sampling_rate == 1:
        return event.noise_multiplier / math.sqrt(count) < 0.05
    return event.noise_multiplier < 0.25


@lru_cache(maxsize=4096)
def _solve(parts: _Parts, delta: float, accountant: AccountantName) -> float:
    """The epsilon at which the accountant's delta and the distance to what it accounts for are `delta` together."""
    distance, at = parts.distance, _epsilons(parts, accountant)
    remaining = delta
    for _ in range(32):
        found = at(remaining)
        needed = remaining + (1 + math.exp(min(found, 700.0))) * distance
        if needed <= delta:
            return found
        remaining = delta - (needed - remaining) * 1.001
        if remaining <= 0:
            break
    return math.inf  # the grid is too coarse to certify anything at this delta


def _epsilons(parts: _Parts, accountant: AccountantName) -> Callable[[float], float]:
    """Epsilon as a function of delta."""
    if accountant == "PLD":
        composed = _compose(parts.gaussians, "PLD")
        return lambda delta: float(composed.get_epsilon(delta))
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    divergences = parts.renyi()
    return lambda delta: float(compute_epsilon(_RDP_ORDERS, divergences, delta)[0])


def _distance(trial: Trial) -> float:
    return sum(event.distance * count for event, count in trial)


def _dearest(trials: Iterable[Trial]) -> NDArray[np.float64]:
    """Renyi divergence of one trial at each order, whichever candidate it draws."""
    return np.asarray(np.max([_renyi(trial) for trial in trials], axis=0), np.float64)


@lru_cache(maxsize=1024)
def _renyi(counts: Trial) -> NDArray[np.float64]:
    """Renyi divergence of these events together, in either direction of add-or-remove, at each of `_RDP_ORDERS`."""
    # The library composes them, and shows epsilons only; rounded, hardly anything may come out below 0, which it then refuses.
    return np.maximum(np.array(_compose(counts, "RDP")._rdp, np.float64), _LEAST_DIVERGENCE)


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
