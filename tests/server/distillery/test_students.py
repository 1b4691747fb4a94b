"""Students of every kind: begun as said, equal for a seed, and the same after saving, loading and exporting."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from stillroom_server.distillery.students.export import export_student, folded
from stillroom_server.distillery.students.make import make_student
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.students.size import size_of
from stillroom_server.distillery.students.static import make_static, token_shares, token_vectors
from stillroom_server.distillery.students.towers import Model, bert_of, first_of, freeze, leading_directions
from stillroom_server.export import quantize
from stillroom_shared.errors import ReleaseError, SettingsError
from stillroom_shared.release import Release

TEXTS = ["what do tapirs eat", "open a zip file and list its members", "river", "sort the array"]
PAIRS = [(query, passage) for query in TEXTS[:2] for passage in ("A tapir eats leaves.", "tapir tapir list.")]
SCRATCH: dict[str, Any] = {"init": "scratch", "depth": 1, "width": 16, "heads": 2, "feed_forward": 24}
KINDS: dict[str, dict[str, Any]] = {
    "layers": {"layers": (1,)},
    "scratch": SCRATCH,
    "as wide": {**SCRATCH, "width": 32},
    "random": {**SCRATCH, "embeddings": "random", "freeze_embeddings": False},
    "short vectors": {"layers": (0, 1), "dimension": 12},
    "static": {"kind": "static"},
    "static of rank 8": {"kind": "static", "rank": 8},
    "late": {"kind": "late-interaction", "layers": (0,), "token_dimension": 8, "passage_tokens": 40},
    "reranker": {"kind": "reranker", "layers": (0,), "tokens": 24},
    "reranker from scratch": {"kind": "reranker", **SCRATCH, "tokens": 24},
}


@pytest.fixture(scope="module")
def teacher(tiny_release: Release) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_release.folder / "document"), device="cpu")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> CrossEncoder:
    config = BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    config.num_labels = 1
    torch.manual_seed(2)
    folder = str(tmp_path_factory.mktemp("scorer"))
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    model: CrossEncoder = CrossEncoder(folder, device="cpu", local_files_only=True)
    return model


@pytest.fixture(scope="module")
def made(teacher: SentenceTransformer, scorer: CrossEncoder) -> dict[str, Model]:
    return {
        name: make_student(StudentSettings(**fields), scorer if "reranker" in name else teacher)
        for name, fields in KINDS.items()
    }


def said(student: Model, texts: list[str] = TEXTS) -> NDArray[np.float32]:
    """Everything that a student says of some texts, in one row each or one after the other."""
    if isinstance(student, CrossEncoder):
        return np.asarray(student.predict(PAIRS, show_progress_bar=False))
    if isinstance(student, MultiVectorEncoder):
        return np.concatenate(list(student.encode_query(texts, convert_to_numpy=True)))
    assert isinstance(student, SentenceTransformer)
    return np.asarray(student.encode(texts, show_progress_bar=False))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_saves_and_loads(made: dict[str, Model], name: str, tmp_path: Path) -> None:
    """Guards against a projection, a frozen table, a text limit or dropout that is there until the student is saved."""
    student = made[name]
    assert np.ptp(said(student), axis=0).max() > 1e-3, "the guard: texts differ"
    student.save_pretrained(str(tmp_path))
    loaded = type(student)(str(tmp_path), device="cpu")
    np.testing.assert_allclose(said(loaded), said(student), atol=2e-6)
    for model in (student, loaded):
        training = copy.deepcopy(model).train()
        features = training.preprocess(PAIRS if isinstance(training, CrossEncoder) else TEXTS)
        one, two = training(dict(features)), training(dict(features))
        key = next(key for key in ("sentence_embedding", "token_embeddings", "scores") if key in one)
        assert torch.equal(one[key], two[key]), "dropout is on"
    assert loaded.max_seq_length == student.max_seq_length


@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_nothing(made: dict[str, Model], name: str) -> None:
    """Guards against a mask that is lost: a query's vector would depend on the longest one beside it."""
    student = made[name]
    if isinstance(student, CrossEncoder):
        alone = np.concatenate([np.asarray(student.predict([pair], show_progress_bar=False)) for pair in PAIRS])
    else:
        alone = np.concatenate([said(student, [text]) for text in TEXTS])
    np.testing.assert_allclose(said(student), alone, atol=2e-6)


