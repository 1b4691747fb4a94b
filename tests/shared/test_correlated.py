"""Correlated noise: sensitivity on neighbouring data, the distribution of what is released, and what it is worth."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from tests.references.factorization import (
    binary_tree,
    patterns,
    prefix_errors,
    squared_sensitivity,
    toeplitz,
    widest_pattern_sensitivity,
)

from stillroom_shared.accounting import epsilon
from stillroom_shared.correlated import Correlated, RunState, calibrate_correlated
from stillroom_shared.errors import BudgetError, ProtocolError
from stillroom_shared.events import CorrelatedGaussian, SampledGaussian, event_from_json, event_to_json
from stillroom_shared.mechanism import RESOLUTION, Central
from stillroom_shared.randomness import Randomness
from stillroom_shared.toeplitz import ONE, Criterion, best_coefficients, prefix_error, reconstruct

DELTA = 1e-5
SCHEDULE = {"rounds": 64, "participations": 8, "separation": 8}


def correlated(**changes: object) -> Correlated:
    fields: dict[str, object] = {
        "clip_norm": 0.5, "noise_multiplier": 2.0, "coefficients": (1024, 640, 400), "participations": 3, "separation": 3,
        "rounds": 9, "devices": 60, "dimension": 4,
    }  # fmt: skip
    return Correlated(**(fields | changes))  # type: ignore[arg-type]


def run(mechanism: Correlated, totals: NDArray[np.int64], seed: str) -> list[RunState]:
    """The states after each row; one generator for the whole run."""
    randomness, state, states = Randomness(seed=seed), mechanism.start(), []
    for total in totals:
        state = mechanism.step(state, total, randomness)
        states.append(state)
    return states


@pytest.mark.parametrize("rounds", [1, 4, 6, 7, 9])
@pytest.mark.parametrize("separation", [1, 2, 3, 4])
def test_sensitivity_is_the_maximum_over_every_pattern(rounds: int, separation: int) -> None:
    """Noise is scaled to it: too small is unsound, too large is waste. Brute force over all patterns, exact integers."""
    for participations in range(1, math.ceil(rounds / separation) + 1):
        for bands in range(1, min(separation, rounds) + 1):
            mechanism = correlated(
                coefficients=(1024, 700, 512, 3)[:bands], participations=participations, separation=separation, rounds=rounds
            )  # fmt: skip
            brute = squared_sensitivity(
                toeplitz(mechanism.coefficients, rounds), patterns(rounds, participations, separation)
            )
            assert mechanism.squared_sensitivity == brute * RESOLUTION**2
            assert mechanism.squared_sensitivity <= (
                participations * sum(c * c for c in mechanism.coefficients) * RESOLUTION**2
            )


def test_neighbouring_runs_stay_within_the_sensitivity_and_reach_it() -> None:
    """Zero-out of one device in a whole run, through `step` itself: what the noise hides is the difference of the rows."""
    mechanism = correlated(dimension=3)
    generator = np.random.default_rng(0)
    others = generator.integers(-5 * RESOLUTION, 5 * RESOLUTION, (9, 3))
    update = mechanism.bound(np.array([1e3, -2e3, 5e2], np.float32)).astype(np.int64)
    moved = {}
    for pattern in patterns(9, 3, 3):
        with_device = others.copy()
        for number in pattern:
            with_device[number] += update * generator.choice([-1, 1])
        rows = [np.array([s.noisy for s in run(mechanism, totals, "same noise")]) for totals in (with_device, others)]
        moved[pattern] = sum(int(value) ** 2 for value in (rows[0] - rows[1]).ravel())
        assert moved[pattern] <= mechanism.squared_sensitivity
    assert max(moved, key=lambda pattern: moved[pattern]) == (0, 3, 6)
    assert moved[0, 3, 6] > 0.9999 * mechanism.squared_sensitivity


def test_participations_that_are_too_close_or_too_many_pass_the_sensitivity() -> None:
    """What the guards on both sides are for: without them the noise would be too small for what is released."""
    strategy = toeplitz(correlated().coefficients, 9)
    for pattern, participations in (((0, 2), 2), ((0, 1), 2), ((0, 2, 5), 3), ((2, 5, 7), 3), ((0, 3, 6), 2)):
        covered = correlated(participations=participations).squared_sensitivity
        assert squared_sensitivity(strategy, iter([pattern])) * RESOLUTION**2 > covered


def test_sigma_covers_the_sensitivity_exactly() -> None:
    """A square root in floating point may round the noise down."""
    for multiplier in (0.3, 1.0, 2.0, 7.7):
        mechanism = correlated(noise_multiplier=multiplier)
        needed = Fraction(multiplier) ** 2 * mechanism.squared_sensitivity
        assert (mechanism.sigma - 1) ** 2 < needed <= mechanism.sigma**2


def test_released_rows_and_estimates_have_the_noise_of_theory_and_no_other() -> None:
    """Row noise is independent with the event's scale; in the estimates it is that times C^-1. Neither 0.9 nor 1.1 of it.

    The tolerance is 6 standard errors of a variance: a false alarm below 1e-8, for other seeds too.
    """
    mechanism = correlated(dimension=5_000, devices=100)
    totals = np.random.default_rng(1).integers(-RESOLUTION, RESOLUTION, (9, 5_000))
    states = run(mechanism, totals, "distribution")
    strategy = toeplitz(mechanism.coefficients, 9)
    noise = np.array([state.noisy for state in states]) - strategy @ totals
    scale = mechanism.event().noise_multiplier * math.sqrt(mechanism.squared_sensitivity)

    def is_scale(values: NDArray[np.float64], expected: float) -> bool:
        return bool(abs(np.mean(values**2) / expected**2 - 1) < 6 * math.sqrt(2 / values.size))

    assert [is_scale(noise / scale, factor) for factor in (0.9, 1.0, 1.1)] == [False, True, False]
    correlations = np.corrcoef(noise) - np.eye(9)
    assert np.abs(correlations).max() < 6 / math.sqrt(5_000)

    updates = np.array([mechanism.update(state) for state in states])
    exact = totals * (mechanism.clip_norm / RESOLUTION / mechanism.denominator)
    theory = np.sqrt((np.linalg.inv(strategy.astype(float)) ** 2).sum(axis=1)) * scale
    for row in range(9):
        standard = (updates - exact)[row] / (theory[row] * mechanism.clip_norm / RESOLUTION / mechanism.denominator)
        assert [is_scale(standard, factor) for factor in (0.9, 1.0, 1.1)] == [False, True, False]
    prefix = np.cumsum(updates - exact, axis=0) * mechanism.denominator / mechanism.clip_norm
    schedule = {"rounds": 9, "participations": 3, "separation": 3}
    expected = mechanism.noise_multiplier * prefix_error(mechanism.coefficients, **schedule, criterion="max")
    assert [is_scale(prefix[-1] / expected, factor) for factor in (0.9, 1.0, 1.1)] == [False, True, False]


def test_reconstruction_inverts_the_strategy_exactly() -> None:
    """A recursion that forgets a band, or runs backwards, still gives plausible updates."""
    coefficients = best_coefficients(8, **SCHEDULE)
    sums = np.random.default_rng(2).integers(-(2**38), 2**38, (64, 5))
    np.testing.assert_array_equal(reconstruct(toeplitz(coefficients, 64) @ sums, coefficients), sums)


def test_row_by_row_equals_the_whole_run_at_once() -> None:
    """The state keeps the last bands only: one too few, or in the wrong order, would change later rows."""
    mechanism = correlated(separation=4, rounds=10)
    totals = np.random.default_rng(3).integers(-RESOLUTION, RESOLUTION, (10, 4))
    states = run(mechanism, totals, "rows")
    whole = reconstruct(np.array([state.noisy for state in states]), mechanism.coefficients)
    for state in states:
        np.testing.assert_allclose(state.estimates[-1], whole[state.row - 1], rtol=1e-12)


def test_the_state_holds_no_sum_that_no_row_needs() -> None:
    """Every sum that is kept is a sum that can be stolen."""
    states = run(correlated(), np.full((9, 4), 7), "kept")
    assert [len(state.sums) for state in states] == [1, *[2] * 7, 0]
    assert all((state.sums == 7).all() for state in states)
    single = run(correlated(coefficients=(ONE,)), np.full((9, 4), 7), "kept")
    assert all(len(state.sums) == 0 for state in single)


def test_noise_is_fresh_in_every_attempt() -> None:
    """A row's noise on two sums would cancel in their difference."""
    mechanism, randomness = correlated(), Randomness()
    start, total = mechanism.start(), np.zeros(4, np.int64)
    first, second = (mechanism.step(start, total, randomness).noisy for _ in range(2))
    assert (first != second).all()
    assert start.row == 0 and not start.noisy.any()


