"""The whole search benchmark: prepare what is slow once, measure everything side by side, say which goals hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_server.teacher import OFFLINE, TeacherVectors, load_teacher
from stillroom_shared.release import Release, open_release
from stillroom_simulations.benchmark_file import commit, machine, versions
from stillroom_simulations.intervals import interval_of_mean
from stillroom_simulations.search_bench import engines, scale
from stillroom_simulations.search_bench.engines import Engine
from stillroom_simulations.search_bench.latency import Timed, compare
from stillroom_simulations.search_bench.texts import Texts, drawn, load
from stillroom_simulations.serving_load import serving_load

if TYPE_CHECKING:
    from rich.console import Console

Vectors = NDArray[np.float32]
_KIND_QUERIES = 300
_ADDED = 2_000
_SHARD = 1_000
_CLIENTS = 64


@dataclass(frozen=True)
class Asked:
    """What to measure: the release, BEIR folders, how far to grow, whether others are compared with, and for how many seconds
    clients are served (0: not at all)."""

    release: Path
    data: Sequence[Path]
    folder: Path
    passages: int
    questions: int
    compare: bool
    load_seconds: float


def bench_search(asked: Asked, *, out: Path, console: Console, command: str) -> dict[str, Any]:
    """Measure, and write the benchmark file; the same folder again uses the vectors that were made."""
    release = open_release(asked.release, trusted_key=None)
    texts = load(asked.data, questions=asked.questions)
    console.print(f"{len(texts.pieces):,} passages, {len(texts.questions):,} questions", markup=False)
    vectors = document_vectors(release, texts.pieces, asked.folder, console)
    figures: dict[str, Any] = {}
    home = asked.folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    every = len(texts.pieces)
    real = [*(size for size in scale.SIZES if size < every), every]
    more = [size for size in scale.SIZES if every < size <= asked.passages]
    with Device.create(home, release, link=True) as device:
        grown = scale.grow(device, texts, vectors, real, _line(console, "adding"))
        queries = Encoder(release, precision="int8").encode_queries([q.text for q in texts.questions[:_KIND_QUERIES]])
        figures["kinds"] = {name: asdict(kind) for name, kind in scale.kinds(device, queries).items()}
        ready = [engines.ours(device, mode) for mode in ("hybrid", "dense", "bm25")]
        if asked.compare:
            ready += _others(texts, asked.folder, console)
        timed = compare(ready, texts, report=_line(console, "asking"))
        figures["engines"] = {engine.name: _figures(engine, timed[engine.name]) for engine in ready}
        if asked.load_seconds:
            console.print(f"serving {_CLIENTS} clients", markup=False)
            served = serving_load(home, [q.text for q in texts.questions], asked.load_seconds, _CLIENTS)
            figures["serving"] = asdict(served) | {"tail": served.tail, "growth": served.growth}
        figures["resident_mb"], figures["resident_most_mb"] = scale.resident(home)
        ours, theirs = scale.adding(release, _unseen(texts), _emptied(asked.folder / "adding"))
        figures["added_a_second"], figures["padded_onnx_a_second"] = ours, theirs
        if more:
            grown += scale.grow(device, texts, vectors, more, _line(console, "adding"))
            at_most = compare([engines.ours(device, mode) for mode in ("hybrid", "dense")], texts)
            figures["at_most"] = {"passages": more[-1]} | {n: _times(t) for n, t in at_most.items()}
            figures["at_most"]["resident_mb"] = scale.resident(home)[0]
    figures["growth"] = scale.as_json(grown)
    figures["goals"] = goals(figures, timed)
    made = {
        "name": "search", "command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "machine": machine(os.cpu_count() or 1), "load": os.getloadavg()[0], "versions": versions(),
        "release": release.id, "data": [folder.name for folder in asked.data], "passages": len(texts.pieces),
        "questions": len(texts.questions), "figures": figures,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


def document_vectors(release: Release, texts: Sequence[str], folder: Path, console: Console) -> Vectors:
    """Vectors (n, dim) of the release's document tower in int8, read back or made shard by shard."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(release, precision="int8", threads=os.cpu_count() or 1)
    made, line = [], _line(console, "embedding")
    for start in range(0, len(texts), _SHARD):
        part = texts[start : start + _SHARD]
        key = hashlib.sha256(json.dumps([release.document_tower_hash, *part]).encode()).hexdigest()[:32]
        file = folder / "vectors" / f"{key}.npy"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            partial = file.with_suffix(".partial.npy")
            np.save(partial, encoder.encode_documents(part))
            partial.replace(file)
        made.append(np.load(file))
        line(min(start + _SHARD, len(texts)), len(texts))
    return np.concatenate(made)


