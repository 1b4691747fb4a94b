"""Architecture search: finds better shapes than chance, within bounds, once each, and goes on where it was killed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from stillroom_server.distillery.architecture.result import Architecture, Measured, Trial, student_toml
from stillroom_server.distillery.architecture.sampling import UntriedShapes
from stillroom_server.distillery.architecture.search import DATABASE_NAME, Report, excesses, search
from stillroom_server.distillery.architecture.settings import AXES, ArchitectureSettings, Shape, student_of
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_shared.errors import SettingsError
from stillroom_shared.settings_file import Group, load

SMALL = ArchitectureSettings(
    depth=(1, 2, 3), width=(32, 64), heads=(4,), feed_forward=(64, 128), latency_ratio=0.5, trials=5, random=3,
    patience=2, seed=4,
)  # fmt: skip
BASE = StudentSettings(freeze_embeddings=False)


def quality(student: StudentSettings) -> float:
    """Best at depth 3, width 192, 6 heads and 768 neurons, where it is 1."""
    far = (student.depth - 3) ** 2 / 4 + 2 * math.log(student.width / 192) ** 2 + abs(student.heads - 6) / 8
    return 1 - far - math.log(student.feed_forward / 768) ** 2 / 2


def measure(student: StudentSettings) -> Measured:
    """Latency grows with depth and width, bytes with feed-forward too; the teacher takes 4 ms."""
    size = student.depth * (4 * student.width**2 + 2 * student.width * student.feed_forward)
    return Measured(student.depth * student.width / 40, size, 4.0)


def proxy(student: StudentSettings, report: Report) -> float:
    """Comes to its quality in three steps."""
    for step in (1, 2):
        if report(step, quality(student) * step / 3):
            return math.nan
    report.note(half=quality(student) / 2)
    return quality(student)


def shape_of(student: StudentSettings) -> tuple[int | None, ...]:
    return tuple(getattr(student, axis) for axis in AXES)


def outcome(found: Architecture) -> list[tuple[object, ...]]:
    """All that a trial says, but for seconds."""
    return [(shape_of(one.student), one.state, one.quality, one.measured, dict(one.figures)) for one in found.trials]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Architecture, Path]:
    folder = tmp_path_factory.mktemp("search")
    return search(SMALL, BASE, folder, measure=measure, proxy=proxy), folder


def best_of(settings: ArchitectureSettings, trials: int) -> float:
    """The best of some trials without bounds, in memory."""
    sampler = UntriedShapes(settings)
    study = optuna.create_study(sampler=sampler, direction="maximize")

    def value(trial: optuna.Trial) -> float:
        places = {axis: trial.suggest_int(axis, one.low, one.high) for axis, one in sampler.space.items()}
        return quality(student_of(BASE, sampler.shape(places)))

    study.optimize(value, n_trials=trials)
    return study.best_value


def test_a_search_beats_random_shapes_at_equal_trials() -> None:
    """Guards against a sampler that is never told, minimizes, or draws at random throughout: all end without an error."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # The best shape is far from the middle of each axis, so that a sampler that goes the other way is seen.
    space = ArchitectureSettings(depth=tuple(range(1, 9)), feed_forward=tuple(range(256, 3073, 256)))
    seeds = range(2)
    followed = [best_of(space.model_copy(update={"seed": seed, "random": 8}), 28) for seed in seeds]
    chance = [best_of(space.model_copy(update={"seed": seed, "random": 99}), 28) for seed in seeds]
    assert np.mean(followed) > np.mean(chance) + 0.03, (followed, chance)
    assert max(followed) > 0.95


def test_all_shapes_once_and_the_best_within_bounds(tmp_path: Path) -> None:
    """Guards against shapes tried twice, bounds with the wrong sign, and a best that breaks them."""
    settings = SMALL.model_copy(update={"trials": 99, "keep": 1.0})
    trained: list[StudentSettings] = []

    def noted(student: StudentSettings, report: Report) -> float:
        trained.append(student)
        return proxy(student, report)

    found = search(settings, BASE, tmp_path, measure=measure, proxy=noted)
    every = [student_of(BASE, shape) for shape in settings.all_shapes()]
    tried = [shape_of(trial.student) for trial in found.trials]
    assert len(tried) == len(set(tried)) and set(tried) == set(map(shape_of, every))
    within = [student for student in every if measure(student).ratio <= 0.5]
    assert 0 < len(within) < len(every), "the bound must matter"
    assert set(map(shape_of, trained)) == set(map(shape_of, within)) and len(trained) == len(within)
    assert quality(found.best.student) == max(map(quality, within)) < max(map(quality, every))
    assert {trial.state for trial in found.trials} == {"trained", "out of bounds"}


