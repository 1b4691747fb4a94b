"""Which lists a cross-encoder is taught with and measured on, as rows that Sentence Transformers' losses take.

Rows are written to an Arrow file and memory-mapped, so lessons may be larger than memory.

    binary             query: string; passage: string;         label: float32    a row for each pair
    softmax, lambda    query: string; passages: list<string>;  label: list<float32>  a row for each list
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom_server.distillery.lessons import Lessons, batches
from stillroom_shared.corpus import normalize
from stillroom_shared.errors import DataError

_LISTS_AT_ONCE = 1_024
_APART = 50.0
"""Labels of the softmax loss: a grade's share is exp(50) times that of the grade below, which is all of it."""


@dataclass(frozen=True, eq=False)
class Taught:
    """Numbers of the lists that are trained on and held out; no query is in both."""

    trained: NDArray[np.int64]
    held_out: NDArray[np.int64]


def pick_lists(lessons: Lessons, share: float, most_held_out: int, most: int | None, seed: int) -> Taught:
    """Split the lists that can teach by a hash of their query, whatever else is in the lessons.

    Raises:
        DataError: one of both parts is empty.
    """
    useful = np.flatnonzero((lessons.grades > 0).any(1) & (lessons.grades <= 0).any(1))
    held = np.zeros(len(useful), np.bool_)
    for start in range(0, len(useful), _LISTS_AT_ONCE):
        rows = useful[start : start + _LISTS_AT_ONCE]
        held[start : start + len(rows)] = [_place(text) < share for text in lessons.texts(lessons.queries[rows])]
    generator = np.random.default_rng(seed)
    held_out, trained = (generator.permutation(useful[part]) for part in (held, ~held))
    if not len(held_out) or not len(trained):
        raise DataError(
            f"{lessons.folder} has {len(trained)} lists to train on and {len(held_out)} to hold out, of {lessons.lists}: "
            "each needs one with a relevant and an irrelevant passage; add lessons, or change held_out"
        )
    return Taught(np.sort(trained[:most]), np.sort(held_out[:most_held_out]))


def validation_samples(lessons: Lessons, lists: NDArray[np.int64]) -> list[dict[str, Any]]:
    """What `CrossEncoderRerankingEvaluator` takes: of each list, all its candidates."""
    samples = []
    for query, passages, grades in _read(lessons, lists):
        kinds: dict[bool, list[str]] = {True: [], False: []}
        for text, grade in zip(passages, grades, strict=True):
            kinds[grade > 0].append(text)
        samples.append({"query": query, "positive": kinds[True], "negative": kinds[False]})
    return samples


def training_rows(
    lessons: Lessons, lists: NDArray[np.int64], loss: str, candidates: int, folder: Path
) -> tuple[Path, int, float]:
    """(Arrow file, pairs in a row at most, irrelevant pairs for each relevant one)."""
    path = folder / "rows.arrow"
    pairs = loss == "binary"
    text = pa.string() if pairs else pa.list_(pa.string())
    label = pa.float32() if pairs else pa.list_(pa.float32())
    schema = pa.schema([("query", pa.string()), ("passage" if pairs else "passages", text), ("label", label)])
    relevant = irrelevant = 0
    with pa.ipc.new_stream(str(path), schema) as stream:
        for chunk in batches(lists, _LISTS_AT_ONCE):
            rows: list[tuple[Any, ...]] = []
            for query, passages, grades in _read(lessons, chunk):
                best = sorted(range(len(grades)), key=lambda place: grades[place] <= 0)[:candidates]
                if all(grades[place] > 0 for place in best):  # a list must have something to tell apart
                    best[-1] = next(place for place, grade in enumerate(grades) if grade <= 0)
                texts, labels = [passages[place] for place in best], [float(max(grades[place], 0)) for place in best]
                relevant += sum(label > 0 for label in labels)
                irrelevant += sum(label == 0 for label in labels)
                rows += _rows(query, texts, labels, loss)
            columns = [
                pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            stream.write_batch(pa.record_batch(columns, schema=schema))
    return path, 1 if pairs else candidates, irrelevant / relevant


def _rows(query: str, texts: Sequence[str], labels: Sequence[float], loss: str) -> list[tuple[Any, ...]]:
    if loss == "binary":
        return [(query, text, float(label > 0)) for text, label in zip(texts, labels, strict=True)]
    scale = _APART if loss == "softmax" else 1.0
    return [(query, texts, [scale * label for label in labels])]


def _read(lessons: Lessons, lists: NDArray[np.int64]) -> Iterator[tuple[str, list[str], list[int]]]:
    for chunk in batches(lists, _LISTS_AT_ONCE):
        for number, query in zip(chunk, lessons.texts(lessons.queries[chunk]), strict=True):
            yield query, lessons.texts(lessons.passages[number]), lessons.grades[number].tolist()


def _place(text: str) -> float:
    """Where a query falls between 0 and 1, the same in every corpus."""
    return int.from_bytes(hashlib.sha256(f"held out {normalize(text)}".encode()).digest()[:8]) / 2**64
