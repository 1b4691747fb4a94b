"""Every type of document becomes passages that follow its structure; nothing of the text is lost, nothing made up."""

from __future__ import annotations

import itertools
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.client.papers import mail, pdf, word

from stillroom_client.readers import code, decoding, markdown, plain
from stillroom_client.readers.blocks import LIMIT, Reading, UnreadableError, spans
from stillroom_client.readers.kinds import kind, read

NOTES = """---
title: About animals
date: 2021-03-04
author: "Ann"
---
# Tapirs

Tapirs eat leaves.
They swim.

## Where they live ##

In *forests*:

- rain
- cloud

Land
====

| area | count |
|------|-------|
| Brazil | 7 |

```
# no heading
```

---

<!-- nobody reads this -->
"""


def shown(reading: Reading) -> list[tuple[str, str]]:
    return [(" > ".join(block.headings), block.text) for block in reading.blocks]


def test_markdown_follows_its_headings() -> None:
    """Guards against headings that become passages, code that is read as a heading, and front matter that is found."""
    found = read("notes.md", NOTES.encode())
    assert shown(found) == [
        ("Tapirs", "Tapirs eat leaves.\nThey swim."),
        ("Tapirs > Where they live", "In *forests*:"),
        ("Tapirs > Where they live", "- rain\n- cloud"),
        ("Land", "| area | count |\n|------|-------|\n| Brazil | 7 |"),
        ("Land", "```\n# no heading\n```"),
        ("Land", "---"),
    ]
    assert (found.title, dict(found.metadata)) == ("About animals", {"date": "2021-03-04", "author": "Ann"})
    for block in found.blocks:
        assert NOTES[block.start : block.stop] == block.text
        assert block.line and NOTES.split("\n")[block.line - 1].startswith(block.text.split("\n")[0])


@pytest.mark.parametrize("name", ["a.md", "a.html"])
def test_a_heading_without_a_text_is_found_itself(name: str) -> None:
    """Guards against a list of tasks, written as headings, of which nothing is indexed."""
    levels = ((1, "Tasks"), (2, "Buy milk"), (2, "Call Ann"), (3, "About the plans"), (2, "Rest"))
    if name.endswith("md"):
        source = "\n\n".join(f"{'#' * level} {text}" for level, text in levels)
    else:
        source = "".join(f"<h{level}>{text}</h{level}>" for level, text in levels)
    found = [(above.removesuffix(" > "), text.strip("# ")) for above, text in shown(read(name, source.encode()))]
    assert [text for _, text in found] == ["Buy milk", "About the plans", "Rest"]
    assert found[1][0].endswith("Tasks > Call Ann")


def test_a_long_list_is_divided_between_its_items() -> None:
    """Guards against a list that is cut in mid-sentence where its items would do."""
    text = "\n".join(f"- item {n} " + "word " * 60 for n in range(10))
    blocks = markdown.read("a.md", text.encode()).blocks
    assert len(blocks) == 10 and all(block.text.startswith(f"- item {n}") for n, block in enumerate(blocks))


def test_html_gives_what_a_reader_sees() -> None:
    """Guards against scripts and menus that are found, words that stick together, and text lost behind unclosed tags."""
    source = (
        "<!doctype html><html lang='en'><head><title>Fruit &amp; more</title><style>p{}</style>"
        "<meta name=author content='Ann'></head><body><nav><a>Home</a></nav><h1>Pears</h1><script>if (a<b) {}</script>"
        "<p>Pears are <b>sw</b>eet.<br>And green.<div>A box</div>tail<h2>Kinds</h2><ul><li>one<ul><li>deep</ul><li>two</ul>"
        "<table><tr><th>kind<th>price<tr><td>plum<td>3</table><pre>a\n  b</pre><p>unclosed <i>end"
    )
    found = read("page.html", source.encode())
    assert shown(found) == [
        ("Fruit & more > Pears", "Pears are sweet.\nAnd green."),
        ("Fruit & more > Pears", "A box"),
        ("Fruit & more > Pears", "tail"),
        ("Fruit & more > Pears > Kinds", "one\ndeep\ntwo"),
        ("Fruit & more > Pears > Kinds", "kind | price\nplum | 3"),
        ("Fruit & more > Pears > Kinds", "a\n  b"),
        ("Fruit & more > Pears > Kinds", "unclosed end"),
    ]
    assert (found.title, found.metadata["author"], found.metadata["language"]) == ("Fruit & more", "Ann", "en")
    first = found.blocks[0]
    assert source[first.start : first.stop] == "Pears are <b>sw</b>eet.<br>And green."


