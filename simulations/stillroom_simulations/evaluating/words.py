"""BM25 by the full-text index of the client room: what a device has, on the passages of a corpus."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom_client.store import Generation
from stillroom_client.text_index import TextIndex
from stillroom_shared.corpus import Passage, Query
from stillroom_simulations.evaluate import Run
from stillroom_simulations.evaluating.kept import Kept
from stillroom_simulations.evaluating.systems import Bytes, Progress, Ranking, silent

_REPORT = 100


@dataclass(frozen=True)
class Words:
    """BM25 with its stems, stop words and identifiers (`stillroom_client.analysis`)."""

    name: str = "bm25"
    how: str = "tantivy, English stems, as on a device"

    def index(self, passages: Sequence[Passage], kept: Kept, progress: Progress = silent) -> WordsSearcher:
        """Build the index, which takes a second for tens of thousands of passages: nothing is kept."""
        folder = tempfile.TemporaryDirectory(prefix="stillroom-words-")
        index = TextIndex.in_folder(Path(folder.name), Generation(1, "evaluation"), enumerate(passages))
        return WordsSearcher([passage.id for passage in passages], index, folder)


@dataclass(frozen=True, eq=False)
class WordsSearcher:
    """The index; row i of it is the passage ids[i]. Its folder goes with it."""

    ids: Sequence[str]
    found: TextIndex
    folder: tempfile.TemporaryDirectory[str]

    @property
    def bytes(self) -> Bytes:
        """No model, and the index."""
        size = sum(path.stat().st_size for path in Path(self.folder.name).rglob("*"))
        return Bytes(0, 0, size / len(self.ids))

    def run(self, queries: Sequence[Query], depth: int, progress: Progress = silent) -> Run:
        """BM25 scores of the passages that have a word of the query."""
        run: Run = {}
        for done, query in enumerate(queries, start=1):
            run[query.id] = dict(self.search(query.text, depth))
            if done % _REPORT == 0:
                progress(done, len(queries))
        return run

    def encode(self, text: str) -> str:
        """Nothing is encoded."""
        return text

    def search(self, encoded: str, k: int) -> Ranking:
        """Analysis and search."""
        scores, rows = self.found.search(encoded, k)
        return list(zip((self.ids[row] for row in rows.tolist()), scores.tolist(), strict=True))
