"""What losses are functions of: everything that is known about one batch, from the student and from its teachers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Signals:
    """One batch of queries, each with the same number of candidate passages.

    What a recipe does not provide is None; a loss that needs it says so when it is composed, not in the middle of a run.
    Only what begins with `student_` carries gradients.

    Attributes:
        student_queries: vectors of the queries (or of any texts to align), (batch, dim).
        student_passages: vectors of the candidates, (batch, k, dim); constants where the document tower is fixed.
        student_scores: (batch, k). Inner products for towers, MaxSim for late interaction, logits for rerankers.
        student_tokens: vectors of the query's tokens, (batch, tokens, dim).
        student_states: hidden states, embedding output first, each (batch, tokens, width).
        student_attentions: attention probabilities of each layer, (batch, heads, tokens, tokens).
        mask: 1 where a token of the query is, 0 for padding, (batch, tokens).
        teacher_queries, teacher_passages, teacher_states, teacher_attentions: the same of the teacher, whose sizes may differ.
        teacher_scores: of the same candidates, (batch, k), on a scale that the composition has settled.
        teacher_tokens: a late-interaction teacher's vectors of the query's tokens, (batch, teacher tokens, teacher dim).
        teacher_mask: 1 where a token of the teacher's query is, (batch, teacher tokens); expansion tokens count as tokens.
        teacher_passage_tokens: the same teacher's vectors of the passage at position 0, (batch, passage tokens, teacher dim).
        teacher_passage_mask: 1 where a token of that passage is, (batch, passage tokens).
        grades: known relevance, (batch, k): above 0 is relevant, 0 is not known to be.
    """

    student_queries: Tensor | None = None
    student_passages: Tensor | None = None
    student_scores: Tensor | None = None
    student_tokens: Tensor | None = None
    student_states: tuple[Tensor, ...] = ()
    student_attentions: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    teacher_queries: Tensor | None = None
    teacher_passages: Tensor | None = None
    teacher_scores: Tensor | None = None
    teacher_tokens: Tensor | None = None
    teacher_mask: Tensor | None = None
    teacher_passage_tokens: Tensor | None = None
    teacher_passage_mask: Tensor | None = None
    teacher_states: tuple[Tensor, ...] = ()
    teacher_attentions: tuple[Tensor, ...] = ()
    grades: Tensor | None = None
