"""The full-text index finds what the store holds, follows it, and is never served half-written or out of date."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.client.devices import ROOT, units

from stillroom_client import text_index
from stillroom_client.derived import Indexes
from stillroom_client.home import TEXT_INDEX_NAME
from stillroom_client.store import Generation, Store
from stillroom_client.text_index import TextIndex, read_seal, write_index
from stillroom_shared.corpus import Passage

DIM = 8
TEXTS = {
    "tapir": "Tapirs were eating leaves beside the river.",
    "infer": "infer_compression(path) tells how a file is compressed.",
    "parse": "Call parseHTTPHeader before HTTPServer starts.",
    "split": "To infer something about compression is another matter.",
    "accent": "Müller wrote about café culture.",
    "ideographs": "東京は日本の首都です。",
}


def passages(texts: dict[str, str]) -> list[Passage]:
    return [Passage(name, "zoo", text) for name, text in texts.items()]


def store_of(folder: Path, texts: dict[str, str]) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    Store.create(folder / "store.sqlite3", dimension=DIM)
    store = Store(folder / "store.sqlite3")
    put(store, texts)
    return store


def put(store: Store, texts: dict[str, str]) -> None:
    store.put(passages(texts), units(len(texts), DIM))


def found(folder: Path, store: Store, query: str, depth: int = 1000) -> list[str]:
    """Ids, best first, by fresh eyes."""
    with Indexes(folder, store).current(dense=False, text=True) as current:
        assert current.words is not None
        rows = current.words.search(query, depth)[1].tolist()
        return [store.names([row])[row] for row in rows]


def state(folder: Path, store: Store) -> str:
    with store.reading() as generation:
        return Indexes(folder, store).states(generation)[1]


@pytest.mark.parametrize(
    ("query", "best"),
    [
        ("tapir eats a leaf", "tapir"),
        ("RIVER", "tapir"),
        ("infer_compression", "infer"),
        ("compress files", "infer"),
        ("inferring something", "split"),
        ("parseHTTPHeader", "parse"),
        ("parse header", "parse"),
        ("http_header", "parse"),
        ("httpserver", "parse"),
        ("muller cafe", "accent"),
        ("首都", "ideographs"),
        ("how", "infer"),
    ],
)
def test_words_forms_and_identifiers_are_found(tmp_path: Path, query: str, best: str) -> None:
    """Guards against identifiers that only their exact spelling finds, and plurals that nothing finds."""
    assert found(tmp_path, store_of(tmp_path, TEXTS), query)[0] == best


def test_a_whole_identifier_comes_before_its_parts(tmp_path: Path) -> None:
    """Guards against `infer_compression` drowning among texts that say infer and compression more often."""
    noise = {f"n{n}": "To infer compression, infer what compression compresses. " * 2 for n in range(20)}
    store = store_of(
        tmp_path, {"def": "def infer_compression(path): a long text about many other things here", **noise}
    )
    assert found(tmp_path, store, "infer_compression")[0] == "def"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="ab\"'()[]{}:+-!^~*?\\/ANDORTO<>= \x00\ud800", max_size=40))
def test_every_query_is_plain_text(query: str) -> None:
    """Guards against an error of a query language, a wildcard that means something, and lone surrogates."""
    scores, rows = INDEX.search(query, 10)
    assert len(scores) == len(rows) <= len(TEXTS)
    assert (np.diff(scores) <= 0).all()


INDEX = TextIndex.in_memory(Generation(1, "a"), enumerate(passages(TEXTS), start=1))


def test_an_index_brought_forward_answers_like_one_built_anew(tmp_path: Path) -> None:
    """Guards against passages that an increment forgets, keeps or doubles, through adding, replacing and removing."""
    store = store_of(tmp_path, {f"p{n}": f"word{n} common {'even' if n % 2 == 0 else 'odd'}" for n in range(200)})
    for turn in range(4):
        found(tmp_path, store, "common")
        put(store, {f"q{turn}": f"late{turn} common even", f"p{turn}": f"changed{turn} common odd"})
        store.remove([f"p{100 + turn}"])
        with store.reading():
            expected = store.ids()
        assert sorted(found(tmp_path, store, "common")) == sorted(expected)
        for query in (f"late{turn}", f"changed{turn}", f"word{turn}", f"word{100 + turn}", "word150", "even"):
            (built := tmp_path / f"anew-{turn}").mkdir(exist_ok=True)
            assert set(found(tmp_path, store, query)) == set(found(built, store, query)), query
            shutil.rmtree(built / TEXT_INDEX_NAME)
    [place] = (tmp_path / TEXT_INDEX_NAME).iterdir()
    seal = read_seal(place)
    assert seal is not None and seal.dead == 8, "it was built anew, so nothing was shown"


def test_an_increment_writes_little(tmp_path: Path) -> None:
    """Guards against an index of a hundred thousand passages that is written again for one new note."""
    store = store_of(tmp_path, {f"p{n}": f"word{n} common" for n in range(300)})
    found(tmp_path, store, "common")
    [old] = (tmp_path / TEXT_INDEX_NAME).iterdir()
    before = {name: (old / name).stat().st_ino for name in map(str, read_seal(old).files)}  # type: ignore[union-attr]
    put(store, {"new": "fresh"})
    assert found(tmp_path, store, "fresh") == ["new"]
    [now] = (tmp_path / TEXT_INDEX_NAME).iterdir()
    kept = [name for name, inode in before.items() if (now / name).exists() and (now / name).stat().st_ino == inode]
    assert len(kept) >= 6 and now != old


def test_removed_words_leave_the_files_in_time(tmp_path: Path) -> None:
    """Guards against words of removed passages that pile up in the index for ever."""
    store = store_of(tmp_path, {f"p{n}": f"secret{n} common" for n in range(100)})
    found(tmp_path, store, "common")
    store.remove([f"p{n}" for n in range(10)])
    found(tmp_path, store, "common")
    [place] = (tmp_path / TEXT_INDEX_NAME).iterdir()
    seal = read_seal(place)
    assert seal is not None and seal.dead == 0 and seal.count == 90


def test_missing_torn_and_stale_are_told_apart_and_mended(tmp_path: Path) -> None:
    """Guards against a damaged index that is served, or that stops the search."""
    store = store_of(tmp_path, TEXTS)
    assert state(tmp_path, store) == "missing"
    assert found(tmp_path, store, "tapirs") == ["tapir"] and state(tmp_path, store) == "current"
    put(store, {"okapi": "An okapi."})
    assert state(tmp_path, store) == "stale"
    assert found(tmp_path, store, "okapi") == ["okapi"]
    [place] = (tmp_path / TEXT_INDEX_NAME).iterdir()
    for path in sorted(place.iterdir()):
        if path.name.startswith(".tantivy"):
            continue
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[: len(whole) // 2], b"", bytes([whole[0] ^ 1]) + whole[1:], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert state(tmp_path, store) == "torn", path.name
            path.write_bytes(whole)
    assert state(tmp_path, store) == "current"
    shutil.copy(place / "meta.json", place / "seal.json")
    assert state(tmp_path, store) == "torn"
    assert found(tmp_path, store, "okapi") == ["okapi"] and state(tmp_path, store) == "current"


def test_an_index_of_another_history_is_built_anew(tmp_path: Path) -> None:
    """Guards against a restored backup that meets an index of the passages it lost, under the same row numbers."""
    store = store_of(tmp_path, TEXTS)
    found(tmp_path, store, "tapir")
    store.close()
    shutil.copy(tmp_path / "store.sqlite3", tmp_path / "backup")
    store = Store(tmp_path / "store.sqlite3")
    put(store, {"lost": "a lost okapi"})
    assert found(tmp_path, store, "okapi") == ["lost"]
    store.close()
    for name in ("store.sqlite3", "store.sqlite3-wal", "store.sqlite3-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "backup", tmp_path / "store.sqlite3")
    store = Store(tmp_path / "store.sqlite3")
    put(store, {"kept": "a kept quokka"})
    assert state(tmp_path, store) == "stale"
    assert found(tmp_path, store, "quokka") == ["kept"] and found(tmp_path, store, "okapi lost") == []


def test_a_version_of_another_analysis_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against queries that are analysed in one way and documents in another, after an upgrade."""
    store = store_of(tmp_path, TEXTS)
    found(tmp_path, store, "tapir")
    monkeypatch.setattr(text_index, "VERSION", text_index.VERSION + 1)
    assert state(tmp_path, store) == "torn"
    assert found(tmp_path, store, "tapir") == ["tapir"] and state(tmp_path, store) == "current"


