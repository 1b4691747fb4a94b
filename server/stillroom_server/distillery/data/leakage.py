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
from dataclasses import dataclass
from pathlib import Path

from stillroom_server.distillery.data.settings import ExcludeSettings
from stillroom_shared.beir import beir_files, read_judgements, read_lines
from stillroom_shared.errors import DataError

_WORDS = re.compile(r"[^\W_]+")


@dataclass(frozen=True, eq=False)
class Excluded:
    """Hashes of what must not occur; 16 bytes each.

    >>> excluded = Excluded(frozenset([leak_key("What do tapirs eat?")]))
    >>> "what do  TAPIRS eat" in excluded, "what do zebras eat" in excluded
    (True, False)
    """

    keys: frozenset[bytes] = frozenset()

    def __contains__(self, text: str) -> bool:
        return bool(self.keys) and leak_key(text) in self.keys


def leak_key(text: str) -> bytes:
    """Equal for texts with the same letters and digits in the same order of words; empty for a text without any."""
    words = " ".join(_WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest() if words else b""


def excluded(settings: ExcludeSettings) -> Excluded:
    """Read the queries, and where it is asked for the passages, of the folders. Raises `DataError`."""
    keys: set[bytes] = set()
    for folder in settings.folders:
        keys |= _queries(folder, settings)
        if settings.passages:
            for line in read_lines(beir_files(folder).corpus, owner=""):
                keys |= {leak_key(line.passage.full_text), leak_key(line.passage.text)}
    return Excluded(frozenset(keys - {b""}))


def _queries(folder: Path, settings: ExcludeSettings) -> set[bytes]:
    files = beir_files(folder)
    judged = {row.query for split in settings.splits if split in files.qrels for row in read_judgements(files, split)}
    if not judged:
        raise DataError(
            f"data.exclude: {folder} has no {' or '.join(settings.splits)} judgements, only {', '.join(files.qrels)}: "
            "set data.exclude.splits to what is measured on"
        )
    return {leak_key(line.passage.text) for line in read_lines(files.queries, owner="") if line.passage.id in judged}
