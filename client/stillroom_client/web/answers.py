"""What the page is told of passages: values to write as JSON, with the words of the query marked.

Texts are handed out in parts, [text, marked], because Python counts characters and a browser counts UTF-16 units; the page
makes a text node of each. Control characters and those that turn the direction of writing are left out: a document must not
be able to disguise what stands beside it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from stillroom_client.device import Device
from stillroom_client.documents import Found, Metadata
from stillroom_client.ranking import Hit
from stillroom_client.show import highlights, plain, snippet
from stillroom_client.store import Feedback
from stillroom_shared.errors import DataError

_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SNIPPET = 260
_WRAPPED = 50  # characters of a line that was broken at a margin, at least
_SHOWN = ("type", "author", "date", "language", "to", "symbol", "attachment", "pages")


def hit_json(hit: Hit, query: str) -> dict[str, Any]:
    """One result."""
    name, folder = _name(hit.document)
    return {
        "rank": hit.rank,
        "score": round(hit.score, 4),
        "dense_rank": hit.dense_rank,
        "bm25_rank": hit.bm25_rank,
        "id": hit.passage_id,
        "owner": plain(hit.owner),
        "title": plain(hit.title) or name,
        "name": name,
        "folder": folder,
        "document": plain(hit.document),
        "section": plain(str(hit.metadata.get("section", ""))),
        "position": str(hit.position),
        "type": plain(str(hit.metadata.get("type", ""))),
        "snippet": marked(snippet(hit.text, query, length=_SNIPPET), query),
    }


def passage_json(device: Device, passage_id: str, query: str, reach: int) -> dict[str, Any]:
    """A passage between its neighbours; `DataError` when it is not stored."""
    found = device.catalog.around(passage_id, reach)
    chosen = next((each for each in found if each.passage.id == passage_id), None)
    if chosen is None:
        raise DataError(f"passage {passage_id!r} is not in the index any more: search again")
    count = device.catalog.count([chosen.document]) if chosen.document else 1
    name, folder = _name(chosen.document)
    return {
        "id": passage_id,
        "title": plain(str(chosen.metadata.get("title", ""))) or plain(chosen.passage.title) or name,
        "name": name,
        "folder": folder,
        "document": plain(chosen.document),
        "owner": plain(chosen.passage.owner),
        "about": _about(chosen.metadata),
        "place": chosen.position.place + 1,
        "passages_in_document": count,
        "more_before": bool(found[0].position.place) and bool(chosen.document),
        "more_after": found[-1].position.place + 1 < count and bool(chosen.document),
        "passages": [_neighbour(each, passage_id, query) for each in found],
    }


def feedback_json(device: Device) -> list[dict[str, Any]]:
    """What was opened, latest first; `title` and `document` say what the passage is."""
    opened = device.feedback()
    with device.store.reading():
        rows = dict(
            device.store.query("SELECT id, row FROM passages WHERE id IN (SELECT passage_id FROM feedback)"),
        )
        stored = device.catalog.found(rows.values())
    return [_opened(pair, stored.get(rows.get(pair.passage_id, -1))) for pair in reversed(opened)]


def marked(text: str, query: str) -> list[tuple[str, bool]]:
    """The text in parts, the words of the query marked.

    >>> marked("a zip file", "zip")
    [('a ', False), ('zip', True), (' file', False)]
    """
    parts, last = [], 0
    for start, stop in highlights(text, query):
        parts += [(text[last:start], False), (text[start:stop], True)]
        last = stop
    return [(part, mark) for part, mark in [*parts, (text[last:], False)] if part]


def readable(text: str) -> str:
    r"""The text with its lines, without what cannot be seen or turns what can.

    >>> readable("a\tb\r\n\x1b[1m \u202efdp.exe")
    'a\tb\n[1m fdp.exe'
    """
    return "".join(
        c
        for c in text
        if c in "\n\t" or (c not in _TURNING and unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn"))
    )


def flowing(text: str) -> str:
    """Prose without the line breaks of whoever wrapped it at a margin: those after a long line, before an ordinary word.

    >>> flowing("A line that is as long as an editor allows before it wraps\\nthe rest.\\n- an item\\nshort\\nlines")
    'A line that is as long as an editor allows before it wraps the rest.\\n- an item\\nshort\\nlines'
    """
    lines = text.split("\n")
    shown = lines[:1]
    for before, line in pairwise(lines):
        wrapped = len(before) >= _WRAPPED and line[:1].isalnum() and not re.match(r"\d+[.)]\s", line)
        shown.append(f"{' ' if wrapped else chr(10)}{line}")
    return "".join(shown)


def moved(before: Sequence[Hit], after: Sequence[Hit], query: str) -> dict[str, Any]:
    """Two rankings of one query, without the adapter and with it, each hit with its rank in the other."""
    ranks = [{hit.passage_id: hit.rank for hit in hits} for hits in (before, after)]
    return {
        "without": [hit_json(hit, query) | {"other_rank": ranks[1].get(hit.passage_id)} for hit in before],
        "with": [hit_json(hit, query) | {"other_rank": ranks[0].get(hit.passage_id)} for hit in after],
        "moved": sum(ranks[0].get(passage) != rank for passage, rank in ranks[1].items()),
    }


def _opened(pair: Feedback, found: Found | None) -> dict[str, Any]:
    title = name = ""
    if found is not None:
        name = _name(found.document)[0]
        title = plain(found.passage.title) or name
    return {"query": pair.query, "id": pair.passage_id, "title": title or plain(pair.passage_id), "name": name}


def _neighbour(found: Found, chosen: str, query: str) -> dict[str, Any]:
    metadata, chosen_one = found.metadata, found.passage.id == chosen
    code = metadata.get("type") == "code" or "symbol" in metadata or _is_table(found.passage.text)
    text = readable(found.passage.text) if code else flowing(readable(found.passage.text))
    return {
        "id": found.passage.id,
        "chosen": chosen_one,
        "section": plain(str(metadata.get("section", ""))) or plain(found.passage.title),
        "position": str(found.position),
        "code": code,
        "parts": marked(text, query) if chosen_one else [(text, False)],
    }


def _is_table(text: str) -> bool:
    """Of Markdown: its columns want letters of one width."""
    return all(line.strip()[:1] == "|" or line.strip()[-1:] == "|" for line in text.strip().split("\n"))


def _about(metadata: Metadata) -> list[tuple[str, str]]:
    return [(key, plain(str(metadata[key]))) for key in _SHOWN if key in metadata]


def _name(document: str) -> tuple[str, str]:
    folder, _, name = document.rpartition("/")
    return plain(name), plain(folder)
