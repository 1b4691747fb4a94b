"""`stillroom bench demo`: the figures of record, over several seeds, with paired intervals over queries and seeds.

Every seed is a whole run of the demo (its own student, population, cohorts and noise) in a folder of its own, resumable like
any run; teacher vectors are shared through the cache. Beside the demo's stages each seed is fine-tuned centrally, which is
the ceiling that non-private rounds are compared with. A goal holds when the whole interval does; one that does not stays in
the file as missed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stillroom_client.encoder import Encoder
from stillroom_shared.settings import Settings
from stillroom_simulations.benchmark_file import commit, figure
from stillroom_simulations.central import CentralWork, fine_tune_centrally
from stillroom_simulations.demo import DemoRun, run_demo
from stillroom_simulations.intervals import Interval, interval_of_mean, interval_of_ratio
from stillroom_simulations.measure import Trial
from stillroom_simulations.results import Results
from stillroom_simulations.summary import GOALS

if TYPE_CHECKING:
    from rich.console import Console

Scores = dict[str, NDArray[np.float64]]
CENTRAL = CentralWork(steps=300, batch_size=64, learning_rate=5e-3, temperature=0.05)
CENTRAL_GOAL = ">= 0.9"
_CENTRAL_FILE = "central.npy"


def bench_demo(settings: Settings, *, seeds: Sequence[int], folder: Path, out: Path, console: Console) -> None:
    """Run or resume every seed below `folder`, then write the benchmark file `out`."""
    by_seed: list[Scores] = []
    results: list[Results] = []
    for seed in seeds:
        own = settings.model_copy(update={"seed": seed, "distil": settings.distil.model_copy(update={"seed": seed})})
        home = folder / f"seed-{seed}"
        console.print(f"seed {seed}: {home}", markup=False)
        run_demo(own, out=home, console=console)
        central = _central_scores(DemoRun(own, home), console)
        with np.load(home / "scores.npz", allow_pickle=False) as arrays:
            by_seed.append({name: arrays[name] for name in arrays.files if name != "query_ids"} | {"central": central})
        results.append(Results.load(home / "results.json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(benchmark(by_seed, results, seeds), indent=1) + "\n")


def benchmark(by_seed: Sequence[Scores], results: Sequence[Results], seeds: Sequence[int]) -> dict[str, Any]:
    """The benchmark file's content (DESIGN section 9)."""
    stacked = {name: np.stack([scores[name] for scores in by_seed]) for name in by_seed[0]}  # (seeds, queries)
    generator = np.random.default_rng(0)
    figures: dict[str, Any] = {}
    for name, scores in stacked.items():
        figures[f"{name}.ndcg_at_10"] = figure(interval_of_mean(scores, generator=generator), "nDCG@10")
    student, central = stacked["student"], stacked["central"]
    goals: dict[str, tuple[Interval, str]] = {
        "student_to_teacher": (
            interval_of_ratio(student, stacked["teacher"], generator=generator),
            GOALS["student_to_teacher"],
        ),
        "federated_to_teacher": (
            interval_of_ratio(stacked["federated"], stacked["teacher"], generator=generator),
            GOALS["federated_to_teacher"],
        ),
        "nonprivate_share_of_central_gain": (
            interval_of_ratio(stacked["federated_nonprivate"] - student, central - student, generator=generator),
            CENTRAL_GOAL,
        ),
        "device_loss": (
            interval_of_mean(stacked["federated"] - stacked["device"], generator=generator),
            GOALS["device_loss"],
        ),
    }
    for name, (interval, goal) in goals.items():
        figures[name] = figure(interval, "nDCG@10" if name == "device_loss" else "ratio", goal)
    privacy = results[0].privacy
    return {
        "name": "demo",
        "command": f"stillroom bench demo --seeds {','.join(map(str, seeds))} --scale {results[0].scale}",
        "commit": commit(),
        "machine": results[0].machine,
        "versions": results[0].versions,
        "corpus": results[0].corpus.model_dump(mode="json"),
        "privacy": privacy.model_dump(mode="json", exclude={"paragraph"}),
        "seeds": list(seeds),
        "seconds": [own.seconds for own in results],
        "figures": figures,
    }


def _central_scores(run: DemoRun, console: Console) -> NDArray[np.float64]:
    """Per-query nDCG@10 after central fine-tuning of the same adapter; kept in the run's folder."""
    path = run.out / _CENTRAL_FILE
    if not path.exists():
        console.print("central fine-tuning", markup=False)
        mined = run.records(run.settings.nonprivate)
        pooled = [record for own in mined.values() for record in own]
        adapter = fine_tune_centrally(run.trainer, pooled, CENTRAL, seed=run.settings.seed)
        queries = run.private.queries_in("test")
        encoder = Encoder(run.release, precision="float32", threads=run.settings.speed.threads, adapter=adapter)
        trial = Trial(run.private, queries, run.passage_vectors, run.population)
        np.save(path, trial.whole(encoder.encode_queries([query.text for query in queries])).ndcg_at_10)
    return np.asarray(np.load(path, allow_pickle=False), np.float64)
