"""One search from the text to the hits: cache, query tower, indexes, fusion, reranker, cache.

What is handed out belongs to one generation of the store and one state of the towers; a search that a new document or adapter
overtakes is one of before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from stillroom_client.analysis import clean
from stillroom_client.cache import Question
from stillroom_client.described import fields
from stillroom_client.documents import Found
from stillroom_client.filters import compile_filter
from stillroom_client.fusion import Fused
from stillroom_client.ranking import Hit, Mode, ranking
from stillroom_client.rerank import Reranker
from stillroom_shared.errors import SettingsError
from stillroom_shared.scales import blended, reranked

if TYPE_CHECKING:
    from stillroom_client.device import Device


def search(
    device: Device, text: str, k: int, *, mode: Mode, where: str | None, rerank: int, cached: bool, adapted: bool
) -> list[Hit]:
    """See `Device.search`."""
    if k < 1:
        raise SettingsError(f"k = {k} is out of range: ask for at least 1 result")
    if rerank < 0:
        raise SettingsError(f"rerank = {rerank} is out of range: ask for 0 or more results to be read again")
    text, store = clean(text), device.store
    condition = None if where is None else compile_filter(where, fields(store))
    while True:
        in_use, encoder = device.towers.now(dense=mode != "bm25")
        reranker = device.towers.reranker if rerank else None
        # What encodes is noted before it does: an answer that a new adapter overtakes is then one of the old.
        state, release = encoder.state if encoder else 0, in_use.folder if rerank else ""
        question = Question(store.generation(), k, mode, condition, state, rerank, release)
        if cached and (known := device.cache.same(question, text)) is not None:
            return known
        vectors = None
        if encoder is not None:
            encode = encoder.encode_queries if adapted else encoder.encode_queries_unadapted
            vectors = device.towers.shortened(encode([text]))
        vector = None if vectors is None else vectors[0]
        if cached and (known := device.cache.near(question, text, vector)) is not None:
            return known
        with device.indexes.current(dense=mode != "bm25", text=mode != "dense") as current:
            if encoder is not None and not device.towers.still(in_use):
                continue  # another release was put in use meanwhile: its index needs its own vector
            rows = None if condition is None else device.indexes.selected(condition, current.generation)
            found = ranking(current, mode, text, vectors, max(k, rerank), rows)
            stored = device.catalog.found(fused.row for fused in found)
        break
    if reranker is not None:  # outside the transaction: other threads search meanwhile
        found = _read_again(reranker, text, found, [stored[fused.row] for fused in found])
    hits = [Hit.of(rank, fused, stored[fused.row]) for rank, fused in enumerate(found[:k], start=1)]
    if cached:
        device.cache.keep(replace(question, generation=current.generation), text, vector, hits)
    return hits


def _read_again(reranker: Reranker, text: str, found: Sequence[Fused], stored: Sequence[Found]) -> list[Fused]:
    """The same rows, by the reranker's scores and their own."""
    logits = reranker.logits(text, [one.passage.full_text for one in stored])
    scores = blended(np.array([one.score for one in found]), logits)
    shown = 1 / (1 + np.exp(-scores))
    return [replace(found[place], score=float(shown[place])) for place in reranked(scores, logits)]
