"""What measured scores and times say of an arm: figures, and whether the goals of distillation hold.

A goal holds when the whole 95% interval does: paired over queries, which are resampled within their data set, and over seeds.
Means over data sets weigh each the same. Keys are `FAMILY.ARM.SET.FIGURE`, and `FAMILY.ARM.mean.FIGURE` over its sets.

| family | figure | goal |
|---|---|---|
| any, with `above` | `above.OTHER` = nDCG@10 minus that of the other arm; p of the paired randomisation test beside it | > 0 |
| `left-out` | `mean.kept` = nDCG@10 / the teacher's | >= 0.96 |
| | `mean.int8_kept` = int8 / float32, both through ONNX Runtime | >= 0.995 |
| | `mean.encode_ratio.float32`, `.int8` = p50 of encoding / the teacher's in float32 | <= 0.55, <= 0.3 |
| | `mean.encode_ratio.both-int8` = the same of int8 / the teacher's in int8 | |
| `matryoshka` | `mean.cut-128.kept` = nDCG@10 of cut vectors / of whole ones | >= 0.95 |
| `rerank` | `mean.gain_kept` = (student - first stage) / (teacher - first stage) | >= 0.98 |
| | `mean.latency_ratio.int8` = p50 of a search / with the teacher in float32; `.float32` beside it | <= 1/3 |

Where the teacher gains nothing over the first stage, no share of it is kept: the value is null and the goal missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import DataError
from stillroom_simulations.benchmark_file import figure
from stillroom_simulations.distill_bench.arms import ArmSettings
from stillroom_simulations.intervals import interval_of_median_ratio, interval_over_sets_and_seeds
from stillroom_simulations.significance import paired_randomisation

Array = NDArray[np.float64]
Figures = dict[str, dict[str, Any]]
KEPT, INT8_KEPT, CUT_KEPT, GAIN_KEPT, ABOVE = ">= 0.96", ">= 0.995", ">= 0.95", ">= 0.98", "> 0"
ENCODE = {"float32": "<= 0.55", "int8": "<= 0.3"}
THIRD = "<= 0.3333"
CUT = 128
_MEAN = "mean"
_OWN_STAGES = ("teach", "search", "train", "export")
"""Whose seconds are an arm's own. Lessons, vectors and scores come from a cache that arms share: whoever is first pays.

Their median over seeds counts: one that something else on the machine held up says nothing about the arm.
"""
_TOSSES = 10_000
"""Of the randomisation test: the least p that it can tell is 1 in so many."""


@dataclass(frozen=True, eq=False)
class Results:
    """An arm with what was measured of it.

    Attributes:
        settings: of the arm.
        seconds: of making it, for each seed, by stage; means over its models where there is one for each set.
        sets: by data set, for each seed, by role, what `measuring.py` wrote.
    """

    settings: ArmSettings
    seconds: Sequence[Mapping[str, float]]
    sets: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def title(self) -> str:
        """Family and name."""
        return f"{self.settings.family}.{self.settings.name}"

    @property
    def student(self) -> str:
        """The role whose figures are the arm's."""
        return f"student {self.settings.how[0]}"

    @property
    def teacher(self) -> str:
        """The role that it is compared with."""
        return "teacher torch" if "torch" in self.settings.how else "teacher float32"

    def has(self, role: str) -> bool:
        """Whether it was measured."""
        return all(role in one for seeds in self.sets.values() for one in seeds)

    def scores(self, name: str, role: str) -> Array:
        """nDCG@10 on a set, (seeds, queries)."""
        return np.array([one[role]["scores"] for one in self.sets[name]], np.float64)

    def times(self, name: str, role: str, part: str) -> Array | None:
        """Milliseconds of the part `encode` or `search`, (seeds, queries); None where nothing was timed."""
        found = [one[role][part] for one in self.sets[name]]
        # Turns end by the clock: all seeds have the queries that the shortest of them came to.
        shortest = min(0 if one is None else len(one) for one in found)
        return np.array([one[:shortest] for one in found], np.float64) if shortest else None

    def queries(self, name: str) -> Sequence[str]:
        """Ids of the queries of a set; `DataError` when seeds or roles do not share them."""
        [first, *others] = [one["queries"] for seed in self.sets[name] for one in seed.values()]
        if any(other != first for other in others):
            raise DataError(
                f"{self.title} on {name}: seeds or systems were measured on different queries, measure again"
            )
        found: Sequence[str] = first
        return found


