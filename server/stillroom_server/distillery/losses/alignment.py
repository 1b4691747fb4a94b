"""Alignment: the student's vector is where the teacher's is.

With s the student's vector, t the teacher's, P a learned linear projection where their lengths differ (else the identity),
over all vectors of the chosen side (queries, passages, or both, each vector counting the same):

    l2       mean of |P s - t|^2          Reimers and Gurevych 2020 (arXiv 2004.09813); Kim et al. 2023 (arXiv 2301.12005)
    cosine   mean of 1 - cos(P s, t)      Kim et al. 2023

For unit vectors without a projection, l2 = 2 * cosine. `MSELoss` of Sentence Transformers averages over the values of a vector
too, so l2 = dim * MSELoss; cosine = `EmbedDistillLoss(distance_metric="cosine")`.

What remains usable once the projection is dropped: the student's own space, queries against passages that the student itself
embedded (symmetric towers). Its vectors do not fit an index that the teacher filled; where the teacher's document tower stays,
student and teacher must have the same dimension, or the projection must become the student's last module.

| case | what happens |
|---|---|
| other lengths and no projection | `DataError` |
| batch of 1 | as any other |
| the student's vector is zero | cosine counts as 0; its gradient is bounded by 1 / 1e-8 |
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom_server.distillery.losses.checks import need, teacher_like
from stillroom_server.distillery.losses.signals import Signals

Side = Literal["queries", "passages", "both"]
SIDES: dict[Side, tuple[str, ...]] = {
    "queries": ("queries",),
    "passages": ("passages",),
    "both": ("queries", "passages"),
}


class Projection(nn.Module):
    """x -> W x + b from the student's width to the teacher's; trained with the student, dropped afterwards.

    W starts as a random (semi-)orthogonal matrix, so that angles are kept where the teacher's width is the larger one.
    A vector of fewer values (a Matryoshka prefix) goes through the first columns: as if zeros followed it.
    """

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(outputs, inputs), generator=generator))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., up to inputs) to (..., outputs)."""
        weight = self.weight[:, : vectors.shape[-1]]
        return F.linear(vectors, weight.to(vectors.dtype), self.bias.to(vectors.dtype))


def l2(signals: Signals, *, side: Side = "queries", project: nn.Module | None = None) -> Tensor:
    """Mean squared distance: a scalar from student_* and teacher_* vectors of the side, (batch, dim) or (batch, k, dim)."""
    student, teacher = _pairs(signals, side, project, "l2")  # (vectors, dim)
    return (student - teacher).square().sum(-1).mean()


def cosine(
    signals: Signals, *, side: Side = "queries", project: nn.Module | None = None, loss: str = "cosine"
) -> Tensor:
    """Mean of one minus the cosine: a scalar in [0, 2] from the same signals. `loss` is its name in refusals."""
    student, teacher = _pairs(signals, side, project, loss)  # (vectors, dim)
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def _pairs(signals: Signals, side: Side, project: nn.Module | None, loss: str) -> tuple[Tensor, Tensor]:
    students, teachers = [], []
    for name in SIDES[side]:
        vectors = need(signals, f"student_{name}", loss)
        student = vectors if project is None else project(vectors)
        students.append(student.flatten(0, -2))
        teachers.append(teacher_like(signals, f"teacher_{name}", student, loss).flatten(0, -2))
    return torch.cat(students), torch.cat(teachers)
