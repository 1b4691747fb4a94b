"""How good a shape is, cheaply: a short alignment on some of the lessons' texts, judged on queries held out of it.

    quality = (mean cosine to the teacher's vectors + share of the teacher's nDCG@10) / 2

Both are over held-out queries of the lessons, public text like all else here; benchmarks' test queries never come near. The
ranking is of all passages by the teacher's vectors, judged by the lists' grades (trec_eval's nDCG: linear gains, logarithmic
discount). Alone, the cosine does not see which of its errors change a ranking, and nDCG moves in steps as large as a query.

| case | what happens |
|---|---|
| lessons without lists, or without a relevant passage in them | the cosine alone |
| fewer queries than are to be held out, twice over | half of them are held out |
| a held-out query's text is another row's as well (a passage) | that row is not learned from |
| interrupted | its checkpoint stays in the folder, and the next call of the same shape goes on from it |
| stopped or finished | its checkpoints are removed; its curves stay |
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from stillroom_server.distillery.architecture.search import Report
from stillroom_server.distillery.architecture.settings import AXES, ArchitectureSettings
from stillroom_server.distillery.lessons import Lessons, LessonsWriter, batches
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.students.make import make_student
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.curriculum import Curriculum
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_shared.errors import DataError
from stillroom_shared.workspace import key_of

_CUTOFF = 10
_READ, _LISTS = 4_096, 64
"""Texts, and lists whose scores of all passages are held, at a time."""
ALIGNED = LossesSettings.model_validate({"cosine": {"weight": 1.0}})


class _Stop(Exception):
    """Ends the training of a trial that the search has stopped."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HeldOut:
    """Queries that no trial learns from.

    Attributes:
        rows: of the queries, (queries,).
        lists: numbers of their lists that have a relevant passage.
    """

    rows: NDArray[np.int64]
    lists: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Trains a student a little; what `search` calls `proxy`.

    Attributes:
        teacher: whose space is learned.
        bank: lessons with the teacher's vectors of all their texts.
        settings: of the search: how much is learned from and held out.
        training: as the student will be trained; its passes are the search's.
        folder: where trials are while they train.
        vocabulary: texts whose tokens a trimmed vocabulary keeps; none: those that are learned from.
    """

    teacher: SentenceTransformer
    bank: Bank
    settings: ArchitectureSettings
    training: TrainingSettings
    folder: Path
    vocabulary: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.bank.vectors is None:
            raise DataError(
                "a search for an architecture aligns students to vectors: name their teacher as `documents`"
            )

    def __call__(self, student: StudentSettings, report: Report) -> float:
        """Quality of one shape."""
        model = make_student(student, self.teacher, self.counted)
        assert isinstance(model, SentenceTransformer)
        folder = self._folder / "-".join(str(getattr(student, axis) or "all") for axis in AXES)

        def progress(done: int, total: int) -> None:
            marks = {total * part // self.settings.evaluations for part in range(1, self.settings.evaluations)}
            if done in marks - {0, total} and report(done, self._evaluated(model, report)):
                raise _Stop

        try:
            self._curriculum.learn(model, folder, progress=progress)
            quality = self._evaluated(model, report)
        except _Stop:
            quality = float("nan")  # not read of a trial that was stopped
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return quality

    def _evaluated(self, model: SentenceTransformer, report: Report) -> float:
        queries = model.encode(self._queries, show_progress_bar=False, normalize_embeddings=True)
        cosine = float(np.einsum("nd,nd->n", queries, self._teacher_queries).mean())
        report.note(cosine=cosine)
        if not len(self.held_out.lists) or not self._teacher_ndcg:
            return cosine
        share = self._ndcg(np.asarray(queries, np.float32)) / self._teacher_ndcg
        report.note(ndcg_share=share)
        return (cosine + share) / 2

    @cached_property
    def held_out(self) -> HeldOut:
        """A random choice of queries, of those with relevant passages as many as possible; the same in all trials."""
        lessons = self.bank.lessons
        judged = np.flatnonzero((lessons.grades > 0).any(axis=1)) if lessons.lists else np.zeros(0, np.int64)
        queries = lessons.rows("query")
        order = np.random.default_rng(self.settings.seed).permutation(queries)
        known = np.isin(order, lessons.queries[judged]) if len(judged) else np.zeros(len(order), bool)
        count = min(self.settings.queries, len(queries) // 2)
        rows = np.sort(np.concatenate([order[known], order[~known]])[:count])
        if not count:
            raise DataError(f"the lessons have {len(queries)} queries: a search for an architecture needs 2 at least")
        return HeldOut(rows=rows, lists=judged[np.isin(lessons.queries[judged], rows)] if len(judged) else judged)

    @cached_property
    def learned(self) -> NDArray[np.int64]:
        """Rows of the texts that trials learn from, no text twice: queries if there are enough, else passages too."""
        lessons, held = self.bank.lessons, set(self._queries)
        generator = np.random.default_rng([self.settings.seed, 1])
        orders = [generator.permutation(lessons.rows(role)) for role in ("query", "passage")]
        first: dict[str, int] = {}
        for rows in batches(np.concatenate(orders), _READ):
            if len(first) >= self.settings.texts:
                break
            for row, text in zip(rows, lessons.texts(rows), strict=True):
                if text not in held:
                    first.setdefault(text, int(row))
        return np.sort(np.array(list(first.values())[: self.settings.texts], np.int64))

    @cached_property
    def texts(self) -> list[str]:
        """What trials learn from."""
        return self.bank.lessons.texts(self.learned)

    @property
    def counted(self) -> Sequence[str]:
        """What a trimmed vocabulary is counted in."""
        return self.vocabulary or self.texts

    @cached_property
    def _curriculum(self) -> Curriculum:
        changes = {"towers": "query", "ranked": "listed", "epochs": self.settings.epochs}
        lessons = _as_queries(self.texts, self._folder / "lessons")
        assert self.bank.vectors is not None
        bank = Bank(lessons, np.asarray(self.bank.vectors[self.learned]))
        return Curriculum(losses=ALIGNED, training=self.training.model_copy(update=changes), bank=bank)

    @property
    def _folder(self) -> Path:
        """Of all trials that learn from the same texts in the same way: a checkpoint of others must not be gone on from."""
        said = self.settings.model_dump(mode="json", include={"texts", "epochs", "queries", "seed"})
        return self.folder / key_of(self.bank.lessons.identity, said, self.training.model_dump(mode="json"))

    @cached_property
    def _queries(self) -> list[str]:
        return self.bank.lessons.texts(self.held_out.rows)

    @cached_property
    def _teacher_queries(self) -> NDArray[np.float32]:
        return self.bank.vectors_of(self.held_out.rows).numpy()

    @cached_property
    def _teacher_ndcg(self) -> float:
        return self._ndcg(self._teacher_queries)

    def _ndcg(self, queries: NDArray[np.float32]) -> float:
        """Mean over the held-out lists of nDCG@10 among all passages, by the lists' grades."""
        lessons, found = self.bank.lessons, []
        passages = self.bank.passages.numpy()
        for lists in batches(self.held_out.lists, _LISTS):
            vectors = queries[np.searchsorted(self.held_out.rows, lessons.queries[lists])]  # (lists, dim)
            places = self.bank.place_of[lessons.passages[lists]]  # (lists, k)
            found.append(ndcg(vectors @ passages.T, places, lessons.grades[lists]))
        return float(np.concatenate(found).mean())


