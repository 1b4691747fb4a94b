"""`local`: one record moves a step's sum by at most the sensitivity, and every constant is public."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from tests.references.gaussian import exact_norm_at_most

from stillroom_shared.accounting import SampledGaussian, epsilon
from stillroom_shared.errors import BudgetError, ProtocolError
from stillroom_shared.ledger import Ledger
from stillroom_shared.local_mechanism import Local, calibrate_local, charge
from stillroom_shared.mechanism import RESOLUTION
from stillroom_shared.randomness import Randomness
from stillroom_shared.signing import SigningKey

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
    expected = mechanism.events()[0].noise_multiplier * 0.3 / (0.25 * 16)
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
    assert mechanism.events() == (step,) * 4
    assert epsilon(mechanism.events(), 1e-5) > 1.5 * epsilon([step], 1e-5)


def test_calibration_counts_rounds_times_steps() -> None:
    """Noise calibrated for rounds alone would cost several times the target."""
    mechanism = calibrate_local(
        target_epsilon=4.0, delta=1e-5, rounds=5, clip_norm=0.3, sampling_rate=0.25, steps=4, records=16,
        dimension=DIMENSION,
    )  # fmt: skip
    assert 3.96 < epsilon(mechanism.events() * 5, 1e-5) <= 4.0
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


def test_the_ledger_composes_over_rounds_and_restarts(tmp_path: Path) -> None:
    """A privacy engine made anew each round starts from epsilon zero: this one is a file."""
    mechanism, key, delta = local(), SigningKey.generate(), 1e-5
    for number in (1, 2):  # a process each: nothing but the file and the key is carried over
        with Ledger.create(tmp_path / "ledger.sqlite3", key=key, about={"device": True}) as ledger:
            charge(ledger, mechanism, {"round": number, "attempt": 1})
    with Ledger.open(tmp_path / "ledger.sqlite3", public_key=key.public) as ledger:
        ledger.verify()
        spent = ledger.events()
    assert spent == list(mechanism.events() * 2)
    assert epsilon(spent, delta) == epsilon(mechanism.events() * 2, delta)
    assert epsilon(spent, delta) > 1.2 * epsilon(mechanism.events(), delta)


def test_an_attempt_is_charged_before_it_is_answered_and_once(tmp_path: Path) -> None:
    """Two answers to one attempt are two releases under one charge, also after a crash between two steps."""
    mechanism, key = local(), SigningKey.generate()
    with Ledger.create(tmp_path / "ledger.sqlite3", key=key, about={"device": True}) as ledger:
        charge(ledger, mechanism, {"round": 1})
        with pytest.raises(BudgetError, match="charged already"):
            charge(ledger, mechanism, {"round": 1})
        ledger.spend(mechanism.events()[0], budget=None, purpose={"round": 2, "step": 1})  # and then it crashed
        with pytest.raises(BudgetError, match="charged already"):
            charge(ledger, mechanism, {"round": 2})
        assert len(ledger.events()) == mechanism.steps + 1
        with pytest.raises(BudgetError, match="names a step"):
            charge(ledger, mechanism, {"round": 3, "step": 1})
