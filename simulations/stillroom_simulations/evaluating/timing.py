"""How long one query takes: one at a time, on one thread, systems in turns.

Turns of a few queries each, because the speed of a machine drifts: a pause would otherwise fall on one system alone, and
ratios of systems would be ratios of moments. The first query of a turn is asked once more before, untimed, since the turn of
another system has left its own memory in the caches of the processor.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from stillroom_simulations.evaluating.systems import Progress, Searcher, silent

_TURN = 20
_RESULTS = 10


@dataclass(frozen=True, eq=False)
class Latency:
    """Milliseconds of each timed query, (n,): until it is encoded, and from then until its results are there."""

    encode: NDArray[np.float64]
    search: NDArray[np.float64]

    @property
    def total(self) -> NDArray[np.float64]:
        """Both together, (n,)."""
        return self.encode + self.search

    def percentiles(self) -> dict[str, dict[str, float]]:
        """p50 and p99 of each part."""
        parts = {"encode": self.encode, "search": self.search, "total": self.total}
        return {
            name: {f"p{share}": float(np.percentile(values, share)) for share in (50, 99)}
            for name, values in parts.items()
        }


def time_queries(
    searchers: Mapping[str, Searcher],
    texts: Sequence[str],
    *,
    seconds: float,
    k: int = _RESULTS,
    progress: Progress = silent,
) -> dict[str, Latency]:
    """Ask every searcher the same queries, each once, for k results.

    Args:
        seconds: no turn begins after that long; the first always does, and a turn is always all systems'.
    """
    encode: dict[str, list[float]] = {name: [] for name in searchers}
    search: dict[str, list[float]] = {name: [] for name in searchers}
    started = time.perf_counter()
    with _undisturbed():
        for start in range(0, len(texts), _TURN):
            if start and time.perf_counter() - started > seconds:
                break
            for name, searcher in searchers.items():
                searcher.search(searcher.encode(texts[start]), k)
                for text in texts[start : start + _TURN]:
                    begin = time.perf_counter()
                    encoded = searcher.encode(text)
                    middle = time.perf_counter()
                    searcher.search(encoded, k)
                    search[name].append((time.perf_counter() - middle) * 1e3)
                    encode[name].append((middle - begin) * 1e3)
            progress(min(start + _TURN, len(texts)), len(texts))
    return {name: Latency(np.array(encode[name]), np.array(search[name])) for name in searchers}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """One thread for NumPy, FAISS and torch, as ONNX Runtime has in the client room; no pause for collecting garbage."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
