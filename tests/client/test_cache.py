"""Answers served again: when, when not, within which bounds, and that nothing but the owner's screen ever sees them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.client.devices import ANIMALS, adapter_folder, filled, passages

from stillroom_client.cache import AnswerCache, CacheLimits, Question
from stillroom_client.encoder import Encoder
from stillroom_client.ranking import Hit, Mode
from stillroom_client.records import mine_records
from stillroom_client.search import Device
from stillroom_client.store import Generation
from stillroom_shared.errors import SettingsError
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey

ASKED = Question(Generation(1, "a"), 10, "hybrid", None, 1)
HITS = [Hit(1, 0.5, "p", "zoo", "", "A tapir eats leaves.", metadata={"year": 2020})]


def at(cosine: float) -> NDArray[np.float32]:
    """A unit vector at this cosine to the first axis."""
    return np.array([cosine, (1 - cosine**2) ** 0.5, 0], np.float32)


def zoo(home: Path, release: Release, limits: CacheLimits | None = None) -> Device:
    with Device.create(home, release, link=True) as device:
        device.add(passages(ANIMALS))
    return Device.open(home, cache=limits)


def answered_from(hits: Sequence[Hit]) -> set[str | None]:
    assert hits
    return {hit.cached for hit in hits}


def test_the_same_text_is_answered_again_without_encoding(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a cache that searches all the same, and one whose answers cannot be told from fresh ones."""
    with zoo(tmp_path / "home", tiny_release) as device:
        fresh = device.search("an okapi")
        assert answered_from(fresh) == {None}

        def never(*_: object) -> None:
            raise AssertionError("it was searched again")

        monkeypatch.setattr(Encoder, "encode_queries", never)
        monkeypatch.setattr("stillroom_client.searching.ranking", never)
        again = device.search("  an \n okapi ")
        assert again == fresh and answered_from(again) == {"an okapi"}
        with pytest.raises(AssertionError, match="searched again"):
            device.search("an okapi", cached=False)
        with pytest.raises(AssertionError, match="searched again"):
            device.search("An okapi!", k=3)


@pytest.mark.parametrize(
    "other",
    [{"k": 3}, {"mode": "dense"}, {"mode": "bm25"}, {"where": "owner=zoo"}, {"where": "owner=zoo and not id=okapi"}],
)
def test_another_question_has_another_answer(tmp_path: Path, tiny_release: Release, other: dict[str, object]) -> None:
    """Guards against an answer for ten results, one mode or one filter that is served for another."""
    with zoo(tmp_path / "home", tiny_release) as device:
        device.search("an okapi")
        found = device.search("an okapi", **other)  # type: ignore[arg-type]
        assert answered_from(found) == {None}
        assert found == device.search("an okapi", cached=False, **other)  # type: ignore[arg-type]
        assert answered_from(device.search("an okapi", **other)) == {"an okapi"}  # type: ignore[arg-type]


