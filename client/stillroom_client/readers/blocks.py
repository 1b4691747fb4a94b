"""What a reader hands out, and how text that is too long for one passage is cut."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from stillroom_client.documents import Scalar

LIMIT = 1_200  # characters of a passage: about 250 word pieces of prose, what small document towers read
_LEAST = LIMIT // 3  # a piece is not cut shorter than this for the sake of a nicer end
_ENDS = tuple(re.compile(pattern) for pattern in (r"\n[ \t]*\n", r"(?<=[.!?;:])\s", r"\n", r"\s"))


class UnreadableError(Exception):
    """The file is broken, locked, or not what its name says. The message completes "PATH: ..." and says what to do."""


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a document's text; page, line, start and stop are those of `documents.Position`."""

    text: str
    headings: tuple[str, ...] = ()
    page: int | None = None
    line: int | None = None
    start: int | None = None
    stop: int | None = None
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """A document as its reader understood it. `notes` are remarks for the owner: an odd encoding, a page without text."""

    type: str
    blocks: tuple[Block, ...]
    title: str = ""
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def spans(text: str, start: int = 0, stop: int | None = None, limit: int = LIMIT) -> Iterator[tuple[int, int]]:
    """Cut a stretch of text into stretches of at most `limit` characters, at the best end there is, without white space.

    >>> text = "One sentence. Another one. A third"
    >>> [text[a:b] for a, b in spans(text, limit=27)]
    ['One sentence. Another one.', 'A third']
    """
    stop = len(text) if stop is None else stop
    while start < stop:
        end = stop if stop - start <= limit else _end(text, start, start + limit, start + min(_LEAST, limit // 3))
        inner = text[start:end]
        if kept := inner.strip():
            begin = start + len(inner) - len(inner.lstrip())
            yield begin, begin + len(kept)
        start = end


def _end(text: str, start: int, stop: int, least: int) -> int:
    for pattern in _ENDS:
        ends = [found.end() for found in pattern.finditer(text, least, stop)]
        if ends:
            return ends[-1]
    return stop


def pieces(
    text: str,
    start: int,
    stop: int,
    *,
    headings: tuple[str, ...] = (),
    lines: Lines | None = None,
    page: int | None = None,
    metadata: Mapping[str, Scalar] | None = None,
) -> Iterator[Block]:
    """A stretch of a document's text as blocks that say exactly what stands there: `text[start:stop]`."""
    for begin, end in spans(text, start, stop):
        line = lines.number(begin) if lines else None
        yield Block(text[begin:end], headings, page, line, begin, end, metadata or {})


class Lines:
    """Line numbers, from 1, of the characters of a text.

    >>> lines = Lines("ab\\ncd\\n")
    >>> [lines.number(place) for place in (0, 2, 3, 6)], lines.start(2)
    ([1, 1, 2, 3], 3)
    """

    def __init__(self, text: str) -> None:
        self._starts = [0, *(found.end() for found in re.finditer("\n", text))]
        self._length = len(text)

    def number(self, place: int) -> int:
        """The line that holds the character at `place`."""
        from bisect import bisect_right

        return bisect_right(self._starts, place)

    def start(self, number: int) -> int:
        """Where line `number` begins; the end of the text for one beyond the last."""
        return self._starts[number - 1] if number <= len(self._starts) else self._length


def path_with(path: tuple[tuple[int, str], ...], level: int, heading: str) -> tuple[tuple[int, str], ...]:
    """A title path, (level, heading) each, after a heading of `level` was met."""
    return (*(item for item in path if item[0] < level), (level, heading))
