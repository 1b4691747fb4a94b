"""What a teacher is: it scores passages for a query, and some place texts in a space as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Role = Literal["query", "passage"]
FloatArray = NDArray[np.float32]


@runtime_checkable
class Teacher(Protocol):
    """A scorer. Equal inputs give equal scores whatever else is in the call, so that scores can be kept by content."""

    @property
    def identity(self) -> str:
        """A hash of all that its scores depend on beside the texts: weights, text limits, precision, term statistics."""

    def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
        """Scores of each query's own passages on the teacher's own scale, higher is better.

        Args:
            queries: n texts.
            passages: n lists, which may differ in length.

        Returns:
            n arrays, each as long as its list of passages.
        """


@runtime_checkable
class Embedder(Teacher, Protocol):
    """A teacher that has one vector for each text; its score is their inner product."""

    @property
    def dimension(self) -> int:
        """Length of its vectors."""

    def embed(self, texts: Sequence[str], role: Role) -> FloatArray:
        """Unit vectors in the order of `texts`, (n, dimension)."""
