"""HTML: the text that a reader of the page sees, in blocks, below the headings they stand under.

Left out: scripts, styles, templates, navigation and form controls. A list or a table is one block, a line each item or row.
`start` and `stop` are where the block stands in the source.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

from stillroom_client.documents import Scalar
from stillroom_client.readers.blocks import Block, Lines, Reading, path_with, spans
from stillroom_client.readers.decoding import decoded
from stillroom_client.readers.plain import odd

_HIDDEN = frozenset(
    [
        "script",
        "style",
        "template",
        "noscript",
        "svg",
        "nav",
        "select",
        "button",
        "textarea",
        "iframe",
        "object",
        "canvas",
    ]
)
_BREAKS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "dd",
        "details",
        "dialog",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hr",
        "html",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "tr",
        "ul",
    ]
)
_GROUPS = frozenset(("ul", "ol", "dl", "table"))
_CELLS = frozenset(("td", "th"))
_HEADING = re.compile("h[1-6]")
_META = {"author": "author", "description": "description", "date": "date", "article:published_time": "date"}


def read(name: str, content: bytes) -> Reading:
    """The blocks of a page; its `<title>`, author, date and language."""
    text, encoding = decoded(content)
    page = _Page(text)
    page.feed(text)
    page.close()
    page.flush()
    page.end()
    said = odd(encoding)
    metadata: dict[str, Scalar] = {**page.metadata, **said.metadata}
    title = _flat(page.title) or next((block.headings[0] for block in page.blocks if block.headings), "")
    blocks = tuple(_titled(block, title) for block in page.blocks)
    return Reading("html", blocks, title, metadata, said.notes)


class _Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.title = ""
        self.metadata: dict[str, Scalar] = {}
        self._lines = Lines(source)
        self._path: tuple[tuple[int, str], ...] = ()
        self._parts: list[str] = []
        self._from: int | None = None
        self._to = 0
        self._hidden: list[str] = []
        self._groups = self._verbatim = 0
        self._in_title = False
        self._heading: str | None = None
        self._bare: tuple[int, Block] | None = None  # a heading under which nothing stands yet

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "meta" and (name := _META.get((values.get("name") or values.get("property") or "").lower())):
            self.metadata.setdefault(name, _flat(values.get("content") or "")[:500])
        elif tag == "html" and values.get("lang"):
            self.metadata["language"] = str(values["lang"])
        elif tag == "title" and not self.title and not self._hidden:
            self._in_title = True
        elif tag in _HIDDEN:
            self._hidden.append(tag)
        elif _HEADING.fullmatch(tag):
            self.flush()
            self._heading = tag
        elif tag == "br":
            self._parts.append("\n")
        elif tag in _BREAKS:
            if tag in _GROUPS:
                self._break() if self._groups else self.flush()
                self._groups += 1
            else:
                self._break(" | " if tag in _CELLS else "\n")
            self._verbatim += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        elif tag == "title":
            self._in_title = False
        elif _HEADING.fullmatch(tag) and self._heading:
            if heading := _flat("".join(self._parts)):
                level = int(self._heading[1])
                self._end_section(level)
                above = tuple(item[1] for item in self._path if item[0] < level)
                self._path = path_with(self._path, level, heading)
                self._bare = level, Block(heading, above, None, self._line(), self._from, self._to)
            self._heading = None
            self._reset()
        elif tag in _BREAKS:
            if tag == "pre" and self._verbatim:
                self._break()
                self._verbatim -= 1
            if tag in _GROUPS and self._groups:
                self._groups -= 1
                if not self._groups:
                    self.flush()
            elif tag not in _CELLS:
                self._break()

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._hidden and (data.strip() or self._parts):
            start = self._lines.start(self.getpos()[0]) + self.getpos()[1]
            if self._from is None:
                self._from = start + len(data) - len(data.lstrip())
            self._to = start + len(data.rstrip())
            self._parts.append(data if self._verbatim else re.sub(r"\s+", " ", data))

    def flush(self) -> None:
        """End a block."""
        raw = "".join(self._parts)
        text = raw.strip("\n") if self._verbatim else "\n".join(line for p in raw.split("\n") if (line := _row(p)))
        headings = tuple(heading for _, heading in self._path)
        for begin, end in spans(text):
            self.blocks.append(Block(text[begin:end], headings, None, self._line(), self._from, self._to))
            self._bare = None
        self._reset()

    def end(self) -> None:
        """The last section has ended."""
        self._end_section(0)

    def _end_section(self, level: int) -> None:
        """A heading of `level` follows: one of the same level or deeper without a text of its own is a text itself."""
        if self._bare and level <= self._bare[0]:
            self.blocks.append(self._bare[1])
        self._bare = None

    def _line(self) -> int | None:
        return None if self._from is None else self._lines.number(self._from)

    def _break(self, inside: str = "\n") -> None:
        if self._groups or self._heading:
            self._parts.append(inside)
        else:
            self.flush()

    def _reset(self) -> None:
        self._parts, self._from = [], None


def _titled(block: Block, title: str) -> Block:
    headings = block.headings if not title or title in block.headings[:1] else (title, *block.headings)
    return Block(block.text, headings, None, block.line, block.start, block.stop)


def _row(text: str) -> str:
    """A line of a block; the cells of a table's row are divided, not begun, by a bar."""
    return _flat(text).strip("| ")


def _flat(text: str) -> str:
    return " ".join(text.split())
