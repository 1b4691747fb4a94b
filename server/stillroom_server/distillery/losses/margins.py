"""Margins between the relevant passage, at position 0, and each other candidate.

With s the student's scores, t the teacher's, (batch, k):

    margin_mse     mean over queries and j >= 1 of ((s_0 - s_j) - (t_0 - t_j))^2    Hofstaetter et al. 2020, arXiv 2010.02666
    margin_hinge   mean over queries and j >= 1 of max(0, m - (s_0 - s_j))          Weinberger and Saul 2009; m may grow

MarginMSE leaves the student free to shift each query's scores; only differences count. It equals Sentence Transformers'
`MarginMSELoss` (towers, cross-encoders and late interaction). The hinge on unit vectors with one negative equals its
`TripletLoss` with the cosine distance. A margin that grows begins with a coarse order and then asks for distance.

| case | what happens |
|---|---|
| k = 1 | `DataError` |
| constant teacher scores | margin_mse draws the student's scores together; the hinge does not read them |
| a further candidate with a grade above 0 | no negative for the hinge: counts 0, the mean still divides by all pairs |
| position 0 is not relevant, another one is | margin_hinge: `DataError`; margin_mse takes any passage there |
| all grades zero, or none | position 0 is the relevant one |
| `ranked = corpus`, where position 0 is any passage | refused before training (`training/fitting.py`) |
| scores apart by exactly m | 0, and gradient 0 |
"""

from __future__ import annotations

from torch import Tensor

from stillroom_server.distillery.losses.checks import candidate_scores, teacher_like
from stillroom_server.distillery.losses.signals import Signals
from stillroom_shared.errors import DataError


def margin_mse(signals: Signals, *, student_scale: float = 1.0) -> Tensor:
    """A scalar from student_scores and teacher_scores, (batch, k).

    Args:
        signals: what is known about the batch.
        student_scale: multiplies the student's scores: cosines lie within 2 of each other, logits do not.
    """
    scores = candidate_scores(signals, "margin_mse")
    targets = teacher_like(signals, "teacher_scores", scores, "margin_mse")
    return (student_scale * _margins(scores) - _margins(targets)).square().mean()


def margin_hinge(signals: Signals, *, margin: float) -> Tensor:
    """A scalar from student_scores, and grades where there are any, (batch, k). `margin` is in units of scores."""
    scores = candidate_scores(signals, "margin_hinge")
    short = (margin - _margins(scores)).clamp_min(0)  # (batch, k - 1)
    if signals.grades is not None:
        relevant = signals.grades > 0  # (batch, k)
        if bool((relevant.any(-1) & ~relevant[:, 0]).any()):
            raise DataError(
                "loss margin_hinge: a relevant passage stands behind another: put it at position 0 of its list"
            )
        short = short * ~relevant[:, 1:]
    return short.mean()


def _margins(scores: Tensor) -> Tensor:
    return scores[:, :1] - scores[:, 1:]  # (batch, k - 1)
