"""What an evaluation found: frozen values, down to the score of each query, so that other tests can be made of them later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stillroom_shared.errors import DataError
from stillroom_simulations.evaluate import Scores
from stillroom_simulations.evaluating.systems import Bytes
from stillroom_simulations.evaluating.timing import Latency
from stillroom_simulations.intervals import Interval

METRICS = ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10", "map_at_1000")
"""What BEIR reports, to its depth: MAP is over the 1,000 best passages."""

TITLES = {"ndcg": "nDCG", "recall": "Recall", "mrr": "MRR", "map": "MAP"}


def title(metric: str) -> str:
    """A metric as papers write it.

    >>> title("ndcg_at_10"), title("map_at_1000")
    ('nDCG@10', 'MAP@1000')
    """
    name, _, depth = metric.partition("_at_")
    return f"{TITLES.get(name, name)}@{depth}"


@dataclass(frozen=True, eq=False)
class Measured:
    """One system on one data set.

    Attributes:
        scores: of each query.
        intervals: of the mean over queries, by metric.
        latency: None when it was not asked for.
    """

    model: str
    how: str
    scores: Scores
    intervals: Mapping[str, Interval]
    bytes: Bytes
    latency: Latency | None

    def to_json(self) -> dict[str, Any]:
        """Everything, per-query scores included."""
        timed = {} if self.latency is None else {"queries": len(self.latency.total), **self.latency.percentiles()}
        return {
            "model": self.model,
            "how": self.how,
            "metrics": {name: _interval(one) for name, one in self.intervals.items()},
            "bytes": asdict(self.bytes),
            "latency_ms": timed or None,
            "per_query": {name: [round(v, 6) for v in self.scores.of(name).tolist()] for name in self.scores.metrics},
        }


@dataclass(frozen=True)
class Compared:
    """One system minus the first, paired over queries, in one metric.

    Attributes:
        difference: with its interval.
        p: of the paired randomisation test.
        p_holm: the same, corrected for all systems compared with the first in this metric.
    """

    model: str
    baseline: str
    metric: str
    difference: Interval
    p: float
    p_holm: float

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        named = {"model": self.model, "baseline": self.baseline, "metric": self.metric}
        return {**named, "difference": _interval(self.difference), "p": self.p, "p_holm": self.p_holm}


@dataclass(frozen=True, eq=False)
class OnSet:
    """All systems on one split of one data set.

    Attributes:
        queries: judged queries with a relevant passage, which all means are over.
        content_hash: of the corpus, its queries and judgements.
    """

    name: str
    split: str
    content_hash: str
    passages: int
    queries: int
    models: tuple[Measured, ...]
    comparisons: tuple[Compared, ...]

    def of(self, model: str) -> Measured:
        """One system, by its short name; `DataError` when it was not evaluated."""
        for one in self.models:
            if one.model == model:
                return one
        raise DataError(f"{model!r} was not evaluated on {self.name}: {', '.join(m.model for m in self.models)} were")

    def to_json(self) -> dict[str, Any]:
        """Everything; `per_query` of the models is in the order of `query_ids`."""
        return {
            "name": self.name,
            "split": self.split,
            "content_hash": self.content_hash,
            "passages": self.passages,
            "queries": self.queries,
            "query_ids": list(self.models[0].scores.query_ids),
            "models": [one.to_json() for one in self.models],
            "comparisons": [one.to_json() for one in self.comparisons],
        }


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All systems on all data sets.

    Attributes:
        sets: in the order asked for.
        means: by system and metric, the mean over data sets of their means; empty with fewer than two sets.
        comparisons: of those means with the first system's.
        facts: versions, machine, seed and what else figures depend on.
    """

    sets: tuple[OnSet, ...]
    means: Mapping[str, Mapping[str, Interval]]
    comparisons: tuple[Compared, ...]
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything, as `stillroom evaluate --json` prints it."""
        means = {model: {name: _interval(one) for name, one in own.items()} for model, own in self.means.items()}
        return {
            "schema": 1,
            **self.facts,
            "sets": [one.to_json() for one in self.sets],
            "means": means,
            "comparisons": [one.to_json() for one in self.comparisons],
        }


def _interval(one: Interval) -> dict[str, float]:
    return {"value": one.value, "low": one.low, "high": one.high, "level": one.level}
