"""What encryption at rest costs: the same store and indexes in the clear and encrypted, side by side in one process.

    python benchmarks/encryption.py --passages 20000 --out FILE

Vectors are random units, texts are 55 words drawn by Zipf's law from 30,000 made-up ones. The two take turns, batch by batch
and query by query, so that what else runs on the machine slows both alike; `cpu` figures are of the processor's own time. The
key is not derived here: what a passphrase costs at each start stands in `unlock_ms`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from stillroom_client.catalog import Catalog
from stillroom_client.derived import Indexes
from stillroom_client.key_file import KeyFile
from stillroom_client.ranking import ranking
from stillroom_client.store import Store
from stillroom_shared.corpus import Passage
from stillroom_shared.vault import PLAIN, Vault

WORDS, VOCABULARY, DIMENSION, BATCH = 55, 30_000, 384, 1000


class Side:
    """A store with its indexes, and what was measured of it."""

    def __init__(self, folder: Path, vault: Vault) -> None:
        folder.mkdir()
        self.folder, self.vault = folder, vault
        Store.create(folder / "store.sqlite3", dimension=DIMENSION, vault=vault)
        self.open()
        self.times: dict[str, list[float]] = {}

    def open(self) -> None:
        """As a process that begins."""
        self.store = Store(self.folder / "store.sqlite3", self.vault)
        self.catalog = Catalog(self.store)
        self.indexes = Indexes(self.folder, self.store)

    def reopen(self) -> None:
        """The same, with its indexes."""
        self.open()
        self.use()

    def timed(self, name: str, work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> None:
        """Do it and keep how long it took, in seconds."""
        started = clock()
        work()
        self.times.setdefault(name, []).append(clock() - started)

    def use(self) -> None:
        """Load the indexes, or make them."""
        with self.indexes.current(dense=True, text=True):
            pass

    def search(self, mode: str, text: str, vectors: np.ndarray) -> None:
        """Ten results with their passages, as a device gives them."""
        with self.indexes.current(dense=mode != "bm25", text=mode != "dense") as current:
            found = ranking(current, mode, text, vectors, 10, None)  # type: ignore[arg-type]
            self.catalog.found(fused.row for fused in found)


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.out.resolve().parent) as folder:
        figures = measured(Path(folder), asked.passages, asked.queries)
    figures |= {"passages": asked.passages, "load": os.getloadavg()[0], "cores": os.cpu_count() or 0}
    asked.out.write_text(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=1) + "\n")
    print(asked.out.read_text(), end="")


def measured(folder: Path, count: int, queries: int) -> dict[str, float]:
    """Figures of both sides, and their ratios."""
    chance = np.random.default_rng(0)
    sides = {"plain": Side(folder / "plain", PLAIN), "encrypted": Side(folder / "encrypted", Vault(bytes(32)))}
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        passages, vectors = texts(chance, start, size), units(chance, size)
        for side in sides.values():
            side.timed("add", partial(side.store.put, passages, vectors))
    for side in sides.values():
        side.timed("build", side.use)
    for _ in range(5):
        for side in sides.values():
            side.store.close()
            side.timed("open", side.reopen)
    asked = [(" ".join(words(chance, 6)), units(chance, 1)) for _ in range(queries)]
    for mode in ("dense", "bm25", "hybrid"):
        for text, vector in asked:
            for side in sides.values():
                search = partial(side.search, mode, text, vector)
                side.timed(mode, search)
                side.timed(f"{mode}_cpu", search, time.thread_time)
    for side in sides.values():
        side.store.put(texts(chance, count, 1), units(chance, 1))
        side.timed("bring_forward", side.use)
    file = KeyFile.new().with_passphrase(bytes(32), "correct horse battery staple")
    sides["encrypted"].timed("unlock", lambda: file.by_passphrase("correct horse battery staple", folder))
    return ratios(sides, count)


def ratios(sides: dict[str, Side], count: int) -> dict[str, float]:
    """What is printed."""
    figures: dict[str, float] = {}
    for name, side in sides.items():
        found = side.times
        figures[f"{name}_add_passages_a_second"] = count / sum(found["add"])
        for each in ("build", "bring_forward"):
            figures[f"{name}_{each}_s"] = found[each][0]
        figures[f"{name}_open_p50_ms"] = float(np.median(found["open"])) * 1e3
        for mode in ("dense", "bm25", "hybrid"):
            for clock in ("", "_cpu"):
                p50, p99 = np.percentile(np.array(found[mode + clock][10:]) * 1e3, [50, 99])
                figures[f"{name}_{mode}{clock}_p50_ms"], figures[f"{name}_{mode}{clock}_p99_ms"] = p50, p99
        files = [path for path in side.folder.rglob("*") if path.is_file()]
        figures[f"{name}_bytes_a_passage"] = sum(path.stat().st_size for path in files) / count
    for name in [name.removeprefix("plain_") for name in figures if name.startswith("plain_")]:
        figures[f"ratio_{name}"] = figures[f"encrypted_{name}"] / figures[f"plain_{name}"]
    figures["unlock_ms"] = sides["encrypted"].times["unlock"][0] * 1e3
    return figures


def words(chance: np.random.Generator, count: int) -> list[str]:
    """Some words are common and most are rare."""
    return [f"w{n % VOCABULARY}" for n in chance.zipf(1.2, count)]


def texts(chance: np.random.Generator, start: int, count: int) -> list[Passage]:
    """Passages that were not there before."""
    return [Passage(f"p{start + n}", f"owner{n % 100}", " ".join(words(chance, WORDS))) for n in range(count)]


def units(chance: np.random.Generator, count: int) -> np.ndarray:
    """Vectors of norm 1, (count, dim)."""
    vectors = chance.standard_normal((count, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