def test_new_documents_and_removed_ones_empty_the_cache(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a removed passage that is still shown, and a new one that is not; by another process' hand too."""
    with zoo(tmp_path / "home", tiny_release) as device, Device.open(tmp_path / "home") as other:
        assert "okapi" in [hit.passage_id for hit in device.search("okapi", mode="bm25")]
        other.remove(["okapi"])
        assert device.search("okapi", mode="bm25") == []
        other.add(passages(["giraffe"], "The {} is like an okapi."))
        assert [hit.passage_id for hit in device.search("okapi", mode="bm25")] == ["giraffe"]
        assert device.cache.counts.same == 0
        device.record([("okapi", "giraffe")])  # no change of what a search finds
        assert answered_from(device.search("okapi", mode="bm25")) == {"okapi"}


def test_a_new_adapter_empties_the_cache(tmp_path: Path, tiny_release: Release, signing_key: SigningKey) -> None:
    """Guards against a round that the owner does not see; by `adopt` of the device and by that of its encoder."""
    with zoo(tmp_path / "home", tiny_release) as device:
        before = device.search("an okapi", mode="dense")
        device.adopt(adapter_folder(tmp_path / "adapter", tiny_release, signing_key))
        after = device.search("an okapi", mode="dense")
        assert answered_from(after) == {None} and [h.score for h in after] != [h.score for h in before]
        device.encoder.adopt(None)
        assert device.search("an okapi", mode="dense") == before and device.cache.counts.same == 0


def test_an_answer_that_an_adapter_overtook_is_not_served_under_it(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a search that began under the old adapter and leaves its answer to those who search with the new one."""
    folder = adapter_folder(tmp_path / "adapter", tiny_release, signing_key)
    with zoo(tmp_path / "home", tiny_release) as device:
        real, once = Encoder.encode_queries, threading.Event()

        def overtaken(encoder: Encoder, texts: list[str]) -> NDArray[np.float32]:
            vectors = real(encoder, texts)
            if not once.is_set():
                once.set()
                device.adopt(folder)
            return vectors

        monkeypatch.setattr(Encoder, "encode_queries", overtaken)
        old = device.search("an okapi", mode="dense")
        new = device.search("an okapi", mode="dense")
        assert answered_from(new) == {None} and [h.score for h in new] != [h.score for h in old]


@given(st.floats(-1, 1), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_a_near_hit_holds_the_bound(cosine: float, bound: float) -> None:
    """Guards against a bound that is compared the wrong way, or to something that is no cosine."""
    cache = AnswerCache(CacheLimits(near=bound))
    cache.keep(ASKED, "what tapirs eat", at(1.0), HITS)
    found = cache.near(ASKED, "what does the tapir eat?", at(cosine))
    if abs(cosine - bound) > 1e-6:
        assert (found is not None) == (cosine > bound)
    assert cache.counts.near == (found is not None) and cache.counts.missed == (found is None)


def test_a_near_hit_needs_the_same_terms_and_the_nearest_wins() -> None:
    """Guards against "type 1" answered with what was found for "type 2", whose vectors are all but the same."""
    cache = AnswerCache(CacheLimits(near=0.9))
    cache.keep(ASKED, "symptoms of Noonan syndrome 1", at(1.0), HITS)
    assert cache.near(ASKED, "symptoms of Noonan syndrome 2", at(1.0)) is None
    assert cache.near(ASKED, "treatments of Noonan syndrome 1", at(1.0)) is None
    cache.keep(ASKED, "symptom of Noonan syndrome 1", at(0.95), HITS)
    for cosine, expected in ((0.999, "symptoms of Noonan syndrome 1"), (0.951, "symptom of Noonan syndrome 1")):
        found = cache.near(ASKED, "Noonan syndrome 1: symptoms", at(cosine))
        assert found is not None and answered_from(found) == {expected}
    assert AnswerCache(CacheLimits(near=None)).near(ASKED, "x", at(1.0)) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(ASKED, k=9), replace(ASKED, mode="dense"), replace(ASKED, towers=2), replace(ASKED, rerank=20),
        replace(ASKED, generation=Generation(2, "b")), replace(ASKED, generation=Generation(1, "restored")),
    ],
)  # fmt: skip
def test_a_near_hit_answers_the_same_question_only(other: Question) -> None:
    """Guards against a part of the question that only exact hits look at."""
    cache = AnswerCache(CacheLimits())
    cache.keep(ASKED, "what tapirs eat", at(1.0), HITS)
    assert cache.near(other, "what tapirs eat", at(1.0)) is None and cache.same(other, "what tapirs eat") is None


@pytest.mark.parametrize("mode", ["hybrid", "bm25"])
def test_near_hits_of_a_device_are_what_a_search_by_words_finds(
    tmp_path: Path, tiny_release: Release, mode: Mode
) -> None:
    """Guards against terms that the cache takes for the same and the full-text index does not."""
    with zoo(tmp_path / "home", tiny_release, CacheLimits(near=0.01)) as device:
        device.search("an okapi and a tapir", mode=mode)
        near = device.search("Is the tapir an okapi?", mode=mode)
        assert answered_from(near) == {"an okapi and a tapir"}
        fresh = device.search("Is the tapir an okapi?", mode=mode, cached=False)
        assert {h.passage_id: h.bm25_rank for h in near} == {h.passage_id: h.bm25_rank for h in fresh}
        if mode == "bm25":
            assert near == fresh


def test_the_cache_stays_within_its_limits() -> None:
    """Guards against a device that grows with every query, and a count of bytes that drifts."""
    few = AnswerCache(CacheLimits(entries=3))
    for n in range(10):
        few.keep(ASKED, f"word{n}", at(1.0), HITS)
        few.same(ASKED, "word0")  # used, so it stays
    assert [n for n in range(10) if few.same(ASKED, f"word{n}")] == [0, 8, 9] and few.counts.entries == 3
    small = AnswerCache(CacheLimits(bytes=20_000))
    long = [replace(HITS[0], text="x" * 5_000)]
    for n in range(50):
        small.keep(ASKED, f"word{n}", at(1.0), long)
        assert small.counts.bytes <= 20_000
    assert small.counts.entries == 3
    small.keep(ASKED, "huge", at(1.0), [replace(HITS[0], text="x" * 20_000)])
    assert small.same(ASKED, "huge") is None and small.counts.entries == 3
    small.keep(ASKED, "word49", at(1.0), HITS)  # an answer takes the place of the one before it
    assert small.counts.entries == 3
    small.clear()
    assert (small.counts.entries, small.counts.bytes, small._alike) == (0, 0, {})
    off = AnswerCache(CacheLimits(entries=0))
    off.keep(ASKED, "word", at(1.0), HITS)
    assert off.same(ASKED, "word") is None
    for wrong in ({"near": 0.0}, {"near": 1.5}, {"near": float("nan")}, {"entries": -1}, {"bytes": -1}):
        with pytest.raises(SettingsError):
            CacheLimits(**wrong)


def test_what_a_caller_does_to_an_answer_stays_with_the_caller() -> None:
    """Guards against a served answer whose change shows in the next one."""
    cache, own = AnswerCache(CacheLimits()), {"year": 2020}
    cache.keep(ASKED, "tapir", at(1.0), [replace(HITS[0], metadata=own)])
    own["year"] = 1
    for _ in range(2):
        served = cache.same(ASKED, "tapir")
        assert served is not None and served[0].metadata == {"year": 2020}
        served[0].metadata.clear()  # type: ignore[attr-defined]
        served.clear()


def test_many_threads_share_a_cache_while_documents_change(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a race that serves what is removed, loses count, or raises. The twin is the search without a cache."""
    with zoo(tmp_path / "home", tiny_release, CacheLimits(entries=4)) as device:
        device.search("okapi")
        failures: list[BaseException] = []
        removed = threading.Event()

        def work(seed: int) -> None:
            generator = np.random.default_rng(seed)
            try:
                for _ in range(60):
                    gone = removed.is_set()
                    name = ANIMALS[generator.integers(len(ANIMALS))]
                    found = [hit.passage_id for hit in device.search(name, 3, mode="bm25")]
                    assert found == [name] or (name == "okapi" and found == []), (name, found)
                    assert not (gone and "okapi" in found)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        device.remove(["okapi"])
        removed.set()
        for thread in threads:
            thread.join()
        assert not failures
        held = device.cache._entries.values()
        assert device.cache.counts.entries <= 4 and device.cache.counts.bytes == sum(entry.bytes for entry in held)


def test_a_cached_answer_never_reaches_training(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against records that depend on another query: what was opened in a cached answer is the owner's query's own.

    A near hit shows the answer to an earlier query. The record must have the tokens that the owner typed and the candidates of
    its own vector, as on a device that has no cache; and mining must not ask the cache.
    """
    typed, earlier = "Is the tapir an okapi?", "an okapi and a tapir"
    with (
        zoo(tmp_path / "with", tiny_release, CacheLimits(near=0.01)) as device,
        zoo(tmp_path / "without", tiny_release, CacheLimits(entries=0)) as plain,
    ):
        for own in (device, plain):
            own.search(earlier)
            shown = own.search(typed)
            assert answered_from(shown) == ({earlier} if own is device else {None}), "the guard: one was cached"
            own.record([(typed, "tapir")])
        assert device.feedback() == plain.feedback() == [(typed, "tapir")]
        for name in ("same", "near", "keep"):
            monkeypatch.setattr(AnswerCache, name, lambda *_: pytest.fail("mining asked the cache"))
        encoder = Encoder(tiny_release)
        [mined], [expected] = (mine_records(own, encoder, candidates=4) for own in (device, plain))
        assert mined.tokens == expected.tokens == encoder.tokenize_queries([typed])[0]
        np.testing.assert_array_equal(mined.candidates, expected.candidates)
        vector = encoder.encode_queries([typed])
        ids, _ = device.candidates(vector, 10)
        assert [ids[0]] == device.search_many(vector, 10)


def test_nothing_of_the_cache_is_written(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against queries on a disk: only what was opened is kept there, and only what the owner can list and erase."""
    with filled(tmp_path / "home", tiny_release, 50) as device:
        device.search("a planted phrase xyzzyplugh", cached=False)
        before = {path: path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()}
        for _ in range(2):
            device.search("a planted phrase xyzzyplugh")
        assert device.cache.counts.same == 1
    files = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert {path.name for path in files} <= {path.name for path in before}
    assert not [path for path in files if b"xyzzyplugh" in path.read_bytes()]
