"""Training records, mined on the device from its own feedback and its own raw index.

Each opened result becomes one record, from its own query alone: candidates are the nearest passages of the raw index to
the query's vector under the *release* (no adapter), so removing a query changes no other record. Feedback is the only
source: what a search showed but nobody opened, and whatever a semantic cache may serve, never becomes a record.

With the query as the unit, one query must not enter more records than are accounted for. A text that was opened for two
passages would give two, and its gradients would add up to twice the clip norm. So they are merged (`one_per_query`): a
query is what the tower reads, its token ids, and its record has the passage that was opened last. The other way, to keep
m records and account for m of them, costs m times the noise for every query, and most are opened once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.held_back import held_back
from stillroom_client.training import Record

MAXIMUM_RECORDS = 64
"""Most recent opened results that a device trains on, unless the federation sets another number: a public constant."""

RECORDS_PER_QUERY = 1
"""Records that one query enters under `local`: a public constant, held by `one_per_query`."""


def mine_records(
    device: Device,
    encoder: Encoder,
    *,
    candidates: int,
    one_per_query: bool = False,
    most: int = MAXIMUM_RECORDS,
    held_back_share: float = 0.0,
) -> list[Record]:
    """One record for each opened result whose passage is still indexed, most recent last.

    Args:
        encoder: the release's, without an adapter.
        candidates: rows of each record (fewer when the index is smaller), the opened passage first.
        one_per_query: merge the opened results of one query: what `local` needs, where the unit is a query.
        most: of the latest records; under `local` a public constant of the federation.
        held_back_share: of the queries, left out for evaluation.
    """
    split = held_back(device, held_back_share)
    history = [(seen.query, seen.passage_id) for seen in device.feedback() if not split.holds(seen.query)]
    opened = (_latest_of_each(history, encoder) if one_per_query else history)[-most:]
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


def _latest_of_each(history: Iterable[tuple[str, str]], encoder: Encoder) -> list[tuple[str, str]]:
    """The last opened result of each query, in the order in which they were opened."""
    latest: dict[tuple[int, ...], tuple[str, str]] = {}
    for query, passage in history:
        (tokens,) = encoder.tokenize_queries([query])
        latest.pop(tokens, None)  # to stand where it was opened last
        latest[tokens] = (query, passage)
    return list(latest.values())


def _relevant_first(
    relevant: NDArray[np.float32], near: NDArray[np.float32], others: list[bool], candidates: int
) -> NDArray[np.float16]:
    rows = np.concatenate([relevant[None], near[np.array(others)]])[:candidates]
    return rows.astype(np.float16)
