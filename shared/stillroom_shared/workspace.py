"""The folder of a run: which stages are done, for which input, and how long they took.

A stage is named, has a key (a hash of everything its result depends on, the key of the stage before it included) and writes
whatever it wants below the folder. It is skipped while its key stands; with another key its outputs are removed and it runs
again. A stage that was interrupted finds its outputs as they were and may go on from them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom_shared.errors import SettingsError

_STAMPS = ".stages"


def key_of(*parts: Any) -> str:
    """A short hash of JSON-able values, for stage keys.

    >>> key_of("rounds", {"b": 1, "a": 2}) == key_of("rounds", {"a": 2, "b": 1})
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def content_key(path: Path) -> str:
    """A hash of a file, or of all files of a folder with their names in it: the same wherever it lies and whenever it was
    written, so that a copy stands for what it was copied from. Hidden ones are bookkeeping of whoever put the others there.
    """
    digest = hashlib.sha256()
    for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if one.is_file() and not any(part.startswith(".") for part in one.relative_to(path).parts):
            digest.update(f"{one.relative_to(path)} {one.stat().st_size}".encode())
            with one.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Workspace:
    """A run's folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     space = Workspace(Path(name)); runs = []
    ...     for _ in range(2):
    ...         skipped = space.stage("toy", "key", ["toy.txt"], lambda: runs.append(1))
    ...     runs, skipped
    ([1], True)
    """

    folder: Path

    def stage(self, name: str, key: str, outputs: Collection[str], work: Callable[[], None]) -> bool:
        """Run `work` unless it is done for this key; returns whether it was skipped.

        `outputs` are names below the folder that belong to the stage; they are removed when the key has changed.

        Raises:
            SettingsError: one of them is there, and no stage has made it: it is somebody's own.
        """
        self.check({name: outputs})
        stamp = self._stamp(name)
        if stamp.get("key") != key:
            for output in outputs:
                self._remove(self._inside(output))
            stamp = {"key": key, "seconds": 0.0, "done": False}
            self._write(name, stamp)
        if stamp["done"]:
            return True
        started = time.monotonic()
        try:
            work()
            stamp["done"] = True
        finally:  # time before an interruption counts too
            stamp["seconds"] += time.monotonic() - started
            self._write(name, stamp)
        return False

    def check(self, outputs: Mapping[str, Collection[str]]) -> None:
        """Before the first stage: `SettingsError` where what a stage would write is there, and no stage has made it."""
        for name, own in outputs.items():
            there = [path for path in map(self._inside, own) if path.exists()]
            if there and not self._stamp(name):
                raise SettingsError(
                    f"{there[0]} is there, and no run is known to have made it: name another folder, or remove it"
                )

    def done(self, name: str, key: str) -> bool:
        """Whether a stage is done for this key, and would be skipped."""
        stamp = self._stamp(name)
        return stamp.get("key") == key and bool(stamp["done"])

    def seconds(self) -> dict[str, float]:
        """Seconds of work that each finished stage took, whenever that was."""
        stamps = {path.stem: self._stamp(path.stem) for path in sorted((self.folder / _STAMPS).glob("*.json"))}
        return {name: round(stamp["seconds"], 2) for name, stamp in stamps.items() if stamp["done"]}

    def _inside(self, output: str) -> Path:
        path = (self.folder / output).resolve()
        if not path.is_relative_to(self.folder.resolve()) or path == self.folder.resolve():
            raise SettingsError(f"stage output {output!r} is not inside {self.folder}: name a path below it")
        return path

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _stamp(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / _STAMPS / f"{name}.json").read_text()))
        except (FileNotFoundError, ValueError):
            return {}

    def _write(self, name: str, stamp: dict[str, Any]) -> None:
        path = self.folder / _STAMPS / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(stamp))
        partial.replace(path)
