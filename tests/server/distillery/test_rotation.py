"""A rotated space: whole vectors compare as before, first values hold most, and towers of it give the vectors it says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from tests.server.distillery.learners import DIM, WORDS, read, tower, unit
from torch import nn

from stillroom_server.distillery import rotation as module
from stillroom_server.distillery.rotation import Rotation, document_tower, rotate_array, rotated_model, rotated_tokens
from stillroom_server.distillery.students.export import export_student
from stillroom_server.distillery.students.make import make_student
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.distillery.teachers.bi_encoder import BiEncoder
from stillroom_server.distillery.teachers.late_interaction import token_model
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_shared.errors import DataError

TEXTS = [" ".join(WORDS[start : start + 4]) for start in range(12)]
NARROW = np.linspace(1, 0.1, DIM, dtype=np.float32)[::-1]
"""Lengths of vectors along their values, the last the longest."""


def narrow(rows: int = 200) -> NDArray[np.float32]:
    """Unit vectors that are long in their last values, with a mean that is not zero."""
    vectors = (unit(rows) + 0.1) * NARROW
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array takes several blocks, the last one shorter."""
    monkeypatch.setattr(module, "_BLOCK", 33)


def test_whole_vectors_compare_as_before_and_first_values_hold_most() -> None:
    """Guards against a map that changes rankings at full length, and against directions in rising order."""
    vectors = narrow()
    rotation = Rotation.of(vectors)
    np.testing.assert_allclose(rotation.directions.T @ rotation.directions, np.eye(DIM), atol=1e-12)
    rotated = rotation(vectors)
    np.testing.assert_allclose(rotated @ rotated.T, vectors @ vectors.T, atol=1e-5)
    held = np.square(rotated.astype(np.float64)).sum(0)  # of all texts along each value
    np.testing.assert_allclose(rotation.lengths, held, rtol=1e-4)
    assert (np.diff(rotation.lengths) < 0).all()
    for count in (1, 8, 31, DIM):
        assert rotation.share(count) == pytest.approx(held[:count].sum() / len(vectors), rel=1e-5)
    best = max(np.square(vectors[:, chosen : chosen + 8]).sum() / len(vectors) for chosen in range(DIM - 7))
    assert rotation.share(8) > best, "no eight values of the old space hold as much"
    assert list(rotation.shares([64, 8, 16, 8])) == ["8", "16"], "shares of all there is say nothing"


def test_the_mean_counts_because_scores_are_inner_products() -> None:
    """Guards against centring: the common direction of all vectors would be lost to the last values."""
    shifted = unit(300) / 4 + np.eye(DIM, dtype=np.float32)[5]
    assert abs(Rotation.of(shifted).directions[5, 0]) > 0.99


def test_equal_vectors_turn_equally_in_any_order_and_after_saving(tmp_path: Path) -> None:
    """Guards against signs that differ from run to run: yesterday's index would not fit today's student."""
    vectors = narrow()
    rotation, again = Rotation.of(vectors), Rotation.of(vectors[::-1])
    np.testing.assert_allclose(rotation.directions, again.directions, atol=1e-6)
    assert (rotation.directions[np.abs(rotation.directions).argmax(0), np.arange(DIM)] > 0).all()
    rotation.save(tmp_path / "rotation.npz")
    kept = Rotation.open(tmp_path / "rotation.npz")
    np.testing.assert_array_equal(kept.directions, rotation.directions)
    np.testing.assert_array_equal(kept.lengths, rotation.lengths)


def test_fewer_texts_than_values_still_give_a_rotation() -> None:
    """Guards against a map that drops what these few texts do not have, and a share above 1 or of nothing."""
    rotation = Rotation.of(narrow(5))
    np.testing.assert_allclose(rotation.directions.T @ rotation.directions, np.eye(DIM), atol=1e-12)
    assert rotation.share(5) == pytest.approx(1) and (rotation.lengths >= 0).all()
    with pytest.raises(DataError, match="there are no vectors"):
        Rotation.of(np.zeros((0, DIM), np.float16))


def ranking_lost(rotated: NDArray[np.float32], count: int) -> float:
    """KL of softmax over all other texts, of the first so many values from all of them, at temperature 0.05; the slow way."""
    cut = rotated[:, :count] / np.linalg.norm(rotated[:, :count], axis=1, keepdims=True)
    lost = []
    for row in range(len(rotated)):
        whole, short = (np.delete(own @ own[row], row) / 0.05 for own in (rotated, cut))
        p, q = (np.exp(one - one.max()) / np.exp(one - one.max()).sum() for one in (whole, short))
        lost.append(float((p * np.log(p / q)).sum()))
    return float(np.mean(lost))


