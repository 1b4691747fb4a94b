"""A BERT tower as an ONNX graph, written operator by operator (Devlin et al. 2018, arXiv 1810.04805).

The graph computes what `transformers.BertModel` computes, with standard operators only (ai.onnx, opset 20), which ONNX
Runtime runs (seen in 1.20). It is written rather than traced because the order of operators decides which fused kernels
ONNX Runtime takes, and because a graph that is written has the same bytes under every version of torch.

Measured on one core with 3 layers of width 384 in int8, a query of 8 to 12 tokens:

| choice | because |
|---|---|
| between attentions, states are (batch * tokens, dim) | ONNX Runtime fuses sum and normalization of 3D states: 19 µs, not 5 |
| `Gelu` is one operator | traced, it is five: 13 µs instead of 6 |
| positions are a slice of their table, the mask is made once | six operators less |
| query, key and value are three products | one product and a `Split` take as long |
| attention is written out | `MultiHeadAttention` of com.microsoft takes as long, and only ONNX Runtime knows it |

An adapter's branch `B (A x)` is added to the projection it adapts; `A` is a constant, `B` an initializer that is an input
as well, which may be overridden at run time (ONNX IR).

| asked for | written |
|---|---|
| the states of all tokens (`hidden_states`) | every layer for every token |
| that of the first token (`first_state`), as cross-encoders do | the last layer for that token, keys and values for all |

| tower | result |
|---|---|
| layers with different numbers of heads, or widths of the feed-forward part (pruned) | as they are |
| an output of another width (`distillery.students.shaped`) | projected, token by token |
| an activation that is not in `ACTIVATIONS`, a decoder | `ReleaseError` |
| an adapter attached, or one that does not fit | `ReleaseError` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import ReleaseError
from stillroom_shared.lowrank import attached, check_fit
from stillroom_shared.release import ADAPTER_INPUT

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
FROZEN = "frozen."  # prefix of the names of the constants A
PROJECTION = "projection"  # name of a map of the states at the end, and prefix of its weights' names
OPSET = 20
_IR_VERSION = 9  # of opset 20; a runtime refuses files of a newer one than it knows
ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}


class Graph:
    """Nodes and constants in the order they were added; each is named by its output."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._overridable: list[onnx.ValueInfoProto] = []

    def add(self, kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        """Append an operator; returns the name of its output, `out`."""
        self._nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def constant(self, name: str, value: NDArray[np.generic] | Tensor | float | int | list[int]) -> str:
        """A constant, once for each name; floats become float32, integers int64."""
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        array = np.asarray(value, np.float32 if isinstance(value, float) else None)
        self._constants.setdefault(
            name, numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        )
        return name

    def overridable(self, name: str, value: NDArray[np.float32]) -> str:
        """A constant that a run may replace."""
        self._overridable.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape))
        return self.constant(name, value)

    def linear(self, x: str, layer: nn.Linear, name: str) -> str:
        """`x Wᵀ + b`, (rows, dim_out)."""
        product = self.add("MatMul", x, self.constant(f"{name}.weight", layer.weight.T), out=f"{name}.product")
        bias = layer.bias if layer.bias is not None else torch.zeros(layer.out_features)
        return self.add("Add", product, self.constant(f"{name}.bias", bias), out=name)

    def normalized(self, x: str, layer: nn.LayerNorm, name: str) -> str:
        """Layer normalization over the last axis (Ba et al. 2016, arXiv 1607.06450)."""
        weight, bias = self.constant(f"{name}.weight", layer.weight), self.constant(f"{name}.bias", layer.bias)
        return self.add("LayerNormalization", x, weight, bias, out=name, axis=-1, epsilon=layer.eps)

    def model(self, output: str, shape: tuple[str | int, ...]) -> onnx.ModelProto:
        """The checked model, from `INPUTS` (batch, tokens) int64 to one float32 output of this shape."""
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ("batch", "tokens")) for name in INPUTS]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
        graph = helper.make_graph(
            self._nodes, "tower", [*inputs, *self._overridable], outputs, list(self._constants.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model


def hidden_states(graph: Graph, tower: BertModel, *, out: str, adapter: Adapter | None = None) -> str:
    """Write a plain tower; returns `out`, its last hidden states (batch, tokens, dim).

    Raises:
        ReleaseError: the tower is no plain BERT encoder, or the adapter does not fit it.
    """
    _check(tower, adapter)
    x, mask = _begun(graph, tower)
    for number in range(len(tower.encoder.layer)):
        x = _layer(graph, tower, number, x, x, mask, adapter)
    last = projection_of(tower)
    if last is not None:
        x = replace(x, states=graph.linear(x.states, last, PROJECTION))
    return _of_texts(graph, x, output_width(tower), out)


def first_state(graph: Graph, tower: BertModel) -> str:
    """Write a plain tower of which only the last hidden state of each text's first token is asked for, (batch, dim).

    In the last layer only that token asks, so only its attention, feed-forward part and normalizations are computed; keys and
    values are those of all tokens. The value is the same.

    Raises:
        ReleaseError: the tower is no plain BERT encoder.
    """
    _check(tower, None)
    x, mask = _begun(graph, tower)
    last = len(tower.encoder.layer) - 1
    for number in range(last):
        x = _layer(graph, tower, number, x, x, mask, None)
    states = _of_texts(graph, x, tower.config.hidden_size, "states")
    first = graph.add("Gather", states, graph.constant("first", 0), out="states.first", axis=1)
    texts = graph.add("Shape", INPUTS[0], out="texts", start=0, end=1)
    size = graph.add("Concat", texts, graph.constant("single", [1]), out="size.first", axis=0)
    return _layer(graph, tower, last, _Rows(first, size), x, mask, None).states


@dataclass(frozen=True)
class _Rows:
    """States (batch * tokens, dim) and their size (batch, tokens), by name."""

    states: str
    size: str


def _begun(graph: Graph, tower: BertModel) -> tuple[_Rows, str]:
    """What the first layer reads: embeddings, and the mask."""
    size = graph.add("Shape", INPUTS[0], out="size")
    return _Rows(_embedded(graph, tower), size), _additive_mask(graph)


def _of_texts(graph: Graph, x: _Rows, width: int, out: str) -> str:
    """(batch, tokens, width)."""
    shape = graph.add("Concat", x.size, graph.constant("width", [width]), out="size.states", axis=0)
    return graph.add("Reshape", x.states, shape, out=out)


def _layer(
    graph: Graph, tower: BertModel, number: int, x: _Rows, seen: _Rows, mask: str, adapter: Adapter | None
) -> _Rows:
    """One layer for the tokens x, which look at the tokens `seen`."""
    layer = tower.encoder.layer[number]
    assert isinstance(layer, BertLayer)
    name = f"encoder.layer.{number}"
    context = _attended(graph, x, seen, mask, layer.attention.self, number, adapter)
    projected = graph.linear(context, layer.attention.output.dense, f"{name}.attention.output.dense")
    summed = graph.add("Add", projected, x.states, out=f"{name}.attention.output.sum")
    own = graph.normalized(summed, layer.attention.output.LayerNorm, f"{name}.attention.output.LayerNorm")
    wide = graph.linear(own, layer.intermediate.dense, f"{name}.intermediate.dense")
    kind, attributes = ACTIVATIONS[tower.config.hidden_act]
    wide = graph.add(kind, wide, out=f"{name}.intermediate.activation", **attributes)
    narrow = graph.linear(wide, layer.output.dense, f"{name}.output.dense")
    summed = graph.add("Add", narrow, own, out=f"{name}.output.sum")
    return replace(x, states=graph.normalized(summed, layer.output.LayerNorm, f"{name}.output.LayerNorm"))


def output_width(tower: BertModel) -> int:
    """Length of the vectors that a tower gives: its width, or what it is projected to."""
    last = projection_of(tower)
    return int(tower.config.hidden_size) if last is None else last.out_features


def projection_of(tower: BertModel) -> nn.Linear | None:
    """The linear map at the end of a tower that has one."""
    last = getattr(tower, "projection", None)
    return last if isinstance(last, nn.Linear) else None


def _embedded(graph: Graph, tower: BertModel) -> str:
    """Sum of word, type and position embeddings, normalized: (batch * tokens, dim)."""
    tables, name = tower.embeddings, "embeddings"
    words = graph.constant(f"{name}.word_embeddings.weight", tables.word_embeddings.weight)
    types = graph.constant(f"{name}.token_type_embeddings.weight", tables.token_type_embeddings.weight)
    places = graph.constant(f"{name}.position_embeddings.weight", tables.position_embeddings.weight)
    found = graph.add("Gather", words, INPUTS[0], out=f"{name}.words")
    found = graph.add("Add", found, graph.add("Gather", types, INPUTS[2], out=f"{name}.types"), out=f"{name}.typed")
    tokens = graph.add("Shape", INPUTS[0], out="tokens.count", start=1, end=2)
    first = graph.constant("zero", [0])
    place = graph.add("Slice", places, first, tokens, first, out=f"{name}.places")  # (tokens, dim)
    found = graph.add("Add", found, place, out=f"{name}.placed")
    rows = graph.constant("rows", [-1, tower.config.hidden_size])
    return graph.normalized(
        graph.add("Reshape", found, rows, out=f"{name}.rows"), tables.LayerNorm, f"{name}.LayerNorm"
    )


def _additive_mask(graph: Graph) -> str:
    """0 where a token is, the least float32 where padding is: (batch, 1, 1, tokens)."""
    present = graph.add("Cast", INPUTS[1], out="mask.present", to=TensorProto.FLOAT)
    absent = graph.add("Sub", graph.constant("one", 1.0), present, out="mask.absent")
    least = graph.constant("least", float(np.finfo(np.float32).min))
    mask = graph.add("Mul", absent, least, out="mask.rows")
    return graph.add("Unsqueeze", mask, graph.constant("middle", [1, 2]), out="mask")


def _attended(
    graph: Graph, x: _Rows, seen: _Rows, mask: str, attention: nn.Module, number: int, adapter: Adapter | None
) -> str:
    """Multi-head attention of x to `seen` without its output projection, (batch * tokens of x, heads * head size)."""
    assert isinstance(attention, BertSelfAttention)
    name, width = f"encoder.layer.{number}.attention.self", attention.attention_head_size
    # The number of heads is left open: pruned layers have their own.
    heads = graph.constant(f"heads.{width}", [-1, width])
    of_seen = graph.add("Concat", seen.size, heads, out=f"{name}.heads", axis=0)
    of_x = of_seen if x.size == seen.size else graph.add("Concat", x.size, heads, out=f"{name}.heads.asking", axis=0)
    parts = {}
    for part, rows, shape, order in (
        ("query", x.states, of_x, (0, 2, 1, 3)),
        ("key", seen.states, of_seen, (0, 2, 3, 1)),
        ("value", seen.states, of_seen, (0, 2, 1, 3)),
    ):
        projection = attention.get_submodule(part)
        assert isinstance(projection, nn.Linear)
        flat = graph.linear(rows, projection, f"{name}.{part}")
        flat = _adapted(graph, rows, flat, f"layer.{number}.{part}", adapter)
        split = graph.add("Reshape", flat, shape, out=f"{name}.{part}.split")
        parts[part] = graph.add("Transpose", split, out=f"{name}.{part}.heads", perm=order)
    scores = graph.add("MatMul", parts["query"], parts["key"], out=f"{name}.products")
    scale = graph.constant(f"scale.{width}", float(width**-0.5))
    scores = graph.add("Add", graph.add("Mul", scores, scale, out=f"{name}.scaled"), mask, out=f"{name}.scores")
    share = graph.add("Softmax", scores, out=f"{name}.shares", axis=-1)  # (batch, heads, tokens of x, tokens)
    context = graph.add("MatMul", share, parts["value"], out=f"{name}.context")
    context = graph.add("Transpose", context, out=f"{name}.context.turned", perm=(0, 2, 1, 3))
    value = attention.get_submodule("value")
    assert isinstance(value, nn.Linear)
    rows = graph.constant(f"rows.{value.out_features}", [-1, value.out_features])
    return graph.add("Reshape", context, rows, out=f"{name}.context.rows")


def _adapted(graph: Graph, x: str, projected: str, name: str, adapter: Adapter | None) -> str:
    """`projected + (x Aᵀ) Bᵀ` where the adapter has this projection."""
    if adapter is None or name not in adapter.spec.names:
        return projected
    frozen = graph.constant(FROZEN + name, adapter.spec.frozen()[name].T)
    low = graph.add("MatMul", x, frozen, out=f"{name}.low")  # (rows, rank)
    trained = graph.overridable(ADAPTER_INPUT + name, adapter.matrices()[name])
    # Not a Gemm: ONNX Runtime's quantizer would turn it into a product with a constant B, which nobody can override.
    up = graph.add("Transpose", trained, out=f"{name}.up", perm=(1, 0))
    return graph.add("Add", projected, graph.add("MatMul", low, up, out=f"{name}.branch"), out=f"{name}.adapted")


def _check(tower: BertModel, adapter: Adapter | None) -> None:
    config = tower.config
    if config.hidden_act not in ACTIVATIONS:
        raise ReleaseError(f"the tower's activation is {config.hidden_act!r}: choose one of {', '.join(ACTIVATIONS)}")
    if config.is_decoder:
        raise ReleaseError("the tower is a decoder, whose tokens see only those before them: give an encoder")
    if attached(tower):
        raise ReleaseError("an adapter is attached to this tower: give the plain tower and the adapter beside it")
    if adapter is not None:
        check_fit(config, adapter.spec)
