"""The audit with one query as the unit: canary records in the steps that devices run under `local`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tests.references.dp_sgd import dp_sgd

from stillroom_shared.accounting import epsilon
from stillroom_shared.local_mechanism import Local, descend
from stillroom_shared.randomness import Randomness
from stillroom_simulations.canaries import canary_directions
from stillroom_simulations.one_run_audit import MechanismRun, OneRunAudit, audit_one_run

RECORDS, STEPS, RATE, DELTA, EPSILON_ONE = 1_000, 10, 0.1, 1e-5, 1.742


@pytest.fixture(scope="module")
def directions() -> np.ndarray:
    return canary_directions(RECORDS, Randomness(seed="records"))


@pytest.fixture(scope="module")
def accounted() -> float:
    return epsilon([mechanism(noise_multiplier=EPSILON_ONE, sampling_rate=RATE).event()], DELTA)


def mechanism(*, noise_multiplier: float, sampling_rate: float, steps: int = STEPS) -> Local:
    return Local(
        clip_norm=1.0, noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps, records=RECORDS,
        dimension=2 * RECORDS,
    )  # fmt: skip


def training(directions: np.ndarray, made: Local, *, seed: str = "training") -> MechanismRun:
    """The steps of `local` on the canary records; one that is absent has gradient zero."""

    def run(present: np.ndarray) -> np.ndarray:
        def gradients(values: np.ndarray, chosen: Sequence[Sequence[int]]) -> list[tuple[int, np.ndarray]]:
            # Clipping is part of what is audited.
            return [(0, (-10 * directions[i] * present[i]).astype(np.float32)) for i in chosen[0]]

        return descend(
            made, np.zeros(made.dimension, np.float32), [range(RECORDS)], gradients, learning_rate=1.0,
            randomness=[Randomness(seed=seed)],
        )  # fmt: skip

    return run


def audited(directions: np.ndarray, *, noise_multiplier: float, sampling_rate: float) -> OneRunAudit:
    run = training(directions, mechanism(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate))
    return audit_one_run(run, directions, delta=DELTA, randomness=Randomness(seed="coins"))


def test_the_bound_stays_below_what_is_accounted(directions: np.ndarray, accounted: float) -> None:
    """The same audit, another unit: what is masked is a record, not a device."""
    seen = audited(directions, noise_multiplier=EPSILON_ONE, sampling_rate=RATE)
    assert seen.lower_bound < accounted <= 1.0
    assert seen.correct > seen.guesses * 0.5, "the attacker does not see the canaries"


@pytest.mark.parametrize(
    ("noise_multiplier", "sampling_rate", "least"),
    [(EPSILON_ONE / 5, RATE, 1.0), (EPSILON_ONE, 1.0, 1.0), (1e-6, RATE, 3.0)],
    ids=["noise 5 times too small", "every record in every step", "no noise"],
)
def test_broken_training_is_caught(
    directions: np.ndarray, accounted: float, noise_multiplier: float, sampling_rate: float, least: float
) -> None:
    """Accounted as epsilon 1 (query level, delta 1e-5, against readers of releases), and not so."""
    seen = audited(directions, noise_multiplier=noise_multiplier, sampling_rate=sampling_rate)
    assert seen.lower_bound > max(least, accounted)


def test_a_step_is_that_of_the_reference(directions: np.ndarray) -> None:
    """One step, the same coins: coins, clipping, sum and denominator against the slow twin that draws them one by one."""
    present = np.arange(RECORDS) % 3 > 0
    made = mechanism(noise_multiplier=1e-6, sampling_rate=RATE, steps=1)
    found = training(directions, made, seed="twin")(present)[0] * made.denominator
    [expected] = dp_sgd(
        10 * directions * present[:, None], noise_multiplier=0.0, sampling_rate=RATE, steps=1,
        randomness=Randomness(seed="twin"),
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=2e-4)  # the twin has a coarser grid
    assert np.linalg.norm(expected) > 5, "hardly any record was drawn"
