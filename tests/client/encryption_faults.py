"""Kills real processes while they encrypt a home, decrypt it, or add to an encrypted one, in processes of their own:
`python -m tests.client.encryption_faults FOLDER RELEASE EVERY_NTH_LINE RANDOM_TIMES`.

A conversion is a forked child that dies at the n-th line of Stillroom's own code that it reaches, for every n up to its end.
Adding dies by SIGKILL after a random time, stopped before that for a look at what it has open. After each death a process that
shares nothing with it but the disk checks: everything committed is there, and, where the home is encrypted, no byte of it is in
the clear. Prints one JSON object; `test_encryption_faults.py` says what must hold for it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keyring
from keyring.backend import KeyringBackend
from tests.client.devices import units
from tests.client.lived_in import anywhere, lived_in
from tests.killing import KILLED, kill_at_line

import stillroom_client.encrypting as encrypting
import stillroom_client.key_file as key_file
import stillroom_client.sweeping as sweeping
import stillroom_client.unlocking as unlocking
import stillroom_shared.database as database
import stillroom_shared.files as files
from stillroom_client.catalog import Embedded
from stillroom_client.device import Device
from stillroom_client.encrypting import Protection
from stillroom_client.participation import Consent, open_ledger
from stillroom_shared.corpus import Passage
from stillroom_shared.release import Release, open_release

TRACED = {str(module.__file__) for module in (encrypting, key_file, sweeping, unlocking, database, files)}
PLANTED = "The xylograph of batch {} is by Ottilie."


class Drawer(KeyringBackend):
    """A keyring that lies in a folder beside the homes, so that it outlives the processes."""

    priority = 1
    folder = Path()

    def get_password(self, service: str, username: str) -> str | None:
        path = self.folder / username
        return path.read_text() if path.exists() else None

    def set_password(self, service: str, username: str, password: str) -> None:
        (self.folder / username).write_text(password)

    def delete_password(self, service: str, username: str) -> None:
        (self.folder / username).unlink()


def holdings(home: Path) -> list[Any]:
    with Device.open(home) as device:
        rows = [device.store.query(f"SELECT * FROM {table}") for table in ("passages", "vectors", "feedback", "staged")]
        assert device.search("zirconium", 1, mode="bm25")
    with open_ledger(home) as ledger:
        return [*rows, ledger.rows(), Consent.load(home)]


def sweep(
    base: Path,
    scratch: Path,
    planted: dict[str, bytes],
    change: Callable[[Path], None],
    step: int,
    found: dict[str, Any],
) -> None:
    """Kill a conversion at every `step`-th line; what comes after must be the home as it was, in one form or the other."""
    before = holdings(base)
    number, status = 1, KILLED
    while status == KILLED:
        home = scratch / f"{base.name}-{number}"
        shutil.copytree(base, home, symlinks=True)
        if not (child := os.fork()):
            unlocking.forget()
            kill_at_line(number, TRACED)
            change(home)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        point = f"{base.name}, line {number}"
        unlocking.forget()
        if holdings(home) != before:
            found["failures"].append(f"{point}: the home is not as it was")
        sealed = unlocking.is_encrypted(home)
        found["sealed" if sealed else "plain"] += 1
        if sealed and (told := anywhere(home, planted)):
            found["failures"].append(f"{point}: {told} in the clear")
        if status == KILLED:  # the same command again ends in the form that was asked for
            (encrypt if base.name == "plain" else encrypting.decrypt)(home) if sealed == (
                base.name != "plain"
            ) else None
            if holdings(home) != before or unlocking.is_encrypted(home) != (base.name == "plain"):
                found["failures"].append(f"{point}: it cannot be done again")
        shutil.rmtree(home)
        number += step
    if status:
        found["failures"].append(f"{base.name}: a child ended with {status}")


def encrypt(home: Path) -> None:
    encrypting.encrypt(home, Protection(keyring=True))


def add(home: Path, release: Release, done: int) -> None:
    """Add batches of passages until killed; a pipe tells which are committed."""
    with Device.open(home, release=None) as device:
        for batch in range(1000):
            texts = [Passage(f"x{batch}-{n}", "Ottilie", PLANTED.format(batch), "Xylographs") for n in range(40)]
            vectors = units(40, release.dimension, seed=batch)
            device.catalog.stage(texts, Embedded(vectors, ""))
            device.add(texts, vectors)
            os.write(done, f"{batch}\n".encode())
            device.record([(f"xylograph {batch}", f"x{batch}-0")])
            device.refresh_index()


def kill_adding(home: Path, release: Release, wait: float, memory: str) -> tuple[int, list[str]]:
    """The last batch that was committed, and what a stopped process has open that is neither in its home nor in memory."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        unlocking.forget()
        add(home, release, writing)
        os._exit(0)
    os.close(writing)
    time.sleep(wait)
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WSTOPPED)
    try:
        targets = [os.readlink(handle) for handle in Path(f"/proc/{child}/fd").iterdir() if handle.is_symlink()]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    expected = (str(home.resolve()), memory, "/dev/", "/proc/")
    opened = [each for each in targets if each.startswith("/") and not each.startswith(expected)]
    opened = [each for each in opened if each not in found_open()]
    with os.fdopen(reading) as told:
        batches = [int(line) for line in told.read().split()]
    return (batches[-1] if batches else -1), opened


