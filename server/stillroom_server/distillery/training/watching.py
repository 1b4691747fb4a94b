"""Hidden states and attention probabilities of a tower, seen on their way through it.

By hooks, because they hold for every wrapper that a trainer puts around a model. Attention probabilities exist with eager
attention only, which is what students use (`students/`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import BertModel

from stillroom_shared.errors import SettingsError


@dataclass
class Watched:
    """What was seen of one forward pass.

    Attributes:
        states: embedding output first, then each layer's, (batch, tokens, width).
        attentions: of each layer, (batch, heads, tokens, tokens); none where attention is fused.
    """

    states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = field(default=())


@contextmanager
def watched(model: nn.Module, *, on: bool) -> Iterator[Watched | None]:
    """See one forward pass of the tower inside `model`; None when not `on`.

    Raises:
        SettingsError: there is no BERT in it.
    """
    if not on:
        yield None
        return
    tower = next((part for part in model.modules() if isinstance(part, BertModel)), None)
    if tower is None:
        raise SettingsError(
            "losses.hidden_states and losses.attention_maps compare layers of BERT towers: this model has none"
        )
    seen = Watched()

    def state(module: nn.Module, arguments: Any, output: Any) -> None:
        seen.states += (output[0] if isinstance(output, tuple) else output,)

    def attention(module: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
            seen.attentions += (output[1],)

    hooks = [tower.embeddings.register_forward_hook(state)]
    for layer in tower.encoder.layer:
        hooks.append(layer.register_forward_hook(state))
        hooks.append(layer.get_submodule("attention.self").register_forward_hook(attention))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
