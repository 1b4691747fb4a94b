"""Pairs of like length go through a model together: a step costs what its tokens cost, not what its longest pair costs.

A step's pairs are those of some lists, whose passages differ in length, and a batch is padded to its longest. While this lasts,
the model's forward pass sorts a batch by length, cuts it into parts, and leaves out the padding that a part does not need. What
is computed for a pair is the same up to rounding; its scores come back in the order they were asked in. Dropout draws other
numbers than it would for the whole batch, the same ones each time.

| case | what happens |
|---|---|
| a batch of at most one part, or all of one length | as it is |
| evaluation | as it is: who scores sorts all pairs, not only a batch's |
| features without an attention mask | as they are |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from torch import Tensor

PART = 32
"""Pairs in a part. Each has a gradient of the whole vocabulary: parts of 8 took 1.3 to 1.7 times as long as one of 64."""


@contextmanager
def less_padding(model: CrossEncoder) -> Iterator[None]:
    """Have `model` train on parts of like length while this lasts."""
    whole = model.forward

    def forward(features: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        mask = features.get("attention_mask")
        if not model.training or mask is None or len(mask) <= PART or bool(mask.all()):
            return dict(whole(features, **options))  # type: ignore[arg-type]
        order = mask.sum(1).argsort(descending=True, stable=True)
        parts = [whole(_part(features, rows, mask), **options)["scores"] for rows in order.split(PART)]
        return {**features, "scores": torch.cat(parts)[order.argsort()]}

    model.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.forward  # the class has its own


def _part(features: Mapping[str, Any], rows: Tensor, mask: Tensor) -> dict[str, Any]:
    """Some rows of a batch, without the columns in which none of them has a token."""
    columns = mask[rows].any(0)
    return {
        name: value[rows][:, columns] if isinstance(value, Tensor) and value.shape == mask.shape else value
        for name, value in features.items()
    }
