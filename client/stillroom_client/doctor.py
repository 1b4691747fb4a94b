"""Is this index well? Its recall against exact search on the owner's own queries, its speed, its size, its integrity.

Guarantees: recall is of one generation of the store; no query leaves the device or is written; nothing changes but the derived
indexes, which are brought to the present as any search would do.

| finding | level |
|---|---|
| SQLite's own check, a row without its counterpart, a vector or text that is not what was stored | wrong |
| a file of the home that others may read; a release that does not verify | wrong |
| an index file that is torn, or holds another number of passages than the store | wrong (and built again) |
| Recall@10 whose whole 95% interval is below the goal | wrong |
| recall below the goal, but too few queries to be sure; much dead space; vectors of unfinished documents | remark |
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stillroom_client.cache import CacheCounts
from stillroom_client.device import Device
from stillroom_client.home import INDEX_NAME, STORE_NAME, TEXT_INDEX_NAME
from stillroom_client.index_check import DEPTH, Latency, Measures, compare, dead_shares
from stillroom_client.integrity import Finding, check_files, check_store
from stillroom_shared.errors import ReleaseError, StillroomError

GOAL = 0.97
"""Recall@10 that an index shall have."""

ENOUGH = 30
"""Own queries from which on they are asked alone."""

_MOST, _ASKED = 500, 200  # own queries that are asked; queries that are asked when there are not enough
_WORDS = 16  # of a passage's beginning that stand in for a query


@dataclass(frozen=True, slots=True)
class Sample:
    """Queries that were asked: the owner's, and beginnings of passages in place of queries."""

    own: int = 0
    stand_ins: int = 0


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found.

    Attributes:
        states: of the indexes of vectors and of words, before they were used.
        search_latency: of whole searches, hybrid, without cache.
        bytes: of the store and of each derived file.
        dead: share of each that stands for passages that are gone.
        cache: of this process.
    """

    name: str
    generation: int
    passages: int
    states: dict[str, str]
    sample: Sample
    goal: float
    measures: Measures
    search_latency: Latency | None
    bytes: dict[str, int]
    dead: dict[str, float]
    cache: CacheCounts
    findings: tuple[Finding, ...]

    @property
    def well(self) -> bool:
        """Whether nothing is wrong; remarks do not count."""
        return all(finding.level != "wrong" for finding in self.findings)


@dataclass(kw_only=True)
class _Notes:
    """What comes of the steps of an examination, each of which may fail for itself."""

    generation: int = 0
    passages: int = 0
    states: dict[str, str] = field(default_factory=dict)
    sample: Sample = field(default_factory=Sample)
    measures: Measures = field(default_factory=Measures)
    search_latency: Latency | None = None
    dead: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def examine(device: Device, *, goal: float = GOAL, seed: int = 0) -> Examination:
    """Look at everything; takes about as long as reading the store twice. A damaged store is not searched.

    Args:
        goal: Recall@10 to hold.
        seed: which passages stand in for queries.
    """
    stored = list(check_store(device.store))
    notes = _Notes(findings=[*check_files(device.home), *stored])
    try:
        _see(device, notes)
        if all(finding.level != "wrong" for finding in stored):
            _measure(device, goal, seed, notes)
    except ReleaseError as error:
        notes.findings.append(Finding("wrong", str(error), "until then recall and speed cannot be measured"))
    except StillroomError as error:
        notes.findings.append(Finding("wrong", str(error), "mend that, then ask again"))
    return Examination(
        name=device.identity.name,
        generation=notes.generation,
        passages=notes.passages,
        states=notes.states,
        sample=notes.sample,
        goal=goal,
        measures=notes.measures,
        search_latency=notes.search_latency,
        bytes=sizes(device.store.path.parent),
        dead=notes.dead,
        cache=device.cache.counts,
        findings=(*notes.findings, *notes.measures.findings),
    )


def sampled(device: Device, seed: int) -> tuple[list[str], Sample]:
    """Queries to ask: the owner's latest, each once; with fewer than `ENOUGH`, beginnings of passages beside them."""
    own = list(dict.fromkeys(seen.query for seen in reversed(device.feedback())))[:_MOST]
    if len(own) >= ENOUGH:
        return own, Sample(len(own))
    rows = np.array([row for (row,) in device.store.query("SELECT row FROM passages ORDER BY row")], np.int64)
    chosen = np.random.default_rng(seed).permutation(rows)[: _ASKED - len(own)].tolist()
    found = device.store.passages(chosen)
    # Not the title: all passages of a document may have the same.
    stand_ins = list(dict.fromkeys(" ".join(found[row].text.split()[:_WORDS]) for row in chosen))
    return own + stand_ins, Sample(len(own), len(stand_ins))


def _see(device: Device, notes: _Notes) -> None:
    status = device.status()
    notes.generation, notes.passages = status.generation, status.passages
    notes.states = {"vectors": status.index, "words": status.text_index}
    for name in (name for name, state in notes.states.items() if state == "torn"):
        again = "it is built from the store again; if that recurs, check the disk"
        notes.findings.append(Finding("wrong", f"the index of {name} was damaged", again))


def _measure(device: Device, goal: float, seed: int, notes: _Notes) -> None:
    with device.indexes.current(dense=True, text=True) as current:
        notes.dead, found = dead_shares(device.store, current, device.store.path.parent / TEXT_INDEX_NAME)
        notes.findings += found
    texts, notes.sample = sampled(device, seed)
    if not texts:
        return
    queries = device.embed_queries(texts)
    with device.indexes.current(dense=True, text=False) as current:
        notes.measures = compare(device.store, current, queries, goal)
    seconds = []
    for text in texts[:_ASKED]:
        begun = time.perf_counter()
        device.search(text, DEPTH, cached=False)
        seconds.append(time.perf_counter() - begun)
    notes.search_latency = Latency.of(seconds)


def sizes(home: Path) -> dict[str, int]:
    """Bytes of the store and of each derived file, in the folder of the store; one that has several names counts once."""
    parts = {
        STORE_NAME: [home / f"{STORE_NAME}{suffix}" for suffix in ("", "-wal", "-shm")],
        INDEX_NAME: [home / INDEX_NAME],
        TEXT_INDEX_NAME: list((home / TEXT_INDEX_NAME).rglob("*")),
    }
    found: dict[str, int] = {}
    for name, paths in parts.items():
        own = {(known := path.stat()).st_ino: known.st_size for path in paths if path.is_file()}
        found[name] = sum(own.values())
    return found
