"""Bootstrap intervals: how far a figure could move had other queries, or other seeds, been drawn.

Percentile intervals (Efron & Tibshirani 1993, chapter 13; Sakai 2006 for retrieval). They respect the range of a
metric, and for the hundreds of queries used here BCa's correction is below the Monte Carlo error of the resampling.
Everything is paired: a resampled query brings the scores of all systems with it.

| over | resampled | assumption |
|---|---|---|
| queries | n of n | exchangeable; owners are not resampled, so the claim is about these owners |
| queries of several sets | n_i of n_i in each set | sets are not resampled: the claim is about these sets |
| queries and seeds | n of n queries, the same for all seeds; s - 1 of s seeds | crossed, not nested |

Crossed data are resampled along both axes (Owen 2007, the pigeonhole bootstrap), which errs to the wide side. Drawing
s - 1 of s seeds makes their variance unbiased (Rao & Wu 1988); drawing s would make it a third too small for three
seeds. No resampling knows the tails of three values: such an interval is honest about queries and rough about seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stillroom_shared.errors import DataError

FloatArray = NDArray[np.float64]

RESAMPLES = 5_000
LEVEL = 0.95
_BLOCK_VALUES = 1 << 21  # resampling weights held at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the interval around it, in the unit of the figure.

    >>> generator = np.random.default_rng(0)
    >>> print(interval_of_ratio([0.4, 0.8, 0.3, 0.5] * 50, [0.5, 0.8, 0.3, 0.6] * 50, generator=generator))
    0.909 (95% 0.896 to 0.922)
    """

    value: float
    low: float
    high: float
    level: float = LEVEL

    @property
    def ends(self) -> tuple[float, float]:
        """Lower and upper end."""
        return self.low, self.high

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.level:.0%} {self.low:.3f} to {self.high:.3f})"


