"""The corpus value: its hash, its parts and its splits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from stillroom_shared.corpus import SPLITS, Corpus, Passage, Query, split_of
from stillroom_shared.errors import DataError

CORPUS = Corpus(
    "toy",
    (Passage("p1", "zoo", "leaves", "Tapirs"), Passage("p2", "zoo", "bark"), Passage("p3", "museum", "stills")),
    (
        Query("q1", "zoo", "what do tapirs eat", "train"),
        Query("q2", "museum", "how is brandy made", "train"),
        Query("q3", "museum", "nothing was judged", "test"),
    ),
    {"q1": {"p1": 1, "p3": 1}, "q2": {"p3": 2}},
)


def test_content_hash_ignores_order() -> None:
    """A hash that depends on reading order would call equal corpora different."""
    shuffled = Corpus("toy", CORPUS.passages[::-1], CORPUS.queries[::-1], {"q2": {"p3": 2}, "q1": {"p3": 1, "p1": 1}})
    assert shuffled.content_hash == CORPUS.content_hash


@pytest.mark.parametrize(
    "changed",
    [
        replace(CORPUS, passages=(replace(CORPUS.passages[0], text="leaves."), *CORPUS.passages[1:])),
        replace(CORPUS, passages=(replace(CORPUS.passages[0], title=""), *CORPUS.passages[1:])),
        replace(CORPUS, passages=(replace(CORPUS.passages[0], owner="park"), *CORPUS.passages[1:])),
        replace(CORPUS, passages=CORPUS.passages[:2]),
        replace(CORPUS, queries=(replace(CORPUS.queries[0], text="What do tapirs eat"), *CORPUS.queries[1:])),
        replace(CORPUS, queries=(replace(CORPUS.queries[0], split="dev"), *CORPUS.queries[1:])),
        replace(CORPUS, qrels={"q1": {"p1": 1, "p3": 1}, "q2": {"p3": 1}}),
        replace(CORPUS, qrels={"q1": {"p1": 1}, "q2": {"p3": 2}}),
    ],
    ids=["text", "title", "owner", "passage", "query", "split", "grade", "judgement"],
)
def test_content_hash_sees_every_change(changed: Corpus) -> None:
    """Two figures printed beside one hash are taken for measurements on the same data."""
    assert changed.content_hash != CORPUS.content_hash


def test_content_hash_does_not_run_fields_together() -> None:
    """Moving a word from title to text is another corpus, although the characters in a row are the same."""
    one = Corpus("toy", (Passage("p", "zoo", "b c", "a"),), (), {})
    two = Corpus("toy", (Passage("p", "zoo", "c", "a b"),), (), {})
    assert one.content_hash != two.content_hash


def test_restriction_leaves_no_dangling_judgement() -> None:
    """A judgement of a passage that is not there makes the best possible ranking impossible, and scores fall."""
    part = CORPUS.restrict(lambda owner: owner == "zoo")
    assert [p.id for p in part.passages] == ["p1", "p2"]
    assert [q.id for q in part.queries] == ["q1"] and part.qrels == {"q1": {"p1": 1}}


def test_queries_in_are_judged() -> None:
    """A query without judgements would count as a miss of every system."""
    assert [q.id for q in CORPUS.queries_in("train")] == ["q1", "q2"] and CORPUS.queries_in("test") == ()


def test_sides() -> None:
    """Public and private text must not share an owner, and an empty side would make every later figure vacuous."""
    public, private = CORPUS.require_both_sides(["museum"])
    assert (public.owners, private.owners) == (("museum",), ("zoo",))
    with pytest.raises(DataError, match=r"\['park'\] do not occur"):
        CORPUS.require_both_sides(["park"])
    with pytest.raises(DataError, match=r"the private side .* has 0 training queries and 0 passages"):
        CORPUS.require_both_sides(["museum", "zoo"])
    with pytest.raises(DataError, match="the public side"):
        CORPUS.require_both_sides([])


def test_split_follows_what_duplicates_follow() -> None:
    """If a query and its twin in other case fell into train and test, the test set would have been trained on."""
    assert {split_of(text) for text in ("Open a ZIP file", "open a zip file", " open  a\tzip file\n")} == {"test"}


def test_split_shares() -> None:
    """Shares are 65 : 10 : 25; a wrong boundary would starve dev or leak into test. Four standard errors."""
    draw = random.Random(0)
    found = [split_of(f"query {draw.random()}") for _ in range(20_000)]
    for split, share in zip(SPLITS, (0.65, 0.10, 0.25), strict=True):
        tolerance = 4 * (share * (1 - share) / len(found)) ** 0.5
        assert abs(found.count(split) / len(found) - share) < tolerance
        assert abs(found.count(split) / len(found) - (share + 0.02)) > tolerance, "the test would accept another share"
