"""Distillation on a tiny teacher: the student moves towards it, on public text, without reading dev queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from stillroom_server.distil import AlignAndRank, crop_sentences, distil, make_student, public_lessons
from stillroom_server.teacher import TeacherVectors, load_teacher, tower_of
from stillroom_shared.corpus import Corpus, Passage, Query, Split
from stillroom_shared.errors import SettingsError
from stillroom_shared.release import Release
from stillroom_shared.settings import DistilSettings

WORDS = [
    "open",
    "close",
    "read",
    "write",
    "zip",
    "tar",
    "file",
    "list",
    "members",
    "sort",
    "search",
    "index",
    "passage",
    "query",
    "tapir",
    "eats",
    "leaves",
    "river",
    "bank",
]
SETTINGS = DistilSettings(layers=(0,), epochs=6, learning_rate=5e-3, batch_size=8, sentences=5, ranking_weight=0.3)


@pytest.fixture(scope="module")
def teacher(tiny_release: Release) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_release.folder / "document"), device="cpu")


def public_corpus() -> Corpus:
    generator = np.random.default_rng(0)
    splits: tuple[Split, ...] = ("train", "train", "test", "dev")
    passages, queries, qrels = [], [], {}
    for number in range(40):
        words = [WORDS[i] for i in generator.integers(0, len(WORDS), 12)]
        passages.append(Passage(f"p{number}", "public", " ".join(words) + "."))
        queries.append(Query(f"q{number}", "public", " ".join(words[:4]), splits[number % 4]))
        qrels[f"q{number}"] = {f"p{number}": 1}
    return Corpus("public", tuple(passages), tuple(queries), qrels)


def test_the_student_learns_the_teachers_space(teacher: SentenceTransformer, tmp_path: Path) -> None:
    """A loss with the wrong sign, a label that points at another row, or frozen layers train without an error."""
    lessons = public_lessons(public_corpus(), TeacherVectors(teacher, tmp_path, autocast=False), SETTINGS)
    before = make_student(teacher, SETTINGS.layers)
    seen: list[tuple[int, int]] = []
    after = distil(teacher, lessons, SETTINGS, autocast=False, progress=lambda done, total: seen.append((done, total)))

    def cosine(model: SentenceTransformer) -> float:
        vectors = model.encode(lessons.texts, normalize_embeddings=True, show_progress_bar=False)
        return float((np.asarray(vectors) * lessons.targets).sum(1).mean())

    assert cosine(after) > cosine(before) + 0.1 * (1 - cosine(before))
    assert tower_of(after).config.num_hidden_layers == 1
    assert seen[-1][0] == seen[-1][1]


def test_dev_queries_are_not_lessons(teacher: SentenceTransformer, tmp_path: Path) -> None:
    """Tuning on queries that were trained on always recommends more training."""
    corpus = public_corpus()
    lessons = public_lessons(corpus, TeacherVectors(teacher, tmp_path, autocast=False), SETTINGS)
    assert not {query.text for query in corpus.queries_in("dev")} & set(lessons.texts)
    assert len(lessons.texts) <= 30 + SETTINGS.sentences
    relevant = lessons.relevant[lessons.relevant >= 0]
    assert [corpus.passages[row].id for row in relevant] == [
        next(iter(corpus.qrels[q.id])) for q in corpus.queries if q.split != "dev"
    ]


def test_ranking_counts_only_texts_with_relevance(teacher: SentenceTransformer, tmp_path: Path) -> None:
    """Row -1 is a valid index: cropped sentences would be pulled towards the last passage."""
    import torch

    lessons = public_lessons(public_corpus(), TeacherVectors(teacher, tmp_path, autocast=False), SETTINGS)
    student = make_student(teacher, (0,))
    row = int(np.flatnonzero(lessons.relevant < 0)[0])
    features = student.tokenize([lessons.texts[row]])
    ranked, aligned = (
        float(
            AlignAndRank(student, lessons, SETTINGS.model_copy(update={"ranking_weight": weight}))(
                [dict(features)], torch.tensor([row])
            ).detach()
        )
        for weight in (1.0, 0.0)
    )
    assert ranked == aligned


def test_teacher_vectors_are_computed_once_and_not_confused(teacher: SentenceTransformer, tmp_path: Path) -> None:
    """A cache that ignores the text, its order or the teacher returns somebody else's vectors."""
    vectors = TeacherVectors(teacher, tmp_path, autocast=False)
    first = vectors.encode(["open the file", "a tapir eats"])
    files = set(tmp_path.iterdir())
    np.testing.assert_array_equal(vectors.encode(["open the file", "a tapir eats"]), first)
    assert set(tmp_path.iterdir()) == files
    swapped = vectors.encode(["a tapir eats", "open the file"])
    np.testing.assert_allclose(swapped[::-1], first, atol=1e-5)
    other = TeacherVectors(make_student(teacher, (0,)), tmp_path, autocast=False).encode(
        ["open the file", "a tapir eats"]
    )
    assert np.abs(other - first).max() > 1e-3


def test_layers_that_do_not_exist_and_teachers_that_cannot_be_had(teacher: SentenceTransformer, tmp_path: Path) -> None:
    """A student of no layer, or of the same layer twice, trains into something."""
    for layers in ((), (0, 0), (1, 0), (0, 2), (-1,)):
        with pytest.raises(SettingsError, match="ascending layer numbers from 0 to 1"):
            make_student(teacher, layers)
    with pytest.raises(SettingsError, match="cannot be loaded"):
        load_teacher(str(tmp_path / "absent"))


def test_sentences_are_cropped_once() -> None:
    """A sentence that is also a query would be aligned as a text without relevance."""
    text = "Read the whole file now. Read  the whole FILE now. 1 + 1 = 2 - 3 * 4 / 5 - 6. Sort the list of members."
    assert crop_sentences([text, text], skip={"sort the list of members."}) == ["Read the whole file now."]
