"""Matryoshka over any loss of vectors: the first d values are a vector too (Kusupati et al. 2022, arXiv 2205.13147).

    L(full) + sum over d of weight_d * L(signals truncated to d)

Truncated signals: the first d values of each vector of the student, and of the teacher where its vectors are as long, made
unit again; the student's scores are inner products of these. The teacher's scores stay those of its whole vectors: a short
query is to rank short passages as the teacher ranks whole ones, not as its own first values do.

Sentence Transformers' `MatryoshkaLoss` over dimensions [full, d, ...] with weights [1, weight_d, ...] is the same for losses
of scores and of cosines; over its `MSELoss` it leaves the truncated teacher shorter than unit, and ours does not.

| case | what happens |
|---|---|
| the teacher's vectors have another length | they stay whole: the projection maps the student's prefix to them |
| first values that say little (a teacher that was not trained for it) | `rotate` in the recipe puts what matters first |
| scores that are no inner products (rerankers, late interaction) | refused when composed: nothing can be truncated |
| hidden states, attention maps, token vectors | counted once, outside the sum |
| one list of passages for all queries (`expand`) | stays one list: nothing is copied for each query |
| the prefix is zero | stays zero |
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from stillroom_server.distillery.losses.signals import Signals


def truncated(signals: Signals, dim: int) -> Signals:
    """The same signals, with vectors of `dim` values and scores computed from them."""
    queries, passages = _prefix(signals.student_queries, dim), _prefix(signals.student_passages, dim)
    scores = signals.student_scores
    if queries is not None and passages is not None:
        scores = inner_products(queries, passages)
    return replace(
        signals,
        student_queries=queries,
        student_passages=passages,
        student_scores=scores,
        teacher_queries=_alike(signals.teacher_queries, signals.student_queries, dim),
        teacher_passages=_alike(signals.teacher_passages, signals.student_passages, dim),
    )


def inner_products(queries: Tensor, passages: Tensor) -> Tensor:
    """Scores of each query's own candidates, (batch, k), from (batch, dim) and (batch, k, dim).

    One list that is expanded over the batch, a whole corpus for instance, is not copied.
    """
    if passages.stride(0) == 0:
        return queries @ passages[0].to(queries.dtype).T
    return (passages.to(queries.dtype) @ queries.unsqueeze(-1)).squeeze(-1)


def _alike(teacher: Tensor | None, student: Tensor | None, dim: int) -> Tensor | None:
    same = teacher is not None and student is not None and teacher.shape[-1] == student.shape[-1]
    return _prefix(teacher, dim) if same else teacher


def _prefix(vectors: Tensor | None, dim: int) -> Tensor | None:
    if vectors is None:
        return None
    if vectors.ndim == 3 and vectors.stride(0) == 0:
        return F.normalize(vectors[0, :, :dim], dim=-1).expand(len(vectors), -1, -1)
    return F.normalize(vectors[..., :dim], dim=-1)
