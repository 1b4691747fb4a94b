"""Documents appear, change and disappear whole; older stores keep what they hold."""

from __future__ import annotations

import dataclasses
import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.client.shelf import DIM, Shelf, vector

from stillroom_client import schema
from stillroom_client.catalog import Catalog
from stillroom_client.documents import Document, Located, Position
from stillroom_client.quantization import quantize
from stillroom_client.store import Change, Feedback, Store, digest_of
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def pieces(path: str, *texts: str) -> list[Located]:
    return [
        Located(Passage(f"{path}#{text}", "me", text, "T"), Position(place=n, line=n + 1), {"section": "T"})
        for n, text in enumerate(texts)
    ]


def doc(path: str, **other: object) -> Document:
    metadata = {"type": "text", "path": path, "year": 2020, **other}
    return Document(path=path, type="text", title=path, digest=b"x", reader="1", metadata=metadata)  # type: ignore[arg-type]


def put(shelf: Shelf, path: str, *texts: str, **other: object) -> Change:
    passages = pieces(path, *texts)
    if fresh := shelf.catalog.lacking([item.passage for item in passages]):
        shelf.catalog.stage(fresh, shelf.embed(fresh))
    return shelf.catalog.put(doc(path, **other), passages)


def generation(shelf: Shelf) -> int:
    with shelf.store.reading() as current:
        return current.number


def test_a_document_is_stored_with_all_that_is_known_of_it(shelf: Shelf) -> None:
    """Guards against positions and metadata that filters and pages need, and that nobody kept."""
    assert put(shelf, "/a", "one", "two") == Change(2, 0, 0)
    rows = shelf.store.rows(["/a#two"])
    found = shelf.catalog.found(rows)[int(rows[0])]
    assert found.passage == Passage("/a#two", "me", "two", "T") and found.document == "/a"
    assert found.position == Position(place=1, line=2) and str(found.position) == "line 2"
    assert found.metadata == {"type": "text", "path": "/a", "year": 2020, "section": "T", "owner": "me"}
    assert [f.passage.text for f in shelf.catalog.passages_of("/a")] == ["one", "two"]
    assert shelf.catalog.document("/a") == doc("/a") and shelf.catalog.types() == {"text": 1}
    np.testing.assert_allclose(shelf.store.vectors(rows)[1][0], vector(found.passage), atol=1 / 200)
    assert shelf.store.query("SELECT count(*) FROM staged") == [(0,)]


def test_the_view_for_filters_sees_documents_and_lone_passages(shelf: Shelf) -> None:
    """Guards against a filter that misses passages added alone, or that sees other values than a hit shows."""
    put(shelf, "/a", "one")
    put(shelf, "/b", "two", year=2024, type="pdf")
    lone = Passage("p", "zoo", "three")
    shelf.store.put([lone], shelf.embed([lone]).vectors)
    query = "SELECT row FROM described WHERE json_extract(metadata, '$.year') >= 2021"
    assert shelf.store.query(query) == [(int(shelf.store.rows(["/b#two"])[0]),)]
    for row, metadata in shelf.store.query("SELECT row, metadata FROM described"):
        assert json.loads(metadata) == shelf.catalog.found([row])[row].metadata
    row = int(shelf.store.rows(["p"])[0])
    assert shelf.catalog.found([row])[row].metadata == {"owner": "zoo"} and not shelf.catalog.found([row])[row].document


def test_what_only_moved_keeps_its_row_and_is_not_embedded(shelf: Shelf) -> None:
    """Guards against a line inserted at the top that re-embeds a book, or that leaves all its positions wrong."""
    put(shelf, "/a", "one", "two")
    row = shelf.store.rows(["/a#two"])[0]
    shelf.embedded.clear()
    before = generation(shelf)
    assert put(shelf, "/a", "zero", "one", "two") == Change(1, 0, 2) and shelf.embedded == ["zero"]
    assert shelf.store.rows(["/a#two"])[0] == row
    assert shelf.catalog.found([row])[row].position.line == 3
    assert generation(shelf) == before + 1
    assert put(shelf, "/a", "zero", "one", "two") == Change(0, 0, 3) and generation(shelf) == before + 1
    assert put(shelf, "/a", "zero", "one", "two", year=1999) == Change(0, 0, 3) and generation(shelf) == before + 2


def test_a_moved_document_takes_its_vectors_along(shelf: Shelf) -> None:
    """Guards against a renamed folder that is embedded again."""
    put(shelf, "/a", "one", "two")
    shelf.embedded.clear()
    assert put(shelf, "/b", "one", "two") == Change(2, 0, 0) and not shelf.embedded
    assert shelf.catalog.remove(["/a"]) == 2 and set(shelf.catalog.documents()) == {"/b"}
    assert shelf.store.count() == 2 and len(shelf.store.vectors()[0]) == 2


def test_what_a_document_loses_is_gone_with_its_feedback(shelf: Shelf) -> None:
    """Guards against deleted paragraphs that are found, or learned from."""
    put(shelf, "/a", "one", "two")
    put(shelf, "/b", "other")
    shelf.store.record([Feedback("q", "/a#one"), Feedback("q", "/a#two"), Feedback("q", "/b#other")])
    assert put(shelf, "/a", "two") == Change(0, 0, 1, 1)
    assert shelf.store.feedback() == [Feedback("q", "/a#two"), Feedback("q", "/b#other")]
    assert shelf.catalog.remove(["/a", "/nowhere"]) == 1 and shelf.store.ids() == ["/b#other"]
    assert shelf.store.feedback() == [Feedback("q", "/b#other")]


