"""One device's point fits the sensitivity, the noise is what is charged, and the interval covers the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.references.gaussian import exact_norm_at_most

from stillroom_server.verdict import Policy
from stillroom_shared.comparison import LEVEL, PRESENCE, SPREAD, Comparison, Estimate
from stillroom_shared.errors import BudgetError
from stillroom_shared.randomness import Randomness


def comparison(**changes: float) -> Comparison:
    fields: dict[str, float] = {"bound": 0.2, "noise_multiplier": 4.0, "sampling_rate": 1.0, "devices": 200} | changes
    return Comparison(**fields)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(difference=st.floats(-1, 1), bound=st.floats(1e-3, 1))
def test_a_device_s_point_fits_the_sensitivity_exactly(difference: float, bound: float) -> None:
    """Two coordinates that are bounded one by one have a longer norm together than the noise was scaled for."""
    own = comparison(bound=bound)
    assert exact_norm_at_most(own.answer(difference).astype(np.int64), own.mechanism.sensitivity)
    assert own.mechanism.admit(own.answer(difference))


def test_zeroing_one_device_moves_the_sum_of_points_by_at_most_the_sensitivity_and_by_no_less() -> None:
    """Neighbouring data: the same population with one device's difference left out."""
    own = comparison()
    for largest in (own.bound, -own.bound, 1.0, -1.0):
        others = [own.answer(value).astype(np.int64) for value in (0.03, -0.2, 0.11)]
        present, zeroed = (np.stack([*others, own.answer(last).astype(np.int64)]) for last in (largest, None))
        moved = present.sum(axis=0) - zeroed.sum(axis=0)
        assert exact_norm_at_most(moved, own.mechanism.sensitivity)
        assert np.linalg.norm(moved.astype(np.float64)) > 0.999 * own.mechanism.sensitivity


def test_nothing_to_say_and_not_finite_are_zeros() -> None:
    """A device that sends anything else when it has no held-back query tells that it has none."""
    for nothing in (None, math.nan, math.inf, -math.inf):
        assert comparison().answer(nothing).tolist() == [0, 0, 0]
    with pytest.raises(BudgetError, match="difference of nDCG"):
        comparison(bound=0.0)


def test_the_interval_knows_the_noise_that_is_added_and_other_scales_are_rejected() -> None:
    """An interval that is computed for less noise than was added is too short, and nobody sees it."""
    own, samples = comparison(), 3_000
    randomness = Randomness(seed="comparison noise")
    released = np.array([own.mechanism.release(np.zeros(3, np.int64), randomness).update for _ in range(samples)])
    stated = own.estimate(released[0]).noise
    assert stated == pytest.approx(4.0 * 0.2 * math.sqrt(1 + SPREAD**2 + PRESENCE**2) / 200, rel=1e-6)

    def variance_is(scale: float) -> bool:
        error = math.sqrt(2 / samples)  # relative standard error of a Gaussian's variance
        return bool((np.abs(released.var(axis=0) / scale**2 - 1) < 4 * error).all())

    assert variance_is(stated)
    assert not variance_is(0.9 * stated)
    assert not variance_is(1.1 * stated)


POPULATIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "most have nothing to say": lambda g, n: np.where(g.random(n) < 0.8, np.nan, g.normal(0.05, 0.3, n)),
    "few lose much": lambda g, n: np.where(g.random(n) < 0.05, -0.5, 0.03),
    "alike": lambda g, n: g.normal(0.0, 0.02, n),
}
"""Differences of devices; NaN: nothing to score."""


def released(own: Comparison, differences: np.ndarray, randomness: Randomness) -> Estimate:
    """One evaluation of these devices; those that are asked have a difference, the others are NaN."""
    scored = ~np.isnan(differences)
    values = np.clip(differences[scored], -own.bound, own.bound)
    points = np.array([values.sum(), SPREAD * (values**2).sum() / own.bound, PRESENCE * own.bound * scored.sum()])
    total = np.rint(points * own.mechanism.sensitivity / own.mechanism.clip_norm).astype(np.int64)
    return own.estimate(own.mechanism.release(total, randomness).update)


@pytest.mark.parametrize("kind", POPULATIONS)
@pytest.mark.parametrize(
    ("devices", "rate", "noise"), [(150, 1.0, 4.0), (600, 0.3, 1.0), (200, 1.0, 0.5), (200, 1.0, 40.0)]
)
def test_the_interval_covers_the_truth(kind: str, devices: int, rate: float, noise: float) -> None:
    """An interval that leaves out the noise, the cohort or the devices themselves decides with too much confidence."""
    own = comparison(devices=devices, sampling_rate=rate, noise_multiplier=noise)
    generator, trials = np.random.default_rng(7), 1_500
    draw = POPULATIONS[kind]
    everybody = draw(generator, 2_000_000)
    truth = float(np.nan_to_num(np.clip(everybody, -own.bound, own.bound)).mean())
    share = float(1 - np.isnan(everybody).mean())
    randomness = Randomness(seed=f"coverage {kind}")
    covered = short = below = 0
    for _ in range(trials):
        values = np.where(generator.random(devices) < rate, draw(generator, devices), np.nan)
        found = released(own, values, randomness)
        covered += found.low <= truth <= found.high
        short += abs(found.difference - truth) <= 0.5 * (found.high - found.difference)
        below += found.least_answered <= share
        assert abs(found.answered - share) < 8 * (found.noise / PRESENCE / own.bound + (rate * devices) ** -0.5)
    tolerance = 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)
    assert covered / trials >= LEVEL - tolerance
    assert below / trials >= 0.995 - 3 * math.sqrt(0.005 / trials)
    if kind != "alike":  # whether devices differ little cannot be told from so few of them, and is not assumed
        assert short / trials < LEVEL - tolerance, "half of the interval would do: it is wide for no reason"


@pytest.mark.parametrize("devices", [100, 500, 2_000])
@pytest.mark.parametrize(("share", "difference"), [(0.0, 0.0), (0.02, -0.2), (0.15, -0.05), (0.6, -0.015)])
@pytest.mark.parametrize("policy", [Policy(), Policy(require="better")])
def test_silence_publishes_nothing(devices: int, share: float, difference: float, policy: Policy) -> None:
    """Devices that are offline, decline or have nothing to score add zeros, and a mean of zeros is not worse than anything."""
    own, trials = comparison(bound=0.1, devices=devices), 400
    generator, randomness = np.random.default_rng(3), Randomness(seed=f"silence {devices} {share}")
    published = 0
    for _ in range(trials):
        values = np.where(generator.random(devices) < share, difference, np.nan)
        published += policy.verdict(released(own, values, randomness)) == "publish"
    chance = 0.025 + 0.005
    assert published / trials <= chance + 3 * math.sqrt(chance * (1 - chance) / trials)


def test_what_is_hardly_worse_is_published_where_enough_devices_say_so() -> None:
    """A rule that publishes nothing is safe, and of no use."""
    own, randomness, generator = comparison(bound=0.1, devices=2_000), Randomness(seed="said"), np.random.default_rng(5)
    for share in (0.3, 1.0):
        values = np.where(generator.random(2_000) < share, generator.normal(0.004, 0.03, 2_000), np.nan)
        found = released(own, values, randomness)
        assert Policy(margin=0.02).verdict(found) == "publish"
        assert found.least_answered < share < 1.2 * found.answered
