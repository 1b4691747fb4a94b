"""The benchmark file: what each family found, when and of which commit, so that families can be measured one by one.

    {"name", "machine", "versions", "seeds", "sets": {SET: HASH}, "families": {FAMILY: {...}}, "figures": {KEY: {...}}, ...}

A family says its own `command`, `commit` and `date`, and the digest of each of its arms. What is not measured again stays, if
it is of the same seeds, sets, arms and machine; nothing leaves a file unless that was asked for:

| in the file | and now | is |
|---|---|---|
| a family that is not asked for | the same seeds, sets, arms, machine, versions | kept |
| the same | any of them differs (`memory` and `rates` have no seeds) | refused, or left out with `replace` |
| a family that is asked for | with all arms of the file | kept until its new figures are there |
| the same | with fewer arms | refused, or replaced with `replace` |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stillroom_shared.errors import SettingsError
from stillroom_shared.files import replace_file
from stillroom_simulations.benchmark_file import commit, machine, versions

SEEDLESS = ("memory", "rates")
"""Families that are measured once, whatever the seeds."""


@dataclass
class Record:
    """The file while it is made.

    Attributes:
        seeds: of every arm.
        sets: hash of each data set, by name.
        digests: by family, of its arms as the studies say now, by name; of families that are no arms too.
        families, figures: what was found.
    """

    command: str
    seeds: Sequence[int]
    sets: Mapping[str, str]
    digests: Mapping[str, Mapping[str, str]]
    families: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take_over(self, path: Path, asked: Mapping[str, Sequence[str]], *, replace: bool = False) -> None:
        """Keep what the file at `path` says, where it still holds; `asked` are arms by family.

        Raises:
            SettingsError: something would be lost that will not be measured again, and `replace` is false.
        """
        if not path.is_file():
            return
        old, lost = json.loads(path.read_text()), []
        for family, about in old.get("families", {}).items():
            why = self._differs(family, about)
            if family in asked and (missing := [name for name in about["arms"] if name not in asked[family]]):
                why = f"{', '.join(missing)} would not be measured again"
            elif family in asked and why is not None:
                continue
            if why is not None:
                lost.append(f"{family} ({why})")
                continue
            self.families[family] = about
            self.figures |= {key: one for key, one in old["figures"].items() if family_of(key) == family}
        if lost and not replace:
            raise SettingsError(
                f"{path} would lose figures of {'; '.join(lost)}: write to another file with --out, or let them go with "
                "--replace"
            )

    def _differs(self, family: str, about: Mapping[str, Any]) -> str | None:
        if family not in SEEDLESS and about["seeds"] != list(self.seeds):
            return f"they are of seeds {about['seeds']}"
        if about["sets"] != dict(self.sets):
            return "they are of other data sets, or of other queries"
        if (about.get("machine"), about.get("versions")) != (machine(1), versions()):
            return "they are of another machine, or of other versions of packages"
        now = self.digests.get(family, {})
        changed = [name for name, digest in about["arms"].items() if now.get(name) != digest]
        return f"{', '.join(changed)} changed since" if changed else None

    def add(self, family: str, arms: Sequence[str], figures: Mapping[str, dict[str, Any]]) -> None:
        """What a family found, of these arms."""
        self.families[family] = {
            "command": self.command,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(1),
            "versions": versions(),
            "seeds": list(self.seeds),
            "sets": dict(self.sets),
            "arms": {name: self.digests[family][name] for name in arms},
        }
        self.figures = {key: one for key, one in self.figures.items() if family_of(key) != family} | dict(figures)

    def as_json(self) -> dict[str, Any]:
        """The file's content (DESIGN section 9)."""
        return {
            "name": "distill",
            "command": self.command,
            "commit": commit(),
            "machine": machine(1),
            "versions": versions(),
            "seeds": list(self.seeds),
            "sets": dict(self.sets),
            "families": self.families,
            "figures": self.figures,
        }

    def write(self, path: Path) -> dict[str, Any]:
        """Write it whole, and return what was written."""
        made = self.as_json()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(made, indent=1) + "\n").encode())
        return made


def family_of(key: str) -> str:
    """The family that a figure is of.

    >>> family_of("left-out.align.mean.kept")
    'left-out'
    """
    return key.partition(".")[0]