def test_students_are_equal_for_a_seed_and_the_teacher_stays(
    teacher: SentenceTransformer, scorer: CrossEncoder
) -> None:
    """Guards against global randomness, and a teacher that is pruned in place."""
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for name in ("random", "short vectors", "static of rank 8", "late", "reranker from scratch"):
        settings = StudentSettings(**KINDS[name])
        one, two, other = (
            make_student(own, scorer if "reranker" in name else teacher)
            for own in (settings, settings, settings.model_copy(update={"seed": 1}))
        )
        torch.randn(3)  # moves the global generator
        for key, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[key]), (name, key)
        if "static" not in name:
            assert any(not torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items()), name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert bert_of(teacher).config.num_hidden_layers == 2 and teacher.max_seq_length == 48


def test_layers_and_limits_are_those_of_the_settings(made: dict[str, Model], teacher: SentenceTransformer) -> None:
    """Guards against the wrong layer, a limit in name only, and a student that reads the teacher's 48 tokens."""
    tower = bert_of(made["layers"])
    ours, theirs = tower.encoder.layer[0].state_dict(), bert_of(teacher).encoder.layer[1].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    long = " ".join(["tapir"] * 29)
    for name in ("layers", "scratch", "static", "static of rank 8"):
        cut = said(made[name], [long + " tapir", long + " tapir river river"])
        assert np.abs(cut[0] - cut[1]).max() < 1e-6, name
        assert np.abs(np.diff(said(made[name], [long, long + " river"]), axis=0)).max() > 1e-6, name
    late = made["late"]
    assert isinstance(late, MultiVectorEncoder)
    assert late.encode_query(long * 9, convert_to_numpy=True).shape == (32, 8)
    assert late.encode_document(long * 9, convert_to_numpy=True).shape == (40, 8)


def test_what_is_frozen_does_not_learn(made: dict[str, Model], teacher: SentenceTransformer) -> None:
    """Guards against training all embeddings, most of the parameters, for a query tower that should leave them alone."""
    settings = StudentSettings(layers=(0, 1), freeze_layers=(0,))
    student = make_student(settings, teacher)
    learning = {name for name, parameter in bert_of(student).named_parameters() if parameter.requires_grad}
    assert learning and all(name.startswith(("encoder.layer.1", "pooler")) for name in learning)
    assert all(p.requires_grad for p in bert_of(made["random"]).parameters())
    again = freeze(bert_of(student), embeddings=True)
    assert all(p.requires_grad for p in again.encoder.layer[0].parameters()), "said anew, not added"
    assert all(p.requires_grad for name in ("static", "static of rank 8") for p in made[name].parameters()), (
        "or nothing would"
    )


def test_narrow_embeddings_keep_what_they_can_of_the_teachers(
    teacher: SentenceTransformer, made: dict[str, Model]
) -> None:
    """Guards against a transposed or random basis: inner products of tokens must be those of the best table of that rank."""
    table = bert_of(teacher).embeddings.word_embeddings.weight.detach().double()
    values = torch.linalg.svdvals(table)
    narrow = bert_of(made["scratch"]).embeddings.word_embeddings.weight.detach().double()
    basis = leading_directions(table, 16)
    torch.testing.assert_close(narrow, table @ basis, atol=1e-5, rtol=0)
    lost = (table - narrow @ basis.T).norm()
    torch.testing.assert_close(lost, values[16:].norm(), atol=1e-4, rtol=0)
    wide = bert_of(made["as wide"]).embeddings.state_dict()
    assert all(torch.equal(value, wide[name]) for name, value in bert_of(teacher).embeddings.state_dict().items())