def test_a_full_disk_does_not_stop_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against words that find nothing because what could be rebuilt any time cannot be saved."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = store_of(tmp_path, TEXTS)
    monkeypatch.setattr("stillroom_client.derived.write_words", full)
    assert found(tmp_path, store, "tapir") == ["tapir"] and state(tmp_path, store) == "missing"


def test_a_reader_keeps_its_generation_while_another_is_written(tmp_path: Path) -> None:
    """Guards against files that are taken away from under a search."""
    store = store_of(tmp_path, TEXTS)
    with Indexes(tmp_path, store).current(dense=False, text=True) as current:
        words = current.words
    put(store, {"tapir": "changed"})
    with store.writing() as generation:
        write_index(tmp_path / TEXT_INDEX_NAME, store, generation)
    assert words is not None and len(words.search("tapir river", 10)[1]) == 1


def test_the_files_are_for_their_owner_only(tmp_path: Path) -> None:
    """Guards against other accounts that read which words a document has."""
    store = store_of(tmp_path, TEXTS)
    found(tmp_path, store, "tapir")
    put(store, {"more": "more"})
    found(tmp_path, store, "tapir")
    for path in (tmp_path / TEXT_INDEX_NAME, *(tmp_path / TEXT_INDEX_NAME).rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("share", [0.002, 0.02, 0.3, 1.0])
def test_a_filter_leaves_the_ranking_as_it_is(tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a filter applied to the first hits only, which loses those that come later, and against either way."""
    random = np.random.default_rng(0)
    words = [f"w{n}" for n in range(30)]
    texts = {f"p{n}": " ".join(random.choice(words, random.integers(3, 9))) for n in range(1000)}
    store = store_of(tmp_path, texts)
    rows = np.sort(random.choice(np.arange(1, 1001), int(1000 * share), replace=False))
    with Indexes(tmp_path, store).current(dense=False, text=True) as current:
        assert current.words is not None
        for query in ("w1", "w2 w3 w4"):
            scores, everything = current.words.search(query, 1000)
            chosen = np.isin(everything, rows)
            for pushed in (0, 10_000):
                monkeypatch.setattr(text_index, "_PUSHED", pushed)
                for depth in (1, 5, 1000):
                    own_scores, own = current.words.search(query, depth, rows)
                    np.testing.assert_allclose(own_scores, scores[chosen][:depth], rtol=1e-5)
                    assert set(own.tolist()) <= set(rows.tolist()) and len(own) == min(depth, int(chosen.sum()))


def test_a_filter_finds_what_ranks_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a search that stops reading hits before it has those of the filter."""
    monkeypatch.setattr(text_index, "_PUSHED", 0)
    store = store_of(tmp_path, {f"p{n}": "tapir" if n < 900 else "tapir among many other animals" for n in range(1000)})
    with Indexes(tmp_path, store).current(dense=False, text=True) as current:
        assert current.words is not None
        assert len(current.words.search("tapir", 10, np.arange(901, 1001))[1]) == 10


def test_killed_anywhere_it_is_found_whole(tmp_path: Path) -> None:
    """Guards against a death that leaves an index half-written, a passage half-indexed, or a slow next start.

    Every 25th line here; `python -m tests.client.text_index_faults FOLDER 1 300` is the whole sweep.
    """
    command = [sys.executable, "-m", "tests.client.text_index_faults", str(tmp_path), "25", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == [] and result["points"] >= 30
    assert result["states"]["stale"] > 8 and result["states"]["current"] > 3, "the sweep missed the writing or its end"
    assert result["states"]["torn"] == 0
