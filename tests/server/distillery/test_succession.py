"""A student as its successor's teacher: the bank holds what it says, in its own words, and what it never read stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tests.server.distillery.learners import DIM, late, lessons, read, reranker, tower, unit
from torch import nn

from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.succession import succeeded
from stillroom_server.distillery.training.bank import Bank


@pytest.fixture
def taught(tmp_path: Path) -> Bank:
    """Lessons with vectors and scores that no model gave."""
    texts = lessons(tmp_path / "lessons")
    scores = np.random.default_rng(3).standard_normal((texts.lists, texts.candidates)).astype(np.float32)
    return Bank(texts, unit(len(texts)).astype(np.float16), scores)


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
    again = succeeded(student, taught, tmp_path / "made")
    np.testing.assert_array_equal(again.vectors, bank.vectors)


def test_where_both_towers_learn_passages_are_the_students_too(folder: Path, taught: Bank, tmp_path: Path) -> None:
    """Guards against a successor that is held to passages of another space than the student's queries."""
    student = tower(folder)
    bank = succeeded(student, taught, tmp_path / "made", towers="both")
    expected = student.encode(taught.lessons.texts(taught.lessons.rows("passage")))
    np.testing.assert_allclose(of(bank, "passage"), expected, atol=1e-3)
    unscored = succeeded(student, Bank(taught.lessons, taught.vectors), tmp_path / "other", towers="both")
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