def test_one_band_is_central_without_sampling() -> None:
    """Two ways to the same mechanism: one event for T rows against k events, the same noise, the same epsilon."""
    mechanism = correlated(coefficients=(ONE,), noise_multiplier=1.5, participations=9, separation=1, dimension=4)
    central = Central(
        clip_norm=0.5, noise_multiplier=1.5 * 3, sampling_rate=1.0, devices=60, dimension=4
    )  # 9 participations
    assert epsilon([mechanism.event()], DELTA) == pytest.approx(epsilon([central.event()] * 9, DELTA), rel=1e-3)
    assert mechanism.sigma == ONE * central.sigma
    assert mechanism.denominator == central.denominator
    total = np.arange(4) * RESOLUTION
    noise = (mechanism.step(mechanism.start(), total, Randomness(seed="b")).noisy - ONE * total) / ONE / central.sigma
    exact = mechanism.update(RunState(1, total, total[:0].reshape(0, 4), total.reshape(1, 4).astype(float)))
    released = mechanism.update(mechanism.step(mechanism.start(), total, Randomness(seed="b")))
    np.testing.assert_allclose(released - exact, noise * central.sigma * 0.5 / RESOLUTION / 60, rtol=1e-9)
    assert exact.tolist() == [0.0, 0.5 / 60, 1.0 / 60, 1.5 / 60]
    update = np.array([3.0, 0.0, -4.0, 1.0], np.float32)
    np.testing.assert_array_equal(mechanism.bound(update), central.bound(update))
    assert mechanism.admit(mechanism.bound(update)) and not mechanism.admit(np.full(4, RESOLUTION, np.int32))


