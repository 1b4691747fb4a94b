"""The teacher's nearest passages, the round trip and hard negatives, against slow and against the library's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives, pairwise_dot_score
from tests.hashed_words import HashedWords, SharedWords

from stillroom_server.distillery.data import candidates, vectors
from stillroom_server.distillery.data.candidates import Dense, Judged, Lexical, Mixed, ranked
from stillroom_server.distillery.data.negatives import Mined, mine
from stillroom_server.distillery.data.roundtrip import ranks
from stillroom_server.distillery.data.settings import NegativeSettings, RoundTripSettings
from stillroom_server.distillery.data.vectors import nearest
from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.distillery.teachers.base import Teacher
from stillroom_server.distillery.vectors import VectorCache, embed_lessons
from stillroom_shared.errors import DataError

WORDS = [
    "tapir",
    "zebra",
    "otter",
    "lemur",
    "river",
    "bank",
    "leaves",
    "grass",
    "night",
    "day",
    "eats",
    "sleeps",
    "walks",
    "swims",
    "forest",
    "meadow",
    "north",
    "south",
]


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    """300 passages of eight words; 80 queries of four words of a passage, every fifth with two passages more."""
    random = np.random.default_rng(0)
    folder: Path = tmp_path_factory.mktemp("mined") / "lessons"
    with LessonsWriter(folder, candidates=1) as writer:
        passages = [" ".join(random.choice(WORDS, 8)) + f" {number}" for number in range(300)]
        rows = writer.texts(passages, "passage", source := writer.source("zoo"))
        for number in range(80):
            words = " ".join(random.choice(passages[number].split()[:8], 4, replace=False))
            query = writer.text(f"{words} {number % 7}?", "query", source)
            for relevant in [number, number + 100, number + 200][: 3 if number % 5 == 0 else 1]:
                writer.list(query, [rows[relevant]], [1 + (relevant >= 100)], source)
        writer.list(query, [rows[299]], [0], source)
    return Lessons.open(folder)


@pytest.fixture(scope="module")
def dense(lessons: Lessons, tmp_path_factory: pytest.TempPathFactory) -> Dense:
    folder = tmp_path_factory.mktemp("vectors")
    return Dense.prepare(HashedWords(), lessons, folder, VectorCache(folder, "float32"), lambda done, total: None)


def mined(
    lessons: Lessons, dense: Dense, folder: Path, *, seed: int = 0, counts: Counter[str] | None = None, **settings: Any
) -> list[Mined]:
    chosen, counts = NegativeSettings.model_validate(settings), Counter() if counts is None else counts
    return list(mine(dense.embedder, dense, lessons, Judged.of(lessons), chosen, folder, seed=seed, counts=counts))


def products(lessons: Lessons) -> dict[int, dict[int, float]]:
    """Every query's score of every passage, the slow way."""
    teacher, rows = HashedWords(), lessons.rows("passage")
    texts = lessons.texts(rows)
    return {
        int(query): dict(zip(rows.tolist(), teacher.score(lessons.texts([query]), [texts])[0].tolist(), strict=True))
        for query in lessons.rows("query")
    }


