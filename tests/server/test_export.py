"""Export and publication: ONNX against torch, int8 against float32, and the folder as a Sentence Transformers model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from sentence_transformers import SentenceTransformer
from sentence_transformers.backend.utils import backend_should_export
from tests.conftest import TINY_SPEC
from transformers import BertModel, PreTrainedTokenizerFast

from stillroom_client.encoder import Encoder
from stillroom_server.export import INPUTS, OUTPUT, export, quantize
from stillroom_server.publish import publish_release
from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.errors import ReleaseError
from stillroom_shared.lowrank import attach, attached, set_adapter
from stillroom_shared.release import ADAPTER_INPUT, ONNX_FILES, Precision, Release
from stillroom_shared.signing import SigningKey

Vectors = NDArray[np.float32]
TEXTS = (
    "open the zip file and list its members",
    "tapir",
    "",
    "What is a matrix? Rows, columns; NUMBERS (and so on).",
    "  río   Ünïcode 漢字 \t end ",
    " ".join(["read the array and write it to the tar file"] * 12),
)
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def batch(rows: int, tokens: int, vocabulary: int) -> dict[str, NDArray[np.int64]]:
    """Random tokens of both types, right-padded to different lengths."""
    generator = np.random.default_rng(rows * 100 + tokens)
    lengths = generator.integers(1, tokens + 1, rows)
    return {
        "input_ids": generator.integers(0, vocabulary, (rows, tokens)),
        "attention_mask": (np.arange(tokens) < lengths[:, None]).astype(np.int64),
        "token_type_ids": generator.integers(0, 2, (rows, tokens)),
    }


def hidden_states(tower: BertModel, inputs: dict[str, NDArray[np.int64]]) -> Vectors:
    with torch.no_grad():
        output: Vectors = tower(**{k: torch.from_numpy(v) for k, v in inputs.items()}).last_hidden_state.numpy()
    return output * inputs["attention_mask"][:, :, None]


def cosines(a: Vectors, b: Vectors) -> Vectors:
    product: Vectors = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return product


@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (5, 9), (2, 64)])
def test_onnx_equals_torch(
    tiny_release: Release, tiny_towers: tuple[BertModel, BertModel], shape: tuple[int, int]
) -> None:
    """A constant baked in by tracing (a length, a mask, one input taken for another) shows at other shapes only."""
    inputs = batch(*shape, vocabulary=tiny_towers[0].config.vocab_size)
    for tower, path in zip(tiny_towers, (tiny_release.query_onnx, tiny_release.document_onnx), strict=True):
        found = session(path("float32")).run([OUTPUT], inputs)[0] * inputs["attention_mask"][:, :, None]
        np.testing.assert_allclose(found, hidden_states(tower, inputs), atol=2e-5)


def test_adapter_default_and_override(
    adapted_release: tuple[Release, Adapter], tiny_towers: tuple[BertModel, BertModel]
) -> None:
    """An override that is ignored, or lands on another projection, would search with an adapter nobody trained."""
    release, adapter = adapted_release
    onnx_tower, inputs = session(release.query_onnx("float32")), batch(4, 11, tiny_towers[0].config.vocab_size)
    values = np.random.default_rng(1).standard_normal(adapter.spec.size).astype(np.float32)
    outputs = []
    for chosen, feed in ((adapter, {}), (Adapter(adapter.spec, values), {}), (Adapter.zero(adapter.spec), {})):
        if chosen is not adapter:
            feed = {ADAPTER_INPUT + name: matrix for name, matrix in chosen.matrices().items()}
        found = onnx_tower.run([OUTPUT], {**inputs, **feed})[0] * inputs["attention_mask"][:, :, None]
        tower = copy.deepcopy(tiny_towers[0])
        set_adapter(attach(tower, chosen.spec), chosen)
        np.testing.assert_allclose(found, hidden_states(tower, inputs), atol=2e-5)
        outputs.append(found)
    assert min(abs(outputs[0] - outputs[1]).max(), abs(outputs[1] - outputs[2]).max()) > 0.1, "the adapters must matter"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_signature_of_the_files(adapted_release: tuple[Release, Adapter], precision: Precision) -> None:
    """A fourth required input, or another name, breaks every loader that was not written by us."""
    release, adapter = adapted_release
    query, document = session(release.query_onnx(precision)), session(release.document_onnx(precision))
    for tower in (query, document):
        assert {entry.name for entry in tower.get_inputs()} == set(INPUTS)
        assert all(entry.type == "tensor(int64)" for entry in tower.get_inputs())
        assert [entry.name for entry in tower.get_outputs()] == [OUTPUT]
    overridable = {entry.name: (tuple(entry.shape), entry.type) for entry in query.get_overridable_initializers()}
    assert overridable == {ADAPTER_INPUT + name: ((32, 3), "tensor(float)") for name in adapter.spec.names}
    assert not document.get_overridable_initializers()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_the_files(adapted_release: tuple[Release, Adapter], precision: Precision) -> None:
    """Quantized adapter matrices would round away what a round changed; float weights would double the download."""
    release, adapter = adapted_release
    for path, frozen in (
        (release.query_onnx(precision), adapter.spec.frozen()),
        (release.document_onnx(precision), {}),
    ):
        model = onnx.load(path)
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, a in frozen.items():
            np.testing.assert_array_equal(numpy_helper.to_array(constants[f"frozen.{name}"]), a.T)
            default = numpy_helper.to_array(constants[ADAPTER_INPUT + name])
            np.testing.assert_array_equal(default, adapter.matrices()[name])
        products = [node for node in model.graph.node if node.op_type == "MatMul"]
        weighted = {name for node in products for name in node.input if name in constants}
        adapters = {f"frozen.{name}" for name in frozen}
        assert adapters <= weighted
        if precision == "int8":
            assert weighted == adapters
            largest = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
            assert largest.data_type == onnx.TensorProto.INT8


def test_int8_is_close(tiny_release: Release) -> None:
    """A wrong scale or zero point still gives plausible unit vectors; only a comparison shows it."""
    texts = [text for text in TEXTS if text]
    reference, quantized = (Encoder(tiny_release, precision=precision) for precision in PRECISIONS)
    for encode in ("encode_queries", "encode_documents"):
        found = cosines(getattr(quantized, encode)(texts), getattr(reference, encode)(texts))
        assert found.min() >= 0.98 and found.max() < 1 - 1e-7, "closer than int8 can be: float32 was loaded"


def test_export_is_deterministic_and_anonymous(tiny_release: Release, tmp_path: Path) -> None:
    """Bytes that differ between runs would re-embed every device's documents; source paths describe the operator."""
    tower = BertModel.from_pretrained(tiny_release.folder / "document")
    export(tower, tmp_path / "again.onnx")
    quantize(tmp_path / "again.onnx", tmp_path / "again.int8.onnx", blockwise=True)
    assert (tmp_path / "again.onnx").read_bytes() == tiny_release.document_onnx("float32").read_bytes()
    assert (tmp_path / "again.int8.onnx").read_bytes() == tiny_release.document_onnx("int8").read_bytes()
    for path in tiny_release.folder.rglob("*.onnx"):
        assert not [word for word in (b"/lib/", b".py", b"stack_trace") if word in path.read_bytes()]


