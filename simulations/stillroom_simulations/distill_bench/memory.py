"""How the memory of distillation grows with its corpus: lessons, layout of vectors, and training, each in a process of its own.

Texts are generated: sentences of drawn words, each once, in a folder in BEIR layout. What is measured is the largest anonymous
memory of the process (`RssAnon`): pages of memory-mapped files belong to the system, which takes them back when it needs them.

| stage | what runs |
|---|---|
| `lessons` | a query is made of each passage, and both are written (`prepare_lessons`) |
| `vectors` | a vector of each text is computed, kept by content and laid out (`embed_lessons`); the teacher draws them |
| `training` | a fixed number of steps of a tiny tower, by alignment (`Curriculum`) |
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import DataError
from stillroom_simulations.distill_bench.arms import MemorySettings

if TYPE_CHECKING:
    from rich.console import Console

STAGES = ("lessons", "vectors", "training")
_DIMENSION = 64
_BATCH = 64
_WORDS = 5_000
_STATUS = Path("/proc/self/status")
_WATCHED_EVERY = 0.005
_RUNS = {"training": 3}
"""Times that a stage is run; the least peak counts. What steps allocate and free lies differently in memory each time, by tens
of megabytes, which is more than what a text more costs."""


def measure_memory(settings: MemorySettings, folder: Path, console: Console) -> dict[str, dict[str, Any]]:
    """Figures: peak of each stage at each size, and what a text more costs between the two largest.

    Raises:
        DataError: this system does not tell a process's anonymous memory, or a stage failed.
    """
    if not _STATUS.exists():
        raise DataError(f"{_STATUS} is not there: the family memory needs Linux, leave it out with --families")
    shutil.rmtree(folder, ignore_errors=True)
    peaks: dict[str, dict[int, int]] = {stage: {} for stage in STAGES}
    figures: dict[str, dict[str, Any]] = {}
    for texts in settings.texts:
        place = folder / str(texts)
        write_texts(place / "corpus", texts)
        for stage in STAGES:
            runs = [_apart(stage, place, settings.steps) for _ in range(_RUNS.get(stage, 1))]
            found = min(runs, key=lambda one: one["peak"])
            peaks[stage][texts] = int(found["peak"])
            figures[f"memory.{stage}.{texts}"] = {"value": found["peak"], "unit": "bytes", "seconds": found["seconds"]}
            console.print(f"{stage} of {texts:,} texts: {found['peak'] / 1e6:,.0f} MB", markup=False)
        shutil.rmtree(place)
    return figures | growth(peaks, settings)


def growth(peaks: Mapping[str, Mapping[int, int]], settings: MemorySettings) -> dict[str, dict[str, Any]]:
    """By how many bytes the peak of each stage grows between the two largest sizes, against its goal.

    A passage stands for itself and the query that is made of it.
    """
    made: dict[str, dict[str, Any]] = {}
    for stage, own in peaks.items():
        small, large = sorted(own)[-2:]
        each = (own[large] - own[small]) / (large - small)
        most = settings.preparing if stage == "lessons" else settings.learning
        made[f"memory.{stage}.growth"] = {
            "value": each, "unit": "bytes a passage", "goal": f"<= {most:g}", "holds": each <= most, "between": [small, large],
        }  # fmt: skip
    return made


def write_texts(folder: Path, count: int) -> None:
    """So many passages in BEIR layout, and one query."""
    (folder / "qrels").mkdir(parents=True)
    generator = np.random.default_rng(0)
    words = np.array(["".join(generator.choice(list("aeioulnrst"), 6)) for _ in range(_WORDS)])
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(count):
            drawn = " ".join(words[generator.integers(0, _WORDS, 12)])
            file.write(json.dumps({"_id": str(number), "text": f"Entry {number} of {drawn}."}) + "\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "which entry is first"}\n')
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\t0\t1\n")


def _apart(stage: str, folder: Path, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, stage, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{stage} in {folder} failed: {done.stderr.strip()[-800:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_while(work: Callable[[], None]) -> int:
    """The largest anonymous memory of this process while `work` runs, in bytes, looked at every few milliseconds."""
    peak, stop = [anonymous()], threading.Event()

    def watch() -> None:
        while not stop.wait(_WATCHED_EVERY):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return max(peak[0], anonymous())


def anonymous() -> int:
    """Resident memory of this process that no file backs, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class _Drawn:
    """An `Embedder` whose vectors are drawn, so that what is measured is what holds them."""

    identity = hashlib.sha256(b"drawn vectors").hexdigest()
    dimension = _DIMENSION

    def embed(self, texts: Sequence[str], role: str) -> NDArray[np.float32]:
        """Unit vectors, (n, dimension)."""
        seeds = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") for text in texts]
        vectors = np.random.default_rng(seeds).standard_normal((len(texts), _DIMENSION)).astype(np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[NDArray[np.float32]]:
        """Not asked for."""
        raise NotImplementedError


def _lessons(folder: Path, steps: int) -> None:
    from stillroom_server.distillery.data.prepare import prepare_lessons
    from stillroom_server.distillery.data.settings import DataSettings

    data = DataSettings.model_validate(
        {
            "sources": [{"kind": "beir", "data": str(folder / "corpus"), "use": "passages"}],
            "synthetic": {"makers": ["crop"], "per_passage": 1},
            "negatives": {"count": 0},
        }
    )
    prepare_lessons(data, folder / "lessons", teacher=None)


def _vectors(folder: Path, steps: int) -> None:
    from stillroom_server.distillery.lessons import Lessons
    from stillroom_server.distillery.vectors import VectorCache, embed_lessons

    lessons = Lessons.open(folder / "lessons")
    embed_lessons(_Drawn(), lessons, VectorCache(folder / "cache"), folder / "vectors.npy")


def _training(folder: Path, steps: int) -> None:
    from stillroom_server.distillery.lessons import Lessons
    from stillroom_server.distillery.losses.settings import LossesSettings
    from stillroom_server.distillery.students.make import make_student
    from stillroom_server.distillery.students.settings import StudentSettings
    from stillroom_server.distillery.training.bank import Bank
    from stillroom_server.distillery.training.curriculum import Curriculum
    from stillroom_server.distillery.training.settings import TrainingSettings
    from stillroom_server.teacher import OFFLINE, load_teacher

    shutil.rmtree(folder / "training", ignore_errors=True)  # a run of before would be resumed at its end
    lessons = Lessons.open(folder / "lessons")
    bank = Bank(lessons, np.load(folder / "vectors.npy", mmap_mode="r"))
    small = {"init": "scratch", "depth": 1, "width": 48, "heads": 4, "feed_forward": 64, "dimension": _DIMENSION}
    student = make_student(StudentSettings.model_validate(small), load_teacher(OFFLINE))
    losses = LossesSettings.model_validate({"cosine": {"weight": 1.0}})
    settings = TrainingSettings(epochs=steps * _BATCH / len(lessons.rows("query")), batch_size=_BATCH)
    Curriculum(losses=losses, training=settings, bank=bank).learn(student, folder / "training")


_WORKS: Mapping[str, Callable[[Path, int], None]] = {"lessons": _lessons, "vectors": _vectors, "training": _training}


def _main(stage: str, folder: str, steps: str) -> None:
    started = time.perf_counter()
    peak = peak_while(lambda: _WORKS[stage](Path(folder), int(steps)))
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
