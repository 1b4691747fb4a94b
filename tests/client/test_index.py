"""Every kind of vector index finds what exact search finds, whatever came, went or is filtered; a file is whole or refused."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stillroom_client.history import Mark
from stillroom_client.index import VectorIndex
from stillroom_client.index_base import Base, Rows, Vectors
from stillroom_client.index_plan import FLAT_LIMIT, KINDS, LEARNT_LIMIT, IndexSettings, Kind
from stillroom_client.store import Generation

ROOT = Path(__file__).resolve().parents[2]
DIM = 384
NOW = Generation(3, "stamp of three")


def units(count: int, *, seed: int = 0, dim: int = DIM) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)) + 0.5
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def based(rows: Rows, vectors: Vectors, kind: Kind = "flat") -> Base:
    return Base.build(kind, NOW, Mark(int(rows.max(initial=0)), 0), len(rows), vectors, [(rows, vectors)])


def built(count: int, **options: int) -> Base:
    return based(np.arange(count) * 7 + 5, units(count, **options))


class Searcher:
    """An index beside the vectors that it was made of, so that what it finds can be compared with all there is."""

    def __init__(self, index: VectorIndex, rows: Rows, vectors: Vectors, kind: Kind = "flat", **asked: int) -> None:
        self.index, self.rows, self.vectors = index, rows, vectors
        self.effort = IndexSettings(kind=kind, **asked).effort(kind, index.base.lists)

    def found(self, queries: Vectors, k: int, rows: Rows | None = None) -> tuple[Vectors, Rows]:
        return self.index.search(queries, k, rows, effort=self.effort, stored=self.stored)

    def stored(self, rows: Rows) -> Vectors:
        assert (np.diff(rows) > 0).all()
        return self.vectors[np.searchsorted(self.rows, rows)]

    def exact(self, queries: Vectors, k: int, among: Rows) -> Rows:
        scores = queries @ self.stored(among).T
        best: Rows = among[np.argsort(-scores, axis=1)[:, :k]]
        return best


def of(base: Base, rows: Rows, vectors: Vectors, **asked: int) -> Searcher:
    return Searcher(VectorIndex.of(base, np.zeros(0, np.int64)), rows, vectors, base.kind, **asked)


def recall(found: Rows, exact: Rows) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


@pytest.mark.parametrize("count", [1, 2, 50, 2000])
def test_finds_what_exact_search_finds(count: int) -> None:
    """Guards against ranges trained on too few rows: then recall falls below 0.96 and scores are off by 0.05."""
    rows, vectors, queries = np.arange(count) * 7 + 5, units(count), units(100, seed=1)
    searcher = of(based(rows, vectors), rows, vectors)
    scores, found = searcher.found(queries, 10)
    assert scores.shape == found.shape == (100, min(10, count))
    assert recall(found, searcher.exact(queries, 10, rows)) >= 0.97
    places = (found - 5) // 7
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, places, 1), atol=0.004)
    assert (np.diff(scores, axis=1) <= 0).all()


COUNT = 6_000


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def of_kind(kind: Kind) -> Searcher:
    """Two thirds in the base, the rest came later in two parts, and every ninth row went."""
    rows, vectors = np.arange(COUNT) * 3 + 1, clustered(COUNT)
    first, second = COUNT * 2 // 3, COUNT * 5 // 6
    base = based(rows[:first], vectors[:first], kind)
    index = VectorIndex.of(base, np.zeros(0, np.int64))
    for stop in (second, COUNT):
        start = np.searchsorted(rows, index.row, side="right")
        index = index.advanced(Generation(9, "later"), [(rows[start:stop], vectors[start:stop])], rows[:stop:9])
    return Searcher(index, rows, vectors, kind, nprobe=48)


def clustered(count: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Around 60 centres, as texts are around topics: evenly spread vectors have no near ones to find."""
    rng = np.random.default_rng(seed)
    vectors = np.random.default_rng(5).standard_normal((60, 48))[rng.integers(0, 60, count)]
    vectors = vectors + rng.standard_normal((count, 48))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def test_every_kind_finds_what_came_and_not_what_went(of_kind: Searcher) -> None:
    """Guards against a tail that is forgotten or counted twice, and against removed passages that are served."""
    live = np.setdiff1d(of_kind.rows, of_kind.rows[::9])
    queries = clustered(200, seed=1)
    scores, found = of_kind.found(queries, 10)
    assert of_kind.index.count == len(live) and found.shape == (200, 10)
    assert np.isin(found, live).all() and (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(row)) == 10 for row in found.tolist())
    assert recall(found, of_kind.exact(queries, 10, live)) >= 0.95
    assert 0.2 < np.mean(found > of_kind.index.base.mark.row) < 0.5  # both parts are searched


