"""Cohorts are Poisson, so their size varies, or take turns, so that participations are few and far apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stillroom_server.cohort import Rotation, poisson_cohort
from stillroom_shared.errors import BudgetError
from stillroom_shared.randomness import Randomness

ENROLLED = [f"device-{i}" for i in range(200)]


def test_size_has_the_mean_and_the_variance_of_poisson_sampling() -> None:
    """Fixed-size sampling has the same mean and no variance; accounting it as Poisson is unsound."""
    randomness, draws, rate = Randomness(seed="cohorts"), 2_000, 0.3
    sizes = np.array([len(poisson_cohort(ENROLLED, rate, randomness)) for _ in range(draws)])
    mean, variance = 200 * rate, 200 * rate * (1 - rate)
    assert abs(sizes.mean() - mean) < 4 * np.sqrt(variance / draws)
    assert abs(sizes.var() - variance) < 4 * variance * np.sqrt(2 / draws)
    fixed = np.full(draws, int(mean))
    assert abs(fixed.var() - variance) > 4 * variance * np.sqrt(2 / draws), "the test would accept a fixed size"


def test_devices_are_sampled_independently_and_alike() -> None:
    """A generator that is reused for every device would sample neighbours together."""
    randomness, draws = Randomness(seed="pairs"), 2_000
    taken = np.array([[name in cohort for name in ENROLLED[:20]] for cohort in
                      (set(poisson_cohort(ENROLLED[:20], 0.5, randomness)) for _ in range(draws))])  # fmt: skip
    assert np.abs(taken.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(draws)
    off_diagonal = np.corrcoef(taken.T) - np.eye(20)
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(draws)


def test_rate_one_takes_everybody() -> None:
    """An off-by-one in the coin would leave a device out of a census."""
    assert poisson_cohort(ENROLLED, 1.0, Randomness()) == tuple(ENROLLED)


@pytest.mark.parametrize(("devices", "separation", "rounds"), [(200, 8, 64), (200, 7, 30), (9, 9, 20), (5, 1, 6)])
def test_turns_keep_the_separation_and_the_cap(devices: int, separation: int, rounds: int) -> None:
    """One device that comes back a round early breaks the sensitivity of every row it is in."""
    participations = math.ceil(rounds / separation)
    rotation = Rotation(
        federation="f", enrolled=tuple(ENROLLED[:devices]), separation=separation, participations=participations
    )
    joined: dict[str, list[int]] = {name: [] for name in rotation.enrolled}
    for number in range(1, rounds + 1):
        cohort = rotation.cohort(number)
        assert len(set(cohort)) == len(cohort) in (devices // separation, math.ceil(devices / separation))
        for name in cohort:
            joined[name].append(number)
    for numbers in joined.values():
        assert len(numbers) in (rounds // separation, participations)
        assert set(np.diff(numbers).tolist()) <= {separation}
    with pytest.raises(BudgetError, match=f"would be participation {participations + 1}"):
        rotation.cohort(separation * participations + 1)
    with pytest.raises(BudgetError, match="would be participation 0"):
        rotation.cohort(0)


def test_turns_depend_on_names_and_federation_only() -> None:
    """Groups that follow the order of enrolment would move when a list is sorted, in the middle of a run."""
    rotation = Rotation(federation="f", enrolled=tuple(ENROLLED), separation=8, participations=2)
    sorted_anew = Rotation(federation="f", enrolled=tuple(reversed(ENROLLED)), separation=8, participations=2)
    other = Rotation(federation="g", enrolled=tuple(ENROLLED), separation=8, participations=2)
    for number in range(1, 17):
        assert set(rotation.cohort(number)) == set(sorted_anew.cohort(number))
    assert set(rotation.cohort(1)) != set(other.cohort(1))
    assert set(rotation.cohort(1)) != set(ENROLLED[::8])


def test_a_rotation_that_cannot_keep_its_promise_is_refused() -> None:
    """A name twice is a device in two groups; more groups than devices are rounds of noise alone."""
    with pytest.raises(BudgetError, match="occurs twice"):
        Rotation(federation="f", enrolled=("a", "b", "a"), separation=2, participations=1)
    for separation in (0, 3):
        with pytest.raises(BudgetError, match=f"separation {separation} for 2 devices"):
            Rotation(federation="f", enrolled=("a", "b"), separation=separation, participations=1)
