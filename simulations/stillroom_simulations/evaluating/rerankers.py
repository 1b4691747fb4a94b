"""A cross-encoder behind another system: it reads the best passages of that system again (Nogueira and Cho 2019).

As a device does (`stillroom_client.rerank`), it ranks by its logits and the first stage's scores together, unless it is told to
rank alone.

| case | what happens |
|---|---|
| passages beyond the first n | follow behind, in the order of the first stage: recall at more than n is the first stage's |
| the first stage finds fewer than n | those are read |
| a query's own passage is ignored | it is left out before they are read: n others are, and standardised without it |
| the first stage is a device | scores are those of its search for n results, also where `fusion.DEPTH` is less |
| an activation at the model's end | left out: it keeps the order, but saturates, and equal scores would be ties |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.corpus import Passage, Query
from stillroom_shared.scales import FIRST_SHARE, blended, reranked
from stillroom_simulations.evaluate import Run
from stillroom_simulations.evaluating.homes import Home
from stillroom_simulations.evaluating.kept import Kept
from stillroom_simulations.evaluating.systems import (
    Bytes,
    Progress,
    Ranking,
    Searcher,
    System,
    as_run,
    silent,
    without_identical_ids,
)

_SHARD = 8  # queries


@dataclass(frozen=True, eq=False)
class Reranking:
    """A cross-encoder with one score. `identity` is a hash of it, `weights` its bytes.

    Attributes:
        logits: of a query and each of n passages, (n,).
        first: what finds the passages.
        top: how many of them are read.
        share: weight of the first stage's scores; 0 for the cross-encoder alone.
        threads: queries that are worked on at the same time where nothing is timed; 1 where `logits` uses threads itself.
        ignore_identical_ids: read no passage whose id is the query's own, and do not rank it, where nothing is timed.
    """

    name: str
    how: str
    logits: Callable[[str, Sequence[str]], NDArray[np.floating]]
    identity: str
    weights: int
    first: System
    top: int
    share: float = FIRST_SHARE
    threads: int = 1
    ignore_identical_ids: bool = False

    @property
    def asked(self) -> int:
        """How many passages the first stage has to find, so that enough can be read."""
        return self.top + self.ignore_identical_ids

    def index(self, passages: Sequence[Passage], kept: Kept, progress: Progress = silent) -> RerankingSearcher:
        """Index the first stage."""
        texts = {passage.id: passage.full_text for passage in passages}
        # A device's scores depend on how many results are asked for: it has to know what is read, not only how deep a run goes.
        first: System = self.first
        if isinstance(first, Home):
            first = replace(first, read=self.asked)
            texts |= first.others(texts)  # it may find what is not of the corpus, which is read like any other
        return RerankingSearcher(self, first.index(passages, kept, progress), texts, kept)


@dataclass(frozen=True, eq=False)
class RerankingSearcher:
    """The first stage's searcher, and the text of each passage."""

    system: Reranking
    first: Searcher
    texts: Mapping[str, str]
    kept: Kept

    @cached_property
    def bytes(self) -> Bytes:
        """The first stage's, and the cross-encoder's weights for queries."""
        first = self.first.bytes
        return Bytes(first.query_model + self.system.weights, first.passage_model, first.each_passage)

    def run(self, queries: Sequence[Query], depth: int, progress: Progress = silent) -> Run:
        """The first stage's ranking with its top read again; scores are ranks."""
        found = self.first.run(queries, max(depth, self.system.asked), silent)
        if self.system.ignore_identical_ids:
            found = without_identical_ids(found)
        ranked = {key: sorted(own, key=lambda passage: (-own[passage], passage)) for key, own in found.items()}
        asked = [query for query in queries if ranked.get(query.id)]
        tops = {query.id: ranked[query.id][: self.system.top] for query in asked}
        items = [json.dumps([query.text, *(self.texts[passage] for passage in tops[query.id])]) for query in asked]
        scored = self.kept.arrays(self.system.identity, items, self._of_items, shard=_SHARD, progress=progress)
        run: Run = {}
        for query, logits in zip(asked, scored, strict=True):
            before = [found[query.id][passage] for passage in tops[query.id]]
            order = reranked(blended(np.array(before), logits, self.system.share), logits)
            top = [tops[query.id][place] for place in order]
            ranking = [*top, *ranked[query.id][self.system.top :]]
            run[query.id] = as_run(ranking[:depth])
        return run

    def encode(self, text: str) -> Any:
        """The text, and what the first stage makes of it."""
        return text, self.first.encode(text)

    def search(self, encoded: Any, k: int) -> Ranking:
        """Search the first stage, and read its top again."""
        text, first = encoded
        top = self.first.search(first, self.system.top)
        logits = self._logits(text, [self.texts[passage] for passage, _ in top])
        scores = blended(np.array([score for _, score in top]), logits, self.system.share)
        return [(top[place][0], float(scores[place])) for place in reranked(scores, logits)[:k]]

    def _of_items(self, items: Sequence[str]) -> list[NDArray[np.float32]]:
        def scored(item: str) -> NDArray[np.float32]:
            query, *passages = json.loads(item)
            return self._logits(query, passages)

        if self.system.threads == 1:
            return [scored(item) for item in items]
        with ThreadPoolExecutor(self.system.threads) as pool:
            return list(pool.map(scored, items))

    def _logits(self, query: str, passages: Sequence[str]) -> NDArray[np.float32]:
        """(passages,) logits."""
        return np.asarray(self.system.logits(query, passages), np.float32).reshape(len(passages))
