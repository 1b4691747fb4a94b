"""Training records, mined on the device from its own feedback and its own raw index.

Each opened result becomes one record, from its own query alone: candidates are the nearest passages of the raw index to
the query's vector under the *release* (no adapter), so removing a query changes no other record (but makes room for one that
is older, where there are more than are trained on). Feedback is the only
source: what a search showed but nobody opened, and whatever a semantic cache may serve, never becomes a record.

With the query as the unit, one query must not enter more records than are accounted for. A text that was opened for two
passages would give two, and its gradients would add up to twice the clip norm. So they are merged (`one_per_query`): a
query is what the tower reads, its token ids, and its record has the passage that was opened last. The other way, to keep
m records and account for m of them, costs m times the noise for every query, and most are opened once.

There each query is also guarded by itself: one that cannot be read, encoded or searched keeps its place among the latest, is
no record, and changes no other. If the device failed instead, one query would withdraw all the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.held_back import HeldBack, held_back
from stillroom_client.training import Record

MAXIMUM_RECORDS = 64
"""Most recent opened results that a device trains on, unless the federation sets another number: a public constant."""

RECORDS_PER_QUERY = 1
"""Records that one query enters under `local`: a public constant, held by `one_per_query`."""

_log = logging.getLogger(__name__)


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
    if not one_per_query:
        opened = [(seen.query, seen.passage_id) for seen in device.feedback() if not split.holds(seen.query)]
        return _mined(device, encoder, opened[-most:], candidates)
    history = [(seen.query, seen.passage_id) for seen in device.feedback() if _trained_on(split, seen.query)]
    records: list[Record] = []
    for pair in _latest_of_each(history, encoder)[-most:]:
        try:
            records += _mined(device, encoder, [pair], candidates)
        except Exception:
            _log.exception("a query is no record: it cannot be encoded or searched")
    return records


def _mined(device: Device, encoder: Encoder, opened: Sequence[tuple[str, str]], candidates: int) -> list[Record]:
    """A record for each query and its opened passage."""
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


def _trained_on(split: HeldBack, query: str) -> bool:
    """Whether a query is not held back; one that cannot be hashed is never scored either, and keeps its place here."""
    try:
        return not split.holds(query)
    except Exception:
        return True


def _latest_of_each(history: Iterable[tuple[str, str]], encoder: Encoder) -> list[tuple[str, str]]:
    """The last opened result of each query, in the order in which they were opened."""
    latest: dict[tuple[int, ...] | str, tuple[str, str]] = {}
    for query, passage in history:
        key: tuple[int, ...] | str
        try:
            (key,) = encoder.tokenize_queries([query])
        except Exception:
            key = query  # it fails again when it is mined, and until then it is itself alone
        latest.pop(key, None)  # to stand where it was opened last
        latest[key] = (query, passage)
    return list(latest.values())


def _relevant_first(
    relevant: NDArray[np.float32], near: NDArray[np.float32], others: list[bool], candidates: int
) -> NDArray[np.float16]:
    rows = np.concatenate([relevant[None], near[np.array(others)]])[:candidates]
    return rows.astype(np.float16)