def figures_of(results: Results, others: Mapping[str, Results]) -> Figures:
    """All figures of an arm; `others` are those of its family, by name."""
    made = _quality(results)
    made[f"{results.title}.seconds"] = {
        "value": float(np.median([sum(one.get(name, 0.0) for name in _OWN_STAGES) for one in results.seconds])), "unit": "s",
        "stages": {name: float(np.median([one.get(name, 0.0) for one in results.seconds])) for name in results.seconds[0]},
    }  # fmt: skip
    made |= _costs(results)
    for other in results.settings.above:
        if other in others:
            made |= _difference(results, other, others[other])
    if (count := results.settings.above_on) is not None and {*results.settings.above} <= {*others}:
        made |= _on_sets(results, made, count)
    rules = {"left-out": _left_out, "rerank": _rerank}
    if rule := rules.get(results.settings.family):
        made |= rule(results)
    if results.settings.cut:
        made |= _cut(results)
    return made


def _quality(results: Results) -> Figures:
    """nDCG@10 of every role on each set and on their mean, and what of the teacher's is kept."""
    made: Figures = {}
    goal = KEPT if results.settings.family == "left-out" else None
    student, teacher = results.student, results.teacher
    for where, sets in _places(results):
        for role in results.sets[sets[0]][0]:
            tail = "ndcg_at_10" if role == student else f"{role.replace(' ', '.')}.ndcg_at_10"
            value = _interval([results.scores(name, role) for name in sets])
            made[f"{results.title}.{where}.{tail}"] = figure(value, "nDCG@10")
        if results.has(teacher):
            kept = _ratio(results, sets, student, teacher)
            made[f"{results.title}.{where}.kept"] = figure(kept, "ratio", goal if where == _MEAN else None)
    return made


def _costs(results: Results) -> Figures:
    """Bytes that queries need, and p50 of encoding and of all, of every role: means over sets and seeds."""
    made: Figures = {}
    first = next(iter(results.sets.values()))[0]
    for role in first:
        key = f"{results.title}.{role.replace(' ', '.')}"
        weights = [one[role]["bytes"]["query_model"] for seeds in results.sets.values() for one in seeds]
        made[f"{key}.bytes"] = {"value": float(np.mean(weights)), "unit": "bytes"}
        times = [[results.times(name, role, part) for part in ("encode", "search")] for name in results.sets]
        both = [(encode, search) for encode, search in times if encode is not None and search is not None]
        if len(both) == len(times):
            encoded = [np.median(encode, axis=1).mean() for encode, _ in both]
            total = [np.median(encode + search, axis=1).mean() for encode, search in both]
            made[f"{key}.latency"] = {"value": float(np.mean(total)), "unit": "ms", "encode": float(np.mean(encoded))}
    return made


def _difference(results: Results, name: str, other: Results) -> Figures:
    """nDCG@10 minus that of another arm, paired."""
    made: Figures = {}
    shared = tuple(one for one in results.sets if one in other.sets)
    for where, sets in _places(results, shared):
        differences = [_paired(results, other, one) for one in sets]
        judged = where == _MEAN and results.settings.above_on is None
        value = figure(_interval(differences), "nDCG@10", ABOVE if judged else None)
        of_queries = [one.mean(axis=0) for one in differences]
        p = paired_randomisation(of_queries, generator=np.random.default_rng(0), resamples=_TOSSES)
        made[f"{results.title}.{where}.above.{name}"] = value | {"p": float(p[0])}
    return made


def _paired(results: Results, other: Results, name: str) -> Array:
    """Differences on the queries that both were measured on, (seeds, queries)."""
    place = {query: number for number, query in enumerate(other.queries(name))}
    both = [(own, place[query]) for own, query in enumerate(results.queries(name)) if query in place]
    if not both:
        raise DataError(f"{results.title} and {other.title} share no query of {name}: measure them on the same")
    mine, theirs = np.array(both).T
    return results.scores(name, results.student)[:, mine] - other.scores(name, other.student)[:, theirs]


