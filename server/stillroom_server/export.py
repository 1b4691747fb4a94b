"""From a torch tower to ONNX: float32 by `torch.onnx`, int8 by ONNX Runtime's dynamic quantization.

Inputs `input_ids`, `attention_mask`, `token_type_ids` (batch, tokens) int64; output `last_hidden_state` (batch,
tokens, dim) float32: what Sentence Transformers' ONNX backend feeds and reads. Pooling and normalization stay
outside.

An adapter's `B` matrices become overridable initializers: graph inputs with a default value (ONNX IR: an initializer
that is also an input may be overridden at run time). `A` is an ordinary constant. Neither is quantized: they are a
hundredth of the arithmetic, and `B` is not known when the file is written.

Both functions are deterministic: the same tower gives the same bytes, so a tower's hash identifies it.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor, nn
from transformers import BertModel

from stillroom_shared.adapter import Adapter
from stillroom_shared.lowrank import attach
from stillroom_shared.release import ADAPTER_INPUT

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
_OPSET = 18
_FROZEN = "frozen."  # prefix of the names of the constants A
_LAST_BIAS = re.compile(r"layer\.\d+\.output\.dense\.bias$")
# Accuracy level 4 means integer products: activations are quantized as well, in the same blocks.
_BLOCKS = {"bits": 8, "block_size": 32, "is_symmetric": True, "accuracy_level": 4}


def export(tower: BertModel, path: Path, adapter: Adapter | None = None) -> None:
    """Write a plain tower as float32 ONNX; with an adapter, its `B` are the defaults of the overridable inputs.

    Args:
        adapter: None writes a tower that takes no adapter; to start from nothing, pass the zero adapter.
    """
    model = copy.deepcopy(tower)
    model.train(False)
    model.set_attn_implementation("eager")
    matrices = _attach(model, adapter)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=model.config.max_position_embeddings)
    # Any values of rank 2 would do, but sizes 0 and 1 would be taken for constants, and one tensor given three times
    # would be traced as one input: the tower would look up token types as tokens.
    ids = [torch.ones(2, 3, dtype=torch.int64) for _ in INPUTS]
    with quiet():
        program = torch.onnx.export(
            _Traced(model, adapter.spec.names if adapter else ()).eval(),
            (*ids, [torch.from_numpy(value) for value in matrices.values()]),
            input_names=[*INPUTS, *matrices],
            output_names=[OUTPUT],
            opset_version=_OPSET,
            dynamic_shapes=(*[{0: batch, 1: tokens}] * len(INPUTS), [{}] * len(matrices)),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    onnx.save(_with_defaults(program.model_proto, matrices), path)


def quantize(source: Path, target: Path, *, blockwise: bool) -> None:
    """Quantize a float32 file that `export` wrote to int8 weights and dynamically quantized int8 activations.

    Embeddings get one scale for each token and weights one for each output channel: under one scale for a whole matrix,
    those of small magnitude lose most of their bits. Weights use 7 of the 8 bits: CPUs without VNNI add pairs of
    products in 16 bits, which 8 bits can overflow, so the same file would give other vectors there.

    Args:
        blockwise: quantize the last product of each layer in blocks of 32 along its inputs, activations included. These
            inputs have the largest outliers and cause more than half of the loss; blocks cost a quarter of the speed.
    """
    model = onnx.load(source)
    with quiet():
        if blockwise:
            last = _last_products(model.graph)
            others = [node.name for node in model.graph.node if node.name not in last]
            blocks = MatMulNBitsQuantizer(model, **_BLOCKS, nodes_to_exclude=others)
            blocks.process()
            model = blocks.model.model
        quantize_dynamic(
            model,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=_adapter_products(model.graph),
        )
    onnx.save(_with_int8_embeddings(onnx.load(target)), target)


class _Traced(nn.Module):
    """The tower as a function of its inputs and of every `A` and `B`, so that these keep their names in the graph."""

    def __init__(self, tower: BertModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.tower = tower
        places = (name.rpartition(".") for name in names)
        self.paths = tuple(f"encoder.{layer}.attention.self.{target}" for layer, _, target in places)

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor, matrices: list[Tensor]) -> Tensor:
        frozen, trained = matrices[: len(self.paths)], matrices[len(self.paths) :]
        values = {f"{path}.A": a.T for path, a in zip(self.paths, frozen, strict=True)}
        values |= {f"{path}.B": b for path, b in zip(self.paths, trained, strict=True)}
        # An additive mask skips the mask construction of transformers, which traces into a dozen needless nodes.
        hidden = (1.0 - mask.float())[:, None, None, :] * torch.finfo(torch.float32).min  # (batch, 1, 1, tokens)
        arguments = {"input_ids": ids, "attention_mask": hidden, "token_type_ids": types}
        output: Tensor = torch.func.functional_call(self.tower, values, (), arguments)[0]
        return output


def _attach(model: BertModel, adapter: Adapter | None) -> dict[str, NDArray[np.float32]]:
    """Attach the adapter's branches; return `Aᵀ` of each, then `B` of each, by their names in the graph."""
    if adapter is None:
        return {}
    attach(model, adapter.spec)
    # A is stored transposed, so that the product needs no transposition at run time.
    frozen = {_FROZEN + name: np.ascontiguousarray(a.T) for name, a in adapter.spec.frozen().items()}
    return frozen | {ADAPTER_INPUT + name: b for name, b in adapter.matrices().items()}


def _with_defaults(model: onnx.ModelProto, matrices: dict[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """Turn the traced inputs `A` into constants and `B` into initializers that are inputs as well."""
    graph = model.graph
    for name, value in matrices.items():
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    for entry in [entry for entry in graph.input if entry.name.startswith(_FROZEN)]:
        graph.input.remove(entry)
    return bare(model)


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the source lines of the machine that exported: they are nobody's business and change the hash."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.checker.check_model(model)
    return model


def _adapter_products(graph: onnx.GraphProto) -> list[str]:
    """Names of the products with `A` (the products with `B` have no constant operand, so they are never quantized)."""
    return [node.name for node in graph.node if any(name.startswith(_FROZEN) for name in node.input)]


def _last_products(graph: onnx.GraphProto) -> set[str]:
    """Names of the products with the last weight of each layer's feed-forward part, found by the bias added to them."""
    biased = {
        name
        for node in graph.node
        if node.op_type == "Add" and any(_LAST_BIAS.search(name) for name in node.input)
        for name in node.input
    }
    return {node.name for node in graph.node if node.op_type == "MatMul" and node.output[0] in biased}


def _with_int8_embeddings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store token embeddings as int8 rows with a scale each: looked up as they are, then scaled."""
    graph = model.graph
    tables = {t.name: t for t in graph.initializer if t.name.endswith("word_embeddings.weight")}
    nodes = []
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None:
            nodes.append(node)
            continue
        rows = numpy_helper.to_array(table)
        scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)  # (tokens, 1)
        graph.initializer.remove(table)
        graph.initializer.append(numpy_helper.from_array(np.rint(rows / scale).astype(np.int8), f"{table.name}.int8"))
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{table.name}.scale"))
        found, ids = node.output[0], node.input[1]
        nodes += [
            helper.make_node("Gather", [f"{table.name}.int8", ids], [f"{found}.int8"]),
            helper.make_node("Gather", [f"{table.name}.scale", ids], [f"{found}.scale"]),
            helper.make_node("Cast", [f"{found}.int8"], [f"{found}.float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{found}.float", f"{found}.scale"], [found]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence advice of the exporter and the quantizer that an operator can do nothing about."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
