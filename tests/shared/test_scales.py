"""Scores of several scorers on one scale: what a reranker and the stage before it say together, in lists of every length."""

from __future__ import annotations

import numpy as np
import pytest
from tests.references import blending

from stillroom_shared.errors import DataError
from stillroom_shared.scales import blended, normalised, reranked


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_two_stages_rank_together_as_by_definition(size: int, share: float) -> None:
    """Guards against a scale that the louder stage decides, and ties that are broken by rounding."""
    random = np.random.default_rng(size)
    for _ in range(200):
        first = np.sort(random.choice([0.1, 0.2, 0.55, 0.9], size) if size < 4 else random.random(size))[::-1]
        logits = random.choice([-8.0, 0.0, 3.0, 8.0], size) if size < 4 else random.normal(0, 5, size)
        scores = blended(first, logits, share)
        np.testing.assert_allclose(scores, blending.blended(first.tolist(), logits.tolist(), share), atol=1e-9)
        assert reranked(scores, logits).tolist() == blending.reranked(first.tolist(), logits.tolist(), share)


def test_of_two_passages_the_reranker_decides() -> None:
    """Guards against a stage that reads and changes nothing: two standardised scores are 1 and -1, whatever they were."""
    first, logits = np.array([0.9, 0.1]), np.array([-8.0, 8.0])
    assert reranked(blended(first, logits), logits).tolist() == [1, 0]
    assert reranked(blended(first, -logits), -logits).tolist() == [0, 1]


def test_equal_scores_leave_the_ranking_to_the_other_stage() -> None:
    """Guards against a division by zero, and noise of rounding blown up to a deviation."""
    logits = np.array([1.0, 3.0, 2.0])
    assert reranked(blended(np.full(3, 0.1), logits), logits).tolist() == [1, 2, 0]
    assert reranked(blended(np.array([3.0, 2.0, 1.0]), np.full(3, 0.1)), np.full(3, 0.1)).tolist() == [0, 1, 2]
    assert blended(np.zeros(0), np.zeros(0)).tolist() == [] and blended(np.ones(1), np.ones(1)).tolist() == [0.0]
    assert normalised(np.full((1, 3), 0.1, np.float32)).tolist() == [[0.0, 0.0, 0.0]]
    assert normalised(np.zeros((1, 0), np.float32)).shape == (1, 0)


def test_a_score_that_is_not_finite_is_refused() -> None:
    """Guards against one bad score that makes all of them NaN, in the order of before, as if nothing had happened."""
    for first, logits in (([0.9, 0.8], [1.0, np.nan]), ([np.inf, 0.8], [1.0, 2.0])):
        with pytest.raises(DataError, match="gave a score that is not finite"):
            blended(np.array(first), np.array(logits), share=1)
