"""Scores and vectors are computed once, kept by content, and laid out as the lessons are."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from stillroom_server.distillery import scores, store, vectors
from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.distillery.scores import ScoreCache, score_lessons
from stillroom_server.distillery.teachers.base import FloatArray, Role
from stillroom_server.distillery.teachers.teacher_set import Member, TeacherSet
from stillroom_server.distillery.vectors import VectorCache, embed_lessons
from stillroom_shared.errors import DataError


class Counting:
    """A cross-encoder of its own kind: a function of both texts that tells every pair apart, and counts its pairs."""

    def __init__(self, identity: str = "counting") -> None:
        self.identity = f"{identity:0<64}"
        self.pairs: list[tuple[str, str]] = []
        self.fails_after = 1 << 60

    def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
        new = [(query, text) for query, own in zip(queries, passages, strict=True) for text in own]
        if len(self.pairs) + len(new) > self.fails_after:
            raise KeyboardInterrupt
        self.pairs += new
        return [
            np.array([self.truth(query, text) for text in own], np.float32)
            for query, own in zip(queries, passages, strict=True)
        ]

    def truth(self, query: str, text: str) -> float:
        return float(np.float32(len(self.identity.strip("0")) * hash_of(query) - hash_of(text) * hash_of(query + text)))


class Embedding(Counting):
    """A bi-encoder of its own kind, 8 dimensions; counts its texts, and keeps the lengths of each call."""

    dimension = 8

    def __init__(self, identity: str = "embedding") -> None:
        super().__init__(identity)
        self.texts: list[tuple[str, Role]] = []
        self.calls: list[list[int]] = []

    def embed(self, texts: Sequence[str], role: Role) -> FloatArray:
        if len(self.texts) + len(texts) > self.fails_after:
            raise KeyboardInterrupt
        self.texts += [(text, role) for text in texts]
        self.calls.append([len(text) for text in texts])
        found = np.array([[np.cos(hash_of(f"{role}{text}{place}") * 9) for place in range(8)] for text in texts])
        return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def hash_of(text: str) -> float:
    return int.from_bytes(text.encode()[-4:], "big") % 997 / 997 + len(text) / 100


def write_lessons(folder: Path, lists: int = 30, candidates: int = 4) -> Lessons:
    generator = np.random.default_rng(0)
    with LessonsWriter(folder, candidates=candidates) as writer:
        source = writer.source("zoo")
        passages = writer.texts(
            [f"passage {'x' * int(generator.integers(40))} {n}" for n in range(50)], "passage", source
        )
        for number in range(lists):
            query = writer.text(f"query {number // 2}", "query", source)
            writer.list(query, [int(row) for row in generator.choice(passages, candidates)], [1, 0, 0, 0], source)
    return Lessons.open(folder)


@pytest.fixture
def lessons(tmp_path: Path) -> Lessons:
    return write_lessons(tmp_path / "lessons")


def test_scores_lie_as_the_lists_do_and_are_computed_once(lessons: Lessons, tmp_path: Path) -> None:
    """Scores of another list's passages, or of the passages in another order, teach noise without an error."""
    teacher, cache = Counting(), ScoreCache(tmp_path / "cache")
    seen: list[tuple[int, int]] = []
    found = score_lessons(teacher, lessons, cache, tmp_path / "out.npy", lambda done, of: seen.append((done, of)))
    assert isinstance(found, np.memmap) and found.dtype == np.float32 and seen[-1] == (30, 30)
    for row in range(lessons.lists):
        [query] = lessons.texts(lessons.queries[[row]])
        assert found[row].tolist() == [teacher.truth(query, text) for text in lessons.texts(lessons.passages[row])]
    distinct = {(int(q), int(p)) for q, own in zip(lessons.queries, lessons.passages, strict=True) for p in own}
    assert len(teacher.pairs) == len(set(teacher.pairs)) == len(distinct) < 120
    again = Counting()
    assert (score_lessons(again, lessons, ScoreCache(tmp_path / "cache"), tmp_path / "b.npy") == found).all()
    assert not again.pairs
    other = Counting("another one")
    assert (score_lessons(other, lessons, cache, tmp_path / "c.npy") != found).any() and other.pairs


