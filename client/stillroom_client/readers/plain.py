"""Plain text: blank lines separate paragraphs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stillroom_client.readers.blocks import Block, Lines, Reading, pieces
from stillroom_client.readers.decoding import decoded

_PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*(?:\n|\Z))+")


def read(name: str, content: bytes) -> Reading:
    """The paragraphs of a text file."""
    text, encoding = decoded(content)
    return Reading("text", tuple(paragraphs(text)), **odd(encoding))


def paragraphs(text: str, *, headings: tuple[str, ...] = ()) -> Iterator[Block]:
    """Paragraphs, each the stretch of text where it stands."""
    lines = Lines(text)
    for found in _PARAGRAPH.finditer(text):
        yield from pieces(text, found.start(), found.end(), headings=headings, lines=lines)


def odd(encoding: str) -> dict[str, object]:
    """What a reading says of an encoding that is not UTF-8."""
    if not encoding:
        return {}
    return {"metadata": {"encoding": encoding}, "notes": (f"is not UTF-8: read as {encoding}",)}
