"""`stillroom bench privacy`: what privacy costs in quality, for each mechanism and epsilon, over several seeds.

Every seed is a run of the demo up to its devices, in a folder of its own (the same as that of `stillroom bench demo`, so that
nothing is distilled twice); on other data it starts from that seed's release, which has seen none of them. Over the devices of
a run each arm is a federation of its own. The figure is the share of the non-private federated gain that survives,

    mean(nDCG@10 of the arm - of the student) / mean(nDCG@10 of the non-private arm - of the student)

on the test queries, over all private passages, paired over queries and seeds. There is none where that gain may be nothing.
The non-private arm is unclipped and has its own settings. A goal holds when the whole interval does.

| arm | unit | who is in a round's cohort |
|---|---|---|
| `nonprivate` | none | a Poisson sample |
| `central-E` | user | a Poisson sample, which readers of releases do not know |
| `correlated-E`, `turns-E` | user | whose turn it is: nothing is amplified; noise correlated over rounds, or drawn afresh |
| `local-E` | query | whose turn it is; the noise is the device's own |

With silos every owner of a corpus is one device that holds all its passages and asks thousands of queries, as a hospital or a
publisher would: few of them, so nothing is promised about a whole one, and `local` is the only family. Its share is that of
the non-private gain of the same texts on many devices, which the few hardly reach.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from stillroom_client.encoder import Encoder
from stillroom_shared.errors import SettingsError
from stillroom_shared.progress import Progress, Stage
from stillroom_shared.settings import RoundsSettings, Settings
from stillroom_shared.statement import READERS
from stillroom_shared.workspace import key_of
from stillroom_simulations.benchmark_file import commit, figure, machine, versions
from stillroom_simulations.demo import DemoRun
from stillroom_simulations.intervals import interval_of_mean, interval_of_ratio
from stillroom_simulations.measure import Trial
from stillroom_simulations.memory import keep_freed_memory
from stillroom_simulations.utility_chart import utility_chart_svg

if TYPE_CHECKING:
    from rich.console import Console

Scores = NDArray[np.float64]
NONPRIVATE = "nonprivate"
GOALS = {"central-8": ">= 0.9", "central-2": ">= 0.75"}
EPSILONS: Mapping[str, tuple[float, ...]] = {
    "central": (1.0, 2.0, 4.0, 8.0),
    "correlated": (8.0,),
    "turns": (8.0,),
    "local": (4.0, 8.0),
}
"""What each family of arms is calibrated to."""

_CHANGES: Mapping[str, Mapping[str, object]] = {
    "central": {},
    "correlated": {"mechanism": "correlated"},
    "turns": {"mechanism": "correlated", "bands": 1},
    "local": {"mechanism": "local"},
}
_SILOS = {"separation": 1, "records": 3_072, "record_rate": 0.25}
"""Rounds of silos: all of them in each, and room for the queries of the largest."""
_EMPTY_PLACES = 4.0
"""Of those places hardly a quarter holds a query, and the mean is over all: the server's step makes up for it."""