def test_a_run_costs_what_one_gaussian_costs() -> None:
    """An event that is charged for each row, or amplified, is another mechanism."""
    event = correlated().event()
    plain = SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, sigma=event.sigma, dimension=9 * 4)
    assert epsilon([event], DELTA) == epsilon([plain], DELTA)
    assert event.distance == plain.distance > 0
    assert epsilon([event], DELTA, "RDP") >= epsilon([event], DELTA)
    assert epsilon([event, event], DELTA) > epsilon([event], DELTA), "a second run is charged too"


def test_the_rounding_of_every_row_is_paid() -> None:
    """The distance of one row in place of all rows would be too small by the number of rounds."""
    coarse = CorrelatedGaussian(
        noise_multiplier=1.0, rounds=50, participations=5, separation=10, sigma=12_000, dimension=2
    )
    one_row = CorrelatedGaussian(
        noise_multiplier=1.0, rounds=1, participations=1, separation=1, sigma=12_000, dimension=2
    )
    assert coarse.distance == pytest.approx(50 * one_row.distance)
    assert epsilon([coarse], DELTA) > epsilon([one_row], DELTA)


def test_participations_of_a_device_add_up_to_the_run() -> None:
    """A device that charges the whole run for each participation gives up early; one that charges less is deceived."""
    mechanism = correlated(rounds=9)
    single = mechanism.participation_event()
    square = sum(c * c for c in mechanism.coefficients) * RESOLUTION**2
    assert Fraction(single.noise_multiplier) ** 2 * square <= mechanism.sigma**2
    assert single.rounds == 3 and single.participations == 1
    run_cost, own = epsilon([mechanism.event()], DELTA), epsilon([single] * 3, DELTA)
    assert run_cost <= own * (1 + 1e-9) and own == pytest.approx(run_cost, rel=1e-3)
    assert epsilon([single], DELTA) < 0.7 * own


def test_events_survive_json_and_impossible_ones_are_refused() -> None:
    """A ledger whose events cannot be read back exactly cannot be verified."""
    event = correlated().event()
    assert event_from_json(event_to_json(event)) == event
    assert event_to_json(event)["kind"] == "correlated-gaussian"
    for name, value in (
        ("rounds", 0),
        ("participations", -1),
        ("separation", 0),
        ("noise_multiplier", 0.0),
        ("dimension", 0),
    ):
        with pytest.raises(BudgetError):
            event_from_json(event_to_json(event) | {name: value})
    with pytest.raises(BudgetError, match="fields of its kind"):
        event_from_json(event_to_json(event) | {"sampling_rate": 0.1})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"separation": 2, "participations": 3}, "share rows"),
        ({"participations": 4}, "do not fit into 9 rounds: at most 3"),
        ({"participations": 0}, "at least 1"),
        ({"coefficients": (1024, 400, 640)}, "no integers that fall"),
        ({"coefficients": (512, 256)}, "no integers that fall"),
        ({"coefficients": (1024, -1)}, "no integers that fall"),
        ({"coefficients": ()}, "no integers that fall"),
        ({"coefficients": (1024, 0.5)}, "no integers that fall"),
        ({"devices": 2}, "without a cohort"),
        ({"noise_multiplier": 0.0}, "no protection"),
        ({"noise_multiplier": math.inf}, "no protection"),
        ({"noise_multiplier": 2.0**20}, "64 bits"),
        ({"devices": 2**27}, "64 bits"),
        ({"clip_norm": math.nan}, "bounds nothing"),
    ],
)  # fmt: skip
def test_what_the_sensitivity_does_not_cover_is_refused(changes: dict[str, object], reason: str) -> None:
    """A mechanism whose premise does not hold would print an epsilon all the same."""
    with pytest.raises(BudgetError, match=reason):
        correlated(**changes)


