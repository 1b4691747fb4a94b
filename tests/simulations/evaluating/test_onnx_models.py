"""`MODEL@float32` and `MODEL@int8`: the files that are shipped, ranked and weighed like the models that they were made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from tests.simulations import shelves
from tests.simulations.shelves import check, evaluate, slow_first
from transformers import BertModel, PreTrainedTokenizerFast

from stillroom_server.distillery.compress.quantize import CompressSettings
from stillroom_server.distillery.exporting import export_model
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.export import export
from stillroom_shared.errors import SettingsError
from stillroom_shared.release import ONNX_FILES, Precision
from stillroom_simulations.evaluating.onnx_models import open_onnx
from stillroom_simulations.evaluating.sentence_models import load_model, sentence_tower
from stillroom_simulations.evaluating.towers import Role

TEXTS = [*shelves.full_texts().values(), "given " * 70]


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, bi: Path, cross: Path, tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Path]:  # fmt: skip
    """Folders as `stillroom distill run` leaves them: one of each kind, and one whose Dense is folded into its file."""
    root = tmp_path_factory.mktemp("exported")
    late = shelves.multi_vector(root / "maxsim", tiny_towers[1], tiny_tokenizer)
    tower = load_model(str(bi)).model
    torch.manual_seed(2)
    dense = Dense(32, 24, activation_function=torch.nn.Identity())
    mapped = SentenceTransformer(modules=[tower[0], Pooling(32, "mean"), dense, Normalize()], device="cpu")
    models: dict[str, Any] = {
        "tower": tower,
        "mapped": mapped,
        "table": load_model(str(shelves.static_table(root / "static", tiny_tokenizer))).model,
        "late": load_model(str(late)).model,
        "cross": load_model(str(cross)).model,
    }
    for name, model in models.items():
        export_model(model, root / name, CompressSettings(), TEXTS)
    return {name: root / name for name in models}


def embedded(folder: Path, precision: Precision | None, role: Role) -> np.ndarray:
    loaded = load_model(str(folder))
    if precision is None:
        return sentence_tower(loaded, role).embed(TEXTS)
    return open_onnx(str(folder), loaded, precision).tower(role, threads=2).embed(TEXTS)


@pytest.mark.parametrize("name", ["tower", "mapped", "table"])
def test_vectors_of_a_file_are_those_of_its_model(written: dict[str, Path], name: str) -> None:
    """Another cut, a lost map or special tokens in a table move every vector a little: a table of figures hides it."""
    truth, float32, int8 = (embedded(written[name], one, "passage") for one in (None, "float32", "int8"))
    np.testing.assert_allclose(float32, truth, atol=2e-5)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (truth, int8)]
    assert (unit[0] * unit[1]).sum(axis=1).min() > 0.98, "int8 is close"
    assert np.abs(int8 - truth).max() > 1e-4, "the guard: and it is another file"


@pytest.mark.parametrize("name", ["tower", "table"])
def test_vectors_that_a_model_cuts_are_cut(written: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A model that was saved with short vectors, measured with long ones, is another model."""
    folder = tmp_path / "cut"
    shutil.copytree(written[name], folder)
    said = folder / "config_sentence_transformers.json"
    said.write_text(json.dumps({**json.loads(said.read_text()), "truncate_dim": 8}))
    truth, found = (embedded(folder, one, "passage") for one in (None, "float32"))
    assert truth.shape[1] == 8
    np.testing.assert_allclose(found, truth, atol=2e-5)


def test_rankings_equal_those_of_torch(data: Path, written: dict[str, Path]) -> None:
    """A file that is named and torch that is measured would agree in everything but speed and bytes."""
    folders = [written[name] for name in ("tower", "table", "late", "cross")]
    found = evaluate([f"{folder}{at}" for folder in folders for at in ("", "@float32", "@int8")], data)
    for folder in folders:
        own, float32, int8 = (found.sets[0].of(f"{folder.name}{at}") for at in ("", "@float32", "@int8"))
        np.testing.assert_array_equal(float32.scores.table, own.scores.table)
        assert float32.how == own.how.replace("torch float32", "ONNX float32") and "ONNX int8" in int8.how
        for one, precision in ((float32, "float32"), (int8, "int8")):
            assert one.bytes.query_model == (folder / ONNX_FILES[precision]).stat().st_size  # type: ignore[index]


def test_pairs_and_short_vectors(data: Path, written: dict[str, Path], bi: Path) -> None:
    """The precision of one side taken for both, or a suffix that is read and forgotten."""
    tower = str(written["tower"])
    found = evaluate([f"{tower}@int8::{bi}", f"{bi}@8::{tower}@float32@8", f"{tower}@int8@8"], data, threads=2)
    model: Any = load_model(tower).model
    small = open_onnx(tower, load_model(tower), "int8").tower("query", threads=1).embed
    check(found, "tower@int8::model", shelves.dense(lambda text: small([text]), model.encode))
    check(
        found,
        "model@8::tower@float32@8",
        shelves.dense(*[lambda text: model.encode(text)[:8] for _ in range(2)]),
    )
    check(found, "tower@int8@8", shelves.dense(*[lambda text: small([text])[0, :8] for _ in range(2)]))
    assert "queries ONNX int8, passages torch float32" in found.sets[0].of("tower@int8::model").how


