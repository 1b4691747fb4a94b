"""What an index costs as it grows: seconds and bytes a passage, memory, recall of each kind, and the rate of adding."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stillroom_client.device import Device
from stillroom_client.home import INDEX_NAME, TEXT_INDEX_NAME
from stillroom_client.index_plan import KINDS, IndexSettings, Kind
from stillroom_shared.corpus import Passage
from stillroom_shared.release import Release
from stillroom_simulations.search_bench.engines import fill
from stillroom_simulations.search_bench.texts import Texts, drawn

Vectors = NDArray[np.float32]
SIZES = (10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
_NEAR = 0.25  # length of the random part of a drawn passage's vector, beside a real one of length 1


@dataclass(frozen=True)
class Grown:
    """A size that was reached, and what adding a passage cost from the size before: seconds without encoding, and bytes now."""

    passages: int
    milliseconds: float
    store_bytes: float
    vector_bytes: float
    word_bytes: float
    kind: str


@dataclass(frozen=True)
class Kinds:
    """A kind of index over the same passages: Recall@10 against exact search, milliseconds of a query, bytes of its file."""

    recall: float
    milliseconds: float
    bytes: float
    seconds: float


def grow(
    device: Device, texts: Texts, vectors: Vectors, sizes: Sequence[int], report: Callable[[int, int], None]
) -> list[Grown]:
    """Fill a device to each size: first with the real passages, then with drawn ones whose vectors lie near real ones."""
    grown, rng = [], np.random.default_rng(0)
    more = drawn(texts, max(sizes) - len(texts.pieces)) if max(sizes) > len(texts.pieces) else iter(())
    for size in sizes:
        present, started = device.store.count(), time.perf_counter()
        spent = 0.0  # on drawing
        while (now := device.store.count()) < size:
            until = min(size, now + 10_000)
            drawing = time.perf_counter()
            if now < len(texts.pieces):
                until = min(until, len(texts.pieces))
                some, near = texts.pieces[now:until], vectors[now:until]
            else:
                pairs = [next(more) for _ in range(until - now)]
                some = [text for text, _ in pairs]
                noise = rng.standard_normal((len(pairs), vectors.shape[1]), np.float32)
                near = vectors[[n for _, n in pairs]] + _NEAR * noise / np.linalg.norm(noise, axis=1, keepdims=True)
                near /= np.linalg.norm(near, axis=1, keepdims=True)
            spent += time.perf_counter() - drawing
            fill(device, some, near, first=now)
            report(until, max(sizes))
        device.refresh_index()
        seconds = time.perf_counter() - started - spent
        grown.append(
            Grown(
                size,
                seconds / max(size - present, 1) * 1e3,
                _bytes(device.home / "store.sqlite3") / size,
                _bytes(device.home / INDEX_NAME) / size,
                _bytes(device.home / TEXT_INDEX_NAME) / size,
                str(device.index_in_use()["kind"]),
            )
        )
    return grown


def kinds(device: Device, queries: Vectors, *, names: Sequence[Kind] = KINDS) -> dict[Kind, Kinds]:
    """Index the same passages in every kind; the one before is in use again at the end."""
    before, made = device.index_settings, dict[Kind, Kinds]()
    rows, stored = device.store.vectors()
    exact = [set(device.store.names(rows[np.argsort(-(stored @ query))[:10]]).values()) for query in queries]
    try:
        for kind in names:
            started = time.perf_counter()
            device.index_settings = IndexSettings(kind=kind)
            seconds = time.perf_counter() - started
            found = [set(device.search_many(query[None])[0]) for query in queries]
            timed = time.perf_counter()
            for query in queries:
                device.search_many(query[None])
            milliseconds = (time.perf_counter() - timed) / len(queries) * 1e3
            recall = float(np.mean([len(a & b) / len(b) for a, b in zip(found, exact, strict=True)]))
            made[kind] = Kinds(recall, milliseconds, _bytes(device.home / INDEX_NAME) / len(rows), seconds)
    finally:
        device.index_settings = before
    return made


_RESIDENT = """
import sys
from pathlib import Path
from stillroom_client.device import Device
with Device.open(Path(sys.argv[1])) as device:
    for n in range(200):
        device.search(f"what is known of treatment {n}", cached=False)
    status = Path("/proc/self/status").read_text()
    print(*(next(line.split()[1] for line in status.splitlines() if line.startswith(name)) for name in ("VmRSS", "VmHWM")))
"""


def resident(home: Path) -> tuple[float, float]:
    """Megabytes that a process holds after 200 hybrid searches: now, and at most. Linux only."""
    done = subprocess.run([sys.executable, "-c", _RESIDENT, str(home)], capture_output=True, text=True, check=True)
    now, most = done.stdout.split()
    return int(now) / 1e3, int(most) / 1e3


def adding(release: Release, texts: Sequence[str], home: Path) -> tuple[float, float]:
    """Passages a second: ours (encode in int8, store), and encoding alone as Sentence Transformers' ONNX int8 backend does.

    In turns of some hundred texts each, all cores for both.
    """
    threads, ours, theirs = os.cpu_count() or 1, 0.0, 0.0
    session = _padded_session(release)
    with Device.create(home, release, link=True) as made:
        pass
    with Device.open(home, threads=threads) as device:
        turn = 256
        for start in range(0, len(texts), turn):
            part = texts[start : start + turn]
            started = time.perf_counter()
            device.add(Passage(str(start + n), "bench", text, "") for n, text in enumerate(part))
            ours += time.perf_counter() - started
            started = time.perf_counter()
            _encode_padded(session, release, part)
            theirs += time.perf_counter() - started
    del made
    return len(texts) / ours, len(texts) / theirs


def _padded_session(release: Release) -> onnxruntime.InferenceSession:
    """As `SentenceTransformer(..., backend="onnx")` opens a model: onnxruntime's own defaults, all cores."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        release.read(release.document_onnx("int8")), options, providers=["CPUExecutionProvider"]
    )


def _encode_padded(session: onnxruntime.InferenceSession, release: Release, texts: Sequence[str]) -> None:
    """As `SentenceTransformer.encode` does: sorted by length, batches of 32 padded to the longest, mean over the mask."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(release.read(release.tokenizer_file))
    tokenizer.enable_truncation(release.document_tokens)
    tokenizer.enable_padding()
    ordered = sorted(texts, key=len, reverse=True)
    for start in range(0, len(ordered), 32):
        encoded = tokenizer.encode_batch(ordered[start : start + 32])
        ids = np.array([e.ids for e in encoded], np.int64)
        mask = np.array([e.attention_mask for e in encoded], np.int64)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = session.run(["last_hidden_state"], feed)[0]
        mean = (hidden * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        mean / np.linalg.norm(mean, axis=1, keepdims=True)


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())


def as_json(grown: Sequence[Grown]) -> list[dict[str, object]]:
    """For the benchmark file."""
    return [asdict(size) for size in grown]
