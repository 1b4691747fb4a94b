"""Which texts share a step, and how they are read: rows of lessons become what a trainer of Sentence Transformers takes.

A data set here is nothing but numbers: `label`, the row of a text or the number of a list, and `length`, which is roughly its
number of tokens. Texts are read from their memory-mapped file when their batch is due.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable
from numpy.typing import NDArray
from sentence_transformers.base.sampler import DefaultBatchSampler

from stillroom_server.distillery.lessons import Lessons

Unit = Literal["text", "list"]
LENGTH = "length"
LABEL = "label"
_POOL = 32
"""Batches that are sorted by length together: like lengths share a batch, and batches stay random."""


def numbered(labels: NDArray[np.integer], lengths: NDArray[np.integer]) -> Dataset:
    """A data set of labels and lengths, (n,) each."""
    columns = [pa.array(labels, pa.int64()), pa.array(lengths, pa.int32())]
    return Dataset(InMemoryTable(pa.table(columns, names=[LABEL, LENGTH])))


def text_set(lessons: Lessons, rows: NDArray[np.integer]) -> Dataset:
    """Texts by row."""
    return numbered(rows, lessons.lengths[rows])


def list_set(lessons: Lessons, numbers: NDArray[np.integer], *, whole: bool) -> Dataset:
    """Lists by number; `whole` counts the candidates' lengths too, for students that read them."""
    lengths = lessons.lengths[lessons.queries[numbers]].astype(np.int64)
    if whole:
        lengths = lengths + lessons.lengths[lessons.passages[numbers]].max(axis=1)
    return numbered(numbers, lengths)


class LikeLengths(DefaultBatchSampler):
    """Random batches of like length: padding wasted a third of the work otherwise.

    Without `drop_last` one batch of an epoch may be shorter, anywhere in it. Several processes need it: what deals out batches
    to them takes a short one for the last, and gives one process a batch more, whose step waits for the others for ever.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool, **options: Any) -> None:
        super().__init__(range(len(dataset)), batch_size=batch_size, drop_last=drop_last)
        # The trainer wraps data sets whose names it needs, and a wrapped one is read row by row: read the table itself.
        self._lengths = np.asarray(dataset.data.column(LENGTH).to_numpy())
        self._seed = int(options.get("seed", 0))
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in like_lengths(self._lengths, self.batch_size, np.random.default_rng([self._seed, self._epoch])):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch


def like_lengths(lengths: NDArray[np.integer], batch_size: int, generator: np.random.Generator) -> Iterator[list[int]]:
    """Batches in which every row of `lengths`, (n,), stands once; which share a batch, and their order, is random."""
    order = generator.permutation(len(lengths))
    pool = batch_size * _POOL
    for begin in range(0, len(order), pool):
        chunk = order[begin : begin + pool]
        chunk[:] = chunk[np.argsort(lengths[chunk], kind="stable")]
    for i in generator.permutation(-(-len(order) // batch_size)):
        yield order[i * batch_size : (i + 1) * batch_size].tolist()


class Reading:
    """A collator that reads the texts of its numbers and leaves the rest to the trainer's own.

    Args:
        inner: the collator of the student's kind.
        units: what the labels of each data set number.
        passages: whether the student reads candidates as well.
    """

    def __init__(self, inner: Any, lessons: Lessons, units: Mapping[str, Unit], *, passages: bool) -> None:
        self._inner, self._lessons, self._units, self._passages = inner, lessons, units, passages
        self.valid_label_columns = [LABEL]  # asked for by the trainer

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the trainer takes: tokens, or texts for a cross-encoder, of the query and its candidates; and labels."""
        labels = np.array([one[LABEL] for one in features], np.int64)
        name = features[0].get("dataset_name", next(iter(self._units)))
        columns = {"query": self._lessons.texts(self._queries(self._units[name], labels))}
        if self._passages and self._units[name] == "list":
            rows = self._lessons.passages[labels]  # (batch, k)
            texts = self._lessons.texts(rows.ravel())
            columns |= {f"passage{place}": texts[place :: rows.shape[1]] for place in range(rows.shape[1])}
        read = [
            {"dataset_name": name, **dict(zip(columns, row, strict=True)), LABEL: int(label)}
            for *row, label in zip(*columns.values(), labels, strict=True)
        ]
        collated: dict[str, Any] = self._inner(read)
        return collated

    def _queries(self, unit: Unit, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        return labels if unit == "text" else self._lessons.queries[labels]
