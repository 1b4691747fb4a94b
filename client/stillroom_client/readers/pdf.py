"""PDF by PDFium: paragraphs of each page, filled up to the length of a passage, below the bookmarks they stand under."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from stillroom_client.documents import Scalar
from stillroom_client.readers.blocks import LIMIT, Block, Reading, UnreadableError, path_with, spans

_DATE = re.compile(r"D:(\d{4})(\d\d)?(\d\d)?")
_PAGE_NUMBER = re.compile(r"\d{1,4}|[ivxlc]{1,6}")  # alone in a paragraph
# PDFium marks a hyphen that a line ended with by a character that is none, and then leaves the line break out.
_LINE_END_HYPHEN = re.compile(r"[\x02\ufffe]\s*|(?<=\w)[-\u00ad]\s*\n\s*(?=[a-z\u00df-\u00ff])")


def read(name: str, content: bytes) -> Reading:
    """The pages' text. Title, author, subject and the date of creation, where the file gives them."""
    pdfium: Any = import_module("pypdfium2")  # published without types
    try:
        pdf = pdfium.PdfDocument(content)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            raise UnreadableError("is locked with a password: save a copy without one, and add that") from None
        raise UnreadableError(
            f"is no PDF that can be read ({str(error).rstrip('.')}): open it and save it again"
        ) from None
    with pdf:
        given = pdf.get_metadata_dict()
        title = given.get("Title", "").strip()
        paths = _bookmarks(pdf)
        blocks: list[Block] = []
        empty, broken = 0, 0
        for number in range(len(pdf)):
            headings = tuple(dict.fromkeys(part for part in (title, *paths.get(number, ())) if part))
            try:
                text = _text(pdf[number])
            except pdfium.PdfiumError:
                broken += 1
                continue
            empty += not text.strip()
            blocks += _page(text, number + 1, headings)
        pages = len(pdf)
    return Reading("pdf", tuple(blocks), title, _metadata(given, pages), tuple(_notes(pages, empty, broken)))


def _text(page: Any) -> str:
    textpage = page.get_textpage()
    try:
        return str(textpage.get_text_range()).replace("\r\n", "\n").replace("\r", "\n")
    finally:
        textpage.close()
        page.close()


def _page(text: str, number: int, headings: tuple[str, ...]) -> Iterator[Block]:
    start: int | None = None
    stop = 0
    for begin, end in _paragraphs(text):
        if start is not None and end - start > LIMIT:
            yield from _cut(text, start, stop, number, headings)
            start = None
        start, stop = begin if start is None else start, end
    if start is not None:
        yield from _cut(text, start, stop, number, headings)


def _cut(text: str, start: int, stop: int, number: int, headings: tuple[str, ...]) -> Iterator[Block]:
    for begin, end in spans(text, start, stop):
        said = " ".join(_LINE_END_HYPHEN.sub("", text[begin:end]).split())
        if _PAGE_NUMBER.fullmatch(said):
            continue
        yield Block(said, headings, number, None, begin, end, {"page": number})


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """PDF knows no paragraphs: one ends at a blank line, or at a full stop on a line that is clearly short."""
    width = max((len(line) for line in text.split("\n")), default=0)
    start = place = 0
    for line in text.split("\n"):
        after = place + len(line) + 1
        if not line.strip() or (line.rstrip().endswith((".", "!", "?", ":")) and len(line) < 0.8 * width):
            if text[start:after].strip():
                yield start, min(after, len(text))
            start = after
        place = after
    if text[start:].strip():
        yield start, len(text)


def _bookmarks(pdf: Any) -> dict[int, tuple[str, ...]]:
    """The title path of each page (from 0): of the last bookmark that points to it or before it."""
    path: tuple[tuple[int, str], ...] = ()
    marks: dict[int, tuple[str, ...]] = {}
    try:
        for mark in pdf.get_toc(max_depth=6):
            dest = mark.get_dest()
            page, heading = dest.get_index() if dest else None, str(mark.get_title()).strip()
            if page is not None and heading:
                path = path_with(path, mark.level, heading)
                marks.setdefault(page, tuple(heading for _, heading in path))
    except Exception:  # a damaged outline must not cost the text
        return {}
    current: tuple[str, ...] = ()
    return {number: (current := marks.get(number, current)) for number in range(len(pdf))}


def _metadata(given: dict[str, str], pages: int) -> dict[str, Scalar]:
    metadata: dict[str, Scalar] = {"pages": pages}
    metadata |= {
        key.lower(): given[key].strip() for key in ("Author", "Subject", "Keywords") if given.get(key, "").strip()
    }
    if date := _DATE.match(given.get("CreationDate", "")):
        metadata["date"] = f"{date[1]}-{date[2] or '01'}-{date[3] or '01'}"
    return metadata


def _notes(pages: int, empty: int, broken: int) -> Iterator[str]:
    if broken:
        yield f"{broken} of {pages} pages are damaged and were left out"
    if empty == pages:
        yield "holds no text (scanned pages?): nothing in it can be found; run it through OCR first"
    elif empty:
        yield f"{empty} of {pages} pages hold no text"
