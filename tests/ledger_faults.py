"""Kills real processes while they spend, in a process of its own: `python -m tests.ledger_faults SCENARIO FOLDER`.

Each point is a forked child that takes part in a round and writes the round to a side file ("released") only after the
spend returned. Whatever the child left behind is then checked by its parent, which shares nothing with it but the disk.
Prints one JSON object; `tests/shared/test_ledger_faults.py` says what must hold for it.

| scenario | the child dies |
|---|---|
| `first`, `next` | at the n-th line of Stillroom's own code, for every n; on a bare home, or on one that holds spends |
| `careless` | the same, but it releases before the spend: the checks must notice |
| `torn` | inside a write system call: the kernel kills it when a file outgrows a limit, swept in small steps |
| `full` | not at all: the same limit is an error of the file system, as on a full disk |
| `random` | by SIGKILL after a random time, spending in a loop |
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import stillroom_client.participation as participation
import stillroom_shared.files as files
import stillroom_shared.ledger as ledger_module
import stillroom_shared.signing as signing
from stillroom_client.participation import LEDGER_FILE, Consent, take_part
from stillroom_shared.errors import LedgerError, StillroomError
from stillroom_shared.ledger import Ledger
from stillroom_shared.protocol import RoundOrder
from tests.killing import kill_at_line

TRACED = {str(module.__file__) for module in (participation, files, ledger_module, signing)}
REFUSED, OTHER = 3, 4
_LAST_ROUND = 1_000_000
_RANDOM_POINTS = 60


def order(number: int) -> RoundOrder:
    return RoundOrder(
        federation="f", release="r", round=number, attempt=1, mechanism="central", clip_norm=1.0, noise_multiplier=2.0,
        sampling_rate=0.1, devices=50, dimension=256, steps=1, learning_rate=1.0, temperature=0.05, candidates=4,
    )  # fmt: skip


def limit_files(size: int, *, kill: bool) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_child(home: Path, rounds: Iterator[int], before: Callable[[], object], *, careless: bool = False) -> int:
    """Fork, take part, release; the child's process id. `before` arms what will kill it."""
    if child := os.fork():
        return child
    status = OTHER
    try:
        released = os.open(home / "released", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        before()
        for number in rounds:
            if careless:
                os.write(released, b"%d\n" % number)
            take_part(home, order(number))
            if not careless:
                os.write(released, b"%d\n" % number)
        status = 0
    except LedgerError:
        status = REFUSED
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Exit status; a signal's number when one killed it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def check(home: Path, point: str, found: dict[str, Any]) -> None:
    """After a death: everything released is in the ledger, which reads, verifies and goes on."""
    released = (
        {int(line) for line in (home / "released").read_text().split()} if (home / "released").exists() else set()
    )
    found["journals"] += (home / f"{LEDGER_FILE}-journal").exists()
    try:
        take_part(home, order(_LAST_ROUND))
        with Ledger.open(home / LEDGER_FILE) as ledger:
            ledger.verify()
            recorded = {purpose["round"] for purpose in ledger.purposes()}
    except (StillroomError, OSError) as error:
        found["failures"].append(f"{point}: the next start failed: {error}")
        return
    if unrecorded := released - recorded:
        found["failures"].append(f"{point}: released without a record: {sorted(unrecorded)}")
    if not found["base"] | {_LAST_ROUND} <= recorded:
        found["failures"].append(f"{point}: earlier spends were lost: {sorted(found['base'] - recorded)}")
    found["released"] += bool(released - found["base"])
    found["recorded_only"] += bool(recorded - released - found["base"] - {_LAST_ROUND})
    found["nothing"] += recorded == found["base"] | {_LAST_ROUND}


def main(scenario: str, folder: Path) -> dict[str, Any]:
    template = folder / "template"
    template.mkdir()
    Consent(participations=_LAST_ROUND).save(template)
    base = set() if scenario == "first" else {1, 2, 3}
    for number in sorted(base):
        take_part(template, order(number))
    found: dict[str, Any] = {
        "points": 0, "failures": [], "journals": 0, "released": 0, "recorded_only": 0, "nothing": 0, "base": base,
        "statuses": {},
    }  # fmt: skip
    seeded = random.Random(7)
    for point in range(1, 100_000):
        home = folder / "home"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(template, home)
        arm: Callable[[], object] = int  # nothing
        rounds: Iterator[int] = iter(range(5, 17))  # enough to make both the ledger and its journal grow
        if scenario in ("first", "next", "careless"):
            arm, rounds = partial(kill_at_line, point, TRACED), iter([5])
        elif scenario in ("torn", "full"):
            arm = partial(limit_files, 256 * (point - 1), kill=scenario == "torn")
        else:
            rounds = iter(range(5, _LAST_ROUND))
        child = run_child(home, rounds, arm, careless=scenario == "careless")
        if scenario == "random":
            # On a machine that is busy a spend takes longer: the times stretch, or every kill would come before the first.
            stretch = 2 ** (point // _RANDOM_POINTS) if found["released"] <= 10 else 1
            time.sleep(seeded.uniform(0, 0.08) * stretch)
            os.kill(child, signal.SIGKILL)
        status = wait(child)
        found["statuses"][str(status)] = found["statuses"].get(str(status), 0) + 1
        found["points"] += 1
        check(home, f"{scenario} {point}", found)
        enough = point >= _RANDOM_POINTS and found["released"] > 10 and found["journals"] >= 1
        if status == 0 or (scenario == "random" and (enough or point == 6 * _RANDOM_POINTS)):
            break
        if scenario == "careless" and found["failures"]:
            break
    return found | {"base": sorted(base)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
