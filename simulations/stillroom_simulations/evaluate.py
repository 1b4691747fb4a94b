"""How good a ranking is: nDCG, recall, MRR and MAP for every query, through `ir-measures`; and exact dense search.

nDCG is trec_eval's: linear gains, log2 discount (Järvelin & Kekäläinen 2002), which is what BEIR and MTEB report; MAP at a
depth is its map_cut, whose denominator is the number of all relevant passages.

| case | what happens |
|---|---|
| a judged query that the run does not answer | scores 0 |
| a query without any relevant passage (score > 0) among the candidates | left out: no ranking can be right |
| a query of the run that is not judged | left out |
| equal scores | the smaller passage id first, whatever order they came in |
| a score or a vector that is not finite | refused |

Ties are settled here and handed on as ranks: trec_eval keeps scores in single precision and puts the *larger* id first,
so two systems with the same vectors could otherwise get different figures.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np
from ir_measures import AP, RR, R, nDCG
from numpy.typing import NDArray

from stillroom_shared.errors import DataError
from stillroom_simulations.intervals import intervals_of_means
from stillroom_simulations.results import OwnIndexQuality, Quality

Run = dict[str, dict[str, float]]  # query id -> passage id -> score
Qrels = Mapping[str, Mapping[str, int]]  # query id -> passage id -> grade
FloatArray = NDArray[np.float64]

CUTOFF = 10
METRICS = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
"""Of the stages of a run, as results.json has them. `evaluate_run` takes any others of the same form."""

_FAMILIES = {"ndcg": nDCG, "recall": R, "mrr": RR, "map": AP}
_METRIC = re.compile(f"({'|'.join(_FAMILIES)})_at_([1-9][0-9]*)")
_UNIT_ROUNDOFF = 2.0**-24  # of float32


@dataclass(frozen=True, eq=False)
class Scores:
    """Each metric for each query, in one order.

    >>> scores = evaluate_run({"q1": {"a": 0.9, "b": 0.8}, "q2": {"b": 0.7}}, {"q1": {"b": 1}, "q2": {"b": 2}})
    >>> scores.query_ids, scores.mrr_at_10.tolist(), {name: round(value, 3) for name, value in scores.mean.items()}
    (('q1', 'q2'), [0.5, 1.0], {'ndcg_at_10': 0.815, 'recall_at_10': 1.0, 'mrr_at_10': 0.75})

    Attributes:
        query_ids: (n,) judged queries that have a relevant passage, sorted.
        metrics: names, such as "ndcg_at_10".
        table: (n, metrics) float64 in [0, 1]: one column for each metric.
    """

    query_ids: tuple[str, ...]
    metrics: tuple[str, ...]
    table: FloatArray

    def __post_init__(self) -> None:
        self.table.setflags(write=False)

    def of(self, metric: str) -> FloatArray:
        """(n,) one metric; `DataError` when it was not measured."""
        if metric not in self.metrics:
            raise DataError(f"{metric} was not measured: {', '.join(self.metrics)} were")
        return self.table[:, self.metrics.index(metric)]

    @property
    def ndcg_at_10(self) -> FloatArray:
        """(n,)."""
        return self.of("ndcg_at_10")

    @property
    def recall_at_10(self) -> FloatArray:
        """(n,)."""
        return self.of("recall_at_10")

    @property
    def mrr_at_10(self) -> FloatArray:
        """(n,)."""
        return self.of("mrr_at_10")

    @property
    def mean(self) -> dict[str, float]:
        """The mean over queries, by metric."""
        return {name: float(self.of(name).mean()) for name in self.metrics}


def cutoff_of(metric: str) -> int:
    """The depth to which a metric reads a ranking; `DataError` when it is no metric.

    >>> cutoff_of("recall_at_100")
    100
    """
    return _parsed(metric)[1]


def evaluate_run(run: Mapping[str, Mapping[str, float]], qrels: Qrels, *, metrics: Sequence[str] = METRICS) -> Scores:
    """Score the best passages of every judged query; see the table of this module for edge cases.

    Args:
        metrics: `ndcg_at_K`, `recall_at_K`, `mrr_at_K`, `map_at_K`; a ranking shorter than K ends where it ends.

    Raises:
        DataError: no query has a relevant passage, a score is not finite, or a metric is unknown.
    """
    measures = {name: _parsed(name)[0] for name in metrics}
    depth = max(cutoff_of(name) for name in metrics)
    # trec_eval counts a grade below 0 as a gain of 0, other providers do not: they are the same here.
    judged = {q: {p: max(grade, 0) for p, grade in qrels[q].items()} for q in sorted(qrels) if _relevant(qrels[q])}
    if not judged:
        raise DataError(f"none of {len(qrels)} judged queries has a relevant passage: nothing can be measured")
    ranked = {q: _best_as_ranks(q, run[q], depth) for q in judged if q in run}
    found: dict[str, dict[str, float]] = {name: dict.fromkeys(judged, 0.0) for name in metrics}
    name_of = {measure: name for name, measure in measures.items()}
    if ranked:
        for value in ir_measures.iter_calc(list(measures.values()), judged, ranked):
            found[name_of[value.measure]][value.query_id] = value.value
    table = np.array([[found[name][q] for name in metrics] for q in judged])
    return Scores(tuple(judged), tuple(metrics), table)


def quality(scores: Scores, own_index: Scores | None = None, *, generator: np.random.Generator) -> Quality:
    """The means of one stage with their bootstrap intervals, as results.json has them."""
    own = None if own_index is None else OwnIndexQuality.model_validate(_summary(own_index, generator))
    return Quality.model_validate(_summary(scores, generator) | {"own_index": own})


def evaluate_own_index(
    run: Mapping[str, Mapping[str, float]], qrels: Qrels, held: Mapping[str, Collection[str]]
) -> Scores:
    """Score every query on the one index that it is asked of.

    Judgements are restricted to what that index holds: a relevant passage on another device is not a miss, and a query
    that none of its own index can answer is left out.

    Args:
        run: for each query, the ranking of its device's own index.
        held: for each query, the ids of the passages that its device holds.

    Raises:
        DataError: a ranking has a passage its device does not hold, so it read another's.
    """
    for query in sorted(qrels.keys() & run.keys()):
        if foreign := set(run[query]) - set(held.get(query, ())):
            raise DataError(
                f"query {query!r} found {min(foreign)!r}, which its own device does not hold: give the run over that "
                "device's index only"
            )
    kept = {query: set(held.get(query, ())) for query in qrels}
    return evaluate_run(run, {q: {p: g for p, g in grades.items() if p in kept[q]} for q, grades in qrels.items()})


def dense_run(
    query_vectors: NDArray[np.floating],
    query_ids: Sequence[str],
    passage_vectors: NDArray[np.floating],
    passage_ids: Sequence[str],
    *,
    k: int = CUTOFF,
    block: int = 256,
) -> Run:
    """The k passages with the largest dot product, exactly, best first; ties go to the smaller passage id.

    A float32 product picks candidates, float64 settles their order. Every passage whose float32 score is within twice
    the rounding error bound of the k-th best is a candidate (Higham 2002, section 3.1), so none of the true k best is
    lost, and the answer depends neither on `block` nor on the number of threads.

    Args:
        query_vectors: (n, dim), taken as float32.
        passage_vectors: (m, dim), taken as float32.
        block: queries at a time; memory is block * m * 4 bytes.

    Raises:
        DataError: shapes or ids do not match, an id occurs twice, or a vector is not finite.
    """
    queries, passages = _checked(query_vectors, query_ids, "query"), _checked(passage_vectors, passage_ids, "passage")
    if queries.shape[1] != passages.shape[1]:
        raise DataError(f"queries have {queries.shape[1]} dimensions and passages {passages.shape[1]}: use one space")
    if k < 1 or not len(passages):
        raise DataError(f"k = {k} of {len(passages)} passages: ask for at least one of at least one")
    depth, terms = min(k, len(passages)), queries.shape[1] * _UNIT_ROUNDOFF
    longest = float(np.linalg.norm(passages, axis=1).max())
    slack = 2 * terms / (1 - terms) * longest * np.linalg.norm(queries, axis=1)  # (n,)
    run: Run = {}
    for start in range(0, len(queries), block):
        rough = queries[start : start + block] @ passages.T  # (block, m)
        worst = np.partition(rough, -depth, axis=1)[:, -depth]  # (block,)
        for row, (scores, floor) in enumerate(zip(rough, worst, strict=True), start=start):
            near = np.flatnonzero(scores >= floor - slack[row])
            # Products are summed along each row alone, so equal vectors get equal bits.
            exact = (passages[near].astype(np.float64) * queries[row].astype(np.float64)).sum(axis=1)
            best = sorted(
                (-score, passage_ids[index]) for score, index in zip(exact.tolist(), near.tolist(), strict=True)
            )
            run[query_ids[row]] = {passage: -negated for negated, passage in best[:depth]}
    return run


def own_index_run(
    query_vectors: NDArray[np.floating],
    query_ids: Sequence[str],
    passage_vectors: NDArray[np.floating],
    passage_ids: Sequence[str],
    devices: Iterable[tuple[Sequence[str], Sequence[str]]],
    *,
    k: int = CUTOFF,
) -> Run:
    """`dense_run` of each device's queries over that device's passages alone.

    Args:
        devices: for each device, the ids of the queries that are asked on it and of the passages that it holds.

    Raises:
        DataError: as `dense_run`; or a query is asked on two devices, or an id has no vector.
    """
    query_rows = {key: row for row, key in enumerate(query_ids)}
    passage_rows = {key: row for row, key in enumerate(passage_ids)}
    run: Run = {}
    for asked, held in devices:
        if twice := run.keys() & set(asked):
            raise DataError(f"query {min(twice)!r} is asked on two devices: give each query to the one that owns it")
        if asked:
            mine, own = _rows(asked, query_rows, "query"), _rows(held, passage_rows, "passage")
            run |= dense_run(query_vectors[mine], asked, passage_vectors[own], held, k=k)
    return run


def _summary(scores: Scores, generator: np.random.Generator) -> dict[str, object]:
    found = intervals_of_means(scores.table, generator=generator)
    return scores.mean | {"intervals": {name: one.ends for name, one in zip(scores.metrics, found, strict=True)}}


def _parsed(metric: str) -> tuple[Any, int]:
    """A measure of `ir-measures` and its depth."""
    if (found := _METRIC.fullmatch(metric)) is None:
        families = ", ".join(f"{name}_at_K" for name in _FAMILIES)
        raise DataError(f"metric {metric!r} is unknown: write {families} with a number for K")
    cutoff = int(found[2])
    return _FAMILIES[found[1]] @ cutoff, cutoff


def _rows(wanted: Sequence[str], rows: Mapping[str, int], what: str) -> list[int]:
    if unknown := [key for key in wanted if key not in rows]:
        raise DataError(f"{what} {unknown[0]!r} of a device has no vector: embed all {what} texts first")
    return [rows[key] for key in wanted]


def _relevant(grades: Mapping[str, int]) -> bool:
    return any(grade > 0 for grade in grades.values())


def _best_as_ranks(query: str, scores: Mapping[str, float], depth: int) -> dict[str, float]:
    """The best passages of one query with scores depth, depth - 1, ...: exact in any precision and free of ties."""
    if bad := [passage for passage, score in scores.items() if not np.isfinite(score)]:
        raise DataError(
            f"query {query!r}: the score of {bad[0]!r} is {scores[bad[0]]}, which has no place in a ranking"
        )
    best = sorted(scores, key=lambda passage: (-scores[passage], passage))[:depth]
    return {passage: float(depth - rank) for rank, passage in enumerate(best)}


def _checked(vectors: NDArray[np.floating], ids: Sequence[str], what: str) -> NDArray[np.float32]:
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise DataError(f"{what} vectors have shape {vectors.shape} for {len(ids)} ids: give one row for each id")
    if len(set(ids)) != len(ids):
        raise DataError(f"{what} ids are not unique: {len(ids) - len(set(ids))} of {len(ids)} repeat another")
    taken = np.asarray(vectors, dtype=np.float32)
    if not np.isfinite(taken).all():
        raise DataError(
            f"{what} {ids[int(np.flatnonzero(~np.isfinite(taken).all(axis=1))[0])]!r} has a vector that is not finite"
        )
    return taken
