"""The estimate from canary scores: two Gaussians, both directions, both variances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.references import one_run_audit as reference
from tests.references.gaussian import gaussian_delta

from stillroom_shared.errors import SettingsError
from stillroom_simulations.canary_estimate import estimate_epsilon, gaussian_divergence, gaussian_epsilon


@pytest.mark.parametrize("mean", [-1.0, 0.0, 2.5])
@pytest.mark.parametrize("deviation", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
def test_the_divergence_is_the_integral(mean: float, deviation: float, epsilon: float) -> None:
    """The best set has four shapes; a root taken on the wrong side is right for some and wrong for others."""
    expected = reference.gaussian_divergence(mean, deviation, epsilon)
    assert gaussian_divergence(mean, deviation, epsilon) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 3.73])
def test_equal_variances_give_the_gaussian_mechanism(noise_multiplier: float) -> None:
    """For the mechanism that the paper proves its estimate correct for, it is the exact epsilon."""
    found = gaussian_epsilon(1 / noise_multiplier, 1.0, delta=1e-5)
    assert gaussian_delta(found, noise_multiplier) == pytest.approx(1e-5, rel=1e-3)


def test_both_directions_count() -> None:
    """A mechanism that adds less noise where a unit is absent leaks in one direction only."""
    assert gaussian_epsilon(0.0, 2.0, delta=1e-5) == pytest.approx(gaussian_epsilon(0.0, 0.5, delta=1e-5), abs=1e-5)
    assert gaussian_epsilon(0.0, 2.0, delta=1e-5) > 5


def test_the_estimate_does_not_depend_on_units_of_the_scores() -> None:
    """Scores are in clip norms over cohort size; an estimate that changes with these says nothing."""
    generator = np.random.default_rng(1)
    present, absent = generator.normal(0.5, 1.1, 500), generator.normal(0.0, 1.0, 500)
    plain = estimate_epsilon(present, absent, delta=1e-5)
    assert estimate_epsilon(present * 1e-6 + 3, absent * 1e-6 + 3, delta=1e-5) == pytest.approx(plain, rel=1e-5)
    assert 1 < plain < 5


def test_extremes() -> None:
    """No noise is no small epsilon, and equal scores are no large one."""
    zeros = np.zeros(10)
    assert estimate_epsilon(zeros + 1, zeros, delta=1e-5) == math.inf
    assert estimate_epsilon(zeros, zeros, delta=1e-5) == 0.0
    assert gaussian_epsilon(1e6, 1.0, delta=1e-5) == math.inf
    with pytest.raises(SettingsError, match="1 present and 10 absent"):
        estimate_epsilon(zeros[:1], zeros, delta=1e-5)