@pytest.mark.parametrize("which", ["tiny", "adapted"])
@pytest.mark.parametrize("side", ["", "document"])
def test_folder_is_a_sentence_transformers_model(
    tiny_release: Release, adapted_release: tuple[Release, Adapter], which: str, side: str
) -> None:
    """Other pooling, truncation, lower-casing or unmerged weights give vectors that nobody's index matches."""
    release = tiny_release if which == "tiny" else adapted_release[0]
    model = SentenceTransformer(str(release.folder / side), device="cpu")
    assert model.max_seq_length == (release.document_tokens if side else release.query_tokens)
    assert model.similarity_fn_name == "cosine"
    encoder = Encoder(release, precision="float32")
    found = (encoder.encode_documents if side else encoder.encode_queries)(TEXTS)
    np.testing.assert_allclose(found, model.encode(list(TEXTS)), atol=1e-5)
    if which == "adapted" and not side:
        plain = Encoder(tiny_release, precision="float32").encode_queries(TEXTS)
        assert cosines(found, plain).min() < 0.99, "the default adapter must matter, or nothing was compared"


@pytest.mark.parametrize("side", ["", "document"])
@pytest.mark.parametrize("name", [None, *ONNX_FILES.values(), *(Path(name).name for name in ONNX_FILES.values())])
def test_sentence_transformers_finds_the_onnx_files(tiny_release: Release, side: str, name: str | None) -> None:
    """Under another name its ONNX backend silently exports the torch weights again instead of loading our file."""
    folder = tiny_release.folder / side
    wanted: dict[str, Any] = {} if name is None else {"file_name": name}
    must_export, found = backend_should_export(folder, True, wanted, "model.onnx", "*.onnx", "ONNX")
    assert not must_export
    path = folder / found["subfolder"] / found["file_name"]
    assert path == folder / ONNX_FILES["float32"] if name is None else path.name == Path(name).name
    assert path.is_file()


