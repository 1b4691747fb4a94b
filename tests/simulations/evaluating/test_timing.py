"""Turns of timing: who is asked what, how often and when; never how long it took."""

from __future__ import annotations

import gc
from typing import Any

import torch

from stillroom_simulations.evaluating.timing import time_queries

TEXTS = [f"t{number}" for number in range(45)]


class Noting:
    """A searcher that writes down what it is asked."""

    def __init__(self, name: str, log: list[tuple[str, str, int]]) -> None:
        self.name, self.log = name, log
        self.states: set[tuple[int, bool]] = set()

    def encode(self, text: str) -> Any:
        """Note the conditions."""
        self.states.add((torch.get_num_threads(), gc.isenabled()))
        return text

    def search(self, encoded: Any, k: int) -> list[str]:
        """Note the query."""
        self.log.append((self.name, encoded, k))
        return []


def test_systems_take_turns_on_the_same_queries() -> None:
    """Timed one after the other, a pause of the machine falls on one system, and the ratio is of two moments."""
    log: list[tuple[str, str, int]] = []
    searchers: Any = {name: Noting(name, log) for name in ("a", "b")}
    before = torch.get_num_threads(), gc.isenabled()
    found = time_queries(searchers, TEXTS, seconds=60)
    assert {name: len(one.total) for name, one in found.items()} == {"a": 45, "b": 45}
    blocks = [log[place][0] for place in range(len(log)) if place == 0 or log[place][0] != log[place - 1][0]]
    assert blocks == ["a", "b"] * 3
    for name in ("a", "b"):
        asked = [text for own, text, _ in log if own == name]
        assert asked == ["t0", *TEXTS[:20], "t20", *TEXTS[20:40], "t40", *TEXTS[40:]]  # the first of a turn warms up
        assert searchers[name].states == {(1, False)}
    assert {k for _, _, k in log} == {10} and (torch.get_num_threads(), gc.isenabled()) == before


def test_timing_ends_after_whole_turns() -> None:
    """A slow system must not be timed on fewer queries than a fast one, nor hold everything up."""
    log: list[tuple[str, str, int]] = []
    searchers: Any = {name: Noting(name, log) for name in ("a", "b")}
    found = time_queries(searchers, TEXTS, seconds=0)
    assert {name: len(one.total) for name, one in found.items()} == {"a": 20, "b": 20}
    assert (found["a"].total == found["a"].encode + found["a"].search).all()
    assert set(found["a"].percentiles()) == {"encode", "search", "total"}
