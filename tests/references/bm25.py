"""BM25 by its formula: one query, one passage, every count anew."""

from __future__ import annotations

from collections.abc import Sequence
from math import log


def bm25(query: Sequence[str], passage: Sequence[str], corpus: Sequence[Sequence[str]], k1: float, b: float) -> float:
    """The score of a passage's words for a query's words, with statistics of a corpus."""
    mean = sum(len(words) for words in corpus) / len(corpus)
    total = 0.0
    for word in query:
        holding = sum(1 for words in corpus if word in words)
        idf = log(1 + (len(corpus) - holding + 0.5) / (holding + 0.5))
        times = sum(1 for other in passage if other == word)
        total += idf * (k1 + 1) * times / (times + k1 * (1 - b + b * len(passage) / mean))
    return total
