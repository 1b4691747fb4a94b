"""Structured pruning: attention heads and feed-forward neurons that matter least are really removed.

What is left computes what the whole tower computes with the outputs of the removed ones set to zero. Removing neurons, as
many in each layer, leaves a plain `BertModel`; removing heads, or more in one layer than in another, a `ShapedBertModel`,
since no `BertConfig` can say so (`shaped.py`). Each layer keeps at least one head and one neuron.

Under the scope "model", scores are divided by their layer's L2 norm first, as both papers of `importance.py` do: slopes of
different layers are of different size.

| case | what happens |
|---|---|
| a fraction that would leave less than one | one is left |
| equal importance | the earlier one stays |
| fractions of zero | a copy of the student |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertModel

from stillroom_server.distillery.students.importance import Texts, importance
from stillroom_server.distillery.students.settings import PruningSettings, Scope
from stillroom_server.distillery.students.shaped import ShapedBertConfig, build
from stillroom_server.distillery.students.towers import AnyModel, Model, bert_of, layers_of, with_tower

Kept = tuple[tuple[int, ...], ...]
"""Of each layer, the numbers of what is kept, ascending."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many there are.

    Attributes:
        heads, neurons: of each layer.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def counts_of(student: Model) -> Counts:
    """Those of a student's tower."""
    layers = layers_of(bert_of(student))
    return Counts(
        heads=tuple(int(layer.attention.self.num_attention_heads) for layer in layers),
        neurons=tuple(int(layer.output.dense.in_features) for layer in layers),
    )


def prune_structured(
    student: AnyModel,
    settings: PruningSettings,
    texts: Texts,
    targets: NDArray[np.float32] | None = None,
    *,
    begun: Counts | None = None,
) -> AnyModel:
    """A smaller student; the given one is not changed.

    Args:
        settings: `heads` and `neurons` are the fractions that go.
        texts: public texts to measure importance on; for a reranker, (query, passage). The first `settings.texts` count.
        targets: the teacher's vectors or scores of these texts, which the criterion "taylor" needs.
        begun: what the fractions are of, where this is not the first step; None for what the student has.

    Raises:
        DataError: there are no texts, or targets that do not fit them.
    """
    few = texts[: settings.texts]
    wanted = None if targets is None else targets[: settings.texts]
    found = importance(student, few, criterion=settings.criterion, targets=wanted, seed=settings.seed)
    begun = counts_of(student) if begun is None else begun
    heads = choose(found.heads, settings.heads, settings.scope, begun.heads)
    neurons = choose(found.neurons, settings.neurons, settings.scope, begun.neurons)
    return with_tower(student, remove(bert_of(student), heads, neurons))


def choose(scores: Sequence[Tensor], fraction: float, scope: Scope, begun: Sequence[int] | None = None) -> Kept:
    """What is kept when the least important `fraction` goes, of `begun` in each layer where some are gone already.

    >>> scores = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])]
    >>> choose(scores, 0.5, "layer")
    ((0, 1), (0, 1))
    >>> choose(scores, 0.5, "model")
    ((0, 1, 2), (0,))
    >>> choose(scores, 0.5, "layer", begun=[6, 6])
    ((0, 1, 2), (0, 1, 2))
    """
    counts = [len(score) for score in scores] if begun is None else begun
    order = [torch.argsort(score, descending=True, stable=True).tolist() for score in scores]
    if scope == "layer":
        left = [max(1, round(count * (1 - fraction))) for count in counts]
        return tuple(tuple(sorted(best[:most])) for best, most in zip(order, left, strict=True))
    kept = [{best[0]} for best in order]
    rest = [
        (-float(score[number] / score.norm().clamp_min(torch.finfo(score.dtype).tiny)), layer, number)
        for layer, (score, best) in enumerate(zip(scores, order, strict=True))
        for number in best[1:]
    ]
    wanted = round(sum(counts) * (1 - fraction)) - len(kept)
    for _, layer, number in sorted(rest)[: max(0, wanted)]:
        kept[layer].add(number)
    return tuple(tuple(sorted(own)) for own in kept)


@torch.no_grad()
def remove(tower: BertModel, heads: Kept, neurons: Kept) -> BertModel:
    """A tower with only these heads and neurons of each layer, plain where it can be, frozen where the given one is."""
    config = tower.config
    size = int(layers_of(tower)[0].attention.self.attention_head_size)
    counts = [len(own) for own in neurons]
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")} | {
        "head_size": size,
        "layer_heads": [len(own) for own in heads],
        "layer_neurons": counts,
    }
    if len(set(counts)) == 1:
        fields["intermediate_size"] = counts[0]
    smaller = build(ShapedBertConfig(**fields), pooling=tower.pooler is not None)
    torch.nn.Module.to(smaller, tower.device, tower.dtype)
    weights = tower.state_dict()
    for number, (own_heads, own_neurons) in enumerate(zip(heads, neurons, strict=True)):
        inner = torch.cat([torch.arange(head * size, (head + 1) * size) for head in own_heads])
        _slice(
            weights, f"encoder.layer.{number}.", inner.to(tower.device), torch.tensor(own_neurons, device=tower.device)
        )
    smaller.load_state_dict(weights)
    for name, parameter in tower.named_parameters():
        smaller.get_parameter(name).requires_grad_(parameter.requires_grad)
    for mine, old in zip(smaller.modules(), tower.modules(), strict=True):
        if isinstance(mine, torch.nn.Dropout) and isinstance(old, torch.nn.Dropout):
            mine.p = old.p
    smaller.set_attn_implementation(config._attn_implementation)
    smaller.train(tower.training)
    return smaller


def _slice(weights: dict[str, Tensor], layer: str, inner: Tensor, neurons: Tensor) -> None:
    """Cut one layer's weights, in place: rows where the removed would be computed, columns where they would be used."""
    for name in ("attention.self.query", "attention.self.key", "attention.self.value"):
        for kind in ("weight", "bias"):
            weights[f"{layer}{name}.{kind}"] = weights[f"{layer}{name}.{kind}"][inner]
    for kind in ("weight", "bias"):
        weights[f"{layer}intermediate.dense.{kind}"] = weights[f"{layer}intermediate.dense.{kind}"][neurons]
    weights[f"{layer}attention.output.dense.weight"] = weights[f"{layer}attention.output.dense.weight"][:, inner]
    weights[f"{layer}output.dense.weight"] = weights[f"{layer}output.dense.weight"][:, neurons]
