"""DOCX by python-docx: paragraphs, lists and tables, below the headings they stand under."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from typing import Any

from stillroom_client.documents import Scalar
from stillroom_client.readers.blocks import Block, Reading, UnreadableError, path_with, pieces

_UNPACKED = 512 << 20  # bytes; a document that unpacks to more is a bomb or no document
_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"


def read(name: str, content: bytes) -> Reading:
    """What stands in the body, inserted text included, deleted text not. Title, author and the date of creation."""
    import docx

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > _UNPACKED:
                raise UnreadableError(f"unpacks to more than {_UNPACKED >> 20} MB: no DOCX that can be read")
        document = docx.Document(io.BytesIO(content))
    except UnreadableError:
        raise
    except Exception as error:  # python-docx lets KeyError, ValueError and lxml's errors through
        raise UnreadableError(
            f"is no DOCX that can be read ({type(error).__name__}): open it and save it again"
        ) from None
    given = document.core_properties
    title = (given.title or "").strip()
    metadata: dict[str, Scalar] = {}
    if given.author:
        metadata["author"] = given.author
    if given.subject:
        metadata["subject"] = given.subject
    if given.created:
        metadata["date"] = given.created.date().isoformat()
    return Reading("docx", tuple(_blocks(document, title)), title, metadata)


def _blocks(document: Any, title: str) -> Iterator[Block]:
    levels = _levels(document)
    path: tuple[tuple[int, str], ...] = ()
    groups: list[tuple[tuple[str, ...], str]] = []  # (headings, text); a list or a table is one
    in_list = False
    bare: tuple[int, tuple[tuple[str, ...], str]] | None = None  # a heading under which nothing stands yet
    for element in _elements(document.element.body):
        headings = tuple(dict.fromkeys(part for part in (title, *(heading for _, heading in path)) if part))
        if element.tag == f"{_W}tbl":
            rows = (" | ".join(_text(cell) for cell in row.iter(f"{_W}tc")) for row in element.iter(f"{_W}tr"))
            groups.append((headings, "\n".join(rows)))
            in_list, bare = False, None
            continue
        text = _text(element)
        level = levels.get(_style(element))
        listed = element.find(f"{_W}pPr/{_W}numPr") is not None or "list" in _style(element).lower()
        if level is not None and text:
            if bare and level <= bare[0]:
                groups.append(bare[1])
            above = tuple(dict.fromkeys(part for part in (title, *(h for depth, h in path if depth < level)) if part))
            bare = level, (above, text)
            path = path_with(path, level, " ".join(text.split()))
            in_list = False
            continue
        if not text:
            continue
        bare = None
        if listed and in_list and groups:
            groups[-1] = (groups[-1][0], f"{groups[-1][1]}\n{text}")
        else:
            groups.append((headings, text))
        in_list = listed
    if bare:
        groups.append(bare[1])
    whole = "".join(f"{text}\n" for _, text in groups)
    place = 0
    for headings, text in groups:
        yield from pieces(whole, place, place + len(text), headings=headings)
        place += len(text) + 1


def _elements(parent: Any) -> Iterator[Any]:
    """Paragraphs and tables in order, those inside content controls and tracked changes too."""
    for child in parent.iterchildren():
        if child.tag in (f"{_W}p", f"{_W}tbl"):
            yield child
        elif child.tag in (f"{_W}sdt", f"{_W}sdtContent", f"{_W}ins", f"{_W}customXml"):
            yield from _elements(child)


def _text(element: Any) -> str:
    parts: list[str] = []
    for item in element.iter(f"{_W}t", f"{_W}tab", f"{_W}br", f"{_W}cr"):
        if not any(ancestor.tag == _FALLBACK for ancestor in item.iterancestors(_FALLBACK)):
            parts.append((item.text or "") if item.tag == f"{_W}t" else "\t" if item.tag == f"{_W}tab" else "\n")
    return "".join(parts).strip()


def _style(paragraph: Any) -> str:
    found = paragraph.find(f"{_W}pPr/{_W}pStyle")
    return "" if found is None else str(found.get(f"{_W}val"))


def _levels(document: Any) -> dict[str, int]:
    """The heading level of each paragraph style that has one: 0 for a title."""
    levels: dict[str, int] = {}
    for style in document.styles.element.iter(f"{_W}style"):
        name, outline = style.find(f"{_W}name"), style.find(f"{_W}pPr/{_W}outlineLvl")
        named = str(name.get(f"{_W}val")).lower() if name is not None else ""
        if named.startswith("heading ") and named[8:].isdigit():
            levels[str(style.get(f"{_W}styleId"))] = int(named[8:])
        elif named == "title":
            levels[str(style.get(f"{_W}styleId"))] = 0
        elif outline is not None and str(outline.get(f"{_W}val")).isdigit() and int(outline.get(f"{_W}val")) < 9:
            levels[str(style.get(f"{_W}styleId"))] = int(outline.get(f"{_W}val")) + 1
    return levels
