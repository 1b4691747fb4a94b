"""Markdown: top-level blocks of CommonMark (https://spec.commonmark.org) and tables, below the headings they stand under."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from markdown_it import MarkdownIt
from markdown_it.token import Token

from stillroom_client.documents import Scalar
from stillroom_client.readers.blocks import LIMIT, Block, Lines, Reading, path_with, pieces
from stillroom_client.readers.decoding import decoded
from stillroom_client.readers.plain import odd

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^(title|author|date|subject|tags|category)[ \t]*:[ \t]*(\S.*)$", re.MULTILINE | re.IGNORECASE)
_COMMENT = re.compile(r"\A\s*<!--.*-->\s*\Z", re.DOTALL)


def read(name: str, content: bytes) -> Reading:
    """Blocks with their markup, exactly as they stand in the file. A leading `---` block gives title, author and date."""
    text, encoding = decoded(content)
    front = _FRONT_MATTER.match(text)
    fields = {key.lower(): value.strip().strip("\"'") for key, value in _FIELD.findall(front[1])} if front else {}
    body = front.end() if front else 0
    blocks = tuple(_blocks(text, body))
    title = fields.pop("title", "") or next((block.headings[0] for block in blocks if block.headings), "")
    said = odd(encoding)
    metadata: dict[str, Scalar] = {**fields, **said.metadata}
    return Reading("markdown", blocks, title, metadata, said.notes)


def _blocks(text: str, body: int) -> Iterator[Block]:
    lines = Lines(text)
    first = lines.number(body)  # parsing begins on this line
    tokens = MarkdownIt("commonmark").enable("table").parse(text[body:])
    path: tuple[tuple[int, str], ...] = ()
    bare: tuple[int, list[Block]] | None = None  # a heading under which nothing stands yet
    for number, token in enumerate(tokens):
        if token.level or token.nesting < 0 or token.map is None:
            continue
        if token.type == "heading_open":
            level = int(token.tag[1:])
            if bare and level <= bare[0]:
                yield from bare[1]
            above = tuple(heading for depth, heading in path if depth < level)
            begin, end = (lines.start(first + line) for line in token.map)
            bare = level, list(pieces(text, begin, end, headings=above, lines=lines))
            path = path_with(path, level, tokens[number + 1].content.strip())
            continue
        for begin, end in _stretches(tokens, number, lines, first):
            start, stop = lines.start(first + begin), lines.start(first + end)
            if not _COMMENT.match(text[start:stop]):
                bare = None
                yield from pieces(text, start, stop, headings=tuple(heading for _, heading in path), lines=lines)
    if bare:
        yield from bare[1]


def _stretches(tokens: list[Token], number: int, lines: Lines, first: int) -> list[tuple[int, int]]:
    """Line ranges of a block: one, or one an item for a list that is too long for a passage."""
    token = tokens[number]
    assert token.map is not None
    begin, end = token.map
    is_list = token.type in ("bullet_list_open", "ordered_list_open")
    if not is_list or lines.start(first + end) - lines.start(first + begin) <= LIMIT:
        return [(begin, end)]
    items: list[tuple[int, int]] = []
    for inner in islice(tokens, number + 1, None):
        if inner.level == 0:
            break
        if inner.type == "list_item_open" and inner.level == 1 and inner.map is not None:
            items.append((inner.map[0], inner.map[1]))
    return items
