"""Quantization-aware training: a torch tower that computes as its int8 file will, and learns through the rounding.

The forward pass rounds what `stillroom_server.export.quantize` stores or rounds, in the same way; the backward pass takes
each rounding for the identity (straight-through estimator: Bengio et al. 2013, arXiv 1308.3432; quantization-aware training:
Jacob et al. 2018, arXiv 1712.05877).

| value | rounded to | scale |
|---|---|---|
| weights of the encoder's projections | 7 bits, symmetric | largest magnitude of the output channel / 64 |
| inputs of those projections | 8 bits, with a zero point (`DynamicQuantizeLinear`) | range of one text, 0 included, / 255 |
| token embeddings | 8 bits, symmetric | largest magnitude of the row / 127 |
| adapters, attention, normalization, other embeddings | not at all | |

A device encodes one text at a time, so the range of an activation is that of one text and its padding is left out; in a batch,
each row gets the scale that it would have alone. The plain scheme of query towers is simulated, not the blocks of documents.

Guarantees: parameters stay the same objects under the same names, so optimizers and checkpoints see nothing; after
`remove()` the tower is what it was, bit for bit.

| case | result |
|---|---|
| tower with an adapter attached | the projection is rounded, the branch is not |
| no attention mask | every token counts |
| a mask of another rank than (batch, tokens) | `SettingsError`: what is padding is unknown |
| simulated twice | `SettingsError` |
| weights or inputs that are all zero | stay zero |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

from stillroom_server.bert_graph import projection_of
from stillroom_shared.errors import SettingsError

_WEIGHT_STEPS = 64  # 7 bits: pairs of products are added in 16 bits by CPUs without VNNI
_ROW_STEPS = 127
_INPUT_STEPS = 255
_TINY = torch.finfo(torch.float32).tiny


class Simulation:
    """What `simulate_int8` put on a tower; `remove()` takes it off, as does leaving a `with` block."""

    def __init__(self, tower: BertModel) -> None:
        last = projection_of(tower)
        projections = [module for module in tower.encoder.modules() if isinstance(module, nn.Linear)]
        projections += [] if last is None else [last]
        if any("forward" in vars(module) for module in projections):
            raise SettingsError("int8 is simulated on this tower already: remove it first")
        self._changed: list[nn.Module] = []
        self._present: Tensor | None = None  # (batch, tokens), 1 where a token is
        self._hook = tower.register_forward_pre_hook(self._remember, with_kwargs=True)
        self._replace(tower.embeddings.word_embeddings, self._embedding)
        for module in projections:
            self._replace(module, self._linear)

    def remove(self) -> None:
        """Compute in float32 again. A second call does nothing."""
        self._hook.remove()
        for module in self._changed:
            del module.forward  # the method of the class shows again
        self._changed.clear()
        self._present = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _replace(self, module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> None:
        module.forward = partial(forward, module)  # not a closure: a copied tower shall call its own modules
        self._changed.append(module)

    def _remember(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and mask.dim() != 2:
            raise SettingsError(f"attention_mask has shape {tuple(mask.shape)}: give (batch, tokens), 1 for each token")
        self._present = mask

    def _linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(rounded_inputs(x, self._present), rounded_weights(module.weight), module.bias)

    def _embedding(self, module: nn.Embedding, ids: Tensor) -> Tensor:
        rows = functional.embedding(ids, module.weight, module.padding_idx)  # (batch, tokens, dim)
        return _straight_through(rows, _symmetric(rows, _ROW_STEPS))


def simulate_int8(tower: BertModel) -> Simulation:
    """Let a tower compute as its int8 file would, until the handle is removed.

    >>> from transformers import BertConfig
    >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> tower = BertModel(config).eval()
    >>> plain = tower(torch.tensor([[1, 2]]))[0]
    >>> with simulate_int8(tower):
    ...     bool((tower(torch.tensor([[1, 2]]))[0] == plain).all())
    False
    >>> bool((tower(torch.tensor([[1, 2]]))[0] == plain).all())
    True
    """
    return Simulation(tower)


def rounded_weights(weights: Tensor) -> Tensor:
    """Weights (out, in) as the file holds them: a scale for each output channel."""
    return _straight_through(weights, _symmetric(weights, _WEIGHT_STEPS))


def rounded_inputs(x: Tensor, present: Tensor | None) -> Tensor:
    """Activations (batch, tokens, dim) as a run quantizes them, each row of the batch by its own range.

    Args:
        present: (batch, tokens), 0 for padding, which has no part in the range; None when there is none.
    """
    with torch.no_grad():
        seen = x.float()
        if present is not None:
            seen = seen * (present != 0).unsqueeze(-1)  # zero is in every range anyway
        dims = tuple(range(1, x.dim()))
        least, most = seen.amin(dims, keepdim=True).clamp(max=0), seen.amax(dims, keepdim=True).clamp(min=0)
        scale = (most - least) / _INPUT_STEPS  # (batch, 1, 1)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = (-least / scale).round().clamp(0, _INPUT_STEPS)
        steps = ((x.float() / scale).round() + zero).clamp(0, _INPUT_STEPS)
        near = (steps - zero) * scale
    return _straight_through(x, near)


def _symmetric(rows: Tensor, steps: int) -> Tensor:
    """Rounded to multiples of the largest magnitude of the last axis / `steps`."""
    with torch.no_grad():
        scale = (rows.float().abs().amax(-1, keepdim=True) / steps).clamp(min=_TINY)
        return (rows.float() / scale).round() * scale


def _straight_through(x: Tensor, near: Tensor) -> Tensor:
    """The value of `near`, the gradient of `x`."""
    return near.to(x.dtype) + (x - x.detach())
