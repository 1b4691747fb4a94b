"""Losses over each query's list of candidates: the teacher's distribution, the known relevant ones, or both.

With s the student's scores, t the teacher's, (batch, k), T a temperature, p = softmax(t / T), q = softmax(s / T):

    listwise_kl   T^2 * mean over queries of sum_j p_j (log p_j - log q_j)      Hinton et al. 2015, arXiv 1503.02531
    contrastive   mean over queries of the mean over positives i of
                  -log(exp(s_i / T) / (exp(s_i / T) + sum over negatives j of exp(s_j / T)))
                                                                              van den Oord et al. 2018, arXiv 1807.03748
    soft_hard     alpha * listwise_kl(T) + (1 - alpha) * contrastive(hard_temperature)        Hinton et al. 2015

T^2 keeps the size of the gradient about the same at every T. T is only a constant of training: at the minimum the student's
scores equal the teacher's up to a shift of each query, so at inference they are used as they are (T = 1).

In Sentence Transformers: listwise_kl equals `DistillKLDivLoss`, `MultiVectorDistillKLDivLoss` (with a `student_scale` c,
those with student_temperature T / c and teacher_temperature T, times c^2); its gradient at T = 1 is that of `ListNetLoss`,
whose value is larger by the entropy of p. contrastive with `in_batch` equals `MultipleNegativesRankingLoss` (scale 1 / T);
without, that loss one query at a time, averaged.

Positives are candidates with a grade above 0; without grades, position 0. Negatives are the rest: a relevant passage is never
a negative of another. `in_batch` takes the other queries' candidates as negatives too. It couples records, so a record's share
of the gradient is not bounded by clipping that record (arXiv 2310.03104): for public text only, never in federated rounds. A
passage that two queries of a batch share counts as negative there: sample batches without duplicates.

| case | what happens |
|---|---|
| k = 1 | `DataError`; contrastive with `in_batch` takes it |
| a query whose grades are all zero | nothing is known to be relevant: contrastive 0, the mean still divides by all queries |
| a query whose candidates are all relevant | contrastive 0 |
| constant teacher scores | p is uniform |
| NaN or infinite teacher scores | `DataError` |
| one list for all queries (`expand`) | `in_batch`: `DataError` |
| batch of 1 | as any other; `in_batch` then adds nothing |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillroom_server.distillery.losses.checks import candidate_scores, need, teacher_like
from stillroom_server.distillery.losses.signals import Signals
from stillroom_shared.errors import DataError


def listwise_kl(
    signals: Signals, *, temperature: float = 1.0, student_scale: float = 1.0, loss: str = "listwise_kl"
) -> Tensor:
    """A scalar, at least 0, from student_scores and teacher_scores, (batch, k). `loss` is its name in refusals."""
    scores = candidate_scores(signals, loss)
    targets = teacher_like(signals, "teacher_scores", scores, loss)
    student = F.log_softmax(student_scale * scores / temperature, dim=-1)
    teacher = F.log_softmax(targets / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def contrastive(
    signals: Signals,
    *,
    temperature: float = 0.05,
    student_scale: float = 1.0,
    in_batch: bool = False,
    loss: str = "contrastive",
) -> Tensor:
    """A scalar, at least 0, from student_scores, (batch, k), or with `in_batch` from student_queries and student_passages."""
    if in_batch:
        scores, relevant, negative = _whole_batch(signals, loss)
    else:
        scores = candidate_scores(signals, loss)
        relevant = _relevant(signals.grades, scores)
        negative = ~relevant
    scores = student_scale * scores / temperature  # (batch, candidates)
    negatives = scores.masked_fill(~negative, float("-inf")).logsumexp(-1, keepdim=True)  # (batch, 1)
    each = torch.logaddexp(scores, negatives) - scores  # (batch, candidates)
    return (each.masked_fill(~relevant, 0).sum(-1) / relevant.sum(-1).clamp_min(1)).mean()


def soft_hard(
    signals: Signals,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    hard_temperature: float = 1.0,
    student_scale: float = 1.0,
) -> Tensor:
    """A scalar from student_scores and teacher_scores, and grades where there are any, (batch, k)."""
    soft = listwise_kl(signals, temperature=temperature, student_scale=student_scale, loss="soft_hard")
    hard = contrastive(signals, temperature=hard_temperature, student_scale=student_scale, loss="soft_hard")
    return alpha * soft + (1 - alpha) * hard


def _relevant(grades: Tensor | None, scores: Tensor) -> Tensor:
    """Which candidates are known to be relevant, (batch, k)."""
    if grades is None:
        return torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape) == 0
    if grades.shape != scores.shape:
        raise DataError(
            f"grades have the shape {tuple(grades.shape)}, scores {tuple(scores.shape)}: they are of other lists"
        )
    return grades > 0


def _whole_batch(signals: Signals, loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's scores of all candidates of the batch, its positives, its negatives: each (batch, batch * k)."""
    queries, passages = need(signals, "student_queries", loss), need(signals, "student_passages", loss)
    batch, k = passages.shape[:2]
    if batch > 1 and passages.stride(0) == 0:
        raise DataError(f"loss {loss}: all queries have one list, each would be its own negative: leave in_batch off")
    scores = queries @ passages.flatten(0, 1).to(queries.dtype).T
    own = torch.eye(batch, dtype=torch.bool, device=scores.device).repeat_interleave(k, dim=1)
    # A column is one passage of one query: what others think of it is not known.
    relevant = own & _relevant(signals.grades, passages[..., 0]).flatten()
    return scores, relevant, ~relevant
