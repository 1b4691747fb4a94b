"""Make every arm for every seed, measure each on its data sets, and write what was found.

    FOLDER/FAMILY/NAME-seed-N/              a recipe's run, resumed by itself
    FOLDER/FAMILY/NAME-seed-N/measured/     per-query scores on each set, latency and bytes, kept by what they depend on

The teacher and the untrained student stand beside every arm. Towers and static tables are measured over the teacher's document
tower, rerankers over the teacher's best passages, late-interaction students by MaxSim.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from stillroom_server.distillery.exporting import DOCUMENTS
from stillroom_server.distillery.recipe import Recipe
from stillroom_server.distillery.run import Run
from stillroom_server.distillery.stages import STAGES, planned
from stillroom_server.teacher import OFFLINE, load_teacher
from stillroom_shared.beir import load_beir
from stillroom_shared.corpus import Corpus
from stillroom_shared.progress import Progress
from stillroom_shared.workspace import Workspace, key_of
from stillroom_simulations.benchmark_file import commit, figure, machine, versions
from stillroom_simulations.distill_bench.arms import Arm, arms
from stillroom_simulations.distill_bench.throughput import compare_rates
from stillroom_simulations.evaluating.run import Choices, evaluate_models
from stillroom_simulations.evaluating.values import Measured
from stillroom_simulations.intervals import interval_of_mean, interval_of_ratio

if TYPE_CHECKING:
    from rich.console import Console

Scores = NDArray[np.float64]
_METRIC = "ndcg_at_10"
_KEPT = ">= 0.96"
_FASTER = ">= 2.5"
_HELD_OUT = 500


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure.

    Attributes:
        data: BEIR folders.
        families, recipes: see `arms`.
        passages: most passages that are learned from of each set; None for all.
        packages: whose docstrings and documentation are read.
        changes: settings laid over every recipe, by dotted key.
        timed: queries that are timed; 0 for none.
        sentences: how many the rates of training are compared on; 0: not at all.
        folder: of the runs; the same again resumes.
        cache: of what teachers said.
    """

    data: Sequence[Path]
    families: Sequence[str]
    recipes: Sequence[str]
    seeds: Sequence[int]
    passages: int | None
    packages: Sequence[str]
    changes: Mapping[str, str]
    timed: int
    sentences: int
    folder: Path
    cache: Path


def bench_distill(asked: Asked, *, out: Path, console: Console, command: str) -> dict[str, Any]:
    """Run or resume everything, then write the benchmark file (DESIGN section 9)."""
    corpora = {folder: load_beir(folder, splits="as-published") for folder in asked.data}
    figures: dict[str, Any] = {}
    for arm in arms(
        asked.families, asked.recipes, corpora, asked.changes, passages=asked.passages, packages=asked.packages
    ):
        found = [_measured(arm, seed, list(corpora.values()), asked, console) for seed in asked.seeds]
        figures |= _figures(arm, found)
    if asked.sentences:
        figures |= _rates(asked, corpora.values(), console)
    made = {
        "name": "distill",
        "command": command,
        "commit": commit(),
        "machine": machine(1),
        "versions": versions(),
        "seeds": list(asked.seeds),
        "sets": {one.name: one.content_hash for one in corpora.values()},
        "figures": figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(made, indent=1) + "\n")
    return made


def _measured(arm: Arm, seed: int, corpora: Sequence[Corpus], asked: Asked, console: Console) -> dict[str, Any]:
    """One arm of one seed: made, measured, and what was found: scores by system and set, and costs."""
    recipe, folder = arm.of_seed(seed), arm.folder(asked.folder, seed)
    console.print(f"{arm.family} {arm.name}, seed {seed}: {folder}", markup=False)
    run = Run(recipe, folder, asked.cache / "distillery")
    model = run.all_stages(Progress({name: STAGES[name] for name in planned(recipe)}, console=console))
    wanted = [one for one in corpora if one.name in arm.sets]
    space, path = Workspace(folder / "measured"), folder / "measured" / "found.json"

    def work() -> None:
        student = system_of(recipe, model)
        choices = Choices(first_stage=OFFLINE, timed=asked.timed, cache=asked.cache / "evaluate", metrics=(_METRIC,))
        done = evaluate_models([OFFLINE, student], wanted, choices, console=console)
        names = [one.model for one in done.sets[0].models]
        found = {
            one.name: {who: _described(one.of(name)) for who, name in zip(("teacher", "student"), names, strict=True)}
            for one in done.sets
        }
        path.write_text(json.dumps({"sets": found, "seconds": Workspace(folder).seconds()}))

    hashes = [one.content_hash for one in wanted]
    trained = (model / "distillation.json").read_text()
    space.stage("measure", key_of(trained, hashes, asked.timed), [path.name], work)
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept


