"""A retrieval corpus: passages, queries, relevance judgements, and who owns what.

The one value every stage reads, whichever source it came from (docstrings of installed packages, a BEIR-layout folder).
Its content hash is printed beside every figure, because a figure without the data it was measured on means nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from stillroom_shared.errors import DataError

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

# Shares of each split in ten-thousandths; the remainder is test.
_TRAIN_SHARE = 6_500
_DEV_SHARE = 1_000


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that can be found. `owner` is the natural client: a package, a publisher, an article."""

    id: str
    owner: str
    text: str
    title: str = ""

    @property
    def full_text(self) -> str:
        """Title and text as the document tower reads them."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Query:
    """A question somebody asks, in exactly one split. Questions of one `topic` are asked by the same person; "": unknown."""

    id: str
    owner: str
    text: str
    split: Split
    topic: str = ""


@dataclass(frozen=True)
class Corpus:
    """Passages, queries and graded relevance (`qrels[query_id][passage_id] > 0` means relevant).

    >>> corpus = Corpus("toy", (Passage("p1", "zoo", "A tapir eats leaves."),),
    ...                 (Query("q1", "zoo", "what do tapirs eat", "test"),), {"q1": {"p1": 1}})
    >>> corpus.owners, len(corpus.queries_in("test")), corpus.content_hash[:8]
    (('zoo',), 1, '043444a0')
    >>> len(corpus.restrict(lambda owner: owner == "museum").passages)
    0
    """

    name: str
    passages: tuple[Passage, ...]
    queries: tuple[Query, ...]
    qrels: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def owners(self) -> tuple[str, ...]:
        """Every owner of a passage or a query, sorted."""
        return tuple(sorted({p.owner for p in self.passages} | {q.owner for q in self.queries}))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over everything that can change a figure, independent of order."""
        digest = hashlib.sha256()
        for passage in sorted(self.passages, key=lambda p: p.id):
            digest.update(_line(passage.id, passage.owner, passage.title, passage.text))
        for query in sorted(self.queries, key=lambda q: q.id):
            relevant = sorted(self.qrels.get(query.id, {}).items())
            topic = [query.topic] if query.topic else []
            digest.update(_line(query.id, query.owner, query.text, query.split, relevant, *topic))
        return digest.hexdigest()

    def queries_in(self, split: Split) -> tuple[Query, ...]:
        """Judged queries of one split, in corpus order."""
        return tuple(q for q in self.queries if q.split == split and self.qrels.get(q.id))

    def restrict(self, keeps: Callable[[str], bool]) -> Corpus:
        """The part of the corpus whose owner passes the test; judgements that would dangle are dropped."""
        passages = tuple(p for p in self.passages if keeps(p.owner))
        kept = {p.id for p in passages}
        queries = tuple(q for q in self.queries if keeps(q.owner))
        qrels = {q.id: {pid: grade for pid, grade in self.qrels.get(q.id, {}).items() if pid in kept} for q in queries}
        return Corpus(self.name, passages, queries, qrels, self.notes)

    def require_both_sides(self, public_owners: Iterable[str]) -> tuple[Corpus, Corpus]:
        """Divide by owner into the public and the private corpus, and refuse a division that leaves a side empty."""
        public = set(public_owners)
        if unknown := public - set(self.owners):
            raise DataError(
                f"public owners {sorted(unknown)} do not occur in corpus {self.name!r}: "
                f"its owners are {list(self.owners)[:12]}"
            )
        sides = self.restrict(public.__contains__), self.restrict(lambda owner: owner not in public)
        for side, corpus in zip(("public", "private"), sides, strict=True):
            if not corpus.queries_in("train") or not corpus.passages:
                queries = len(corpus.queries_in("train"))
                raise DataError(
                    f"the {side} side of corpus {self.name!r} has {queries} training queries and {len(corpus.passages)} "
                    f"passages: choose other public owners (corpus.public_owners) among {list(self.owners)[:12]}"
                )
        return sides


def split_of(text: str) -> Split:
    """The split a query belongs to, by a hash of its normalized text: stable across machines and corpus versions.

    >>> [split_of(t) for t in ("open a zip file", "sort a list", "Sort  a LIST")]
    ['test', 'dev', 'dev']
    """
    point = int.from_bytes(hashlib.sha256(normalize(text).encode()).digest()[:8], "big") % 10_000
    if point < _TRAIN_SHARE:
        return "train"
    return "dev" if point < _TRAIN_SHARE + _DEV_SHARE else "test"


def normalize(text: str) -> str:
    """Case and white space folded: what counts as the same text when duplicates are dropped."""
    return " ".join(text.casefold().split())


def _line(*parts: object) -> bytes:
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
