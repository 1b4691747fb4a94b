"""Goals of distillation, computed from scores and times that were drawn, against slow and obvious computations."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom_shared.errors import DataError, SettingsError
from stillroom_simulations.distill_bench.arms import ArmSettings, MemorySettings
from stillroom_simulations.distill_bench.goals import Figures, Results, figures_of
from stillroom_simulations.distill_bench.memory import growth, peak_while
from stillroom_simulations.distill_bench.record import Record
from stillroom_simulations.distill_bench.tables import of_distill
from stillroom_simulations.distill_bench.throughput import Rate, rate_figures
from stillroom_simulations.intervals import interval_of_median_ratio, interval_over_sets_and_seeds

SIZES = {"zoo": 60, "ark": 200}
SEEDS = 3


def arm(family: str, name: str = "align", **settings: Any) -> ArmSettings:
    return ArmSettings.model_validate({"family": family, "name": name, **settings})


def results(settings: ArmSettings, means: Mapping[str, float], times: Mapping[str, float] | None = None) -> Results:
    """Scores around these means by role: a query's difficulty is shared, and each seed has noise of its own."""
    sets = {}
    for number, (name, count) in enumerate(SIZES.items()):
        difficulty = np.random.default_rng(number).uniform(-0.2, 0.2, count)
        sets[name] = [
            {
                role: {
                    "queries": [f"{name}-{n}" for n in range(count)],
                    "scores": (mean + difficulty + _noise(role, seed, count, 0.02)).tolist(),
                    "bytes": {"query_model": 1_000, "passage_model": 0, "each_passage": 4.0},
                    "encode": None if times is None else (times[role] * np.exp(_noise(role, seed, 40, 0.1))).tolist(),
                    "search": None if times is None else (times[role] * np.exp(_noise(role, seed, 40, 0.1))).tolist(),
                }
                for role, mean in means.items()
            }
            for seed in range(SEEDS)
        ]
    return Results(settings, [{"train": 3.0, "export": 1.0}] * SEEDS, sets)


def _noise(role: str, seed: int, count: int, spread: float) -> Any:
    return np.random.default_rng([seed, *role.encode()]).normal(0, spread, count)


