"""The noise is what the accountant thinks it is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from tests.references.gaussian import discrete_gaussian_pmf, rounded_gaussian_pmf

from stillroom_shared.noise import discrete_gaussian, rounding_distance
from stillroom_shared.randomness import Randomness

SAMPLES = 40_000


def _variance_is(draws: np.ndarray, sigma: float) -> bool:
    """Accept within 4 standard errors of the variance of a Gaussian."""
    error = sigma**2 * np.sqrt(2 / len(draws))
    return bool(abs(np.mean(draws.astype(np.float64) ** 2) - sigma**2) < 4 * error)


@pytest.mark.parametrize("sigma", [5, 1_000, 1 << 30])
def test_scale_is_right_and_wrong_scales_are_rejected(sigma: int) -> None:
    """Noise a tenth too small would pass every functional test and break the guarantee."""
    draws = discrete_gaussian(sigma, SAMPLES, Randomness(seed=f"scale {sigma}"))
    assert _variance_is(draws, sigma)
    assert not _variance_is(draws, 0.9 * sigma)
    assert not _variance_is(draws, 1.1 * sigma)


@pytest.mark.parametrize("sigma", [1, 3])
def test_small_scales_have_the_exact_probabilities(sigma: int) -> None:
    """A sampler off by one in its rejection step has nearly the right variance, but not the right shape."""
    reach = 4 * sigma
    draws = discrete_gaussian(sigma, SAMPLES, Randomness(seed=f"shape {sigma}"))
    observed = np.bincount(np.clip(draws, -reach, reach) + reach, minlength=2 * reach + 1)

    def p_value(pmf: np.ndarray) -> float:
        expected = pmf / pmf.sum() * SAMPLES
        keep = expected > 5
        return float(
            stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue
        )

    assert p_value(discrete_gaussian_pmf(sigma, reach)) > 1e-3
    assert p_value(discrete_gaussian_pmf(1.1 * sigma, reach)) < 1e-6
    assert p_value(discrete_gaussian_pmf(0.9 * sigma, reach)) < 1e-6


def test_large_scale_is_gaussian_in_distribution() -> None:
    """Grid steps must not show: low bits are as random as the rest, and the tails are there."""
    sigma = 1 << 30
    draws = discrete_gaussian(sigma, SAMPLES, Randomness(seed="shape"))
    assert stats.kstest(draws / sigma, "norm").pvalue > 1e-3
    assert stats.kstest(draws / (1.1 * sigma), "norm").pvalue < 1e-6
    low = np.bincount(draws & 15, minlength=16)
    assert stats.chisquare(low).pvalue > 1e-3


@pytest.mark.parametrize("sigma", [1, 2, 5, 20])
def test_rounding_distance_bounds_the_true_distance(sigma: int) -> None:
    """The slack added to delta must cover the real distance, and not by an order of magnitude."""
    reach = 12 * sigma
    distance = 0.5 * np.abs(discrete_gaussian_pmf(sigma, reach) - rounded_gaussian_pmf(sigma, reach)).sum()
    assert distance <= rounding_distance(sigma, 1)
    assert rounding_distance(sigma, 1) < 10 * distance


def test_an_unseeded_stream_does_not_repeat() -> None:
    """Two rounds with the same noise would let it be subtracted."""
    assert Randomness().bits(256) != Randomness().bits(256)
    assert Randomness(seed="a").bits(256) != Randomness(seed="b").bits(256)


def test_below_is_uniform_for_awkward_bounds() -> None:
    """Reduction modulo the bound instead of rejection favours small values."""
    randomness = Randomness(seed="below")
    counts = np.bincount([randomness.below(48) for _ in range(48_000)], minlength=48)
    assert stats.chisquare(counts).pvalue > 1e-3
