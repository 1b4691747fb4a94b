"""The index follows the files: nothing lost, nothing twice, nothing embedded again, and a line about each bad file."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.client.papers import mail, pdf, word
from tests.client.shelf import Shelf

from stillroom_client import adding, reading
from stillroom_client.adding import Tally
from stillroom_client.catalog import Embedded
from stillroom_client.following import follow
from stillroom_client.readers.blocks import Reading, UnreadableError
from stillroom_client.reading import File, Parser, load
from stillroom_client.store import Change
from stillroom_client.walking import Remark, walk
from stillroom_shared.corpus import Passage


@pytest.fixture(scope="module")
def parser() -> Iterator[Parser]:
    with Parser() as started:
        yield started


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    (tmp_path / "home").mkdir()
    return Shelf(tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "files"
    (made / "deep").mkdir(parents=True)
    (made / "notes.md").write_text("# Tapirs\n\nTapirs eat leaves.\n\nThey swim.")
    (made / "page.html").write_text("<title>Fruit</title><p>Pears are sweet.")
    (made / "fruit.pdf").write_bytes(pdf(["Plums are blue.", "Apples are red."], title="Fruit"))
    (made / "report.docx").write_bytes(word())
    (made / "a.eml").write_bytes(mail())
    (made / "deep" / "tool.py").write_text("def zip_it(x):\n    return x\n")
    (made / "README").write_text("Read this first.")
    age(made)
    return made


def age(folder: Path, seconds: float = 60) -> None:
    """Make files look as if they had been written a while ago: what was just written is looked at twice."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            when = path.stat().st_mtime - seconds
            os.utime(path, (when, when))


def said(remarks: list[Remark]) -> dict[str, str]:
    return {remark.path.rpartition("/")[2]: f"{remark.kind}: {remark.text}" for remark in remarks}


def test_every_type_is_indexed_with_its_metadata(shelf: Shelf, parser: Parser, folder: Path) -> None:
    """Guards against a type that is read by nobody, and metadata that filters find under other names."""
    done = shelf.add(parser, folder)
    assert (done.added, done.changed, done.unchanged, done.removed, done.failed) == (7, 0, 0, 0, 0)
    kinds = {path.rpartition("/")[2]: found.type for path, found in shelf.catalog.documents().items()}
    assert kinds == {
        "notes.md": "markdown", "page.html": "html", "fruit.pdf": "pdf", "report.docx": "docx", "a.eml": "email",
        "tool.py": "code", "README": "text",
    }  # fmt: skip
    [first, second] = shelf.catalog.passages_of(str(folder / "fruit.pdf"))
    assert (first.position.page, second.position.page, second.passage.text) == (1, 2, "Apples are red.")
    expected = {
        "type": "pdf",
        "name": "fruit.pdf",
        "suffix": "pdf",
        "title": "Fruit",
        "year": 2019,
        "date": "2019-02-03",
    }
    assert expected.items() <= first.metadata.items() and first.metadata["page"] == 1
    assert first.passage.title == "Fruit" and first.metadata["path"] == str(folder / "fruit.pdf")
    [code] = shelf.catalog.passages_of(str(folder / "deep/tool.py"))
    assert (code.metadata["symbol"], code.metadata["language"], code.position.line) == ("zip_it", "python", 1)
    year = time.gmtime((folder / "README").stat().st_mtime).tm_year
    assert shelf.catalog.passages_of(str(folder / "README"))[0].metadata["year"] == year
    assert done.passages == Change(len(shelf.embedded), 0, 0) and shelf.store.count() == done.passages.added


