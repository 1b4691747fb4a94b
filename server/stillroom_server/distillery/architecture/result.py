"""What a search found: its trials, the best of them, and the front of those that no other one beats in everything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from stillroom_server.distillery.architecture.settings import AXES
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_shared.errors import SettingsError

State = Literal["trained", "stopped", "out of bounds"]
JSON_NAME, TOML_NAME = "architecture.json", "architecture.toml"


@dataclass(frozen=True)
class Measured:
    """One shape, measured without training it: what these figures are does not depend on weights.

    Attributes:
        milliseconds: median of one query on one thread, of the int8 file.
        bytes: of the int8 file.
        teacher_milliseconds: median of the same queries on the teacher's float32 file, measured in turns with it.
    """

    milliseconds: float
    bytes: int
    teacher_milliseconds: float

    @property
    def ratio(self) -> float:
        """Latency over the teacher's."""
        return self.milliseconds / self.teacher_milliseconds


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One shape that was tried.

    Attributes:
        number: in the order in which they ended, from 0.
        quality: what the proxy said at its end, or when it was stopped; None out of bounds.
        figures: what else the proxy noted.
        seconds: of measuring and training; of a trial that was interrupted, since it was taken up.
    """

    number: int
    student: StudentSettings
    state: State
    measured: Measured
    quality: float | None
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def beats(self, other: Trial) -> bool:
        """Whether it is as good in quality, latency and bytes, and better in one of them; both were trained."""
        assert self.quality is not None and other.quality is not None
        mine = -self.quality, self.measured.ratio, self.measured.bytes
        others = -other.quality, other.measured.ratio, other.measured.bytes
        return mine != others and all(one <= another for one, another in zip(mine, others, strict=True))


@dataclass(frozen=True, eq=False)
class Architecture:
    """The end of a search.

    Attributes:
        trials: all that ended, in order.
        facts: the settings that the trials depend on and what they were run on; JSON values.
    """

    trials: tuple[Trial, ...]
    facts: Mapping[str, Any]

    @property
    def trained(self) -> list[Trial]:
        """Those within bounds that came to their end."""
        return [trial for trial in self.trials if trial.state == "trained"]

    @property
    def best(self) -> Trial:
        """The one of the highest quality within bounds; of equals the smaller file.

        Raises:
            SettingsError: none came to its end.
        """
        if not self.trained:
            raise SettingsError(
                f"no shape within the bounds was trained to its end, of {len(self.trials)} that were tried: allow more trials, "
                "shapes or minutes, or loosen latency_ms, latency_ratio or bytes"
            )
        return max(self.trained, key=lambda trial: (trial.quality, -trial.measured.bytes, -trial.number))

    @property
    def front(self) -> list[Trial]:
        """The Pareto front of quality, latency and bytes, the fastest first."""
        best = [one for one in self.trained if not any(other.beats(one) for other in self.trained)]
        return sorted(best, key=lambda trial: (trial.measured.ratio, trial.measured.bytes, trial.number))

    def table(self) -> str:
        """All trials, the best first, `*` before those of the front."""
        front = {trial.number for trial in self.front}
        names = sorted({name for trial in self.trials for name in trial.figures})
        heads = ["", "trial", *AXES, "ms", "of teacher", "MB", "quality", *names, "seconds", ""]
        ordered = sorted(self.trials, key=lambda one: (_ORDER[one.state], -(one.quality or 0.0), one.number))
        rows = [heads, *(["*" * (trial.number in front), *_cells(trial, names)] for trial in ordered)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def write(self, folder: Path) -> None:
        """Write architecture.json, all that is known, and architecture.toml, the table `[student]` of a recipe."""
        described = {
            **self.facts,
            "best": self.best.number,
            "front": [trial.number for trial in self.front],
            "trials": [_described(trial) for trial in self.trials],
        }
        _replace(folder / JSON_NAME, json.dumps(described, indent=1) + "\n")
        _replace(folder / TOML_NAME, student_toml(self.best.student))


_ORDER: Mapping[State, int] = {"trained": 0, "stopped": 1, "out of bounds": 2}


def student_toml(student: StudentSettings) -> str:
    """Settings of a student as the table of a recipe; what is as by default is left out, but for its shape.

    >>> print(student_toml(StudentSettings(init="scratch", depth=2, width=96, heads=4, feed_forward=256)), end="")
    [student]
    init = "scratch"
    depth = 2
    width = 96
    heads = 4
    feed_forward = 256
    """
    changed = student.model_dump(mode="json", exclude_defaults=True)
    given = {"init": student.init, **{axis: getattr(student, axis) for axis in AXES}} | changed
    # JSON's text, numbers, booleans and lists are TOML's too, and null has no place in either.
    lines = [f"{name} = {json.dumps(value)}" for name, value in given.items() if value is not None]
    return "\n".join(["[student]", *lines]) + "\n"


def _cells(trial: Trial, names: list[str]) -> list[str]:
    shape = ["all" if (value := getattr(trial.student, axis)) is None else str(value) for axis in AXES]
    measured = trial.measured
    return [
        str(trial.number),
        *shape,
        f"{measured.milliseconds:.2f}",
        f"{measured.ratio:.2f}",
        f"{measured.bytes / 1e6:.1f}",
        "" if trial.quality is None else f"{trial.quality:.4f}",
        *(f"{trial.figures[name]:.4f}" if name in trial.figures else "" for name in names),
        f"{trial.seconds:.0f}",
        "" if trial.state == "trained" else trial.state,
    ]


def _described(trial: Trial) -> dict[str, Any]:
    own = {name: getattr(trial, name) for name in ("number", "state", "quality", "seconds")}
    measured = {**asdict(trial.measured), "ratio": trial.measured.ratio}
    student = trial.student.model_dump(mode="json")
    return {**own, "measured": measured, "figures": dict(trial.figures), "student": student}


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
