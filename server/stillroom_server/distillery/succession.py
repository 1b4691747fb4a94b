"""A student as the teacher of its pruned successor: what it says of the lessons, in place of what its teachers said.

| student | vectors | scores |
|---|---|---|
| tower, static table | its own of queries, and of passages where `towers = both` (else they stay) | their inner products |
| late interaction | none of its own | MaxSim |
| reranker | none of its own | logits |

Losses compare the teacher's scores with the student's times `student_scale`, so that is what a student's scores are told as: a
successor that is its teacher has nothing to learn.

| case | what happens |
|---|---|
| vectors of the student shorter than those of `documents` | passages have none beside them, so no loss can compare the two |
| losses with scales of their own; a scale, and a ranking of the whole corpus | refused with the recipe |
| simulated int8 | the student teaches in float32 |
| several processes | the first asks the student, the others wait and read |
| an interrupted run | what was asked of the same student is kept beside the arrays |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from stillroom_server.distillery.arrays import changed_array, open_array
from stillroom_server.distillery.scores import ScoreCache, score_by_vectors, score_lessons
from stillroom_server.distillery.teachers import cross_encoder, late_interaction
from stillroom_server.distillery.teachers.base import Role
from stillroom_server.distillery.teachers.bi_encoder import BiEncoder
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.train import Student, processes
from stillroom_server.distillery.vectors import VectorCache, embed_lessons

Progress = Callable[[int, int], None]


def succeeded(
    student: Student,
    bank: Bank,
    folder: Path,
    *,
    roles: Sequence[Role] = ("query",),
    scale: float = 1.0,
    progress: Progress = lambda done, total: None,
) -> Bank:
    """The bank with what `student` says instead.

    Args:
        bank: what the student learned from.
        folder: where its answers are written.
        roles: of the texts that a tower reads.
        scale: the losses' `student_scale`.
    """
    if processes().is_main_process:
        _tell(student, bank, folder, roles, scale, progress)
    processes().wait_for_everyone()
    embeds = isinstance(student, SentenceTransformer)
    return Bank(
        bank.lessons,
        open_array(folder / "vectors.npy") if embeds else bank.vectors,
        None if bank.scores is None else open_array(folder / "scores.npy"),
    )


def _tell(student: Student, bank: Bank, folder: Path, roles: Sequence[Role], scale: float, progress: Progress) -> None:
    """Ask the student, and write `vectors.npy` and `scores.npy` where the bank has them."""
    raw, lessons = folder / "raw.npy", bank.lessons
    if isinstance(student, SentenceTransformer):
        rows, cache = lessons.rows_of(*roles), VectorCache(folder / "said")
        own = embed_lessons(BiEncoder(student, TeacherSettings()), lessons, cache, raw, progress, rows=rows)
        others = bank.vectors if bank.vectors is not None and bank.vectors.shape[1] == own.shape[1] else None
        vectors = changed_array(folder / "vectors.npy", own, lambda block, part: _filled(block, others, part))
        if bank.scores is not None:
            score_by_vectors(vectors, lessons, raw)
    elif bank.scores is not None:
        score_lessons(_reader(student), lessons, ScoreCache(folder / "said"), raw, progress)
    if bank.scores is not None:
        changed_array(folder / "scores.npy", open_array(raw), lambda block, part: scale * block)
    raw.unlink(missing_ok=True)


def _reader(
    student: CrossEncoder | MultiVectorEncoder,
) -> cross_encoder.CrossEncoder | late_interaction.LateInteraction:
    if isinstance(student, MultiVectorEncoder):
        return late_interaction.LateInteraction(student, TeacherSettings(kind="late-interaction"))
    return cross_encoder.CrossEncoder(student, TeacherSettings(kind="cross-encoder"))


def _filled(own: NDArray[Any], others: NDArray[Any] | None, part: slice) -> NDArray[Any]:
    """The student's vectors, and where it has none those of the bank, if they are as long."""
    if others is None:
        return own
    absent = np.isnan(own).any(1)
    return np.where(absent[:, None], others[part], own)