def test_a_reranker_reads_what_its_file_says(data: Path, written: dict[str, Path], tmp_path: Path) -> None:
    """Pairs cut elsewhere than on a device are another reranker's scores; nor may other texts be read."""
    folder = tmp_path / "short"
    shutil.copytree(written["cross"], folder)
    (folder / "reranker.json").write_text('{"schema_version": 1, "tokens": 10}')
    found = evaluate([f"{written['cross']}@float32", f"{folder}@float32"], data, rerank=3, first_share=0, threads=2)
    base, texts = slow_first(data, None), shelves.full_texts()
    for name, tokens in (("cross", None), ("short", 10)):
        model: Any = load_model(str(written["cross"])).model
        model.max_seq_length = tokens or model.max_seq_length

        def slow(text: str, model: Any = model) -> list[str]:
            order = base(text)
            return [
                *shelves.ranked({key: float(model.predict([(text, texts[key])])[0]) for key in order[:3]}),
                *order[3:],
            ]

        check(found, f"{name}@float32", slow)
    tables = [found.sets[0].of(f"{name}@float32").scores.table for name in ("cross", "short")]
    assert (tables[0] != tables[1]).any(), "the guard: the cut matters"


@pytest.mark.parametrize(
    "change",
    [{"pooling_mode": "cls"}, {"prompts": {"query": "search ", "document": "a passage "}}],
    ids=["cls", "prompts"],
)
def test_what_a_device_could_not_run_is_pooled_by_the_models_own_modules(
    written: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    """The mean of a model that was made for [CLS], or a text without its prompt, gives figures of a model nobody has."""
    folder = tmp_path / "other"
    shutil.copytree(written["tower"], folder)
    [key] = change
    [path] = [one for one in folder.rglob("config*.json") if f'"{key}"' in one.read_text()]
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for role in ("query", "passage"):
        truth, found = (embedded(folder, one, role) for one in (None, "float32"))
        np.testing.assert_allclose(found, truth, atol=2e-5)
        assert np.abs(truth - embedded(written["tower"], None, role)).max() > 0.1, "the guard: it is another model"


def test_a_dense_that_the_file_lacks_is_applied(written: dict[str, Path], tmp_path: Path) -> None:
    """Files of other writers end at the transformer; without the map their vectors are of another space."""
    folder = tmp_path / "unmapped"
    shutil.copytree(written["mapped"], folder)
    export(bert_of(SentenceTransformer(str(written["mapped"]), device="cpu")), folder / ONNX_FILES["float32"])
    np.testing.assert_allclose(embedded(folder, "float32", "query"), embedded(folder, None, "query"), atol=2e-5)


def test_files_that_are_not_there_or_of_another_kind_are_refused(
    data: Path, bi: Path, written: dict[str, Path], tmp_path: Path
) -> None:
    """Torch in place of a file that is missing would be reported under the file's name."""
    swapped = tmp_path / "swapped"
    shutil.copytree(written["tower"], swapped)
    shutil.copy(written["cross"] / ONNX_FILES["float32"], swapped / ONNX_FILES["float32"])
    refused: list[tuple[str, str]] = [
        (f"{bi}@int8", r"has no onnx/model_qint8_avx512_vnni\.onnx: write one with `stillroom distill export"),
        (f"{bi}@float32::{bi}", r"has no onnx/model\.onnx"),
        (f"{swapped}@float32", "gives logits, not last_hidden_state"),
        (f"{written['late']}@int8@8", "has no single vector to cut"),
        (f"{written['cross']}@int8::{bi}", "is a CrossEncoder: a pair is of two bi-encoders"),
    ]
    for model, said in refused:
        with pytest.raises(SettingsError, match=said):
            evaluate([model], data)


def test_what_is_kept_knows_its_file(written: dict[str, Path]) -> None:
    """Vectors of float32 that are read back for int8 are a quantization without loss."""
    loaded = load_model(str(written["tower"]))
    files = [open_onnx(str(written["tower"]), loaded, precision) for precision in ("float32", "int8")]
    towers = [one.tower(role, threads=1).identity for one in files for role in ("query", "passage")]
    assert len({*towers, loaded.identity}) == 5


def test_they_are_timed_like_others(data: Path, written: dict[str, Path]) -> None:
    """A file that is only ranked with would leave the question open that it is shipped for."""
    models: list[Callable[..., Any] | str] = [f"{written[name]}@int8" for name in ("tower", "table", "late", "cross")]
    found = evaluate(models, data, timed=2)
    for one in found.sets[0].models:
        assert one.latency is not None and len(one.latency.encode) == 2 and (one.latency.total > 0).all()


def test_tokens_that_nobody_looks_at_are_refused(written: dict[str, Path]) -> None:
    """Queries of most ColBERT models are filled up with tokens outside the mask: a file would give zeros for them."""
    loaded = load_model(str(written["late"]))
    model: Any = loaded.model
    model[0].query_expansion = {"strategy": "fixed", "attend": False, "length": 16}
    with pytest.raises(SettingsError, match="expands queries"):
        open_onnx(str(written["late"]), loaded, "float32").late()
    model[0].query_expansion = {"strategy": "fixed", "attend": True, "length": 16}
    through: Any = open_onnx(str(written["late"]), loaded, "float32").late().model
    truth, found = (np.asarray(one.encode_query(["what do tapirs eat"])[0]) for one in (model, through))
    np.testing.assert_allclose(found, truth, atol=2e-5)
