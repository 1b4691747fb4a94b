"""The benchmark file: what each family found, when and of which commit, so that families can be measured one by one.

    {"name", "machine", "versions", "seeds", "sets": {SET: HASH}, "families": {FAMILY: {...}}, "figures": {KEY: {...}}, ...}

A family says its own `command`, `commit` and `date`, and the digest of each of its arms. Figures of families that are not asked
for stay, if they are of the same seeds, sets and arms; otherwise they go, and it is said why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stillroom_shared.files import replace_file
from stillroom_simulations.benchmark_file import commit, machine, versions


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

    def take_over(self, path: Path, asked: Sequence[str], say: Callable[[str], None] = lambda line: None) -> None:
        """Keep what the file at `path` says of other families than `asked`, where it still holds."""
        if not path.is_file():
            return
        old = json.loads(path.read_text())
        for family, about in old.get("families", {}).items():
            if family not in asked:
                if (why := self._differs(family, about)) is not None:
                    say(f"figures of {family} leave {path.name}: {why}")
                    continue
                self.families[family] = about
                self.figures |= {key: one for key, one in old["figures"].items() if family_of(key) == family}

    def _differs(self, family: str, about: Mapping[str, Any]) -> str | None:
        if about["seeds"] != list(self.seeds):
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
