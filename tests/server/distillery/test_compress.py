"""Quantized files against their source, the graph that they are made of, and what other runtimes know of it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from tests.conftest import TINY_SPEC
from tokenizers import Tokenizer
from torch import nn
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertLayer
from typer.testing import CliRunner

from stillroom_server.distillery.compress.quantize import CompressSettings, compress, feeds
from stillroom_server.distillery.compress.targets import TENSORRT, Target, check_operators, graphs
from stillroom_server.export import OUTPUT, export
from stillroom_shared.adapter import Adapter
from stillroom_shared.cli import build_app
from stillroom_shared.errors import DataError, ReleaseError
from stillroom_shared.lowrank import attach, set_adapter
from stillroom_shared.release import ADAPTER_INPUT, ONNX_FILES, Release

CALIBRATION = ("open the zip file", "how do i sort a list", "what is a matrix of numbers", "tapir eats leaves")
PROBES = ("read the tar file and list its members", "search passage in the index", "river", "array or number?")
SCHEMES = {
    "dynamic": CompressSettings(),
    "blockwise": CompressSettings(blockwise=True),
    "static": CompressSettings(scheme="static-int8"),
    "extremes": CompressSettings(scheme="static-int8", ranges="extremes"),
    "int4": CompressSettings(scheme="int4", block_size=16),
}


LEAST = {"dynamic": 0.98, "blockwise": 0.98, "static": 0.9, "extremes": 0.9, "int4": 0.8}


@pytest.fixture(scope="module")
def tokenizer(tiny_release: Release) -> Tokenizer:
    found = Tokenizer.from_file(str(tiny_release.tokenizer_file))
    found.enable_truncation(16)
    return found


@pytest.fixture(scope="module")
def source(tiny_towers: tuple[BertModel, BertModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny query tower with overridable adapters, float32."""
    path: Path = tmp_path_factory.mktemp("compress") / "tower.onnx"
    export(tiny_towers[0], path, Adapter.zero(TINY_SPEC))
    return path


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("scheme", "least"), LEAST.items())
def test_quantized_files_are_close_and_take_adapters(
    source: Path, tokenizer: Tokenizer, tiny_adapter: Adapter, tmp_path: Path, scheme: str, least: float
) -> None:
    """A scheme that quantizes the adapter, or bakes it in, would search with the adapter of its calibration for ever."""
    target = tmp_path / "quantized.onnx"
    done = compress(source, target, SCHEMES[scheme], tokenizer=tokenizer, calibration=CALIBRATION, probes=PROBES)
    assert done.texts == len(PROBES) and least < done.cosine_least <= done.cosine_mean < 1 - 1e-6
    assert (done.bytes_before, done.bytes_after) == (source.stat().st_size, target.stat().st_size)
    own = {ADAPTER_INPUT + name: matrix for name, matrix in tiny_adapter.matrices().items()}
    adapted, plain = session(source), session(target)
    for feed in feeds(tokenizer, PROBES):
        wanted, found = (one.run([OUTPUT], {**feed, **own})[0][0].mean(0) for one in (adapted, plain))
        before = plain.run([OUTPUT], feed)[0][0].mean(0)
        near = wanted @ found / np.linalg.norm(wanted) / np.linalg.norm(found)
        assert near > least - 0.1 and near > wanted @ before / np.linalg.norm(wanted) / np.linalg.norm(before)


