"""The one door by which text enters: what is excluded, blank or unreadable stays outside, and is counted.

A source is gathered into lessons of one candidate each: every list is one judged pair. Their hash is the hash of its content,
what was counted stands in `about`.

| case | counted as |
|---|---|
| a text that must not be learned from (`leakage`) | `excluded_queries`, `excluded_passages` |
| nothing but white space | `blank` |
| half a surrogate pair, which no file can hold | `unreadable` |
| a judgement whose query or passage stayed outside | `judgements_left_out` |
| a judgement that is there already | not counted: kept once |
| a passage that is longer than `characters` | `cut`; looked up whole in what is excluded |
"""

from __future__ import annotations

from collections import Counter

from stillroom_server.distillery.data.leakage import Excluded
from stillroom_server.distillery.lessons import LessonsWriter
from stillroom_server.distillery.teachers.base import Role


class Intake:
    """Takes the texts and judgements of one source.

    Attributes:
        counts: of what stayed outside, and why.
    """

    def __init__(self, writer: LessonsWriter, excluded: Excluded, *, name: str, characters: int) -> None:
        self.counts: Counter[str] = Counter()
        self._writer = writer
        self._excluded = excluded
        self._source = writer.source(name)
        self._characters = characters

    def query(self, text: str) -> int | None:
        """The row of a query, or None when it stays outside."""
        return self._text(" ".join(text.split()), "query")

    def passage(self, text: str) -> int | None:
        """The row of a passage, or None when it stays outside."""
        return self._text(text.strip(), "passage")

    def pair(self, query: int | None, passage: int | None, grade: int = 1) -> None:
        """A judgement by rows."""
        if query is None or passage is None:
            self.counts["judgements_left_out"] += 1
        else:
            self._writer.list(query, [passage], [max(-1, min(grade, 127))], self._source, once=True)

    def _text(self, text: str, role: Role) -> int | None:
        if not text:
            self.counts["blank"] += 1
            return None
        if text in self._excluded:
            self.counts["excluded_queries" if role == "query" else "excluded_passages"] += 1
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            self.counts["unreadable"] += 1
            return None
        if role == "passage" and len(text) > self._characters:
            self.counts["cut"] += 1
            text = text[: self._characters].rsplit(maxsplit=1)[0]
        return self._writer.text(text, role, self._source)