_STAGES = ("corpus", "teacher", "distil", "release", "devices")
_FORECAST = {"corpus": 5.0, "teacher": 550.0, "distil": 450.0, "release": 15.0, "devices": 420.0}
_SECONDS_OF_AN_ARM = 120.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One arm of one run: nDCG@10 of each test query, (queries,), and the statement of what it spent, None if nothing."""

    ndcg_at_10: Scores
    statement: dict[str, Any] | None = None


Outcomes = Mapping[str, Outcome]
"""By arm; `teacher` and `student` stand beside the arms."""


def arms(settings: Settings, families: Sequence[str] = tuple(EPSILONS)) -> dict[str, RoundsSettings]:
    """The rounds of every arm, by name: those of the settings, with the mechanism and the epsilon of the arm.

    Raises `SettingsError` on a family that is unknown.
    """
    if unknown := set(families) - set(EPSILONS):
        raise SettingsError(f"families {sorted(unknown)} are unknown: choose among {', '.join(EPSILONS)}")
    found = {NONPRIVATE: settings.nonprivate}
    for family in families:
        for target in EPSILONS[family]:
            noise = {"noise_multiplier": None, "target_epsilon": target, "budget_epsilon": target}
            found[f"{family}-{target:g}"] = RoundsSettings.model_validate(
                settings.rounds.model_dump() | dict(_CHANGES[family]) | noise
            )
    return found


def bench_privacy(
    settings: Settings,
    *,
    seeds: Sequence[int],
    data: Sequence[Path],
    families: Sequence[str],
    folder: Path,
    out: Path,
    chart: Path,
    console: Console,
    silos: Sequence[Path] = (),
    command: str = "stillroom bench privacy",
) -> None:
    """Run or resume every arm of every seed; write figures and chart.

    Args:
        data: folders to measure on beside the docstrings.
        silos: which of them to measure with owners that are one device each too; `local` only.
        command: what was asked for, as the benchmark file says it.

    Raises `SettingsError` for silos that are not among `data`.
    """
    if apart := set(silos) - set(data):
        raise SettingsError(f"silos {apart.pop()} have no devices to compare with: name the folder with --data too")
    keep_freed_memory()
    torch.set_num_threads(settings.speed.threads)
    by_corpus: dict[str, list[Outcomes]] = {}
    corpora: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        own = settings.model_copy(update={"seed": seed, "distil": settings.distil.model_copy(update={"seed": seed})})
        origin = folder / f"seed-{seed}"
        runs = {"": DemoRun(own, origin)}
        runs |= {
            path.name: DemoRun(_elsewhere(own, path, origin), folder / f"{path.name}-seed-{seed}") for path in data
        }
        baselines = {}
        for called, run in runs.items():
            console.print(f"{run.out}", markup=False)
            name, found = run_arms(run, arms(settings, families), console)
            by_corpus.setdefault(called or name, []).append(found)
            corpora[called or name] = describe(run)
            baselines[called] = found[NONPRIVATE]
        for path in silos:
            run = DemoRun(_as_silos(_elsewhere(own, path, origin)), folder / f"{path.name}-silos-seed-{seed}")
            console.print(f"{run.out}", markup=False)
            wanted = arms(run.settings, [family for family in families if family == "local"])
            del wanted[NONPRIVATE]
            _, found = run_arms(run, wanted, console)
            by_corpus.setdefault(f"{path.name}, silos", []).append({**found, NONPRIVATE: baselines[path.name]})
            corpora[f"{path.name}, silos"] = describe(run)
    content = benchmark(by_corpus, corpora, seeds) | {
        "command": command,
        "commit": commit(),
        "machine": machine(settings.speed.threads),
        "versions": versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    chart.parent.mkdir(parents=True, exist_ok=True)
    chart.write_text(utility_chart_svg(content))


def _elsewhere(settings: Settings, source: Path, origin: Path) -> Settings:
    """On the texts of `source`, from the release of the run in `origin`."""
    return settings.model_copy(
        update={"corpus": settings.corpus.model_copy(update={"data": source, "start_from": origin})}
    )


def _as_silos(settings: Settings) -> Settings:
    """Every owner one device, and rounds that suit a few large ones."""
    step = settings.rounds.server_learning_rate * _EMPTY_PLACES
    return settings.model_copy(
        update={
            "population": settings.population.model_copy(update={"silos": True}),
            "rounds": settings.rounds.model_copy(update=_SILOS | {"server_learning_rate": step}),
        }
    )


def run_arms(run: DemoRun, wanted: Mapping[str, RoundsSettings], console: Console) -> tuple[str, Outcomes]:
    """The name of the run's corpus, and what came of every arm; what is done already is read."""
    progress = Progress(_FORECAST | dict.fromkeys(wanted, _SECONDS_OF_AN_ARM) | {"levels": 20.0}, console=console)
    preparation = dict(run.stages())
    for name in _STAGES:
        with progress.stage(name) as stage:
            if preparation[name](stage):
                stage.note("from an earlier run", cached=True)
    for name, rounds in wanted.items():
        with progress.stage(name) as stage:
            if run_arm(run, name, rounds, stage):
                stage.note("from an earlier run", cached=True)
    with progress.stage("levels") as stage:
        run.space.stage("levels", run.key("devices"), ["arms/teacher.npy", "arms/student.npy"], lambda: _levels(run))
    return run.private.name, {name: _read(run, name) for name in ("teacher", "student", *wanted)}


