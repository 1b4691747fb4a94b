"""Hard negatives: passages that the teacher ranks high for a query and that are not known to be relevant, each list k long.

What scores close to a known relevant passage is likely to be relevant and unjudged, so it is left out: with `absolute_margin`
a, a negative scores at most s - a; with `relative_margin` m at most s - m |s|, s the lowest score among the query's known
relevant passages (TopK-Abs and TopK-PercPos of NV-Retriever, arXiv 2407.15831, where 0.05 was best). The rules and their order
are those of `sentence_transformers.util.mine_hard_negatives`, whose choice is equal (tested). That one is not called because
it embeds with a SentenceTransformer of its own and knows no other scorer than a CrossEncoder, query by query; holds all texts,
their vectors, a copy of these in FAISS and the candidates of all queries in memory; draws from the global generator; drops
queries for which too few are found; and keeps nothing of a run that was cut off.

| case | what happens |
|---|---|
| a query with several relevant passages | a list for each (`lists_per_query`), none of the others in it |
| fewer hard negatives than asked for | random passages follow, neither relevant nor left out by the margin; counted |
| not enough passages at all | `DataError` when the corpus is smaller than a list; else the list is dropped and counted |
| no teacher | passages that share words with the query (BM25), without a margin |
| scores below 0 (logits) | the margin is a share of the magnitude |
| a relevant passage that the teacher ranks last | the margin leaves nothing: random ones |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_server.distillery.data.candidates import Dense, Finder, Judged, Ranked, ranked
from stillroom_server.distillery.data.settings import NegativeSettings
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.teachers.base import Teacher
from stillroom_shared.errors import DataError

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Mined:
    """One list.

    Attributes:
        query: row of the query.
        passages: rows, the relevant one first, (1 + count,).
        grades: the known relevance of each, 0 for negatives.
    """

    query: int
    passages: list[int]
    grades: list[int]


@dataclass(frozen=True, eq=False)
class Miner:
    """Chooses negatives from what the teacher says.

    Attributes:
        corpus: rows of all passages, ascending.
        counts: lists, hard and random negatives, candidates too close to a relevant passage, lists that were dropped.
    """

    settings: NegativeSettings
    corpus: Rows
    seed: int
    counts: Counter[str] = field(default_factory=Counter)

    def hard(self, apart: Rows, random: np.random.Generator) -> Rows:
        """At most `count` of the candidates that are apart, hardest first."""
        hardest = apart[self.settings.first : self.settings.last]
        if self.settings.sampling == "random" and len(hardest) > self.settings.count:
            chosen = random.choice(len(hardest), self.settings.count, replace=False)
            return hardest[np.sort(chosen)]
        return hardest[: self.settings.count]

    def apart(self, one: Ranked) -> Rows:
        """Candidates that are not known to be relevant and score far enough below what is, best first."""
        ceiling = float(one.relevant_scores.min())
        limit = np.inf
        if self.settings.absolute_margin is not None:
            limit = min(limit, ceiling - self.settings.absolute_margin)
        if self.settings.relative_margin is not None and np.isfinite(ceiling):
            limit = min(limit, ceiling - self.settings.relative_margin * abs(ceiling))
        return one.candidates[one.others & (one.scores <= limit)]

    def fill(self, one: Ranked, apart: Rows, chosen: Rows, random: np.random.Generator) -> Rows:
        """`chosen` with random passages behind it up to `count`; what the margin left out is not among them."""
        barred = np.concatenate([one.relevant, one.candidates])
        missing = self.settings.count - len(chosen)
        drawn = self.corpus[random.integers(0, len(self.corpus), 4 * missing + 16)]
        free = _first_ones(drawn[~np.isin(drawn, barred)])
        if len(free) < missing:  # a small corpus: look at all of it
            free = random.permutation(np.setdiff1d(self.corpus, barred))
        if len(free) < missing:  # all that is left are candidates outside the window
            free = np.concatenate([free, random.permutation(np.setdiff1d(apart, chosen))])
        return np.concatenate([chosen, free[:missing]])

    def lists(self, one: Ranked, grades: NDArray[np.int8]) -> Iterator[Mined]:
        """A list for each relevant passage of a query."""
        apart = self.apart(one)
        self.counts["too_close"] += int(one.others.sum()) - len(apart)
        most = self.settings.lists_per_query or len(one.relevant)
        for relevant, grade in list(zip(one.relevant.tolist(), grades.tolist(), strict=True))[:most]:
            random = np.random.default_rng([self.seed, one.query, relevant])
            hard = self.hard(apart, random)
            negatives = self.fill(one, apart, hard, random) if len(hard) < self.settings.count else hard
            if len(negatives) < self.settings.count:
                self.counts["dropped"] += 1
                continue
            self.counts.update(lists=1, hard=len(hard), random=len(negatives) - len(hard))
            yield Mined(one.query, [relevant, *negatives.tolist()], [grade, *([0] * len(negatives))])


def mine(
    teacher: Teacher | None,
    finder: Finder,
    lessons: Lessons,
    judged: Judged,
    settings: NegativeSettings,
    folder: Path,
    *,
    seed: int,
    counts: Counter[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Mined]:
    """Lists of 1 + `settings.count` passages for every judged query, in the order of queries; the same for a seed.

    Args:
        counts: is added to (`Miner.counts`).

    Raises:
        DataError: the corpus has fewer passages than a list.
    """
    corpus = lessons.rows("passage")
    if len(corpus) <= settings.count:
        raise DataError(
            f"data.negatives.count {settings.count}: there are only {len(corpus)} passages, so give at most "
            f"{max(len(corpus) - 1, 0)}, or more text"
        )
    miner = Miner(settings, corpus, seed, counts)
    exact = isinstance(finder, Dense) and finder.embedder is teacher
    count = (settings.last if exact else settings.candidates) + judged.most
    found = ranked(teacher, finder, lessons, judged, count, folder, progress=progress)
    for number, one in enumerate(found):
        grades = judged.grades[judged.starts[number] : judged.starts[number + 1]]
        yield from miner.lists(one, grades)


def _first_ones(rows: Rows) -> Rows:
    """Each row once, where it came first."""
    return rows[np.sort(np.unique(rows, return_index=True)[1])]
