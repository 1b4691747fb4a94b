"""What would make an approximate index find more, and at what setting it finds enough: measured on the queries at hand.

| kind | what it may miss | what is raised |
|---|---|---|
| `flat` | what 8 bits blur: nothing can be raised | - |
| `hnsw` | rows that the walk through the graph does not meet | `ef_search` |
| `ivf` | rows in lists that are not read | `nprobe`, up to all lists |
| `pq` | the same, and rows that the codes rank too low | `nprobe` and `candidates` |
| `sq4` | rows that the codes rank too low | `candidates` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

MOST_EF, MOST_CANDIDATES = 6_400, 6_400
"""Beyond these a search costs more than reading every vector of most indexes."""

_OPTIONS = {"ef_search": "--ef-search", "nprobe": "--nprobe", "candidates": "--candidates"}


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """A kind of index and how thoroughly it is searched; 0 for what it does not have. `lists`: how many there are to read."""

    kind: str = "flat"
    ef_search: int = 0
    nprobe: int = 0
    candidates: int = 0
    lists: int = 0

    @property
    def settings(self) -> dict[str, int]:
        """Those that this kind has, by name."""
        return {name: value for name in _OPTIONS if (value := getattr(self, name))}

    @property
    def command(self) -> str:
        """What sets them.

        >>> Knobs(kind="pq", nprobe=16, candidates=200, lists=300).command
        'stillroom index tune --kind pq --nprobe 16 --candidates 200'
        """
        given = " ".join(f"{_OPTIONS[name]} {value}" for name, value in self.settings.items())
        return f"stillroom index tune --kind {self.kind} {given}".rstrip()


def suggest(knobs: Knobs, recall: float, goal: float) -> Knobs | None:
    """The next settings to try where recall is below its goal: twice as thorough; None where it is not, or nothing is left.

    >>> suggest(Knobs(kind="ivf", nprobe=8, lists=100), 0.94, 0.97)
    Knobs(kind='ivf', ef_search=0, nprobe=16, candidates=0, lists=100)
    >>> suggest(Knobs(), 0.94, 0.97), suggest(Knobs(kind="ivf", nprobe=100, lists=100), 0.94, 0.97)
    (None, None)
    """
    if recall >= goal:
        return None
    raised = replace(
        knobs,
        ef_search=min(2 * knobs.ef_search, max(MOST_EF, knobs.ef_search)),
        nprobe=min(2 * knobs.nprobe, max(knobs.lists, knobs.nprobe)),
        candidates=min(2 * knobs.candidates, max(MOST_CANDIDATES, knobs.candidates)),
    )
    return raised if raised != knobs else None


@dataclass(frozen=True, slots=True)
class Advice:
    """Settings that were tried last and their recall; `enough`: they meet the goal."""

    knobs: Knobs
    recall: float
    enough: bool


def climb(knobs: Knobs, recall: float, goal: float, measure: Callable[[Knobs], float]) -> Advice | None:
    """Follow `suggest`, measuring recall at each step, until the goal is met; None where there is nothing to change."""
    last: Advice | None = None
    while (better := suggest(knobs, recall, goal)) is not None:
        knobs, recall = better, measure(better)
        last = Advice(knobs, recall, recall >= goal)
    return last
