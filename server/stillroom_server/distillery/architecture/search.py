"""The search: shapes are drawn, measured untrained, and trained a little when they are within the bounds.

    while trials are left:
        shape    = sampler(finished trials)                 `sampling.py`
        measured = measure(shape)                           seconds; latency and bytes do not depend on weights
        if out of bounds: the sampler learns by how much    it is never trained
        else:            quality = proxy(shape)             minutes; stopped when others were better at the same step

Trials are an Optuna study in FOLDER/search.db (SQLite; Akiba et al. 2019, arXiv 1907.10902). One that is stopped early has to
be among the best `keep` of the finished ones at the same step (`keep = 0.5`: the median rule of Golovin et al. 2017).

| case | what happens |
|---|---|
| interrupted or killed | the same call again goes on; the trial under way is drawn again, its proxy may go on from its folder |
| other settings, base or subject | refused with what differs, once a trial ended; `trials`, `shapes`, `minutes` may change |
| the smallest shape is out of bounds | refused at once: all others are larger |
| a proxy that raises | the error passes; the trial is drawn again by the next call |
| a quality that is not finite | counts as stopped |
| all shapes tried, or as many as `shapes` | the search ends with fewer trials |
| two searches in one folder | the second waits for the first, and goes on from its trials |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner, PercentilePruner
from optuna.trial import FrozenTrial, TrialState

from stillroom_server.distillery.architecture.result import Architecture, Measured, State, Trial
from stillroom_server.distillery.architecture.sampling import FINISHED, UntriedShapes
from stillroom_server.distillery.architecture.settings import AXES, ArchitectureSettings, student_of
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_shared.errors import SettingsError
from stillroom_shared.files import exclusive

DATABASE_NAME = "search.db"
_EXTENDABLE = frozenset({"trials", "shapes", "minutes"})
_MEASURED, _FIGURES, _FACTS = "measured", "figures", "facts"


class Report:
    """What a proxy tells the search while it trains.

    Attributes:
        stopped: whether the search has said that the trial should end.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial
        self._figures: dict[str, float] = {}
        self.stopped = False

    def __call__(self, step: int, value: float) -> bool:
        """The quality at a step, the same steps in all trials. Returns whether to stop: others were better by then."""
        self._trial.report(value, step)
        self.stopped = self.stopped or self._trial.should_prune()
        return self.stopped

    def note(self, **figures: float) -> None:
        """Figures that stand beside the quality in the table; later ones replace earlier ones."""
        self._figures |= figures
        self._trial.set_user_attr(_FIGURES, self._figures)


Measure = Callable[[StudentSettings], Measured]
Proxy = Callable[[StudentSettings, Report], float]
Progress = Callable[[int, int], None]