def intervals_of_means(
    table: ArrayLike, *, generator: np.random.Generator, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[Interval, ...]:
    """The interval of the mean of each column of `table` (n queries, columns), all from the same resamples."""
    return intervals_over_sets([table], generator=generator, resamples=resamples, level=level)


def intervals_over_sets(
    tables: Sequence[ArrayLike],
    *,
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[Interval, ...]:
    """The interval of the mean over data sets of the means over their queries, of each column.

    Every set weighs the same, however many queries it has. Queries are resampled within their set (stratified: Davison and
    Hinkley 1997, section 3.2), sets are not: the claim is about these sets.

    Args:
        tables: one of (n_i queries, columns) for each set; the columns are the same.
    """
    values = [_table(table) for table in tables]
    if not values or len({table.shape[1] for table in values}) > 1:
        raise DataError(
            f"{len(values)} tables of {sorted({table.shape[1] for table in values})} columns: give equal ones"
        )
    sums = np.zeros((resamples, values[0].shape[1]))
    for table in values:
        drawn = [times @ table for times in _draws(len(table), resamples, generator)]
        sums += np.concatenate(drawn) / len(table)  # (B, columns)
    means = sums / len(values)
    whole = np.mean([table.mean(axis=0) for table in values], axis=0)
    return tuple(_percentile(float(v), m, level) for v, m in zip(whole, means.T, strict=True))


def interval_of_mean(
    values: ArrayLike, *, generator: np.random.Generator, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The interval of a mean over queries. A paired difference is the mean of the differences.

    Args:
        values: (n,) one value for each query; or (s, n) for s seeds and the same n queries in the same order.
    """
    return _combined(values, None, generator, resamples, level)


def interval_of_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The interval of mean(numerator) / mean(denominator), paired over queries, and over seeds where there are any.

    Args:
        numerator: (n,), or (s, n) for s seeds and the same n queries in the same order.
        denominator: the same shape; or (n,) beside (s, n) for what no seed changes, such as the teacher.

    Raises:
        DataError: shapes do not fit, a value is not finite, or a denominator's mean is not positive.
    """
    return _combined(numerator, denominator, generator, resamples, level)


def interval_over_sets_and_seeds(
    numerators: Sequence[ArrayLike],
    denominators: Sequence[ArrayLike] | None = None,
    *,
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The interval of a mean over data sets, which all weigh the same; or of the ratio of two such means.

    Queries are resampled within their set and paired; a seed is drawn with its scores on all sets.

    Args:
        numerators: for each set (s, n_i), with the same seeds; (n_i,) for one.
        denominators: the same shapes, or (n_i,) for what no seed changes.

    Raises:
        DataError: shapes do not fit, a value is not finite, or the denominators' mean is not positive.
    """
    tops = [np.atleast_2d(_finite(one)) for one in numerators]
    belows = [np.ones_like(top) for top in tops] if denominators is None else [_finite(one) for one in denominators]
    fit = all(below.shape in {top.shape, top.shape[1:]} for top, below in zip(tops, belows, strict=True))
    if not tops or len({len(top) for top in tops}) > 1 or not fit:
        raise DataError(
            f"{len(tops)} sets of shapes {[top.shape for top in tops]}: give equal seeds and paired queries"
        )
    seeds = len(tops[0])
    sums, whole = np.zeros((resamples, seeds, 2)), np.zeros(2)
    for top, below in zip(tops, belows, strict=True):
        both = np.stack([top, np.broadcast_to(below, top.shape)], axis=2)  # (s, n, 2)
        whole += both.mean(axis=(0, 1))
        side_by_side = both.transpose(1, 0, 2).reshape(top.shape[1], -1) / top.shape[1]
        drawn = [times @ side_by_side for times in _draws(top.shape[1], resamples, generator)]
        sums += np.concatenate(drawn).reshape(resamples, seeds, 2)
    if whole[1] <= 0:
        raise DataError(f"the denominators' mean is {whole[1] / len(tops)}: a ratio needs a positive one")
    kept = np.ones((resamples, 1)) if seeds == 1 else _drawn_seeds(seeds, resamples, generator)
    top_sums, below_sums = (sums * kept[:, :, None]).sum(axis=1).T
    if not below_sums.all():
        raise DataError("some resamples have a denominator of 0: too few queries score above 0 for a ratio")
    return _percentile(float(whole[0] / whole[1]), top_sums / below_sums, level)


def _drawn_seeds(seeds: int, resamples: int, generator: np.random.Generator) -> FloatArray:
    """How often each seed is drawn in each resample, s - 1 in all: (resamples, s)."""
    return generator.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=resamples).astype(np.float64)


def interval_of_median_ratio(
    numerators: Sequence[ArrayLike],
    denominators: Sequence[ArrayLike],
    *,
    generator: np.random.Generator,
    resamples: int = 1_000,
    level: float = LEVEL,
) -> Interval:
    """The interval of a ratio of medians, averaged over seeds and sets: of times, whose means a single pause moves.

    Args:
        numerators, denominators: for each set (s, n_i), the times of the same queries, measured in turns.
    """
    tops, belows = ([np.atleast_2d(_finite(one)) for one in part] for part in (numerators, denominators))
    if not tops or any(top.shape != below.shape for top, below in zip(tops, belows, strict=True)):
        raise DataError("times are not paired: give the same queries and seeds for both")
    seeds = len(tops[0])
    ratios, whole = np.zeros((resamples, seeds)), np.zeros(seeds)
    for top, below in zip(tops, belows, strict=True):
        whole += np.median(top, axis=1) / np.median(below, axis=1) / len(tops)
        drawn = generator.integers(0, top.shape[1], (resamples, top.shape[1]))
        for seed in range(seeds):
            ratios[:, seed] += np.median(top[seed][drawn], axis=1) / np.median(below[seed][drawn], axis=1) / len(tops)
    kept = np.ones((resamples, 1)) if seeds == 1 else _drawn_seeds(seeds, resamples, generator)
    kept = np.broadcast_to(kept, ratios.shape)
    return _percentile(float(whole.mean()), (ratios * kept).sum(axis=1) / kept.sum(axis=1), level)


def _combined(
    numerator: ArrayLike, denominator: ArrayLike | None, generator: np.random.Generator, resamples: int, level: float
) -> Interval:
    top = np.atleast_2d(_finite(numerator))  # (s, n)
    below = np.ones_like(top) if denominator is None else _finite(denominator)
    if top.ndim != 2 or below.shape not in {top.shape, top.shape[1:]}:
        raise DataError(
            f"shapes {top.shape} and {below.shape} are not paired: give (n,) or (seeds, n) of the same queries"
        )
    both = np.stack([top, np.broadcast_to(below, top.shape)], axis=2)  # (s, n, 2)
    if (totals := both.mean(axis=(0, 1)))[1] <= 0:
        raise DataError(f"the denominator's mean is {totals[1]}: a ratio needs a positive one")
    seeds, queries, _ = both.shape
    side_by_side = both.transpose(1, 0, 2).reshape(queries, -1)  # one product for all seeds
    sums = []
    for times in _draws(queries, resamples, generator):
        by_seed = (times @ side_by_side).reshape(-1, seeds, 2)  # (b, s, 2)
        if seeds > 1:
            kept = generator.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=len(times))  # (b, s)
            by_seed = by_seed * kept[:, :, None]
        sums.append(by_seed.sum(axis=1))
    top_sums, below_sums = np.concatenate(sums).T  # (B,) each
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = top_sums / below_sums
    if not np.isfinite(ratios).all():
        raise DataError("some resamples have a denominator of 0: too few queries score above 0 for a ratio")
    return _percentile(float(totals[0] / totals[1]), ratios, level)


def _draws(queries: int, resamples: int, generator: np.random.Generator) -> Iterator[FloatArray]:
    """How often each query is drawn in each resample: (b, n) at a time, `resamples` rows in all, each summing to n."""
    block = max(1, min(resamples, _BLOCK_VALUES // queries))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(0, queries, (rows, queries)) + (np.arange(rows) * queries)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * queries)
        yield counts.reshape(rows, queries).astype(np.float64)


def _percentile(value: float, resampled: FloatArray, level: float) -> Interval:
    if not 0 < level < 1:
        raise DataError(f"level = {level} is not a share between 0 and 1: 0.95 is usual")
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def _table(values: ArrayLike) -> FloatArray:
    table = _finite(values)
    return table[:, None] if table.ndim == 1 else table


def _finite(values: ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise DataError(
            f"{array.size} values, {int((~np.isfinite(array)).sum())} of them not finite: an interval needs finite ones"
        )
    return array
