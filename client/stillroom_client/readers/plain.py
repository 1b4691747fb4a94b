"""Plain text: blank lines separate paragraphs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from stillroom_client.documents import Scalar
from stillroom_client.readers.blocks import Block, Lines, Reading, pieces
from stillroom_client.readers.decoding import decoded

_PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*(?:\n|\Z))+")


def read(name: str, content: bytes) -> Reading:
    """The paragraphs of a text file."""
    text, encoding = decoded(content)
    said = odd(encoding)
    return Reading("text", tuple(paragraphs(text)), "", said.metadata, said.notes)


def paragraphs(text: str, *, headings: tuple[str, ...] = ()) -> Iterator[Block]:
    """Paragraphs, each the stretch of text where it stands."""
    lines = Lines(text)
    for found in _PARAGRAPH.finditer(text):
        yield from pieces(text, found.start(), found.end(), headings=headings, lines=lines)


class Odd(NamedTuple):
    """What a reading says of an encoding that is not UTF-8; nothing of one that is."""

    metadata: dict[str, Scalar]
    notes: tuple[str, ...]


def odd(encoding: str) -> Odd:
    """Metadata and a note about an encoding that `decoded` names."""
    return Odd({"encoding": encoding}, (f"is not UTF-8: read as {encoding}",)) if encoding else Odd({}, ())
