"""How well and how fast the derived indexes of a device answer, beside exact search, on given queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_client.derived import Current, Dense
from stillroom_client.exact import Exact, Share, exact_search, recalls, share_of
from stillroom_client.home import INDEX_NAME, STORE_NAME, TEXT_INDEX_NAME
from stillroom_client.index_advice import Advice, Knobs, climb
from stillroom_client.integrity import Finding
from stillroom_client.store import Store
from stillroom_client.text_index import read_seal

DEPTH = 10

_TIMED = 20  # queries whose exact search is timed
_SLACK, _SLACK_BYTES = 0.25, 10_000_000  # of the store's file that is free: above both it is remarked on
_REBUILD = f"remove {INDEX_NAME} and {TEXT_INDEX_NAME}/ from the home: the next search builds them from the store"

Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""Store rows (q, k), best first, for queries (q, dim)."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one query, on one core."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float] | NDArray[np.float64]) -> Latency:
        """Percentiles of times in seconds, each a time that was measured; of few, the 99th is the largest."""
        p50, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 99], method="higher")
        return cls(float(p50), float(p99))


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What was measured; None for what could not be."""

    knobs: Knobs = field(default_factory=Knobs)
    recall: Share | None = None
    advice: Advice | None = None
    index_latency: Latency | None = None
    exact_latency: Latency | None = None
    findings: tuple[Finding, ...] = ()


def compare(store: Store, current: Current, queries: NDArray[np.float32], goal: float) -> Measures:
    """The index of vectors against every stored vector; below the goal, other settings are tried. Ask inside `Indexes.current`.

    Args:
        queries: (q, dim), q > 0.
    """
    assert current.vectors is not None
    dense = current.vectors
    knobs, search = knobs_of(dense), searching(dense)
    exact = exact_search(store, queries, DEPTH, timed=_TIMED)
    found, seconds = _timed(search, queries)
    indexed, exactly = Latency.of(seconds), Latency.of(exact.seconds)
    if found.shape != exact.rows.shape or len(store.names(np.unique(found))) < len(np.unique(found)):
        lost = Finding("wrong", "the index of vectors does not hold the passages of the store", _REBUILD)
        return Measures(knobs=knobs, findings=(lost,), index_latency=indexed, exact_latency=exactly)
    recall = share_of(recalls(store, queries, found, exact), exact.rows.shape[1])
    advice = climb(knobs, recall.value, goal, lambda tried: _recall(store, queries, searching(dense, tried), exact))
    finding = judge(recall, goal, knobs, advice, len(queries))
    return Measures(
        knobs=knobs,
        recall=recall,
        advice=advice,
        index_latency=indexed,
        exact_latency=exactly,
        findings=(finding,) if finding else (),
    )


def knobs_of(dense: Dense) -> Knobs:
    """What kind of index it is, and how thoroughly it is searched."""
    base, effort = dense.index.base, dense.effort
    return Knobs(
        kind=base.kind,
        ef_search=effort.ef_search if base.kind == "hnsw" else 0,
        nprobe=effort.nprobe if base.lists else 0,
        candidates=effort.candidates,
        lists=base.lists,
    )


def searching(dense: Dense, knobs: Knobs | None = None) -> Search:
    """The search of an index, with other settings where they are given."""
    changed = dense if knobs is None else replace(dense, effort=dense.effort.model_copy(update=knobs.settings))
    return lambda queries: changed.search(queries, DEPTH)[1]


def judge(recall: Share, goal: float, knobs: Knobs, advice: Advice | None, queries: int) -> Finding | None:
    """What to say of a recall: nothing where it meets its goal; wrong where its whole interval is below it."""
    if recall.value >= goal:
        return None
    if recall.high < goal:
        return Finding("wrong", f"Recall@{DEPTH} {recall} is below {goal:g}", _remedy(knobs, advice))
    text = f"Recall@{DEPTH} {recall} is below {goal:g}, but {queries} queries do not prove it"
    return Finding("remark", text, _remedy(knobs, advice))


def dead_shares(store: Store, current: Current, words: Path) -> tuple[dict[str, float], list[Finding]]:
    """What share of each file stands for passages that are gone; ask inside `Indexes.current`.

    Args:
        words: the folder of the index of words.
    """
    shares: dict[str, float] = {}
    findings: list[Finding] = []
    if current.vectors is not None:
        gone, count = len(current.vectors.index.gone), current.vectors.index.count
        shares["vectors"] = gone / max(gone + count, 1)
    if (seal := read_seal(words / current.generation.stamp)) is not None:
        shares["words"] = seal.dead / max(seal.count + seal.dead, 1)
        if seal.count != store.count():
            text = f"the index of words holds {seal.count:,} passages, the store {store.count():,}"
            findings.append(Finding("wrong", text, _REBUILD))
    free, pages, size = (int(store.query(f"PRAGMA {n}")[0][0]) for n in ("freelist_count", "page_count", "page_size"))
    shares["store"] = free / max(pages, 1)
    if shares["store"] > _SLACK and free * size > _SLACK_BYTES:
        text = f"{shares['store']:.0%} of {STORE_NAME} is free space of what was removed"
        findings.append(Finding("remark", text, "`stillroom index compact` gives it back"))
    return shares, findings


def _remedy(knobs: Knobs, advice: Advice | None) -> str:
    if advice is None:
        return "every vector is read already: what is missed is lost in rounding to 8 bits, and close to what was found"
    changes = " and ".join(
        f"{name} from {knobs.settings[name]} to {value}"
        for name, value in advice.knobs.settings.items()
        if value != knobs.settings[name]
    )
    enough = "" if advice.enough else ", the most that helps; another kind may do better"
    return f"raise {changes} (`{advice.knobs.command}`): {advice.recall:.3f} on these queries{enough}"


def _recall(store: Store, queries: NDArray[np.float32], search: Search, exact: Exact) -> float:
    return float(recalls(store, queries, search(queries), exact).mean())


def _timed(search: Search, queries: NDArray[np.float32]) -> tuple[NDArray[np.int64], list[float]]:
    search(queries[:1])  # the first one pays for what is read but once
    found, seconds = [], []
    for query in queries:
        begun = time.perf_counter()
        found.append(search(query[None])[0])
        seconds.append(time.perf_counter() - begun)
    return np.stack(found), seconds
