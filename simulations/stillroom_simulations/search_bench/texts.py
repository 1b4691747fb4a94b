"""Passages and questions of the search benchmark: real text in pieces, and as many drawn ones as asked for beyond them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom_shared.errors import DataError

WORDS = 55
_LEAST = 8  # words of a piece; what is left of a document below that is dropped


@dataclass(frozen=True)
class Question:
    """A question with the documents that answer it."""

    text: str
    relevant: frozenset[str]


@dataclass(frozen=True)
class Texts:
    """Pieces of about `WORDS` words, the document that each is of, and questions whose answers are among the documents."""

    pieces: Sequence[str]
    documents: Sequence[str]
    questions: Sequence[Question]

    def document(self, number: int) -> str:
        """What a passage is of: beyond the real ones, each drawn one is a document of its own."""
        return self.documents[number] if number < len(self.documents) else f"drawn/{number}"


def load(folders: Sequence[Path], *, questions: int, most: int = 100_000) -> Texts:
    """Cut the corpora of folders in BEIR layout into pieces, shuffled; questions are of their dev splits.

    Raises:
        DataError: a folder has no corpus or no dev questions in any of them.
    """
    cut = [(piece, document) for folder in folders for piece, document in _pieces(folder)]
    random.Random(0).shuffle(cut)
    cut = cut[:most]
    kept = {document for _, document in cut}
    asked = [question for folder in folders for question in _questions(folder) if question.relevant <= kept]
    random.Random(1).shuffle(asked)
    if not asked:
        raise DataError(f"no dev questions in {', '.join(map(str, folders))}: give BEIR folders with qrels/dev.tsv")
    return Texts([piece for piece, _ in cut], [document for _, document in cut], asked[:questions])


def drawn(texts: Texts, count: int, *, seed: int = 0) -> Iterator[tuple[str, int]]:
    """`count` pieces that run from the middle of one real piece into another, and the number of the first."""
    rng = random.Random(seed)
    for _ in range(count):
        first, second = rng.randrange(len(texts.pieces)), rng.randrange(len(texts.pieces))
        head, tail = texts.pieces[first].split(), texts.pieces[second].split()
        middle = rng.randrange(1, max(len(head), 2))
        yield " ".join((*head[middle:], *tail[:middle])), first


def _pieces(folder: Path) -> Iterator[tuple[str, str]]:
    for row in _rows(folder / "corpus.jsonl"):
        words = row["text"].split()
        for start in range(0, len(words), WORDS):
            piece = words[start : start + WORDS]
            if len(piece) > _LEAST:
                title = f"{row['title']}. " if start == 0 and row.get("title") else ""
                yield title + " ".join(piece), f"{folder.name}/{row['_id']}"


def _questions(folder: Path) -> Iterator[Question]:
    judged = folder / "qrels" / "dev.tsv"
    if not judged.is_file():
        return
    relevant: dict[str, set[str]] = {}
    for line in judged.read_text(encoding="utf-8").splitlines()[1:]:
        query, document, score = line.split("\t")
        if int(score) > 0:
            relevant.setdefault(query, set()).add(f"{folder.name}/{document}")
    for row in _rows(folder / "queries.jsonl"):
        if row["_id"] in relevant:
            yield Question(row["text"], frozenset(relevant[row["_id"]]))


def _rows(path: Path) -> Iterator[Mapping[str, str]]:
    packed = path.with_name(f"{path.name}.gz")
    if packed.is_file():
        with gzip.open(packed, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    elif path.is_file():
        with open(path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        raise DataError(f"{path.parent} has no {path.name}: give a folder in BEIR layout")
