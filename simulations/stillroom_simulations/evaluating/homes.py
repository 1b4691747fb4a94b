"""The index of a device, asked as the device asks it: its release and adapter, its vector index, its way of fusing.

| mode | what is asked |
|---|---|
| `dense`, `bm25`, `hybrid` | `Device.search` of that mode |
| `rerank` | `hybrid`, and the release's cross-encoder reads the usual number of results again |

How deep lists are fused depends on how many results are asked for (`fusion.DEPTH`), so the ranking is that of a search for as
many results as people look at, with those of a deeper search behind it. Where a reranker reads more of them than that, it is
that of a search for as many as it reads. A device may hold more than the corpus: passages that nobody judged are misses. It
must not hold less, or other texts.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from stillroom_client.device import Device
from stillroom_client.fusion import DEPTH
from stillroom_client.home import INDEX_NAME, TEXT_INDEX_NAME
from stillroom_client.ranking import Mode, ranking
from stillroom_client.rerank import USUAL
from stillroom_shared.corpus import Passage, Query
from stillroom_shared.errors import DataError
from stillroom_shared.release import ONNX_FILES, RERANKER_FOLDER
from stillroom_simulations.evaluate import Run
from stillroom_simulations.evaluating.kept import Kept
from stillroom_simulations.evaluating.systems import Bytes, Progress, Ranking, silent

_APART = 1e-9
"""Between scores that were equal: less than what is between others."""
_TOGETHER = 4_096
"""Passages that are read from a device's store at once."""
Asked = Literal["dense", "bm25", "hybrid", "rerank"]
MODES: tuple[Asked, ...] = get_args(Asked)


@dataclass(frozen=True, eq=False)
class Home:
    """An open device in one mode; whoever opened it closes it.

    Attributes:
        read: how many of its results, with their scores, a reranker behind it reads; 0 without one.
    """

    name: str
    device: Device
    mode: Asked
    read: int = 0

    @property
    def how(self) -> str:
        """Its index and precision."""
        kind = self.device.index_in_use()["kind"]
        words = {"dense": f"{kind} index", "bm25": "tantivy", "hybrid": f"{kind} index and tantivy, fused"}
        return words.get(self.mode, f"{words['hybrid']}, {USUAL} read again") + ", as served"

    def index(self, passages: Sequence[Passage], kept: Kept, progress: Progress = silent) -> HomeSearcher:
        """Nothing is added to a device: `DataError` when it lacks a passage, or holds another text under its id."""
        held = set(self.device.store.ids())
        if missing := [passage.id for passage in passages if passage.id not in held]:
            raise DataError(
                f"{self.device.home} holds {len(passages) - len(missing):,} of {len(passages):,} passages, and not "
                f"{missing[0]!r}: add the corpus first (`stillroom index add DIR/corpus.jsonl`), or measure its release"
            )
        of = {passage.id: passage for passage in passages}
        told = ((held, of[held.id]) for held in self._stored(list(of)))
        if differing := [held.id for held, own in told if (held.title, held.text) != (own.title, own.text)]:
            raise DataError(
                f"{self.device.home} holds other texts than the corpus under {len(differing):,} of its {len(passages):,} ids, "
                f"{differing[0]!r} say: add the corpus again (`stillroom index add DIR/corpus.jsonl`), and measure corpora "
                "that share ids on a device each"
            )
        self.device.refresh_index()
        return HomeSearcher(self)

    def others(self, ids: Container[str]) -> dict[str, str]:
        """Texts, by their ids, that it holds beside these."""
        return {
            held.id: held.full_text for held in self._stored([one for one in self.device.store.ids() if one not in ids])
        }

    def _stored(self, ids: Sequence[str]) -> Iterator[Passage]:
        """Passages that it holds, some at a time."""
        store = self.device.store
        for start in range(0, len(ids), _TOGETHER):
            yield from store.passages(store.rows(ids[start : start + _TOGETHER]).tolist()).values()


@dataclass(frozen=True, eq=False)
class HomeSearcher:
    """A device that holds the corpus."""

    home: Home

    @property
    def bytes(self) -> Bytes:
        """The int8 towers, and the index files of the mode."""
        device, mode = self.home.device, self.home.mode
        folder, reads = device.store.path.parent, 0
        names = {"dense": [INDEX_NAME], "bm25": [TEXT_INDEX_NAME]}.get(mode, [INDEX_NAME, TEXT_INDEX_NAME])
        size = sum(_size(folder / name) for name in names)
        if mode == "bm25":
            return Bytes(0, 0, size / device.store.count())
        if mode == "rerank":
            reads = _size(device.release.folder / RERANKER_FOLDER / ONNX_FILES["int8"])
        query, document = device.release.query_onnx("int8"), device.release.document_onnx("int8")
        return Bytes(_size(query) + reads, _size(document), size / device.store.count())

    def run(self, queries: Sequence[Query], depth: int, progress: Progress = silent) -> Run:
        """The device's scores; what lies deeper than somebody sees follows below them, in its order.

        The scores of a deeper search go on where they are of one kind, as cosines and BM25 are; those of a deeper fusion are
        lowered until they follow, and say the order only.
        """
        run: Run = {}
        for done, query in enumerate(queries, start=1):
            run[query.id] = shown = dict(self._shown(query.text))
            last = min(shown.values(), default=math.inf)
            for passage, score in self._deep(query.text, depth):
                if passage not in shown:
                    shown[passage] = last = min(score, last - _APART)
            progress(done, len(queries))
        return run

    def encode(self, text: str) -> Any:
        """The text with its vector, where vectors are searched; reading again encodes for itself."""
        if self.home.mode in ("bm25", "rerank"):
            return text, None
        return text, self.home.device.embed_queries([text])

    def search(self, encoded: Any, k: int) -> Ranking:
        """What `Device.search` does after its query tower."""
        text, vectors = encoded
        if self.home.mode == "rerank":
            return self._found(text, k, rerank=USUAL)
        device, mode = self.home.device, self._mode
        with device.indexes.current(dense=mode != "bm25", text=mode != "dense") as current:
            found = ranking(current, mode, text, vectors, k, None)
            stored = device.catalog.found(fused.row for fused in found)
        return _falling([(stored[fused.row].passage.id, fused.score) for fused in found])

    @property
    def _mode(self) -> Mode:
        return "hybrid" if self.home.mode == "rerank" else self.home.mode

    @property
    def _looked_at(self) -> int:
        """Results of one search: as many as lists are deep anyway or are read again anyway, or as somebody reads."""
        return max(USUAL if self.home.mode == "rerank" else DEPTH, self.home.read)

    def _shown(self, text: str) -> Ranking:
        """What somebody sees: what `search` finds for so many results."""
        return self._found(text, self._looked_at, rerank=USUAL if self.home.mode == "rerank" else 0)

    def _deep(self, text: str, depth: int) -> Ranking:
        return self._found(text, depth) if depth > self._looked_at else []

    def _found(self, text: str, k: int, rerank: int = 0) -> Ranking:
        hits = self.home.device.search(text, k, mode=self._mode, rerank=rerank, cached=False)
        return _falling([(hit.passage_id, hit.score) for hit in hits])


def _falling(ranking: Ranking) -> Ranking:
    """With equal scores a hair apart: a device orders them otherwise than a table of scores does.

    >>> [score for _, score in _falling([("b", 0.5), ("a", 0.5)])]
    [0.5, 0.499999999]
    """
    return [(passage, score - _APART * place) for place, (passage, score) in enumerate(ranking)]


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0
