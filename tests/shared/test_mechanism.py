"""Sensitivity on neighbouring data, and every edge case of the table in `stillroom_shared.mechanism`."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.references.gaussian import exact_norm_at_most

from stillroom_shared.accounting import epsilon
from stillroom_shared.errors import BudgetError, ProtocolError
from stillroom_shared.events import SampledGaussian, Unprotected
from stillroom_shared.mechanism import RESOLUTION, Central, NoPrivacy, calibrate
from stillroom_shared.randomness import Randomness

DIMENSION = 200


def central(**changes: float) -> Central:
    fields: dict[str, float] = {
        "clip_norm": 0.3,
        "noise_multiplier": 2.0,
        "sampling_rate": 0.5,
        "devices": 100,
    } | changes
    return Central(**fields, dimension=DIMENSION)  # type: ignore[arg-type]


finite = arrays.arrays(np.float32, DIMENSION, elements=st.floats(-(2.0**66), 2.0**66, width=32))


@settings(max_examples=200, deadline=None)
@given(update=finite, clip_norm=st.floats(1e-6, 1e6))
def test_bounded_updates_fit_the_sensitivity_exactly(update: np.ndarray, clip_norm: float) -> None:
    """Clipping in floating point leaves norms a rounding error above the bound; noise is scaled to the bound."""
    bounded = central(clip_norm=clip_norm).bound(update)
    assert exact_norm_at_most(bounded.astype(np.int64), central().sensitivity)


def test_one_device_moves_the_sum_by_at_most_the_sensitivity() -> None:
    """Neighbouring data: the same population with one device's update zeroed out."""
    mechanism = central()
    generator = np.random.default_rng(0)
    updates = [mechanism.bound(generator.normal(size=DIMENSION).astype(np.float32) * s) for s in (1e-3, 1.0, 1e6)]
    total = sum(update.astype(np.int64) for update in updates)
    moved = []
    for left_out in range(len(updates)):
        without = sum(u.astype(np.int64) for i, u in enumerate(updates) if i != left_out)
        difference = np.asarray(total - without)
        assert exact_norm_at_most(difference, mechanism.sensitivity)
        moved.append(float(np.linalg.norm(difference.astype(np.float64))))
    assert max(moved) > 0.999 * mechanism.sensitivity, (
        "the bound is never reached: the test would pass for any clip norm"
    )


