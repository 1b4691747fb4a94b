"""Evaluate any number of systems on any number of data sets, with intervals, paired tests, latency and bytes.

| figure | how it is made |
|---|---|
| a metric | mean over judged queries that have a relevant passage; bootstrap over queries (`intervals.py`) |
| a mean over data sets | each set weighs the same; queries are resampled within sets |
| a difference to the first system | paired over queries: bootstrap, randomisation test, Holm over systems (`significance.py`) |
| latency | one query at a time on one thread, systems in turns (`timing.py`) |

Resamples depend on the seed alone, so a system's figures are the same whichever others stand beside it. Passages are read as
`Passage.full_text` joins title and text.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from stillroom_shared.corpus import SPLITS, Corpus, Query, Split
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.progress import Progress, Stage
from stillroom_shared.scales import FIRST_SHARE
from stillroom_simulations import significance
from stillroom_simulations.benchmark_file import machine, versions
from stillroom_simulations.evaluate import Run, Scores, cutoff_of, evaluate_run
from stillroom_simulations.evaluating.kept import Kept
from stillroom_simulations.evaluating.specs import Opener
from stillroom_simulations.evaluating.systems import Searcher, System, without_identical_ids
from stillroom_simulations.evaluating.timing import Latency, time_queries
from stillroom_simulations.evaluating.values import METRICS, Compared, Evaluation, Measured, OnSet
from stillroom_simulations.intervals import RESAMPLES, Interval, intervals_over_sets

_SECONDS_PER_TEXT = 0.02  # of a small model on one core, for the first estimate of what is left
_LATENCY_STAGE = "latency"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How to evaluate.

    Attributes:
        split: of every data set; None for test where there is one, otherwise dev.
        metrics: `evaluate_run` knows which there are.
        first_stage: what cross-encoders re-rank, as on the command line.
        rerank: how many of its best passages they read.
        first_share: weight of its scores in their ranking, 0 to 1; 0 for the cross-encoder alone.
        timed: queries that are timed; 0 for none.
        timed_seconds: no turn of timing begins after so long.
        threads: of embedding; timing has one.
        device: of torch.
        ignore_identical_ids: leave out a passage whose id is the query's own, as BEIR does (needed for ArguAna and Quora).
        seed: of resampling.
        resamples: of the bootstrap.
        cache: folder of vectors and scores; None keeps none.
    """

    split: Split | None = None
    metrics: tuple[str, ...] = METRICS
    first_stage: str = "bm25"
    rerank: int = 100
    first_share: float = FIRST_SHARE
    timed: int = 200
    timed_seconds: float = 60.0
    threads: int = 1
    device: str = "cpu"
    ignore_identical_ids: bool = False
    seed: int = 0
    resamples: int = RESAMPLES
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.metrics:
            raise SettingsError("metrics is empty: name at least one, such as ndcg_at_10")
        for name, least in (("rerank", 1), ("timed", 0), ("threads", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} = {getattr(self, name)} is out of range: give at least {least}")
        if not 0 <= self.first_share <= 1:
            raise SettingsError(f"first_share = {self.first_share} is out of range: give 0 to 1")


def evaluate_models(
    models: Sequence[str | System],
    corpora: Sequence[Corpus],
    choices: Choices | None = None,
    *,
    console: Console | None = None,
) -> Evaluation:
    """Evaluate all models on all data sets; the first is what the others are compared with.

    Args:
        models: names as on the command line (`specs.py`), or systems.
        corpora: loaded with their published splits.
        console: where progress is shown.

    Raises:
        SettingsError: a model cannot be had, or is none that can be evaluated.
        DataError: a data set lacks the split, or a device lacks passages of it.
    """
    choices = choices or Choices()
    asked = {corpus.name: queries_of(corpus, choices.split) for corpus in corpora}
    if not models or len(asked) != len(corpora) or not corpora:
        raise SettingsError("give at least one model and one data set, and data sets of different names")
    opener = Opener(
        device=choices.device, threads=choices.threads, first_stage=choices.first_stage, top=choices.rerank,
        share=choices.first_share, ignore_identical_ids=choices.ignore_identical_ids,
    )  # fmt: skip
    with opener, _threads(choices.threads):
        systems = opener.systems(models)
        progress = Progress(_plan(corpora, asked, systems, choices), console=console or Console(file=io.StringIO()))
        sets = tuple(_on_set(corpus, asked[corpus.name], systems, choices, progress) for corpus in corpora)
    means, comparisons = _over_sets(sets, choices) if len(sets) > 1 else ({}, ())
    return Evaluation(sets, means, comparisons, _facts(choices, [system.name for system in systems]))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads for torch, until it is left."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def queries_of(corpus: Corpus, split: Split | None) -> tuple[Query, ...]:
    """The judged queries of a split; by default test, or dev where there is no test. `DataError` lists what there is."""
    there = [name for name in SPLITS if corpus.queries_in(name)]
    default = next((name for name in ("test", "dev") if name in there), None)
    chosen = split or default
    if chosen is None or chosen not in there:
        wanted = f"no {split} split" if split else "neither a test nor a dev split"
        counts = ", ".join(f"{name} ({len(corpus.queries_in(name)):,} queries)" for name in there) or "none"
        raise DataError(f"{corpus.name} has {wanted} with judged queries: name one of its own with --split: {counts}")
    return corpus.queries_in(chosen)


@dataclass(eq=False)
class _Session:
    """One data set while it is worked on."""

    corpus: Corpus
    queries: tuple[Query, ...]
    choices: Choices
    searchers: dict[str, Searcher] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    def ask(self, system: System, progress: Stage) -> None:
        """Index the passages, rank every query, score the rankings."""
        kept = Kept(self.choices.cache)
        searcher = system.index(self.corpus.passages, kept, _part(progress, 0.0, 0.7))
        depth = max(cutoff_of(metric) for metric in self.choices.metrics) + self.choices.ignore_identical_ids
        run = searcher.run(self.queries, depth, _part(progress, 0.7, 1.0))
        if self.choices.ignore_identical_ids:
            run = without_identical_ids(run)
        self.searchers[system.name] = searcher
        self.scores[system.name] = self._scored(run)

    def _scored(self, run: Run) -> Scores:
        qrels = {query.id: self.corpus.qrels[query.id] for query in self.queries}
        return evaluate_run(run, qrels, metrics=self.choices.metrics)


def _on_set(
    corpus: Corpus, queries: tuple[Query, ...], systems: Sequence[System], choices: Choices, progress: Progress
) -> OnSet:
    session = _Session(corpus, queries, choices)
    for system in systems:
        with progress.stage(_stage(corpus, system.name)) as stage:
            session.ask(system, stage)
            first = choices.metrics[0]
            stage.note(f"{first.replace('_at_', '@')} {session.scores[system.name].mean[first]:.3f}")
    latencies: dict[str, Latency] = {}
    if choices.timed:
        with progress.stage(_stage(corpus, _LATENCY_STAGE)) as stage:
            texts = [query.text for query in _spread(queries, choices.timed)]
            latencies = time_queries(session.searchers, texts, seconds=choices.timed_seconds, progress=stage)
    measured = tuple(
        Measured(
            system.name,
            system.how,
            session.scores[system.name],
            _named(choices, _intervals([session.scores[system.name].table], choices)),
            session.searchers[system.name].bytes,
            latencies.get(system.name),
        )
        for system in systems
    )
    tables = {one.model: [one.scores.table] for one in measured}
    scored = len(measured[0].scores.query_ids)
    compared = compare(tables, choices)
    return OnSet(corpus.name, queries[0].split, corpus.content_hash, len(corpus.passages), scored, measured, compared)


def _over_sets(
    sets: Sequence[OnSet], choices: Choices
) -> tuple[Mapping[str, Mapping[str, Interval]], tuple[Compared, ...]]:
    names = [one.model for one in sets[0].models]
    tables = {name: [one.of(name).scores.table for one in sets] for name in names}
    means = {name: _named(choices, _intervals(own, choices)) for name, own in tables.items()}
    return means, compare(tables, choices)


def compare(tables: Mapping[str, Sequence[NDArray[np.float64]]], choices: Choices) -> tuple[Compared, ...]:
    """Each system minus the first, in each metric; Holm's correction over the systems within a metric.

    Args:
        tables: by system, first the one that others are compared with: one of (queries, metrics) for each data set, with
            the same queries in the same order for all systems.
    """
    baseline, *others = tables
    if not others:
        return ()
    pairs = zip(*(tables[name] for name in tables), strict=True)
    # Columns: all metrics of the second system, then of the third, ...
    differences = [np.concatenate([own - base for own in rest], axis=1) for base, *rest in pairs]
    generator = np.random.default_rng(choices.seed)
    values = significance.paired_randomisation(differences, generator=generator).reshape(len(others), -1)
    intervals = _intervals(differences, choices)
    corrected = np.array([significance.holm(column) for column in values.T.tolist()]).T  # (systems, metrics)
    width = len(choices.metrics)
    return tuple(
        Compared(
            name,
            baseline,
            metric,
            intervals[row * width + column],
            float(values[row, column]),
            float(corrected[row, column]),
        )
        for row, name in enumerate(others)
        for column, metric in enumerate(choices.metrics)
    )


def _intervals(tables: Sequence[NDArray[np.float64]], choices: Choices) -> tuple[Interval, ...]:
    generator = np.random.default_rng(choices.seed)
    return intervals_over_sets(tables, generator=generator, resamples=choices.resamples)


def _named(choices: Choices, intervals: Iterable[Interval]) -> dict[str, Interval]:
    return dict(zip(choices.metrics, intervals, strict=True))


def _spread(queries: Sequence[Query], count: int) -> list[Query]:
    """`count` of the queries, evenly from first to last: neighbours often resemble each other."""
    if len(queries) <= count:
        return list(queries)
    return [queries[round(place)] for place in np.linspace(0, len(queries) - 1, count)]


def _part(progress: Callable[[int, int], None], begin: float, end: float) -> Callable[[int, int], None]:
    """Progress of a part as progress of the whole."""

    def report(done: int, total: int) -> None:
        progress(round(1_000 * (begin + (end - begin) * (done / total if total else 1.0))), 1_000)

    return report


def _stage(corpus: Corpus, name: str) -> str:
    return f"{corpus.name}: {name}"


def _plan(
    corpora: Sequence[Corpus], asked: Mapping[str, Sequence[Query]], systems: Sequence[System], choices: Choices
) -> dict[str, float]:
    plan: dict[str, float] = {}
    for corpus in corpora:
        seconds = (len(corpus.passages) + len(asked[corpus.name])) * _SECONDS_PER_TEXT
        plan |= {_stage(corpus, system.name): 1 + seconds for system in systems}
        if choices.timed:
            plan[_stage(corpus, _LATENCY_STAGE)] = min(choices.timed_seconds, choices.timed * len(systems) * 0.01)
    return plan


def _facts(choices: Choices, names: Sequence[str]) -> dict[str, Any]:
    return {
        "models": list(names),
        "metrics": list(choices.metrics),
        "first_stage": {
            "of_cross_encoders": choices.first_stage,
            "passages": choices.rerank,
            "share": choices.first_share,
        },
        "ignore_identical_ids": choices.ignore_identical_ids,
        "seed": choices.seed,
        "intervals": f"percentile bootstrap over queries, {choices.resamples} resamples",
        "tests": f"paired randomisation, two-sided, {significance.RESAMPLES} resamples or exact; Holm over the models",
        "device": choices.device,
        "machine": machine(choices.threads),
        "versions": versions(),
    }
