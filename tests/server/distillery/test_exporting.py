"""`stillroom distill export`: the files of students, for any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tests.server.distillery.tiny_models import save_models
from torch import nn
from transformers import BertModel, DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from stillroom_client.encoder import OnnxTower
from stillroom_client.rerank import PairScorer
from stillroom_server.distillery.cli import register
from stillroom_server.distillery.compress.quantize import CompressSettings
from stillroom_server.distillery.exporting import export_model, export_named
from stillroom_server.distillery.students.make import make_student
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_shared.errors import DataError, ReleaseError, SettingsError
from stillroom_shared.release import ONNX_FILES

LONG = "given the list of members of a zip file " * 9


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("saved"), tiny_towers[1], tiny_tokenizer)


def test_the_command_writes_what_the_model_computes(saved: dict[str, str], tmp_path: Path) -> None:
    """A teacher measured at another length than it was trained for is another teacher; so is one of another kind."""
    app = typer.Typer()
    register(app)
    for name in ("bi-encoder", "cross-encoder", "colbert"):
        done = CliRunner().invoke(app, ["distill", "export", saved[name], str(tmp_path / name)])
        assert done.exit_code == 0 and f"{tmp_path / name}@int8" in done.output, done.output
        assert all((tmp_path / name / file).is_file() for file in ONNX_FILES.values())
    model = SentenceTransformer(saved["bi-encoder"], device="cpu")
    folder = tmp_path / "bi-encoder"
    words, onnx = ((folder / name).read_bytes() for name in ("tokenizer.json", ONNX_FILES["float32"]))
    tower = OnnxTower(words, onnx, model.max_seq_length)
    assert len(tower.tokens(LONG)) == model.max_seq_length == 48
    np.testing.assert_allclose(tower.mean(LONG), model.encode(LONG), atol=2e-5)
    scorer = CrossEncoder(saved["cross-encoder"], device="cpu")
    folder = tmp_path / "cross-encoder"
    words, onnx = ((folder / name).read_bytes() for name in ("tokenizer.json", ONNX_FILES["float32"]))
    found = PairScorer(words, onnx, int(scorer.max_seq_length or 0)).logits("open a zip", [LONG])[0]
    truth = scorer.predict([("open a zip", LONG)])[0]
    assert 1 / (1 + np.exp(-found)) == pytest.approx(truth, abs=1e-5)


def test_a_static_table_is_compared_on_texts_of_words_that_it_knows(saved: dict[str, str], tmp_path: Path) -> None:
    """Guards against a mean cosine of NaN, which no JSON file can say, by one text whose vector is zero."""
    student: Any = make_student(StudentSettings(kind="static"), SentenceTransformer(saved["bi-encoder"], device="cpu"))
    assert not student.encode("漢").any(), "the guard: it is zero"
    found = export_model(student, tmp_path / "some", CompressSettings(), ["open a zip", "漢", "river"])
    assert found["texts"] == 2 and 0.9 < found["cosine_least"] <= found["cosine_mean"] < 1 + 1e-6
    with pytest.raises(DataError, match=r"all 1 texts .* have the zero vector"):
        export_model(student, tmp_path / "none", CompressSettings(), ["漢"])
    with torch.no_grad():
        student[0].embedding.weight[:, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        export_model(student, tmp_path / "broken", CompressSettings(), ["open a zip"])


def test_a_transformer_that_is_no_bert(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Sizes of the traced example must not stay in the file; a device gives three inputs, of which this tower reads two."""
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(tiny_tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=64
    )
    DistilBertModel(config).save_pretrained(tmp_path / "tower")
    tiny_tokenizer.save_pretrained(tmp_path / "tower")
    modules: list[nn.Module] = [Transformer(str(tmp_path / "tower"), max_seq_length=24), Pooling(32)]
    model = SentenceTransformer(modules=modules, device="cpu").eval()
    model.save_pretrained(str(tmp_path / "model"))
    found = export_named(str(tmp_path / "model"), tmp_path / "out")
    assert found["cosine_least"] > 0.98 and found["bytes_after"] < 0.6 * found["bytes_before"]
    words, onnx = ((tmp_path / "out" / name).read_bytes() for name in ("tokenizer.json", ONNX_FILES["float32"]))
    tower = OnnxTower(words, onnx, 24)
    for text in ("open a zip", LONG):
        ours, theirs = tower.mean(text), model.encode(text)
        np.testing.assert_allclose(ours / np.linalg.norm(ours), theirs / np.linalg.norm(theirs), atol=1e-5)
    SentenceTransformer(
        modules=[*modules, Dense(32, 8, activation_function=nn.Identity())], device="cpu"
    ).save_pretrained(str(tmp_path / "narrow"))
    with pytest.raises(ReleaseError, match="only a BERT"):
        export_named(str(tmp_path / "narrow"), tmp_path / "refused")


def test_what_cannot_be_written_is_refused(saved: dict[str, str], tmp_path: Path) -> None:
    """Half a folder, or files over those of another model, would be measured as this one."""
    (tmp_path / "there").mkdir()
    with pytest.raises(ReleaseError, match="there exists"):
        export_named(saved["bi-encoder"], tmp_path / "there")
    with pytest.raises(ReleaseError, match="with 3 outputs"):
        export_named(saved["three"], tmp_path / "three")
    with pytest.raises(SettingsError, match="cannot be loaded"):
        export_named("no-such-model", tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
