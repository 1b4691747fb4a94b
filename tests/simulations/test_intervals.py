"""Bootstrap intervals: coverage that a wrong width fails, agreement with a slow twin, and pairing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from stillroom_shared.errors import DataError
from stillroom_simulations.intervals import (
    Interval,
    interval_of_mean,
    interval_of_ratio,
    intervals_of_means,
    intervals_over_sets,
)

Floats = NDArray[np.float64]
REPEATS, RESAMPLES = 400, 500
Draw = Callable[[np.random.Generator, float], tuple[Interval, float]]  # (generator, level) -> (interval, truth)


def coverage(draw: Draw, level: float, scales: tuple[float, ...] = (1.0, 2 / 3, 1.5)) -> list[float]:
    """Share of repeats in which the interval holds the truth, once for each factor that its width is stretched by."""
    generator = np.random.default_rng(20)
    drawn = [draw(generator, level) for _ in range(REPEATS)]
    low, value, high, truth = np.array([(i.low, i.value, i.high, truth) for i, truth in drawn]).T
    held = [(value - s * (value - low) <= truth) & (truth <= value + s * (high - value)) for s in scales]
    return [float(share.mean()) for share in held]


def close(share: float, level: float) -> bool:
    """Within four standard errors of the level."""
    return abs(share - level) <= 4 * math.sqrt(level * (1 - level) / REPEATS)


def skewed(generator: np.random.Generator, n: int = 250) -> tuple[Floats, Floats]:
    """Scores as retrieval gives them: many zeros, many ones; the student's follow the teacher's, at 0.9 of them."""
    teacher = generator.choice([0.0, 0.3, 0.5, 1.0], p=[0.35, 0.2, 0.15, 0.3], size=n)
    return teacher * generator.choice([0.0, 1.0], p=[0.1, 0.9], size=n), teacher


def draw_mean(generator: np.random.Generator, level: float) -> tuple[Interval, float]:
    found = interval_of_mean(skewed(generator)[1], generator=generator, resamples=RESAMPLES, level=level)
    return found, 0.2 * 0.3 + 0.15 * 0.5 + 0.3


def draw_ratio(generator: np.random.Generator, level: float) -> tuple[Interval, float]:
    return interval_of_ratio(*skewed(generator), generator=generator, resamples=RESAMPLES, level=level), 0.9


@pytest.mark.parametrize("draw", [draw_mean, draw_ratio])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_coverage_over_queries(draw: Draw, level: float) -> None:
    """An interval too narrow calls luck an improvement; one too wide hides a missed goal."""
    as_is, narrow, wide = coverage(draw, level)
    assert close(as_is, level)
    assert not close(narrow, level), "the test would accept an interval of two thirds of the width"
    if level == 0.8:  # four standard errors above 0.95 lie beyond 1
        assert not close(wide, level), "the test would accept an interval of one and a half times the width"


def seeded(generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Twelve seeds' student scores (12, n), whose level varies by seed, and the teacher's (n,); their ratio is 0.9."""
    teacher = generator.beta(0.5, 0.5, 150)
    level = 0.9 + generator.normal(0.0, 0.02, (12, 1))
    return teacher * level + generator.normal(0.0, 0.02, (12, 150)), teacher


def draw_seeded(generator: np.random.Generator, level: float) -> tuple[Interval, float]:
    return interval_of_ratio(*seeded(generator), generator=generator, resamples=RESAMPLES, level=level), 0.9


def draw_queries_only(generator: np.random.Generator, level: float) -> tuple[Interval, float]:
    student, teacher = seeded(generator)
    found = interval_of_ratio(student.mean(axis=0), teacher, generator=generator, resamples=RESAMPLES, level=level)
    return found, 0.9


def test_coverage_over_queries_and_seeds() -> None:
    """With seeds that matter, resampling queries alone states a certainty that another seed would refute."""
    as_is, narrow, wide = coverage(draw_seeded, 0.8)
    assert close(as_is, 0.8) and not close(narrow, 0.8) and not close(wide, 0.8)
    assert coverage(draw_queries_only, 0.8)[0] < 0.5


def test_seed_variance_is_unbiased_for_three_seeds() -> None:
    """Drawing s of s seeds, not s - 1, makes the variance between three seeds a third too small."""
    ratios = []
    for seed in range(40):
        level = np.random.default_rng(seed).normal(1.0, 0.1, 3)
        found = interval_of_mean(np.repeat(level[:, None], 9, axis=1), generator=np.random.default_rng(seed), level=0.5)
        # Two of three seeds with replacement: half of the resamples lie between the inner two of nine equal outcomes.
        ordered = np.sort([(a + b) / 2 for a in level for b in level])
        ratios.append((found.high - found.low) / (ordered[6] - ordered[2]))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.02)