def ndcg(scores: NDArray[np.float32], places: NDArray[np.int64], grades: NDArray[np.int8]) -> NDArray[np.float64]:
    """nDCG@10 of each query, (queries,); of equal scores the earlier passage comes first.

    Args:
        scores: of each query and passage, (queries, passages).
        places: columns of the judged passages, (queries, k); one that comes twice counts once, by its first grade.
        grades: of these, (queries, k), one of them above 0; what is not is not relevant.

    >>> ndcg(np.array([[0.9, 0.8, 0.1]], np.float32), np.array([[1]]), np.array([[1]], np.int8)).round(4)
    array([0.6309])
    """
    found = []
    for row, own, graded in zip(scores, places, grades, strict=True):
        gains = {int(place): int(grade) for place, grade in zip(own[::-1], graded[::-1], strict=True)}
        relevant = {place: gain for place, gain in gains.items() if gain > 0}
        ranks = {place: int((row > row[place]).sum() + (row[:place] == row[place]).sum()) for place in relevant}
        ideal = enumerate(sorted(relevant.values(), reverse=True))
        reached = sum(_discounted(gain, ranks[place]) for place, gain in relevant.items())
        found.append(reached / sum(_discounted(gain, rank) for rank, gain in ideal))
    return np.array(found, np.float64)


def _discounted(gain: int, rank: int) -> float:
    """Rank from 0."""
    return gain / math.log2(rank + 2) if rank < _CUTOFF else 0.0


def _as_queries(texts: Sequence[str], folder: Path) -> Lessons:
    """Lessons of these texts alone, all as queries, in this order. No text may come twice: it would be one row."""
    if not folder.exists():
        with LessonsWriter(folder, candidates=1) as writer:
            writer.texts(texts, "query", writer.source("architecture"))
    return Lessons.open(folder)
