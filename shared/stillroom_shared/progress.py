"""Progress of a run in stages: a bar and an estimate of what is left, or one line a stage where nobody watches.

The estimate scales a plan in seconds (measured once, on any machine) by how the stages behind it went on this one; inside a
stage the rate since its first report takes the guess's place: what an interrupted run had done before is no speed of this one.

| case | what happens |
|---|---|
| a stage that was answered from a cache | says nothing about pace |
| how much a stage has to do is not known yet (None in the plan) | no estimate until `expect` says it, or the stage is done |
| a stage begins anew (training after a step of pruning) | its rate is measured anew |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stillroom_shared.errors import SettingsError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@dataclass(frozen=True)
class Forecast:
    """What is left of a plan.

    plan: seconds of each stage, in order, on some machine; None is not known.

    >>> forecast = Forecast({"corpus": 10.0, "distil": 60.0, "rounds": 30.0})
    >>> forecast.left("distil", elapsed=0.0, fraction=0.0, pace=forecast.pace({"corpus": 25.0}))
    135.0
    >>> forecast.left("distil", elapsed=30.0, fraction=0.5, pace=1.0)
    60.0
    """

    plan: Mapping[str, float | None]

    def pace(self, finished: Mapping[str, float]) -> float:
        """Seconds taken for each second planned: 1 at first, then what the stages that did work say."""
        known = {name: seconds for name, seconds in self.plan.items() if seconds is not None}
        # As if a fifth of the plan had gone as planned: a first stage of some seconds must not decide about an hour.
        assumed = sum(known.values()) / 5
        behind = [name for name in finished if name in known]
        if not assumed:
            return 1.0
        return (sum(finished[name] for name in behind) + assumed) / (sum(known[name] for name in behind) + assumed)

    def left(
        self, stage: str, *, elapsed: float, fraction: float, pace: float, begun: tuple[float, float] = (0.0, 0.0)
    ) -> float | None:
        """Seconds until the last stage is done, from inside `stage`, of which `fraction` (0 to 1) is done.

        Args:
            begun: (seconds, fraction) of the first report, from which on the stage's rate is measured.

        Returns:
            None where how long a stage takes is not known.
        """
        names = list(self.plan)
        later = [self.plan[name] for name in names[names.index(stage) + 1 :]]
        planned, done = self.plan[stage], fraction - begun[1]
        if done > 0:
            own: float | None = (elapsed - begun[0]) * (1 - fraction) / done
        else:
            own = 0.0 if fraction >= 1 else None if planned is None else planned * pace * (1 - fraction)
        known = [seconds for seconds in later if seconds is not None]
        return None if own is None or len(known) < len(later) else own + pace * sum(known)


class Stage:
    """A stage in progress. Call it with (done, total); `note` says in a word what came of it."""

    def __init__(self, show: Callable[[float], None]) -> None:
        self.fraction = 0.0
        self.remark = ""
        self.cached = False
        self._show = show

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` is done."""
        self.part(0, 1)(done, total)

    def part(self, begins: float, ends: float) -> Callable[[int, int], None]:
        """What shows (done, total) of a part of the stage, which lies between these fractions of it.

        >>> stage = Stage(print)
        >>> stage.part(0.5, 0.75)(1, 2)
        0.625
        """

        def show(done: int, total: int) -> None:
            self.fraction = begins + (ends - begins) * (done / total if total else 1.0)
            self._show(self.fraction)

        return show

    def note(self, remark: str, *, cached: bool = False) -> None:
        """Put a remark on the stage's line; `cached` keeps its time out of the estimate."""
        self.remark, self.cached = remark, cached


class Progress:
    """The stages of a run, each entered once.

    >>> from rich.console import Console
    >>> progress = Progress({"corpus": 5.0, "distil": 60.0}, console=Console(force_terminal=False), clock=lambda: 0.0)
    >>> with progress.stage("corpus") as stage:
    ...     stage.note("21,530 pairs", cached=True)
    corpus            0 s   21,530 pairs   about 60 s left
    >>> with progress.stage("distil") as stage:
    ...     stage(3, 3)
    distil            0 s
    """

    def __init__(
        self, plan: Mapping[str, float | None], *, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._forecast = Forecast(plan)
        self._worked: dict[str, float] = {}
        self._console = console
        self._clock = clock

    def expect(self, seconds: Mapping[str, float | None]) -> None:
        """Better guesses for stages of the plan that are still to come, once it is known how much they have to do."""
        fresh = {name: guess for name, guess in seconds.items() if name in self._forecast.plan}
        self._forecast = Forecast({**self._forecast.plan, **fresh})

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage and show how far it is. Leaving by an exception leaves no time behind."""
        if name not in self._forecast.plan or name in self.seconds:
            raise SettingsError(
                f"stage {name!r} is unknown or was done before: the plan is {list(self._forecast.plan)}"
            )
        started, pace = self._clock(), self._forecast.pace(self._worked)
        with self._bar(name, started, pace) as show:
            stage = Stage(show)
            yield stage
        self.seconds[name] = self._clock() - started
        if not stage.cached:
            self._worked[name] = self.seconds[name]
        left = self._forecast.left(name, elapsed=0.0, fraction=1.0, pace=self._forecast.pace(self._worked))
        parts = [
            f"{name:12} {span(self.seconds[name]):>8}",
            stage.remark,
            f"about {span(left)} left" if left is not None and left >= 1 else "",
        ]
        self._console.print("   ".join(part for part in parts if part), markup=False, soft_wrap=True)

    @contextmanager
    def _bar(self, name: str, started: float, pace: float) -> Iterator[Callable[[float], None]]:
        """A bar that disappears when its stage is done; nothing where the output is no terminal."""
        if not self._console.is_terminal:
            yield lambda fraction: None
            return
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = TextColumn(f"{name:12}"), TimeElapsedColumn(), BarColumn(), TextColumn("{task.fields[left]}")
        with Bars(*columns, console=self._console, transient=True, refresh_per_second=4) as bars:
            task = bars.add_task(name, total=None, left=self._left(name, started, pace, 0.0))
            begun = [(0.0, 1.0)]  # of the first report, set when there is one

            def show(fraction: float) -> None:
                if fraction < begun[0][1]:
                    begun[0] = self._clock() - started, fraction
                self._advance(bars, task, fraction, self._left(name, started, pace, fraction, begun[0]))

            yield show

    def _advance(self, bars: Bars, task: TaskID, fraction: float, left: str) -> None:
        bars.update(task, total=1.0, completed=fraction, left=left)

    def _left(
        self, name: str, started: float, pace: float, fraction: float, begun: tuple[float, float] = (0.0, 0.0)
    ) -> str:
        elapsed = self._clock() - started
        left = self._forecast.left(name, elapsed=elapsed, fraction=fraction, pace=pace, begun=begun)
        return "" if left is None else f"about {span(left)} left in all"


def span(seconds: float) -> str:
    """A length of time as one says it.

    >>> span(0.4), span(59.6), span(119), span(3700)
    ('0 s', '60 s', '119 s', '62 min')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
