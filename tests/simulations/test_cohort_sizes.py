"""The test of cohort sizes accepts Poisson sampling as often as it says and rejects what is not."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from tests.references import one_run_audit as reference

from stillroom_server.cohort import poisson_cohort
from stillroom_shared.errors import SettingsError
from stillroom_shared.randomness import Randomness
from stillroom_simulations.cohort_sizes import FALSE_ALARM, cohort_size_p_value

ENROLLED = [f"device-{i}" for i in range(500)]


@pytest.mark.parametrize("sizes", [[2, 2, 2], [0, 6, 3], [1, 2, 3], [6, 6, 6]])
def test_the_p_value_is_exact(sizes: list[int]) -> None:
    """A Gaussian approximation is wrong by orders of magnitude where one in a million is decided."""
    exact = float(reference.cohort_size_p_value(sizes, devices=6, rate=Fraction(3, 8)))
    assert cohort_size_p_value(sizes, devices=6, sampling_rate=3 / 8) == pytest.approx(exact, abs=1e-12)


def test_real_cohorts_are_accepted_and_other_samplers_rejected() -> None:
    """Fixed-size sampling accounted as Poisson has the right mean, and an epsilon that does not hold."""
    randomness, chooser, rounds, rate = Randomness(seed="cohorts"), random.Random(0), 60, 0.2

    def p_value(sizes: list[int]) -> float:
        return cohort_size_p_value(sizes, devices=len(ENROLLED), sampling_rate=rate)

    assert p_value([len(poisson_cohort(ENROLLED, rate, randomness)) for _ in range(rounds)]) > 1e-3
    assert p_value([len(chooser.sample(ENROLLED, 100)) for _ in range(rounds)]) < FALSE_ALARM
    # Coins that are tossed for pairs of devices: the mean is right, the variance doubled.
    assert p_value([2 * len(poisson_cohort(ENROLLED[::2], rate, randomness)) for _ in range(10 * rounds)]) < FALSE_ALARM
    assert p_value([len(poisson_cohort(ENROLLED, rate * 1.1, randomness)) for _ in range(10 * rounds)]) < FALSE_ALARM
    assert p_value([len(poisson_cohort(ENROLLED, rate * 0.9, randomness)) for _ in range(10 * rounds)]) < FALSE_ALARM


def test_false_alarms_are_as_rare_as_stated() -> None:
    """A p-value that is too small convicts real cohorts; one too large sees nothing."""
    generator = np.random.default_rng(0)
    p_values = np.array(
        [cohort_size_p_value(sizes, devices=300, sampling_rate=0.3)
         for sizes in generator.binomial(300, 0.3, (1_500, 8)).tolist()]
    )  # fmt: skip
    for level in (0.5, 0.1, 0.01):
        error = 4 * np.sqrt(level * (1 - level) / len(p_values))
        assert level * 0.8 - error < np.mean(p_values <= level) < level + error


def test_a_census_has_one_size() -> None:
    """At rate 1 the variance is zero, and dividing by it is not a test."""
    assert cohort_size_p_value([7, 7, 7], devices=7, sampling_rate=1.0) == 1.0
    assert cohort_size_p_value([7, 6, 7], devices=7, sampling_rate=1.0) < FALSE_ALARM


def test_impossible_sizes_are_refused() -> None:
    """A cohort larger than the population means that the wrong thing was counted."""
    with pytest.raises(SettingsError, match="from 0 to 7"):
        cohort_size_p_value([8], devices=7, sampling_rate=0.5)