@pytest.mark.parametrize("share", [0.9, 0.3, 0.03, 0.0])
def test_every_kind_searches_among_the_rows_of_a_filter(of_kind: Searcher, share: float) -> None:
    """Guards against a graph or lists that are left before the few rows of a narrow filter are met."""
    live, queries = np.setdiff1d(of_kind.rows, of_kind.rows[::9]), clustered(50, seed=2)
    among = np.sort(np.random.default_rng(3).choice(live, max(1, int(share * len(live))), replace=False))
    _, found = of_kind.found(queries, 10, among)
    assert found.shape == (50, min(10, len(among))) and np.isin(found, among).all()
    assert recall(found, of_kind.exact(queries, 10, among)) >= 0.95


def test_every_kind_gives_all_it_has_when_asked_for_more(of_kind: Searcher) -> None:
    """Guards against FAISS' -1 for "nothing more met", and against a depth that no effort reaches."""
    live = np.setdiff1d(of_kind.rows, of_kind.rows[::9])
    _, found = of_kind.found(clustered(2, seed=4), COUNT + 10)
    assert found.shape == (2, len(live)) and all(set(row) == set(live.tolist()) for row in found.tolist())


def test_every_kind_is_saved_and_brought_forward(of_kind: Searcher, kind: Kind, tmp_path: Path) -> None:
    """Guards against a file that loses what its kind learnt, and a tail that is taken in under other row numbers."""
    base, rows, vectors = of_kind.index.base, of_kind.rows, of_kind.vectors
    base.save(tmp_path / "index.faiss")
    loaded = Base.load(tmp_path / "index.faiss")
    assert isinstance(loaded, Base) and (loaded.kind, loaded.mark, loaded.generation) == (kind, base.mark, NOW)
    queries = clustered(100, seed=5)
    before, after = of(base, rows, vectors), of(loaded, rows, vectors)
    for ours, theirs in zip(before.found(queries, 10), after.found(queries, 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    start, later = len(base.rows), Generation(8, "b")
    longer = loaded.extended(later, Mark(int(rows[-1]), 4), [(rows[start:], vectors[start:])])
    assert (longer.generation, longer.mark) == (later, Mark(int(rows[-1]), base.mark.removal))
    searcher = of(longer, rows, vectors, nprobe=48)
    assert recall(searcher.found(queries, 10)[1], searcher.exact(queries, 10, rows)) >= 0.95


def test_more_effort_finds_more() -> None:
    """Guards against settings that FAISS never sees."""
    rows, vectors, queries = np.arange(COUNT), clustered(COUNT), clustered(100, seed=1)
    for kind, knob, low, high in (
        ("hnsw", "ef_search", 10, 400),
        ("ivf", "nprobe", 1, 100),
        ("pq", "candidates", 10, 500),
    ):
        base = based(rows, vectors, kind)  # type: ignore[arg-type]
        others = {"nprobe": 100} if knob == "candidates" else {}
        found = [of(base, rows, vectors, **others, **{knob: value}) for value in (low, high)]
        poor, good = (recall(s.found(queries, 10)[1], s.exact(queries, 10, rows)) for s in found)
        assert poor + 0.01 < good and good > 0.95, (kind, poor, good)


def test_the_kind_follows_from_the_size_unless_it_is_asked_for() -> None:
    """Guards against lists that are learnt from a handful of vectors, and against a graph where looking at all is faster."""
    auto, asked = IndexSettings(), IndexSettings(kind="pq")
    assert [auto.kind_for(n) for n in (0, LEARNT_LIMIT, FLAT_LIMIT, FLAT_LIMIT + 1)] == ["flat"] * 3 + ["hnsw"]
    assert [asked.kind_for(n) for n in (0, LEARNT_LIMIT, LEARNT_LIMIT + 1)] == ["flat", "flat", "pq"]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 40), k=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_never_returns_a_row_that_does_not_exist(count: int, k: int, seed: int) -> None:
    """Guards against FAISS' -1 for "nothing found", which would select the last passage of a list."""
    rows, vectors = np.arange(count) * 7 + 5, units(count, seed=seed, dim=8)
    scores, found = of(based(rows, vectors), rows, vectors).found(units(3, seed=seed + 1, dim=8), k)
    assert scores.shape == found.shape == (3, min(k, count))
    assert all(len(set(row)) == len(row) and set(row) <= set(rows.tolist()) for row in found.tolist())


def test_a_saved_index_answers_as_before(tmp_path: Path) -> None:
    """Guards against a file that loses row numbers or ranges, and against other accounts reading it."""
    rows, vectors, queries = np.arange(300) * 7 + 5, units(300), units(20, seed=1)
    index = based(rows, vectors)
    index.save(tmp_path / "index.faiss")
    loaded = Base.load(tmp_path / "index.faiss")
    assert isinstance(loaded, Base) and (len(loaded.rows), loaded.generation) == (300, NOW)
    before, after = of(index, rows, vectors), of(loaded, rows, vectors)
    for ours, theirs in zip(before.found(queries, 10), after.found(queries, 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert stat.S_IMODE((tmp_path / "index.faiss").stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["index.faiss"]
    assert faiss.read_index(str(tmp_path / "index.faiss")).ntotal == 300


def test_every_truncation_is_torn(tmp_path: Path) -> None:
    """Guards against a half-written file that FAISS reads past its end."""
    path = tmp_path / "index.faiss"
    assert Base.load(path) == "missing"
    built(4, dim=8).save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert Base.load(path) == "torn", length


def test_every_altered_byte_is_torn(tmp_path: Path) -> None:
    """Guards against flipped bits in vectors, row numbers, footer or tail that would be served as truth."""
    path = tmp_path / "index.faiss"
    built(4, dim=8).save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert Base.load(path) == "torn", place


_SAVER = """
import os, signal, sys
from pathlib import Path
from tests.client.test_index import built
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
setattr(*{"fsync": (os, "fsync"), "rename": (Path, "replace")}[sys.argv[2]], kill)
built(500).save(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_sigkill_while_saving_leaves_the_old_index(tmp_path: Path, moment: str) -> None:
    """Guards against a crash that destroys a good index, and against leftovers that stop the next save."""
    path = tmp_path / "index.faiss"
    built(10).save(path)
    command = [sys.executable, "-c", _SAVER, str(path), moment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.iterdir())) == 2
    old = Base.load(path)
    assert isinstance(old, Base) and len(old.rows) == 10
    built(20).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["index.faiss"]
    new = Base.load(path)
    assert isinstance(new, Base) and len(new.rows) == 20


def test_saving_over_a_read_only_leftover(tmp_path: Path) -> None:
    """Guards against an error of the file system that is swallowed: the caller must know that nothing was saved."""
    (tmp_path / "index.faiss.partial").mkdir()
    with pytest.raises(OSError):
        built(3).save(tmp_path / "index.faiss")
    assert os.listdir(tmp_path) == ["index.faiss.partial"]


def test_a_search_leaves_the_threads_of_other_libraries_alone() -> None:
    """FAISS and torch share one OpenMP: a search that sets one thread for good halves the speed of all training after it."""
    vectors = np.eye(8, 32, dtype=np.float32)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        of(based(np.arange(8), vectors), np.arange(8), vectors).found(vectors, 3)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)
