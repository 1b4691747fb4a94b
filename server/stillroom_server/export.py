"""From a torch tower to ONNX: float32 by `bert_graph.py`, int8 by ONNX Runtime's dynamic quantization.

Inputs `input_ids`, `attention_mask`, `token_type_ids` (batch, tokens) int64; output `last_hidden_state` (batch,
tokens, dim) float32: what Sentence Transformers' ONNX backend feeds and reads. Pooling and normalization stay
outside.

An adapter's `B` matrices become overridable initializers: graph inputs with a default value (ONNX IR: an initializer
that is also an input may be overridden at run time). `A` is an ordinary constant. Neither is quantized: they are a
hundredth of the arithmetic, and `B` is not known when the file is written.

Both functions are deterministic: the same tower gives the same bytes, so a tower's hash identifies it.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor
from transformers import BertModel, PreTrainedConfig

from stillroom_server.bert_graph import FROZEN, Graph, hidden_states, output_width
from stillroom_server.bert_graph import INPUTS as INPUTS
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import ADAPTER_INPUT

OUTPUT = "last_hidden_state"
_TOLERANCE = 1e-4
_LAST_BIAS = re.compile(r"layer\.\d+\.output\.dense\.bias$")
# Accuracy level 4 means integer products: activations are quantized as well, in the same blocks.
_BLOCKS = {"bits": 8, "block_size": 32, "is_symmetric": True, "accuracy_level": 4}


def export(tower: BertModel, path: Path, adapter: Adapter | None = None) -> None:
    """Write a plain tower as float32 ONNX; with an adapter, its `B` are the defaults of the overridable inputs.

    Args:
        adapter: None writes a tower that takes no adapter; to start from nothing, pass the zero adapter.

    Raises:
        ReleaseError: the tower is no plain BERT encoder, the adapter does not fit it, or ONNX Runtime computes other
            vectors from the file than torch from the tower.
    """
    graph = Graph()
    states = hidden_states(graph, tower, out=OUTPUT, adapter=adapter)
    onnx.save(graph.model(states, ("batch", "tokens", output_width(tower))), path)
    training, device = tower.training, tower.device
    tower.train(False)
    try:
        compare(
            path,
            lambda inputs: tower(**{name: value.to(device) for name, value in inputs.items()}).last_hidden_state,
            tower.config,
            adapter,
        )
    finally:
        tower.train(training)


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
            nodes_to_quantize=weighted_products(model.graph),
            # What follows an operator of com.microsoft has a type that onnx cannot infer.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    onnx.save(with_int8_embeddings(onnx.load(target)), target)


def compare(
    path: Path,
    states: Callable[[Mapping[str, Tensor]], Tensor],
    config: PreTrainedConfig,
    adapter: Adapter | None = None,
) -> None:
    """Two texts of different lengths, through the file without its adapter and through the tower that it was made of.

    Args:
        states: the tower, from `INPUTS` (2, tokens) to its last hidden states (2, tokens, dim).

    Raises:
        ReleaseError: ONNX Runtime computes something else.
    """
    tokens = min(7, config.max_position_embeddings)
    ids = np.arange(2 * tokens, dtype=np.int64).reshape(2, tokens) % config.vocab_size
    mask = np.ones_like(ids)
    mask[1, tokens // 2 + 1 :] = 0
    feed = dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))
    plain = {} if adapter is None else Adapter.zero(adapter.spec).matrices()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # that `B` may be overridden is said at every start
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run([OUTPUT], {**feed, **{ADAPTER_INPUT + name: matrix for name, matrix in plain.items()}})[0]
    with torch.inference_mode():
        truth = states({name: torch.from_numpy(value) for name, value in feed.items()}).cpu().numpy()
    error = np.abs((found - truth)[mask == 1]).max() / np.abs(truth).max() if found.shape == truth.shape else np.inf
    if not error <= _TOLERANCE:
        raise ReleaseError(
            f"the exported tower is off by {error:.2g} of the largest value: it is no transformer as this version knows it"
        )


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the source lines of the machine that exported: they are nobody's business and change the hash."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.checker.check_model(model)
    return model


def weighted_products(graph: onnx.GraphProto) -> list[str]:
    """Names of the products with a weight: not those within attention, and none of an adapter.

    `A` is a constant as well, and stays as it is; `B` is turned first, so that no product has it as an initializer.
    """
    weights = {tensor.name for tensor in graph.initializer if not tensor.name.startswith(FROZEN)}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]


def _last_products(graph: onnx.GraphProto) -> set[str]:
    """Names of the products with the last weight of each layer's feed-forward part, found by the bias added to them."""
    biased = {
        name
        for node in graph.node
        if node.op_type == "Add" and any(_LAST_BIAS.search(name) for name in node.input)
        for name in node.input
    }
    return {node.name for node in graph.node if node.op_type == "MatMul" and node.output[0] in biased}


def with_int8_embeddings(model: onnx.ModelProto) -> onnx.ModelProto:
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