def test_weights_get_the_bits_that_were_asked_for(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A product that a quantizer passes over stays float32 without a word; only the operators show it."""
    kinds = {"dynamic": "MatMulInteger", "static": "Gemm", "int4": "MatMulNBits"}
    for scheme, kind in kinds.items():
        path = tmp_path / f"{scheme}.onnx"
        compress(source, path, SCHEMES[scheme], tokenizer=tokenizer, calibration=CALIBRATION, probes=PROBES)
        model = onnx.load(path)
        assert sum(node.op_type == kind for node in model.graph.node) == 12, scheme
        floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2]
        kept = ("adapter.", "frozen.", "embeddings.position", "embeddings.token_type")
        names = [t.name for t in floats if not t.name.startswith(kept)]
        assert all(name.endswith(("scale", "scales")) for name in names), (scheme, names)
    session(tmp_path / "static.onnx", tmp_path / "optimized.onnx")
    fused = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert fused.count("QGemm") == 12, "ONNX Runtime multiplies in float32: a hundred times as slow at real sizes"


def test_what_compression_needs_is_asked_for(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Without calibration texts, ranges would come from nowhere; without probes, the report would be empty."""
    with pytest.raises(DataError, match="calibration"):
        compress(source, tmp_path / "x", SCHEMES["static"], tokenizer=tokenizer, probes=PROBES)
    with pytest.raises(DataError, match="compare"):
        compress(source, tmp_path / "x", SCHEMES["int4"], tokenizer=tokenizer, probes=())


def test_no_slow_fusion_comes_back(source: Path, tmp_path: Path) -> None:
    """ONNX Runtime fuses sum and normalization of 3D states into a kernel that takes four times as long."""
    session(source, tmp_path / "optimized.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("LayerNormalization") == 5 and "SkipLayerNormalization" not in kinds and "Erf" not in kinds


def test_pruned_heads_and_widths(tiny_towers: tuple[BertModel, BertModel], tmp_path: Path) -> None:
    """A width that is taken from the configuration and not from the layer fails, or mixes heads, in pruned towers only."""
    tower = copy.deepcopy(tiny_towers[0])
    layer = tower.encoder.layer[1]
    assert isinstance(layer, BertLayer)
    attention = layer.attention.self
    for name in ("query", "key", "value"):
        setattr(attention, name, nn.Linear(32, 16))
    layer.attention.output.dense = nn.Linear(16, 32)
    attention.num_attention_heads, attention.all_head_size = 1, 16
    layer.intermediate.dense, layer.output.dense = nn.Linear(32, 24), nn.Linear(24, 32)
    export(tower, tmp_path / "pruned.onnx")  # compares the file with torch


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_other_activations(tiny_towers: tuple[BertModel, BertModel], tmp_path: Path, activation: str) -> None:
    """The exact Gelu in place of another activation gives plausible vectors, of another model."""
    config = copy.deepcopy(tiny_towers[0].config)
    config.hidden_act = activation
    torch.manual_seed(0)
    export(BertModel(config), tmp_path / "tower.onnx")
    config.hidden_act = "silu"
    with pytest.raises(ReleaseError, match="'silu'"):
        export(BertModel(config), tmp_path / "other.onnx")


def test_unfit_towers_are_refused(
    tiny_towers: tuple[BertModel, BertModel], tiny_adapter: Adapter, tmp_path: Path
) -> None:
    """An attached adapter would be left out silently; a file that differs from its tower must never be sealed."""
    own = copy.deepcopy(tiny_towers[0])
    set_adapter(attach(own, TINY_SPEC), tiny_adapter)
    with pytest.raises(ReleaseError, match="attached"):
        export(own, tmp_path / "tower.onnx")
    other = copy.deepcopy(tiny_towers[0])
    other.encoder.layer[0].register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(ReleaseError, match="off by"):
        export(other, tmp_path / "tower.onnx")


class TestTargets:
    """What other runtimes know of a graph."""

    @pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
    def test_the_float_towers_have_standard_operators(self, tiny_release: Release, target: Target) -> None:
        """An operator of com.microsoft in the float32 file would leave no way on to other runtimes."""
        for path in (tiny_release.query_onnx("float32"), tiny_release.document_onnx("float32")):
            found = check_operators(path, target)
            assert not found.missing and found.counts["MatMul"] >= 12 and "all supported" in found.text()

    def test_what_tensorrt_lacks_is_named(self, tiny_release: Release) -> None:
        """An unknown operator is found hours later, by a build on another machine."""
        missing = check_operators(tiny_release.document_onnx("int8"), "tensorrt").missing
        assert set(missing) == {"DynamicQuantizeLinear", "MatMulInteger", "com.microsoft:MatMulNBits"}
        assert all("float32" in remedy for remedy in missing.values())

    def test_zero_points_and_opsets_of_tensorrt(self, source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
        """Both are refused by name alone only when somebody looks at more than names."""
        path = tmp_path / "static.onnx"
        compress(source, path, SCHEMES["static"], tokenizer=tokenizer, calibration=CALIBRATION, probes=PROBES)
        model = onnx.load(path)
        assert set(check_operators(path, "tensorrt").missing) == {"QuantizeLinear", "DequantizeLinear"}
        assert {node.op_type for node in model.graph.node} <= TENSORRT
        model = onnx.load(source)
        model.opset_import[0].version = 21
        onnx.save(model, tmp_path / "later.onnx")
        assert set(check_operators(tmp_path / "later.onnx", "tensorrt").missing) == {"opset 21"}

    def test_core_ml_by_the_list_that_onnx_runtime_ships(self, source: Path) -> None:
        """A list that is no longer where it was, or whose form changed, would support nothing, or everything."""
        missing = check_operators(source, "coreml").missing
        assert "Gather" in missing and not {"MatMul", "Add", "LayerNormalization", "Gelu", "Softmax"} & set(missing)

    def test_onnx_runtime_itself_refuses(self, tmp_path: Path) -> None:
        """The installed runtime is the one witness that need not be believed."""
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        node = helper.make_node("Tapir", ["x"], ["y"], domain="com.example")
        graph = helper.make_graph([node], "g", values[:1], values[1:])
        domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
        onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=9), tmp_path / "odd.onnx")
        assert set(check_operators(tmp_path / "odd.onnx", "onnxruntime").missing) == {"com.example:Tapir"}

    def test_core_aten(self, tiny_release: Release) -> None:
        """The torch weights of a release must export and decompose into what ExecuTorch has kernels for."""
        found = check_operators(tiny_release.folder / "document", "executorch")
        assert found.counts["aten.native_layer_norm.default"] == 5 and not found.missing

    def test_what_is_no_graph(self, tmp_path: Path) -> None:
        """A stray file must be refused in words, not by the parser's traceback."""
        (tmp_path / "stray.onnx").write_bytes(b"\x01\x02 no model")
        with pytest.raises(DataError, match="ONNX"):
            check_operators(tmp_path / "stray.onnx", "tensorrt")
        with pytest.raises(DataError, match="torch weights"):
            check_operators(tmp_path, "executorch")
        with pytest.raises(DataError, match="holds no"):
            graphs(tmp_path, "executorch")

    def test_the_command(self, tiny_release: Release) -> None:
        """A script that ships only what passes must see it in the exit status."""
        names = {path.relative_to(tiny_release.folder).as_posix() for path in graphs(tiny_release.folder, "tensorrt")}
        assert names == {f"{side}{name}" for side in ("", "document/") for name in ONNX_FILES.values()}
        command = ["release", "operators", str(tiny_release.query_onnx("float32")), "--target", "tensorrt"]
        done = CliRunner().invoke(build_app(), command)
        assert done.exit_code == 0 and "all supported" in done.output and "TensorRT 10.0" in done.output
        done = CliRunner().invoke(build_app(), [*command[:2], str(tiny_release.folder), *command[3:]])
        assert done.exit_code == 1 and "2 missing" in done.output