def search(
    settings: ArchitectureSettings,
    base: StudentSettings,
    folder: Path,
    *,
    measure: Measure,
    proxy: Proxy,
    subject: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> Architecture:
    """Search, from the trials in `folder` if there are any.

    Args:
        base: the student, whose shape is what is searched for.
        measure: latency and size of a student that was not trained.
        proxy: trains a student a little; higher is better. It may end where its report says so.
        subject: JSON values that trials depend on beside the settings: data, teacher, machine.
        progress: called with shapes trained so far, and `trials`.

    Raises:
        SettingsError: nothing is within the bounds, or `folder` holds another search.
        KeyboardInterrupt: from within the proxy; the same call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        sampler = UntriedShapes(settings)
        study = _open(settings, base, subject or {}, folder, sampler)
        running = _Search(settings, base, study, sampler, measure, proxy)
        trials = running.trials()
        while running.goes_on(trials):
            running.attempt(first=not trials)
            trials = running.trials()
            progress(_within(trials), settings.trials)
        return Architecture(tuple(trials), study.user_attrs[_FACTS])


@dataclass(frozen=True, eq=False)
class _Search:
    settings: ArchitectureSettings
    base: StudentSettings
    study: optuna.Study
    sampler: UntriedShapes
    measure: Measure
    proxy: Proxy

    def goes_on(self, trials: Sequence[Trial]) -> bool:
        settings = self.settings
        if _within(trials) >= settings.trials or len(trials) >= min(settings.shapes, self.sampler.count):
            return False
        return settings.minutes is None or sum(trial.seconds for trial in trials) < 60 * settings.minutes

    def attempt(self, *, first: bool) -> None:
        """One trial. Left by an exception or a kill it stays under way, which the next `_open` ends."""
        trial = self.study.ask(dict(self.sampler.space))
        student = student_of(self.base, self.sampler.shape(trial.params))
        measured = self.measure(student)
        excess = excesses(self.settings, measured)
        if first:
            _check_smallest(student, self.settings, measured, excess)
        trial.set_user_attr(_MEASURED, asdict(measured))
        for bound, by in excess.items():
            trial.set_constraint(bound, by)
        if max(excess.values(), default=0.0) > 0:
            self.study.tell(trial, state=TrialState.PRUNED)
            return
        report = Report(trial)
        quality = self.proxy(student, report)
        if report.stopped or not math.isfinite(quality):
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, quality)

    def trials(self) -> list[Trial]:
        """All that ended."""
        finished = self.study.get_trials(deepcopy=False, states=FINISHED)
        # Numbered here, as Optuna gives numbers to interrupted trials too.
        ordered = sorted(finished, key=lambda one: one.number)
        return [self._trial(number, one) for number, one in enumerate(ordered)]

    def _trial(self, number: int, found: FrozenTrial) -> Trial:
        assert found.duration is not None
        out = max(found.constraints.values(), default=0.0) > 0
        state: State = "out of bounds" if out else "trained" if found.state == TrialState.COMPLETE else "stopped"
        return Trial(
            number=number,
            student=student_of(self.base, self.sampler.shape(found.params)),
            state=state,
            measured=Measured(**found.user_attrs[_MEASURED]),
            quality=found.value,  # of one that was stopped, Optuna gives what it reported last
            figures=found.user_attrs.get(_FIGURES, {}),
            seconds=found.duration.total_seconds(),
        )


def _within(trials: Sequence[Trial]) -> int:
    """Trials that were within the bounds."""
    return sum(trial.state != "out of bounds" for trial in trials)


def excesses(settings: ArchitectureSettings, measured: Measured) -> dict[str, float]:
    """By how much a shape is over each bound, as a share of the bound; at most 0 where it keeps it.

    >>> excesses(ArchitectureSettings(latency_ratio=0.5, bytes=1_000), Measured(3.0, 800, 4.0))
    {'latency_ratio': 0.5, 'bytes': -0.19999999999999996}
    """
    found = {"latency_ms": measured.milliseconds, "latency_ratio": measured.ratio, "bytes": measured.bytes}
    bounds = {name: getattr(settings, name) for name in found}
    return {name: found[name] / bound - 1 for name, bound in bounds.items() if bound is not None}


def _check_smallest(
    student: StudentSettings, settings: ArchitectureSettings, measured: Measured, excess: Mapping[str, float]
) -> None:
    if broken := [f"{name} {getattr(settings, name)}" for name, by in excess.items() if by > 0]:
        shape = ", ".join(f"{axis} {getattr(student, axis)}" for axis in AXES if getattr(student, axis) is not None)
        raise SettingsError(
            f"even the smallest shape ({shape}) breaks {' and '.join(broken)}: it takes {measured.milliseconds:.2f} ms, "
            f"{measured.ratio:.2f} of the teacher's, and {measured.bytes:,} bytes; loosen the bound, or offer smaller choices"
        )


def _open(
    settings: ArchitectureSettings,
    base: StudentSettings,
    subject: Mapping[str, Any],
    folder: Path,
    sampler: UntriedShapes,
) -> optuna.Study:
    """The study in a folder, new or as it was left."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / DATABASE_NAME).resolve()}",
        study_name="architecture",
        sampler=sampler,
        pruner=_pruner(settings),
        direction="maximize",
        load_if_exists=True,
    )
    facts = {
        "architecture": settings.model_dump(mode="json", exclude=set(_EXTENDABLE)),
        "student": base.model_dump(mode="json", exclude={"init", *AXES}),
        "subject": json.loads(json.dumps(subject)),
    }
    known = study.user_attrs.get(_FACTS, facts)
    if (other := _differences(known, facts)) and study.get_trials(deepcopy=False, states=FINISHED):
        raise SettingsError(
            f"{folder} holds a search with other settings:\n" + "\n".join(other) + "\ngive them again as they were, or "
            "another folder"
        )
    study.set_user_attr(_FACTS, facts)
    for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(left.number, state=TrialState.FAIL)
    return study


def _pruner(settings: ArchitectureSettings) -> BasePruner:
    if settings.keep == 1:
        return NopPruner()
    return PercentilePruner(100 * settings.keep, n_startup_trials=settings.patience)


def _differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, one on a line, by dotted name."""
    before, after = _flat(known), _flat(now)
    return [
        f"{name} was {json.dumps(before.get(name))} and is {json.dumps(after.get(name))}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
