"""The noise is what the accountant thinks it is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from tests.references import canonne_kamath_steinke
from tests.references.gaussian import discrete_gaussian_pmf, rounded_gaussian_pmf

from stillroom_shared.noise import LARGEST_SIGMA, discrete_gaussian, rounding_distance
from stillroom_shared.randomness import Randomness

SAMPLES = 200_000


def _variance_is(draws: np.ndarray, sigma: float) -> bool:
    """Accept within 4 standard errors of the variance of a Gaussian."""
    error = sigma**2 * np.sqrt(2 / len(draws))
    return bool(abs(np.mean(draws.astype(np.float64) ** 2) - sigma**2) < 4 * error)


@pytest.mark.parametrize("sigma", [5, 1_000, 1 << 30, 3 << 43, LARGEST_SIGMA])
def test_scale_is_right_and_wrong_scales_are_rejected(sigma: int) -> None:
    """Noise a tenth too small would pass every functional test and break the guarantee."""
    draws = discrete_gaussian(sigma, SAMPLES, Randomness(seed=f"scale {sigma}"))
    assert _variance_is(draws, sigma)
    assert not _variance_is(draws, 0.9 * sigma)
    assert not _variance_is(draws, 1.1 * sigma)


@pytest.mark.parametrize("sigma", [1, 2, 3])
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


@pytest.mark.parametrize("sigma", [2, (1 << 40) + 1])
def test_the_slow_twin_has_the_same_distribution(sigma: int) -> None:
    """One proof in a docstring is little: two samplers with nothing in common must agree."""
    slow = canonne_kamath_steinke.discrete_gaussian(sigma, 20_000, Randomness(seed="slow"))
    edges = np.unique(np.quantile(slow, np.linspace(0, 1, 20)[1:-1]))

    def p_value(draws: np.ndarray) -> float:
        counts = [np.bincount(np.digitize(each, edges), minlength=len(edges) + 1) for each in (slow, draws)]
        return float(stats.chi2_contingency(np.array(counts)).pvalue)

    assert p_value(discrete_gaussian(sigma, SAMPLES, Randomness(seed="fast"))) > 1e-3
    assert p_value(1.1 * discrete_gaussian(sigma, SAMPLES, Randomness(seed="fast"))) < 1e-6
    assert p_value(discrete_gaussian(sigma, SAMPLES, Randomness(seed="fast")) / 1.1) < 1e-6


def test_samples_are_independent_of_their_neighbours_and_of_how_many_are_drawn() -> None:
    """Vectors that share words between samples, or batches that repeat, correlate what the accountant takes as independent."""
    draws = discrete_gaussian(1 << 29, SAMPLES, Randomness(seed="neighbours")) / (1 << 29)
    for lag in (1, 2, 3, 9_216, 1 << 14):
        assert abs(np.mean(draws[lag:] * draws[:-lag])) < 4 / np.sqrt(SAMPLES)
        assert abs(np.mean(draws[lag:] ** 2 * draws[:-lag] ** 2) - 1) < 4 * np.sqrt(8 / SAMPLES)
    assert len(np.unique(draws)) > 0.99 * SAMPLES
    ones = np.array(
        [discrete_gaussian(7, 1, randomness)[0] for randomness in [Randomness(seed="one")] for _ in range(9_000)]
    )
    assert _variance_is(ones, 7) and not _variance_is(ones, 0.9 * 7) and not _variance_is(ones, 1.1 * 7)


class Script(Randomness):
    """A stream whose first trial finds zeros only, until a run of coins ends after `run` further ones; others are rejected."""

    def __init__(self, run: int) -> None:
        super().__init__(seed="script")
        self.run = run

    def words(self, count: int) -> np.ndarray:
        low, coins, uniform = words = np.full((3, count // 3), (1 << 64) - 1, np.uint64)
        low[0], coins[0], uniform[0] = 1 << 63, 0, 0
        return words.ravel()

    def bits(self, count: int) -> int:
        self.run -= count == 1
        return int(count == 1 and self.run < 0)


def test_the_farthest_tail_exists() -> None:
    """A run of coins cut off at the end of its word would make samples impossible that the mechanism's proof counts on."""
    assert discrete_gaussian(1, 1, Script(run=7)).tolist() == [2 * (63 + 7) + 1]
    with pytest.raises(OverflowError, match="passes 64 bits"):
        discrete_gaussian(LARGEST_SIGMA, 1, Script(run=0))


def test_no_samples_and_impossible_scales() -> None:
    """Sigma 0 is no noise at all, and a scale beyond 64 bits wraps around."""
    none = discrete_gaussian(1 << 29, 0, Randomness(seed="none"))
    assert none.shape == (0,) and none.dtype == np.int64
    for sigma in (0, -1, LARGEST_SIGMA + 1):
        with pytest.raises(ValueError, match=r"choose an integer from 1 to 2\^58"):
            discrete_gaussian(sigma, 1, Randomness(seed="none"))


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


def test_words_and_bits_share_no_bit() -> None:
    """A word that bits were made of already is no longer random."""
    stream = Randomness(seed="shared").bits(8 * 4096).to_bytes(4096, "little")
    randomness = Randomness(seed="shared")
    first, words, rest = randomness.bits(5), randomness.words(100), randomness.bits(2043)
    assert (first | rest << 5).to_bytes(256, "little") == stream[:256]
    assert words.dtype == np.uint64
    assert b"".join(word.to_bytes(8, "little") for word in words.tolist()) == stream[256:1056]
    assert randomness.bits(64) == int.from_bytes(stream[1056:1064], "little")
    assert randomness.words(0).shape == (0,)
