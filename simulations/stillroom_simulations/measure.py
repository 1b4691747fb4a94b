"""Quality of every stage of a run, on every owner's held-out queries: over the whole private corpus and over each own index.

Float stages (teacher, student, federated) search the teacher's float32 passage vectors exactly; the device stage is what
ships: int8 query tower, int8 document tower, quantized index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_client.device import Device
from stillroom_shared.corpus import Corpus, Query
from stillroom_simulations.evaluate import CUTOFF as DEPTH
from stillroom_simulations.evaluate import Run, Scores, dense_run, evaluate_own_index, evaluate_run, own_index_run
from stillroom_simulations.population import SimulatedDevice


@dataclass(frozen=True, eq=False)
class Trial:
    """What all stages are measured on.

    Attributes:
        corpus: the private corpus.
        queries: the test queries, in a fixed order.
        passages: the teacher's float32 unit vectors of the private passages, (passages, dim).
        devices: the simulated devices; each test query belongs to exactly one.
    """

    corpus: Corpus
    queries: tuple[Query, ...]
    passages: NDArray[np.float32]
    devices: tuple[SimulatedDevice, ...]

    def whole(self, vectors: NDArray[np.float32]) -> Scores:
        """Exact search of the query vectors (queries, dim) over every private passage."""
        ids = [passage.id for passage in self.corpus.passages]
        return self.score(dense_run(vectors, [q.id for q in self.queries], self.passages, ids, k=DEPTH))

    def own_index(self, vectors: NDArray[np.float32]) -> Scores:
        """The same, each query over the passages of the device it belongs to."""
        asked = [([self.queries[row].id for row in rows], self._held(device)) for device, rows in self.rows_by_device()]
        ids = [passage.id for passage in self.corpus.passages]
        return self._score_own(own_index_run(vectors, [q.id for q in self.queries], self.passages, ids, asked, k=DEPTH))

    def whole_on_device(self, vectors: NDArray[np.float32], everything: Device) -> Scores:
        """Quantized search over a device that holds every private passage."""
        return self.score(_as_run([q.id for q in self.queries], everything.search_many(vectors, DEPTH)))

    def own_index_on_device(self, vectors: NDArray[np.float32], homes: Mapping[str, Path]) -> Scores:
        """Quantized search, each query in the device it belongs to."""
        run: Run = {}
        for owner, rows in self.rows_by_device():
            with Device.open(homes[owner.name]) as device:
                run |= _as_run([self.queries[row].id for row in rows], device.search_many(vectors[rows], DEPTH))
        return self._score_own(run)

    def rows_by_device(self) -> list[tuple[SimulatedDevice, list[int]]]:
        """Each device that has test queries, with their rows."""
        row_of = {query.id: row for row, query in enumerate(self.queries)}
        owned = ((device, [row_of[q.id] for q in device.held_out if q.id in row_of]) for device in self.devices)
        return [(device, rows) for device, rows in owned if rows]

    @staticmethod
    def _held(device: SimulatedDevice) -> list[str]:
        return [passage.id for passage in device.passages]

    def _score_own(self, run: Run) -> Scores:
        held = {self.queries[row].id: self._held(device) for device, rows in self.rows_by_device() for row in rows}
        return evaluate_own_index(run, {query.id: self.corpus.qrels[query.id] for query in self.queries}, held)

    def score(self, run: Run) -> Scores:
        """Metrics of a run on the test queries."""
        return evaluate_run(run, {query.id: self.corpus.qrels[query.id] for query in self.queries})


def _as_run(query_ids: Sequence[str], found: Sequence[Sequence[str]]) -> Run:
    """Ranked ids as a run whose scores keep the order."""
    return {
        query: {passage: 1.0 / rank for rank, passage in enumerate(ids, start=1)}
        for query, ids in zip(query_ids, found, strict=True)
    }
