"""The store of values by content: what was put is found, whatever is killed, torn, merged or written beside it."""

from __future__ import annotations

import errno
import subprocess
import sys
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from tests.killing import KILLED

from stillroom_server.distillery import store as store_module
from stillroom_server.distillery.store import FANOUT, ContentStore, Keys, as_keys, text_digest
from stillroom_shared.errors import DataError


def keys_of(numbers: range) -> Keys:
    return as_keys([text_digest(str(number)) for number in numbers])


def random_keys(count: int, seed: int = 0) -> Keys:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), np.uint64)


def test_what_was_put_is_found_and_nothing_else(tmp_path: Path) -> None:
    """A search that is off by one gives a neighbour's value; a merge may drop, double or swap rows."""
    store = ContentStore(tmp_path, width=3, dtype="float16")
    generator = np.random.default_rng(0)
    truth = generator.standard_normal((3_000, 3)).astype(np.float16)
    keys = keys_of(range(3_000))
    order, done = generator.permutation(3_000), 0
    for size in generator.integers(1, 80, 60):
        part = order[done : done + size]
        store.put(keys[part], truth[part])
        done += len(part)
    for opened in (store, ContentStore(tmp_path, width=3, dtype="float16")):
        found, values = opened.get(keys)
        np.testing.assert_array_equal(np.flatnonzero(found), np.sort(order[:done]))
        np.testing.assert_array_equal(values[found], truth[found])
        assert not values[~found].any() and len(opened) == done
    assert len(list(tmp_path.iterdir())) < 3 * FANOUT < 100


def test_the_first_value_of_a_key_stays(tmp_path: Path) -> None:
    """Scores that change when somebody else fills the folder make two runs of one recipe differ."""
    store = ContentStore(tmp_path, width=1)
    keys = keys_of(range(5))
    store.put(keys[[0, 1, 0]], np.array([[1.0], [2.0], [3.0]]))
    ContentStore(tmp_path, width=1).put(keys, np.full((5, 1), 9.0))
    assert store.get(keys)[1][:, 0].tolist() == [1, 2, 9, 9, 9] and len(store) == 5
    assert len(store.get(keys[:0])[0]) == 0


