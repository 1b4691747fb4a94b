"""Progress: what a person at a terminal sees, and what a log file gets."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from stillroom_shared.errors import SettingsError
from stillroom_shared.progress import Forecast, Progress

PLAN = {"corpus": 10.0, "distil": 60.0, "rounds": 30.0}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def recorder(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_one_line_a_stage(clock: Clock) -> None:
    """Guards against a CI log of ten thousand redrawn bars."""
    console = recorder(terminal=False)
    progress = Progress(PLAN, console=console, clock=clock)
    with progress.stage("corpus") as stage:
        for done in range(1000):
            stage(done, 1000)
        clock.now += 25
    with progress.stage("distil"):
        clock.now += 75
    lines = [" ".join(line.split()) for line in written(console).splitlines()]
    # (25 + 20) / (10 + 20) times the 90 seconds to come, then (100 + 20) / (70 + 20) times the last 30.
    assert lines == ["corpus 25 s about 2 min left", "distil 75 s about 40 s left"]
    assert progress.seconds == {"corpus": 25.0, "distil": 75.0}


def test_a_terminal_sees_a_bar_that_moves_and_goes(clock: Clock) -> None:
    """Guards against an estimate that is computed and never shown."""
    console = recorder(terminal=True)
    progress = Progress(PLAN, console=console, clock=clock)
    with progress.stage("distil") as stage:
        stage(0, 4)
        clock.now += 25
        stage(1, 4)
    shown = written(console)
    # A quarter took 25 s, so 75 s for the rest of the stage whatever was planned, and 30 s of rounds.
    assert "about 90 s left in all" in shown and "about 105 s left in all" in shown
    assert shown.splitlines()[-1].split()[-4:] == ["about", "17", "s", "left"]


def test_a_cached_stage_says_nothing_about_pace(clock: Clock) -> None:
    """Guards against "1 s left" for a minute's work, because the stage before it was found in the cache."""
    console = recorder(terminal=False)
    progress = Progress(PLAN, console=console, clock=clock)
    with progress.stage("corpus") as stage:
        stage.note("as before", cached=True)
        clock.now += 0.1
    assert " ".join(written(console).split()) == "corpus 0 s as before about 90 s left"


def test_an_interrupted_stage_leaves_no_time_behind(clock: Clock) -> None:
    """Guards against a half-done stage whose seconds are reported as those of a whole one."""
    progress = Progress(PLAN, console=recorder(terminal=True), clock=clock)
    with pytest.raises(KeyboardInterrupt), progress.stage("corpus"):
        raise KeyboardInterrupt
    assert progress.seconds == {}
    with progress.stage("corpus"):
        pass
    with pytest.raises(SettingsError, match="'corpus' is unknown or was done before"), progress.stage("corpus"):
        pass


def test_the_estimate_ends_at_zero() -> None:
    """Guards against an estimate that never arrives."""
    forecast = Forecast(PLAN)
    lefts = [forecast.left("rounds", elapsed=10.0 * f, fraction=f, pace=1.0) for f in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert lefts[0] == 30.0 and lefts[-1] == 0.0
    assert lefts == sorted((left for left in lefts if left is not None), reverse=True)


def test_the_rate_of_a_resumed_stage_is_that_of_this_run(clock: Clock) -> None:
    """Guards against "1 s left" for half an hour of training, because an earlier run had done the other half."""
    for reports, shown in (
        ([(500, 1000)], "about 15 s"),  # half of what was planned, before there is a rate
        ([(500, 1000), (510, 1000)], "about 8 min"),
        ([(500, 1000), (510, 1000), (0, 10), (1, 10)], "about 90 s"),  # begins anew, as after a step of pruning
    ):
        console = recorder(terminal=True)
        with Progress(PLAN, console=console, clock=clock).stage("rounds") as stage:
            for done, total in reports:
                stage(done, total)
                clock.now += 10
            clock.now -= 10
            stage(*reports[-1])
        assert f"{shown} left in all" in written(console)


def test_what_is_not_known_is_not_estimated_until_it_is(clock: Clock) -> None:
    """Guards against an estimate that is a guess about work that nobody has counted."""
    console = recorder(terminal=False)
    progress = Progress({"lessons": 10.0, "vectors": None, "train": None}, console=console, clock=clock)
    with progress.stage("lessons"):
        clock.now += 10
    with progress.stage("vectors") as stage:
        progress.expect({"vectors": 20.0, "train": 40.0, "scores": 5.0})
        stage(1, 1)
        clock.now += 20
    with progress.stage("train"):
        clock.now += 40
    lines = [" ".join(line.split()) for line in written(console).splitlines()]
    assert lines == ["lessons 10 s", "vectors 20 s about 40 s left", "train 40 s"]
    assert Forecast({"a": None, "b": 5.0}).left("a", elapsed=4.0, fraction=0.5, pace=1.0) == 9.0
