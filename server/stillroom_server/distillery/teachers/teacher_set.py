"""A weighted set of teachers, whose scores are brought to one scale for each query.

    s(q, p_j) = sum over teachers m of  w_m n_m(q, p_j) / T_m,  divided by the sum of the weights
    n(q, p_j) = (s_j - mean of s) / standard deviation of s            "standard": over the query's own candidates
              = (s_j - least of s) / (greatest of s - least of s)      "range"

Logits, cosines and BM25 differ in scale by orders of magnitude and BM25 also from query to query, so that raw means follow the
loudest. "standard" is the default: one outlier does not squeeze all others together. Either leaves each teacher's order as
it was; a temperature below 1 sharpens one teacher, above 1 it flattens.

A score of a set depends on the query's other candidates: it is not kept by content, its members' raw scores are
(`distillery/scores.py`), so that other weights, temperatures or another normalisation compute nothing again.

| case | what happens |
|---|---|
| all scores of a query are equal under a teacher (one candidate, BM25 without common words) | zeros from that teacher |
| a query without candidates | an empty array |
| a score that is not finite | `DataError` with the teacher's place in the set |
| one teacher | its normalised scores: the same order, another scale |
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillroom_server.distillery.teachers.base import FloatArray, Teacher
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.scales import Normalisation, normalised


@dataclass(frozen=True, slots=True)
class Member:
    """A teacher with its share (`weight`, above 0) and the `temperature` (above 0) its normalised scores are divided by."""

    teacher: Teacher
    weight: float = 1.0
    temperature: float = 1.0


class TeacherSet:
    """A `Teacher`.

    >>> from stillroom_server.distillery.teachers.bm25 import Bm25
    >>> from stillroom_server.distillery.teachers.settings import TeacherSettings
    >>> texts = ["The tapir eats leaves.", "Zebras eat grass.", "Rivers run."]
    >>> words = Bm25(texts, TeacherSettings(kind="bm25"))
    >>> both = TeacherSet([Member(words, weight=3.0), Member(words, weight=1.0, temperature=0.5)])
    >>> print(both.score(["eat leaves"], [texts])[0].round(2))
    [ 1.65 -0.27 -1.38]
    """

    def __init__(self, members: Sequence[Member], normalisation: Normalisation = "standard") -> None:
        if not members or any(not (0 < one.weight < np.inf and 0 < one.temperature < np.inf) for one in members):
            given = [(one.weight, one.temperature) for one in members]
            raise SettingsError(f"teachers have (weight, temperature) {given}: give one or more, all above 0")
        self.members = tuple(members)
        self.normalisation = normalisation

    @property
    def identity(self) -> str:
        """See `Teacher`."""
        parts = [(one.teacher.identity, one.weight, one.temperature) for one in self.members]
        return hashlib.sha256(repr((self.normalisation, parts)).encode()).hexdigest()

    def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
        """Weighted means of normalised scores; see `Teacher`."""
        raw = self.member_scores(queries, passages)
        return [self.combine([own[None] for own in one])[0] for one in zip(*raw, strict=True)]

    def member_scores(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[list[FloatArray]]:
        """Raw scores of each member, for losses that learn from them one by one."""
        return [one.teacher.score(queries, passages) for one in self.members]

    def combine(self, raw: Sequence[FloatArray]) -> FloatArray:
        """The set's scores from its members' raw ones: each (lists, k), in the order of `members`."""
        total = np.zeros(raw[0].shape, np.float64)
        for number, (member, scores) in enumerate(zip(self.members, raw, strict=True)):
            if not np.isfinite(scores).all():
                raise DataError(f"teacher {number} of a set gave a score that is not finite: leave it out, or mend it")
            total += member.weight * normalised(scores, self.normalisation) / member.temperature
        return (total / sum(one.weight for one in self.members)).astype(np.float32)
