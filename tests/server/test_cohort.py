"""Cohorts are Poisson: independent coins, so their size varies."""

from __future__ import annotations

import numpy as np

from stillroom_server.cohort import poisson_cohort
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
