"""The derived index finds what exact search finds, and is used only for the generation it was built from."""

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

from stillroom_client.index import VectorIndex
from stillroom_client.store import Generation

ROOT = Path(__file__).resolve().parents[2]
DIM = 384
NOW = Generation(3, "stamp of three")


def units(count: int, *, seed: int = 0, dim: int = DIM) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)) + 0.5
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def built(count: int, **options: int) -> VectorIndex:
    return VectorIndex.build(np.arange(count) * 7 + 5, units(count, **options), NOW)


@pytest.mark.parametrize("count", [1, 2, 50, 2000])
def test_finds_what_exact_search_finds(count: int) -> None:
    """Guards against ranges trained on too few rows: then recall falls below 0.96 and scores are off by 0.05."""
    vectors, queries = units(count), units(100, seed=1)
    exact = queries @ vectors.T
    best = np.argsort(-exact, axis=1)[:, :10]
    scores, rows = built(count).search(queries, 10)
    assert scores.shape == rows.shape == (100, min(10, count))
    places = (rows - 5) // 7
    recall = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(places, best, strict=True)])
    assert recall >= 0.97
    np.testing.assert_allclose(scores, np.take_along_axis(exact, places, 1), atol=0.004)
    assert (np.diff(scores, axis=1) <= 0).all()


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 40), k=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_never_returns_a_row_that_does_not_exist(count: int, k: int, seed: int) -> None:
    """Guards against FAISS' -1 for "nothing found", which would select the last passage of a list."""
    index = built(count, seed=seed, dim=8)
    scores, rows = index.search(units(3, seed=seed + 1, dim=8), k)
    assert scores.shape == rows.shape == (3, min(k, count))
    assert all(len(set(row)) == len(row) and set(row) <= {n * 7 + 5 for n in range(count)} for row in rows.tolist())


def test_a_saved_index_answers_as_before(tmp_path: Path) -> None:
    """Guards against a file that loses row numbers or ranges, and against other accounts reading it."""
    index, queries = built(300), units(20, seed=1)
    index.save(tmp_path / "index.faiss")
    loaded = VectorIndex.load(tmp_path / "index.faiss", NOW)
    assert isinstance(loaded, VectorIndex) and (loaded.count, loaded.generation) == (300, NOW)
    for ours, theirs in zip(index.search(queries, 10), loaded.search(queries, 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert stat.S_IMODE((tmp_path / "index.faiss").stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["index.faiss"]
    assert faiss.read_index(str(tmp_path / "index.faiss")).ntotal == 300


def test_missing_and_stale_are_told_apart(tmp_path: Path) -> None:
    """Guards against an index of another generation that is served, also one with the same number after a restore."""
    path = tmp_path / "index.faiss"
    assert VectorIndex.load(path, NOW) == "missing"
    built(10).save(path)
    assert VectorIndex.load(path, Generation(4, "stamp of four")) == "stale"
    assert VectorIndex.load(path, Generation(3, "another history")) == "stale"
    assert isinstance(VectorIndex.load(path, NOW), VectorIndex)


def test_every_truncation_is_torn(tmp_path: Path) -> None:
    """Guards against a half-written file that FAISS reads past its end."""
    path = tmp_path / "index.faiss"
    built(4, dim=8).save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert VectorIndex.load(path, NOW) == "torn", length


def test_every_altered_byte_is_torn(tmp_path: Path) -> None:
    """Guards against flipped bits in vectors, row numbers, footer or tail that would be served as truth."""
    path = tmp_path / "index.faiss"
    built(4, dim=8).save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert VectorIndex.load(path, NOW) == "torn", place


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
    old = VectorIndex.load(path, NOW)
    assert isinstance(old, VectorIndex) and old.count == 10
    built(20).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["index.faiss"]
    new = VectorIndex.load(path, NOW)
    assert isinstance(new, VectorIndex) and new.count == 20


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
        VectorIndex.build(np.arange(8), vectors, NOW).search(vectors, 3)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)
