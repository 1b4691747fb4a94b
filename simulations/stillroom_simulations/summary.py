"""The last measurements of a run, and `results.json`: every figure that the report and the README show."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.home import INDEX_NAME
from stillroom_server.coordinate import Coordinator
from stillroom_server.teacher import tower_of
from stillroom_shared.accounting import epsilon
from stillroom_shared.adapter import Adapter
from stillroom_shared.progress import Stage
from stillroom_shared.statement import COORDINATOR, READERS
from stillroom_simulations.benchmark_file import machine, versions
from stillroom_simulations.evaluate import Scores, quality
from stillroom_simulations.intervals import interval_of_mean, interval_of_ratio
from stillroom_simulations.measure import Trial
from stillroom_simulations.results import Ratio, Results

if TYPE_CHECKING:
    from stillroom_simulations.demo import DemoRun

Vectors = NDArray[np.float32]
_CURVE_POINTS = 12
_LATENCY_QUERIES = 300
GOALS = {
    "student_to_teacher": ">= 0.96",
    "federated_to_teacher": ">= 0.995",
    "device_loss": "<= 0.005",
}


def summarize(run: DemoRun, stage: Stage) -> None:
    """Measure everything and write `results.json` and the per-query `scores.npz`."""
    started = time.monotonic()
    trial = Trial(run.private, run.private.queries_in("test"), run.passage_vectors, run.population)
    texts = [query.text for query in trial.queries]
    with run.coordinator("private") as private, run.coordinator("nonprivate") as nonprivate:
        adapters = {
            "student": None,
            "federated": private.adapter,
            "federated_nonprivate": nonprivate.adapter,
        }
        vectors = {"teacher": run.vectors.encode(texts)}
        for name, adapter in adapters.items():
            vectors[name] = Encoder(
                run.release, precision="float32", threads=run.settings.speed.threads, adapter=adapter
            ).encode_queries(texts)
        stage(1, 4)
        scores = {name: (trial.whole(own), trial.own_index(own)) for name, own in vectors.items()}
        scores["device"] = _device_scores(run, trial, texts, private.adapter)
        stage(2, 4)
        rounds = _private_rounds(run, private)
        rounds_nonprivate = [
            {"round": number, "ndcg_at_10": value} for number, value in _curve(run, nonprivate).items()
        ]
        stage(3, 4)
        generator = np.random.default_rng(run.settings.seed)
        results = {
            "schema": 1,
            "corpus": _corpus(run),
            "seed": run.settings.seed,
            "scale": run.settings.corpus.scale if run.settings.corpus.data is None else "data",
            "versions": versions(),
            "machine": machine(run.settings.speed.threads),
            **{name: quality(*pair, generator=generator) for name, pair in scores.items()},
            "ratios": ratios({name: pair[0] for name, pair in scores.items()}, generator),
            "privacy": _privacy(private),
            "rounds": rounds,
            "rounds_nonprivate": rounds_nonprivate,
            "rounds_on": {"split": "dev", "teacher_ndcg_at_10": _teacher_on_dev(run)},
            **_sizes(run, private.adapter),
            "devices": _devices(run),
            "search": _latency(run),
            "examples": _examples(trial, vectors, scores["student"][0], scores["federated"][0]),
            "seconds": run.space.seconds() | {"evaluate": round(time.monotonic() - started, 2)},
            "peak_memory_bytes": run.peak_memory(),
        }
    per_query = {name: pair[0].ndcg_at_10 for name, pair in scores.items()}
    _save_arrays(run.out / "scores.npz", query_ids=np.array(scores["teacher"][0].query_ids), **per_query)
    Results.parse(results).save(run.out / "results.json")
    stage(4, 4)


def ratios(scores: dict[str, Scores], generator: np.random.Generator) -> dict[str, Ratio]:
    """The figures with a goal, of one seed, paired over queries."""
    by_name = {name: own.ndcg_at_10 for name, own in scores.items()}

    def share(name: str) -> Ratio:
        interval = interval_of_ratio(by_name[name], by_name["teacher"], generator=generator)
        return Ratio.judge(interval, GOALS[f"{name}_to_teacher"])

    loss = interval_of_mean(by_name["federated"] - by_name["device"], generator=generator)
    return {
        "student_to_teacher": share("student"),
        "federated_to_teacher": share("federated"),
        "device_loss": Ratio.judge(loss, GOALS["device_loss"]),
    }


def _device_scores(run: DemoRun, trial: Trial, texts: list[str], adapter: Adapter) -> tuple[Scores, Scores]:
    """What ships: int8 towers, quantized index, the private adapter."""
    vectors = Encoder(
        run.release, precision="int8", threads=run.settings.speed.threads, adapter=adapter
    ).encode_queries(texts)
    with Device.open(run.everything) as everything:
        whole = trial.whole_on_device(vectors, everything)
    return whole, trial.own_index_on_device(vectors, run.homes)


def _curve(run: DemoRun, coordinator: Coordinator) -> dict[int, float]:
    """nDCG@10 of what would be released after a round, on dev queries, at a dozen rounds; round 0 is the student."""
    trial = Trial(run.private, run.private.queries_in("dev"), run.passage_vectors, run.population)
    encoder = Encoder(run.release, precision="float32", threads=run.settings.speed.threads)
    total = len(coordinator.state.history)
    points = sorted({round(point) for point in np.linspace(0, total, min(total, _CURVE_POINTS) + 1)})
    found = {}
    for number in points:
        encoder.adopt(coordinator.adapter_after(number))
        found[number] = trial.whole(encoder.encode_queries([query.text for query in trial.queries])).mean["ndcg_at_10"]
    return found


def _teacher_on_dev(run: DemoRun) -> float:
    queries = run.private.queries_in("dev")
    trial = Trial(run.private, queries, run.passage_vectors, run.population)
    return trial.whole(run.vectors.encode([query.text for query in queries])).mean["ndcg_at_10"]


def _private_rounds(run: DemoRun, coordinator: Coordinator) -> list[dict[str, Any]]:
    norms = {0: None} | {
        entry["round"]: entry["update_norm"]
        for entry in map(json.loads, (coordinator.home / "rounds.jsonl").read_text().splitlines())
    }
    events, plan = coordinator.ledger.events(), coordinator.plan
    # Retries are charged too: a round's epsilon covers every charge up to its last attempt, and a whole run's charge.
    of_charge = [purpose.get("round", 1) for purpose in coordinator.ledger.purposes()]
    charged = {number: sum(own <= number for own in of_charge) for number in range(len(coordinator.state.history) + 1)}
    return [
        {
            "round": number,
            "epsilon": epsilon(events[: charged[number]], plan.delta),
            "ndcg_at_10": value,
            "cohort": round(plan.sampling_rate * len(plan.enrolled)),
            "update_norm": norms.get(number),
        }
        for number, value in _curve(run, coordinator).items()
    ]


def _corpus(run: DemoRun) -> dict[str, Any]:
    return {
        "name": run.private.name,
        "hash": run.corpus_hash,
        "passages": len(run.private.passages),
        "queries": {split: len(run.private.queries_in(split)) for split in ("train", "dev", "test")},
        "public_owners": run.public.owners,
        "private_owners": run.private.owners,
    }


def _privacy(coordinator: Coordinator) -> dict[str, Any]:
    made = coordinator.statement()
    return {
        "epsilon": made.against[READERS],
        "delta": made.delta,
        "unit": made.unit,
        "mechanism": made.mechanism,
        "adversary": READERS,
        "noise_multiplier": made.noise_multiplier,
        "sampling_rate": made.sampling_rate,
        "rounds": made.rounds,
        "devices": made.devices,
        "clip_norm": made.clip_norm,
        "accountant": made.accountant,
        "epsilon_by_accountant": made.epsilon,
        "against": made.against,
        "coordinator": "none" if made.against[COORDINATOR] is None else made.against[COORDINATOR],
        "paragraph": made.paragraph(),
    }


def _sizes(run: DemoRun, adapter: Adapter) -> dict[str, Any]:
    release = run.release
    student = sum(parameter.numel() for parameter in run.trainer.tower_parameters())
    return {
        "query_tower": {"parameters": student, "bytes": release.query_onnx("int8").stat().st_size},
        "document_tower": {
            "parameters": sum(parameter.numel() for parameter in tower_of(run.teacher).parameters()),
            "bytes": release.document_onnx("int8").stat().st_size,
        },
        "adapter": {"values": adapter.spec.size, "bytes": len(adapter.to_bytes())},
    }


def _devices(run: DemoRun) -> dict[str, Any]:
    sizes = [len(device.passages) for device in run.population]
    return {
        "count": len(sizes),
        "passages_min": min(sizes),
        "passages_median": float(median(sizes)),
        "passages_max": max(sizes),
        "index_bytes_per_passage": (run.everything / INDEX_NAME).stat().st_size / len(run.private.passages),
    }


def _latency(run: DemoRun) -> dict[str, Any]:
    """Text to hits by vectors on the device with the most passages, one query at a time."""
    largest = max(run.population, key=lambda device: len(device.passages))
    queries = [query.text for query in run.private.queries_in("dev")][:_LATENCY_QUERIES]
    milliseconds = []
    with Device.open(run.homes[largest.name]) as device:
        for text in queries[:20]:
            device.search(text, mode="dense")
        for text in queries:
            started = time.perf_counter()
            device.search(text, mode="dense")
            milliseconds.append((time.perf_counter() - started) * 1e3)
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "queries": len(queries)}


def _examples(trial: Trial, vectors: dict[str, Vectors], student: Scores, federated: Scores) -> list[dict[str, Any]]:
    """The first query whose answer the rounds brought to the top, the first that they left there, the first they displaced."""
    pairs = zip(student.ndcg_at_10.tolist(), federated.ndcg_at_10.tolist(), strict=True)
    first = dict(zip(student.query_ids, ((before == 1, after == 1) for before, after in pairs), strict=True))
    own = [first[query.id] for query in trial.queries]
    kinds = [[pair == wanted for pair in own] for wanted in ((False, True), (True, True), (True, False))]
    rows = [kind.index(True) if True in kind else None for kind in kinds]
    text_of = {passage.id: passage.text for passage in trial.corpus.passages}
    ids = [passage.id for passage in trial.corpus.passages]
    examples = []
    for row in (row for row in rows if row is not None):
        query = trial.queries[row]
        answers = {i for i, grade in trial.corpus.qrels[query.id].items() if grade > 0}
        best = {
            name: [ids[i] for i in np.argsort(-(trial.passages @ vectors[name][row]), kind="stable")[:3]]
            for name in ("teacher", "student", "federated")
        }
        examples.append(
            {
                "query": query.text,
                "owner": query.owner,
                "answer_id": min(answers),
                "results": {
                    name: [{"passage_id": i, "text": text_of[i][:600], "relevant": i in answers} for i in found]
                    for name, found in best.items()
                },
            }
        )
    return examples


def _save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
