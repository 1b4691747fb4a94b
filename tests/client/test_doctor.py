"""`stillroom index doctor`: that its recall is the recall, that its interval covers, and that it sees each way of being ill."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.client.devices import filled, passages, units
from typer.testing import CliRunner

from stillroom_client import exact
from stillroom_client.doctor import examine, sampled
from stillroom_client.exact import Share, exact_search, recalls, share_of
from stillroom_client.index_advice import Knobs, climb, suggest
from stillroom_client.index_check import compare, judge
from stillroom_client.index_plan import IndexSettings
from stillroom_client.search import Device
from stillroom_client.store import Store
from stillroom_shared.cli import build_app
from stillroom_shared.release import Release


def doctor(home: Path, *arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(build_app(), ["index", "doctor", "--home", str(home), *arguments])


@pytest.fixture
def home(tmp_path: Path, tiny_release: Release) -> Path:
    with filled(tmp_path / "home", tiny_release, 300) as device:
        device.refresh_index()
    return tmp_path / "home"


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_exact_search_is_a_sort_of_everything(count: int, k: int, block: int) -> None:
    """Guards against a best row that is lost between two blocks. The twin sorts all scores."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_BLOCK", block)
        Store.create(Path(folder, "store"), dimension=8)
        store = Store(Path(folder, "store"))
        store.put(passages([f"p{n}" for n in range(count)]), units(count, 8))
        store.remove([f"p{n}" for n in range(0, count, 3)])
        rows, vectors = store.vectors()
        queries = units(3, 8, seed=1)
        order = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
        with store.reading():
            found = exact_search(store, queries, k, timed=2)
        np.testing.assert_array_equal(found.rows, rows[order])
        assert found.scores == pytest.approx(np.take_along_axis(queries @ vectors.T, order, 1), abs=1e-6)
        assert len(found.seconds) == 2
        store.close()


def test_recall_counts_what_is_as_near_as_the_best(tmp_path: Path) -> None:
    """Guards against a recall that blames the index for the order of equal vectors, and one that is always 1."""
    Store.create(tmp_path / "store", dimension=8)
    with_twins = np.repeat(units(20, 8), 2, axis=0)  # rows 1 and 2 are equal, and so on
    store = Store(tmp_path / "store")
    store.put(passages([f"p{n}" for n in range(40)]), with_twins)
    queries = units(5, 8, seed=3)
    with store.reading():
        best = exact_search(store, queries, 5)
    other_twin = (best.rows - 1) // 2 * 2 + 1 + best.rows % 2
    assert (other_twin != best.rows).all()
    assert recalls(store, queries, best.rows, best).tolist() == [1.0] * 5
    swapped = best.rows.copy()
    swapped[:, -1] = other_twin[:, -1]
    assert recalls(store, queries, swapped, best).tolist() == [1.0] * 5
    worst = np.argsort(queries @ with_twins.T, axis=1)[:, 0] + 1
    swapped[:, 0] = worst
    assert recalls(store, queries, swapped, best) == pytest.approx(np.full(5, 0.8))
    store.close()


def test_the_interval_covers_clustered_recalls_and_ten_trials_a_query_would_not() -> None:
    """Guards against ten results of one query taken for ten independent trials: an interval three times too narrow.

    Half of the misses come in whole queries. 1,000 samples of 200 queries: 95% coverage has a standard error of 0.7 points.
    """
    generator = np.random.default_rng(0)
    covered, naive = [], []
    for _ in range(1000):
        hard = generator.random(200) < 0.06
        values = np.where(hard, generator.binomial(10, 0.2, 200), generator.binomial(10, 0.99, 200)) / 10
        found, truth = share_of(values, 10), 0.06 * 0.2 + 0.94 * 0.99
        covered.append(found.low <= truth <= found.high)
        half = 1.96 * (found.value * (1 - found.value) / 2000) ** 0.5
        naive.append(abs(found.value - truth) <= half)
    assert 0.93 <= np.mean(covered) <= 0.98
    assert np.mean(naive) < 0.8
    assert share_of(np.ones(30), 10).low < 0.9, "30 perfect queries are no certainty"


