"""Fewer bits for an exported tower: dynamic int8, static int8 or int4 weights; what that saved, and what it moved.

All three take the float32 file that `stillroom_server.export.export` wrote, store token embeddings as int8 rows, and leave
adapters alone.

| scheme | weights | activations |
|---|---|---|
| `dynamic-int8` | 7 bits, a scale for each output channel | 8 bits, range of each run |
| the same, `blockwise` | the same; 8 bits in blocks for the last product of each layer | the same, in the same blocks |
| `static-int8` | as `dynamic-int8` | 8 bits, range fixed by calibration texts (QDQ) |
| `int4` | 4 bits, a scale for each block of inputs (`MatMulNBits`) | 8 bits, or float32 at accuracy level 1 |

Releases take the first for queries and the second for passages: nothing to calibrate, and ranges follow every adapter. The
third is for accelerators that take nothing else, the fourth for a smaller file.

A static range was seen with one adapter and on some texts; what lies outside is clipped (Jacob et al. 2018, arXiv 1712.05877,
section 3.1). On a processor it gains nothing: docs/export.md has figures of all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from pydantic import Field
from tokenizers import Tokenizer

from stillroom_server.export import quantize, quiet, weighted_products, with_int8_embeddings
from stillroom_shared.errors import DataError
from stillroom_shared.settings_file import Group

Feed = dict[str, NDArray[np.int64]]


class CompressSettings(Group):
    """How an exported tower is quantized."""

    scheme: Literal["dynamic-int8", "static-int8", "int4"] = Field(
        "dynamic-int8", description="Bits of the weights, and when the ranges of activations are found."
    )
    blockwise: bool = Field(False, description="dynamic-int8: last product of each layer in blocks: closer, slower.")
    block_size: Literal[16, 32, 64, 128, 256] = Field(32, description="int4: inputs that share a scale.")
    accuracy_level: Literal[0, 1, 4] = Field(
        4, description="int4: 4 multiplies in 8 bits, 1 in float32, 0 leaves it to ONNX Runtime."
    )
    ranges: Literal["extremes", "averages"] = Field(
        "averages", description="static-int8: least and largest value of all texts, or averaged over the texts."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """What became of a file.

    Attributes:
        bytes_before, bytes_after: sizes of the float32 file and of the one made of it.
        texts: texts that both encoded, one at a time; those that both give the zero vector are not among them.
        cosine_mean, cosine_least: of the mean-pooled vectors of both files.
    """

    bytes_before: int
    bytes_after: int
    texts: int
    cosine_mean: float
    cosine_least: float


def compress(
    source: Path,
    target: Path,
    settings: CompressSettings,
    *,
    tokenizer: Tokenizer,
    calibration: Sequence[str] = (),
    probes: Sequence[str],
) -> Compressed:
    """Quantize a float32 file, and compare it with its source.

    Args:
        tokenizer: of the tower, with the truncation under which it is used; it does not pad.
        calibration: public texts that fix the ranges of `static-int8`; the other schemes need none.
        probes: texts to compare on, not among those it was calibrated on.

    Raises:
        DataError: there are no probes, none that the tower says anything of, or no calibration texts where they are needed;
            values are not finite.
    """
    if not probes:
        raise DataError("there are no texts to compare the quantized tower on: give some public ones")
    match settings.scheme:
        case "dynamic-int8":
            quantize(source, target, blockwise=settings.blockwise)
        case "static-int8":
            if not calibration:
                raise DataError(
                    "static-int8 fixes its ranges by calibration texts, and there are none: give public ones"
                )
            _static(source, target, settings, feeds(tokenizer, calibration))
        case "int4":
            _int4(source, target, settings)
    before, after = (_vectors(path, feeds(tokenizer, probes)) for path in (source, target))
    said = before.any(axis=1) | after.any(axis=1)  # a static table says nothing of words that it does not know
    if not said.any():
        raise DataError(
            f"all {len(probes)} texts to compare the quantized tower on have the zero vector: give some of words that it knows"
        )
    cosines = (before * after).sum(axis=1)[said]
    if not np.isfinite(cosines).all():
        raise DataError(
            "the tower, or what was made of it, gives values that are not finite: train it again, or otherwise"
        )
    return Compressed(
        bytes_before=source.stat().st_size,
        bytes_after=target.stat().st_size,
        texts=len(cosines),
        cosine_mean=float(cosines.mean()),
        cosine_least=float(cosines.min()),
    )


def feeds(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Feed]:
    """Inputs of a tower for one text at a time, as a device gives them: each (1, tokens)."""
    for text in texts:
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _static(source: Path, target: Path, settings: CompressSettings, texts: Iterator[Feed]) -> None:
    model = _with_gemms(onnx.load(source))
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "static.onnx"
        quantize_static(
            model,
            written,
            _Reader(texts),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Gemm"],
            extra_options={
                # A quantized output would round what the residual is added to.
                "OpTypesToExcludeOutputQuantization": ["Gemm"],
                "CalibMovingAverage": settings.ranges == "averages",
                "CalibMovingAverageConstant": 0.05,
            },
        )
        onnx.save(with_int8_embeddings(onnx.load(written)), target)


def _with_gemms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each weighted product and its bias as one Gemm, of which ONNX Runtime has a quantized kernel.

    It would fuse them itself, but before it looks at quantization: then it multiplies in float32 and takes 100 times as long.
    """
    graph = model.graph
    products = {node.output[0]: node for node in graph.node if node.name in set(weighted_products(graph))}
    for node in graph.node:
        if node.op_type == "Add" and node.input[0] in products:
            product = products[node.input[0]]
            node.CopyFrom(helper.make_node("Gemm", [*product.input, node.input[1]], node.output, name=node.name))
            graph.node.remove(product)
    return model


def _int4(source: Path, target: Path, settings: CompressSettings) -> None:
    model = onnx.load(source)
    wanted = set(weighted_products(model.graph))
    with quiet():
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=4,
            block_size=settings.block_size,
            is_symmetric=True,
            accuracy_level=settings.accuracy_level,
            nodes_to_exclude=[node.name for node in model.graph.node if node.name not in wanted],
        )
        quantizer.process()
    onnx.save(with_int8_embeddings(quantizer.model.model), target)


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime is published without types
    """Feeds, one by one, then None: what the calibrator asks for."""

    def __init__(self, texts: Iterator[Feed]) -> None:
        self._texts = texts

    def get_next(self) -> Mapping[str, NDArray[np.int64]] | None:
        return next(self._texts, None)


def _vectors(path: Path, texts: Iterator[Feed]) -> NDArray[np.float32]:
    """Mean of the last hidden states of each text, normalized, (texts, dim); zero where it is zero."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    [output] = session.get_outputs()
    means = np.stack([session.run([output.name], feed)[0][0].mean(axis=0) for feed in texts])
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    normalized: NDArray[np.float32] = means / lengths
    return normalized