def system_of(recipe: Recipe, model: Path) -> str:
    """How `stillroom evaluate` names what a recipe made: over the document tower that it is for, its own or the teacher's."""
    if (model / DOCUMENTS).is_dir():
        return f"{model}::{model / DOCUMENTS}"
    return f"{model}::{OFFLINE}" if recipe.documents else str(model)


def _described(measured: Measured) -> dict[str, Any]:
    timed = None if measured.latency is None else measured.latency.percentiles()
    return {
        "scores": measured.scores.of(_METRIC).tolist(),
        "bytes": asdict(measured.bytes),
        "latency": timed and {name: part["p50"] for name, part in timed.items()},
    }


def _figures(arm: Arm, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """nDCG@10 on each set with its interval over queries and seeds, and what of the teacher's is kept."""
    generator = np.random.default_rng(0)
    made: dict[str, Any] = {}
    prefix = f"{arm.family}.{arm.name}"
    for name in found[0]["sets"]:
        students = np.array([one["sets"][name]["student"]["scores"] for one in found])  # (seeds, queries)
        teacher = np.array(found[0]["sets"][name]["teacher"]["scores"])  # (queries,)
        made[f"{prefix}.{name}.ndcg_at_10"] = figure(interval_of_mean(students, generator=generator), "nDCG@10")
        kept = interval_of_ratio(students, teacher, generator=generator)
        made[f"{prefix}.{name}.kept"] = figure(kept, "ratio", _KEPT if arm.family == "left-out" else None)
        ratios = [_encode_ratio(one["sets"][name]) for one in found]
        if all(ratios):
            made[f"{prefix}.{name}.encode_ratio"] = {
                "value": float(np.mean(cast(list[float], ratios))),
                "unit": "ratio",
            }
    made[f"{prefix}.seconds"] = {"value": float(np.mean([sum(one["seconds"].values()) for one in found])), "unit": "s"}
    return made


def _encode_ratio(on_set: Mapping[str, Any]) -> float | None:
    """Median milliseconds of encoding a query, the student's over the teacher's; None where nothing was timed."""
    student, teacher = (on_set[who]["latency"] for who in ("student", "teacher"))
    return float(student["encode"] / teacher["encode"]) if student and teacher else None


def _rates(asked: Asked, corpora: Iterable[Corpus], console: Console) -> dict[str, Any]:
    """How fast alignment trains beside the plain recipe, on queries of the data sets."""
    console.print(f"rates of training on {asked.sentences:,} sentences", markup=False)
    texts = sorted({query.text for corpus in corpora for query in corpus.queries_in("train")})
    np.random.default_rng(0).shuffle(texts)
    texts, held_out = texts[_HELD_OUT:][: asked.sentences], texts[:_HELD_OUT]
    recipe = Recipe()
    training = recipe.training.model_copy(update={"epochs": 1.0})
    rates = compare_rates(load_teacher(OFFLINE), texts, held_out, recipe.student, training)
    ours, plain = rates["ours"], rates["sentence-transformers"]
    ratio = ours.sentences_a_second / plain.sentences_a_second
    return {
        "rate.ours": {"value": ours.sentences_a_second, "unit": "sentences/s", "cosine": ours.cosine},
        "rate.ratio": {
            "value": ratio,
            "unit": "ratio",
            "goal": _FASTER,
            "holds": ratio >= 2.5 and ours.cosine > plain.cosine - 0.01,
            "baselines": {"sentence-transformers": plain.sentences_a_second, "its cosine": plain.cosine},
        },
    }