def test_taking_over_the_document_tower_keeps_indexes(
    tiny_release: Release, adapted_release: tuple[Release, Adapter]
) -> None:
    """If a round moved the document tower's hash, every device would embed its documents again."""
    child, adapter = adapted_release
    assert child.document_tower_hash == tiny_release.document_tower_hash
    assert child.manifest.query_tower_hash != tiny_release.manifest.query_tower_hash
    assert (child.manifest.parent, child.manifest.adapter_round) == (tiny_release.id, 15)
    assert child.adapter_spec == adapter.spec and child.manifest.privacy_statement == {"epsilon": 1.57}


def test_publishing_leaves_the_tower_alone(
    adapted_release: tuple[Release, Adapter], tiny_towers: tuple[BertModel, BertModel]
) -> None:
    """The operator trains on after publishing: merged or frozen weights would apply the adapter twice, or never."""
    assert adapted_release[1].values.any() and not attached(tiny_towers[0])
    assert all(parameter.requires_grad for parameter in tiny_towers[0].parameters())


class TestRefusals:
    """What must not be published; each is refused before anything is written."""

    @pytest.fixture
    def arguments(
        self,
        tiny_towers: tuple[BertModel, BertModel],
        tiny_tokenizer: PreTrainedTokenizerFast,
        signing_key: SigningKey,
    ) -> dict[str, Any]:
        query_tower, document_tower = tiny_towers
        return {
            "query_tower": query_tower, "document_tower": document_tower, "tokenizer": tiny_tokenizer,
            "spec": TINY_SPEC, "adapter": None, "key": signing_key, "parent": None, "adapter_round": 0,
            "privacy_statement": None, "query_tokens": 16, "document_tokens": 48,
        }  # fmt: skip

    def refused(self, folder: Path, words: str, arguments: dict[str, Any]) -> None:
        with pytest.raises(ReleaseError, match=words):
            publish_release(folder, **arguments)
        assert not folder.exists() and not list(folder.parent.glob(".*partial"))

    def test_adapter_of_another_spec(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        """Devices would build adapters by the manifest's spec and feed them into a graph of another one."""
        other: AdapterSpec = replace(TINY_SPEC, seed=1)
        self.refused(tmp_path / "r", "must be the same", {**arguments, "adapter": Adapter.zero(other)})

    def test_spec_for_another_tower(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        """A spec with a layer that the tower lacks must name it, not fail inside the exporter."""
        self.refused(tmp_path / "r", "does not fit", {**arguments, "spec": replace(TINY_SPEC, layers=(0, 2))})

    @pytest.mark.parametrize(("name", "tokens"), [("query_tokens", 65), ("document_tokens", 65), ("query_tokens", 2)])
    def test_lengths(self, tmp_path: Path, arguments: dict[str, Any], name: str, tokens: int) -> None:
        """A text longer than the tower's positions fails on the device, at the first long text."""
        self.refused(tmp_path / "r", f"{name} is {tokens}", {**arguments, name: tokens})

    def test_towers_of_other_widths(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        """Vectors of two lengths cannot be compared."""
        config = copy.deepcopy(arguments["document_tower"].config)
        config.hidden_size = 64
        self.refused(tmp_path / "r", "must agree", {**arguments, "document_tower": BertModel(config)})

    def test_half_precision(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        """Mixed types fail in the exporter or, worse, ship weights that the float32 file does not hold."""
        half = copy.deepcopy(arguments["query_tower"]).bfloat16()
        self.refused(tmp_path / "r", "convert it to torch.float32", {**arguments, "query_tower": half})

    def test_other_length_than_the_tower_taken_over(
        self, tmp_path: Path, arguments: dict[str, Any], tiny_release: Release
    ) -> None:
        """The manifest would state a truncation that the taken-over folder does not have."""
        taken = {**arguments, "document_tower": tiny_release, "document_tokens": 32}
        self.refused(tmp_path / "r", "taken over reads 48", taken)

    def test_existing_folder(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        """Overwriting a release would change what devices hold under an unchanged name."""
        (tmp_path / "r").mkdir()
        with pytest.raises(ReleaseError, match="never change"):
            publish_release(tmp_path / "r", **arguments)