def test_unchanged_files_are_not_even_opened(
    shelf: Shelf, parser: Parser, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a second run that costs as much as the first."""
    shelf.add(parser, folder)
    before = shelf.store.query("SELECT row, id FROM passages")

    def opened(*arguments: object, **named: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(adding, "load", opened)
    done = shelf.add(parser, folder)
    assert (done.unchanged, done.added, done.changed) == (7, 0, 0) and not shelf.embedded
    assert done.passages == Change(0, 0, len(before))
    assert shelf.store.query("SELECT row, id FROM passages") == before


def test_changed_moved_and_deleted_files_are_followed(shelf: Shelf, parser: Parser, folder: Path) -> None:
    """Guards against ghosts of deleted files, and against embedding what only moved."""
    shelf.add(parser, folder)
    (folder / "notes.md").write_text("# Tapirs\n\nThey sleep.\n\nTapirs eat leaves.")
    (folder / "fruit.pdf").unlink()
    (folder / "page.html").rename(folder / "deep" / "moved.html")
    done = shelf.add(parser, folder)
    assert (done.added, done.changed, done.removed, done.unchanged) == (1, 1, 2, 4)
    assert shelf.embedded == ["They sleep."]
    assert {"They sleep.", "Pears are sweet."} < shelf.texts() and "They swim." not in shelf.texts()
    assert not any("Plums" in text for text in shelf.texts())
    lines = {f.passage.text: f.position.line for f in shelf.catalog.passages_of(str(folder / "notes.md"))}
    assert lines == {"They sleep.": 3, "Tapirs eat leaves.": 5}


def test_a_paragraph_moved_to_another_file_is_not_embedded_again(shelf: Shelf, parser: Parser, tmp_path: Path) -> None:
    """Guards against a vector that is thrown away with the file it left, before the file it came to is stored."""
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    for first, second in (("walks\n\nstays", "other"), ("stays", "other\n\nwalks"), ("stays\n\nwalks", "other")):
        one.write_text(first)
        two.write_text(second)
        assert shelf.add(parser, one, two).failed == 0
        assert shelf.texts() == {"walks", "stays", "other"}
    assert not shelf.embedded


def test_another_owner_reads_again(shelf: Shelf, parser: Parser, folder: Path) -> None:
    """Guards against `--owner` that is ignored for files that did not change."""
    shelf.add(parser, folder)
    again = adding.Adding(shelf.catalog, [folder], embed=shelf.embed, owner="you", parser=parser)
    assert again.run().changed == 7 and set(shelf.store.owners()) == {"you"}


def test_a_touched_file_is_no_change(shelf: Shelf, parser: Parser, folder: Path) -> None:
    """Guards against re-reading what a backup or a checkout gave a new date."""
    shelf.add(parser, folder)
    with shelf.store.reading() as before:
        pass
    age(folder, 10)
    done = shelf.add(parser, folder)
    with shelf.store.reading() as after:
        assert after == before
    assert (done.unchanged, done.changed) == (7, 0) and not shelf.embedded


def test_an_edit_within_the_clock_of_the_file_system_is_seen(shelf: Shelf, parser: Parser, tmp_path: Path) -> None:
    """Guards against an edit of the same length in the same moment, which size and date do not show."""
    path = tmp_path / "a.txt"
    path.write_text("first text")
    shelf.add(parser, path)
    date = path.stat()
    path.write_text("other text")
    os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))
    shelf.add(parser, path)
    assert shelf.texts() == {"other text"}


def test_bad_files_cost_a_line_each_and_nothing_else(shelf: Shelf, parser: Parser, folder: Path) -> None:
    """Guards against one broken file that ends the run, and against files that are left out in silence."""
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", bytes(600 << 20))
    bad = {
        "broken.pdf": b"%PDF-1.4\n" + bytes(range(200)),
        "short.pdf": pdf(["x"])[:200],
        "locked.pdf": pdf(["secret"], encrypt=True),
        "broken.docx": b"PK\x03\x04 no archive",
        "bomb.docx": bomb.getvalue(),
        "renamed.docx": b"plain text",
        "binary.txt": bytes(range(256)),
        "photo.jpg": b"\xff\xd8\xff\xe0" + bytes(100),
        "mail.eml": b"no header at all",
        "old.txt": "Grüße aus Köln, schöne Straße".encode("latin-1"),
        "empty.txt": b"",
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    with open(folder / "huge.txt", "wb") as file:
        file.truncate(1 << 30)
    os.mkfifo(folder / "pipe")
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "nowhere").symlink_to(folder / "missing")
    (folder / "link.md").symlink_to(folder / "notes.md")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "venv").mkdir()
    (folder / "venv" / "pyvenv.cfg").write_text("home = x")
    started = time.monotonic()
    done = shelf.add(parser, folder)
    assert time.monotonic() - started < 60
    assert {path.rpartition("/")[2] for path in shelf.catalog.documents()} == {
        "notes.md", "page.html", "fruit.pdf", "report.docx", "a.eml", "tool.py", "README", "old.txt", "empty.txt",
    }  # fmt: skip
    lines = said(done.remarks)
    for name, expected in {
        "broken.pdf": "failed: is no PDF that can be read",
        "short.pdf": "failed: is no PDF that can be read",
        "locked.pdf": "failed: is locked with a password",
        "broken.docx": "failed: is no DOCX that can be read",
        "bomb.docx": "failed: unpacks to more than 512 MB",
        "renamed.docx": "failed: is no DOCX",
        "binary.txt": "skipped: is binary, not text",
        "photo.jpg": "skipped: is binary, not text",
        "mail.eml": "skipped: is no e-mail",
        "old.txt": "note: is not UTF-8: read as cp1252",
        "huge.txt": "failed: has 1,074 MB, over the limit of 1 MB: raise it with --max-size",
        "pipe": "skipped: is no regular file",
        "loop": "skipped: is a link back to a folder that it lies in, a loop",
        "self": "skipped: is a link to itself",
        "nowhere": "skipped: is a link that leads nowhere",
        "link.md": "skipped: is a link to",
    }.items():
        assert lines.pop(name, "").startswith(expected), (name, said(done.remarks).get(name))
    assert not lines and done.hidden == 2 and done.failed == 7
    again = shelf.add(parser, folder)
    assert again.failed == 7 and (again.added, again.changed) == (0, 0) and not shelf.embedded


def test_a_file_that_breaks_keeps_its_earlier_version(shelf: Shelf, parser: Parser, folder: Path) -> None:
    """Guards against a document that is lost because a copy of it was interrupted."""
    shelf.add(parser, folder)
    (folder / "fruit.pdf").write_bytes(b"%PDF-1.4 broken")
    done = shelf.add(parser, folder)
    assert "; its earlier version stays in the index" in said(done.remarks)["fruit.pdf"]
    assert "Plums are blue." in shelf.texts() and done.failed == 1
    (folder / "fruit.pdf").write_bytes(pdf(["Cherries."]))
    assert shelf.add(parser, folder).changed == 1
    assert "Cherries." in shelf.texts() and "Plums are blue." not in shelf.texts()


def test_what_cannot_be_looked_at_is_not_deleted(
    shelf: Shelf, parser: Parser, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an index that is emptied by a permission, or by a disk that is not mounted."""
    shelf.add(parser, folder)
    real = os.scandir

    def scandir(path: object) -> object:  # the tests may run as root, whom no permission stops
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        done = shelf.add(parser, folder)
    assert said(done.remarks)["deep"] == "failed: cannot be read (Permission denied): what is indexed of it stays"
    assert done.removed == 0 and len(shelf.catalog.documents()) == 7
    folder.rename(folder.parent / "elsewhere")
    done = shelf.add(parser, folder)
    assert "does not exist" in said(done.remarks)["files"] and len(shelf.catalog.documents()) == 7
    folder.mkdir()
    done = shelf.add(parser, folder)
    assert "7 of its documents are indexed: they stay" in said(done.remarks)["files"]
    assert len(shelf.catalog.documents()) == 7 and done.failed == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(shelf: Shelf, parser: Parser, folder: Path) -> None:
    """Guards against a traceback about a permission."""
    (folder / "notes.md").chmod(0)
    assert "cannot be read (Permission denied)" in said(shelf.add(parser, folder).remarks)["notes.md"]


def test_a_file_that_vanishes_or_becomes_a_pipe_is_a_line(tmp_path: Path) -> None:
    """Guards against a race with whoever else works in the folder: above all, against waiting on a pipe for ever."""
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "is no regular file"), ("gone", "cannot be read")):
        with pytest.raises(UnreadableError, match=message):
            load(File(tmp_path / name, name, 1, 1), limit=10)