def test_a_sum_that_cannot_be_is_refused_and_a_run_has_an_end() -> None:
    """An overflow wraps around silently; a row after the last was never charged."""
    mechanism = correlated()
    wrong: list[Any] = [
        np.zeros(3, np.int64), np.zeros(4, np.int32), np.full(4, 61 * RESOLUTION), np.full(4, -(2**63)),
    ]  # fmt: skip
    for total in wrong:
        with pytest.raises(ProtocolError, match="a sum of shape"):
            mechanism.step(mechanism.start(), total, Randomness())
    last = run(mechanism, np.full((9, 4), -60 * RESOLUTION), "end")[-1]
    assert abs(last.estimates[-1] / RESOLUTION + 60).max() < 100
    with pytest.raises(BudgetError, match="row 10 of 9"):
        mechanism.step(last, np.zeros(4, np.int64), Randomness())


@pytest.mark.parametrize("criterion", ["mean", "max"])
@pytest.mark.parametrize(("rounds", "bands"), [(32, 4), (64, 8)])
def test_the_family_of_coefficients_is_near_the_optimum(rounds: int, bands: int, criterion: Criterion) -> None:
    """Coefficients of a wrong series are private all the same, and quietly worse. The optimizer is SciPy's."""
    schedule = {"rounds": rounds, "participations": rounds // bands, "separation": bands}

    def error(tail: NDArray[np.float64]) -> float:
        c = np.concatenate([[1.0], tail])
        inverse = np.zeros(rounds)
        for t in range(rounds):
            inverse[t] = (t == 0) - sum(c[j] * inverse[t - j] for j in range(1, min(t, bands - 1) + 1))
        weights = np.arange(rounds, 0, -1) / rounds if criterion == "mean" else np.ones(rounds)
        return math.sqrt(float(weights @ np.cumsum(inverse) ** 2) * float(c @ c) * schedule["participations"])

    best = best_coefficients(bands, **schedule, criterion=criterion)
    free = minimize(error, np.array(best[1:]) / ONE, method="BFGS", options={"maxiter": 60}).fun
    found = prefix_error(best, **schedule, criterion=criterion)
    assert free <= found * (1 + 1e-9) and found < 1.004 * free
    root = tuple(round(ONE * math.comb(2 * j, j) / 4**j) for j in range(bands))
    assert prefix_error(root, **schedule, criterion=criterion) > 1.01 * free, "the square root would do as well"


def test_correlated_noise_beats_independent_noise_and_the_tree() -> None:
    """T=64, b=8, k=8, equal epsilon: prefix sums with noise 2.1 times less than independent, 1.5 times less than the tree's.

    Dense matrices compute the same figures in another way; the tree's is a lower bound, with the best decoder.
    """
    best = best_coefficients(8, **SCHEDULE)
    dense = toeplitz(best, 64)
    figures = {
        "correlated": prefix_errors(dense, widest_pattern_sensitivity(dense, **SCHEDULE)),
        "independent": prefix_errors(np.eye(64, dtype=np.int64), 8.0),
        "tree": prefix_errors(binary_tree(64), widest_pattern_sensitivity(binary_tree(64), **SCHEDULE)),
    }
    for name, coefficients in (("correlated", best), ("independent", (ONE,))):
        mean = prefix_error(coefficients, **SCHEDULE, criterion="mean")
        most = prefix_error(coefficients, **SCHEDULE, criterion="max")
        assert (mean, most) == pytest.approx(figures[name], rel=1e-9)
    assert figures["independent"][0] / figures["correlated"][0] > 2.1
    assert figures["tree"][0] / figures["correlated"][0] > 1.5


def test_calibration_meets_its_target_and_not_by_much() -> None:
    """Noise for one participation, or for k releases, would be unsound or wasteful."""
    common = {"clip_norm": 0.3, "devices": 1_000, "dimension": 9_216, "delta": DELTA}
    mechanism = calibrate_correlated(target_epsilon=2.0, **common, **SCHEDULE)  # type: ignore[arg-type]
    assert mechanism.bands == 8
    assert 1.98 < epsilon([mechanism.event()], DELTA) <= 2.0
    fewer = calibrate_correlated(target_epsilon=2.0, bands=4, **common, **SCHEDULE)  # type: ignore[arg-type]
    assert fewer.bands == 4 and fewer.noise_multiplier == mechanism.noise_multiplier
    with pytest.raises(BudgetError, match="the 64 rows of a run are one release"):
        calibrate_correlated(target_epsilon=1e-6, **common, **SCHEDULE)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="do not fit into 64 rounds: at most 8"):
        calibrate_correlated(target_epsilon=2.0, **common, **(SCHEDULE | {"participations": 9}))  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="share rows"):
        calibrate_correlated(target_epsilon=2.0, bands=9, **common, **SCHEDULE)  # type: ignore[arg-type]