def test_the_sampler_is_told_by_how_much_a_shape_is_out_of_bounds(found: tuple[Architecture, Path]) -> None:
    """Guards against bounds that only end trials: the sampler would take what broke them for merely stopped."""
    search_, folder = found
    study = optuna.load_study(study_name="architecture", storage=f"sqlite:///{folder / DATABASE_NAME}")
    finished = [one for one in study.trials if one.state.is_finished()]
    assert [one.constraints for one in finished] == [excesses(SMALL, one.measured) for one in search_.trials]
    assert any(one.constraints["latency_ratio"] > 0 for one in finished)


def test_a_trial_is_stopped_when_others_were_better_at_the_same_step(tmp_path: Path) -> None:
    """Guards against a search that trains bad shapes to their end, or lets a stopped one win by what it returned."""
    said: dict[tuple[int | None, ...], bool] = {}

    def greedy(student: StudentSettings, report: Report) -> float:
        stop = [report(step, quality(student) * step / 3) for step in (1, 2)]
        said[shape_of(student)] = any(stop)
        return 9.0 if any(stop) else quality(student)

    settings = SMALL.model_copy(update={"trials": 8, "latency_ratio": None})
    found = search(settings, BASE, tmp_path, measure=measure, proxy=greedy)
    assert {shape_of(one.student): one.state == "stopped" for one in found.trials} == said
    assert 0 < sum(said.values()) < len(said)
    assert found.best.quality == quality(found.best.student) < 9
    stopped = next(trial for trial in found.trials if trial.state == "stopped")
    assert stopped.quality is not None and stopped.quality < found.best.quality