def test_first_values_come_to_rank_as_all_do_without_moving_whole_vectors() -> None:
    """Guards against directions that hold much length and little order, and against a map that is no rotation."""
    # Eight values hold the most length in all texts; what a few texts share, and are near each other by, lies in the others.
    random = np.random.default_rng(4)
    rare = (random.random((900, DIM - 8)) < 0.08) * 2.0
    rare[(rare == 0).all(1), 0] = 2.0
    own = np.hstack([random.standard_normal((900, 8)) * 0.7, rare])
    vectors = (own / np.linalg.norm(own, axis=1, keepdims=True)).astype(np.float32)
    vectors[7] = np.nan
    plain, told = Rotation.of(vectors), list[tuple[int, int]]()
    ranked = plain.ranked(vectors, [8, 4, DIM], progress=lambda done, total: told.append((done, total)))
    np.testing.assert_allclose(ranked.directions.T @ ranked.directions, np.eye(DIM), atol=1e-12)
    there = np.delete(vectors, 7, axis=0)
    np.testing.assert_allclose(ranked(there) @ ranked(there).T, there @ there.T, atol=1e-5)
    for count in (4, 8):
        assert ranking_lost(ranked(there), count) < 0.7 * ranking_lost(plain(there), count)
    np.testing.assert_allclose(ranked.lengths, np.square(ranked(there).astype(np.float64)).sum(0), rtol=1e-4)
    for block in np.split(ranked.lengths, [4, 8]):
        assert (np.diff(block) <= 0).all()
    assert told[-1][0] == told[-1][1]
    again = plain.ranked(vectors, [4, 8])
    np.testing.assert_array_equal(again.directions, ranked.directions)
    assert plain.ranked(vectors, [DIM]) is plain and plain.ranked(vectors[:2], [8]) is plain


