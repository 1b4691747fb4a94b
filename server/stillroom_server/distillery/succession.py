"""A student as the teacher of its pruned successor: what it says of the lessons, in place of what its teachers said.

| student | vectors | scores |
|---|---|---|
| tower, static table | its own of queries, and of passages where `towers = both` (else they stay) | their inner products |
| late interaction | none of its own | MaxSim |
| reranker | none of its own | logits |

Scores are as the student gives them: those of its teachers, which were normalised to meet, are what it has learned to give.

| case | what happens |
|---|---|
| vectors of the student shorter than those of `documents` | passages have none beside them, so no loss can compare the two |
| several processes | the first asks the student, the others wait and read |
| an interrupted run | what was asked of the same student is kept beside the arrays |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from stillroom_server.distillery.arrays import new_array, open_array
from stillroom_server.distillery.lessons import ROLES
from stillroom_server.distillery.scores import ScoreCache, score_by_vectors, score_lessons
from stillroom_server.distillery.teachers import cross_encoder, late_interaction
from stillroom_server.distillery.teachers.bi_encoder import BiEncoder
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.settings import Learned
from stillroom_server.distillery.training.train import Student, processes
from stillroom_server.distillery.vectors import VectorCache, embed_lessons

_BLOCK = 8_192
Progress = Callable[[int, int], None]


def succeeded(
    student: Student,
    bank: Bank,
    folder: Path,
    *,
    towers: Learned = "query",
    progress: Progress = lambda done, total: None,
) -> Bank:
    """The bank with what `student` says instead.

    Args:
        bank: what the student learned from.
        folder: where its answers are written.
        towers: which texts students read, as in the settings of training.
    """
    vectors, scores = folder / "vectors.npy", folder / "scores.npy"
    lessons, state, embeds = bank.lessons, processes(), isinstance(student, SentenceTransformer)
    if state.is_main_process:
        if isinstance(student, SentenceTransformer):
            own = _embedded(student, bank, folder, towers, progress)
            _beside(own, bank, vectors)
            if bank.scores is not None:
                score_by_vectors(open_array(vectors), lessons, scores)
        else:
            score_lessons(_reader(student), lessons, ScoreCache(folder / "said"), scores, progress)
    state.wait_for_everyone()
    return Bank(
        lessons,
        open_array(vectors) if embeds else bank.vectors,
        None if bank.scores is None else open_array(scores),
    )


def _reader(
    student: CrossEncoder | MultiVectorEncoder,
) -> cross_encoder.CrossEncoder | late_interaction.LateInteraction:
    if isinstance(student, MultiVectorEncoder):
        return late_interaction.LateInteraction(student, TeacherSettings(kind="late-interaction"))
    return cross_encoder.CrossEncoder(student, TeacherSettings(kind="cross-encoder"))


def _embedded(
    student: SentenceTransformer, bank: Bank, folder: Path, towers: Learned, progress: Progress
) -> NDArray[Any]:
    """Vectors of the texts that the student reads, (texts, its dim); NaN for the others."""
    rows = bank.lessons.rows_of(*(ROLES if towers == "both" else ("query",)))
    embedder = BiEncoder(student, TeacherSettings())
    return embed_lessons(embedder, bank.lessons, VectorCache(folder / "said"), folder / "own.npy", progress, rows=rows)


def _beside(own: NDArray[Any], bank: Bank, out: Path) -> None:
    """The student's vectors, and where it has none those of the bank, if they are as long."""
    others = bank.vectors if bank.vectors is not None and bank.vectors.shape[1] == own.shape[1] else None
    with new_array(out, own.shape, own.dtype) as array:
        for start in range(0, len(own), _BLOCK):
            block = np.array(own[start : start + _BLOCK])
            if others is not None:
                absent = np.isnan(block).any(1)
                block[absent] = others[start : start + _BLOCK][absent]
            array[start : start + _BLOCK] = block
