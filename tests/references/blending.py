"""The ranking of two stages together, by definition: slow, without any library."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, pstdev


def standard(scores: Sequence[float]) -> list[float]:
    """Deviations from the mean, in standard deviations; zeros where all are equal."""
    spread = pstdev(scores)
    return [(score - mean(scores)) / spread if spread else 0.0 for score in scores]


def blended(first: Sequence[float], logits: Sequence[float], share: float = 0.5) -> list[float]:
    """The weighted mean of both."""
    return [share * before + (1 - share) * own for before, own in zip(standard(first), standard(logits), strict=True)]


def reranked(first: Sequence[float], logits: Sequence[float], share: float = 0.5) -> list[int]:
    """Places, best first; of equal ones (to nine digits) that of the larger logit, then the one that was before."""
    scores = blended(first, logits, share)
    return sorted(range(len(first)), key=lambda place: (-round(scores[place], 9), -logits[place], place))
