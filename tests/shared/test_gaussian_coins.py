"""Coins that floats decide are the coins of infinite precision."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext

import numpy as np
import pytest

from stillroom_shared import gaussian_coins
from stillroom_shared.noise import LARGEST_SIGMA, discrete_gaussian
from stillroom_shared.randomness import Randomness

SIGMAS = [1, 3, (1 << 29) + 1, 1 << 44, LARGEST_SIGMA - 1]


class Script(Randomness):
    """A stream whose further bits are known beforehand."""

    def __init__(self, *words: int) -> None:
        super().__init__(seed="script")
        self.left = list(words)

    def bits(self, count: int) -> int:
        word = self.left.pop(0)
        assert word < 1 << count
        return word


def width_of(sigma: int) -> int:
    return (6 * sigma // 5).bit_length()


def scaled(high: int, magnitude: int, sigma: int, bits: int) -> int:
    """floor(2^(bits + high) exp(-magnitude^2 / (2 sigma^2))), by the decimal module, which rounds correctly."""
    with localcontext() as context:
        context.prec = 300
        return int((-Decimal(magnitude**2) / Decimal(2 * sigma**2)).exp() * 2 ** (bits + high))


def points(sigma: int) -> list[tuple[int, int]]:
    """Blocks and places in them: ends, neighbours of ends, and where floats represent few of the integers."""
    size, chosen = 1 << width_of(sigma), np.random.default_rng(sigma % 1000)
    lows = {0, 1, size - 2, size - 1, size // 3, sigma % size, *(int(size * u) for u in chosen.random(5))}
    return [(high, low) for high in (0, 1, 2, 3, 5, 8) for low in sorted(lows) if high or low]


def flip(word: int, high: int, low: int, sigma: int, further: Sequence[int] = ()) -> tuple[bool, int]:
    """One coin, and how many further words of its uniform were left unread."""
    script = Script(*further)
    arguments = np.array([word], np.uint64), np.array([high]), np.array([low], np.uint64)
    [heads] = gaussian_coins.gaussian_coins(*arguments, width_of(sigma), sigma, script)
    return bool(heads), len(script.left)


@pytest.mark.parametrize("margin", [gaussian_coins.MARGIN, 1.0])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_coins_are_exact_at_the_edge_of_their_probability(
    sigma: int, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float comparison is wrong within some last digits of the probability: what Mironov's attack reads."""
    monkeypatch.setattr(gaussian_coins, "MARGIN", margin)
    tried = 0
    for high, low in points(sigma):
        edge = scaled(high, (high << width_of(sigma)) + low, sigma, 64)  # of 64 bits: the last that may show heads
        for word in {0, edge // 2, edge - (1 << 30), edge - 1000, edge - 1}:
            assert not 0 <= word < edge or flip(word, high, low, sigma) == (True, 0), (high, low, edge - word)
        for word in {edge + 1, edge + 1000, edge + (1 << 30), 2 * edge + 2, (1 << 64) - 1}:
            if edge < word < 1 << 64:
                assert flip(word, high, low, sigma) == (False, 0), (high, low, word - edge)
                tried += 1
    assert tried > 50


@pytest.mark.parametrize("sigma", SIGMAS)
def test_an_undecided_coin_goes_on_with_the_same_uniform(sigma: int) -> None:
    """A second, fresh uniform after an undecided first one shows heads too often or too rarely."""
    tried = 0
    for high, low in points(sigma):
        magnitude, word = (high << width_of(sigma)) + low, (1 << 64) - 1
        edge, finer, finest = (scaled(high, magnitude, sigma, bits) for bits in (64, 128, 256))
        second, third = finer & word, finest & (1 << 128) - 1
        if edge and 1 << 20 < second < word - (1 << 20) and 0 < third < (1 << 128) - 1:
            assert flip(edge, high, low, sigma, [0]) == flip(edge, high, low, sigma, [second - 1]) == (True, 0)
            assert flip(edge, high, low, sigma, [second + 1]) == flip(edge, high, low, sigma, [word]) == (False, 0)
            assert flip(edge, high, low, sigma, [second, third - 1, 7]) == (True, 1)
            assert flip(edge, high, low, sigma, [second, third + 1, 7]) == (False, 1)
            tried += 1
    assert tried > 4


@pytest.mark.parametrize("sigma", SIGMAS)
def test_floats_keep_the_margin_with_room_to_spare(sigma: int) -> None:
    """A processor or a NumPy whose exponential is worse than documented must be noticed before it moves probabilities."""
    cases = points(sigma)
    found = gaussian_coins.float_probabilities(
        np.array([high for high, _ in cases]), np.array([low for _, low in cases], np.uint64), width_of(sigma), sigma
    )
    for (high, low), probability in zip(cases, found.tolist(), strict=True):
        exact = scaled(high, (high << width_of(sigma)) + low, sigma, 100)
        assert abs(int(probability * 2.0**100) - exact) < 2 ** (100 - 48), (high, low)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_margin_moves_no_sample(sigma: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If floats and integers disagreed, or read the stream differently, samples would depend on the processor."""
    samples = {}
    for margin in (0.0, gaussian_coins.MARGIN, 0.01, 1.0):
        monkeypatch.setattr(gaussian_coins, "MARGIN", margin)
        samples[margin] = discrete_gaussian(sigma, 500, Randomness(seed="margin")).tolist()
    assert samples[0.0] == samples[gaussian_coins.MARGIN] == samples[0.01] == samples[1.0]


def test_bounds_enclose_the_exponential_closely() -> None:
    """Bounds that round inwards decide coins that are not decided yet."""
    chosen = np.random.default_rng(0)
    fractions = [(0, 1), (1, 1), (1, 2), (10**30, 10**30 + 1), (1, 10**30), (10**4, 1), (10**6, 7**3)]
    fractions += [(int(a), int(b)) for a, b in chosen.integers(1, 1 << 40, (200, 2))]
    for numerator, denominator in fractions:
        for bits in (1, 64, 130, 700):
            lower, upper = gaussian_coins.exponential_bounds(numerator, denominator, bits)
            with localcontext() as context:
                context.prec = 300
                exact = (-Decimal(numerator) / Decimal(denominator)).exp() * 2**bits
            assert lower <= exact <= upper <= lower + 2
