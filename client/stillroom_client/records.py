"""Training records, mined on the device from its own feedback and its own raw index.

Each opened result becomes one record, from its own query alone: candidates are the nearest passages of the raw index to
the query's vector under the *release* (no adapter), so removing a query changes no other record. Results of a semantic
cache never become records (there is none in this path).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.training import Record

MAXIMUM_RECORDS = 64
"""Most recent opened results that a device trains on: a public constant."""


def mine_records(device: Device, encoder: Encoder, *, candidates: int) -> list[Record]:
    """One record for each opened result whose passage is still indexed, most recent last.

    `candidates` rows each (fewer when the index is smaller), the opened passage first. `encoder` is the release's,
    without an adapter.
    """
    opened = [(seen.query, seen.passage_id) for seen in device.feedback()[-MAXIMUM_RECORDS:]]
    if not opened:
        return []
    queries = [query for query, _ in opened]
    relevant = device.vectors_of([passage for _, passage in opened])  # (records, dim)
    ids, near = device.candidates(encoder.encode_queries(queries), candidates)  # (records, k), (records, k, dim)
    tokens = encoder.tokenize_queries(queries)
    return [
        Record(tokens[row], _relevant_first(relevant[row], near[row], [i != passage for i in ids[row]], candidates))
        for row, (_, passage) in enumerate(opened)
    ]


def _relevant_first(
    relevant: NDArray[np.float32], near: NDArray[np.float32], others: list[bool], candidates: int
) -> NDArray[np.float16]:
    rows = np.concatenate([relevant[None], near[np.array(others)]])[:candidates]
    return rows.astype(np.float16)
