"""`local`: one record moves a step's sum by at most the sensitivity, and every constant is public."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from tests.references.gaussian import exact_norm_at_most

from stillroom_shared.accounting import epsilon
from stillroom_shared.errors import BudgetError, ProtocolError
from stillroom_shared.events import SampledGaussian
from stillroom_shared.local_mechanism import Local, calibrate_local, descend, noise_alone
from stillroom_shared.mechanism import RESOLUTION
from stillroom_shared.randomness import Randomness

DIMENSION = 200


def local(**changes: float) -> Local:
    fields: dict[str, float] = {
        "clip_norm": 0.3, "noise_multiplier": 2.0, "sampling_rate": 0.25, "steps": 4, "records": 16,
        "dimension": DIMENSION,
    }  # fmt: skip
    return Local(**(fields | changes))  # type: ignore[arg-type]


gradients = arrays.arrays(np.float32, DIMENSION, elements=st.floats(-(2.0**66), 2.0**66, width=32))


@settings(max_examples=100, deadline=None)
@given(gradient=gradients, clip_norm=st.floats(1e-6, 1e6))
def test_bounded_gradients_fit_the_sensitivity_exactly(gradient: np.ndarray, clip_norm: float) -> None:
    """Clipping in floating point leaves norms a rounding error above the bound; noise is scaled to the bound."""
    mechanism = local(clip_norm=clip_norm)
    assert exact_norm_at_most(mechanism.bound(gradient).astype(np.int64), mechanism.sensitivity)


def test_one_record_moves_a_sum_by_at_most_the_sensitivity_and_by_no_less() -> None:
    """Neighbouring data: the same records with one of them zeroed out, the longest among them."""
    mechanism, generator = local(), np.random.default_rng(0)
    rows = [generator.normal(size=DIMENSION).astype(np.float32) * scale for scale in (1e-3, 1.0, 1e6)]
    moved = []
    for left_out in range(len(rows)):
        total, without = (
            np.sum([mechanism.bound(np.zeros_like(row) if i in absent else row) for i, row in enumerate(rows)], axis=0)
            for absent in ((), (left_out,))
        )
        difference = total.astype(np.int64) - without.astype(np.int64)
        assert exact_norm_at_most(difference, mechanism.sensitivity)
        moved.append(float(np.linalg.norm(difference.astype(np.float64))))
    assert max(moved) > 0.999 * mechanism.sensitivity, "never reached: the test would pass for any clip norm"


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_not_finite_counts_as_zero(poison: float) -> None:
    """One NaN would turn the device's whole sum into garbage, and that is seen."""
    gradient = np.ones(DIMENSION, np.float32)
    gradient[3] = poison
    assert not local().bound(gradient).any()
    with pytest.raises(ProtocolError, match=r"\(1,\)"):
        local().bound(np.ones(1, np.float32))


def test_a_release_has_the_noise_of_its_event_and_a_public_denominator() -> None:
    """An empty batch shows the noise alone. Noise or denominator off by a tenth must be rejected."""
    mechanism = local(dimension=20_000)
    released = mechanism.release(np.zeros(20_000, np.int64), Randomness(seed="empty batch"))
    expected = mechanism.event().noise_multiplier * 0.3 / (0.25 * 16)
    standard_error = expected / np.sqrt(2 * len(released))
    assert abs(released.std() - expected) < 4 * standard_error
    assert abs(released.std() - 0.9 * expected) > 4 * standard_error
    assert abs(released.std() - 1.1 * expected) > 4 * standard_error
    total = np.full(20_000, RESOLUTION, np.int64)
    noise = mechanism.release(total, Randomness(seed="empty batch")) - released
    np.testing.assert_allclose(noise, 0.3 / 4, rtol=1e-6)


def test_records_are_sampled_poisson_at_the_accounted_rate() -> None:
    """A batch of fixed size has the same mean and is another mechanism; so are batches that depend on each other."""
    mechanism, randomness, draws = local(), Randomness(seed="coins"), 4_000
    coins = np.array([mechanism.sample(randomness) for _ in range(draws)])  # (draws, records)
    assert coins.shape == (draws, 16), "as many coins as places, however many records there are"
    for place in range(16):
        assert stats.binomtest(int(coins[:, place].sum()), draws, 0.25).pvalue > 1e-7
    sizes = Counter(coins.sum(axis=1).tolist())
    observed = np.array([sizes[size] for size in range(16)])
    expected = stats.binom(16, 0.25).pmf(np.arange(16)) * draws
    keep = expected > 5

    def p_value(counts: np.ndarray) -> float:
        scaled = expected[keep] * counts[keep].sum() / expected[keep].sum()
        return float(stats.chisquare(counts[keep], scaled).pvalue)

    fixed = np.zeros(16)
    fixed[4] = draws
    assert p_value(observed) > 1e-6
    assert p_value(fixed) < 1e-6


def test_a_round_costs_every_step_at_the_rate_of_records() -> None:
    """A round that is charged as one release hides steps - 1 of them."""
    mechanism = local()
    step = SampledGaussian(noise_multiplier=2.0, sampling_rate=0.25, sigma=2 * RESOLUTION, dimension=DIMENSION)
    assert epsilon([mechanism.event()], 1e-5) == epsilon([step] * 4, 1e-5)
    assert epsilon([mechanism.event()], 1e-5) > 1.5 * epsilon([step], 1e-5)
    assert epsilon([mechanism.event(participations=3, rounds=9)], 1e-5) == epsilon([step] * 12, 1e-5)
    assert mechanism.event(participations=3).distance == 12 * step.distance
    assert epsilon([mechanism.event(), step], 1e-5, "RDP") == epsilon([step] * 5, 1e-5, "RDP")


