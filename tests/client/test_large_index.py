"""A large index: searches never build it, what came and went since is right at once, and building keeps nobody waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.client.devices import filled, passages, units

from stillroom_client import derived, index_plan
from stillroom_client.device import Device
from stillroom_client.history import History
from stillroom_client.index_base import Base
from stillroom_client.index_plan import KINDS, IndexSettings, Kind
from stillroom_shared.release import Release

COUNT = 400


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large index begins at 100 passages."""
    monkeypatch.setattr(derived, "FLAT_LIMIT", 100)
    monkeypatch.setattr(index_plan, "FLAT_LIMIT", 100)
    monkeypatch.setattr(index_plan, "LEARNT_LIMIT", 50)
    monkeypatch.setattr(derived, "_TAIL", 20)
    monkeypatch.setattr(derived, "_AHEAD", 60)


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release) -> Iterator[Device]:
    with filled(tmp_path / "home", tiny_release, COUNT) as device:
        device.refresh_index()
        assert device.index_in_use()["kind"] == "hnsw"
        yield device


def nearest(device: Device, query: NDArray[np.float32], k: int = 10) -> set[str]:
    rows, vectors = device.store.vectors()
    best = rows[np.argsort(-(vectors @ query))[:k]]
    return set(device.store.names(best).values())


def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Base:
        raise AssertionError("a search built a large index")

    monkeypatch.setattr(derived, "build", never)
    monkeypatch.setattr(Base, "extended", never)


