"""A student as its successor's teacher: the bank holds what it says, in its own words, and what it never read stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tests.server.distillery.learners import DIM, late, lessons, read, reranker, tower, unit
from torch import nn

from stillroom_server.distillery.lessons import ROLES, Lessons
from stillroom_server.distillery.losses.needs import scales
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.losses.signals import Signals
from stillroom_server.distillery.succession import succeeded
from stillroom_server.distillery.teachers.bi_encoder import BiEncoder
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.fitting import Given, fitted, shape_of
from stillroom_server.distillery.training.settings import TrainingSettings


@pytest.fixture
def taught(tmp_path: Path) -> Bank:
    """Lessons with vectors and scores that no model gave."""
    texts = lessons(tmp_path / "lessons")
    scores = np.random.default_rng(3).standard_normal((texts.lists, texts.candidates)).astype(np.float32)
    return Bank(texts, unit(len(texts)).astype(np.float16), scores)


def given(bank: Bank) -> Given:
    return Given(dimension=bank.dimension, scores=True, candidates=bank.lessons.candidates, layers=None, tokens=None)


def of(bank: Bank, role: str) -> np.ndarray:
    assert bank.vectors is not None
    return np.asarray(bank.vectors[bank.lessons.rows(role)], np.float32)  # type: ignore[arg-type]


def test_a_towers_queries_are_its_own_and_passages_keep_their_constants(
    folder: Path, taught: Bank, tmp_path: Path
) -> None:
    """Guards against a teacher that is asked for the wrong role or row, and scores that still are the first teacher's."""
    student = tower(folder)
    bank = succeeded(student, taught, tmp_path / "made")
    expected = student.encode(taught.lessons.texts(taught.lessons.rows("query")))
    np.testing.assert_allclose(of(bank, "query"), expected, atol=1e-3)  # float16
    np.testing.assert_array_equal(of(bank, "passage"), of(taught, "passage"))
    assert bank.scores is not None and bank.vectors is not None
    asked = np.asarray(bank.vectors[taught.lessons.queries], np.float32)
    listed = np.asarray(bank.vectors[taught.lessons.passages], np.float32)
    np.testing.assert_allclose(bank.scores, np.einsum("qd,qkd->qk", asked, listed), atol=1e-5)
    scaled = succeeded(student, taught, tmp_path / "made", scale=20)
    assert scaled.scores is not None
    np.testing.assert_allclose(np.array(scaled.scores), 20 * np.array(bank.scores), rtol=1e-6)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"said", "scores.npy", "vectors.npy"}


def test_a_successor_that_is_its_teacher_has_nothing_to_learn(folder: Path, taught: Bank, tmp_path: Path) -> None:
    """Guards against scores on another scale than losses compare them at: cosines, where twenty times as much was learned."""
    losses = LossesSettings.model_validate(
        {"cosine": {"weight": 1}} | {name: {"weight": 1, "student_scale": 20} for name in ("margin_mse", "listwise_kl")}
    )
    student = tower(folder)
    [scale] = scales(losses)
    bank = succeeded(student, taught, tmp_path / "made", scale=scale)
    assert bank.scores is not None and bank.vectors is not None
    lessons = taught.lessons
    asked, listed = (
        torch.from_numpy(np.asarray(bank.vectors[rows], np.float32)) for rows in (lessons.queries, lessons.passages)
    )
    own = torch.nn.functional.normalize(torch.from_numpy(student.encode(lessons.texts(lessons.queries))), dim=1)
    signals = Signals(
        student_queries=own, teacher_queries=asked, student_passages=listed, teacher_passages=listed,
        student_scores=torch.einsum("bd,bkd->bk", own, listed), teacher_scores=torch.from_numpy(np.array(bank.scores)),
    )  # fmt: skip
    composition, _ = fitted(losses, TrainingSettings(), shape_of(student), given(bank), seed=0)
    _, parts = composition(signals, 0.0)
    assert max(float(value) for value in parts.values()) < 1e-3, parts


def test_the_same_student_is_asked_once(
    folder: Path, taught: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a resumed run that embeds everything again."""
    student = tower(folder)
    bank = succeeded(student, taught, tmp_path / "made")
    monkeypatch.setattr(BiEncoder, "embed", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(BiEncoder, "dimension", DIM)
    again = succeeded(student, taught, tmp_path / "made")
    np.testing.assert_array_equal(again.vectors, bank.vectors)


def test_where_both_towers_learn_passages_are_the_students_too(folder: Path, taught: Bank, tmp_path: Path) -> None:
    """Guards against a successor that is held to passages of another space than the student's queries."""
    student = tower(folder)
    bank = succeeded(student, taught, tmp_path / "made", roles=ROLES)
    expected = student.encode(taught.lessons.texts(taught.lessons.rows("passage")))
    np.testing.assert_allclose(of(bank, "passage"), expected, atol=1e-3)
    unscored = succeeded(student, Bank(taught.lessons, taught.vectors), tmp_path / "other", roles=ROLES)
    assert unscored.scores is None


def test_a_shorter_student_has_no_passages_beside_it(folder: Path, taught: Bank, tmp_path: Path) -> None:
    """Guards against products of vectors that lie in two spaces."""
    modules: list[nn.Module] = [read(folder), Pooling(DIM, "mean"), Dense(DIM, 8, activation_function=nn.Identity())]
    short = SentenceTransformer(modules=[*modules, Normalize()], device="cpu")
    bank = succeeded(short, Bank(taught.lessons, taught.vectors), tmp_path / "made")
    assert bank.dimension == 8 and np.isfinite(of(bank, "query")).all() and np.isnan(of(bank, "passage")).all()


@pytest.mark.parametrize("make", [reranker, late])
def test_who_reads_pairs_or_tokens_scores_the_lists(
    folder: Path, taught: Bank, tmp_path: Path, make: Callable[[Path], CrossEncoder | MultiVectorEncoder]
) -> None:
    """Guards against scores in another order than the lists', or of activations in place of logits."""
    student: Any = make(folder)
    bank = succeeded(student, taught, tmp_path / "made")
    assert bank.scores is not None and bank.vectors is taught.vectors
    lessons: Lessons = taught.lessons
    for number in (0, 7, 19):
        [query] = lessons.texts(lessons.queries[[number]])
        own = lessons.texts(lessons.passages[number])
        if isinstance(student, CrossEncoder):
            expected = student.predict([(query, one) for one in own], activation_fn=nn.Identity())
        else:
            expected = student.similarity(student.encode_query([query]), student.encode_document(own))[0].numpy()
        np.testing.assert_allclose(bank.scores[number], expected, atol=1e-4)
