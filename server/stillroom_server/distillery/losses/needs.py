"""Which signals losses read, known from the settings alone: before there is a student, and before any teacher has worked.

Everything that depends on what is learned asks here: losses themselves (`parts`), which texts are embedded and whether lists
are scored (`training/reading.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from stillroom_server.distillery.losses.alignment import SIDES
from stillroom_server.distillery.losses.settings import (
    ContrastiveSettings,
    CosineSettings,
    L2Settings,
    LossesSettings,
    MarginMseSettings,
    TokenPoolingSettings,
    Weighted,
)

Names = frozenset[str]
VECTORS: Names = frozenset({"student_queries", "student_passages"})
"""What scores of shorter vectors, and of other queries' passages, are computed from."""
_SCORES: Names = frozenset({"student_scores"})
_TAUGHT: Names = frozenset({"student_scores", "teacher_scores"})


def needs(settings: LossesSettings) -> Names:
    """Names of the signals that the losses of a recipe read together; grades are read too where they are.

    >>> losses = LossesSettings.model_validate({"cosine": {"weight": 1}, "contrastive": {"weight": 1}})
    >>> sorted(needs(losses))
    ['student_queries', 'student_scores', 'teacher_queries']
    """
    return Names().union(*(reads(name, group) | shortened(name, group, settings) for name, group in settings.active()))


def scales(settings: LossesSettings) -> frozenset[float]:
    """What the student's scores are multiplied by where losses compare them with the teacher's.

    >>> scales(LossesSettings.model_validate({"cosine": {"weight": 1}, "margin_mse": {"weight": 1, "student_scale": 20}}))
    frozenset({20.0})
    """
    told = [group for name, group in settings.active() if "teacher_scores" in reads(name, group)]
    return frozenset(cast(MarginMseSettings, group).student_scale for group in told)


def reads(name: str, settings: Weighted) -> Names:
    """The same of one loss, by its name in the settings."""
    return _READS[name](settings)


def shortened(name: str, settings: Weighted, losses: LossesSettings) -> Names:
    """What it reads beside that, because it counts for shorter vectors as well."""
    return VECTORS if losses.matryoshka.prefixes and "student_scores" in reads(name, settings) else Names()


def _alignment(settings: L2Settings | CosineSettings) -> Names:
    return Names(f"{who}_{side}" for who in ("student", "teacher") for side in SIDES[settings.side])


def _contrastive(settings: ContrastiveSettings) -> Names:
    return VECTORS if settings.in_batch else _SCORES


def _token_pooling(settings: TokenPoolingSettings) -> Names:
    attended = {"teacher_passage_tokens", "teacher_passage_mask"} if settings.pooling == "attended" else set()
    return Names({"student_queries", "teacher_tokens", "teacher_mask"} | attended)


# Each takes its own kind of settings; that they belong together is what this table says.
_READS: Mapping[str, Callable[[Any], Names]] = {
    "l2": _alignment,
    "cosine": _alignment,
    "margin_mse": lambda _: _TAUGHT,
    "margin_hinge": lambda _: _SCORES,
    "listwise_kl": lambda _: _TAUGHT,
    "contrastive": _contrastive,
    "soft_hard": lambda _: _TAUGHT,
    "hidden_states": lambda _: Names({"student_states", "teacher_states", "mask"}),
    "attention_maps": lambda _: Names({"student_attentions", "teacher_attentions", "mask"}),
    "token_pooling": _token_pooling,
    "token_alignment": lambda _: Names({"student_tokens", "teacher_tokens", "mask"}),
}