def test_equals_a_slow_twin() -> None:
    """A block edge that drops or repeats resamples, or weights that are off by one, change widths by little."""
    generator = np.random.default_rng(3)
    student, teacher = skewed(generator, 400)
    rows = generator.integers(0, 400, (20_000, 400))
    means = [(student[row].mean(), teacher[row].mean()) for row in rows]
    expected = [np.quantile(figures, [0.025, 0.975]) for figures in ([a for a, _ in means], [a / b for a, b in means])]
    mean = interval_of_mean(student, generator=generator, resamples=20_000)
    ratio = interval_of_ratio(student, teacher, generator=generator, resamples=20_000)
    for found, twin in zip((mean, ratio), expected, strict=True):
        width = twin[1] - twin[0]
        np.testing.assert_allclose(found.ends, twin, rtol=0, atol=0.03 * width)


def test_columns_share_their_resamples() -> None:
    """Metrics of one system are compared in a table: resampled apart, each would have its own luck."""
    _, teacher = skewed(np.random.default_rng(0))
    table = np.stack([teacher, teacher, 1 - teacher], axis=1)
    one, two, opposite = intervals_of_means(table, generator=np.random.default_rng(1))
    assert one == two
    assert opposite.low == pytest.approx(1 - one.high) and opposite.high == pytest.approx(1 - one.low)
    alone = interval_of_mean(teacher, generator=np.random.default_rng(1))
    assert alone.ends == pytest.approx(one.ends)


def test_ratio_is_paired() -> None:
    """Unpaired, the spread of query difficulty swamps a difference that every single query shows."""
    _, teacher = skewed(np.random.default_rng(0))
    found = interval_of_ratio(0.97 * teacher, teacher, generator=np.random.default_rng(1))
    assert found.ends == pytest.approx((0.97, 0.97))
    mean = interval_of_mean(teacher, generator=np.random.default_rng(1))
    assert mean.high - mean.low > 0.1  # guard: difficulty does vary


def test_seeds_share_their_queries() -> None:
    """If each seed drew queries of its own, averaging seeds would shrink the variance that queries cause."""
    _, teacher = skewed(np.random.default_rng(0))
    one = interval_of_mean(teacher, generator=np.random.default_rng(1))
    many = interval_of_mean(np.tile(teacher, (5, 1)), generator=np.random.default_rng(1))
    assert (many.high - many.low) / (one.high - one.low) == pytest.approx(1.0, abs=0.05)


def test_deterministic_given_the_generator() -> None:
    """An interval that changes with each run cannot be a figure of record."""
    student, teacher = skewed(np.random.default_rng(0))
    first, second, other = (interval_of_ratio(student, teacher, generator=np.random.default_rng(s)) for s in (1, 1, 2))
    assert first == second != other


def test_what_is_refused() -> None:
    """NaN spreads through every resample; unpaired shapes would be broadcast into nonsense; 0 / 0 is no ratio."""
    generator = np.random.default_rng(0)
    with pytest.raises(DataError, match="2 values, 1 of them not finite"):
        interval_of_mean([0.1, float("nan")], generator=generator)
    with pytest.raises(DataError, match="0 values"):
        interval_of_mean([], generator=generator)
    with pytest.raises(DataError, match=r"shapes \(1, 3\) and \(2,\) are not paired"):
        interval_of_ratio([1, 2, 3], [1, 2], generator=generator)
    with pytest.raises(DataError, match=r"shapes \(2, 3\) and \(3, 3\) are not paired"):
        interval_of_ratio(np.ones((2, 3)), np.ones((3, 3)), generator=generator)
    with pytest.raises(DataError, match=r"the denominator's mean is 0\.0"):
        interval_of_ratio([1.0, 2.0], [0.0, 0.0], generator=generator)
    with pytest.raises(DataError, match="some resamples have a denominator of 0"):
        interval_of_ratio([1.0, 2.0], [0.0, 1.0], generator=generator)
    with pytest.raises(DataError, match="level = 95 is not a share"):
        interval_of_mean([0.1, 0.2], generator=generator, level=95)


def draw_over_sets(generator: np.random.Generator, level: float) -> tuple[Interval, float]:
    """Two sets of unlike size and mean: queries pooled would weigh the large one four times."""
    small = generator.choice([0.0, 1.0], p=[0.7, 0.3], size=60)
    large = generator.choice([0.0, 1.0], p=[0.1, 0.9], size=240)
    [found] = intervals_over_sets([small, large], generator=generator, resamples=RESAMPLES, level=level)
    return found, 0.6


def test_coverage_over_sets() -> None:
    """Pooling the queries, or resampling sets as if they were one, gives intervals around another figure."""
    as_is, narrow, wide = coverage(draw_over_sets, 0.8)
    assert close(as_is, 0.8)
    assert not close(narrow, 0.8) and not close(wide, 0.8)


def test_sets_weigh_the_same_and_one_set_is_itself() -> None:
    """The estimate is the mean of the means, and a single set must not get another interval than it has alone."""
    small, large = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]] * 9)
    both = intervals_over_sets([small, large], generator=np.random.default_rng(0))
    assert [one.value for one in both] == [0.5, 0.5]
    values = np.random.default_rng(1).random((30, 2))
    alone = intervals_over_sets([values], generator=np.random.default_rng(2))
    assert alone == intervals_of_means(values, generator=np.random.default_rng(2))
    with pytest.raises(DataError, match="give equal ones"):
        intervals_over_sets([small, np.ones((3, 1))], generator=np.random.default_rng(0))