def found_open() -> set[str]:
    """What this process has open itself, and every child inherits."""
    return {
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}")
    }


def main(folder: Path, release_folder: Path, step: int, times: int) -> None:
    """Sweep both conversions, then kill adding, in an encrypted home and, as a control, in one in the clear."""
    Drawer.folder = folder / "drawer"
    Drawer.folder.mkdir()
    keyring.set_keyring(Drawer())  # type: ignore[no-untyped-call]
    os.environ["TMPDIR"] = os.environ["SQLITE_TMPDIR"] = str(folder / "temporary")
    (folder / "temporary").mkdir()
    release = open_release(release_folder, trusted_key=None)
    found: dict[str, Any] = {
        "failures": [], "sealed": 0, "plain": 0, "killed": 0, "control": 0, "batches": 0, "left": [], "opened": [],
    }  # fmt: skip
    planted = lived_in(folder / "plain", release)
    encrypted = lived_in(folder / "sealed", release, Protection(keyring=True))
    scratch = folder  # the link to the release is a relative one
    sweep(folder / "plain", scratch, planted, encrypt, step, found)
    sweep(folder / "sealed", scratch, encrypted, encrypting.decrypt, step, found)

    chance = random.Random(3)
    words = {"xylograph": b"xylograph", "owner": b"Ottilie", "query": b"xylograph 1", "stem": b"xylograph"}
    for turn in range(times):
        wait = chance.uniform(0.3, 2.0)
        for base in ("sealed", "plain"):
            home = scratch / f"adding-{base}-{turn}"
            shutil.copytree(folder / base, home, symlinks=True)
            last, opened = kill_adding(home, release, wait, "/dev/shm/")
            told = anywhere(home, words)
            unlocking.forget()
            with Device.open(home) as device:
                missing = [b for b in range(last + 1) if not device.has(f"x{b}-39")]
                hits = device.search("xylograph", 10, mode="bm25") if last >= 0 else []
            if missing or (last >= 0 and not hits):
                found["failures"].append(f"{base}, turn {turn}: batches {missing} of {last + 1} are gone")
            if base == "sealed":
                found["killed"] += 1
                found["batches"] += last + 1
                found["opened"] += opened
                if told or (told := anywhere(home, words)):
                    found["failures"].append(f"turn {turn}: {told} in the clear")
            else:
                found["control"] += bool(told)
            shutil.rmtree(home)
    found["left"] = [str(path) for path in (folder / "temporary").rglob("*")]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
