"""What a figure should be: `>= 0.96`, `<= 0.005` or `> 0`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
_WRITTEN = re.compile(r"(>=|<=|>) (-?\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound, and on which side of it a figure should lie.

    >>> [Goal.parse(">= 0.96").holds(ends) for ends in ((0.963, 0.98), (0.957, 0.98))]
    [True, False]
    """

    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """As written in files and tables; `ValueError` for anything else."""
        if not (match := _WRITTEN.fullmatch(text)):
            raise ValueError(f'goal {text!r} is not understood: write it as ">= 0.96", "<= 0.005" or "> 0"')
        return cls(match[1], float(match[2]))

    def met(self, value: float) -> bool:
        """Whether one value lies there."""
        return _COMPARISONS[self.comparison](value, self.bound)

    def holds(self, ends: Iterable[float]) -> bool:
        """Whether a whole interval does."""
        return all(map(self.met, ends))