def run_arm(run: DemoRun, name: str, rounds: RoundsSettings, stage: Stage) -> bool:
    """One federation and its figure on the test queries; returns whether both were done already."""
    done = run.federate(name, rounds, stage)

    def work() -> None:
        with run.coordinator(name) as coordinator:
            encoder = Encoder(
                run.release, precision="float32", threads=run.settings.speed.threads, adapter=coordinator.adapter
            )
            made = coordinator.statement() if rounds.mechanism != "none" else None
        _write(run, name, encoder.encode_queries(_texts(run)))
        if made is not None:
            (run.out / "arms" / f"{name}.json").write_text(made.model_dump_json(indent=1) + "\n")

    outputs = [f"arms/{name}.npy", f"arms/{name}.json"]
    return run.space.stage(f"score-{name}", key_of(run.federation_key(name, rounds)), outputs, work) and done


def describe(run: DemoRun) -> dict[str, Any]:
    """What a run was measured on."""
    return {
        "name": run.private.name,
        "hash": run.corpus_hash,
        "passages": len(run.private.passages),
        "queries": {split: len(run.private.queries_in(split)) for split in ("train", "dev", "test")},
        "devices": len(run.population),
        "starts_from_another_corpus": run.origin is not None,
    }


def benchmark(
    by_corpus: Mapping[str, Sequence[Outcomes]], corpora: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> dict[str, Any]:
    """The benchmark file's content (DESIGN section 9), less what the machine adds."""
    generator = np.random.default_rng(0)
    figures: dict[str, Any] = {}
    spent: dict[str, Any] = {}
    for corpus, outcomes in by_corpus.items():
        stacked = {name: np.stack([found[name].ndcg_at_10 for found in outcomes]) for name in outcomes[0]}
        for name, scores in stacked.items():
            figures[f"{corpus}.{name}.ndcg_at_10"] = figure(interval_of_mean(scores, generator=generator), "nDCG@10")
        gain = stacked[NONPRIVATE] - stacked["student"]
        certain = interval_of_mean(gain, generator=generator).low > 0  # else there is nothing to take a share of
        for name, outcome in outcomes[0].items():
            if outcome.statement is None:
                continue
            if certain:
                share = interval_of_ratio(stacked[name] - stacked["student"], gain, generator=generator)
                figures[f"{corpus}.{name}.share_of_nonprivate_gain"] = figure(share, "ratio", GOALS.get(name))
            spent[f"{corpus}.{name}"] = _spent(outcome.statement)
    return {
        "name": "privacy",
        "corpora": {name: dict(about) for name, about in corpora.items()},
        "seeds": list(seeds),
        "privacy": spent,
        "figures": figures,
    }


def _spent(statement: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside a figure: never an epsilon without its unit, its delta and whom it holds against."""
    kept = (
        "mechanism",
        "unit",
        "delta",
        "against",
        "noise_multiplier",
        "sampling_rate",
        "rounds",
        "devices",
        "clip_norm",
    )
    return {"epsilon": statement["against"][READERS], "adversary": READERS} | {name: statement[name] for name in kept}


def _levels(run: DemoRun) -> None:
    """The teacher, and the student as it was released."""
    _write(run, "teacher", run.vectors.encode(_texts(run)))
    student = Encoder(run.release, precision="float32", threads=run.settings.speed.threads)
    _write(run, "student", student.encode_queries(_texts(run)))


def _texts(run: DemoRun) -> list[str]:
    return [query.text for query in run.private.queries_in("test")]


def _write(run: DemoRun, name: str, vectors: NDArray[np.float32]) -> None:
    trial = Trial(run.private, run.private.queries_in("test"), run.passage_vectors, run.population)
    (run.out / "arms").mkdir(exist_ok=True)
    np.save(run.out / "arms" / f"{name}.npy", trial.whole(vectors).ndcg_at_10)


def _read(run: DemoRun, name: str) -> Outcome:
    statement = run.out / "arms" / f"{name}.json"
    scores = np.load(run.out / "arms" / f"{name}.npy", allow_pickle=False)
    return Outcome(
        ndcg_at_10=np.asarray(scores, np.float64),
        statement=json.loads(statement.read_text()) if statement.exists() else None,
    )
