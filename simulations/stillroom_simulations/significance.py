"""Whether one search is better than another or chance could say so: the paired randomisation test, Holm's correction.

Null hypothesis: for each query, which of the two systems got which of the two scores is a coin's toss. The statistic is the
mean difference; its distribution comes from tossing the coins anew, that is, from flipping the sign of each query's difference
(Fisher 1935; Smucker, Allan and Carterette 2007, CIKM, for retrieval). Two-sided. No normality is assumed, and a query on which
both are equal changes nothing.

| case | what happens |
|---|---|
| 2^n outcomes of n unequal queries are at most `resamples` | all of them are gone through: the p-value is exact |
| more | (1 + resamples at least as extreme) / (1 + resamples), which is valid at any number (Phipson and Smyth 2010) |
| no query differs | p = 1 |
| several data sets | the statistic is the mean over sets of their mean differences; signs are flipped query by query |

Comparing many systems with one finds a difference by chance sooner or later. Holm's step-down correction (1979) bounds the
probability of even one such finding, whatever the dependence between the comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stillroom_shared.errors import DataError

FloatArray = NDArray[np.float64]
RESAMPLES = 100_000
_BLOCK_VALUES = 1 << 22
_ROUNDING = 1e-12


def paired_randomisation(
    differences: Sequence[ArrayLike], *, generator: np.random.Generator, resamples: int = RESAMPLES
) -> FloatArray:
    """Two-sided p-values, (columns,), of paired differences; all columns share their coins.

    >>> paired_randomisation([[0.1, 0.2, 0.3, 0.0]], generator=np.random.default_rng(0)).tolist()  # 2 of 2^3 outcomes
    [0.25]

    Args:
        differences: for each data set, (n queries, columns) or (n,): the score of one system minus that of the other.

    Raises:
        DataError: a set is empty, a difference is not finite, or sets have different columns.
    """
    tables = [_checked(one) for one in differences]
    if not tables or len({table.shape[1] for table in tables}) > 1:
        raise DataError(f"{len(tables)} tables of differences: give at least one, all with the same columns")
    # Each query's share of the statistic, so that one sum serves any number of sets.
    shares = np.concatenate([table / (len(table) * len(tables)) for table in tables])  # (queries, columns)
    unequal = shares[np.any(shares != 0, axis=1)]
    exact = len(unequal) < 63 and 2 ** len(unequal) <= resamples
    if exact:  # otherwise every query keeps its coins, so that a column's p-value is the same beside any others
        shares = unequal
    observed, total = np.abs(shares.sum(axis=0)), shares.sum(axis=0)
    reached = observed - _ROUNDING * np.abs(shares).sum(axis=0)  # sums in another order differ in the last bits
    coins = _all_flips(len(shares)) if exact else _flips(len(shares), resamples, generator)
    extreme, count = np.zeros(shares.shape[1]), 0
    for flipped in coins:
        extreme += (np.abs(total - 2 * (flipped @ shares)) >= reached).sum(axis=0)
        count += len(flipped)
    return extreme / count if exact else (1 + extreme) / (1 + count)


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for the number of comparisons, in the given order.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]
    """
    corrected, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = largest
    return corrected


def _checked(values: ArrayLike) -> FloatArray:
    table = np.asarray(values, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise DataError(f"differences of shape {table.shape}: give finite ones of at least one query")
    return table


def _flips(queries: int, resamples: int, generator: np.random.Generator) -> Iterator[FloatArray]:
    """Which signs are flipped (1) in each resample: (b, queries) at a time, `resamples` rows in all."""
    block = max(1, _BLOCK_VALUES // queries)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = np.frombuffer(generator.bytes(rows * (queries + 7 >> 3)), np.uint8).reshape(rows, -1)
        yield np.unpackbits(drawn, axis=1, count=queries).astype(np.float64)


def _all_flips(queries: int) -> Iterator[FloatArray]:
    """The same for every outcome."""
    numbers = np.arange(2**queries)
    yield (numbers[:, None] >> np.arange(queries) & 1).astype(np.float64)
