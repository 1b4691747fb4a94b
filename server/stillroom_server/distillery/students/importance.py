"""How much each attention head and each feed-forward neuron of a student matters, measured on public texts.

A gate of value 1 stands before the last product of each attention (one gate a head) and of each feed-forward part (one gate
a neuron), separately for each text. What is asked is what happens when a gate closes, to first order:

    taylor        mean over texts of |dL/dg|, with L = 1 - cosine to a teacher's vector, or half the squared difference to a
                  teacher's score (heads: Michel et al. 2019, arXiv 1905.10650; neurons: activation times gradient,
                  Molchanov et al. 2016, arXiv 1611.06440)
    sensitivity   mean over texts of (dL/dg)^2, with L the output's product with random signs. Its expectation is the squared
                  length by which the output moves when the gate closes: the diagonal of the Gauss-Newton matrix of the
                  squared distance to what the student says now (LeCun et al. 1990), estimated as by Hutchinson (1990).

`taylor` is zero for a student that equals its teacher already, and `sensitivity` needs no teacher.

| case | what happens |
|---|---|
| padding | its gates' part is zero: pooling leaves it out, and no token attends to it |
| targets that do not fit the texts or what the student says of them, or none for `taylor` | `DataError` |
| parameters that are frozen | count as any: only gates are differentiated |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from torch import Tensor, nn

from stillroom_server.distillery.students.settings import Criterion
from stillroom_server.distillery.students.towers import Model, bert_of, evaluating
from stillroom_shared.errors import DataError

Texts = Sequence[str] | Sequence[tuple[str, str]]
_BATCH = 16


@dataclass(frozen=True, eq=False)
class Importance:
    """Of a tower, layer by layer.

    Attributes:
        heads: of each layer, (heads,).
        neurons: of each layer, (neurons,).
    """

    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]


def importance(
    student: Model,
    texts: Texts,
    *,
    criterion: Criterion,
    targets: NDArray[np.float32] | None = None,
    seed: int = 0,
) -> Importance:
    """Measure a student; it is not changed.

    Args:
        texts: public texts; for a reranker, (query, passage).
        targets: for `taylor`, the teacher's unit vectors (texts, dim), or its scores (texts,) for a reranker.
        seed: of the random signs of `sensitivity`.
    """
    _check(student, texts, criterion, targets)
    tower = bert_of(student)
    sums: list[Tensor] = []
    signs = torch.Generator().manual_seed(seed)
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        with evaluating(student), _gates(tower, len(batch)) as gates, torch.enable_grad():
            output = outputs(student, batch)  # (batch, values)
            if criterion == "taylor":
                assert targets is not None
                wanted = torch.as_tensor(targets[start : start + _BATCH], device=output.device)
                if wanted.numel() != output.numel():
                    raise DataError(
                        f"targets have shape {targets.shape}, and the student says {output.shape[1]} values of a text: give "
                        "vectors as long as its own, or a score for each pair"
                    )
                loss, power = _distance(output, wanted.reshape(output.shape)), 1
            else:
                flips = torch.randint(0, 2, output.shape, generator=signs) * 2 - 1
                loss, power = (output * flips.to(output)).sum(), 2
            slopes = torch.autograd.grad(loss, gates)  # each (batch, gates)
        own = [slope.abs().pow(power).sum(0).cpu() for slope in slopes]
        sums = own if not sums else [total + more for total, more in zip(sums, own, strict=True)]
    means = [total / len(texts) for total in sums]
    return Importance(heads=tuple(means[0::2]), neurons=tuple(means[1::2]))


def outputs(student: Model, texts: Texts) -> Tensor:
    """What a student says of texts, differentiable: vectors (batch, dim), scores (batch, 1), or token vectors in a row."""
    features = student.preprocess(list(texts))
    features = {
        name: value.to(student.device) if isinstance(value, Tensor) else value for name, value in features.items()
    }
    said = student(features)
    if isinstance(student, CrossEncoder):
        return said["scores"].reshape(len(texts), -1)  # type: ignore[no-any-return]
    if isinstance(student, MultiVectorEncoder):
        tokens = said["token_embeddings"] * said["attention_mask"].unsqueeze(-1)  # (batch, tokens, dim)
        return tokens.flatten(1)  # type: ignore[no-any-return]
    return said["sentence_embedding"]  # type: ignore[no-any-return]


def _distance(output: Tensor, wanted: Tensor) -> Tensor:
    """Summed over the batch, so that each text's gates see the slope of its own loss."""
    if output.shape[1] == 1:
        return (output - wanted).square().sum() / 2
    return (1 - nn.functional.cosine_similarity(output, wanted, dim=1)).sum()


@contextmanager
def _gates(tower: nn.Module, rows: int) -> Iterator[list[Tensor]]:
    """Gates of each layer in turn, heads then neurons, each (rows, gates) of ones, while the context lasts."""
    gates, hooks = [], []
    for layer in tower.get_submodule("encoder.layer").children():
        attention, ends = layer.get_submodule("attention.self"), layer.get_submodule("attention.output.dense")
        heads = int(attention.num_attention_heads)  # type: ignore[arg-type]
        for place, count in ((ends, heads), (last := layer.get_submodule("output.dense"), last.in_features)):
            gate = torch.ones(rows, int(count), device=place.weight.device, requires_grad=True)  # type: ignore[arg-type]
            gates.append(gate)
            hooks.append(place.register_forward_pre_hook(_gated(gate)))
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def _gated(gate: Tensor):  # type: ignore[no-untyped-def]  # the type of a hook is torch's own
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (states,) = inputs  # (rows, tokens, gates * size)
        wide = gate.repeat_interleave(states.shape[-1] // gate.shape[1], 1)
        return (states * wide[:, None],)

    return hook


def _check(student: Model, texts: Texts, criterion: Criterion, targets: NDArray[np.float32] | None) -> None:
    if not texts:
        raise DataError("no texts to measure importance on: give some public texts")
    if criterion == "sensitivity":
        return
    if targets is None:
        raise DataError(
            "the criterion taylor measures against a teacher: give its vectors or scores, or use sensitivity"
        )
    if isinstance(student, MultiVectorEncoder):
        raise DataError("the criterion taylor is for vectors and scores: use sensitivity for late interaction")
    if len(targets) != len(texts):
        raise DataError(f"{len(targets)} targets for {len(texts)} texts: give one for each")