def test_an_interrupted_run_loses_one_shard(lessons: Lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that costs hours starts again from nothing."""
    monkeypatch.setattr(scores, "SHARD", 8)
    monkeypatch.setattr(vectors, "SHARD", 8)
    whole = Counting()
    score_lessons(whole, lessons, ScoreCache(tmp_path / "whole"), tmp_path / "whole.npy")
    first, second = Counting(), Counting()
    first.fails_after = 60
    with pytest.raises(KeyboardInterrupt):
        score_lessons(first, lessons, ScoreCache(tmp_path / "cache"), tmp_path / "out.npy")
    assert not (tmp_path / "out.npy").exists() and 52 <= len(first.pairs) <= 60
    resumed = score_lessons(second, lessons, ScoreCache(tmp_path / "cache"), tmp_path / "out.npy")
    assert first.pairs + second.pairs == whole.pairs and (resumed == np.load(tmp_path / "whole.npy")).all()
    embedding, rest = Embedding(), Embedding()
    embedding.fails_after = 30
    with pytest.raises(KeyboardInterrupt):
        embed_lessons(embedding, lessons, VectorCache(tmp_path / "vectors"), tmp_path / "v.npy")
    embed_lessons(rest, lessons, VectorCache(tmp_path / "vectors"), tmp_path / "v.npy")
    assert len({*embedding.texts, *rest.texts}) == len(embedding.texts) + len(rest.texts) == len(lessons)
    assert len(embedding.texts) >= 22


def test_another_mixture_of_a_set_computes_nothing(lessons: Lessons, tmp_path: Path) -> None:
    """Scores of a set kept as such are wrong for other candidates, and every weight tried costs all teachers again."""
    first, second, cache = Counting(), Counting("another"), ScoreCache(tmp_path / "cache")
    members = [Member(first, 2.0), Member(second, 1.0, 0.5)]
    found = score_lessons(TeacherSet(members), lessons, cache, tmp_path / "out.npy")
    texts, queries = [lessons.texts(row) for row in lessons.passages], lessons.texts(lessons.queries)
    computed = len(first.pairs), len(second.pairs)
    np.testing.assert_array_equal(found, np.stack(cache.score(TeacherSet(members), queries, texts)))
    other = TeacherSet([Member(first, 1.0, 3.0), Member(second, 5.0)], "range")
    changed = score_lessons(other, lessons, cache, tmp_path / "other.npy")
    assert (len(first.pairs), len(second.pairs)) == computed and (changed != found).any()
    np.testing.assert_allclose(changed, np.stack(other.score(queries, texts)), rtol=1e-5)
    raw = np.load(tmp_path / "out.member-1.npy")
    assert raw[0].tolist() == [second.truth(queries[0], text) for text in texts[0]]


@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_vectors_lie_as_the_texts_do(lessons: Lessons, tmp_path: Path, storage: vectors.Storage) -> None:
    """Sorting by length for speed, and not back again, gives each text another's vector."""
    embedder, cache = Embedding(), VectorCache(tmp_path / "cache", storage)
    seen: list[tuple[int, int]] = []
    found = embed_lessons(embedder, lessons, cache, tmp_path / "v.npy", lambda done, of: seen.append((done, of)))
    assert isinstance(found, np.memmap) and found.dtype == storage and found.shape == (len(lessons), 8)
    assert seen[-1] == (len(lessons), len(lessons)) and seen == sorted(seen)
    assert all(lengths == sorted(lengths, reverse=True) for lengths in embedder.calls)
    reference = Embedding()
    for role in ("query", "passage"):
        rows = lessons.rows(role)
        exact = reference.embed(lessons.texts(rows), role)
        np.testing.assert_allclose(found[rows], exact, atol=5e-4 if storage == "float16" else 0)
        kept = cache.embed(embedder, lessons.texts(rows), role)
        assert kept.dtype == np.float32 and (kept == found[rows].astype(np.float32)).all()
    assert len(embedder.texts) == len(lessons)
    assert (cache.embed(embedder, ["query 1"], "passage") != cache.embed(embedder, ["query 1"], "query")).any()
    assert cache.embed(embedder, [], "query").shape == (0, 8)


def test_only_the_rows_asked_for_are_embedded(lessons: Lessons, tmp_path: Path) -> None:
    """A text that nobody reads costs as much as any other; left at zero, it is taken for a vector."""
    embedder, seen = Embedding(), list[tuple[int, int]]()
    queries, passages = lessons.rows_of("query"), lessons.rows_of("passage")
    found = embed_lessons(
        embedder, lessons, VectorCache(tmp_path), tmp_path / "v.npy", lambda *done: seen.append(done), rows=queries
    )
    assert {role for _, role in embedder.texts} == {"query"} and len(embedder.texts) == len(queries)
    assert np.isfinite(found[queries]).all() and np.isnan(found[passages]).all()
    assert seen[-1] == (len(queries), len(queries))
    assert lessons.rows_of("query", "passage").tolist() == list(range(len(lessons)))


def test_a_bi_encoder_reads_each_text_once(lessons: Lessons, tmp_path: Path) -> None:
    """A passage in fifty lists is embedded fifty times, or one in none at all."""
    embedder, cache = Embedding(), ScoreCache(tmp_path / "cache")
    found = score_lessons(embedder, lessons, cache, tmp_path / "out.npy")
    listed = {*lessons.texts(lessons.queries), *lessons.texts(lessons.passages.ravel())}
    assert len(embedder.texts) == len(listed) < len(lessons) and not embedder.pairs
    asked = Embedding().embed(lessons.texts(lessons.queries), "query")
    for row in range(lessons.lists):
        read = Embedding().embed(lessons.texts(lessons.passages[row]), "passage")
        np.testing.assert_allclose(found[row], read @ asked[row], atol=1e-3)


def test_what_is_not_finite_is_not_kept(lessons: Lessons, tmp_path: Path) -> None:
    """A NaN that was kept comes back after the model has been mended."""

    class Broken(Embedding):
        def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
            return [np.full(len(own), np.nan, np.float32) for own in passages]

        def embed(self, texts: Sequence[str], role: Role) -> FloatArray:
            return np.full((len(texts), 8), 1e6, np.float32)

    cache = ScoreCache(tmp_path / "cache")
    with pytest.raises(DataError, match="not finite"):
        cache.score(Broken(), ["a"], [["b"]])
    with pytest.raises(DataError, match="not finite as float16"):
        embed_lessons(Broken(), lessons, cache.vectors, tmp_path / "v.npy")
    assert len(cache.store(Broken())) == len(cache.vectors.store(Broken())) == 0
    assert not (tmp_path / "v.npy").exists()


def test_memory_is_that_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of all lists, or all texts, held at once work until the corpus is large."""
    monkeypatch.setattr(scores, "SHARD", 256)
    monkeypatch.setattr(store, "_MERGED_AT_ONCE", 1 << 13)

    class Quick(Counting):
        def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
            return [np.arange(len(own), dtype=np.float32) for own in passages]

    def peak(lists: int) -> int:
        lessons = write_lessons(tmp_path / f"lessons-{lists}", lists)
        lessons.passages, lessons.queries  # noqa: B018 - the index of the lists, 8 bytes each, is not ours to bound
        tracemalloc.start()
        score_lessons(Quick(), lessons, ScoreCache(tmp_path / f"cache-{lists}"), tmp_path / f"{lists}.npy")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(64)
    assert peak(3_200) < 1.5 * peak(600)
