"""BM25 as a teacher: exact scores of any (query, passage), with statistics of the passages that it was opened with.

    score(q, p) = sum over words w of q of  idf(w) (k1 + 1) f / (f + k1 (1 - b + b |p| / mean length)),   f = count of w in p
    idf(w) = ln(1 + (N - n_w + 1/2) / (n_w + 1/2)),   n_w of the N passages hold w

as in Lucene before 8 and in Tantivy (Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework"). Words are Tantivy's:
runs of letters and digits, lower case, without accents, cut to stems, none longer than 200 bytes: as a device searches.
Tantivy itself keeps a passage's length in one byte, exact up to 40 words; so its scores are these up to there, and within a few
percent beyond. Bit for bit the same whatever else is in a call.

Memory: a number a distinct word of the passages, which are read once and not kept.

| case | what happens |
|---|---|
| a word of the query twice | counts twice |
| a word that no passage held | the highest idf, so that it counts in passages given later |
| a passage or query without words | score 0 |
| no passages when it is opened, or passages without words | refused |
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from math import log

import numpy as np
from tantivy import Filter, TextAnalyzer, TextAnalyzerBuilder, Tokenizer

from stillroom_server.distillery.teachers.base import FloatArray
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_shared.errors import SettingsError

_LONGEST = 200


class Bm25:
    """A `Teacher`.

    >>> teacher = Bm25(["The tapir eats leaves.", "Zebras eat grass.", "Rivers run."], TeacherSettings(kind="bm25"))
    >>> [scores] = teacher.score(["what do tapirs eat"], [["The tapir eats leaves.", "Rivers run."]])
    >>> print(scores.round(2))
    [1.28 0.  ]
    """

    def __init__(self, passages: Iterable[str], settings: TeacherSettings) -> None:
        self.settings = settings
        self._words = analyzer(settings.bm25_language)
        self._holding: Counter[str] = Counter()
        self._passages = words = 0
        for passage in passages:
            found = self._words.analyze(passage)
            self._holding.update(set(found))
            self._passages += 1
            words += len(found)
        if not words:
            raise SettingsError(
                f"BM25 found no words in {self._passages} passages: give the passages that scores are about"
            )
        self._mean_length = words / self._passages

    @cached_property
    def identity(self) -> str:
        """See `Teacher`."""
        facts = ["bm25 1", self.settings.bm25_k1, self.settings.bm25_b, self.settings.bm25_language]
        counts = [self._passages, self._mean_length, sorted(self._holding.items())]
        return hashlib.sha256(json.dumps([facts, counts]).encode()).hexdigest()

    def idf(self, word: str) -> float:
        """How rare a stem is, above 0."""
        holding = self._holding[word]
        return log(1 + (self._passages - holding + 0.5) / (holding + 0.5))

    def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
        """Sums of saturated counts; see `Teacher`."""
        read: dict[str, tuple[Counter[str], float]] = {}
        for text in (text for own in passages for text in own):
            if text not in read:
                found = self._words.analyze(text)
                read[text] = Counter(found), self._held_back(len(found))
        return [self._list(query, [read[text] for text in own]) for query, own in zip(queries, passages, strict=True)]

    def _held_back(self, length: int) -> float:
        return self.settings.bm25_k1 * (1 - self.settings.bm25_b + self.settings.bm25_b * length / self._mean_length)

    def _list(self, query: str, passages: Sequence[tuple[Counter[str], float]]) -> FloatArray:
        gain = self.settings.bm25_k1 + 1
        asked = [(word, times * self.idf(word) * gain) for word, times in Counter(self._words.analyze(query)).items()]
        return np.array(
            [
                sum(weight * counts[word] / (counts[word] + held) for word, weight in asked if counts[word])
                for counts, held in passages
            ],
            np.float32,
        )


def analyzer(language: str) -> TextAnalyzer:
    """Words of a text; `language` is one whose stems Tantivy knows, or "none"."""
    steps = TextAnalyzerBuilder(Tokenizer.simple()).filter(Filter.remove_long(_LONGEST)).filter(Filter.lowercase())
    steps = steps.filter(Filter.ascii_fold())
    if language == "none":
        return steps.build()
    try:
        return steps.filter(Filter.stemmer(language)).build()
    except ValueError as error:
        raise SettingsError(f"setting bm25_language is {language!r}: {error}; or give none") from error