def _others(texts: Texts, folder: Path, console: Console) -> list[Engine]:
    model = load_teacher(OFFLINE)
    kept = TeacherVectors(model, folder / "teacher", autocast=True)
    vectors = kept.encode(texts.pieces, progress=_line(console, "embedding with the teacher"))
    return [
        engines.faiss_flat(model, vectors),
        engines.txtai(model, texts.pieces, vectors, hybrid=False),
        engines.txtai(model, texts.pieces, vectors, hybrid=True),
        engines.usearch(model, vectors),
        engines.sqlite_vec(model, vectors, folder / "sqlite-vec.db"),
    ]


def goals(figures: Mapping[str, Any], timed: Mapping[str, Timed]) -> list[dict[str, Any]]:
    """Each goal with the value that was measured and whether it holds."""
    hybrid, dense = timed["stillroom hybrid"], timed["stillroom dense"]
    judged = [
        _at_most("hybrid p50, ms", hybrid.percentile(50), 3),
        _at_most("hybrid p99, ms", hybrid.percentile(99), 12),
        _at_most("dense p50, ms", dense.percentile(50), 1.5),
        _at_most("resident memory, MB", figures["resident_mb"], 300),
        _at_least(
            "rate of adding / padded ONNX int8", figures["added_a_second"] / figures["padded_onnx_a_second"], 1.5
        ),
    ]
    for kind, most, recall in (("ivf", 450, 0.97), ("hnsw", 550, 0.97), ("pq", 100, 0.95)):
        if kind in figures["kinds"]:
            found = figures["kinds"][kind]
            judged += [
                _at_most(f"{kind}: bytes a passage", found["bytes"], most),
                _at_least(f"{kind}: Recall@10", found["recall"], recall),
            ]
    if "serving" in figures:
        served = figures["serving"]
        judged += [
            _at_most(f"errors of {served['clients']} clients", sum(served["open"]["errors"].values()), 0),
            _at_most("served: p99 / p50 at half of the capacity", served["tail"], 8),
            _at_most("served: memory after / before", served["growth"], 1.1),
        ]
    if "at_most" in figures:
        large = figures["at_most"]
        judged.append(_at_most(f"hybrid p50 at {large['passages']:,}, ms", large["stillroom hybrid"]["p50_ms"], 8))
    if first := timed.get("sentence-transformers + FAISS flat"):
        judged += [
            _at_least(
                "times faster than sentence-transformers + FAISS flat, p50",
                first.percentile(50) / hybrid.percentile(50),
                5,
            ),
            _at_least(
                "nDCG@10 less that of sentence-transformers", float(hybrid.ndcg.mean() - first.ndcg.mean()), -0.005
            ),
        ]
        for name, other in timed.items():
            if not name.startswith("stillroom"):
                ahead = other.percentile(50) < hybrid.percentile(50) and other.ndcg.mean() > hybrid.ndcg.mean()
                judged.append({"goal": f"{name} is not ahead on both speed and quality", "holds": not ahead})
    return judged


def _at_most(what: str, value: float, most: float) -> dict[str, Any]:
    return {"goal": f"{what} <= {most:g}", "value": value, "holds": bool(value <= most)}


def _at_least(what: str, value: float, least: float) -> dict[str, Any]:
    return {"goal": f"{what} >= {least:g}", "value": value, "holds": bool(value >= least)}


def _times(timed: Timed) -> dict[str, float]:
    return {"p50_ms": timed.percentile(50), "p99_ms": timed.percentile(99)}


def _figures(engine: Engine, timed: Timed) -> dict[str, Any]:
    mean = interval_of_mean(timed.ndcg, generator=np.random.default_rng(0))
    return {"how": engine.how} | _times(timed) | {"ndcg_at_10": mean.value, "interval": list(mean.ends)}


def _unseen(texts: Texts) -> list[str]:
    return [text for text, _ in drawn(texts, _ADDED, seed=9)]


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _line(console: Console, what: str) -> Callable[[int, int], None]:
    """Say how far something is, at most every few percent."""
    said = [-1]

    def say(done: int, of: int) -> None:
        if (step := 20 * done // max(of, 1)) != said[0]:
            said[0] = step
            console.print(f"{what}: {done:,} of {of:,}", markup=False)

    return say
