"""Queries for passages that have none, made piece by piece and kept, so that a run that was cut off goes on.

A maker is a function of passages. What it makes belongs to the passage alone (`heuristics`, `generation`): the same whatever
the batch, the order or the number of pieces. Every made query has as many words as the settings allow, is mostly letters, is
not the passage again, and occurs once for its passage.

| case | what happens |
|---|---|
| a query that two passages lead to | made for both; the round trip may drop one |
| a query that must not be learned from | left out where queries enter the lessons (`prepare`), and counted |
| a passage that no query comes of | none |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom_server.distillery.data import heuristics
from stillroom_server.distillery.data.sampling import mark
from stillroom_server.distillery.data.settings import Maker, SyntheticSettings
from stillroom_server.distillery.data.shards import Shards
from stillroom_server.distillery.lessons import Lessons, batches
from stillroom_shared.corpus import normalize
from stillroom_shared.workspace import key_of

PIECE = 256
"""Passages between two saves."""


@dataclass(frozen=True)
class QueryMaker:
    """Makes queries.

    Attributes:
        identity: changes with all that the queries depend on beside the passages.
        make: queries of each passage, "" where one came to nothing.
    """

    identity: str
    make: Callable[[Sequence[str]], list[list[str]]]


def maker(kind: Maker, settings: SyntheticSettings, *, seed: int) -> QueryMaker:
    """The maker of that name. Raises `SettingsError` when its model cannot be had."""
    if kind in ("seq2seq", "llm"):
        from stillroom_server.distillery.data.generation import Generator

        generator = Generator.load(settings, seed=seed)
        return QueryMaker(generator.identity, generator)
    count, words = settings.per_passage, (settings.shortest, settings.longest)
    made: dict[Maker, Callable[[str], list[str]]] = {
        "crop": lambda passage: heuristics.crop(passage, count, words=words, seed=seed),
        "sentence": lambda passage: heuristics.sentences(passage, count, seed=seed),
        "title": heuristics.title,
        "summary": heuristics.summary,
    }
    make = made[kind]
    return QueryMaker(key_of(kind, count, words, seed), lambda passages: [make(passage) for passage in passages])


def chosen_passages(lessons: Lessons, limit: int | None, *, seed: int) -> NDArray[np.int64]:
    """Rows of the passages to make queries for, ascending: all, or those of the lowest hash."""
    rows = lessons.rows("passage")
    if limit is None or limit >= len(rows):
        return rows
    marks = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), 4_096):
        texts = lessons.texts(rows[start : start + 4_096])
        marks[start : start + len(texts)] = [mark(normalize(text), seed) for text in texts]
    lowest = np.unique(marks)[:limit]
    return np.asarray(rows[marks <= lowest[-1]])


def made_queries(
    maker: QueryMaker,
    lessons: Lessons,
    rows: NDArray[np.int64],
    settings: SyntheticSettings,
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, str]]:
    """(row of the passage, query), in the order of `rows`; pieces that lie in `folder` are not made again.

    Args:
        progress: (done, total) passages.
    """
    digest = hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()
    shards = Shards(folder / key_of(maker.identity, lessons.identity, digest, settings.shortest, settings.longest))
    done = 0
    for number, piece in enumerate(batches(rows, PIECE)):
        table = shards.get(number, lambda piece=piece: _piece(maker, lessons, piece, settings))  # type: ignore[misc]
        done += len(piece)
        progress(done, len(rows))
        yield from zip(table["passage"].to_pylist(), table["query"].to_pylist(), strict=True)


def _piece(maker: QueryMaker, lessons: Lessons, rows: NDArray[np.int64], settings: SyntheticSettings) -> pa.Table:
    passages = lessons.texts(rows)
    pairs = [
        (int(row), query)
        for row, passage, queries in zip(rows, passages, maker.make(passages), strict=True)
        for query in heuristics.distinct([one for one in queries if heuristics.acceptable(one, passage, settings)])
    ]
    columns = {"passage": [row for row, _ in pairs], "query": [query for _, query in pairs]}
    return pa.table(columns, schema=pa.schema([("passage", pa.int64()), ("query", pa.large_string())]))