def test_both_halves_of_a_key_count(tmp_path: Path) -> None:
    """Half a hash is fast to search for, and collides in a large store."""
    store = ContentStore(tmp_path, width=1)
    same = np.array([[7, low] for low in (5, 1, 9, 3)] + [[8, 1]], np.uint64)
    store.put(same, np.arange(5.0)[:, None])
    found, values = store.get(np.vstack([same, np.array([[7, 4], [7, 99], [6, 5]], np.uint64)]))
    assert found.tolist() == [True] * 5 + [False] * 3
    assert values[:5, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_merge_goes_range_by_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key at the edge of a range is lost, or is there twice."""
    monkeypatch.setattr(store_module, "_MERGED_AT_ONCE", 20 * 16)
    store = ContentStore(tmp_path, width=1)
    edges = np.array([[number << 60, low] for number in range(16) for low in (0, 1)], np.uint64)
    keys = np.vstack([edges, random_keys(FANOUT * 32 - len(edges))])[np.random.default_rng(1).permutation(FANOUT * 32)]
    for start in range(0, len(keys), 32):
        store.put(keys[start : start + 32], np.arange(start, start + 32.0)[:, None])
    [run] = tmp_path.glob("*.arrow")
    assert pa.ipc.open_file(str(run)).num_record_batches == 1
    found, values = store.get(keys)
    assert found.all() and values[:, 0].tolist() == list(range(len(keys)))


@pytest.mark.parametrize("damage", ["cut", "emptied", "zeroed", "flipped", "not arrow"])
def test_a_damaged_run_is_noticed_and_only_its_values_are_gone(tmp_path: Path, damage: str) -> None:
    """A file whose end never reached the disk reads as zeros, which are scores like any other."""
    store = ContentStore(tmp_path, width=4)
    store.put(keys_of(range(500)), np.ones((500, 4)))
    [first] = tmp_path.glob("*.arrow")
    store.put(keys_of(range(500, 900)), np.full((400, 4), 2.0))
    whole = first.read_bytes()
    first.unlink()
    half = len(whole) // 2
    first.write_bytes(
        {
            "cut": whole[:half],
            "emptied": b"",
            "zeroed": whole[:half] + bytes(1_000) + whole[half + 1_000 :],
            "flipped": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :],
            "not arrow": b"x" * 900,
        }[damage]
    )
    again = ContentStore(tmp_path, width=4)
    found, values = again.get(keys_of(range(900)))
    assert found.tolist() == [False] * 500 + [True] * 400 and (values[500:] == 2).all()
    assert again.damaged == 1 and not first.exists()
    again.put(keys_of(range(500)), np.ones((500, 4)))
    assert again.get(keys_of(range(900)))[0].all()


def test_a_run_that_the_system_will_not_open_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of a teacher's work would be removed because a process had too many files open, or too little memory."""
    keys = keys_of(range(9))
    ContentStore(tmp_path, width=1).put(keys, np.ones((9, 1)))
    [run] = tmp_path.glob("*.arrow")
    for error in (OSError(errno.EMFILE, "too many open files"), pa.ArrowMemoryError("map")):
        with monkeypatch.context() as patched:
            patched.setattr(pa, "memory_map", Mock(side_effect=error))
            with pytest.raises(DataError, match=str(run)):
                ContentStore(tmp_path, width=1).get(keys)
    store = ContentStore(tmp_path, width=1)
    assert store.all(keys).tolist() == [[1.0]] * 9 and not store.damaged
    run.unlink()
    with pytest.raises(DataError, match=r"9 of 9 values are no longer in .* computes them anew"):
        store.all(keys)


def test_another_label_or_shape_is_refused(tmp_path: Path) -> None:
    """One teacher's scores read as another's, or two rows as one."""
    ContentStore(tmp_path, width=2, label="tapir").put(keys_of(range(3)), np.ones((3, 2)))
    for other in (dict(width=2, label="zebra"), dict(width=1, label="tapir"), dict(width=2, dtype="float16")):
        with pytest.raises(DataError, match="name another folder"):
            ContentStore(tmp_path, **other).get(keys_of(range(3)))  # type: ignore[arg-type]
    assert ContentStore(tmp_path, width=2, label="tapir").get(keys_of(range(3)))[0].all()


def test_memory_does_not_grow_with_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is read whole at the start works until the corpus is large; the guard shows that this would be seen."""
    monkeypatch.setattr(store_module, "_MERGED_AT_ONCE", 1 << 18)

    def peak(folder: Path, count: int) -> int:
        store, block = ContentStore(folder, width=8), 2_000
        tracemalloc.start()
        for start in range(0, count, block):
            keys = random_keys(block, seed=start)
            store.put(keys, np.ones((block, 8), np.float32))
            assert store.get(keys)[0].all()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(store) == count
        return most

    small, large = peak(tmp_path / "small", 16_000), peak(tmp_path / "large", 128_000)
    assert large < 1.5 * small < 128_000 * 48 / 3


FILL = """
import os, sys
from pathlib import Path
import numpy as np
from stillroom_server.distillery import store
from tests.killing import kill_at_line
from tests.server.distillery.test_store import keys_of

def fill(folder, first, last):
    opened = store.ContentStore(folder, width=1)
    for start in range(first, last, 20):
        opened.put(keys_of(range(start, start + 20)), np.arange(start, start + 20.0)[:, None])
        (folder / "done").write_text(str(start + 20))

"""
TWICE = """
fill(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""
KILLED_OFTEN = """
store.FANOUT = 3
fill(Path(sys.argv[1], "warm"), 0, 60)
for line in range(60, 1_700, 61):
    if os.fork() == 0:
        kill_at_line(line, [store.__file__])
        fill(Path(sys.argv[1], str(line)), 0, 400)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), line)
"""


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FILL + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_fill_one_folder(tmp_path: Path) -> None:
    """One merges the runs that the other is reading, or clears away what it is writing."""
    for process in [run(TWICE, tmp_path, *span) for span in ((0, 1_000), (500, 1_500))]:
        process.communicate()
        assert process.returncode == 0
    store = ContentStore(tmp_path, width=1)
    found, values = store.get(keys_of(range(1_500)))
    assert found.all() and values[:, 0].tolist() == list(range(1_500)) and len(store) == 1_500
    assert store.damaged == 0 and not list(tmp_path.glob("*.partial"))


def test_killed_anywhere_it_loses_only_what_was_not_put(tmp_path: Path) -> None:
    """A merge that removes before it has written, or a leftover that is taken for a run."""
    output, _ = run(KILLED_OFTEN, tmp_path).communicate()
    deaths = [line.split() for line in output.splitlines()]
    assert len(deaths) == 27 and {int(status) for status, _ in deaths} == {KILLED}
    left = merged = 0
    for _, line in deaths:
        folder = tmp_path / line
        done = int((folder / "done").read_text()) if (folder / "done").exists() else 0
        left += len(list(folder.glob("*.partial")))
        merged += done > 3 * 20
        store = ContentStore(folder, width=1)
        found, values = store.get(keys_of(range(400)))
        assert found[:done].all() and not found[done + 20 :].any() and store.damaged == 0
        assert values[found, 0].tolist() == np.flatnonzero(found).tolist()
        store.put(keys_of(range(400)), np.arange(400.0)[:, None])
        assert store.get(keys_of(range(400)))[1][:, 0].tolist() == list(range(400))
        assert not list(folder.glob("*.partial"))
    assert left and merged  # it was killed while writing, and after a merge