def test_a_parser_that_hangs_or_crashes_costs_one_file() -> None:
    """Guards against a hostile document that blocks the run, or whose crash is taken for the next one's."""
    with Parser(patience=60) as parser:
        assert parser.read("a.txt", b"fine").blocks[0].text == "fine"
        process = parser._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(UnreadableError, match="made its parser crash"):
            parser.read("a.txt", b"unlucky")
        assert parser.read("b.txt", b"next").blocks[0].text == "next"
    with Parser(patience=60) as parser:
        parser.read("a.txt", b"fine")
        parser._patience = 0.5
        process = parser._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(UnreadableError, match=r"was not read within 0 s|was not read within 1 s"):
            parser.read("a.txt", b"hangs")
        assert process.poll() is not None
        parser._patience = 60
        assert parser.read("b.txt", b"next").blocks[0].text == "next"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.html", b"<div>" * 200_000 + b"text"),
        ("deep.md", b">" * 20_000 + b" text"),
        ("nested.md", b"[" * 50_000),
        ("deep.py", b"(" * 100_000),
        ("long.txt", b"word " * 400_000),
        ("long.js", b"x" * 2_000_000),
    ],
)
def test_documents_made_to_hurt_are_survived(parser: Parser, name: str, content: bytes) -> None:
    """Guards against a recursion or a square of the length that takes the run with it."""
    try:
        assert parser.read(name, content).type
    except UnreadableError as error:
        assert "its parser gave up" in str(error) or "within" in str(error)
    assert parser.read("a.txt", b"fine").blocks[0].text == "fine"


