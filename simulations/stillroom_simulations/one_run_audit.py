"""A lower bound on epsilon from one run: Steinke, Nasr and Jagielski 2023, arXiv 2305.08846. It is never epsilon itself.

Canaries are units whose data the auditor chose. Each is present with probability 1/2, by an independent coin; absent means
that its contribution is zero (zero-out adjacency), so whoever tells present from absent more often than an
(epsilon, delta) mechanism allows has shown that the mechanism is not one.

Theorem (the one there for approximate differential privacy). For `m` canaries, an (epsilon, delta)-DP mechanism, and
guesses about `r` canaries that are computed from its output alone, with W ~ Binomial(r, e^epsilon / (1 + e^epsilon)) and
f(v) = P[W >= v],

    P[at least v guesses are right] <= f(v) + 2 m delta max over i in 1..m of (f(v - i) - f(v)) / i.

Assumptions, and who keeps them:
    - The coins are fair, independent, and nothing but the mechanism sees them: `audit_one_run` tosses them.
    - `r` does not depend on the coins: it is fixed before anything is run. Trying several and keeping the best would need
      a correction for the search. Which canaries are guessed may depend on the output in any way: that is inside the theorem.
    - The canaries' own directions and all other data may be anything, since the theorem is for worst-case data.

Only presence is guessed, for the highest scores: under Poisson sampling a high score is strong evidence, but nothing is
strong evidence of absence, as a present unit is never sampled with probability (1 - rate)^rounds.

Power, over 1,000 draws of a Gaussian model of the default audit (1,000 canaries, 10 rounds at rate 0.1, accounted as epsilon
1 at user level, delta 1e-5, against readers of releases): the bound exceeds 1 in 98% with noise 5 times too small and in
all with every unit in every round; with the right mechanism it never exceeds 0.6. Smaller defects may go unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import SettingsError
from stillroom_shared.randomness import Randomness
from stillroom_simulations.canary_estimate import estimate_epsilon

MechanismRun = Callable[[NDArray[np.bool_]], NDArray[np.float64]]
"""One run of a mechanism on the canaries: which are present, (canaries,), to all it released, (releases, dimension)."""

_STEP = 100  # of the search for the bound: hundredths, as many digits as are printed


@dataclass(frozen=True, kw_only=True)
class OneRunAudit:
    """What one run showed.

    Attributes:
        canaries: how many there were, present or absent.
        guesses: how many were guessed to be present, fixed in advance.
        correct: how many of those were.
        delta: at which the bound and the estimate stand.
        confidence: of the bound.
        lower_bound: the mechanism is not (epsilon, delta)-DP for any epsilon below this one; 0 says nothing.
        estimate: by `canary_estimate`; neither an upper nor a lower bound, and infinite where presence is plain to see.
    """

    canaries: int
    guesses: int
    correct: int
    delta: float
    confidence: float
    lower_bound: float
    estimate: float


def guesses_for(canaries: int) -> int:
    """How many canaries are guessed unless told otherwise: the top 15%.

    Fewer guesses are surer, but prove less: all of r guesses right bounds epsilon by about log(r / 3). At 500 canaries,
    75 right guesses still prove 3.2.

    >>> guesses_for(1_000)
    150
    """
    return max(1, 15 * canaries // 100)


def audit_one_run(
    run: MechanismRun,
    directions: NDArray[np.float64],
    *,
    delta: float,
    randomness: Randomness,
    weights: NDArray[np.float64] | None = None,
    guesses: int | None = None,
    confidence: float = 0.95,
) -> OneRunAudit:
    """Toss the coins, run the mechanism once, guess from what it released, and bound epsilon.

    The attacker scores a canary by the inner product of its direction with a sum of the released vectors: of all of them, or
    weighted by what it knows of when the canary took part. What the scores are multiplied by does not matter, only their order.

    >>> def leaky(present: np.ndarray) -> np.ndarray:
    ...     return present[None, :].astype(np.float64)
    >>> shown = audit_one_run(leaky, np.eye(1_000), delta=1e-5, randomness=Randomness(seed="toy"))
    >>> shown.correct, shown.lower_bound, shown.estimate
    (150, 3.87, inf)

    Args:
        run: called once.
        directions: of the canaries, (canaries, dimension); orthogonal ones do not disturb each other.
        delta: of the statement under audit.
        randomness: the coins; a run must not draw from the same stream.
        weights: of each release in the score of each canary, (canaries, releases), fixed before this call; ones otherwise.
        guesses: how many, fixed before this call; `guesses_for` otherwise.
    """
    canaries = len(directions)
    if guesses is None:
        guesses = guesses_for(canaries)
    if not 1 <= guesses <= canaries:
        raise SettingsError(f"{guesses} guesses about {canaries} canaries: guess at least one, and each at most once")
    present = np.array([randomness.bernoulli(1, 2) for _ in range(canaries)])
    released = run(present)
    if released.ndim != 2 or released.shape[1] != directions.shape[1]:
        raise SettingsError(
            f"released vectors of shape {released.shape}: the canaries need (releases, {directions.shape[1]})"
        )
    along = directions @ released.T  # (canaries, releases)
    scores = (along if weights is None else along * weights).sum(axis=1)  # (canaries,)
    guessed = np.argsort(-scores, kind="stable")[:guesses]  # ties go by number, which says nothing about a coin
    correct = int(present[guessed].sum())
    return OneRunAudit(
        canaries=canaries,
        guesses=guesses,
        correct=correct,
        delta=delta,
        confidence=confidence,
        lower_bound=epsilon_lower_bound(
            canaries=canaries, guesses=guesses, correct=correct, delta=delta, confidence=confidence
        ),
        estimate=estimate_epsilon(scores[present], scores[~present], delta=delta),
    )


def epsilon_lower_bound(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The bound on epsilon at this delta that holds with this confidence, in whole hundredths, rounded down.

    The largest hundredth such that it and every smaller one is rejected. If the mechanism is (epsilon, delta)-DP, it is so
    for the next hundredth h above epsilon too; a bound above epsilon means that h was rejected, which the theorem allows
    with probability at most 1 - confidence. So no correction for the search is needed, and `p_value` need not be monotone.

    >>> epsilon_lower_bound(canaries=1_000, guesses=1_000, correct=750, delta=0.0), round(math.log(3), 2)
    (0.97, 1.1)
    """
    if not 0 < confidence < 1:
        raise SettingsError(f"confidence {confidence} is no probability: choose a value in (0, 1), e.g. 0.95")
    rejected = 0
    while (
        p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=rejected / _STEP, delta=delta)
        <= 1 - confidence
    ):
        rejected += 1
    return max(0, rejected - 1) / _STEP


