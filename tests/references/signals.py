"""A batch of signals at random, with everything that a loss could read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillroom_server.distillery.losses.matryoshka import inner_products
from stillroom_server.distillery.losses.signals import Signals

MAP = (-1, 2, 0)
"""A map from the student's three layers (or states) to the teacher's four."""


def made(seed: int, *, batch: int = 3, k: int = 4, tokens: int = 5, dim: int = 4, wide: int = 0) -> Signals:
    """Everything at random, in double precision; `wide` is the length of the teacher's vectors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def masked(*shape: int) -> Tensor:
        found = torch.randint(0, 2, shape, generator=generator)
        found[..., 0] = 1
        return found

    other = wide or dim
    grades = torch.randint(0, 3, (batch, k), generator=generator)
    grades[:, 0] = torch.where(grades.any(-1), 1, 0)
    queries, passages = F.normalize(normal(batch, dim), dim=-1), F.normalize(normal(batch, k, dim), dim=-1)
    return Signals(
        student_queries=queries,
        student_passages=passages,
        student_scores=inner_products(queries, passages),
        student_tokens=normal(batch, tokens, dim),
        student_states=tuple(normal(batch, tokens, dim) for _ in MAP),
        student_attentions=tuple(normal(batch, 2, tokens, tokens).softmax(-1) for _ in MAP),
        mask=masked(batch, tokens),
        teacher_queries=F.normalize(normal(batch, other), dim=-1),
        teacher_passages=F.normalize(normal(batch, k, other), dim=-1),
        teacher_scores=3 * normal(batch, k),
        teacher_tokens=F.normalize(normal(batch, tokens, other), dim=-1),
        teacher_mask=masked(batch, tokens),
        teacher_passage_tokens=F.normalize(normal(batch, 3, other), dim=-1),
        teacher_passage_mask=masked(batch, 3),
        teacher_states=tuple(normal(batch, tokens, other) for _ in range(4)),
        teacher_attentions=tuple(normal(batch, 2 if wide else 3, tokens, tokens).softmax(-1) for _ in range(4)),
        grades=grades,
    )


def some(value: Tensor | None) -> Tensor:
    """The value, which is there."""
    assert value is not None
    return value