def test_calibration_counts_rounds_times_steps() -> None:
    """Noise calibrated for rounds alone would cost several times the target."""
    mechanism = calibrate_local(
        target_epsilon=4.0, delta=1e-5, rounds=5, clip_norm=0.3, sampling_rate=0.25, steps=4, records=16,
        dimension=DIMENSION,
    )  # fmt: skip
    assert 3.96 < epsilon([mechanism.event()] * 5, 1e-5) <= 4.0
    assert epsilon([mechanism.event(participations=5)], 1e-5) == epsilon([mechanism.event()] * 5, 1e-5)
    assert (mechanism.steps, mechanism.records, mechanism.clip_norm) == (4, 16, 0.3)


def test_impossible_plans_are_refused_with_the_reason() -> None:
    """A guess in place of a refusal would be a guarantee that does not hold."""
    for wrong, reason in (
        ({"noise_multiplier": 0.0}, "noise multiplier 0"),
        ({"noise_multiplier": float("nan")}, "noise multiplier nan"),
        ({"sampling_rate": 0.0}, r"sampling rate 0\.0"),
        ({"sampling_rate": 1.5}, r"sampling rate 1\.5"),
        ({"clip_norm": float("inf")}, "clip norm inf"),
        ({"steps": 0}, "0 steps"),
        ({"records": 0}, "at most 0 records"),
        ({"records": 1 << 21}, "1,048,576 records"),
        ({"dimension": 0}, "0 values"),
    ):
        with pytest.raises(BudgetError, match=reason):
            local(**wrong)
    plan = {"delta": 1e-9, "clip_norm": 1.0, "sampling_rate": 1.0, "records": 1, "dimension": 1}
    for target, rounds, steps, reason in (
        (0.001, 1_000, 5, "1000 rounds of 5 local steps.*cannot be met by 5000"),
        (0.0, 1, 1, "target epsilon 0"),
        (1.0, 0, 1, "0 rounds"),
        (1.0, 1, 0, "of 0 steps"),
    ):
        with pytest.raises(BudgetError, match=reason):
            calibrate_local(target_epsilon=target, rounds=rounds, steps=steps, **plan)  # type: ignore[arg-type]


def linear(values: np.ndarray, chosen: Sequence[Sequence[np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """Each record is its own gradient."""
    for device, own in enumerate(chosen):
        yield from ((device, record) for record in own)


def test_a_device_beside_others_gets_what_it_would_get_alone() -> None:
    """Noise, coins or sums that are shared between simulated devices would be another mechanism."""
    mechanism, generator = local(), np.random.default_rng(1)
    start = generator.normal(size=DIMENSION).astype(np.float32)
    records = [[generator.normal(size=DIMENSION).astype(np.float32) for _ in range(n)] for n in (5, 0, 16)]

    def streams() -> list[Randomness]:
        return [Randomness(seed=f"{device}") for device in range(3)]

    together = descend(mechanism, start, records, linear, learning_rate=0.5, randomness=streams())
    for device, stream in enumerate(streams()):
        alone = descend(mechanism, start, [records[device]], linear, learning_rate=0.5, randomness=[stream])
        np.testing.assert_array_equal(together[device], alone[0])
    assert np.abs(together[0] - together[2]).max() > 1e-3


@pytest.mark.parametrize("size", [0.0, 1.0, -(2.0**34), 1e30, 3.4e38])
@pytest.mark.parametrize("learning_rate", [0.5, 1e-30, 1e38, 1e300])
def test_a_device_without_records_makes_noise_alone_from_every_adapter(size: float, learning_rate: float) -> None:
    """A change that is a difference of iterates has the grid of the adapter, which tells who started from it."""
    mechanism, seen = local(dimension=50), []

    def gradients(values: np.ndarray, chosen: Sequence[Sequence[None]]) -> list[tuple[int, np.ndarray]]:
        seen.append(values)
        return []

    start = np.full(50, size, np.float32)
    with np.errstate(all="ignore"):
        streams = [Randomness(seed="n") for _ in "ab"]
        (own,) = descend(mechanism, start, [[]], gradients, learning_rate=learning_rate, randomness=streams[:1])
        alone = noise_alone(mechanism, learning_rate=learning_rate, randomness=streams[1])
    np.testing.assert_array_equal(own, alone)
    if learning_rate < 1:
        assert len(np.unique(own)) == 50 and not np.array_equal(own, np.float32(0.9) * alone)
    assert all(np.isfinite(values).all() for values in seen), "a tower's adapter that is refused makes a device fail"
    assert len(seen) == mechanism.steps


def test_a_record_that_is_zeroed_moves_one_step_by_its_bounded_gradient() -> None:
    """Neighbours under the same coins and noise, through the loop that devices and simulations run."""
    mechanism, generator = local(sampling_rate=1.0, steps=1), np.random.default_rng(2)
    records = [generator.normal(size=DIMENSION).astype(np.float32) * 100 for _ in range(4)]
    start = np.zeros(DIMENSION, np.float32)

    def update(own: list[np.ndarray]) -> np.ndarray:
        made = descend(mechanism, start, [own], linear, learning_rate=1.0, randomness=[Randomness(seed="n")])
        return np.asarray(made[0])

    moved = update(records) - update([*records[:3], np.zeros_like(start)])
    np.testing.assert_allclose(np.linalg.norm(moved), mechanism.clip_norm / mechanism.denominator, rtol=1e-4)
