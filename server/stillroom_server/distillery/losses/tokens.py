"""From a late-interaction teacher, which has a vector for each token: to one vector for each text, or to fewer values a token.

With e_i the teacher's vectors of the query's n tokens and f_j those of a passage, both unit:

    maxsim            sum over i of max over j of e_i . f_j           Khattab and Zaharia 2020, arXiv 2004.12832
    token_pooling     mean over queries of 1 - cos(P s, sum_i a_i e_i), s the student's vector, and
        mean          a_i = 1 / n                                     Lin et al. 2020 (TCT-ColBERT), arXiv 2010.11386
        attended      a = softmax over i of max_j(e_i . f_j) / T, f the relevant passage
    token_alignment   mean over tokens of 1 - cos(P s_i, e_i), s_i the student's vector of the same token

Which is of use when:
- Scores come first. MaxSim scores of candidates are teacher_scores like any other: `listwise_kl` or `margin_mse` over the inner
  products of a single-vector student is the main part of TCT-ColBERT, and needs no token vectors at training time.
- `token_pooling` adds where in the space a query lies. A mean of unit vectors has the direction that minimises the summed
  squared distance to all tokens; as mean <= max, the inner product of a query's and a passage's mean is at most MaxSim / n.
  `attended` is ours: tokens that the relevant passage answers count for more, words of no interest ([MASK], "the") for less.
  As T grows it becomes the mean.
- `token_alignment` is for late-interaction students that read the same tokens with fewer layers. With fewer values a token
  there is a projection, which is dropped, so train such students by scores as well.
Sentence Transformers' scoring computes MaxSim, so a student is trained by what it is searched with.

| case | what happens |
|---|---|
| masked tokens | no part of any sum, maximum or mean |
| no real token | token_pooling: the target is 0, the cosine 0, the gradient 0; maxsim of no query token: 0 |
| maxsim with an empty passage | the least number that Sentence Transformers gives it: below every other score |
| other numbers of tokens under token_alignment | `DataError` |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from sentence_transformers.multi_vector_encoder.scoring import colbert_kd_scores
from torch import Tensor, nn
from torch.nn import functional as F

from stillroom_server.distillery.losses.alignment import cosine
from stillroom_server.distillery.losses.checks import need, teacher_like
from stillroom_server.distillery.losses.signals import Signals

Pooling = Literal["mean", "attended"]


def maxsim(query_tokens: Tensor, query_mask: Tensor, passage_tokens: Tensor, passage_mask: Tensor) -> Tensor:
    """Late-interaction scores of each query's own candidates, (batch, k) in float32.

    Args:
        query_tokens: (batch, tokens, dim).
        query_mask: 1 where a token is, (batch, tokens).
        passage_tokens: (batch, k, passage tokens, dim).
        passage_mask: 1 where a token is, (batch, k, passage tokens).
    """
    scores: Tensor = colbert_kd_scores(
        query_tokens, passage_tokens, queries_mask=query_mask.bool(), documents_mask=passage_mask.bool()
    )
    return scores


def pooled(
    tokens: Tensor, mask: Tensor, passage_tokens: Tensor | None = None, passage_mask: Tensor | None = None,
    *, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """Weighted mean of each query's token vectors, (batch, dim): equal weights, or by what the given passages answer.

    Args:
        tokens: (batch, tokens, dim).
        mask: (batch, tokens).
        passage_tokens: of one passage for each query, (batch, passage tokens, dim).
        passage_mask: (batch, passage tokens).
        temperature: divides the similarities before the softmax; large values give equal weights.
    """
    real = mask.bool()
    answers = torch.zeros_like(tokens[..., 0])  # (batch, tokens)
    if passage_tokens is not None and passage_mask is not None:
        similar = tokens @ passage_tokens.to(tokens.dtype).transpose(1, 2)  # (batch, tokens, passage tokens)
        answers = similar.masked_fill(~passage_mask.bool()[:, None, :], -1).amax(-1) / temperature
    # The least number rather than minus infinity: a query without tokens would be NaN.
    weights = answers.masked_fill(~real, torch.finfo(answers.dtype).min).softmax(-1) * real
    return (weights[:, None, :] @ tokens).squeeze(1)


def with_pooled_teacher(signals: Signals, *, pooling: Pooling, temperature: float) -> Signals:
    """The same signals with the pooled token vectors in place of teacher_queries."""
    loss = "token_pooling"
    passages = {}
    if pooling == "attended":
        passages = {name: need(signals, f"teacher_{name}", loss) for name in ("passage_tokens", "passage_mask")}
    target = pooled(
        need(signals, "teacher_tokens", loss), need(signals, "teacher_mask", loss), **passages, temperature=temperature
    )
    return replace(signals, teacher_queries=target)


def token_pooling(
    signals: Signals, *, pooling: Pooling = "mean", temperature: float = 0.1, project: nn.Module | None = None
) -> Tensor:
    """A scalar in [0, 2] from student_queries, (batch, dim), teacher_tokens and teacher_mask, and the passage's if attended."""
    return cosine(
        with_pooled_teacher(signals, pooling=pooling, temperature=temperature), project=project, loss="token_pooling"
    )


def token_alignment(signals: Signals, *, project: nn.Module | None = None) -> Tensor:
    """A scalar in [0, 2] from student_tokens and teacher_tokens, (batch, tokens, dim), and mask, (batch, tokens)."""
    loss = "token_alignment"
    mask, tokens = need(signals, "mask", loss), need(signals, "student_tokens", loss)
    student = tokens if project is None else project(tokens)
    teacher = teacher_like(signals, "teacher_tokens", student, loss)
    distance = (1 - F.cosine_similarity(student, teacher, dim=-1)).masked_fill(mask == 0, 0)  # (batch, tokens)
    return distance.sum() / mask.sum().clamp_min(1)
