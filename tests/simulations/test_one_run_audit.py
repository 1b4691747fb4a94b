"""The bound of the one-run audit is the theorem's, holds as often as it says, and is not empty."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

import numpy as np
import pytest
from tests.references import one_run_audit as reference

from stillroom_shared.errors import SettingsError
from stillroom_shared.randomness import Randomness
from stillroom_simulations.one_run_audit import audit_one_run, epsilon_lower_bound, guesses_for, p_value


@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 10**5), Fraction(1, 1000)])
@pytest.mark.parametrize(("canaries", "guesses"), [(1, 1), (12, 12), (60, 25), (200, 40)])
def test_the_p_value_is_the_theorem_in_rational_arithmetic(canaries: int, guesses: int, delta: Fraction) -> None:
    """An index off by one in the tail, or in the quotients of the delta term, changes the bound by little."""
    for odds in (1, 3, 20):
        for correct in range(guesses + 1):
            found = p_value(
                canaries=canaries, guesses=guesses, correct=correct, epsilon=math.log(odds), delta=float(delta)
            )
            exact = reference.p_value(canaries=canaries, guesses=guesses, correct=correct, odds=odds, delta=delta)
            assert found == pytest.approx(float(exact), rel=1e-9)


def test_the_delta_term_covers_a_mechanism_that_fails_all_at_once() -> None:
    """Delta may be spent on exposing many units together: without its term the audit convicts sound mechanisms."""
    delta, needed = Fraction(1, 1000), 0
    for odds in (1, 3):
        for correct in range(20, 41, 2):
            for revealed in range(2, 41, 2):
                setup = {"canaries": 40, "guesses": 40, "correct": correct, "odds": odds, "delta": delta}
                really = reference.revealing(**setup, revealed=revealed)  # type: ignore[arg-type]
                covered = p_value(canaries=40, guesses=40, correct=correct, epsilon=math.log(odds), delta=float(delta))
                assert float(really) <= covered * (1 + 1e-9)
                needed += really > reference.tail(40, odds, correct) * Fraction(11, 10)
    assert needed > 50, "the mechanism hardly uses its delta: the test would pass without the term"


@pytest.mark.parametrize("odds", [2, 3, 20])
def test_coverage_for_randomized_response_is_what_is_stated(odds: int) -> None:
    """A bound at another confidence than it says, either way; all possible counts are weighed, nothing is drawn."""
    guesses, epsilon = 2_000, math.log(odds)
    above = bisect.bisect_right(  # the smallest count whose bound is too high
        range(guesses + 1),
        epsilon,
        key=lambda correct: epsilon_lower_bound(canaries=guesses, guesses=guesses, correct=correct, delta=0.0),
    )
    coverage = 1 - float(reference.tail(guesses, odds, above))
    assert 0.95 <= coverage < 0.98


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_whole_audits_of_randomized_response_stay_below_its_epsilon(epsilon: float) -> None:
    """An attack that looks at the coins, or guesses counted twice, goes unseen by tests of the formula alone."""
    trials, canaries = 300, 200
    truth = 1 / (1 + math.exp(-epsilon))
    bounds = []
    for trial in range(trials):
        generator = np.random.default_rng(trial)

        def respond(present: np.ndarray, generator: np.random.Generator = generator) -> np.ndarray:
            told = np.where(generator.random(canaries) < truth, present, ~present)
            return np.where(told, 1.0, -1.0)[None, :]

        coins = Randomness(seed=f"coins {trial}")
        bounds.append(audit_one_run(respond, np.eye(canaries), delta=0.0, randomness=coins, guesses=80).lower_bound)
    assert np.mean(np.array(bounds) <= epsilon) >= 0.95
    assert epsilon == 0 or np.median(bounds) > epsilon / 3, "a bound that is always small is always right"


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_the_bound_is_close_when_there_are_many_canaries(epsilon: float) -> None:
    """A bound of zero would always hold."""
    canaries = 50_000
    correct = int(canaries / (1 + math.exp(-epsilon)))
    assert (
        epsilon - 0.07 < epsilon_lower_bound(canaries=canaries, guesses=canaries, correct=correct, delta=0.0) < epsilon
    )


def test_the_bound_is_monotone() -> None:
    """More right guesses prove more; a larger delta, more confidence or more canaries to choose from prove less."""

    def bound(correct: int = 90, delta: float = 1e-5, confidence: float = 0.95, canaries: int = 500) -> float:
        return epsilon_lower_bound(canaries=canaries, guesses=100, correct=correct, delta=delta, confidence=confidence)

    by_correct = [bound(correct=correct) for correct in range(0, 101, 5)]
    assert by_correct == sorted(by_correct) and by_correct[0] == 0 and by_correct[-1] > 3
    assert bound(delta=0.0) > bound(delta=1e-4) > bound(delta=1e-2)
    assert bound(confidence=0.5) > bound(confidence=0.95) > bound(confidence=0.999)
    assert bound(delta=1e-3, canaries=100) > bound(delta=1e-3, canaries=1_000)
    p_values = [p_value(canaries=500, guesses=100, correct=90, epsilon=e / 10, delta=1e-5) for e in range(80)]
    assert np.diff(p_values).min() > -1e-12


def test_guessing_at_random_proves_nothing() -> None:
    """An attacker who has nothing to go by must not convict anybody."""
    noise = np.random.default_rng(0)
    seen = audit_one_run(
        lambda present: noise.normal(size=(3, 1_000)), np.eye(1_000), delta=1e-5, randomness=Randomness(seed="coins")
    )
    assert 0 < seen.correct < seen.guesses == guesses_for(1_000) and seen.lower_bound < 0.2


def test_what_cannot_be_audited_is_refused() -> None:
    """More guesses than canaries would count one of them twice."""
    coins = Randomness(seed="coins")
    with pytest.raises(SettingsError, match="11 guesses about 10 canaries"):
        audit_one_run(lambda present: np.zeros((1, 10)), np.eye(10), delta=0.0, randomness=coins, guesses=11)
    with pytest.raises(SettingsError, match=r"\(1, 9\)"):
        audit_one_run(lambda present: np.zeros((1, 9)), np.eye(10), delta=0.0, randomness=coins)
    with pytest.raises(SettingsError, match="6 right of 5 guesses"):
        p_value(canaries=10, guesses=5, correct=6, epsilon=1.0, delta=0.0)
    with pytest.raises(SettingsError, match=r"confidence 95"):
        epsilon_lower_bound(canaries=10, guesses=5, correct=5, delta=0.0, confidence=95)