def _changed(found: Results, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Results:
    """The same with what was measured of each role changed."""
    sets = {
        name: [{role: change(one) for role, one in run.items()} for run in runs] for name, runs in found.sets.items()
    }
    return replace(found, sets=sets)


def mean_over(found: Results, role: str, sets: Sequence[str] = tuple(SIZES)) -> float:
    """Each set weighs the same, and so does each seed: with loops."""
    per_set = []
    for name in sets:
        seeds = [sum(run[role]["scores"]) / len(run[role]["scores"]) for run in found.sets[name]]
        per_set.append(sum(seeds) / len(seeds))
    return float(sum(per_set) / len(per_set))


def slow_ratio_interval(found: Results, top: str, below: str) -> tuple[float, float]:
    """Percentiles of a bootstrap with loops: queries within their set, s - 1 of s seeds, a seed with all of its sets."""
    generator, ratios = np.random.default_rng(7), []
    for _ in range(400):
        kept = generator.integers(0, SEEDS, SEEDS - 1)
        sums = [0.0, 0.0]
        for name, count in SIZES.items():
            drawn = generator.integers(0, count, count)
            for seed in kept:
                for place, role in enumerate((top, below)):
                    scores = found.sets[name][seed][role]["scores"]
                    sums[place] += sum(scores[query] for query in drawn) / count
        ratios.append(sums[0] / sums[1])
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def test_what_a_query_tower_keeps_is_a_ratio_of_means_over_sets() -> None:
    """Guards against queries of a large set that outvote a small one, and an interval that forgets sets or seeds."""
    roles = ("student torch", "student float32", "student int8", "teacher torch", "teacher float32", "teacher int8")
    means = dict(zip(roles, (0.5, 0.5, 0.4985, 0.51, 0.51, 0.51), strict=True))
    times = dict(zip(roles, (1.0, 1.0, 0.5, 2.0, 2.0, 1.25), strict=True))
    found = results(arm("left-out", how=["torch", "float32", "int8"]), means, times)
    figures = figures_of(found, {})
    kept = figures["left-out.align.mean.kept"]
    assert kept["value"] == pytest.approx(mean_over(found, "student torch") / mean_over(found, "teacher torch"))
    low, high = slow_ratio_interval(found, "student torch", "teacher torch")
    assert kept["interval"] == pytest.approx([low, high], abs=0.15 * (high - low))
    assert kept["goal"] == ">= 0.96" and kept["holds"] and "goal" not in figures["left-out.align.zoo.kept"]
    int8 = figures["left-out.align.mean.int8_kept"]
    assert int8["value"] == pytest.approx(mean_over(found, "student int8") / mean_over(found, "student float32"))
    ratios = figures["left-out.align.mean.encode_ratio.float32"], figures["left-out.align.mean.encode_ratio.int8"]
    assert [one["value"] for one in ratios] == pytest.approx([0.5, 0.25], rel=0.05) and all(
        one["holds"] for one in ratios
    )
    both = figures["left-out.align.mean.encode_ratio.both-int8"]
    assert both["value"] == pytest.approx(0.4, rel=0.05) and "goal" not in both
    worse = figures_of(results(found.settings, means | {"student torch": 0.45}), {})
    assert not worse["left-out.align.mean.kept"]["holds"] and "left-out.align.mean.encode_ratio.int8" not in worse


def test_cut_vectors_are_compared_with_whole_ones_of_the_same_model() -> None:
    """Guards against a share of the teacher's quality that is told as one of the full student's."""
    found = results(
        arm("matryoshka", cut=[64, 128]),
        {"student torch": 0.5, "student torch@64": 0.4, "student torch@128": 0.49, "teacher torch": 0.9},
    )
    figures = figures_of(found, {})
    kept = figures["matryoshka.align.mean.cut-128.kept"]
    assert kept["value"] == pytest.approx(mean_over(found, "student torch@128") / mean_over(found, "student torch"))
    assert kept["holds"] and "goal" not in figures["matryoshka.align.mean.cut-64.kept"]


def test_one_arm_is_better_than_others_where_every_interval_is_above_zero() -> None:
    """Guards against a student that is called better than both teachers' because it is better than one."""
    others = {
        "dense": results(arm("teachers", "dense"), {"student torch": 0.50}),
        "words": results(arm("teachers", "words"), {"student torch": 0.40}),
    }
    both = arm("teachers", "both", above=["dense", "words"], above_on=2)
    better, same = (results(both, {"student torch": mean}) for mean in (0.53, 0.50))
    figures = figures_of(better, others)
    value = figures["teachers.both.mean.above.dense"]
    assert value["value"] == pytest.approx(
        mean_over(better, "student torch") - mean_over(others["dense"], "student torch")
    )
    assert value["p"] < 0.01 and figures["teachers.both.above"]["sets"] == ["zoo", "ark"]
    assert figures["teachers.both.above"]["holds"]
    missed = figures_of(same, others | {"dense": same})
    assert missed["teachers.both.above"]["value"] == 0 and not missed["teachers.both.above"]["holds"]
    assert missed["teachers.both.zoo.above.dense"]["p"] == 1
    alone = figures_of(replace(same, settings=arm("teachers", "both", above=["dense"])), {"dense": same})
    assert not alone["teachers.both.mean.above.dense"]["holds"]  # a difference of nothing is not above 0
    assert "teachers.both.above" not in figures_of(better, {"dense": others["dense"]})  # half of it was not measured


def test_arms_are_paired_by_the_queries_that_they_share() -> None:
    """Guards against scores of different queries that are subtracted because they stand in one place."""
    whole, other = (results(arm("recipes", name), {"student torch": 0.5}) for name in ("align", "rerank"))
    fewer = _changed(other, lambda one: one | {key: one[key][10:30] for key in ("queries", "scores")})
    part = replace(fewer, settings=arm("recipes", "rerank", above=["align"]))
    figures = figures_of(part, {"align": whole})
    assert figures["recipes.rerank.zoo.above.align"]["value"] == pytest.approx(0.0, abs=1e-12)
    strange = _changed(part, lambda one: one | {"queries": ["?"] * 20})
    with pytest.raises(DataError, match="share no query"):
        figures_of(strange, {"align": whole})


def test_a_reranker_keeps_a_share_of_its_teachers_gain() -> None:
    """Guards against a share of the teacher's quality, which is near 1 for whoever changes nothing."""
    means = {"first torch": 0.5, "teacher float32": 0.6, "student int8": 0.59, "student float32": 0.592}
    times = {"first torch": 1.0, "teacher float32": 90.0, "student int8": 25.0, "student float32": 50.0}
    settings = arm("rerank", "rerank", how=["int8", "float32"])
    found = results(settings, means, times)
    figures = figures_of(found, {})
    first, teacher, student = (mean_over(found, role) for role in ("first torch", "teacher float32", "student int8"))
    kept = figures["rerank.rerank.mean.gain_kept"]
    assert kept["value"] == pytest.approx((student - first) / (teacher - first)) and not kept["holds"]
    assert figures["rerank.rerank.mean.teacher_gain"]["value"] == pytest.approx(teacher - first)
    assert figures["rerank.rerank.mean.latency_ratio.int8"]["holds"]
    assert "goal" not in figures["rerank.rerank.mean.latency_ratio.float32"]
    nothing = figures_of(results(settings, means | {"teacher float32": 0.45}, times), {})[
        "rerank.rerank.mean.gain_kept"
    ]
    assert nothing["value"] is None and not nothing["holds"]


def test_intervals_over_sets_and_seeds_refuse_what_is_not_paired_and_are_points_without_noise() -> None:
    """Guards against scores of three seeds that are paired with those of two."""
    generator = np.random.default_rng(0)
    with pytest.raises(DataError, match="equal seeds and paired queries"):
        interval_over_sets_and_seeds([np.ones((3, 5)), np.ones((2, 5))], generator=generator)
    with pytest.raises(DataError, match="positive"):
        interval_over_sets_and_seeds([np.ones((2, 5))], [np.zeros((2, 5))], generator=generator)
    one = interval_over_sets_and_seeds([np.full((2, 5), 0.3), np.full((2, 9), 0.6)], generator=generator)
    assert (one.value, *one.ends) == pytest.approx((0.45, 0.45, 0.45))
    with pytest.raises(DataError, match="not paired"):
        interval_of_median_ratio([np.ones((2, 5))], [np.ones((2, 4))], generator=generator)
    drawn = np.random.default_rng(3).lognormal(0, 0.5, (2, 3, 80))
    [top, below] = drawn
    found = interval_of_median_ratio([top], [below], generator=generator)
    slow = np.mean([sorted(a)[39:41] for a in top], axis=1) / np.mean([sorted(b)[39:41] for b in below], axis=1)
    assert found.value == pytest.approx(slow.mean()) and found.low < found.value < found.high


def test_rates_hold_by_their_worst_repeat_and_at_equal_quality() -> None:
    """Guards against a good rate of one lucky repeat, or of training that stops short."""

    def rates(ours: Sequence[float], cosine: float) -> Figures:
        def made(rate: float, own: float) -> Rate:
            return Rate(seconds=1.0, sentences_a_second=rate, cosine=own)

        return rate_figures(
            {"ours": [made(one, cosine) for one in ours], "sentence-transformers": [made(100.0, 0.9) for _ in ours]}
        )

    figures = rates([260.0, 300.0, 280.0], 0.9)
    assert figures["rates.ratio"]["value"] == pytest.approx(2.8) and figures["rates.ratio"]["holds"]
    assert figures["rates.ratio"]["interval"] == pytest.approx([2.6, 3.0])
    assert not rates([240.0, 300.0, 280.0], 0.9)["rates.ratio"]["holds"]
    assert not rates([260.0, 300.0, 280.0], 0.88)["rates.ratio"]["holds"]


def test_memory_is_seen_while_it_is_held_and_its_growth_is_that_of_the_largest() -> None:
    """Guards against a peak that is read when everything has been freed."""
    before = peak_while(lambda: None)

    def hold() -> None:
        # Not from the allocator: in a process that ran long it may have so much at hand that nothing grows.
        with mmap.mmap(-1, 40_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            held = np.frombuffer(pages, np.float64)
            for _ in range(40):
                held += 1
            del held

    assert peak_while(hold) - before > 30_000_000
    figures = growth({"training": {1_000: 9, 10: 500, 100: 100}}, MemorySettings(learning=0.1))
    assert figures["memory.training.growth"]["value"] == pytest.approx((9 - 100) / 900)
    figures = growth({"lessons": {10: 0, 110: 50_000}}, MemorySettings(preparing=400))
    assert figures["memory.lessons.growth"]["value"] == 500 and not figures["memory.lessons.growth"]["holds"]


@pytest.fixture
def record() -> Callable[..., Record]:
    def made(command: str, seeds: Sequence[int] = (0, 1), zoo: str = "a1", align: str = "d1") -> Record:
        digests = {"recipes": {"align": align}, "rates": {"rates": "r1"}}
        return Record(command=command, seeds=seeds, sets={"zoo": zoo}, digests=digests)

    return made


def test_a_file_is_merged_only_of_what_agrees(record: Callable[..., Record], tmp_path: Path) -> None:
    """Guards against figures of two seeds, of other data or of other arms that stand in one table."""
    file, rates = tmp_path / "distill.json", {"rates": ["rates"]}
    first = record("first")
    first.add("recipes", ["align"], {"recipes.align.seconds": {"value": 1.0, "unit": "s"}})
    first.write(file)
    same = record("second")
    same.take_over(file, rates)
    same.add("rates", ["rates"], {"rates.ours": {"value": 2.0, "unit": "sentences/s"}})
    assert "recipes.align.seconds" in same.figures and same.families["rates"]["command"] == "second"
    for other, why in (
        (record("second", seeds=[0]), "seeds"), (record("second", zoo="b2"), "other data sets"),
        (record("second", align="d2"), "align changed since"),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=f"recipes .*{why}"):
            other.take_over(file, rates)
        other.take_over(file, rates, replace=True)
        assert not other.figures and not other.families
    elsewhere = json.loads(file.read_text())
    elsewhere["families"]["recipes"]["machine"] = "another one"
    file.write_text(json.dumps(elsewhere))
    with pytest.raises(SettingsError, match="of another machine"):  # the file names one machine for all
        record("third").take_over(file, rates)


def test_a_file_loses_nothing_that_is_not_measured_again(record: Callable[..., Record], tmp_path: Path) -> None:
    """A look at one arm, or a crash on the way, must not cost the figures of record."""
    file = tmp_path / "distill.json"
    first = record("first")
    first.add("recipes", ["align"], {"recipes.align.seconds": {"value": 1.0, "unit": "s"}})
    first.add("rates", ["rates"], {"rates.ours": {"value": 2.0, "unit": "sentences/s"}})
    first.write(file)
    with pytest.raises(SettingsError, match="align would not be measured again"):
        record("look").take_over(file, {"recipes": ["listwise"]})
    again = record("again")
    again.take_over(file, {"recipes": ["align", "listwise"]})
    again.write(file)  # as after a crash in the first arm
    assert again.figures == first.figures
    other = record("other seeds", seeds=[4])
    other.take_over(file, {"recipes": ["align"]})
    assert [*other.families] == ["rates"]  # which no seed touches


def test_the_table_shows_every_arm_and_every_goal(record: Callable[..., Record], tmp_path: Path) -> None:
    """Guards against a missed goal, or an arm, that is left out of the manual."""
    made = record("stillroom bench distill")
    means = {"student torch": 0.5, "untrained torch": 0.2, "teacher torch": 0.51}
    found = results(arm("recipes", how=["torch"]), means, dict.fromkeys(means, 2.0))
    made.add("recipes", ["align"], figures_of(found, {}))
    rate = [Rate(seconds=1.0, sentences_a_second=one, cosine=0.9) for one in (300.0, 100.0)]
    made.add("rates", ["rates"], rate_figures({"ours": rate[:1], "sentence-transformers": rate[1:]}))
    drawn = of_distill(json.loads(json.dumps(made.as_json())))
    [row] = [line for line in drawn.splitlines() if line.startswith("| align |")]
    untrained = made.figures["recipes.align.zoo.untrained.torch.ndcg_at_10"]["value"]
    assert f"; untrained {untrained:.3f}; teacher 0." in row and "torch 0.0" in row
    goals = [key for key, one in made.figures.items() if "goal" in one]
    assert len(goals) == 1 and drawn.count("holds |") + drawn.count("missed |") == 1
    assert "recipes: `stillroom bench distill` at" in drawn
