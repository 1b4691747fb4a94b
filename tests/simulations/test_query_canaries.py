"""The audit with one query as the unit: canary records in DP-SGD, accounted as Poisson-sampled Gaussian steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.references.dp_sgd import GRID, dp_sgd

from stillroom_shared.accounting import SampledGaussian, epsilon
from stillroom_shared.randomness import Randomness
from stillroom_simulations.canaries import canary_directions
from stillroom_simulations.one_run_audit import MechanismRun, OneRunAudit, audit_one_run

RECORDS, STEPS, RATE, DELTA, EPSILON_ONE = 1_000, 10, 0.1, 1e-5, 1.742


@pytest.fixture(scope="module")
def directions() -> np.ndarray:
    return canary_directions(RECORDS, Randomness(seed="records"))


@pytest.fixture(scope="module")
def accounted() -> float:
    step = SampledGaussian(
        noise_multiplier=EPSILON_ONE, sampling_rate=RATE, sigma=math.ceil(EPSILON_ONE * GRID), dimension=2 * RECORDS
    )
    return epsilon([step] * STEPS, DELTA)


def training(directions: np.ndarray, *, noise_multiplier: float, sampling_rate: float) -> MechanismRun:
    """DP-SGD on the canary records; one that is absent has gradient zero. Put another training in its place to audit it."""

    def run(present: np.ndarray) -> np.ndarray:
        gradients = 10 * directions * present[:, None]  # clipping is part of what is audited
        return dp_sgd(
            gradients, noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=STEPS,
            randomness=Randomness(seed="training"),
        )  # fmt: skip

    return run


def audited(directions: np.ndarray, *, noise_multiplier: float, sampling_rate: float) -> OneRunAudit:
    run = training(directions, noise_multiplier=noise_multiplier, sampling_rate=sampling_rate)
    return audit_one_run(run, directions, delta=DELTA, randomness=Randomness(seed="coins"))


def test_the_bound_stays_below_what_is_accounted(directions: np.ndarray, accounted: float) -> None:
    """The same audit, another unit: what is masked is a record, not a device."""
    seen = audited(directions, noise_multiplier=EPSILON_ONE, sampling_rate=RATE)
    assert seen.lower_bound < accounted <= 1.0
    assert seen.correct > seen.guesses * 0.5, "the attacker does not see the canaries"


@pytest.mark.parametrize(
    ("noise_multiplier", "sampling_rate", "least"),
    [(EPSILON_ONE / 5, RATE, 1.0), (EPSILON_ONE, 1.0, 1.0), (0.0, RATE, 3.0)],
    ids=["noise 5 times too small", "every record in every step", "no noise"],
)
def test_broken_training_is_caught(
    directions: np.ndarray, accounted: float, noise_multiplier: float, sampling_rate: float, least: float
) -> None:
    """Accounted as epsilon 1 (query level, delta 1e-5, against readers of releases), and not so."""
    seen = audited(directions, noise_multiplier=noise_multiplier, sampling_rate=sampling_rate)
    assert seen.lower_bound > max(least, accounted)