def test_a_search_that_was_killed_ends_as_one_that_was_not(found: tuple[Architecture, Path], tmp_path: Path) -> None:
    """Guards against trials lost, repeated or drawn otherwise after a kill, and one that stays under way for ever."""
    whole, _ = found
    code = (
        "import importlib.util, os, signal, sys; from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('toys', {__file__!r})\n"
        "toys = importlib.util.module_from_spec(spec); spec.loader.exec_module(toys); calls = []\n"
        "def deadly(student, report):\n"
        "    calls.append(report(1, toys.quality(student) / 3))\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 3 else toys.proxy(student, report)\n"
        "toys.search(toys.SMALL, toys.BASE, Path(sys.argv[1]), measure=toys.measure, proxy=deadly)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    again: list[StudentSettings] = []

    def counted(student: StudentSettings, report: Report) -> float:
        again.append(student)
        return proxy(student, report)

    resumed = search(SMALL, BASE, tmp_path, measure=measure, proxy=counted)
    assert outcome(resumed) == outcome(whole)
    assert len(again) == SMALL.trials - 2
    study = optuna.load_study(study_name="architecture", storage=f"sqlite:///{tmp_path / DATABASE_NAME}")
    left = [one.state for one in study.trials if not one.state.is_finished()]
    assert not left and sum(one.state == TrialState.FAIL for one in study.trials) == 1


def test_an_interrupted_trial_is_taken_up_again(found: tuple[Architecture, Path], tmp_path: Path) -> None:
    """Guards against Ctrl-C that costs the shape it hit, and a finished search that trains when it is called again."""
    whole, _ = found
    tried: list[StudentSettings] = []

    def interrupted(student: StudentSettings, report: Report) -> float:
        tried.append(student)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return proxy(student, report)

    with pytest.raises(KeyboardInterrupt):
        search(SMALL, BASE, tmp_path, measure=measure, proxy=interrupted)
    resumed = search(SMALL, BASE, tmp_path, measure=measure, proxy=interrupted)
    assert tried[1] == tried[2] and outcome(resumed) == outcome(whole)
    count = len(tried)
    assert outcome(search(SMALL, BASE, tmp_path, measure=measure, proxy=interrupted)) == outcome(whole)
    assert len(tried) == count


def test_other_settings_are_refused_and_more_trials_are_not(found: tuple[Architecture, Path]) -> None:
    """Guards against one study that mixes trials of different data or bounds, and one that can never be extended."""
    _, folder = found
    changes = {"latency_ratio": 0.4, "texts": 7}
    with pytest.raises(SettingsError) as refused:
        search(
            SMALL.model_copy(update=changes),
            BASE.model_copy(update={"tokens": 16}),
            folder,
            measure=measure,
            proxy=proxy,
            subject={"lessons": "other"},
        )
    for line in ("latency_ratio was 0.5 and is 0.4", "texts was 20000 and is 7", "student.tokens was null and is 16"):
        assert line in str(refused.value)
    assert 'subject.lessons was null and is "other"' in str(refused.value)
    before = len(search(SMALL, BASE, folder, measure=measure, proxy=proxy).trials)
    more = search(SMALL.model_copy(update={"trials": 6}), BASE, folder, measure=measure, proxy=proxy)
    assert len(more.trials) > before


def test_bounds_that_nothing_keeps_are_refused_at_once_and_can_be_loosened(tmp_path: Path) -> None:
    """Guards against hours of measuring shapes larger than one that is too large, and a folder that is spoilt by it."""
    tight = SMALL.model_copy(update={"bytes": 10})
    calls: list[StudentSettings] = []

    def counted(student: StudentSettings) -> Measured:
        calls.append(student)
        return measure(student)

    with pytest.raises(SettingsError, match=r"smallest shape \(depth 1, width 32, .* breaks bytes 10: .* 8,192 bytes"):
        search(tight, BASE, tmp_path, measure=counted, proxy=proxy)
    assert len(calls) == 1
    loose = SMALL.model_copy(update={"trials": 1})
    assert len(search(loose, BASE, tmp_path, measure=measure, proxy=proxy).trained) == 1


def test_a_quality_that_is_not_finite_never_wins(tmp_path: Path) -> None:
    """Guards against a diverged student that is the best because nothing compares with NaN, or that ends the search."""
    settings = SMALL.model_copy(update={"trials": 3, "keep": 1.0, "latency_ratio": None})
    values = iter([math.nan, 0.5, math.inf])
    found = search(settings, BASE, tmp_path, measure=measure, proxy=lambda student, report: next(values))
    assert [trial.state for trial in found.trials] == ["stopped", "trained", "stopped"]
    assert found.best.quality == 0.5 and "0.5000" in found.table()


def test_no_trial_begins_after_the_time_is_up(tmp_path: Path) -> None:
    """Guards against a limit that counts each call anew, or not at all."""
    settings = SMALL.model_copy(update={"minutes": 1e-9})
    for _ in range(2):
        assert len(search(settings, BASE, tmp_path, measure=measure, proxy=proxy).trials) == 1


def test_the_front_is_what_nothing_beats(found: tuple[Architecture, Path], tmp_path: Path) -> None:
    """Guards against a front with the sign of one of its axes turned, or one of stopped trials."""
    generator = np.random.default_rng(0)
    trials = [
        Trial(
            number=number,
            student=BASE,
            state="trained" if number % 4 else "stopped",
            measured=Measured(float(generator.integers(1, 6)), int(generator.integers(1, 6)), 2.0),
            quality=float(generator.integers(1, 6)),
        )
        for number in range(40)
    ]
    architecture = Architecture(tuple(trials), {})
    figures = {
        one.number: (one.quality or 0.0, -one.measured.milliseconds, -one.measured.bytes)
        for one in trials
        if one.state == "trained"
    }
    slow = {
        number
        for number, mine in figures.items()
        if not any(
            all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in figures.values()
        )
    }
    assert {trial.number for trial in architecture.front} == slow and 1 < len(slow) < len(figures)
    search_, _ = found
    search_.write(tmp_path)
    described = json.loads((tmp_path / "architecture.json").read_text())
    assert described["trials"][described["best"]]["quality"] == search_.best.quality
    assert described["architecture"]["latency_ratio"] == 0.5 and len(described["trials"]) == len(search_.trials)
    marked = {int(line.split()[1]) for line in search_.table().splitlines() if line.startswith("*")}
    assert marked == set(described["front"]) == {trial.number for trial in search_.front}


def test_a_recipe_takes_the_table_that_a_search_wrote(tmp_path: Path) -> None:
    """Guards against a fragment that loses a setting, or that TOML does not read."""

    class Holder(Group):
        student: StudentSettings = StudentSettings()

    shape: Shape = {"depth": 2, "width": 96, "heads": 4, "feed_forward": 256, "vocabulary": 5_000}
    base = StudentSettings(tokens=24, embeddings="random", freeze_embeddings=False, freeze_layers=(0,), seed=3)
    shaped = student_of(base, shape)
    assert shaped == base.model_copy(update={"init": "scratch", **shape}), "all else stays"
    for student in (shaped, student_of(StudentSettings(), shape | {"vocabulary": None})):
        path = tmp_path / "architecture.toml"
        path.write_text(student_toml(student))
        assert load(Holder(), path, {}).student == student


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": (33,), "heads": (4, 8)}, "width 33 is no multiple of any of heads"),
        ({"depth": (3, 2)}, "depth .* ascending order"),
        ({"feed_forward": tuple(range(1, 19_999))}, "combinations are more than 100,000"),
    ],
)
def test_choices_that_cannot_be_searched_are_refused(change: dict[str, object], words: str) -> None:
    """Guards against a choice that is silently never drawn."""
    with pytest.raises(ValueError, match=words):
        ArchitectureSettings.model_validate({**SMALL.model_dump(), **change})