def test_what_came_and_went_is_right_at_once_without_building(
    device: Device, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a search that waits for a graph, also in another process and without any file."""
    dimension, queries = tiny_release.dimension, units(20, tiny_release.dimension, seed=1)
    no_building(monkeypatch)
    for step in range(4):
        device.add(passages([f"n{step}-{n}" for n in range(30)]), units(30, dimension, seed=step + 10))
        device.remove([f"p{n}" for n in range(step * 20, step * 20 + 20)])
        for query, found in zip(queries, device.search_many(queries), strict=True):
            assert len(set(found) & nearest(device, query)) >= 9
    with Device.open(device.home) as other:
        assert other.search_many(queries) == device.search_many(queries)
    (device.home / "index.faiss").unlink()
    with Device.open(device.home) as other:
        assert other.status().index == "missing"
        assert [set(found) for found in other.search_many(queries)] == [nearest(device, query) for query in queries]


def test_a_refresh_takes_in_what_came_and_leaves_out_what_went(
    device: Device, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a tail that only grows, and against removed rows that are carried on for ever."""
    dimension = tiny_release.dimension
    device.add(passages([f"n{n}" for n in range(20)]), units(20, dimension, seed=2))
    device.refresh_index()
    assert device.index_in_use()["beside"] == 20  # too few to be worth it
    device.add(passages([f"m{n}" for n in range(60)]), units(60, dimension, seed=3))
    assert device.status().index == "stale"
    monkeypatch.setattr(derived, "build", None)  # brought forward, not built
    device.refresh_index()
    monkeypatch.undo()
    assert (device.index_in_use()["beside"], device.status().index) == (0, "current")
    device.remove([f"p{n}" for n in range(100)])
    device.refresh_index()
    base = Base.load(device.home / "index.faiss")
    assert isinstance(base, Base) and len(base.rows) == device.store.count() == COUNT + 80 - 100


def test_what_went_before_a_refresh_is_not_found_after_it(
    device: Device, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against removed passages that come back at the very generation of a file that was brought forward."""
    everything, dimension = units(COUNT, tiny_release.dimension), tiny_release.dimension
    device.add(passages([f"n{n}" for n in range(90)]), units(90, dimension, seed=2))
    device.remove([f"p{n}" for n in range(20)])
    monkeypatch.setattr(derived, "build", None)  # brought forward, not built
    device.refresh_index()
    monkeypatch.undo()
    for opened in (device, Device.open(device.home)):  # with what it holds, and from the file
        for query in everything[:20]:
            assert not {f"p{n}" for n in range(20)} & set(opened.search_many(query[None])[0])
        assert opened.index_in_use()["passages"] == COUNT + 90 - 20
    opened.close()


def test_what_another_process_forgot_is_not_found_again(device: Device, tiny_release: Release) -> None:
    """Guards against an index in memory whose base is older than what is remembered of removals."""
    device.remove([f"p{n}" for n in range(20)])
    queries = units(COUNT, tiny_release.dimension)[:20]
    assert device.index_in_use()["passages"] == COUNT - 20
    with Device.open(device.home) as other:
        other.compact()
    (device.home / "index.faiss").unlink()  # what `index doctor` advises where an index is damaged
    device.add(passages(["late"]), units(1, tiny_release.dimension, seed=2))
    assert not {f"p{n}" for n in range(20)} & {name for found in device.search_many(queries) for name in found}


def test_long_additions_are_taken_in_on_the_way(device: Device, tiny_release: Release) -> None:
    """Guards against a crash after hours that leaves everything to the next search."""
    for step in range(6):
        device.add(passages([f"n{step}-{n}" for n in range(40)]), units(40, tiny_release.dimension, seed=step + 10))
        device.checkpoint()
        base = Base.load(device.home / "index.faiss")
        assert isinstance(base, Base) and device.store.count() - len(base.rows) <= 0.25 * device.store.count() + 40


def test_searches_and_additions_go_on_while_an_index_is_built(
    device: Device, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a lock that is held for the minutes that a graph of a million passages takes."""
    building, go_on, build = threading.Event(), threading.Event(), derived.build

    def slow(*given: object) -> Base:
        building.set()
        assert go_on.wait(30)
        return build(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(derived, "build", slow)
    worker = threading.Thread(target=device.compact)
    worker.start()
    assert building.wait(30)
    device.add(passages(["meanwhile"]), units(1, tiny_release.dimension, seed=99))
    with Device.open(device.home) as other:
        for some in (device, other):
            assert some.search_many(units(1, tiny_release.dimension, seed=99), 1) == [["meanwhile"]]
    go_on.set()
    worker.join(30)
    assert device.search_many(units(1, tiny_release.dimension, seed=99), 1) == [["meanwhile"]]


def test_compaction_forgets_what_was_removed(device: Device, tiny_release: Release) -> None:
    """Guards against histories and files that grow for as long as a device lives."""
    for step in range(5):
        device.add(passages([f"n{step}-{n}" for n in range(300)]), units(300, tiny_release.dimension, seed=step))
        device.remove([f"n{step}-{n}" for n in range(300)])
        device.refresh_index()
    size = sum(path.stat().st_size for path in device.home.glob("store.sqlite3*"))
    before = device.search_many(units(20, tiny_release.dimension, seed=1))
    with Device.open(device.home) as other:
        assert other.search_many(units(20, tiny_release.dimension, seed=1)) == before
        device.compact()
        with device.store.reading() as generation:
            assert History(device.store).knows(generation)
        assert device.store.query("SELECT count(*) FROM removed") == [(0,)]
        assert device.store.query("SELECT count(*) FROM history")[0][0] <= 3
        assert sum(path.stat().st_size for path in device.home.glob("store.sqlite3*")) < size / 2
        status = device.status()
        assert (status.index, status.text_index, status.passages) == ("current", "current", COUNT)
        for some in (device, other):
            after = some.search_many(units(20, tiny_release.dimension, seed=1))
            assert np.mean([len(set(a) & set(b)) for a, b in zip(before, after, strict=True)]) > 9.5


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_is_in_use_at_once_and_after_a_restart(device: Device, tiny_release: Release, kind: Kind) -> None:
    """Guards against settings that wait for the next change of documents, or that are forgotten."""
    device.index_settings = IndexSettings(kind=kind, nprobe=40)
    queries = units(20, tiny_release.dimension, seed=1)
    with Device.open(device.home) as other:
        for some in (device, other):
            assert some.index_in_use()["kind"] == kind
            found = some.search_many(queries)
            agreed = [len(set(own) & nearest(device, query)) for query, own in zip(queries, found, strict=True)]
            assert np.mean(agreed) >= 9
