"""A device survives being killed, damaged, restored and shared, and never serves what is stale."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.client.devices import ROOT, filled, passages, units

from stillroom_client.device import Device
from stillroom_client.index_base import Base
from stillroom_shared.release import Release


def damage_nothing(home: Path) -> None: ...


def damage_by_deleting(home: Path) -> None:
    (home / "index.faiss").unlink()


def damage_by_truncating(home: Path) -> None:
    os.truncate(home / "index.faiss", (home / "index.faiss").stat().st_size // 2)


def damage_by_emptying(home: Path) -> None:
    os.truncate(home / "index.faiss", 0)


def damage_by_garbage(home: Path) -> None:
    (home / "index.faiss").write_bytes(b"\xff" * 5000)


@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (damage_nothing, "current"),
        (damage_by_deleting, "missing"),
        (damage_by_truncating, "torn"),
        (damage_by_emptying, "torn"),
        (damage_by_garbage, "torn"),
    ],
)
def test_a_damaged_index_is_built_again(tmp_path: Path, tiny_release: Release, damage: Any, state: str) -> None:
    """Guards against a device that is lost with its index, or that answers from what is left of it."""
    home, queries = tmp_path / "home", units(20, tiny_release.dimension, seed=1)
    with filled(home, tiny_release) as device:
        before = device.search_many(queries)
    damage(home)
    with Device.open(home) as device:
        assert device.status().index == state
        assert device.search_many(queries) == before
        assert device.status().index == "current"


def test_a_stale_index_is_built_again_and_a_current_one_is_not(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against serving removed passages, and against building an index at every start."""
    home = tmp_path / "home"
    with filled(home, tiny_release) as device:
        device.refresh_index()
        device.remove(["p0"])
        assert device.status().index == "stale"
    with Device.open(home) as device:
        assert device.search_many(units(1, tiny_release.dimension), 1) != [["p0"]]
    monkeypatch.setattr(Base, "build", None)
    with Device.open(home) as device:
        assert device.search_many(units(1, tiny_release.dimension), 1) != [["p0"]]


def test_a_restored_store_does_not_meet_a_newer_index(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against an index whose generation number fits by chance, after a backup was restored and added to."""
    home, dimension = tmp_path / "home", tiny_release.dimension
    filled(home, tiny_release).close()
    shutil.copy(home / "store.sqlite3", tmp_path / "backup")
    with Device.open(home) as device:
        device.add(passages(["lost"]), units(1, dimension, seed=7))
        device.refresh_index()
        number = device.status().generation
    shutil.copy(tmp_path / "backup", home / "store.sqlite3")
    with Device.open(home) as device:
        device.add(passages(["kept"]), units(1, dimension, seed=8))
        assert device.status().generation == number and device.status().index == "stale"
        assert device.search_many(units(1, dimension, seed=8), 1) == [["kept"]]


_CRASHER = """
import os, signal, sys
from pathlib import Path
from stillroom_client.device import Device
from stillroom_client.index_base import Base
from tests.client.devices import passages, units
Base.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
device = Device.open(Path(sys.argv[1]))
device.add(passages(["late"]), units(1, device.store.dimension, seed=9))
device.refresh_index()
"""


def test_sigkill_between_commit_and_index_loses_nothing(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a committed document that is not found, and against an old index served for the new store."""
    home, dimension = tmp_path / "home", tiny_release.dimension
    with filled(home, tiny_release) as device:
        device.refresh_index()
    done = subprocess.run([sys.executable, "-c", _CRASHER, str(home)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Device.open(home) as device:
        assert device.status().index == "stale" and device.has("late")
        assert device.search_many(units(1, dimension, seed=9), 1) == [["late"]]
        assert device.search_many(units(1, dimension), 1) == [["p0"]]
        assert device.status().index == "current"


def test_a_full_disk_does_not_stop_the_search(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a device that cannot search because what it could rebuild any time cannot be saved."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Base, "save", full)
    with filled(tmp_path / "home", tiny_release) as device:
        assert device.search_many(units(1, tiny_release.dimension), 1) == [["p0"]]
        assert device.status().index == "missing"


def test_what_another_process_changed_is_seen(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a long-running searcher that serves the state of its start."""
    home, dimension = tmp_path / "home", tiny_release.dimension
    with filled(home, tiny_release) as first, Device.open(home) as second:
        assert second.search_many(units(1, dimension), 1) == [["p0"]]
        first.remove(["p0"])
        first.add(passages(["new"]), units(1, dimension, seed=5))
        assert second.search_many(units(1, dimension, seed=5), 1) == [["new"]]
        assert ["p0"] not in second.search_many(units(1, dimension), 1)


def _search_until_complete(home: Path, dimension: int, total: int) -> None:
    device = Device.open(home)
    while device.store.count() < total:
        for ids, names in zip(*(device.candidates(units(4, dimension), 10)[0],) * 2, strict=True):
            assert len(set(ids)) == len(names) == 10
        assert device.search_many(units(1, dimension), 1) == [["p0"]]


def test_processes_search_while_one_adds(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against "database is locked", an index that names rows which are not there, and a lost index file."""
    home, dimension = tmp_path / "home", tiny_release.dimension
    context = multiprocessing.get_context("spawn")
    with filled(home, tiny_release) as device:
        searchers = [context.Process(target=_search_until_complete, args=(home, dimension, 350)) for _ in range(2)]
        for process in searchers:
            process.start()
        while not (home / "index.faiss").exists() and all(process.is_alive() for process in searchers):
            pass
        for n in range(300, 350):
            device.add(passages([f"p{n}"]), units(1, dimension, seed=n))
        for process in searchers:
            process.join(60)
        assert [process.exitcode for process in searchers] == [0, 0]
        device.refresh_index()
        assert device.status().index == "current"


def test_threads_share_one_device(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a connection or an index that one thread pulls away from under another."""
    failures: list[BaseException] = []
    with filled(tmp_path / "home", tiny_release) as device:

        def work(worker: int) -> None:
            try:
                for n in range(5):
                    device.add(passages([f"{worker}-{n}"]), units(1, tiny_release.dimension, seed=worker * 10 + n))
                    assert len(device.search("a tapir", k=3)) == 3
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and device.store.count() == 320
