"""MaxSim by its definition, token by token."""

from __future__ import annotations

from collections.abc import Sequence


def maxsim(query: Sequence[Sequence[float]], passage: Sequence[Sequence[float]]) -> float:
    """The sum over the query's tokens of the largest inner product with a token of the passage."""
    return sum(max(sum(a * b for a, b in zip(left, right, strict=True)) for right in passage) for left in query)