def test_an_interrupted_run_is_resumed(
    shelf: Shelf, parser: Parser, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against Ctrl-C that waits for a parser, throws away what was embedded, or leaves half a document."""
    monkeypatch.setattr(adding, "_BATCH", 4)
    (folder / "long.txt").write_text("\n\n".join(f"paragraph {n}" for n in range(30)))
    real, calls = shelf.embed, [0]

    def interrupted(passages: list[Passage]) -> Embedded:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return real(passages)

    shelf.embed = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        shelf.add(parser, folder)
    embedded = list(shelf.embedded)
    for path in shelf.catalog.documents():
        assert shelf.catalog.document(path).digest  # type: ignore[union-attr]
    shelf.embed = real  # type: ignore[method-assign]
    shelf.add(parser, folder)
    assert not set(embedded) & set(shelf.embedded)
    assert len(shelf.catalog.documents()) == 8 and shelf.store.query("SELECT count(*) FROM staged") == [(0,)]


def test_a_corpus_is_read_line_by_line_and_followed(shelf: Shelf, parser: Parser, tmp_path: Path) -> None:
    """Guards against ids that no longer fit the published judgements, and lines that are deleted and found for ever."""
    rows = [
        {
            "_id": "7",
            "text": "t",
            "title": "T",
            "metadata": {"owner": "zoo", "year": 1999, "tags": ["x"], "open": True},
        },
        {"_id": "8", "text": "u"},
    ]
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "readme.md").write_text("not part of the corpus")
    done = shelf.add(parser, tmp_path)
    assert done.added == 1 and done.passages == Change(2, 0, 0)
    first, second = shelf.catalog.passages_of(str(path))
    assert (first.passage, second.passage) == (Passage("7", "zoo", "t", "T"), Passage("8", "me", "u", ""))
    assert (first.metadata["year"], first.metadata["open"], first.position.line) == (1999, True, 1)
    assert first.metadata["type"] == "corpus" and "tags" not in first.metadata
    path.write_bytes(gzip.compress(json.dumps({"_id": "8", "text": "v"}).encode()))
    done = shelf.add(parser, tmp_path)
    assert (done.changed, done.passages) == (1, Change(0, 1, 0, 1)) and shelf.store.ids() == ["8"]
    path.write_bytes(gzip.compress(b'{"_id": "9", "text": "fine"}\n{"_id": "8", "text": 5}'))
    done = shelf.add(parser, tmp_path)
    assert said(done.remarks)["corpus.jsonl.gz"].startswith("failed: line 2, field 'text'")
    other = tmp_path / "other.jsonl"
    other.write_text('{"_id": "8", "text": "stolen"}')
    done = shelf.add(parser, other)
    assert "'8' occurs in" in said(done.remarks)["other.jsonl"] and "u" not in shelf.texts()


def test_a_name_that_is_no_text_still_works(shelf: Shelf, parser: Parser, tmp_path: Path) -> None:
    """Guards against one badly named file that stops the indexing of a whole folder."""
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    shelf.add(parser, tmp_path)
    [path] = shelf.catalog.documents()  # the home lies in the same folder, and is passed over
    assert path.endswith("caf\\udce9.txt") and shelf.texts() == {"text"}
    assert shelf.add(parser, tmp_path).removed == 0 and shelf.texts() == {"text"}


def test_a_file_is_read_once_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against ids that depend on how a path was spelt: they would be indexed twice."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.TXT").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    monkeypatch.chdir(tmp_path)
    found = walk([Path("."), Path("deep/../a.md"), tmp_path / "deep", Path("link")])
    assert list(found.files) == [str(tmp_path / "a.md"), str(tmp_path / "deep/b.TXT")]


def test_progress_reaches_the_end_and_never_goes_back(shelf: Shelf, parser: Parser, folder: Path) -> None:
    """Guards against a bar that stops at half, and a time left that is computed from nothing."""
    (folder / "broken.pdf").write_bytes(b"%PDF- broken")
    seen: list[Tally] = []
    run = adding.Adding(
        shelf.catalog, [folder], embed=shelf.embed, owner="me", parser=parser, limit=10**6, report=seen.append
    )
    run.run()
    assert [tally.bytes for tally in seen] == sorted(tally.bytes for tally in seen)
    last = seen[-1]
    assert last.files == last.of_files == 8 and last.bytes == pytest.approx(last.of_bytes)
    assert last.passages == shelf.store.count()


class View:
    def __init__(self) -> None:
        self.shown: list[tuple[adding.Added, list[Remark]]] = []

    def say(self, text: str) -> None:
        pass

    def show(self, done: adding.Added, news: list[Remark], total: int) -> None:
        self.shown.append((done, news))


def test_a_watched_folder_is_followed_and_says_things_once(
    shelf: Shelf, parser: Parser, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a watcher that misses a change, repeats its complaints, or tries a broken file for ever."""
    (folder / "broken.pdf").write_bytes(b"%PDF- broken")
    threads = threading.active_count()
    run, view = shelf.adding(parser, folder), View()
    assert len(run.news(run.run())) == 1
    steps: list[object] = [
        lambda: (folder / "new.txt").write_text("brand new"),
        lambda: None,
        lambda: (folder / "new.txt").unlink(),
        lambda: (folder / "broken.pdf").write_bytes(pdf(["repaired"])),
    ]
    rests: list[float] = []

    def sleep(seconds: float) -> None:
        rests.append(seconds)
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()  # type: ignore[operator]

    class Refreshed:
        store = shelf.store
        refreshed = 0

        def refresh_index(self) -> None:
            self.refreshed += 1

    device = Refreshed()
    read = []
    real = Parser.read

    def noted(self: Parser, name: str, content: bytes) -> Reading:
        read.append(name)
        return real(self, name, content)

    monkeypatch.setattr(Parser, "read", noted)
    follow(run, device, view, every=0.01, sleep=sleep)  # type: ignore[arg-type]
    assert [(done.added, done.changed, done.removed) for done, _ in view.shown] == [(1, 0, 0), (0, 0, 1), (1, 0, 0)]
    assert all(not news for _, news in view.shown[:2])
    assert read == ["new.txt", "broken.pdf"] and device.refreshed == 3
    assert "repaired" in shelf.texts() and "brand new" not in shelf.texts()
    assert reading.PATIENCE > 0 and threading.active_count() < threads + 10