def test_the_nearest_are_the_nearest_whatever_the_blocks(
    lessons: Lessons, dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that loses a block's best passages mines easy negatives, in silence."""
    asked = HashedWords().embed(lessons.texts(lessons.rows("query")), "query")
    everything = asked @ HashedWords().embed(lessons.texts(lessons.rows("passage")), "passage").T
    for size in (16, 48, 1 << 20):
        monkeypatch.setattr(vectors.Vectors.blocks, "__defaults__", (size,))
        found, scores = nearest(asked, dense.passages, 20)
        best = -np.sort(-everything, axis=1)[:, :20]
        np.testing.assert_allclose(scores, best, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(everything, found, 1), best, atol=1e-5)
        assert all(len(set(row.tolist())) == 20 for row in found)
    assert nearest(asked, dense.passages, 1_000)[0].shape == (len(asked), 300)


def test_what_is_embedded_for_mining_is_not_embedded_again(lessons: Lessons, tmp_path: Path) -> None:
    """Embedding is where the hours go: neither training, nor a run that was cut off, nor the next one may do it twice."""
    teacher, cache = HashedWords(), VectorCache(tmp_path / "cache")
    dense = Dense.prepare(teacher, lessons, tmp_path, cache, lambda done, total: None)
    assert teacher.texts == len(lessons) and dense.passages.stored.dtype == np.float16
    trained = embed_lessons(teacher, lessons, VectorCache(tmp_path / "cache"), tmp_path / "vectors.npy")
    again = Dense.prepare(teacher, lessons, tmp_path / "again", cache, lambda done, total: None)
    assert teacher.texts == len(lessons), "some were embedded twice"
    np.testing.assert_array_equal(trained[lessons.rows("passage")], again.passages[np.arange(300)])
    places = np.array([299, 0, 65])
    exact = HashedWords().embed(lessons.texts(lessons.rows("passage")[places]), "passage")
    np.testing.assert_allclose(dense.passages[places], exact, atol=5e-4)
    np.testing.assert_allclose(
        dense.vectors(lessons.rows("query")[[7]]),
        HashedWords().embed(lessons.texts(lessons.rows("query")[[7]]), "query"),
        atol=5e-4,
    )
    other = HashedWords(identity="another")
    Dense.prepare(other, lessons, tmp_path, cache, lambda done, total: None)
    assert other.texts == len(lessons), "another teacher's vectors were taken for this one's"


def test_float16_moves_no_negative_further_than_its_rounding(lessons: Lessons, dense: Dense, tmp_path: Path) -> None:
    """Rounded vectors may exchange passages that tie, and no others."""
    cache = VectorCache(tmp_path / "cache")
    rounded = Dense.prepare(HashedWords(), lessons, tmp_path, cache, lambda done, total: None)
    scores = products(lessons)
    lists = [
        mined(lessons, one, tmp_path / str(number), count=4, relative_margin=None)
        for number, one in enumerate((dense, rounded))
    ]
    for exact, other in zip(*lists, strict=True):
        left, right = ([scores[one.query][row] for row in one.passages[1:]] for one in (exact, other))
        assert (exact.query, exact.passages[0]) == (other.query, other.passages[0])
        np.testing.assert_allclose(left, right, atol=1e-3)


def test_a_vector_that_is_not_finite_is_refused_with_its_text(lessons: Lessons, tmp_path: Path) -> None:
    """One NaN among the vectors is the nearest of all, or of none, depending on the processor."""

    class Broken(HashedWords):
        def embed(self, texts: Sequence[str], role: Any) -> Any:
            found = super().embed(texts, role)
            found[np.array([text.endswith(" 3?") for text in texts])] = np.nan
            return found

    with pytest.raises(DataError, match=r"vector of query '.* 3\?' is not finite"):
        Dense.prepare(Broken(), lessons, tmp_path, VectorCache(tmp_path), lambda done, total: None)


class _Library:
    """What `mine_hard_negatives` asks of a SentenceTransformer, over our vectors."""

    device = torch.device("cpu")
    similarity_pairwise = staticmethod(pairwise_dot_score)

    def __init__(self) -> None:
        self.encode_query = self._encoder("query")
        self.encode_document = self._encoder("passage")

    def _encoder(self, role: Any) -> Any:
        return lambda texts, **_: HashedWords().embed(texts, role)

    def similarity(self, one: Any, other: Any) -> torch.Tensor:
        return torch.as_tensor(one) @ torch.as_tensor(other).T


@pytest.mark.parametrize(
    "settings",
    [
        {"relative_margin": 0.05},
        {"relative_margin": None},
        {"absolute_margin": 0.1, "relative_margin": None},
        {"absolute_margin": 0.02, "relative_margin": 0.2, "first": 3, "last": 30},
    ],
)
def test_negatives_are_those_of_sentence_transformers(
    lessons: Lessons, dense: Dense, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The field's rules, by the field's library: a margin with the wrong sign or a window off by one changes them."""
    ours = mined(lessons, dense, tmp_path, count=4, **settings)
    texts = lessons.texts(slice(0, len(lessons)))
    pairs = [(texts[one.query], texts[one.passages[0]]) for one in ours]
    corpus = lessons.texts(lessons.rows("passage"))
    window = {"range_min": settings.get("first", 0), "range_max": settings.get("last", 100)}
    library: Any = mine_hard_negatives  # takes what behaves like a SentenceTransformer
    theirs = library(
        Dataset.from_dict({"query": [q for q, _ in pairs], "answer": [p for _, p in pairs]}),
        _Library(), corpus=corpus, num_negatives=4, output_format="n-tuple", verbose=False, **window,
        **{name: settings.get(name) for name in ("absolute_margin", "relative_margin")},
    )  # fmt: skip
    expected = {(row["query"], row["answer"]): [row[f"negative_{i}"] for i in range(1, 5)] for row in theirs}
    scores, place = products(lessons), {text: row for row, text in enumerate(texts)}
    compared = 0
    for one, pair in zip(ours, pairs, strict=True):
        if pair in expected:
            compared += 1
            # By score: which of two passages that tie comes first is nobody's promise.
            np.testing.assert_allclose(
                [scores[one.query][row] for row in one.passages[1:]],
                [scores[one.query][place[text]] for text in expected[pair]],
                atol=1e-6,
            )
    assert compared > 40


def test_lists_have_the_relevant_passage_first_and_no_other(lessons: Lessons, dense: Dense, tmp_path: Path) -> None:
    """A known positive among the negatives is a lesson in the wrong direction."""
    counts: Counter[str] = Counter()
    found = mined(lessons, dense, tmp_path, count=9, counts=counts)
    judged = Judged.of(lessons)
    relevant = {int(q): set(judged.relevant(n).tolist()) for n, q in enumerate(judged.queries)}
    assert len(found) == 80 + 2 * 16 == counts["lists"]
    assert {(one.query, one.passages[0]) for one in found} == {(q, p) for q, rows in relevant.items() for p in rows}
    for one in found:
        assert len(set(one.passages)) == 10 and not relevant[one.query] & set(one.passages[1:])
        assert one.grades[0] in (1, 2) and one.grades[1:] == [0] * 9
    assert {one.grades[0] for one in found} == {1, 2}
    assert counts["hard"] + counts["random"] == 9 * counts["lists"] and counts["too_close"] > 0
    assert len(mined(lessons, dense, tmp_path, count=9, lists_per_query=1)) == 80


def test_random_passages_fill_up_what_the_margin_emptied(lessons: Lessons, dense: Dense, tmp_path: Path) -> None:
    """Queries without enough hard negatives would vanish: those with the weakest positives first."""
    counts: Counter[str] = Counter()
    scores = products(lessons)
    found = mined(lessons, dense, tmp_path, count=5, last=40, relative_margin=0.5, counts=counts)
    assert counts["random"] > 50 and len(found) == 112
    judged = Judged.of(lessons)
    limits = {
        int(q): min(scores[int(q)][p] for p in judged.relevant(n).tolist()) * 0.5 for n, q in enumerate(judged.queries)
    }
    ranked = {q: sorted(scores[q].values(), reverse=True) for q in limits}
    for one in found:
        for row in one.passages[1:]:
            # Apart by the margin, or drawn from beyond what was looked at.
            assert scores[one.query][row] <= max(limits[one.query], ranked[one.query][40]) + 1e-6


def test_the_same_seed_gives_the_same_lists(lessons: Lessons, dense: Dense, tmp_path: Path) -> None:
    """Lessons that differ from run to run make every comparison of losses a comparison of luck."""

    def lists(seed: int) -> list[list[int]]:
        found = mined(lessons, dense, tmp_path, seed=seed, count=5, last=40, sampling="random", relative_margin=None)
        return [one.passages for one in found]

    assert lists(0) == lists(0) != lists(1)
    scores = products(lessons)
    top = {q: set(sorted(rows, key=lambda row: -rows[row])[:48]) for q, rows in scores.items()}
    for one in mined(lessons, dense, tmp_path, count=5, last=40, sampling="random", relative_margin=None):
        assert sum(row in top[one.query] for row in one.passages[1:]) >= 4


def test_a_small_corpus_is_refused_or_used_up(tmp_path: Path) -> None:
    """A list that repeats a passage, or an endless search for one more."""
    with LessonsWriter(tmp_path / "small", candidates=1) as writer:
        rows = writer.texts(["a tapir", "a zebra", "a lemur", "an otter"], "passage", source := writer.source("zoo"))
        writer.list(writer.text("tapir", "query", source), [rows[0]], [1], source)
    small = Lessons.open(tmp_path / "small")
    near = Dense.prepare(HashedWords(), small, tmp_path, VectorCache(tmp_path), lambda done, total: None)
    with pytest.raises(DataError, match=r"data.negatives.count 4: there are only 4 passages, so give at most 3"):
        mined(small, near, tmp_path, count=4)
    [one] = mined(small, near, tmp_path, count=3, relative_margin=None)
    assert sorted(one.passages) == rows
    counts: Counter[str] = Counter()
    assert mined(small, near, tmp_path, count=3, relative_margin=1.0, counts=counts) == [] and counts["dropped"] == 1


def test_the_round_trip_gives_the_exact_rank(lessons: Lessons, dense: Dense, tmp_path: Path) -> None:
    """A filter that compares with the wrong passage keeps the worst queries and drops the best."""
    judged, scores = Judged.of(lessons), products(lessons)
    found = ranks(dense.embedder, dense, lessons, judged, RoundTripSettings(top=10), tmp_path)
    place = 0
    for number, query in enumerate(judged.queries.tolist()):
        relevant = judged.relevant(number).tolist()
        rivals = [score for row, score in scores[query].items() if row not in relevant]
        for passage in relevant:
            rank = 1 + sum(score > scores[query][passage] + 1e-6 for score in rivals)
            ties = sum(abs(score - scores[query][passage]) < 1e-6 for score in rivals)
            assert rank <= found[place] <= rank + ties or (found[place] > 10 and rank + ties > 10)
            place += 1
    assert place == len(found) and (found <= 10).any() and (found > 10).any()


def test_a_teacher_without_vectors_scores_what_words_find(lessons: Lessons, tmp_path: Path) -> None:
    """A cross-encoder cannot read a whole corpus; its margin must be in its own scores, which may be negative."""
    teacher: Teacher = SharedWords()
    finder = Lexical(lessons, tmp_path / "words")
    judged = Judged.of(lessons)
    settings = NegativeSettings(count=3, candidates=30, relative_margin=0.1)
    counts: Counter[str] = Counter()
    found = list(mine(teacher, finder, lessons, judged, settings, tmp_path, seed=0, counts=counts))
    assert counts["hard"] > counts["random"]
    relevant = {int(q): judged.relevant(n) for n, q in enumerate(judged.queries)}
    for one in found[:40]:
        query = lessons.texts([one.query])
        known = min(teacher.score(query, [lessons.texts(relevant[one.query])])[0])
        # What words did not find was never scored: random passages come from there.
        [looked_at] = finder.find(np.array([one.query]), 30 + judged.most)
        scored = [row for row in one.passages[1:] if row in looked_at]
        assert (teacher.score(query, [lessons.texts(scored)])[0] <= known - 0.1 * abs(known) + 1e-6).all()
    again = Lexical(lessons, tmp_path / "words")
    asked = lessons.rows("query")[:1]
    words = set(lessons.texts(asked)[0].rstrip("?").split())
    best = lessons.texts(finder.find(asked, 5)[0])
    assert [list(rows) for rows in again.find(asked, 5)] == [list(rows) for rows in finder.find(asked, 5)]
    assert all(words & set(text.split()) for text in best)
    rank = ranks(teacher, finder, lessons, judged, RoundTripSettings(top=5, candidates=30), tmp_path)
    assert (rank <= 5).any() and (rank > 5).any()


def test_vectors_and_words_find_half_of_the_candidates_each(lessons: Lessons, dense: Dense, tmp_path: Path) -> None:
    """Lists of one teacher's candidates alone hide what it would rank wrongly of the other's."""
    lexical = Lexical(lessons, tmp_path / "words")
    finder, judged, truth = Mixed.of(dense, lexical), Judged.of(lessons), products(lessons)
    found = {one.query: one for one in ranked(dense.embedder, finder, lessons, judged, 31, tmp_path)}
    other = 0
    for query, one in found.items():
        halves = [
            {*map(int, search.find(np.array([query]), count)[0])} for search, count in ((dense, 16), (lexical, 15))
        ]
        assert {*one.candidates.tolist()} == halves[0] | halves[1] and len({*one.candidates.tolist()}) == len(
            one.candidates
        )
        other += len(halves[1] - halves[0])
        scores = [truth[query][row] for row in one.candidates.tolist()]
        np.testing.assert_allclose(one.scores, scores, atol=1e-6)
        assert (np.diff(one.scores) <= 0).all()
    assert other > 3 * len(found), "the guard: words find others"
    alone = {one.query: one for one in ranked(dense.embedder, dense, lessons, judged, 31, tmp_path)}
    assert any({*one.candidates.tolist()} != {*alone[query].candidates.tolist()} for query, one in found.items())


def test_without_a_teacher_words_rank_and_no_margin_is_claimed(lessons: Lessons, tmp_path: Path) -> None:
    """A margin computed from ranks would look like one computed from scores."""
    finder, judged = Lexical(lessons, tmp_path / "words"), Judged.of(lessons)
    counts: Counter[str] = Counter()
    found = list(mine(None, finder, lessons, judged, NegativeSettings(count=3), tmp_path, seed=0, counts=counts))
    assert len(found) == 112 and counts["too_close"] == 0 and counts["random"] == 0


def test_ranking_goes_on_where_it_was_cut_off(
    lessons: Lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cross-encoder's night of scores, computed twice."""
    monkeypatch.setattr(candidates, "PIECE", 20)
    finder, judged, teacher = Lexical(lessons, tmp_path / "words"), Judged.of(lessons), SharedWords()
    settings = NegativeSettings(count=3, candidates=10)

    def run() -> list[list[int]]:
        found = mine(teacher, finder, lessons, judged, settings, tmp_path, seed=0, counts=Counter())
        return [one.passages for one in found]

    first = run()
    assert teacher.calls == 4
    assert run() == first and teacher.calls == 4
    next(tmp_path.rglob("00000002.arrow")).unlink()
    assert run() == first and teacher.calls == 5
