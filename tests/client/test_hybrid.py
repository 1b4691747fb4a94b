"""Search by meaning, by words and by both, among all passages or those of a filter; and what training never sees of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.devices import ANIMALS, passages, units

from stillroom_client import ranking
from stillroom_client.derived import Indexes
from stillroom_client.encoder import Encoder
from stillroom_client.fusion import fuse
from stillroom_client.records import mine_records
from stillroom_client.search import Device, FilterError
from stillroom_client.text_index import TextIndex
from stillroom_shared.corpus import Passage
from stillroom_shared.release import Release

Lists = st.lists(st.integers(0, 30), unique=True, max_size=20)


@given(Lists, Lists, st.integers(1, 100))
def test_fusion_is_the_formula(dense: list[int], bm25: list[int], k: int) -> None:
    """Guards against ranks that begin at 0, a row that counts twice, and an order that depends on a hash."""
    expected = {row: 0.0 for row in {*dense, *bm25}}
    for rows in (dense, bm25):
        for place, row in enumerate(rows):
            expected[row] += 1 / (k + place + 1)
    fused = fuse(dense, bm25, k=k)
    assert [f.score for f in fused] == sorted((f.score for f in fused), reverse=True)
    assert {f.row for f in fused} == set(expected) and len(fused) == len(expected)
    for f in fused:
        assert f.score == pytest.approx(expected[f.row] * (k + 1) / 2)
        assert f.dense_rank == (dense.index(f.row) + 1 if f.row in dense else None)
        assert f.bm25_rank == (bm25.index(f.row) + 1 if f.row in bm25 else None)


def test_each_mode_ranks_by_what_it_says(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a mode that is ignored, and ranks that belong to other lists."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        device.add(passages(ANIMALS))
        dense, words, both = (device.search("an okapi", 10, mode=mode) for mode in ("dense", "bm25", "hybrid"))
        assert [(hit.dense_rank, hit.bm25_rank) for hit in dense] == [(n, None) for n in range(1, 11)]
        assert words[0].passage_id == "okapi" and words[0].bm25_rank == 1 and len(words) == 1
        ranks = {hit.passage_id: hit.rank for hit in dense}
        assert {hit.passage_id: hit.dense_rank for hit in both} == ranks
        assert [hit.passage_id for hit in both if hit.bm25_rank] == ["okapi"]
        assert both == device.search("an okapi", 10), "hybrid is the default"
        assert both != dense


def test_words_alone_need_no_release(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a search by words that waits for a model it does not use."""
    home = tmp_path / "home"
    with Device.create(home, tiny_release, link=True) as device:
        device.add(passages(ANIMALS))
    (home / "release").unlink()
    with Device.open(home) as device:
        assert device.search("okapi", mode="bm25")[0].passage_id == "okapi"


def owned(count: int) -> list[Passage]:
    return [
        Passage(f"p{n}", f"owner{n % 50}", f"words {'rare ' if n % 97 == 0 else ''}of w{n % 7}", f"title {n % 3}")
        for n in range(count)
    ]


@pytest.mark.parametrize(
    "where", ["owner=owner7", "owner!=owner7", "title='title 1' and not owner in (owner1, owner2)"]
)
@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_a_filtered_search_returns_k_if_k_exist(
    tmp_path: Path, tiny_release: Release, where: str, mode: ranking.Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a filter applied to what an unfiltered search returned; and compares with doing it by hand."""
    monkeypatch.setattr("stillroom_client.text_index._PUSHED", 100)  # both ways are taken
    everything = owned(1000)
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        device.add(everything, units(1000, tiny_release.dimension))
        meanings: dict[str, Callable[[Passage], bool]] = {
            "owner=owner7": lambda p: p.owner == "owner7",
            "owner!=owner7": lambda p: p.owner != "owner7",
        }

        def other(p: Passage) -> bool:
            return p.title == "title 1" and p.owner not in ("owner1", "owner2")

        meant = meanings.get(where, other)
        fulfil = {p.id for p in everything if meant(p)}
        whole = [hit for hit in device.search("rare w3", 1000, mode=mode) if hit.passage_id in fulfil]
        for k in (1, 10, len(fulfil), len(fulfil) + 5):
            hits = device.search("rare w3", k, mode=mode, where=where)
            assert len(hits) == min(k, len(fulfil)) and {hit.passage_id for hit in hits} <= fulfil
            if mode == "dense":
                assert [hit.passage_id for hit in hits] == [hit.passage_id for hit in whole[:k]]
        assert device.search("rare", 5, mode=mode, where="owner=nobody") == []


def test_a_filter_follows_the_store(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a kept row set of an earlier generation."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        device.add(owned(60), units(60, tiny_release.dimension))
        assert {h.passage_id for h in device.search("words", where="owner=owner7")} == {"p7", "p57"}
        device.remove(["p7"])
        assert {h.passage_id for h in device.search("words", where="owner=owner7")} == {"p57"}
        device.add([Passage("p57", "owner8", "moved", "")], units(1, tiny_release.dimension))
        assert device.search("words", where="owner=owner7") == []
        with pytest.raises(FilterError, match="there is no field 'colour'"):
            device.search("words", where="colour=red")


def test_a_search_that_saves_its_index_does_not_stop_a_compaction(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against two writers of one file: the one under the right to write, the other alone among those that compact."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device, Device.open(tmp_path / "home") as other:
        device.add(passages(ANIMALS), units(len(ANIMALS), tiny_release.dimension))
        real, query, searched = os.fsync, units(1, tiny_release.dimension, seed=1), list[list[list[str]]]()

        def meanwhile(handle: int) -> None:
            if not searched and "index.faiss" in os.readlink(f"/proc/self/fd/{handle}"):
                searched.append([])
                searched[0] = other.search_many(query)
            real(handle)

        monkeypatch.setattr(os, "fsync", meanwhile)
        device.compact()
        assert searched == [device.search_many(query)]


def test_a_filter_is_read_before_anything_is_loaded(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a typing error that costs a model's loading time."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device, pytest.raises(FilterError):
        device.search("words", where="owner=")
    assert device.towers._encoder is None


def test_odd_queries_are_plain_text(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against an argument of the command line that is no UTF-8, and operators of a query language."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        device.add(passages(ANIMALS))
        for query in ("", " ", "\udcff\udc80", 'title:"x', "AND OR (", "*", "x" * 100_000, "\x00"):
            assert len(device.search(query, 3)) == 3, query
            assert device.search(query, 3, mode="bm25") == [], query


def test_training_records_know_no_words_and_no_filters(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against records that depend on the full-text index: the argument of their sensitivity is about vectors alone."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        device.add(passages(ANIMALS))
        device.record([("an okapi", "tapir"), ("who swims", "dugong")])
        encoder = Encoder(tiny_release, precision="int8")
        before = mine_records(device, encoder, candidates=4)
        device.search("an okapi", where="owner=zoo and not id=tapir")

        def never(*_: object, **__: object) -> None:
            raise AssertionError("mining asked for words or a filter")

        for owner, name in ((TextIndex, "search"), (TextIndex, "load"), (Indexes, "selected")):
            monkeypatch.setattr(owner, name, never)
        monkeypatch.setattr("stillroom_client.derived.select", never)
        monkeypatch.setattr("stillroom_client.searching.ranking", never)
        after = mine_records(device, encoder, candidates=4)
        assert len(before) == 2
        for one, other in zip(before, after, strict=True):
            assert one.tokens == other.tokens
            np.testing.assert_array_equal(one.candidates, other.candidates)
        with pytest.raises(AssertionError, match="mining asked"):
            device.search("an okapi")