def test_pdf_knows_pages_bookmarks_and_its_own_date() -> None:
    """Guards against passages that run over pages, and words broken by the layout that nobody can find."""
    content = pdf(
        ["A pear grows in tempe-\nrate regions.", "Plums are blue.", "Index", "iv"],
        title="Fruit",
        bookmarks=[("Pears", 0), ("Plums", 1)],
    )
    found = read("fruit.pdf", content)
    assert [(b.page, " > ".join(b.headings), b.text) for b in found.blocks] == [
        (1, "Fruit > Pears", "A pear grows in temperate regions."),
        (2, "Fruit > Plums", "Plums are blue."),
        (3, "Fruit > Plums", "Index"),
    ]
    assert found.metadata == {"pages": 4, "author": "Ann Author", "date": "2019-02-03"}
    assert kind("no-suffix", content) == "pdf" and not found.notes
    scanned = read("scan.pdf", pdf(["", ""]))
    assert not scanned.blocks and "holds no text" in scanned.notes[0]


def test_docx_follows_headings_and_keeps_insertions() -> None:
    """Guards against text that only Word shows: in content controls, tracked insertions, tables."""
    found = read("report.docx", word())
    assert shown(found) == [
        ("Report > Fruit", "Pears are sweet and round"),
        ("Report > Fruit", "apples\nplums"),
        ("Report > Fruit", "kind | price\nplum | 3 euro"),
        ("Report > Fruit > Storage", "Keep them cool."),
    ]
    assert found.title == "Report" and found.metadata["author"] == "Ann Author"


@pytest.mark.parametrize("html", [False, True])
def test_an_email_is_its_body_and_what_is_attached(html: bool) -> None:
    """Guards against encoded headers and bodies that nobody can find, and a body that is indexed twice, once as HTML."""
    attached = [("plan.md", b"# Plan\n\nBuild it."), ("fruit.pdf", pdf(["Plums."])), ("photo.jpg", b"\xff\xd8\0\0")]
    inner = [("forwarded.eml", mail(attachments=[("deep.txt", b"deep inside")]))]
    found = read("a.eml", mail(html=html, attachments=[*attached, *inner]))
    texts = shown(found)
    assert ("The café", "We meet at the café.") in texts and ("The café", "Bring the plans.") in texts
    assert [text for _, text in texts].count("We meet at the café.") == 2  # its own, and that of the forwarded one
    assert ("The café > plan.md > Plan", "Build it.") in texts
    assert any(b.text == "Plums." and b.page == 1 and b.metadata["attachment"] == "fruit.pdf" for b in found.blocks)
    assert any(text == "deep inside" for _, text in texts)
    assert any("Ann Author" in text and "bob@example.org" in text for _, text in texts)
    assert found.title == "The café" and found.metadata["date"] == "2020-02-03"
    assert found.notes == ("attachment 'photo.jpg' is binary, not text: skipped",)


@pytest.mark.parametrize(
    "content",
    [
        b"Subject: =?utf-8?q?broken=?=\nDate: yesterday\nFrom: <<<\n\ntext",
        b"Subject: x\nContent-Type: text/plain; charset=klingon\n\nna\xefve text",
        b"Subject: x\nContent-Type: multipart/mixed; boundary=b\n\n--b\nnot even a header\n\ntext",
        b"Subject: x\nContent-Type: multipart/mixed\n\ntext without a boundary",
        b"Subject: x\nContent-Transfer-Encoding: base64\n\n!!!text!!!",
    ],
)
def test_a_malformed_email_is_read_as_far_as_it_goes(content: bytes) -> None:
    """Guards against one spam mail that ends the indexing of an archive."""
    assert read("a.eml", content).type == "email"


PYTHON = '''"""A module."""
import os

LIMIT = 3


# explains first
@decorated
def first(x):
    """Do it."""
    return x


class Big:
    """Much."""

    size = 1

    def method(self):
        return "%s"

    async def other(self):
        def inner():
            pass
''' % ("x" * LIMIT)


def test_python_is_cut_at_functions_and_methods() -> None:
    """Guards against a comment or decorator torn from its function, and methods that do not say whose they are."""
    found = read("module.py", PYTHON.encode())
    by_symbol = {str(b.metadata.get("symbol", "")): b.text for b in found.blocks}
    assert by_symbol["first"].startswith("# explains first\n@decorated\ndef first")
    assert by_symbol[""] == '"""A module."""\nimport os\n\nLIMIT = 3'
    assert "Big.method" in by_symbol and by_symbol["Big.other"].startswith("async def other")
    assert by_symbol["Big"].startswith("class Big") and "size = 1" in by_symbol["Big"]
    assert found.blocks[1].headings == ("module.py", "first") and found.metadata["language"] == "python"
    assert found.blocks[1].line == 7
    broken = read("module.py", (PYTHON + "\ndef broken(:\n").encode())
    assert any(b.metadata.get("symbol") == "first" for b in broken.blocks)


RUST = ["get", "Store", "Store.put"]


