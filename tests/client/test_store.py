"""The store keeps what was committed, touches only what changed, and forgets what it is told to forget."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from stillroom_client.quantization import dequantize, quantize
from stillroom_client.store import Change, Feedback, Store
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError

DIM = 16


def passages(*names: str, text: str = "A tapir eats leaves, {}.") -> list[Passage]:
    return [Passage(name, "zoo", text.format(name), "Animals") for name in names]


def units(count: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store.create(tmp_path / "store.sqlite3", dimension=DIM)
    return tmp_path / "store.sqlite3"


def test_survives_reopening(path: Path) -> None:
    """Guards against a store that lives in memory only, and against vectors attached to the wrong passage."""
    store = Store(path)
    assert store.put(passages("a", "b", "c"), units(3)) == Change(3, 0, 0)
    store.close()
    store = Store(path)
    rows = store.rows(["c", "a", "b"])
    assert [store.passages(rows)[int(row)] for row in rows] == passages("c", "a", "b")
    found, vectors = store.vectors(rows)
    for name, row in zip(("c", "a", "b"), rows, strict=True):
        np.testing.assert_allclose(vectors[found == row][0], units(3)["abc".index(name)], atol=1 / 254)


def test_one_call_is_one_generation_and_unchanged_passages_are_not_touched(path: Path) -> None:
    """Guards against silent re-embedding of everything, and against an index that is rebuilt for nothing."""
    store = Store(path)
    store.put(passages("a", "b"), units(2))
    with store.reading() as first:
        pass
    rows = store.rows(["a", "b"])
    assert not store.changed(passages("a", "b"))
    assert store.put(passages("a", "b"), units(2, seed=1)) == Change(0, 0, 2)
    with store.reading() as second:
        pass
    assert second == first and (store.rows(["a", "b"]) == rows).all()
    np.testing.assert_allclose(store.vectors()[1], units(2), atol=1 / 254)

    edited = passages("b", text="A tapir swims, {}.") + passages("c")
    assert [p.id for p in store.changed(passages("a") + edited)] == ["b", "c"]
    assert store.put(passages("a") + edited, units(3, seed=2)) == Change(1, 1, 1)
    with store.reading() as third:
        assert third.number == first.number + 1 and third.stamp != first.stamp
    assert store.count() == 3 and store.passages(store.rows(["b"])).popitem()[1].text == "A tapir swims, b."


@pytest.mark.parametrize("field", ["owner", "text", "title"])
def test_every_field_counts_as_a_change(path: Path, field: str) -> None:
    """Guards against an edit of one field that never reaches the store."""
    store = Store(path)
    store.put([Passage("a", "zoo", "text", "title")], units(1))
    other = {"owner": "zoo", "text": "text", "title": "title"} | {field: "different"}
    assert store.changed([Passage("a", **other)]) == [Passage("a", **other)]


def test_a_row_number_is_never_used_again(path: Path) -> None:
    """Guards against a stale index that names a row which meanwhile holds another passage."""
    store = Store(path)
    store.put(passages("a", "b"), units(2))
    last = store.rows(["b"])[0]
    assert store.remove(["b"]) == 1
    store.put(passages("c"), units(1))
    assert store.rows(["c"])[0] > last


def test_refuses_vectors_that_cannot_be_searched(path: Path) -> None:
    """Guards against a NaN that poisons every score, and against unnormalized vectors that always win."""
    store = Store(path)
    for bad in (np.nan, np.inf, -np.inf):
        vectors = units(3)
        vectors[1, 4] = bad
        with pytest.raises(DataError, match=r"'b' has norm (nan|inf)"):
            store.put(passages("a", "b", "c"), vectors)
    with pytest.raises(DataError, match=r"'c' has norm 2\.0"):
        store.put(passages("a", "b", "c"), units(3) * np.array([[1], [1], [2]], np.float32))
    with pytest.raises(DataError, match=r"shape \(3, 15\): 3 passages of this index need \(3, 16\)"):
        store.put(passages("a", "b", "c"), units(3)[:, :15])
    with pytest.raises(DataError, match="'a' occurs twice"):
        store.put(passages("a", "b", "a"), units(3))
    assert store.count() == 0
    with store.reading() as generation:
        assert generation.number == 0


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float32, (3, 7), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_int8_error_stays_within_the_stated_bound(vectors: NDArray[np.float32]) -> None:
    """Guards against a docstring that promises max|x| / 254 while clipping or a shared scale loses more."""
    codes, scales = quantize(vectors)
    back = (codes * scales[:, None]).astype(np.float64)
    bound = np.abs(vectors.astype(np.float64)).max(axis=1, keepdims=True) / 254
    assert (np.abs(back - vectors) <= bound * (1 + 1e-9)).all()
    np.testing.assert_array_equal(dequantize(codes, scales), back.astype(np.float32))


def test_the_bound_is_tight() -> None:
    """Guards against a bound that holds only because it is far too generous: half of it must fail."""
    vectors = units(50)
    error = np.abs(dequantize(*quantize(vectors)) - vectors)
    bound = np.abs(vectors).max(axis=1, keepdims=True) / 254
    assert (error <= bound * (1 + 1e-4)).all() and (error > bound / 2).any()


def test_removal_takes_vectors_and_feedback_along(path: Path) -> None:
    """Guards against a removed document that is still found, or that lives on as a training record."""
    store = Store(path)
    store.put(passages("a", "b"), units(2))
    store.record([Feedback("who eats leaves", "a"), Feedback("who swims", "b")])
    assert store.remove(["a", "unknown"]) == 1
    assert store.ids() == ["b"] and len(store.vectors()[0]) == 1
    assert store.feedback() == [Feedback("who swims", "b")]
    assert store.remove(["unknown"]) == 0


def test_feedback_is_kept_once_at_its_latest(path: Path) -> None:
    """Guards against one habit that fills the training records, and against feedback about nothing."""
    store = Store(path)
    store.put(passages("a", "b"), units(2))
    store.record([Feedback("q", "a"), Feedback("q", "b"), Feedback("q", "a")])
    assert store.feedback() == [Feedback("q", "b"), Feedback("q", "a")]
    with pytest.raises(DataError, match="'z' is not in this index"):
        store.record([Feedback("r", "b"), Feedback("q", "z")])
    assert len(store.feedback()) == 2
    store.put(passages("a", text="Edited, {}."), units(1))
    assert Feedback("q", "a") in store.feedback()


def test_what_is_erased_is_gone_from_the_disk(path: Path) -> None:
    """Guards against a thief who reads erased queries and removed passages in free pages or the write-ahead log."""
    store = Store(path)
    store.put(passages("a", "b", text="Secret number {} is plutonium."), units(2))
    store.record([Feedback("embarrassing question", "b")])
    stored = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"embarrassing question" in stored and b"number a is plutonium" in stored
    store.remove(["a"])
    assert store.erase_feedback() == 1
    assert store.feedback() == []
    left = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"embarrassing question" not in left and b"number a is plutonium" not in left
    assert b"number b is plutonium" in left


def test_what_was_removed_is_gone_from_the_disk_once_compacted(path: Path) -> None:
    """Guards against a removed text that stays in the log for as long as something serves the home."""
    with Store(path) as store, Store(path) as serving:
        store.put(passages("a", "b", text="The secret numbat, {}."), units(2))
        assert serving.count() == 2
        store.remove(["a", "b"])
        store.put(passages("c"), units(1))
        store.shrink()
        assert serving.count() == 1
        assert not [file.name for file in path.parent.iterdir() if b"secret numbat" in file.read_bytes()]


def test_files_are_readable_by_their_owner_only(path: Path) -> None:
    """Guards against other accounts of a shared machine that read the documents from the database or its log."""
    before = os.umask(0)
    try:
        store = Store(path)
        store.put(passages("a"), units(1))
        files = list(path.parent.iterdir())
        assert {file.name for file in files} >= {"store.sqlite3", "store.sqlite3-wal"}
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(before)


def test_a_damaged_file_is_named(tmp_path: Path, path: Path) -> None:
    """Guards against a traceback of the database library, and against an empty index where one was lost."""
    with pytest.raises(DataError, match=r"nowhere\.sqlite3 does not exist"):
        Store(tmp_path / "nowhere.sqlite3")
    (tmp_path / "noise.sqlite3").write_bytes(b"this is no database" * 500)
    with pytest.raises(DataError, match=r"noise\.sqlite3 cannot be used \(file is not a database\)"):
        Store(tmp_path / "noise.sqlite3")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = 9 WHERE key = 'schema'")
    with pytest.raises(DataError, match="schema 9"):
        Store(path)


_WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from stillroom_client import store as module
from stillroom_shared.corpus import Passage
store = module.Store(Path(sys.argv[1]))
vectors = np.eye(16, dtype=np.float32)
store.put([Passage("kept", "zoo", "committed")], vectors[:1])
real = store.advance
def advance(generation):
    number = real(generation)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "early" else None
    return number
store.advance = advance
store.put([Passage(f"lost{n}", "zoo", "half written" * 500) for n in range(16)], vectors)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("moment", "survivors"), [("early", 1), ("late", 17)])
def test_sigkill_keeps_what_was_committed_and_nothing_else(path: Path, moment: str, survivors: int) -> None:
    """Guards against a half-written generation that is served after a crash, and against a lost one."""
    done = subprocess.run([sys.executable, "-c", _WRITER, str(path), moment], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = Store(path)
    assert store.count() == len(store.ids()) == survivors
    with store.reading() as generation:
        assert generation.number == (1 if moment == "early" else 2)
    assert store.put(passages("next"), units(1)) == Change(1, 0, 0)


def _write_many(path: Path, writer: int) -> None:
    store = Store(path)
    for batch in range(10):
        names = [f"{writer}-{batch}-{n}" for n in range(5)]
        store.put(passages(*names), units(5, seed=batch))
    store.close()


def test_processes_write_while_others_read(path: Path) -> None:
    """Guards against lost writes, "database is locked", and a reader that sees part of a batch of five."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path, writer)) for writer in range(2)]
    for process in writers:
        process.start()
    reader, seen = Store(path), set()
    while any(process.is_alive() for process in writers):
        with reader.reading() as generation:
            assert reader.count() == len(reader.ids()) == 5 * generation.number
            seen.add(generation.number)
    assert [process.exitcode for process in writers] == [0, 0]
    assert reader.count() == 100 and len(seen) > 2


def test_threads_share_one_store(path: Path) -> None:
    """Guards against a connection that refuses other threads, and against interleaved transactions."""
    store, failures = Store(path), []

    def work(writer: int) -> None:
        try:
            for batch in range(5):
                store.put(passages(f"{writer}-{batch}"), units(1))
                with store.reading() as generation:
                    assert store.count() == generation.number
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and store.count() == 20


def test_an_exception_inside_a_write_undoes_it(path: Path) -> None:
    """Guards against a failed write that leaves its transaction open and blocks every other process."""
    with pytest.raises(RuntimeError, match="stop"), Store(path).writing():
        raise RuntimeError("stop")
    assert Store(path).put(passages("a"), units(1)) == Change(1, 0, 0)


def test_there_is_one_writer_at_a_time(path: Path) -> None:
    """Guards against two processes that build the index at once, or read a generation that the other replaces."""
    first, second, entered = Store(path), Store(path), threading.Event()

    def write() -> None:
        with second.writing():
            entered.set()

    waiting = threading.Thread(target=write)
    with first.writing():
        waiting.start()
        assert not entered.wait(0.2)
        with Store(path).reading() as generation:
            assert generation.number == 0
    assert entered.wait(30)
    waiting.join()
