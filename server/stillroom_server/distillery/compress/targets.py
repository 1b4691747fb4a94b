"""Will it run there? The operators of an exported tower against what a runtime has.

| target | what is checked | against |
|---|---|---|
| `onnxruntime` | an ONNX file | the installed ONNX Runtime itself: a session is made |
| `tensorrt` | an ONNX file | TensorRT's ONNX parser: `TENSORRT`, below |
| `coreml` | an ONNX file | the list of the Core ML execution provider that ONNX Runtime ships |
| `executorch` | a folder with torch weights | core ATen: the operators that torch tags `torch.Tag.core` |

A check of names is necessary, not sufficient: shapes and types may be refused as well. Only `onnxruntime` was run.
docs/export.md says how to go on.

| what is found | result |
|---|---|
| an operator that the target lacks | in `missing`, with what to do instead |
| QuantizeLinear with a zero point, for TensorRT | in `missing`: it takes symmetric ranges only |
| a file that is no ONNX, a folder without torch weights | `DataError` |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch.export import Dim, ExportedProgram
from transformers import AutoModel

from stillroom_server.export import quiet
from stillroom_shared.errors import DataError

Target = Literal["onnxruntime", "tensorrt", "coreml", "executorch"]
COREML_TABLE = Path(onnxruntime.__file__).parent / "tools/mobile_helpers/coreml_supported_mlprogram_ops.md"
TENSORRT_OPSETS = range(9, 21)
_TENSORRT = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil
Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace
DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements
GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
GroupNormalization HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow
QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
Reshape Resize ReverseSequence RoiAlign Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin
Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile
TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
TENSORRT = frozenset(_TENSORRT.split())
"""Of TensorRT 10.0, opsets 9 to 20: docs/operators.md of github.com/onnx/onnx-tensorrt at commit 96e7811."""
SOURCES: Mapping[Target, str] = {
    "onnxruntime": f"ONNX Runtime {onnxruntime.__version__}, as installed",
    "tensorrt": "TensorRT 10.0, onnx-tensorrt 96e7811, docs/operators.md",
    "coreml": f"ONNX Runtime {onnxruntime.__version__}, {COREML_TABLE.name}",
    "executorch": f"core ATen of torch {torch.__version__.partition('+')[0]} (torch.Tag.core)",
}
_FLOAT = "check the float32 file, and let the target quantize"
_PROCESSOR = "stays on the processor, and the graph is cut there"
_INSTEAD = {
    "tensorrt": {
        **dict.fromkeys(("DynamicQuantizeLinear", "MatMulInteger", "com.microsoft:MatMulNBits"), _FLOAT),
        "": "export a graph of standard operators, as stillroom_server.export.export does",
    },
    "coreml": {"": _PROCESSOR},
    "executorch": {"": "decompose it, or give ExecuTorch a kernel for it"},
}


@dataclass(frozen=True, slots=True)
class Operators:
    """What was found in one graph.

    Attributes:
        checked: the file or folder.
        source: what it was compared with, and its version.
        counts: operators by name, `domain:name` outside ai.onnx.
        missing: those that the target lacks, and what to do instead.
    """

    checked: Path
    target: Target
    source: str
    counts: Mapping[str, int]
    missing: Mapping[str, str]

    def text(self) -> str:
        """One line, and one for each operator that is missing."""
        head = f"{self.checked}: {sum(self.counts.values())} operators of {len(self.counts)} kinds, {self.target}: "
        lines = [f"  {name} ({self.counts.get(name, 1)}): {remedy}" for name, remedy in self.missing.items()]
        return "\n".join([head + (f"{len(lines)} missing" if lines else "all supported"), *lines])


def graphs(path: Path, target: Target) -> list[Path]:
    """What there is to check in a folder, towers inside it included; a file stands for itself.

    Raises:
        DataError: nothing of the kind that the target takes.
    """
    if path.is_file() and target != "executorch":
        return [path]
    pattern = "model.safetensors" if target == "executorch" else "*.onnx"
    found = sorted(path.rglob(pattern))
    if not found:
        raise DataError(f"{path} holds no {pattern}: give the folder of a release or of an exported model")
    return [one.parent for one in found] if target == "executorch" else found


def check_operators(path: Path, target: Target) -> Operators:
    """Compare an ONNX file, or for `executorch` the torch weights in a folder, with a target.

    Raises:
        DataError: there is nothing of that kind at `path`.
    """
    if target == "executorch":
        return check_program(exported(path), path)
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise DataError(f"{path} cannot be read as an ONNX file ({error}): give one that was exported") from error
    except Exception as error:  # protobuf's own, whose class moved between its versions
        raise DataError(f"{path} is not an ONNX file ({error}): give one that was exported") from error
    counts = Counter(_name(node) for node in model.graph.node)
    missing = dict({"onnxruntime": _refused, "tensorrt": _tensorrt, "coreml": _coreml}[target](path, model, counts))
    return Operators(path, target, SOURCES[target], dict(sorted(counts.items())), missing)


def check_program(program: ExportedProgram, path: Path) -> Operators:
    """Compare an exported torch program with core ATen; it is decomposed first, as ExecuTorch does."""
    called = [node.target for node in program.run_decompositions().graph.nodes if node.op == "call_function"]
    # The rest is arithmetic of sizes; what returns nothing is an assertion, which is left out when a program is lowered.
    operators = [one for one in called if isinstance(one, torch._ops.OpOverload) and one._schema.returns]
    counts = Counter(str(operator) for operator in operators)
    lacking = sorted({str(operator) for operator in operators if torch.Tag.core not in operator.tags})
    missing = {name: _INSTEAD["executorch"][""] for name in lacking if not name.startswith("aten.sym_")}
    return Operators(path, "executorch", SOURCES["executorch"], dict(sorted(counts.items())), missing)


def exported(folder: Path) -> ExportedProgram:
    """The tower in a Sentence Transformers folder as a torch program of (batch, tokens) ids and mask."""
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds no torch weights of a tower ({error}): give the folder of a release"
        ) from error
    model.train(False)
    batch, tokens = Dim("batch"), Dim("tokens", max=model.config.max_position_embeddings)
    ids, mask = (torch.ones(2, 3, dtype=torch.int64) for _ in range(2))
    shapes = {name: {0: batch, 1: tokens} for name in ("input_ids", "attention_mask")}
    with quiet():
        return torch.export.export(
            model, (), {"input_ids": ids, "attention_mask": mask}, dynamic_shapes=shapes, strict=False
        )


def _name(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"


def _refused(path: Path, model: onnx.ModelProto, counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many classes, of which only Exception is a common base
        words = " ".join(str(error).split())
        yield next((name for name in counts if re.search(rf"\b{name.rpartition(':')[2]}\b", words)), "session"), words


def _tensorrt(path: Path, model: onnx.ModelProto, counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version not in TENSORRT_OPSETS:
            yield f"opset {entry.version}", f"export with opset {TENSORRT_OPSETS[-1]} or an earlier one"
    remedies = _INSTEAD["tensorrt"]
    yield from ((name, remedies.get(name, remedies[""])) for name in sorted(set(counts) - TENSORRT))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        points = [node.input[2] for node in model.graph.node if node.op_type == kind and len(node.input) > 2]
        if any(name in constants and np.any(numpy_helper.to_array(constants[name])) for name in points):
            yield kind, f"its zero point must be 0 there: {_FLOAT}"


def _coreml(path: Path, model: onnx.ModelProto, counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    rows = re.findall(r"^\|([\w.]+):(\w+)\|", COREML_TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    known = {name if domain == "ai.onnx" else f"{domain}:{name}" for domain, name in rows}
    yield from ((name, _PROCESSOR) for name in sorted(set(counts) - known))