@pytest.mark.parametrize(
    ("name", "source", "symbols"),
    [
        ("a.js", "// why\nexport async function go(a) {\n}\nlet f = (x) => {\n};\nclass B extends C {\n}\n", ["go", "f", "B"]),
        ("a.ts", "export interface Shape {\n}\nexport const area = async (s: Shape) => {\n}\n", ["Shape", "area"]),
        ("a.go", "package main\n\nfunc (s *Store) Put(x int) error {\n}\n\ntype Store struct {\n}\n", ["main", "Put", "Store"]),
        ("a.rs", "#[inline]\npub(crate) fn get<T>(x: T) {\n}\nimpl<T> Store<T> {\n    fn put(&self) {}\n}\n", RUST),
        ("a.c", "static int add(int a, int b)\n{\n  return add();\n}\n\nint main(void) {\n}\n", ["add", "main"]),
        ("A.java", "public class A {\n    public static void main(String[] args) {\n    }\n}\n", ["A", "A.main"]),
        ("a.sql", "CREATE TABLE users (id int);\n\ncreate or replace view v AS SELECT 1;\n", ["users", "v"]),
        ("a.sh", "# backs up\nbackup() {\n  tar c .\n}\n", ["backup"]),
        ("a.rb", "module Zoo\n  class Tapir\n    def eat(x)\n    end\n  end\nend\n", ["Zoo", "Zoo.Tapir", "Zoo.Tapir.eat"]),
    ],
)  # fmt: skip
def test_declarations_are_found_in_other_languages(name: str, source: str, symbols: list[str]) -> None:
    """Guards against a file of a language without a parser that becomes one anonymous block."""
    found = [str(b.metadata["symbol"]) for b in code.read(name, source.encode()).blocks if "symbol" in b.metadata]
    assert found == symbols


TEXT = st.text(st.sampled_from("ab .\n\n\t#-|`>é*(){}:;def class"), max_size=4000)


@settings(max_examples=150, deadline=None)
@given(TEXT, st.sampled_from(["a.txt", "a.md", "a.py", "a.js"]))
def test_no_letter_is_lost_and_positions_are_exact(text: str, name: str) -> None:
    """Guards against text that falls between two blocks, is found twice, or is shown at the wrong place."""
    blocks = read(name, text.encode()).blocks
    last = 0
    for block in blocks:
        assert block.start is not None and block.stop is not None and block.start >= last
        assert text[block.start : block.stop] == block.text and 0 < len(block.text) <= LIMIT
        assert block.line == text.count("\n", 0, block.start) + 1
        last = block.stop
    if not name.endswith(".md"):  # there, headings are titles
        assert re.sub(r"\s", "", "".join(b.text for b in blocks)) == re.sub(r"\s", "", text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab. \n"), max_size=300), st.integers(1, 40))
def test_cutting_keeps_every_letter(text: str, limit: int) -> None:
    """Guards against a cut that drops or repeats a letter, or makes a piece that is too long."""
    cut = list(spans(text, limit=limit))
    assert all(b - a <= limit for a, b in cut) and all(x[1] <= y[0] for x, y in itertools.pairwise(cut))
    assert "".join("".join(text[a:b] for a, b in cut).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("Grüße aus Köln".encode(), ""),
        ("\ufeffGrüße aus Köln".encode(), ""),
        ("Grüße aus Köln, schöne Straße".encode("latin-1"), "cp1252"),
        ("Grüße aus Köln".encode("utf-16"), "utf-16"),
        ("Grüße aus Köln".encode("utf-16-le"), "utf-16-le"),
        ("Grüße aus Köln".encode("utf-16-be"), "utf-16-be"),
        ("Grüße aus Köln".encode("utf-32"), "utf-32"),
        ("これは日本語の文章です。今日は天気がいいですね。".encode("shift_jis"), "cp932"),
        (b"<meta charset=koi8-r>" + "Привет, мир, как дела".encode("koi8-r"), "koi8-r"),
    ],
)
def test_odd_encodings_are_read_and_said(content: bytes, encoding: str) -> None:
    """Guards against mojibake, and against a guess that nobody is told of."""
    text, found = decoding.decoded(content)
    assert "\ufffd" not in text
    assert any(word in text for word in ("Grüße aus Köln", "日本語", "Привет")), text
    assert found == encoding
    assert plain.read("a.txt", content).notes == ((f"is not UTF-8: read as {encoding}",) if encoding else ())


@pytest.mark.parametrize(
    "content", [bytes(range(256)) * 4, b"\x7fELF\x02\x01\x01" + bytes(100), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"]
)
def test_binary_is_refused(content: bytes) -> None:
    """Guards against pictures that are indexed as text."""
    for name in ("a.txt", "a.bin", "a", "a.md", "a.py"):
        with pytest.raises(UnreadableError, match="is binary"):
            read(name, content)


def test_line_breaks_of_every_system_are_one() -> None:
    """Guards against a file that is one long paragraph because it comes from Windows."""
    assert shown(read("a.txt", b"# one\r\n\r\ntwo\r\n \r\n\rthree")) == [("", "# one"), ("", "two"), ("", "three")]


@pytest.mark.parametrize(
    ("name", "module", "package"), [("a.docx", "docx", "python-docx"), ("a.pdf", "pypdfium2", "pypdfium2")]
)
def test_a_missing_parser_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    """Guards against a traceback, or a damaged-file message, where only an installation is incomplete."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnreadableError, match=f"needs a parser that is not installed.*: pip install {package}"):
        read(name, b"%PDF-")