def test_a_short_update_is_kept_and_a_long_one_keeps_its_direction() -> None:
    """Clipping that always normalizes, or that clips each coordinate, also satisfies the bound."""
    mechanism, generator = central(clip_norm=2.0), np.random.default_rng(1)
    short = (generator.normal(size=DIMENSION) * 0.01).astype(np.float32)
    np.testing.assert_allclose(mechanism.bound(short) * (2.0 / RESOLUTION), short, atol=2.0 / RESOLUTION)
    long = short * 1e4
    np.testing.assert_allclose(
        mechanism.bound(long) * (2.0 / RESOLUTION), long * (2.0 / np.linalg.norm(long)), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mechanism", [central(), NoPrivacy(sampling_rate=0.5, devices=100, dimension=DIMENSION)])
def test_not_finite_counts_as_zero(mechanism: Central | NoPrivacy, poison: float) -> None:
    """One NaN would turn the whole release into NaN, or into garbage integers."""
    update = np.ones(DIMENSION, np.float32)
    update[7] = poison
    assert not mechanism.bound(update).any()


def test_zero_stays_zero() -> None:
    """A zero update divides by its norm."""
    assert not central().bound(np.zeros(DIMENSION, np.float32)).any()


def test_a_wrong_length_is_refused() -> None:
    """Broadcasting would add one value to every coordinate."""
    with pytest.raises(ProtocolError, match=r"\(1,\).*needs \(200,\)"):
        central().bound(np.ones(1, np.float32))


def test_the_server_admits_only_what_fits() -> None:
    """A defective device must not be able to spend more of everybody's privacy than the noise covers."""
    mechanism = central()
    fits = np.zeros(DIMENSION, np.int32)
    fits[0] = RESOLUTION
    assert mechanism.admit(fits)
    too_long = fits.copy()
    too_long[1] = 1
    assert not mechanism.admit(too_long)
    assert not mechanism.admit(np.full(DIMENSION, np.iinfo(np.int32).min, np.int32))
    assert not mechanism.admit(fits[:-1])
    assert not mechanism.admit(fits.astype(np.int64))


def test_the_norm_bit_says_what_was_clipped_and_is_zero_when_nothing_was_sent() -> None:
    """With the sign turned round, the clip norm runs away from the norms that it should follow."""
    mechanism = central(norm_bit=0.1)
    short, long = np.full(DIMENSION, 1e-3, np.float32), np.full(DIMENSION, 1.0, np.float32)
    bits = [int(mechanism.bound(update)[-1]) for update in (short, long, 0 * long, np.nan * long)]
    assert bits[0] == -bits[1] == int(0.1 * RESOLUTION)
    assert bits[2:] == [0, 0]
    released = [
        mechanism.release(mechanism.bound(update).astype(np.int64) * 50, Randomness(seed="quiet")).unclipped
        for update in (short, long)
    ]
    error = mechanism.noise_multiplier * 1.005 / (2 * 0.1 * mechanism.denominator)
    assert released == pytest.approx([1.0, 0.0], abs=5 * error)
    assert released[0] is not None
    assert released[1] is not None
    assert released[0] - released[1] == pytest.approx(1.0, abs=1e-6), "same noise, opposite bits"


def test_the_norm_bit_is_part_of_the_sensitivity_and_of_the_event() -> None:
    """A bit that is released beside the sum with noise of its own, or with none, is a spend nobody recorded."""
    mechanism = central(norm_bit=0.5)
    bounded = mechanism.bound(np.full(DIMENSION, 1e3, np.float32)).astype(np.int64)
    assert bounded.shape == (DIMENSION + 1,)
    assert exact_norm_at_most(bounded, mechanism.sensitivity)
    assert float(np.linalg.norm(bounded.astype(np.float64))) > 0.999 * mechanism.sensitivity
    assert not exact_norm_at_most(bounded, RESOLUTION), "the bound without the bit would do as well"
    assert mechanism.sigma >= 2.0 * mechanism.sensitivity
    assert mechanism.event().dimension == DIMENSION + 1
    assert mechanism.event().noise_multiplier == 2.0


def test_the_noise_is_never_below_the_multiple_that_is_accounted() -> None:
    """A product of floats that is rounded down to an integer is no product rounded up."""
    rounded_down = 0
    for norm_bit in (0.0, 0.1, 0.5):
        sensitivity = central(norm_bit=norm_bit).sensitivity
        for number in range(1, 3_001):
            multiplier = (
                sensitivity + 12_345 * number
            ) / sensitivity  # its product is an integer, but for a rounding error
            exact = Fraction(multiplier) * sensitivity
            assert exact <= central(norm_bit=norm_bit, noise_multiplier=multiplier).sigma < exact + 1
            rounded_down += math.ceil(multiplier * sensitivity) < exact
    assert rounded_down > 100, "no product was rounded down: the test would pass for floats"


def test_a_larger_norm_bit_is_not_admitted() -> None:
    """A device that claims ten clipped updates moves the sum further than the noise covers."""
    mechanism = central(norm_bit=0.1)
    update = mechanism.bound(np.ones(DIMENSION, np.float32))
    assert mechanism.admit(update)
    update[-1] *= 10
    assert not mechanism.admit(update)
    assert not mechanism.admit(update[:-1])


def test_release_adds_the_noise_it_accounts_for_and_divides_by_a_public_number() -> None:
    """An empty cohort shows the noise alone; its scale and the denominator must be those of the event."""
    mechanism = Central(clip_norm=0.3, noise_multiplier=2.0, sampling_rate=0.5, devices=100, dimension=20_000)
    released = mechanism.release(np.zeros(20_000, np.int64), Randomness(seed="empty cohort")).update
    expected = mechanism.event().noise_multiplier * 0.3 / 50
    standard_error = expected / np.sqrt(2 * len(released))
    assert abs(released.std() - expected) < 4 * standard_error
    assert abs(released.std() - 0.9 * expected) > 4 * standard_error
    assert abs(released.std() - 1.1 * expected) > 4 * standard_error


def test_the_baseline_is_exact() -> None:
    """A baseline that clips or rounds coarsely would flatter the private runs."""
    mechanism = NoPrivacy(sampling_rate=0.5, devices=4, dimension=3)
    update = np.array([0.5, -3.0, 1e-3], np.float32)
    total = mechanism.bound(update).astype(np.int64) * 2
    np.testing.assert_allclose(mechanism.release(total, Randomness()).update, update, atol=1e-6)
    assert mechanism.event() == Unprotected(dimension=3)
    assert epsilon([mechanism.event()], 1e-5) == float("inf")


def test_calibration_meets_its_target_and_not_by_much() -> None:
    """Noise calibrated with the wrong rate or number of rounds is either unsound or wasteful."""
    mechanism = calibrate(
        target_epsilon=2.0, delta=1e-4, rounds=10, clip_norm=0.3, sampling_rate=0.5, devices=1_000, dimension=DIMENSION
    )
    assert 1.98 < epsilon([mechanism.event()] * 10, 1e-4) <= 2.0


def test_impossible_plans_are_refused_with_the_reason() -> None:
    """A guess in place of a refusal would be a guarantee that does not hold."""
    with pytest.raises(BudgetError, match="noise multiplier 0"):
        central(noise_multiplier=0.0)
    with pytest.raises(BudgetError, match=r"sampling rate 1\.5"):
        central(sampling_rate=1.5)
    with pytest.raises(BudgetError, match="clip norm"):
        central(clip_norm=float("inf"))
    with pytest.raises(BudgetError, match="cannot be met by 5000 rounds"):
        calibrate(
            target_epsilon=0.001, delta=1e-9, rounds=5000, clip_norm=1.0, sampling_rate=1.0, devices=10, dimension=1
        )


def test_event_carries_what_was_done() -> None:
    """An event that forgets sampling or scale is accounted as something else."""
    event = central().event()
    assert event == SampledGaussian(noise_multiplier=2.0, sampling_rate=0.5, sigma=2 * RESOLUTION, dimension=DIMENSION)


def test_sampling_does_not_count_for_a_device() -> None:
    """The coordinator knows who took part."""
    event = central().participation_event()
    assert event.sampling_rate == 1.0
    assert event.noise_multiplier == central().noise_multiplier
    baseline = NoPrivacy(sampling_rate=0.5, devices=100, dimension=DIMENSION)
    assert baseline.participation_event() == Unprotected(dimension=DIMENSION)