def p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely `correct` or more right guesses are at most, if the mechanism is (epsilon, delta)-DP (the theorem above).

    >>> round(p_value(canaries=10, guesses=10, correct=10, epsilon=0.0, delta=0.0) * 2**10, 6)
    1.0
    """
    if not 0 <= correct <= guesses <= canaries or epsilon < 0 or not 0 <= delta <= 1:
        raise SettingsError(
            f"{correct} right of {guesses} guesses about {canaries} canaries at epsilon {epsilon}, delta {delta}: no guess is "
            "counted twice, epsilon is at least 0, and delta is a probability"
        )
    tail = _binomial_tail(guesses, epsilon)  # f(0)..f(guesses)
    # Beyond i = correct, f(correct - i) stays 1 and the quotient falls.
    gains = tail[:correct][::-1] - tail[correct]  # f(correct - i) - f(correct), i = 1..correct
    steepest = float((gains / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, float(tail[correct]) + 2 * canaries * delta * steepest)


def _binomial_tail(trials: int, epsilon: float) -> NDArray[np.float64]:
    """P[W >= v] for v = 0..trials, W ~ Binomial(trials, 1 / (1 + e^-epsilon))."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])  # logarithms
    right = np.arange(trials + 1)
    logs = factorials[-1] - factorials - factorials[::-1] - trials * math.log1p(math.exp(-epsilon))
    masses = np.exp(logs - (trials - right) * epsilon)
    return np.asarray(np.minimum(np.cumsum(masses[::-1])[::-1], 1.0))
