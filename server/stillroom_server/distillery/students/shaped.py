"""A BERT whose layers need not have the same number of heads and neurons, and whose output may have another width.

`transformers` gives all layers of a BERT one number of heads, and derives the size of a head from the tower's width, so
a tower that has lost a head fits no `BertConfig`. `ShapedBertConfig` adds what is missing; everything else, attention
kernels included, is the library's. A tower that a plain `BertModel` can express stays one (`is_plain`).

Saved folders are of model type "shaped-bert", which `AutoModel`, and so Sentence Transformers, knows after this module
was imported; no code travels in the folder, and without the import loading fails with the name of the type.

| tower | class | release |
|---|---|---|
| fewer layers, or fewer neurons, as many in each layer | `BertModel` | as any |
| fewer heads, or layers that differ | `ShapedBertModel` | its adapters would need another length of `B` |
| output of another width | `ShapedBertModel` | its manifest would need that width, and adapters the tower's |
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)


class ShapedBertConfig(BertConfig):  # type: ignore[no-untyped-call]  # of transformers
    """A `BertConfig` with a shape for each layer; None stands for what `BertConfig` says.

    Attributes:
        head_size: dimensions of a head.
        layer_heads: attention heads of each layer, at least 1.
        layer_neurons: feed-forward neurons of each layer.
        output_size: length of the output's vectors, mapped linearly from `hidden_size`.
    """

    model_type = "shaped-bert"

    head_size: int | None = None
    layer_heads: list[int] | None = None
    layer_neurons: list[int] | None = None
    output_size: int | None = None


class ShapedBertModel(BertModel):  # type: ignore[no-untyped-call]  # of transformers
    """The tower. `last_hidden_state` is (batch, tokens, output_size or hidden_size)."""

    config_class = ShapedBertConfig

    def __init__(self, config: ShapedBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        width = config.hidden_size
        heads = config.layer_heads or [config.num_attention_heads] * config.num_hidden_layers
        neurons = config.layer_neurons or [config.intermediate_size] * config.num_hidden_layers
        size = config.head_size or width // config.num_attention_heads
        layers: list[Any] = list(self.encoder.layer)
        for layer, own_heads, own_neurons in zip(layers, heads, neurons, strict=True):
            attention, inner = layer.attention.self, own_heads * size
            attention.num_attention_heads, attention.attention_head_size = own_heads, size
            attention.all_head_size, attention.scaling = inner, size**-0.5
            for name in ("query", "key", "value"):
                setattr(attention, name, nn.Linear(width, inner))
            layer.attention.output.dense = nn.Linear(inner, width)
            layer.intermediate.dense = nn.Linear(width, own_neurons)
            layer.output.dense = nn.Linear(own_neurons, width)
        self.projection = nn.Linear(width, config.output_size) if config.output_size else None
        self.post_init()  # type: ignore[no-untyped-call]  # of transformers

    # Sentence Transformers reads the signature to know what to pass.
    @functools.wraps(BertModel.forward)
    def forward(self, *inputs: Any, **options: Any) -> Any:  # type: ignore[override]
        """What `BertModel.forward` gives, its last hidden state projected."""
        output = super().forward(*inputs, **options)
        if self.projection is None:
            return output
        if isinstance(output, tuple):
            return (self.projection(output[0]), *output[1:])
        output.last_hidden_state = self.projection(output.last_hidden_state)
        return output


class ShapedBertForSequenceClassification(BertForSequenceClassification):  # type: ignore[no-untyped-call]
    """The cross-encoder on such a tower."""

    config_class = ShapedBertConfig

    def __init__(self, config: ShapedBertConfig) -> None:
        super().__init__(config)
        self.bert = ShapedBertModel(config)
        self.post_init()  # type: ignore[no-untyped-call]  # of transformers


def is_plain(config: BertConfig) -> bool:
    """Whether a `BertModel` of this config is the same tower."""
    if not isinstance(config, ShapedBertConfig):
        return True
    size = config.head_size or config.hidden_size // config.num_attention_heads
    return (
        config.output_size is None
        and size * config.num_attention_heads == config.hidden_size
        and set(config.layer_heads or ()) <= {config.num_attention_heads}
        and set(config.layer_neurons or ()) <= {config.intermediate_size}
    )


def build(config: ShapedBertConfig, *, pooling: bool) -> BertModel:
    """A tower of this shape with weights that are still to be set, plain where it can be."""
    if not is_plain(config):
        return ShapedBertModel(config, pooling)
    extra = ("head_size", "layer_heads", "layer_neurons", "output_size", "model_type", "architectures")
    return BertModel(BertConfig(**{k: v for k, v in config.to_dict().items() if k not in extra}), pooling)


AutoConfig.register(ShapedBertConfig.model_type, ShapedBertConfig, exist_ok=True)
AutoModel.register(ShapedBertConfig, ShapedBertModel, exist_ok=True)
AutoModelForSequenceClassification.register(ShapedBertConfig, ShapedBertForSequenceClassification, exist_ok=True)
