"""Kills real processes while they add, change, remove and compact, in a process of its own:
`python -m tests.client.home_faults FOLDER EVERY_NTH_LINE RANDOM_TIMES [DOCUMENTS]`.

Each point is a forked child that works on a copy of a home; it dies at the n-th line of Stillroom's own code that it reaches
from there, for every n up to its end, or by SIGKILL after a random time. Until then it notes each document whose call returned.
Its parent, which shares nothing with it but the disk, then checks with fresh eyes that

- every document is as the last call that returned left it, but for at most one, whose call did not return;
- every document is whole: all passages of one version, each found by its own word and by its own vector;
- nothing that is gone is found;
- the first search is answered in time (`slowest`, in seconds: opening the store and one dense and one full-text search).

Prints one JSON object; `test_home_faults.py` says what must hold for it. Limits are small here, so that a few hundred passages
are a large index; with DOCUMENTS they are as shipped, and the index has that many documents of four passages.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.killing import KILLED, kill_at_line

import stillroom_client.catalog as catalog_module
import stillroom_client.derived as derived
import stillroom_client.history as history
import stillroom_client.index_base as index_base
import stillroom_client.index_plan as index_plan
import stillroom_client.store as store_module
import stillroom_client.text_index as text_index
import stillroom_shared.files as files
from stillroom_client.catalog import Catalog, Embedded
from stillroom_client.derived import Current, Indexes
from stillroom_client.documents import Document, Located, Position
from stillroom_client.store import Store
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError

MODULES = (catalog_module, derived, history, index_base, store_module, text_index, files)
TRACED = {str(module.__file__) for module in MODULES}
DIMENSION, PARTS = 32, 4


def small_limits() -> None:
    """A large index begins at 100 passages, and is brought forward after 40."""
    for module, name, value in (
        (derived, "FLAT_LIMIT", 100), (index_plan, "FLAT_LIMIT", 100), (index_plan, "LEARNT_LIMIT", 50),
        (derived, "_TAIL", 20), (derived, "_AHEAD", 40),
    ):  # fmt: skip
        assert hasattr(module, name)
        setattr(module, name, value)


def word(path: str, version: int, part: int) -> str:
    return f"w{zlib.crc32(path.encode())}v{version}p{part}"


def vector(text: str) -> NDArray[np.float32]:
    found = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIMENSION)
    return np.asarray(found / np.linalg.norm(found), np.float32)


def put(catalog: Catalog, path: str, version: int) -> None:
    words = [word(path, version, part) for part in range(PARTS)]
    passages = [Passage(f"{path}#{part}", "zoo", f"The animal {w}.", "") for part, w in enumerate(words)]
    if fresh := catalog.lacking(passages):
        catalog.stage(fresh, Embedded(np.stack([vector(passage.text) for passage in fresh]), ""))
    document = Document(path=path, type="text", title=path, digest=f"{version}".encode(), metadata={"version": version})
    catalog.put(document, [Located(p, Position(place=n), {}) for n, p in enumerate(passages)])


def prepare(home: Path, documents: int) -> None:
    home.mkdir()
    Store.create(home / "store.sqlite3", dimension=DIMENSION)
    with Store(home / "store.sqlite3") as store:
        catalog = Catalog(store)
        for number in range(documents):
            put(catalog, f"/d{number}", 0)
        Indexes(home, store).refresh()
    (home / "journal").touch()


def work(home: Path, seed: int, turns: int) -> None:
    """Add, change and remove documents; look for checkpoints; compact now and then. Every call that returned is noted."""
    chance = random.Random(seed)
    with Store(home / "store.sqlite3") as store, open(home / "journal", "a", buffering=1) as journal:
        catalog, indexes = Catalog(store), Indexes(home, store)
        for turn in range(turns):
            path = f"/n{seed}-{turn}" if chance.random() < 0.5 else f"/d{chance.randrange(20)}"
            if turn % 3 == 2:
                catalog.remove([path])
                journal.write(f"{path} -1\n")
            else:
                put(catalog, path, version := seed * 1000 + turn + 1)
                journal.write(f"{path} {version}\n")
            indexes.checkpoint()
            if turn % 7 == 6:
                indexes.refresh()
            if turn % 12 == 11:
                indexes.compact()


def check(home: Path, point: str, found: dict[str, Any]) -> None:
    """What the module docstring promises, of a home whose worker died."""
    started = time.perf_counter()
    with Store(home / "store.sqlite3") as store:
        indexes, catalog = Indexes(home, store), Catalog(store)
        with indexes.current(dense=True, text=True) as current:
            assert current.vectors and current.words
            current.vectors.search(vector("first")[None], 10)
            current.words.search("animal", 10)
            found["slowest"] = max(found["slowest"], time.perf_counter() - started)
            found["kinds"] = sorted({*found["kinds"], current.vectors.index.base.kind})
            failures = list(wrong_documents(home, catalog)) + list(not_found(current, store))
        found["failures"] += [f"{point}: {failure}" for failure in failures[:5]]
        put(catalog, f"/after-{point}", 1)  # a device that survived goes on
        indexes.refresh()
        with store.reading() as generation:
            if (states := indexes.states(generation)) != ("current", "current"):
                found["failures"].append(f"{point}: after a refresh the indexes are {states}")
        catalog.remove([f"/after-{point}"])


def wrong_documents(home: Path, catalog: Catalog) -> Iterator[str]:
    """Documents that are not as their last returned call left them, but for one whose call did not return; or not whole."""
    noted: dict[str, int] = {}
    for line in (home / "journal").read_text().splitlines():
        noted |= {line.split()[0]: int(line.split()[1])}
    stored = catalog.documents()
    now = {path: int(stored[path].metadata["version"]) if path in stored else -1 for path in {*noted, *stored}}
    changed = [path for path in now if now[path] != noted.get(path, 0 if path.startswith("/d") else -1)]
    if len(changed) > 1:
        yield f"{changed} are at {[now[path] for path in changed]}, noted were {[noted.get(path) for path in changed]}"
    with open(home / "journal", "a") as journal:
        journal.writelines(f"{path} {now[path]}\n" for path in changed)
    for path, document in stored.items():
        texts = [found.passage.text for found in catalog.passages_of(path)]
        version = int(document.metadata["version"])
        if texts != [f"The animal {word(path, version, part)}." for part in range(PARTS)]:
            yield f"{path} is not whole at version {version}: {texts}"


def not_found(current: Current, store: Store) -> Iterator[str]:
    """Passages that their own word or vector does not find, and found ones that are gone."""
    everything = store.passages(store.rows(store.ids()).tolist())
    assert current.vectors and current.words
    chosen = list(everything) if len(everything) < 2000 else random.Random(0).sample(list(everything), 200)
    for row in chosen:
        text = everything[row].text
        if row not in current.words.search(text.split()[-1].strip("."), 10)[1]:
            yield f"{everything[row].id} is not found by its word"
        if row not in current.vectors.search(vector(text)[None], 10)[1]:
            yield f"{everything[row].id} is not found by its vector"
    near = current.vectors.search(vector("anything")[None], 1000)[1][0].tolist()
    if gone := {*near, *current.words.search("animal", 1000)[1].tolist()} - set(everything):
        yield f"rows {sorted(gone)} are gone and were found"


def main(folder: Path, step: int, times: int, documents: int | None) -> None:
    """Sweep every `step`-th line, then kill `times` times after a random time."""
    if documents is None:
        small_limits()
    found: dict[str, Any] = {"points": 0, "failures": [], "slowest": 0.0, "kinds": [], "unfinished": 0}
    base = folder / "base"
    prepare(base, documents or 60)
    number, status = 1, KILLED
    while step and status == KILLED:
        home = folder / "line"
        shutil.copytree(base, home)
        if not (child := os.fork()):
            kill_at_line(number, TRACED)
            work(home, 1, 12)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        check(home, f"line {number}", found)
        shutil.rmtree(home)
        found["points"] += 1
        number += step
    if step and status:
        found["failures"].append(f"a child ended with {status}")
    home, chance = folder / "random", random.Random(1)
    shutil.copytree(base, home)
    for turn in range(times):
        if not (child := os.fork()):
            try:
                work(home, turn + 2, 400)
            except DataError as error:
                print(error, file=sys.stderr)
                os._exit(1)
            os._exit(0)
        time.sleep(chance.uniform(0.02, 0.8 if documents is None else 12))
        os.kill(child, signal.SIGKILL)
        found["unfinished"] += os.waitpid(child, 0)[1] == signal.SIGKILL
        check(home, f"random {turn}", found)
        found["points"] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