def test_only_texts_that_have_a_vector_are_drawn_to_be_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a sample of passages that nobody embedded, of which too few texts are left, without a word."""
    seen: list[NDArray[np.float32]] = []
    turned = module._ranking_directions

    def kept(start: NDArray[np.float64], texts: torch.Tensor, *rest: Any) -> NDArray[np.float64]:
        seen.append(texts.numpy())
        return turned(start, texts, *rest)

    monkeypatch.setattr(module, "_ranking_directions", kept)
    monkeypatch.setattr(module, "_RANKED", 40)
    vectors = narrow(400)
    plain = Rotation.of(vectors)
    plain.ranked(vectors, [8], seed=3)
    random = np.random.default_rng(3)
    drawn = np.sort(random.permutation(400)[:40])
    np.testing.assert_array_equal(seen[-1], random.permutation(vectors[drawn]), "all have one: the plain draw")
    few = np.where(np.arange(400)[:, None] % 4 == 0, vectors, np.nan)
    plain.ranked(few, [8])
    assert seen[-1].shape == (40, DIM) and np.isfinite(seen[-1]).all()
    assert {row.tobytes() for row in seen[-1]} <= {row.tobytes() for row in vectors[::4]}
    assert plain.ranked(few[: 4 * DIM - 4], [8]) is plain, "one text less than values"
    assert plain.ranked(few[: 4 * DIM], [8]) is not plain


def test_an_array_is_rotated_block_by_block_as_a_whole(tmp_path: Path) -> None:
    """Guards against a block that is left out or written twice."""
    vectors, told = narrow().astype(np.float16), list[tuple[int, int]]()
    rotation = Rotation.of(vectors)
    made = rotate_array(rotation, vectors, tmp_path / "rotated.npy", lambda done, total: told.append((done, total)))
    assert made.dtype == np.float16 and told[-1] == (200, 200)
    np.testing.assert_allclose(made, rotation(vectors), atol=3e-4)  # float16


def bare(folder: Path, *more: nn.Module) -> SentenceTransformer:
    """A bi-encoder that ends as it is told to."""
    return SentenceTransformer(modules=[read(folder), Pooling(DIM, "mean"), *more], device="cpu")


def dense(size: int, activation: nn.Module) -> Dense:
    torch.manual_seed(3)
    return Dense(DIM, size, bias=True, activation_function=activation)


@pytest.mark.parametrize(("ends", "maps"), [("unit", 1), ("as it is", 1), ("with a map", 1), ("with a bent map", 2)])
def test_a_rotated_model_gives_the_vectors_in_the_rotated_space(
    tmp_path: Path, folder: Path, ends: str, maps: int
) -> None:
    """Guards against a document tower whose vectors are not those that the student learned beside, saved ones too."""
    model = {
        "unit": lambda: tower(folder),
        "as it is": lambda: bare(folder),
        "with a map": lambda: bare(folder, dense(24, nn.Identity()), Normalize()),
        "with a bent map": lambda: bare(folder, dense(24, nn.Tanh()), Normalize()),
    }[ends]()
    teacher = BiEncoder(model, TeacherSettings())
    vectors, before = teacher.embed(TEXTS, "passage"), copy.deepcopy(model.state_dict())
    rotation = Rotation.of(vectors)
    turned = rotated_model(model, rotation)
    assert sum(isinstance(one, Dense) for one in turned) == maps
    turned.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for one in (turned, loaded):
        np.testing.assert_allclose(one.encode_document(TEXTS), rotation(vectors), atol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_document_tower_reads_as_the_recipe_told_the_teacher_to(folder: Path) -> None:
    """Guards against a prompt or limit that is left behind in the recipe."""
    settings = TeacherSettings(passage_tokens=6, passage_prompt="file: ", query_prompt="search: ")
    model = tower(folder)
    teacher = BiEncoder(model, settings)
    vectors = teacher.embed(TEXTS, "passage")
    rotation = Rotation.of(vectors)
    documents = document_tower(model, settings, rotation)
    np.testing.assert_allclose(documents.encode_document(TEXTS), rotation(vectors), atol=1e-5)
    plain = rotated_model(model, rotation).encode_document(TEXTS)
    assert np.abs(plain - rotation(vectors)).max() > 0.01, "the guard: prompt and limit matter"
    assert "file: " not in model.prompts.values()


@pytest.mark.parametrize("kind", ["tower", "static", "shorter"])
def test_a_student_begins_in_the_rotated_space_and_its_file_computes_it(
    tmp_path: Path, folder: Path, kind: str
) -> None:
    """Guards against a student that must find the rotation by itself, and a file in which it is missing."""
    teacher = tower(folder)
    rotation = Rotation.of(teacher.encode(TEXTS))
    settings = {
        "tower": StudentSettings(layers=(0, 1), tokens=24),
        "shorter": StudentSettings(layers=(1,), tokens=24, vocabulary=None),
        "static": StudentSettings(kind="static", tokens=24),
    }[kind]
    student = make_student(settings, rotated_model(teacher, rotation))
    assert isinstance(student, SentenceTransformer)
    if kind != "static":
        assert all(x.requires_grad for x in student[2].parameters()), "the last map learns"
        unturned = make_student(settings, teacher)
        assert isinstance(unturned, SentenceTransformer)
        np.testing.assert_allclose(student.encode(TEXTS), rotation(unturned.encode(TEXTS)), atol=1e-5)
        assert bert_of(student).config.hidden_size == DIM
    export_student(student, tmp_path / "student.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    for text in TEXTS[:3]:
        ids = student.tokenizer.encode(text)
        ids = np.array([ids if isinstance(ids, list) else ids.ids], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        names = {one.name for one in session.get_inputs()}
        states = session.run(None, {name: value for name, value in feed.items() if name in names})[0]
        pooled = states.mean(axis=1)
        np.testing.assert_allclose(pooled / np.linalg.norm(pooled), student.encode([text]), atol=1e-5)


def test_token_vectors_turn_with_the_space(folder: Path) -> None:
    """Guards against a student that learns vectors of a rotated space and token vectors of the space as it was."""
    model, rotation = bare(folder), Rotation.of(narrow())
    before, after = token_model(model), rotated_tokens(token_model(model), rotation)
    for old, new in zip(before.encode(TEXTS), after.encode(TEXTS), strict=True):
        np.testing.assert_allclose(new.numpy(), rotation(old.numpy()), atol=1e-5)
    means = [one.numpy().mean(0) for one in before.encode_query(TEXTS)], model.encode(TEXTS)
    turned = [one.numpy().mean(0) for one in after.encode_query(TEXTS)], rotated_model(model, rotation).encode(TEXTS)
    lying, lie = (np.einsum("nd,nd->n", np.array(tokens), vectors) for tokens, vectors in (means, turned))
    lengths = np.linalg.norm(means[1], axis=1)  # the rotated tower normalises
    np.testing.assert_allclose(lie, lying / lengths, atol=1e-5)
    assert rotated_tokens(before, Rotation.of(unit(20, 8))) is before, "a projection is learned where lengths differ"
