"""Passages are what the files say: nothing lost, nothing twice, and bad files named."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from stillroom_client.reading import read_documents
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError

NOTES = """# Tapirs

Tapirs eat leaves.
They swim.

## Where they live ##

In *forests*.


---

Tapirs eat leaves.
"""


def test_paragraphs_carry_their_heading(tmp_path: Path) -> None:
    """Guards against headings that become passages of their own, or that a passage is torn from."""
    (tmp_path / "notes.md").write_text(NOTES, encoding="utf-8")
    [document] = read_documents([tmp_path / "notes.md"], owner="me")
    assert [(p.owner, p.title, p.text) for p in document.passages] == [
        ("me", "Tapirs", "Tapirs eat leaves.\nThey swim."),
        ("me", "Where they live", "In *forests*."),
        ("me", "Where they live", "Tapirs eat leaves."),
    ]
    assert all(p.id.startswith(f"{tmp_path}/notes.md#") for p in document.passages)


def test_a_text_file_has_no_headings(tmp_path: Path) -> None:
    """Guards against reading a comment line of a plain text as a title."""
    (tmp_path / "notes.txt").write_bytes(b"\xef\xbb\xbf# one\r\n\r\ntwo\r\n \r\n\r\ntwo")
    [document] = read_documents([tmp_path / "notes.txt"], owner="me")
    assert [(p.title, p.text) for p in document.passages] == [("", "# one"), ("", "two")]


def test_only_what_was_edited_gets_a_new_id(tmp_path: Path) -> None:
    """Guards against numbering, where one paragraph added at the top re-embeds the whole file."""
    path = tmp_path / "notes.txt"
    path.write_text("first\n\nsecond\n\nthird")
    before = {p.text: p.id for p in read_documents([path], owner="me")[0].passages}
    path.write_text("zeroth\n\nfirst\n\nthird")
    after = {p.text: p.id for p in read_documents([path], owner="me")[0].passages}
    assert after["first"] == before["first"] and after["third"] == before["third"]
    assert after["zeroth"] not in before.values()


def test_the_same_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against ids that depend on how a path was spelt: they would be indexed twice."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.TXT").write_text("text of b")
    (tmp_path / "a.md").write_text("text of a")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    monkeypatch.chdir(tmp_path)
    documents = read_documents([Path("."), Path("deep/../a.md"), tmp_path / "deep"], owner="me")
    assert [p.text for d in documents for p in d.passages] == ["text of a", "text of b"]


def test_a_corpus_keeps_its_ids_and_owners(tmp_path: Path) -> None:
    """Guards against ids that no longer fit the published judgements."""
    rows = [{"_id": "7", "text": "t", "title": "T", "metadata": {"owner": "zoo"}}, {"_id": "8", "text": "u"}]
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "readme.md").write_text("not part of the corpus")
    [document] = read_documents([tmp_path], owner="me")
    assert document.passages == (Passage("7", "zoo", "t", "T"), Passage("8", "me", "u", ""))
    assert document.prefix is None


def test_bad_input_is_named(tmp_path: Path) -> None:
    """Guards against a traceback, and against a file that is skipped in silence."""
    (tmp_path / "broken.jsonl").write_text('{"_id": "1", "text": "fine"}\n{"_id": "2", "text": 5}\n')
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / "one.jsonl").write_text('{"_id": "1", "text": "a"}')
    (tmp_path / "two.jsonl").write_text('{"_id": "1", "text": "b"}')
    (tmp_path / "empty").mkdir()
    for names, message in (
        (["broken.jsonl"], r"broken\.jsonl, line 2, field 'text'"),
        (["latin.txt"], r"latin\.txt cannot be read"),
        (["picture.png"], "of no kind that can be read"),
        (["nowhere.txt"], "does not exist"),
        (["empty"], "holds no corpus.jsonl"),
        (["one.jsonl", "two.jsonl"], "'1' occurs in .*one.jsonl and in .*two.jsonl"),
    ):
        with pytest.raises(DataError, match=message):
            read_documents([tmp_path / name for name in names], owner="me")


def test_a_file_name_that_is_no_text_still_works(tmp_path: Path) -> None:
    """Guards against one badly named file that stops the indexing of a whole folder."""
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    [document] = read_documents([tmp_path], owner="me")
    assert document.passages[0].id.encode() and document.passages[0].text == "text"
