"""What happens inside: hidden states and attention maps of the student follow layers of the teacher.

`layer_map[i]` is the teacher's layer for the student's layer i, or -1 where the student's is left alone. Hidden states count
from the embedding output (0), attention maps from the first layer. Over real tokens, as mean over the mapped layers:

    hidden_states          mean over tokens and values of (P h_S - h_T)^2           TinyBERT: Jiao et al. 2020, arXiv 1909.10351
    attention_maps, kl     mean over heads and rows of KL(a_T || a_S)               MiniLM: Wang et al. 2020, arXiv 2002.10957
    attention_maps, mse    mean over heads and (row, column) pairs of (a_S - a_T)^2         TinyBERT

P is one projection for all layers, where widths differ. TinyBERT adds its layers up (here: their mean, smaller by their
number) and takes scores before the softmax; MiniLM maps the last layer alone (`layer_map = [-1, -1, 5]`). Only probabilities
are at hand here. Where the numbers of heads differ, the heads of both are averaged first. Student and teacher have to read the
same tokens. Value relations (MiniLM) are left out: models do not give their values.

Sentence Transformers has none of these; transformers gives maps with attention implementation `eager` only.

| case | what happens |
|---|---|
| padding | no part of any mean; attention to it is left out, whatever the model gave it |
| all tokens masked | 0, gradient 0 |
| other numbers of tokens or layers than the map's | `DataError` |
| the student's probability is 0, the teacher's is not | the smallest positive number stands in its place: large, finite |
| batch of 1, one token | as any other |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom_server.distillery.losses.checks import layers_of, need
from stillroom_server.distillery.losses.signals import Signals
from stillroom_shared.errors import DataError

AttentionDistance = Literal["kl", "mse"]


def uniform_map(student: int, teacher: int) -> tuple[int, ...]:
    """Layers of the teacher at even distances, the last one with the student's last; of attention maps.

    >>> uniform_map(3, 12), uniform_map(2, 3)
    ((3, 7, 11), (1, 2))
    """
    return tuple((2 * layer * teacher + student) // (2 * student) - 1 for layer in range(1, student + 1))


def uniform_state_map(student: int, teacher: int) -> tuple[int, ...]:
    """The same for hidden states, with embedding output to embedding output.

    >>> uniform_state_map(3, 12)
    (0, 4, 8, 12)
    """
    return (0, *(layer + 1 for layer in uniform_map(student, teacher)))


def hidden_states(signals: Signals, *, layer_map: Sequence[int], project: nn.Module | None = None) -> Tensor:
    """A scalar from student_states, teacher_states, each (batch, tokens, width), and mask, (batch, tokens)."""
    loss = "hidden_states"
    mask = need(signals, "mask", loss)
    total, layers = mask.new_zeros((), dtype=torch.float32), 0
    for student, teacher in _mapped(signals, "states", layer_map, loss):
        moved = student if project is None else project(student)
        if moved.shape != teacher.shape:
            raise DataError(
                f"loss {loss}: states of the shape {tuple(moved.shape)} beside the teacher's {tuple(teacher.shape)}: "
                "give both the same tokenizer and text limits, and a projection where widths differ"
            )
        distance = (moved - teacher.to(moved.dtype)).square().mean(-1)  # (batch, tokens)
        total, layers = total + _mean_over(distance, mask), layers + 1
    return total / layers


def attention_maps(signals: Signals, *, layer_map: Sequence[int], distance: AttentionDistance = "kl") -> Tensor:
    """A scalar from student_attentions, teacher_attentions, each (batch, heads, tokens, tokens), and mask, (batch, tokens)."""
    loss = "attention_maps"
    mask = need(signals, "mask", loss)
    columns = mask.bool()[:, None, None, :]  # (batch, 1, 1, tokens)
    pairs = mask[:, :, None] * mask[:, None, :]  # (batch, tokens, tokens)
    total, layers = mask.new_zeros((), dtype=torch.float32), 0
    for student, teacher in _mapped(signals, "attentions", layer_map, loss):
        ours, theirs = _same_heads(student, teacher.to(student.dtype), loss)
        ours, theirs = ours.masked_fill(~columns, 0), theirs.masked_fill(~columns, 0)
        if distance == "mse":
            value = _mean_over((ours - theirs).square().mean(1), pairs)
        else:
            least = torch.finfo(ours.dtype).tiny
            logs = theirs.clamp_min(least).log() - ours.clamp_min(least).log()
            value = _mean_over((theirs * logs).sum(-1).mean(1), mask)
        total, layers = total + value, layers + 1
    return total / layers


def _mapped(signals: Signals, kind: str, layer_map: Sequence[int], loss: str) -> list[tuple[Tensor, Tensor]]:
    """Pairs of the student's and the teacher's layers."""
    student, teacher = (layers_of(signals, f"{side}_{kind}", loss) for side in ("student", "teacher"))
    if len(layer_map) != len(student) or max(layer_map) >= len(teacher):
        raise DataError(
            f"loss {loss}: the layer map {tuple(layer_map)} is not for {len(student)} {kind} of the student "
            f"and {len(teacher)} of the teacher"
        )
    return [(ours, teacher[layer]) for ours, layer in zip(student, layer_map, strict=True) if layer >= 0]


def _same_heads(student: Tensor, teacher: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    if student.shape != teacher.shape:
        raise DataError(
            f"loss {loss}: maps of the shape {tuple(student.shape)} beside the teacher's {tuple(teacher.shape)}: "
            "give both the same tokenizer and text limits"
        )
    return student, teacher


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values where the mask is 1, both of one shape; 0 where it is 0 everywhere."""
    return values.masked_fill(mask == 0, 0).sum() / mask.sum().clamp_min(1)
