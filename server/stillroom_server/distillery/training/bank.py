"""What the teachers said, laid beside the lessons: constants of training, memory-mapped and read a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom_server.distillery.lessons import ROLES, Lessons
from stillroom_shared.errors import DataError


@dataclass(frozen=True, eq=False)
class Bank:
    """Lessons with the vectors and scores that belong to them.

    Attributes:
        lessons: texts and lists.
        vectors: unit vectors of the teacher whose space the student shares, (texts, dim), of any float type; or None. Rows of
            texts that were not embedded, because nothing should read them, are NaN.
        scores: of the teachers together, (lists, k) float32; or None.
    """

    lessons: Lessons
    vectors: NDArray[np.floating] | None = None
    scores: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.vectors is not None and len(self.vectors) != len(self.lessons):
            raise DataError(f"{len(self.vectors)} vectors for {len(self.lessons)} texts: make the vectors again")
        wanted = self.lessons.lists, self.lessons.candidates
        if self.scores is not None and self.scores.shape != wanted:
            raise DataError(f"scores have shape {self.scores.shape}, the lists {wanted}: make the scores again")

    @property
    def dimension(self) -> int | None:
        """Of the vectors."""
        return None if self.vectors is None else int(self.vectors.shape[1])

    def vectors_of(self, rows: NDArray[np.int64]) -> Tensor:
        """Vectors of texts, (*rows.shape, dim) float32. Raises `DataError` for a text that was not embedded."""
        if self.vectors is None:
            raise DataError("there are no teacher's vectors: name `documents` in the recipe")
        # Rows in ascending order are read from disk in one sweep.
        unique, places = np.unique(rows, return_inverse=True)
        found = np.asarray(self.vectors[unique], np.float32)
        if (absent := np.isnan(found[:, :1]).any(axis=1)).any():
            row = int(unique[absent][0])
            raise DataError(
                f"text {row} was not embedded, nor {int(absent.sum()) - 1} others that are read: make the vectors again, of "
                f"{ROLES[self.lessons.roles[row]]} texts too"
            )
        return torch.from_numpy(found[places.reshape(rows.shape)])

    @cached_property
    def passages(self) -> Tensor:
        """Vectors of all passages, (passages, dim) float32, held in memory: what a ranking of the whole corpus is over."""
        return self.vectors_of(self.lessons.rows("passage"))

    @cached_property
    def place_of(self) -> NDArray[np.int64]:
        """Where each text's row is among `passages`, (texts,); -1 for a query."""
        rows = self.lessons.rows("passage")
        places = np.full(len(self.lessons), -1, np.int64)
        places[rows] = np.arange(len(rows))
        return places

    def grades_of(self, queries: NDArray[np.int64]) -> Tensor:
        """Known relevance of every passage for these queries (by row), whichever of their lists knows it, (n, passages)."""
        asked, passages, grades = self._relevant
        found = torch.zeros(len(queries), len(self.lessons.rows("passage")))
        first, last = (np.searchsorted(asked, queries, side) for side in ("left", "right"))
        for line, start, stop in zip(found, first.tolist(), last.tolist(), strict=True):
            line[self.place_of[passages[start:stop]]] = torch.from_numpy(grades[start:stop])
        return found

    @cached_property
    def _relevant(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """(query, passage, grade) of what any list grades above 0, in order of queries."""
        lists, places = np.nonzero(self.lessons.grades > 0)
        order = np.argsort(self.lessons.queries[lists], kind="stable")
        lists, places = lists[order], places[order]
        grades = self.lessons.grades[lists, places].astype(np.float32)
        return self.lessons.queries[lists], self.lessons.passages[lists, places], grades
