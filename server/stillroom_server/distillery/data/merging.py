"""Lessons taken over into other lessons: texts and judged pairs with their sources, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom_server.distillery.data.candidates import Judged
from stillroom_server.distillery.lessons import ROLES, Lessons, LessonsWriter

SYNTHETIC = "synthetic"
"""The kind of a source whose queries were made."""
_BATCH = 4_096


def same_sources(writer: LessonsWriter, lessons: Lessons, **more: dict[str, Any]) -> dict[int, int]:
    """Sources of other lessons taken over with their facts (and `more` by name): number there to number here."""
    about = lessons.description.get("about", {})
    return {
        number: writer.source(one["name"], **one["facts"], **about.get(one["name"], {}), **more.get(one["name"], {}))
        for number, one in enumerate(lessons.description["sources"])
    }


def add(
    writer: LessonsWriter,
    lessons: Lessons,
    numbers: dict[int, int],
    *,
    lists: bool = True,
    keep: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Copy texts (those to keep), and lists of one candidate. Returns the new row of each text, -1 where it is not kept."""
    rows = np.full(len(lessons), -1, np.int64)
    for start in range(0, len(lessons), _BATCH):
        part = slice(start, start + _BATCH)
        texts = lessons.texts(part)
        for row, (text, role, source) in enumerate(
            zip(texts, lessons.roles[part].tolist(), lessons.text_sources[part].tolist(), strict=True), start
        ):
            if keep is None or keep[row]:
                rows[row] = writer.text(text, ROLES[role], numbers[source])
    if lists:
        for query, passages, grades, source in zip(
            lessons.queries, lessons.passages, lessons.grades, lessons.list_sources, strict=True
        ):
            writer.list(int(rows[query]), rows[passages].tolist(), grades.tolist(), numbers[int(source)])
    return rows


def pairs_of(judged: Judged) -> Iterator[tuple[int, int]]:
    """(query, passage) of each judgement, in order."""
    for number, query in enumerate(judged.queries):
        for passage in judged.relevant(number):
            yield int(query), int(passage)


def leads_on(made: Lessons, kept: Judged) -> NDArray[np.bool_]:
    """All texts but made queries that no kept judgement names, (texts,)."""
    keep = ~np.isin(made.text_sources, synthetic_sources(made))
    keep[kept.queries] = True
    return keep


def shares(made: Lessons, kept: Judged) -> dict[str, dict[str, Any]]:
    """How many judgements of each maker came back, by the name of its source."""
    return {
        one["name"]: {"kept": int((kept.sources == number).sum())}
        for number, one in enumerate(made.description["sources"])
        if number in synthetic_sources(made)
    }


def synthetic_sources(lessons: Lessons) -> list[int]:
    """Numbers of the sources whose queries were made."""
    sources = lessons.description["sources"]
    return [number for number, one in enumerate(sources) if one["facts"].get("kind") == SYNTHETIC]
