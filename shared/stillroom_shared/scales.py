"""Scores of several scorers on one scale, for each query on its own: cosines, BM25 and logits differ by orders of magnitude."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import DataError

Normalisation = Literal["standard", "range"]
_EQUAL = 1e-6
"""Spread relative to the greatest score below which scores differ by rounding only."""
_DIGITS = 9
"""Blended scores that agree in these are equal."""
FIRST_SHARE = 0.5
"""Weight of the stage before in what a reranker ranks by, chosen on train queries (docs/figures.md): 0.25 is as good behind
vectors alone, 0.6 a little better where they are fused with words."""


def normalised(scores: NDArray[np.floating], how: Normalisation = "standard") -> NDArray[np.float64]:
    """Each row on its own, (lists, k): mean 0 and deviation 1, or from 0 to 1; a constant row gives zeros.

    >>> normalised(np.float32([[1, 2, 3], [5, 5, 5]]), "range").tolist()
    [[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]
    """
    values = np.asarray(scores, np.float64)
    if not values.size:
        return values
    if how == "standard":
        shifted, spread = values - values.mean(1, keepdims=True), values.std(1, keepdims=True)
    else:
        shifted, spread = values - values.min(1, keepdims=True), np.ptp(values, axis=1, keepdims=True)
    constant = spread <= _EQUAL * np.abs(values).max(1, keepdims=True)
    return np.where(constant, 0.0, shifted / np.where(constant, 1.0, spread))


def blended(
    first: NDArray[np.floating], logits: NDArray[np.floating], share: float = FIRST_SHARE
) -> NDArray[np.float64]:
    """Scores of a reranker and of the stage before it as one, (passages,): a weighted mean of standardised ones.

    >>> blended(np.array([0.9, 0.8, 0.7]), np.array([-3.0, 5.0, -2.0])).round(2).tolist()
    [0.19, 0.7, -0.89]

    Args:
        first, logits: of the stage before, and of the reranker, (passages,).
        share: weight of the first, 0 to 1; 0 leaves the reranker alone.

    Raises:
        DataError: a score is not finite.
    """
    if not (np.isfinite(first).all() and np.isfinite(logits).all()):
        raise DataError(
            "a reranker, or the stage before it, gave a score that is not finite: mend its model, or leave it out"
        )
    both = normalised(np.stack([first, logits]))
    return np.array([share, 1 - share]) @ both


def reranked(scores: NDArray[np.float64], logits: NDArray[np.floating]) -> NDArray[np.int64]:
    """Places from the best blended score to the worst; of equal ones the reranker decides, then the order they are in.

    Of two passages both stages have deviations of 1 and -1: where they disagree, the sum is 0 for either.

    >>> first, logits = np.array([0.9, 0.1]), np.array([-8.0, 8.0])
    >>> reranked(blended(first, logits), logits).tolist()
    [1, 0]
    """
    return np.lexsort((-np.asarray(logits, np.float64), -scores.round(_DIGITS)))