def test_an_id_belongs_to_one_document(shelf: Shelf) -> None:
    """Guards against two corpora with the same ids that take passages from each other."""
    put(shelf, "/a", "one")
    stolen = pieces("/a", "one")
    with pytest.raises(DataError, match="'/a#one' occurs in /a and in /b: add them to different homes"):
        shelf.catalog.put(doc("/b"), stolen)
    assert set(shelf.catalog.documents()) == {"/a"}
    with pytest.raises(DataError, match="lost its vector"):
        shelf.catalog.put(doc("/c"), pieces("/c", "never embedded"))
    assert set(shelf.catalog.documents()) == {"/a"} and shelf.store.ids() == ["/a#one"]


def test_a_passage_taken_out_by_hand_comes_back_with_its_file(shelf: Shelf) -> None:
    """Guards against a document that counts as unchanged though part of it is gone."""
    put(shelf, "/a", "one", "two")
    shelf.store.remove(["/a#one"])
    found = shelf.catalog.document("/a")
    assert found is not None and not found.digest


def test_a_store_of_the_first_version_is_upgraded(tmp_path: Path) -> None:
    """Guards against an upgrade that loses documents or feedback, or that embeds everything again."""
    path = tmp_path / "store.sqlite3"
    old = [Passage("/a#one", "me", "one", "T"), Passage("/a#gone", "me", "gone", "T"), Passage("p", "zoo", "lone")]
    codes, scales = quantize(np.array([vector(p) for p in old]))
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID")
        meta = {"schema": 1, "dimension": DIM, "generation": 7, "stamp": "s"}
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        for statement in filter(str.strip, schema.STEPS[0].split(";")):
            db.execute(statement)
        for n, p in enumerate(old):
            values = (n + 1, p.id, p.owner, p.title, p.text, digest_of(p), 7)
            db.execute("INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            db.execute("INSERT INTO vectors VALUES (?, ?, ?)", (n + 1, float(scales[n]), codes[n].tobytes()))
        db.execute("INSERT INTO feedback VALUES ('q', 'p')")
    shelf = Shelf(tmp_path)
    assert generation(shelf) == 7 and shelf.store.ids() == ["/a#one", "/a#gone", "p"]
    assert shelf.store.feedback() == [Feedback("q", "p")] and not shelf.catalog.documents()
    assert put(shelf, "/a", "one", "new") == Change(1, 0, 1, 1) and shelf.embedded == ["new"]
    assert set(shelf.store.ids()) == {"/a#one", "/a#new", "p"} and shelf.store.rows(["/a#one"])[0] == 1
    shelf.store.close()
    Store(path).close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == (schema.VERSION,)


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.client import test_catalog as t
from tests.client.shelf import Shelf
shelf = Shelf(Path(sys.argv[1]))
t.put(shelf, "/kept", "committed")
calls, real = [0], shelf.store.execute_many
def execute_many(query, values):
    calls[0] += 1
    if calls[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(query, values)
shelf.store.execute_many = execute_many
t.put(shelf, "/half", *(f"text {n}" for n in range(50)))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 99])
def test_sigkill_leaves_a_document_whole_or_absent(tmp_path: Path, moment: int) -> None:
    """Guards against half a document that is found after a crash, and against vectors that are made twice."""
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path), str(moment)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    shelf = Shelf(tmp_path)
    whole = moment == 99
    assert shelf.store.count() == len(shelf.store.ids()) == (51 if whole else 1)
    assert set(shelf.catalog.documents()) == ({"/kept", "/half"} if whole else {"/kept"})
    put(shelf, "/half", *(f"text {n}" for n in range(50)))
    assert len(shelf.embedded) == (50 if moment == 1 else 0) and shelf.store.count() == 51


def test_vectors_of_others_are_not_forgotten_at_once(shelf: Shelf) -> None:
    """Guards against one process that throws away what another is about to store."""
    young = pieces("/a", "one", "two")
    shelf.catalog.stage([i.passage for i in young], shelf.embed([i.passage for i in young]))
    shelf.store.query("UPDATE staged SET staged_ns = 1 WHERE digest = ?", (digest_of(young[0].passage),))
    shelf.catalog.unstage()
    assert shelf.catalog.lacking([i.passage for i in young]) == [young[0].passage]


def test_a_document_in_parts_is_unfinished_until_it_is_said_to_be_whole(shelf: Shelf) -> None:
    """Guards against an interrupted corpus that counts as indexed."""
    items = pieces("/c", "one", "two", "three")
    shelf.catalog.stage([i.passage for i in items], shelf.embed([i.passage for i in items]))
    shelf.catalog.put(doc("/c"), items[:2], whole=False)
    found = shelf.catalog.document("/c")
    assert found is not None and not found.digest and shelf.catalog.count(["/c"]) == 2
    shelf.catalog.put(doc("/c"), items[2:], whole=False)
    assert shelf.catalog.finish(doc("/c"), ["/c#one", "/c#three"]) == 1
    assert shelf.catalog.document("/c") == doc("/c") and shelf.catalog.count() == 2


def test_seeing_a_file_again_is_no_change(shelf: Shelf) -> None:
    """Guards against an index that is rebuilt because somebody touched a file."""
    put(shelf, "/a", "one")
    before = generation(shelf)
    shelf.catalog.seen(dataclasses.replace(doc("/a"), modified_ns=5, read_ns=9))
    found = shelf.catalog.document("/a")
    assert found is not None and (found.modified_ns, found.read_ns) == (5, 9) and generation(shelf) == before
    assert isinstance(shelf.catalog, Catalog)
