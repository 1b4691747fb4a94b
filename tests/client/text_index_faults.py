"""Kills real processes while they write the full-text index, in a process of its own:
`python -m tests.client.text_index_faults FOLDER EVERY_NTH_LINE RANDOM_TIMES`.

Each point is a forked child that adds, replaces and removes passages and brings the index forward; it dies at the n-th line
of Stillroom's own code that it reaches from there, for every n up to its end, or by SIGKILL after a random time. Its parent,
which shares nothing with it but the disk, then checks with fresh eyes. Prints one JSON object; `test_text_index.py` says
what must hold for it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.client.devices import passages, units
from tests.killing import KILLED, kill_at_line

import stillroom_client.derived as derived
import stillroom_client.store as store_module
import stillroom_client.text_index as text_index
import stillroom_shared.files as files
from stillroom_client.derived import Indexes
from stillroom_client.home import TEXT_INDEX_NAME
from stillroom_client.store import Store
from stillroom_client.text_index import TextIndex

TRACED = {str(module.__file__) for module in (derived, store_module, text_index, files)}
DIMENSION = 8


def prepare(home: Path) -> None:
    """A store of a hundred passages with its index, and one more generation that the index lacks."""
    home.mkdir()
    Store.create(home / "store.sqlite3", dimension=DIMENSION)
    store = Store(home / "store.sqlite3")
    store.put(passages([f"p{n}" for n in range(100)], "The {0} is word{0}."), units(100, DIMENSION))
    with Indexes(home, store).current(dense=False, text=True):
        pass
    store.close()


def change(home: Path, number: int) -> None:
    """One passage comes, one changes, one goes; the index follows."""
    store = Store(home / "store.sqlite3")
    store.put(passages([f"n{number}", f"p{number + 50}"], "The {0} is new{0}."), units(2, DIMENSION, seed=number))
    store.remove([f"p{number}"])
    with Indexes(home, store).current(dense=False, text=True):
        pass
    store.close()


def check(home: Path, point: str, found: dict[str, Any]) -> None:
    """After a death: a search finds every committed passage by its words, and nothing that is gone."""
    store = Store(home / "store.sqlite3")
    with store.reading() as generation:
        state = TextIndex.load(home / TEXT_INDEX_NAME, generation)
        found["states"][state if isinstance(state, str) else "current"] += 1
    started = time.perf_counter()
    indexes = Indexes(home, store)
    with indexes.current(dense=False, text=True) as current:
        assert current.words is not None
        rows = current.words.search("animal is the new0 word", 1000)[1].tolist()
        everything = store.passages(range(2000))
        for row, passage in everything.items():
            word = passage.text.split()[-1]
            if row not in current.words.search(word, 1000)[1]:
                found["failures"].append(f"{point}: {passage.id} is not found by {word}")
        if set(rows) - set(everything):
            found["failures"].append(f"{point}: rows {set(rows) - set(everything)} are gone and were found")
    found["slowest"] = max(found["slowest"], time.perf_counter() - started)
    store.put(passages([f"after {point}"]), units(1, DIMENSION))
    with indexes.current(dense=False, text=True) as current:
        generation = current.generation
    if (left := os.listdir(home / TEXT_INDEX_NAME)) != [generation.stamp]:
        found["failures"].append(f"{point}: {left} are left in the index")
    store.close()


def main(folder: Path, step: int, times: int) -> None:
    """Sweep every `step`-th line, then kill `times` times after a random time."""
    found: dict[str, Any] = {
        "points": 0, "failures": [], "slowest": 0.0, "states": {"current": 0, "stale": 0, "missing": 0, "torn": 0},
    }  # fmt: skip
    base = folder / "base"
    prepare(base)
    number, status = 1, KILLED
    while status == KILLED:
        home = folder / f"line-{number}"
        shutil.copytree(base, home)
        if not (child := os.fork()):
            kill_at_line(number, TRACED)
            change(home, 0)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        check(home, f"line {number}", found)
        shutil.rmtree(home)
        found["points"] += 1
        number += step
    if status:
        found["failures"].append(f"a child ended with {status}")
    home, chance = folder / "random", random.Random(1)
    shutil.copytree(base, home)
    for turn in range(times):
        if not (child := os.fork()):
            for n in range(40):
                change(home, n)
            os._exit(0)
        time.sleep(chance.uniform(0.02, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check(home, f"random {turn}", found)
        found["points"] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
