"""What a loss takes out of its signals, or a refusal that names loss, signal and remedy.

| case | what happens |
|---|---|
| a signal that the recipe does not provide | `SettingsError` (also before any batch: `Composition.check`) |
| NaN or infinity from a teacher | `DataError`: one such value makes every weight of the student NaN |
| NaN from the student | passes through, so that the trainer sees it |
| half precision | widened to float32: sums of exponentials and small differences do not survive 8 bits of mantissa |
| a teacher's value | without gradient, and in the student's type where both meet |
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from stillroom_server.distillery.losses.signals import Signals
from stillroom_shared.errors import DataError, SettingsError

_SPACE = "a tower as student: one that gives a vector for each text"
_CANDIDATES = "lessons with lists of candidate passages"
_HIDDEN = "a transformer as student, which is asked for its hidden states"
_ATTENTION = "a transformer as student with attention implementation `eager`, which is asked for its attention maps"
_LATE = "a teacher with token vectors: late-interaction, or a bi-encoder"
_REMEDIES = {
    "student_queries": _SPACE,
    "student_passages": f"{_CANDIDATES}, and {_SPACE}",
    "student_scores": _CANDIDATES,
    "student_tokens": "a late-interaction student",
    "student_states": _HIDDEN,
    "student_attentions": _ATTENTION,
    "mask": "a student that reads tokens, with its attention mask",
    "teacher_queries": "a teacher with vectors: a bi-encoder",
    "teacher_passages": f"{_CANDIDATES}, and a teacher with vectors: a bi-encoder",
    "teacher_scores": f"{_CANDIDATES}, and a teacher that scores them",
    "teacher_tokens": _LATE,
    "teacher_mask": _LATE,
    "teacher_passage_tokens": f"{_LATE} and {_CANDIDATES}",
    "teacher_passage_mask": f"{_LATE} and {_CANDIDATES}",
    "teacher_states": "a transformer as teacher, which runs beside the student",
    "teacher_attentions": "a transformer as teacher, which runs beside the student with attention implementation `eager`",
    "grades": "lessons with grades",
}


def given(signals: Signals) -> set[str]:
    """Names of the signals that are there, for `Composition.check`.

    >>> sorted(given(Signals(mask=torch.ones(1, 2), student_scores=torch.zeros(1, 2))))
    ['mask', 'student_scores']
    """
    values = {field.name: getattr(signals, field.name) for field in fields(signals)}
    return {name for name, value in values.items() if isinstance(value, Tensor) or value}


def missing(loss: str, signal: str) -> str:
    """The refusal for a signal that a loss needs."""
    return (
        f"loss {loss} needs {signal}, which this recipe does not provide: take {_REMEDIES[signal]}, "
        f"or set {loss}.weight to 0"
    )


def need(signals: Signals, name: str, loss: str) -> Tensor:
    """One signal, float32 at least unless it is a mask or grades; a teacher's is finite and without gradient.

    Raises:
        SettingsError: it is not there.
        DataError: a teacher's value is not finite.
    """
    value: Tensor | None = getattr(signals, name)
    if value is None:
        raise SettingsError(missing(loss, name))
    return _settled(value, name, loss)


def layers_of(signals: Signals, name: str, loss: str) -> tuple[Tensor, ...]:
    """The same for a signal that has one value for each layer."""
    values: tuple[Tensor, ...] = getattr(signals, name)
    if not values:
        raise SettingsError(missing(loss, name))
    return tuple(_settled(value, name, loss) for value in values)


def candidate_scores(signals: Signals, loss: str) -> Tensor:
    """The student's scores, (batch, k). Raises `DataError` when k is 1: nothing is better or worse than anything."""
    scores = need(signals, "student_scores", loss)
    if scores.shape[-1] < 2:
        raise DataError(f"loss {loss} compares candidates, and a query has {scores.shape[-1]}: give lists of 2 or more")
    return scores


def teacher_like(signals: Signals, name: str, student: Tensor, loss: str) -> Tensor:
    """A teacher's value of the student's shape and type. Raises `DataError` when the shapes differ."""
    value = need(signals, name, loss).to(student.dtype)
    if value.shape != student.shape:
        raise DataError(
            f"loss {loss}: {name} has the shape {tuple(value.shape)}, the student's is {tuple(student.shape)}: "
            "the teacher saw other texts or candidates, or a projection is missing"
        )
    return value


def _settled(value: Tensor, name: str, loss: str) -> Tensor:
    if name.startswith("teacher_") and not name.endswith("_mask"):
        value = value.detach()
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise DataError(
                f"loss {loss}: {bad} of {value.numel()} values of {name} are NaN or infinite: "
                "remove the teacher's kept scores and vectors, and look at the texts that it was given"
            )
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