def test_static_students_are_the_weighted_mean_of_the_teachers_token_vectors(teacher: SentenceTransformer) -> None:
    """Guards against rows of the wrong token, weights that grow with frequency, and special tokens that count."""
    vectors = token_vectors(teacher)
    tokenizer = teacher.tokenizer
    word = tokenizer.convert_tokens_to_ids("tapir")
    np.testing.assert_allclose(vectors[word], teacher.encode("tapir"), atol=1e-6)
    ordinary = torch.ones(len(vectors), dtype=torch.bool)
    ordinary[tokenizer.all_special_ids] = False
    texts = ["tapir river", "tapir bank", "tapir"]
    student = make_static(StudentSettings(kind="static"), teacher, texts)
    shares = token_shares(student.tokenizer, ordinary, texts)
    assert shares[word] == pytest.approx(3 / 5) and shares.sum() == pytest.approx(1)
    weights = 1e-3 / (1e-3 + shares)
    river = tokenizer.convert_tokens_to_ids("river")
    assert weights[word] < weights[river] < weights[tokenizer.convert_tokens_to_ids("zip")] == 1
    centre = vectors[ordinary].mean(0)
    expected = (weights[word] * (vectors[word] - centre) + weights[river] * (vectors[river] - centre)).numpy()
    got = student.encode("river tapir")
    np.testing.assert_allclose(got, expected / np.linalg.norm(expected), atol=1e-5)
    zipf = token_shares(student.tokenizer, ordinary)
    assert bool((zipf[ordinary].diff() < 0).all()), "later tokens are rarer"


@pytest.mark.parametrize("name", ["scratch", "static of rank 8"])
def test_exported_students_give_the_same_vectors_where_a_device_pools(
    made: dict[str, Model], name: str, tmp_path: Path
) -> None:
    """Guards against a projection that is left out of the file, and inputs that a device feeds and the file lacks."""
    student = made[name]
    assert isinstance(student, SentenceTransformer)
    export_student(student, tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", blockwise=False)
    for file, atol in (("model.onnx", 2e-6), ("int8.onnx", 0.06)):
        session = onnxruntime.InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"])
        rows = []
        for text in TEXTS:
            tokenizer = student.tokenizer
            ids = np.array([tokenizer.encode(text) if "static" not in name else tokenizer.encode(text).ids], np.int64)
            feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            mean = session.run(["last_hidden_state"], feed)[0][0].mean(0)
            rows.append(mean / np.linalg.norm(mean))
        np.testing.assert_allclose(np.stack(rows), said(student), atol=atol)


def test_what_cannot_be_folded_is_refused(made: dict[str, Model], teacher: SentenceTransformer) -> None:
    """Guards against an export that drops an activation without a word."""
    bent = make_student(StudentSettings(**SCRATCH), teacher)
    assert isinstance(bent, SentenceTransformer)
    bent[2].activation_function = torch.nn.Tanh()
    with pytest.raises(ReleaseError, match="Dense"):
        folded(bent)
    pooling: Any = bent[1]
    pooling.pooling_mode = "cls"
    with pytest.raises(ReleaseError, match="pools by cls"):
        folded(bent)


def test_late_interaction_narrows_a_projection_that_was_learned(teacher: SentenceTransformer) -> None:
    """Guards against throwing away a late-interaction teacher's projection for a random one."""
    wide = make_student(
        StudentSettings(kind="late-interaction", layers=(0, 1), token_dimension=12, passage_tokens=40), teacher
    )
    assert isinstance(wide, MultiVectorEncoder)
    with torch.no_grad():  # as if learned: of rank 4
        wide.get_parameter("1.linear.weight")[4:] = 0
    narrow = make_student(
        StudentSettings(kind="late-interaction", layers=(0, 1), token_dimension=4, passage_tokens=40), wide
    )
    assert isinstance(narrow, MultiVectorEncoder) and sum(isinstance(module, Dense) for module in narrow) == 1
    scores = [model.similarity(model.encode_query(TEXTS), model.encode_document(TEXTS)) for model in (wide, narrow)]
    torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=0)