def _on_sets(results: Results, made: Figures, count: int) -> Figures:
    """On how many sets it is better than all that it should be better than, each by its whole interval.

    Several sets are looked at, but two of them have to agree: by chance alone two of four did so in 0 to 1.5% of simulated
    cases, the most where seeds vary twice as much as samples of queries and move all sets alike, as one model for all may.
    """
    others, names = results.settings.above, list(results.sets)
    keys = {one: [f"{results.title}.{one}.above.{other}" for other in others] for one in names}
    found = [one for one, own in keys.items() if all(key in made and made[key]["interval"][0] > 0 for key in own)]
    value = {"value": len(found), "unit": "sets", "goal": f">= {count}", "holds": len(found) >= count, "sets": found}
    return {f"{results.title}.above": value}


def _left_out(results: Results) -> Figures:
    made: Figures = {}
    for where, sets in _places(results):
        mean = where == _MEAN
        if results.has("student int8") and results.has("student float32"):
            value = _ratio(results, sets, "student int8", "student float32")
            made[f"{results.title}.{where}.int8_kept"] = figure(value, "ratio", INT8_KEPT if mean else None)
        for how, goal in ENCODE.items():
            made |= _time_ratio(results, where, sets, "encode", f"encode_ratio.{how}", how, goal if mean else None)
        made |= _time_ratio(results, where, sets, "encode", "encode_ratio.both-int8", "int8", None, of="int8")
    return made


def _cut(results: Results) -> Figures:
    made: Figures = {}
    for where, sets in _places(results):
        for length in results.settings.cut:
            value = _ratio(results, sets, f"student torch@{length}", "student torch")
            goal = CUT_KEPT if where == _MEAN and length == CUT else None
            made[f"{results.title}.{where}.cut-{length}.kept"] = figure(value, "ratio", goal)
    return made


def _rerank(results: Results) -> Figures:
    made: Figures = {}
    for where, sets in _places(results):
        mean = where == _MEAN
        first = [results.scores(name, "first torch") for name in sets]
        gains = {role: [results.scores(name, role) - before for name, before in zip(sets, first, strict=True)]
                 for role in (results.student, results.teacher)}  # fmt: skip
        gain = _interval(gains[results.teacher])
        made[f"{results.title}.{where}.teacher_gain"] = figure(gain, "nDCG@10")
        made[f"{results.title}.{where}.gain"] = figure(_interval(gains[results.student]), "nDCG@10")
        goal = GAIN_KEPT if mean else None
        if gain.low > 0:
            kept = interval_over_sets_and_seeds(*gains.values(), generator=np.random.default_rng(0))
            made[f"{results.title}.{where}.gain_kept"] = figure(kept, "ratio", goal)
        else:
            nothing = {"value": None, "unit": "ratio", "note": "the teacher's gain is not above 0"}
            made[f"{results.title}.{where}.gain_kept"] = nothing | ({"goal": goal, "holds": False} if goal else {})
        for how in ("float32", "int8"):
            goal = THIRD if mean and how == "int8" else None
            made |= _time_ratio(results, where, sets, "search", f"latency_ratio.{how}", how, goal)
    return made


def _time_ratio(
    results: Results, where: str, sets: Sequence[str], part: str, tail: str, how: str, goal: str | None, *,
    of: str = "float32",
) -> Figures:  # fmt: skip
    """p50 through ONNX Runtime over that of the teacher there, where both were timed."""
    role, teacher = f"student {how}", f"teacher {of}"
    if not (results.has(role) and results.has(teacher)):
        return {}
    times = [(results.times(name, role, part), results.times(name, teacher, part)) for name in sets]
    pairs = [(top, below) for top, below in times if top is not None and below is not None]
    if len(pairs) < len(sets):
        return {}
    tops, belows = zip(*pairs, strict=True)
    value = interval_of_median_ratio(tops, belows, generator=np.random.default_rng(0))
    return {f"{results.title}.{where}.{tail}": figure(value, "ratio", goal)}


def _places(results: Results, sets: Sequence[str] | None = None) -> list[tuple[str, tuple[str, ...]]]:
    """Each set alone, and all of them as their mean."""
    names = tuple(results.sets if sets is None else sets)
    return [*((name, (name,)) for name in names), *([(_MEAN, names)] if names else [])]


def _interval(scores: Sequence[Array]) -> Any:
    return interval_over_sets_and_seeds(scores, generator=np.random.default_rng(0))


def _ratio(results: Results, sets: Sequence[str], top: str, below: str) -> Any:
    tops, belows = ([results.scores(name, role) for name in sets] for role in (top, below))
    return interval_over_sets_and_seeds(tops, belows, generator=np.random.default_rng(0))
