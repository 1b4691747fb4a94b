"""How much better one adapter finds what the owner opened than another: on the device's own index, from its own queries.

The search is the one that the owner uses: the int8 query tower and the quantized index. Quality is nDCG@10 (Järvelin and
Kekäläinen 2002) with binary relevance: what was opened after a query is relevant, nothing else is known to be. The difference
of one device is the mean over its held-back queries; nothing of it is sent as it is (`stillroom_shared.comparison`).

| case | what counts |
|---|---|
| no held-back query | None: this device has nothing to say, and sends zeros |
| the opened passage was removed | its feedback went with it (`Store.remove`); a query with nothing else opened does not count |
| the opened passage was replaced by a new text | counts, as it stands now |
| several passages opened for one query | all are relevant; the best ranking has them first |
| over `MAXIMUM_QUERIES` held-back queries | the latest of them |
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.held_back import held_back
from stillroom_shared.adapter import Adapter

MAXIMUM_QUERIES = 64
"""Most recent held-back queries that a device scores: a public constant, bounds the work."""


def held_back_difference(
    device: Device, encoder: Encoder, baseline: Adapter, candidate: Adapter, *, share: float, cutoff: int
) -> float | None:
    """Mean nDCG of the candidate minus that of the baseline over the device's held-back queries, in [-1, 1].

    Args:
        encoder: of the device's release; keeps the candidate as its adapter.
    """
    judged = held_back_queries(device, share)
    if not judged:
        return None
    means = []
    for adapter in (baseline, candidate):
        encoder.adopt(adapter)
        found = device.search_many(encoder.encode_queries(judged), cutoff)
        scores = [ndcg(ids, opened, cutoff) for ids, opened in zip(found, judged.values(), strict=True)]
        means.append(math.fsum(scores) / len(scores))
    return means[1] - means[0]


def held_back_queries(device: Device, share: float) -> dict[str, set[str]]:
    """The passages that were opened for each held-back query, latest query last."""
    split = held_back(device, share)
    judged: dict[str, set[str]] = {}
    for query, passage in device.feedback():
        if split.holds(query):
            judged[query] = judged.pop(query, set()) | {passage}
    return dict(list(judged.items())[-MAXIMUM_QUERIES:])


def ndcg(found: Sequence[str], relevant: Collection[str], cutoff: int) -> float:
    """nDCG of a ranking, with gains of 0 and 1 and a log2 discount.

    >>> ndcg(["a", "b", "c"], {"a"}, 10), round(ndcg(["a", "b", "c"], {"b", "c"}, 10), 4), ndcg(["a"], {"z"}, 10)
    (1.0, 0.6934, 0.0)
    """
    gained = math.fsum(_discount(rank) for rank, passage in enumerate(found[:cutoff]) if passage in relevant)
    return gained / math.fsum(_discount(rank) for rank in range(min(len(relevant), cutoff)))


def _discount(rank: int) -> float:
    return 1 / math.log2(rank + 2)
