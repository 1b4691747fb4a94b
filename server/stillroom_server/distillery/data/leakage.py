"""What must not be learned from: queries (and passages) that students are measured on, found again by their words.

Texts are the same here when their letters and digits are, in order: case, punctuation, white space and Unicode's
compatible forms make no difference. A measured query inside a longer passage is not found, nor is a paraphrase.

| case | what happens |
|---|---|
| the text of a measured query as a query, a passage, or a made query | refused |
| a passage of the folder, with `passages` | refused, with and without its title |
| a folder without any of the splits | `DataError`: nothing would be excluded, and nobody would notice |
| a text without any letter or digit | never refused |
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from stillroom_server.distillery.data.settings import ExcludeSettings
from stillroom_server.distillery.store import as_keys, distinct
from stillroom_shared.beir import beir_files, read_judgements, read_lines
from stillroom_shared.errors import DataError

_WORDS = re.compile(r"[^\W_]+")


@dataclass(frozen=True, eq=False)
class Excluded:
    """Hashes of what must not occur, 16 bytes each.

    >>> excluded = Excluded.of(["What do tapirs eat?"])
    >>> "what do  TAPIRS eat" in excluded, "what do zebras eat" in excluded
    (True, False)

    Attributes:
        high: the first halves of the hashes, ascending, (n,).
        low: the second halves, (n,).
    """

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """All of these texts; one without a letter or digit excludes nothing."""
        found = bytearray()
        for text in texts:
            found += leak_key(text)
        keys = as_keys([bytes(found)])
        keys = keys[distinct(keys)]
        return cls(*(np.ascontiguousarray(half) for half in keys.T))

    def __contains__(self, text: str) -> bool:
        if not len(self.high) or not (key := leak_key(text)):
            return False
        high, low = as_keys([key])[0]
        first, last = (np.searchsorted(self.high, high, side) for side in ("left", "right"))
        return bool((self.low[first:last] == low).any())


def leak_key(text: str) -> bytes:
    """Equal for texts with the same letters and digits in the same order of words; empty for a text without any."""
    words = " ".join(_WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest() if words else b""


def excluded(settings: ExcludeSettings) -> Excluded:
    """Read the queries, and where it is asked for the passages, of the folders. Raises `DataError`."""
    return Excluded.of(text for folder in settings.folders for text in _texts(folder, settings))


def _texts(folder: Path, settings: ExcludeSettings) -> Iterator[str]:
    files = beir_files(folder)
    judged = {row.query for split in settings.splits if split in files.qrels for row in read_judgements(files, split)}
    if not judged:
        raise DataError(
            f"data.exclude: {folder} has no {' or '.join(settings.splits)} judgements, only {', '.join(files.qrels)}: "
            "set data.exclude.splits to what is measured on"
        )
    yield from (
        line.passage.text for line in read_lines(files.queries, owner="", public=True) if line.passage.id in judged
    )
    if settings.passages:
        for line in read_lines(files.corpus, owner="", public=True):
            yield from (line.passage.full_text, line.passage.text)
