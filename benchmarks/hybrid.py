"""Latency of dense, BM25 and hybrid search, of filters, and of bringing the full-text index forward.

    python benchmarks/hybrid.py --texts corpus.jsonl.gz [--texts ...] --passages 100000 --out FILE

Passages are real text, cut to 55 words each; vectors are random units, because the time of a flat index does
not depend on what they say. The query's encoding is not in these figures: `stillroom bench demo` has it. Everything runs on
one core. `load` is the machine's: a busy one makes every time on the clock longer, so the processor's own is beside it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stillroom_client.derived import Current, Indexes
from stillroom_client.described import fields, select
from stillroom_client.filters import compile_filter
from stillroom_client.ranking import ranking
from stillroom_client.store import Store
from stillroom_shared.corpus import Passage

WORDS, DIMENSION = 55, 384


def main() -> None:
    """Build, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", action="append", required=True, type=Path)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    texts = passage_texts(asked.texts, asked.passages)
    figures: dict[str, float] = {"passages": len(texts), "load": os.getloadavg()[0], "cores": os.cpu_count() or 0}
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), texts, asked.queries, figures)
    asked.out.write_text(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=1) + "\n")


def passage_texts(paths: list[Path], count: int) -> list[str]:
    """Pieces of about `WORDS` words, from the files in turn, with what was already there before once they run out."""
    pieces = []
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                words = json.loads(line)["text"].split()
                pieces += [" ".join(words[n : n + WORDS]) for n in range(0, len(words), WORDS)]
    random.Random(0).shuffle(pieces)
    return pieces[:count]


def measure(folder: Path, texts: list[str], count: int, figures: dict[str, float]) -> None:
    """Fill `figures`."""
    store_file = folder / "store.sqlite3"
    Store.create(store_file, dimension=DIMENSION)
    store = Store(store_file)
    chance = np.random.default_rng(0)
    for start in range(0, len(texts), 5_000):
        batch = texts[start : start + 5_000]
        vectors = chance.standard_normal((len(batch), DIMENSION)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        passages = [Passage(f"p{start + n}", f"owner{(start + n) % 1000}", text) for n, text in enumerate(batch)]
        store.put(passages, vectors)
    indexes = Indexes(folder, store)
    figures["build_bm25_s"] = seconds(lambda: use(indexes, text=True))
    figures["build_dense_s"] = seconds(lambda: use(indexes, dense=True))
    figures["open_s"] = seconds(lambda: use(Indexes(folder, store), dense=True, text=True))
    figures["bm25_bytes_a_passage"] = sum(
        path.stat().st_size for path in (folder / "index.tantivy").rglob("*") if path.is_file()
    ) / len(texts)
    queries = [" ".join(random.Random(n).sample(texts[n].split(), min(6, len(texts[n].split())))) for n in range(count)]
    queries = [query or "empty" for query in queries]
    vectors = chance.standard_normal((count, DIMENSION)).astype(np.float32)
    filters = {
        "": None, "where_0.1%_": "owner=owner7", "where_10%_": "owner<owner19", "where_50%_": "owner<owner55",
        "where_99.9%_": "owner!=owner7",
    }  # fmt: skip
    with indexes.current(dense=True, text=True) as current:
        for name, where in filters.items():
            rows = None
            if where is not None:
                condition = compile_filter(where, fields(store))
                began = time.thread_time()
                rows = select(store, condition.sql, condition.values)
                figures[f"{name}select_cpu_ms"] = (time.thread_time() - began) * 1e3
                figures[f"{name}rows"] = len(rows)
            for mode in ("dense", "bm25", "hybrid"):
                spent, worked = [], []
                for n in range(count if where is None else count // 4):
                    started, began = time.perf_counter(), time.thread_time()
                    found(current, store, mode, queries[n], vectors[n : n + 1], rows)
                    spent.append((time.perf_counter() - started) * 1e3)
                    worked.append((time.thread_time() - began) * 1e3)
                figures[f"{name}{mode}_p50_ms"], figures[f"{name}{mode}_p99_ms"] = np.percentile(spent[10:], [50, 99])
                cpu = np.percentile(worked[10:], [50, 99])
                figures[f"{name}{mode}_cpu_p50_ms"], figures[f"{name}{mode}_cpu_p99_ms"] = cpu
    store.put([Passage("late", "owner1", "a late passage")], vectors[:1] / np.linalg.norm(vectors[:1]))
    figures["bring_forward_one_s"] = seconds(lambda: use(indexes, text=True))
    store.remove(["p5"])
    figures["bring_forward_removal_s"] = seconds(lambda: use(indexes, text=True))


def found(current: Current, store: Store, mode: str, query: str, vectors: np.ndarray, rows: np.ndarray | None) -> None:
    """Ten results with their passages, as a device gives them."""
    store.passages(fused.row for fused in ranking(current, mode, query, vectors, 10, rows))  # type: ignore[arg-type]


def use(indexes: Indexes, *, dense: bool = False, text: bool = False) -> None:
    """Load or make."""
    with indexes.current(dense=dense, text=text):
        pass


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
