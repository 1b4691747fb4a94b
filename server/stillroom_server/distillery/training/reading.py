"""What a curriculum reads of what teachers say, known from the settings: the rest is not asked of them.

Vectors of passages cost most of a teacher's time, since passages are long. Which vectors are read:

| student | queries' | passages' |
|---|---|---|
| tower, static table, `towers = query` | always | where a loss ranks: they are the constants that are ranked |
| the same, `towers = both` | always | where a loss reads the teacher's vectors |
| late interaction, reranker | never | never |

Scores of lists are read where a loss needs the teacher's, unless it ranks the corpus: those are products of vectors.
"""

from __future__ import annotations

from stillroom_server.distillery.losses.needs import needs
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.students.settings import Kind
from stillroom_server.distillery.teachers.base import Role
from stillroom_server.distillery.training.settings import TrainingSettings

OF_TEXTS = frozenset(
    {"student_queries", "teacher_queries", "mask"}
    | {"teacher_tokens", "teacher_mask"}
    | {f"{who}_{what}" for who in ("student", "teacher") for what in ("states", "attentions")}
)
"""Signals that a text alone has: what needs others is learned from lists."""


def embedded_roles(losses: LossesSettings, training: TrainingSettings, kind: Kind) -> tuple[Role, ...]:
    """Roles of the texts whose vectors are read while a student of this kind learns.

    >>> cosine = LossesSettings.model_validate({"cosine": {"weight": 1}})
    >>> both = LossesSettings.model_validate({"cosine": {"weight": 1}, "contrastive": {"weight": 1}})
    >>> query = TrainingSettings()
    >>> [embedded_roles(losses, query, "tower") for losses in (cosine, both)], embedded_roles(both, query, "reranker")
    ([('query',), ('query', 'passage')], ())
    """
    if kind not in ("tower", "static"):
        return ()
    read = needs(losses)
    passages = read & {"teacher_queries", "teacher_passages"} if training.towers == "both" else read - OF_TEXTS
    return ("query", "passage") if passages else ("query",)


def reads_scores(losses: LossesSettings, training: TrainingSettings) -> bool:
    """Whether the scores are read that teachers give to lists."""
    return "teacher_scores" in needs(losses) and training.ranked == "listed"
