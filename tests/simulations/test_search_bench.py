"""The search benchmark measures what it says: the right passages, the same questions, goals judged by the values."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from stillroom_shared.release import Release
from stillroom_simulations.search_bench import scale
from stillroom_simulations.search_bench.engines import Engine
from stillroom_simulations.search_bench.latency import compare, ndcg, quality
from stillroom_simulations.search_bench.report import drawing, show
from stillroom_simulations.search_bench.run import Asked, bench_search, goals
from stillroom_simulations.search_bench.texts import Question, Texts, drawn, load

ANIMALS = ["tapir", "okapi", "numbat", "quokka", "axolotl", "pangolin", "aardvark", "dugong", "kakapo", "saola"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set in BEIR layout: 120 documents of 70 words, and two questions in dev, one in train."""
    data = tmp_path / "zoo"
    (data / "qrels").mkdir(parents=True)
    rows = [
        {
            "_id": f"d{n}",
            "title": f"The {ANIMALS[n % 10]}",
            "text": " ".join(f"{ANIMALS[n % 10]} word{n}" for _ in range(35)),
        }
        for n in range(120)
    ]
    with gzip.open(data / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    queries = [{"_id": f"q{n}", "text": f"{ANIMALS[n]} word{n}"} for n in range(3)]
    (data / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (data / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\nq1\td2\t0\n")
    (data / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\n")
    return data


def test_pieces_know_their_document_and_questions_are_of_dev(folder: Path) -> None:
    """Guards against quality on questions that a release was trained with, and against lost ends of documents."""
    texts = load([folder], questions=10)
    assert len(texts.pieces) == 240 and sorted(set(texts.documents)) == sorted(f"zoo/d{n}" for n in range(120))
    assert all(len(piece.split()) <= 55 + 2 for piece in texts.pieces)
    words = {
        word
        for piece, document in zip(texts.pieces, texts.documents, strict=True)
        if document == "zoo/d7"
        for word in piece.split()
    }
    assert words == {"The", "dugong.", "dugong", "word7"}
    assert {(q.text, q.relevant) for q in texts.questions} == {
        ("tapir word0", frozenset({"zoo/d0"})), ("okapi word1", frozenset({"zoo/d1"})),
    }  # fmt: skip


def test_drawn_pieces_are_new_and_lie_near_the_one_they_begin_with(folder: Path) -> None:
    """Guards against a million copies, which every index finds easily."""
    texts = load([folder], questions=10)
    made = list(drawn(texts, 50))
    assert made == list(drawn(texts, 50)) and not {text for text, _ in made} & set(texts.pieces)
    assert all(set(text.split()[:1]) <= set(texts.pieces[n].split()) for text, n in made)


def test_ndcg_counts_documents_once_and_the_ideal_as_one() -> None:
    """Guards against a document that counts as often as it has pieces."""
    assert ndcg(["a", "a", "b"], frozenset({"a", "b"})) == 1
    assert ndcg(["x", "a"], frozenset({"a"})) == pytest.approx(1 / np.log2(3))
    assert ndcg([f"x{n}" for n in range(10)] + ["a"], frozenset({"a"})) == 0


def test_every_engine_is_asked_every_question_in_turns() -> None:
    """Guards against times of different questions, and against quality of a fixed answer."""
    texts = Texts(["one", "two"], ["a", "b"], [Question(f"q{n}", frozenset({"a"})) for n in range(120)])
    asked: list[tuple[str, str]] = []

    def engine(name: str, answer: Sequence[int]) -> Engine:
        def search(text: str, k: int) -> list[int]:
            asked.append((name, text))
            return list(answer)

        return Engine(name, "", search)

    timed = compare([engine("good", [0, 1]), engine("bad", [1, 0])], texts)
    assert {name: len(of.milliseconds) for name, of in timed.items()} == {"good": 120, "bad": 120}
    assert timed["good"].ndcg.mean() == 1 and 0.6 < timed["bad"].ndcg.mean() < 0.7
    in_turns = [name for name, _ in asked[40 : 40 + 240]]
    assert in_turns[:50] == ["good"] * 50 and in_turns[50:100] == ["bad"] * 50
    assert quality(engine("none", []), texts).sum() == 0


def test_the_whole_benchmark_on_a_small_set(
    folder: Path, tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against figures that are not of this run, and a second run that embeds again."""
    monkeypatch.setattr(scale, "SIZES", (100, 400))
    monkeypatch.setattr("stillroom_simulations.search_bench.run._ADDED", 64)
    asked = Asked(tiny_release.folder, [folder], tmp_path / "runs", 400, 10, compare=False, load_seconds=1)
    console = Console(quiet=True)
    made = bench_search(asked, out=tmp_path / "search.json", console=console, command="bench")
    assert json.loads((tmp_path / "search.json").read_text()) == made
    figures: dict[str, Any] = made["figures"]
    assert [size["passages"] for size in figures["growth"]] == [100, 240, 400]
    assert set(figures["engines"]) == {"stillroom hybrid", "stillroom dense", "stillroom bm25"}
    assert figures["engines"]["stillroom bm25"]["ndcg_at_10"] == 1  # the words are in no other document
    assert figures["serving"]["open"]["searches"] > 0 and figures["serving"]["open"]["errors"] == {}
    assert figures["resident_mb"] > 20 and figures["added_a_second"] > 0
    monkeypatch.setattr("stillroom_client.encoder.Encoder.encode_documents", None)
    monkeypatch.setattr(scale, "adding", lambda *_: (1.0, 1.0))
    again = bench_search(asked, out=tmp_path / "search.json", console=console, command="bench")
    assert (
        again["figures"]["engines"]["stillroom dense"]["ndcg_at_10"]
        == figures["engines"]["stillroom dense"]["ndcg_at_10"]
    )
    show(made, console=console, chart=tmp_path / "chart.svg")
    assert "400" in drawing(figures["growth"]) and (tmp_path / "chart.svg").read_text() == drawing(figures["growth"])
    slow = {"stillroom hybrid": _timed(9.0, 0.5), "stillroom dense": _timed(0.1, 0.5)}
    slow["sentence-transformers + FAISS flat"] = _timed(10.0, 0.6)
    judged = {goal["goal"]: goal["holds"] for goal in goals(figures, slow)}
    assert not judged["hybrid p50, ms <= 3"] and judged["dense p50, ms <= 1.5"]
    assert not judged["times faster than sentence-transformers + FAISS flat, p50 >= 5"]
    assert not judged["nDCG@10 less that of sentence-transformers >= -0.005"]


def _timed(milliseconds: float, ndcg: float) -> Any:
    from stillroom_simulations.search_bench.latency import Timed

    return Timed(np.full(20, milliseconds), np.full(20, ndcg))


@pytest.mark.skipif(importlib.util.find_spec("usearch") is None, reason="the extra `compare` is not installed")
def test_others_find_the_nearest_passage(tmp_path: Path) -> None:
    """Guards against a comparison with a search that was set up wrongly, and is fast because of it."""
    from stillroom_server.teacher import OFFLINE, load_teacher
    from stillroom_simulations.search_bench import engines

    model = load_teacher(OFFLINE)
    texts = [
        f"The {animal} is an animal of the {place}." for animal in ANIMALS for place in ("forest", "river", "desert")
    ]
    vectors = np.asarray(model.encode(texts, normalize_embeddings=True), np.float32)
    ready = [
        engines.faiss_flat(model, vectors), engines.usearch(model, vectors),
        engines.sqlite_vec(model, vectors, tmp_path / "vectors.db"),
        engines.txtai(model, texts, vectors, hybrid=False), engines.txtai(model, texts, vectors, hybrid=True),
    ]  # fmt: skip
    for engine in ready:
        for n in (0, 7, 29):
            found = engine.search(texts[n], 5)
            assert found[0] == n and len(set(found)) == 5, engine.name
