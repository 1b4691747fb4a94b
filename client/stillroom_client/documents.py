"""What is known of a document and of where in it a passage stands: the values that the store keeps beside the text.

Metadata is one flat object of names and scalars, so that a filter needs no more than a name, a comparison and a value.
Every document that was read from a file has

| name | value |
|---|---|
| `type` | text, markdown, html, pdf, docx, email, code or corpus |
| `path`, `name`, `suffix` | "/home/me/notes/a.md", "a.md", "md" |
| `title` | its own title, or its name |
| `size` | bytes |
| `modified` | when the file was changed, "2026-11-21T17:20:00Z" |
| `date`, `year` | the day it gives itself (an e-mail's, a PDF's or a DOCX's), else that of `modified`: "2026-11-21", 2026 |

and, where it says so, `author`, `subject`, `to`, `language` (of code), `encoding` (when it is not UTF-8), `pages`. A
passage adds `section` (the title path, "Animals > Tapirs"), `page`, `symbol` (of code), `attachment` (of an e-mail);
passages of a BEIR corpus add the scalars of their own `metadata`. `owner` is the passage's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stillroom_shared.corpus import Passage

Scalar = str | int | float | bool
Metadata = Mapping[str, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A document as it was read.

    Attributes:
        path: names it, absolute; bytes of a file name that are no text are spelt `\\udcXX`.
        modified_ns: when the file was last changed, in nanoseconds since 1970, as it was before reading.
        read_ns: when it was read. A file may change again within the resolution of its own clock: one that changed just
            before it was read is looked at again.
        digest: SHA-256 of its bytes; empty while not all of it is stored.
        reader: version of what read it, and for which owner; another one reads it again.
    """

    path: str
    type: str
    title: str
    size: int = 0
    modified_ns: int = 0
    read_ns: int = 0
    digest: bytes = b""
    reader: str = ""
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a passage stands. None: it has no such thing.

    Attributes:
        place: 0 for the first passage of its document, 1 for the next.
        page: from 1, of a document that has pages.
        line: from 1, of a document that has lines: its first.
        start, stop: characters of the document's text before its first character and up to its end. The text is what the
            file holds once decoded (text, Markdown, HTML, code), that of the page (PDF), or that of the paragraphs, each
            followed by a line break (DOCX, e-mail).
    """

    place: int = 0
    page: int | None = None
    line: int | None = None
    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        """Page or line, as one says it; "" for neither."""
        return f"page {self.page}" if self.page else f"line {self.line}" if self.line else ""


NOWHERE = Position()  # of a passage that was added alone


@dataclass(frozen=True, slots=True)
class Located:
    """A passage, where it stands in its document, and what it adds to the document's metadata."""

    passage: Passage
    position: Position = NOWHERE
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """A stored passage with all that is known of it. `metadata` is what filters see; `document` is "" for a lone passage."""

    passage: Passage
    document: str
    position: Position
    metadata: Metadata