def test_a_reranker_keeps_its_teachers_head_or_begins_on_a_bi_encoder(
    made: dict[str, Model], scorer: CrossEncoder, teacher: SentenceTransformer
) -> None:
    """Guards against a head that is made anew when it was there, and dropout that is left on before it."""
    kept = first_of(made["reranker"]).auto_model
    assert isinstance(kept, BertForSequenceClassification)
    assert torch.equal(kept.classifier.weight, first_of(scorer).auto_model.classifier.weight)
    assert kept.config.num_hidden_layers == 1 and first_of(scorer).auto_model.config.num_hidden_layers == 2
    fresh = make_student(StudentSettings(kind="reranker", layers=(1,), tokens=20), teacher)
    assert isinstance(fresh, CrossEncoder) and fresh.max_seq_length == 20
    ours = bert_of(fresh).encoder.layer[0].state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in bert_of(teacher).encoder.layer[1].state_dict().items())
    assert not bert_of(fresh).embeddings.word_embeddings.weight.requires_grad


def test_sizes_are_counted_part_by_part(made: dict[str, Model]) -> None:
    """Guards against parameters counted twice or not at all, and operations that do not grow with the text."""
    for name, student in made.items():
        size = size_of(student)
        assert size.parameters == sum(p.numel() for p in student.parameters()), name
        assert size.float32_bytes == 4 * size.parameters > size.int8_bytes, name
        assert size_of(student, 20).operations > size_of(student, 10).operations, name
    tower = size_of(made["layers"], 10)
    # Four products of 32 x 32 and two of 32 x 64 for each token, and two products of its weights with all tokens.
    assert tower.operations == 10 * 2 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 2 * 10 * 10 * 32
    assert first_of(made["static"]).get_embedding_dimension() == 32 and size_of(made["static"], 10).operations == 320
    assert '"parameters": ' in tower.to_json()


def test_settings_and_teachers_that_do_not_fit_are_refused(teacher: SentenceTransformer, scorer: CrossEncoder) -> None:
    """Guards against a student that begins as something else than was asked for."""
    for fields, message in (
        ({"layers": (1, 0)}, "ascending"),
        ({**SCRATCH, "heads": 3}, "not a multiple"),
        ({**SCRATCH, "embeddings": "random"}, "must learn"),
        ({"layers": (0,), "freeze_layers": (1,)}, "layers 0 to 0"),
    ):
        with pytest.raises(ValidationError, match=message):
            StudentSettings(**fields)
    for fields, source, message in (
        ({"layers": (0, 2)}, teacher, "from 0 to 1"),
        ({**SCRATCH, "width": 64}, teacher, "width 64 is above"),
        ({"layers": (0,), "tokens": 65}, teacher, "knows 64 positions"),
        (
            {"kind": "late-interaction", "layers": (0,), "tokens": 9, "passage_tokens": 65, "token_dimension": 8},
            teacher,
            "passage_tokens 65: the teacher knows 64",
        ),
        ({"layers": (0,)}, scorer, "begins from a bi-encoder"),
        ({"kind": "static"}, scorer, "begins from a bi-encoder"),
        ({"kind": "static", "dimension": 33}, teacher, "dimension 33 is above"),
        ({"kind": "late-interaction", "layers": (0,)}, teacher, "token_dimension 64 is above"),
        ({"kind": "late-interaction", "layers": (0,)}, scorer, "begins from a bi-encoder"),
    ):
        with pytest.raises(SettingsError, match=message):
            make_student(StudentSettings(**fields), source)
