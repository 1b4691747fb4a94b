"""Time and quality of searches, side by side: every search answers the same questions, in turns of a few dozen each.

Turns, because the speed of a machine drifts: a pause of a minute would otherwise fall on one search alone.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillroom_simulations.search_bench.engines import Engine
from stillroom_simulations.search_bench.texts import Texts

_TURN = 50
_WARM = 20
_DEPTH = 30  # pieces looked at for ten documents


@dataclass(frozen=True)
class Timed:
    """Milliseconds of each question, (questions,), and nDCG@10 over documents of each, (questions,)."""

    milliseconds: NDArray[np.float64]
    ndcg: NDArray[np.float64]

    def percentile(self, share: float) -> float:
        """Milliseconds that a share (0 to 100) of the questions stay below."""
        return float(np.percentile(self.milliseconds, share))


def compare(
    engines: Sequence[Engine], texts: Texts, *, k: int = 10, report: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, Timed]:
    """Ask every engine every question once for its time (k results) and once for its quality."""
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    questions = texts.questions
    for engine in engines:
        for question in questions[:_WARM]:
            engine.search(question.text, k)
    for start in range(0, len(questions), _TURN):
        for engine in engines:
            gc.collect()
            for question in questions[start : start + _TURN]:
                started = time.perf_counter()
                engine.search(question.text, k)
                times[engine.name].append((time.perf_counter() - started) * 1e3)
        report(min(start + _TURN, len(questions)), len(questions))
    return {engine.name: Timed(np.array(times[engine.name]), quality(engine, texts)) for engine in engines}


def quality(engine: Engine, texts: Texts) -> NDArray[np.float64]:
    """nDCG@10 of the documents whose pieces are found, (questions,)."""
    return np.array(
        [ndcg([texts.document(n) for n in engine.search(q.text, _DEPTH)], q.relevant) for q in texts.questions]
    )


def ndcg(documents: Sequence[str], relevant: frozenset[str], *, cutoff: int = 10) -> float:
    """Binary nDCG of a ranking of documents, each counted at its first place (Jarvelin and Kekalainen 2002).

    >>> round(ndcg(["a", "b", "b", "c"], frozenset({"b"})), 3)
    0.631
    """
    ranked = list(dict.fromkeys(documents))[:cutoff]
    gains = sum(1 / np.log2(place + 2) for place, document in enumerate(ranked) if document in relevant)
    return float(gains / sum(1 / np.log2(place + 2) for place in range(min(len(relevant), cutoff))))
