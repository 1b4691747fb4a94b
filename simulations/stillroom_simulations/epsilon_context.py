"""No epsilon without its unit, its delta and its adversary beside it, nor without what the coordinator is promised.

An epsilon alone says nothing: 4 for one query against strangers and 4 for a user against peers are worlds apart.
`check_epsilon_context` reads HTML or SVG as a person does, alternative texts included, and refuses the page when a
block speaks of epsilon in figures and lacks one of the three.

| text | is judged with |
|---|---|
| of a paragraph, list item, table, figure, description list or picture | all of that block, its caption included |
| outside any of these, e.g. of a heading | what else stands loose in the same section |
| the same, epsilon being named without a figure | all of the section: its figures stand below |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

from stillroom_shared.errors import StillroomError

_BLOCKS = frozenset({"p", "li", "table", "figure", "dl", "blockquote", "pre", "svg", "title", "meta", "img"})
_VOID = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
)
_SPOKEN_ATTRIBUTES = frozenset({"aria-label", "alt", "title", "content"})
_SILENT = frozenset({"style", "script"})

_EPSILON = re.compile(r"epsilon|[\u03b5\u03f5\U0001d700]", re.IGNORECASE)  # the word, and the letter in three shapes
_FIGURE = re.compile(r"(?<!@)\b\d|infinity|\u221e")  # the 10 of nDCG@10 is part of a name
_NEEDED = {
    "unit": re.compile(r"\b(?:user|query)[\s-]level\b|\bunit\b.{0,20}\b(?:user|query)\b"),
    "delta": re.compile(r"(?:\bdelta\b|\u03b4)\W{0,3}\d"),
    "adversary": re.compile(r"\breaders of releases\b|\bpeers and network observers\b"),
}
_COORDINATOR = re.compile(r"\bcoordinator\b[^.]{0,80}\bnone\b|\bagainst the coordinator(?: too)?: epsilon \d")


class EpsilonContextError(StillroomError):
    """A text prints an epsilon without saying for which unit, at which delta, or against whom."""


def check_epsilon_context(html: str) -> None:
    """Refuse a page that prints an epsilon out of context.

    >>> spelt_out = "epsilon 3.9 (user level, delta 1e-5, against readers of releases; coordinator: none)"
    >>> check_epsilon_context(f"<p>{spelt_out}</p>")
    >>> check_epsilon_context("<p>Three rounds cost epsilon 3.9 at delta 1e-5.</p>")
    Traceback (most recent call last):
    stillroom_simulations.epsilon_context.EpsilonContextError: ...

    Raises:
        EpsilonContextError: naming the block, its text and what it lacks.
    """
    page = _parse(html)
    judged = [(tag, text) for tag, text in _blocks(page) if _EPSILON.search(text) and _FIGURE.search(text)]
    for tag, text in judged:
        if lacking := [name for name, pattern in _NEEDED.items() if not pattern.search(text.casefold())]:
            raise EpsilonContextError(
                f"<{tag}> prints an epsilon without {', '.join(lacking)} next to it: {_short(text)!r}"
            )
    if judged and not _COORDINATOR.search(page.text.casefold()):
        raise EpsilonContextError(
            f"the page prints an epsilon ({_short(judged[0][1])!r}) and never what holds against the coordinator: "
            'say "against the coordinator: none", or which epsilon'
        )


@dataclass
class _Element:
    """An element with what it holds, in order; attributes that are read aloud count as text."""

    tag: str
    content: list[_Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join(" ".join(part if isinstance(part, str) else part.text for part in self.content).split())

    @property
    def holds_block(self) -> bool:
        return self.tag in _BLOCKS or any(isinstance(part, _Element) and part.holds_block for part in self.content)


def _blocks(element: _Element) -> Iterator[tuple[str, str]]:
    """(tag, text) of all that is judged on its own; see the table of this module."""
    if element.tag in _BLOCKS:
        yield element.tag, element.text
        return
    inner = [part for part in element.content if isinstance(part, _Element) and part.holds_block]
    loose = _Element(element.tag, [part for part in element.content if not any(part is block for block in inner)]).text
    heads = _EPSILON.search(loose) and not _FIGURE.search(loose)
    yield element.tag, element.text if heads else loose
    for block in inner:
        yield from _blocks(block)


def _parse(html: str) -> _Element:
    parser = _Parser()
    parser.feed(html)
    parser.close()
    return parser.path[0]


class _Parser(HTMLParser):
    """A lenient tree: an end tag closes up to its start tag, a stray one is ignored."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.path = [_Element("page")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = _Element(tag, [value for name, value in attrs if name in _SPOKEN_ATTRIBUTES and value])
        self.path[-1].content.append(element)
        if tag not in _VOID:
            self.path.append(element)

    def handle_endtag(self, tag: str) -> None:
        places = [place for place, element in enumerate(self.path) if place and element.tag == tag]
        if places:
            del self.path[places[-1] :]

    def handle_data(self, data: str) -> None:
        if self.path[-1].tag not in _SILENT:
            self.path[-1].content.append(data)


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