def clustered(seed: int) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    middles = np.random.default_rng(9).standard_normal((40, 16))
    found = middles[generator.integers(0, 40, 4000)] + 0.8 * generator.standard_normal((4000, 16))
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def test_advice_is_followed_until_a_real_index_finds_enough() -> None:
    """Guards against advice that was never tried: an inverted file with one probe is raised until it holds its goal."""
    vectors, queries = clustered(0), clustered(1)[:100]
    centroids = faiss.IndexFlatIP(16)
    index = faiss.IndexIVFFlat(centroids, 16, 40, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]

    def recall(knobs: Knobs) -> float:
        index.nprobe = knobs.nprobe
        found = index.search(queries, 10)[1]
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), best.tolist(), strict=True)]))

    start = Knobs(kind="ivf", nprobe=1, lists=40)
    first = recall(start)
    assert first < 0.9
    advice = climb(start, first, 0.97, recall)
    assert advice is not None and advice.enough and recall(advice.knobs) == advice.recall >= 0.97
    half = recall(Knobs(kind="ivf", nprobe=advice.knobs.nprobe // 2, lists=40))
    assert half < 0.97, "no more than is needed"
    never = climb(start, first, 1.01, recall)
    assert never is not None and not never.enough and never.knobs.nprobe == 40, "it ends when all lists are read"
    assert climb(start, 0.98, 0.97, recall) is None


@pytest.mark.parametrize(
    ("knobs", "raised"),
    [
        (Knobs(kind="hnsw", ef_search=200), "stillroom index tune --kind hnsw --ef-search 400"),
        (Knobs(kind="ivf", nprobe=8, lists=500), "stillroom index tune --kind ivf --nprobe 16"),
        (Knobs(kind="ivf", nprobe=8, lists=12), "stillroom index tune --kind ivf --nprobe 12"),
        (Knobs(kind="pq", nprobe=8, candidates=200, lists=500), "stillroom index tune --kind pq --nprobe 16 --candidates 400"),
        (Knobs(kind="sq4", candidates=200), "stillroom index tune --kind sq4 --candidates 400"),
    ],
)  # fmt: skip
def test_what_is_raised_follows_the_kind(knobs: Knobs, raised: str) -> None:
    """Guards against advice to turn a knob that a kind does not have."""
    better = suggest(knobs, 0.94, 0.97)
    assert better is not None and better.command == raised
    assert suggest(knobs, 0.97, 0.97) is None and suggest(Knobs(), 0.5, 0.97) is None


def test_a_verdict_needs_its_whole_interval() -> None:
    """Guards against an alarm after three unlucky queries, and silence after a thousand."""
    assert judge(Share(0.97, 0.9, 0.99), 0.97, Knobs(), None, 30) is None
    unsure = judge(Share(0.96, 0.93, 0.98), 0.97, Knobs(), None, 40)
    assert unsure is not None and unsure.level == "remark" and "40 queries do not prove it" in unsure.text
    sure = judge(Share(0.94, 0.92, 0.96), 0.97, Knobs(), None, 400)
    assert sure is not None and sure.level == "wrong"
    assert sure.text == "Recall@10 0.940 [0.920, 0.960] is below 0.97"


def test_a_healthy_index(home: Path) -> None:
    """Guards against false alarms, and a report that leaves out what was asked for."""
    done = doctor(home)
    assert done.exit_code == 0, done.output
    lines = dict(line.split(maxsplit=1) for line in done.output.splitlines()[:-1])
    assert list(lines) == [
        "device", "vectors", "words", "recall@10", "asked", "speed", "store.sqlite3", "index.faiss", "index.tantivy",
    ]  # fmt: skip
    assert done.output.splitlines()[-1] == "well"
    assert "0 queries of yours, fewer than 30, and 200 beginnings of passages" in lines["asked"]
    found = json.loads(doctor(home, "--json").output)
    assert found["well"] and found["findings"] == [] and found["measures"]["recall"]["value"] > 0.97
    assert found["bytes"]["index.faiss"] == (home / "index.faiss").stat().st_size
    assert found["dead"] == {"vectors": 0.0, "words": 0.0, "store": found["dead"]["store"]}
    assert 0 < found["measures"]["index_latency"]["p50"] <= found["measures"]["index_latency"]["p99"]


def test_own_queries_are_asked_alone_when_there_are_enough(home: Path) -> None:
    """Guards against a recall of titles that passes for one of the owner's queries."""
    with Device.open(home) as device:
        device.record([(f"query {n}", f"p{n}") for n in range(29)] + [("query 3", "p4")])
        texts, sample = sampled(device, 0)
        assert (sample.own, sample.stand_ins) == (29, 171) and texts[0] == "query 3"
        assert len(set(texts)) == 200 and all(re.fullmatch(r"The p\d+ is an animal.", text) for text in texts[29:])
        device.record([("query 29", "p0")])
        texts, sample = sampled(device, 0)
        assert (sample.own, sample.stand_ins) == (30, 0) and len(set(texts)) == 30
    assert "30 queries of yours whose results you opened" in doctor(home).output


def test_a_real_index_that_misses_is_told_what_to_raise(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against advice that was not measured on this index, and a command that does not help."""
    vectors = np.repeat(clustered(0), 2, axis=1) / np.sqrt(np.float32(2))  # 4,000 of 32 dimensions
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        device.add(passages([f"p{n}" for n in range(4000)]), vectors)
        device.index_settings = IndexSettings(kind="ivf", nprobe=1)
        with device.indexes.current(dense=True, text=False) as current:
            found = compare(device.store, current, vectors[:200], 0.97)
        assert found.knobs.kind == "ivf" and found.recall is not None and found.recall.high < 0.97
        assert found.advice is not None and found.advice.enough and found.findings[0].level == "wrong"
        assert f"`stillroom index tune --kind ivf --nprobe {found.advice.knobs.nprobe}`" in found.findings[0].remedy
        device.index_settings = IndexSettings(kind="ivf", nprobe=found.advice.knobs.nprobe)
        with device.indexes.current(dense=True, text=False) as current:
            mended = compare(device.store, current, vectors[:200], 0.97)
        assert mended.recall is not None and mended.recall.value >= 0.97 and mended.findings == ()


def test_an_empty_index_is_well(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a traceback before the first document."""
    Device.create(tmp_path / "home", tiny_release, link=True).close()
    done = doctor(tmp_path / "home")
    assert done.exit_code == 0 and done.output.splitlines()[-1] == "well", done.output


def test_an_index_that_was_behind_says_so(home: Path, tiny_release: Release) -> None:
    """Guards against states that are read after the search that mends them."""
    with Device.open(home) as device:
        device.add(passages(["new"]), units(1, tiny_release.dimension, seed=5))
        found = examine(device)
        assert found.states == {"vectors": "stale", "words": "stale"} and found.well
        assert examine(device).states == {"vectors": "current", "words": "current"}
        assert device.cache.counts.entries == 0, "the doctor's searches are not kept"


def sql(home: Path, statement: str, *values: object) -> None:
    db = sqlite3.connect(home / "store.sqlite3")
    db.execute(statement, values)
    db.commit()
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def tear(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_a_page(home: Path) -> None:
    path = home / "store.sqlite3"
    content = bytearray(path.read_bytes())
    db = sqlite3.connect(path)
    [(page,)] = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'passages_by_digest'")
    [(size,)] = db.execute("PRAGMA page_size")
    db.close()
    cells = page * size - 80  # they lie at a page's end
    content[cells : cells + 40] = bytes(40)
    path.write_bytes(content)


def swap_vectors(home: Path) -> None:
    """The store's vectors no longer are those that the index was built from."""
    sql(home, "UPDATE vectors SET codes = (SELECT codes FROM vectors v WHERE v.row = 1 + (vectors.row * 7) % 300)")


def alter_release(home: Path) -> None:
    link = home / "release"
    copy = shutil.copytree(link, home.parent / "copy")
    link.unlink()
    link.symlink_to(copy)
    tear(copy / "onnx/model_qint8_avx512_vnni.onnx")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda home: tear(home / "index.faiss"), "the index of vectors was damaged"),
        (lambda home: tear(next((home / "index.tantivy").glob("*/*.idx"))), "the index of words was damaged"),
        (lambda home: sql(home, "DELETE FROM vectors WHERE row = 7"), "1 passages have no vector"),
        (lambda home: sql(home, "UPDATE vectors SET codes = x'00' WHERE row < 3"), "2 vectors are not of the store's"),
        (lambda home: sql(home, "UPDATE passages SET text = 'x' WHERE id = 'p9'"), "1 passages are not what was stored: 'p9'"),
        (lambda home: sql(home, "INSERT INTO feedback VALUES ('a', 'gone')"), "1 opened results are of passages that are gone"),
        (cut_a_page, "SQLite finds"),
        (lambda home: os.chmod(home, 0o755), "others may look into"),
        (swap_vectors, "is below 0.97"),
        (alter_release, "has been altered"),
    ],
)  # fmt: skip
def test_each_illness_is_found(home: Path, damage: Callable[[Path], object], said: str) -> None:
    """Guards against a doctor that calls everything well; each case is one check that could be missing."""
    damage(home)
    done = doctor(home)
    assert done.exit_code == 1 and said in done.output, done.output
    assert "to mend" in done.output.splitlines()[-1] and "Traceback" not in done.output
    assert not json.loads(doctor(home, "--json").output)["well"] or "was damaged" in said, "a torn index is mended now"


def test_leftovers_are_a_remark(home: Path) -> None:
    """Guards against an alarm about work in progress, and orphans that nobody ever hears of."""
    put = "INSERT INTO staged VALUES (?, 0.01, ?, ?)"
    sql(home, put, b"young", bytes(32), time.time_ns())
    assert "wait for documents" not in doctor(home).output
    sql(home, put, b"old", bytes(32), time.time_ns() - 2 * 86_400 * 10**9)
    done = doctor(home)
    assert done.exit_code == 0 and "1 vectors wait for documents that were not finished for a day" in done.output
