"""A search over a federation's settings, as an operator runs it, and what several ledgers cost together."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from stillroom_client.device import Device
from stillroom_client.participation import LEDGER_FILE as DEVICE_LEDGER
from stillroom_client.training import Record
from stillroom_server.coordinate import LEDGER_FILE, Coordinator
from stillroom_server.search import KEY_FILE, SELECTED_FOLDER, TRIALS_FOLDER
from stillroom_server.search_plan import SearchPlan
from stillroom_shared.accounting import epsilon
from stillroom_shared.cli import build_app
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import BudgetError, SettingsError, StillroomError
from stillroom_shared.events import Event, SampledGaussian, Selection, Unprotected
from stillroom_shared.ledger import Ledger
from stillroom_shared.mechanism import RESOLUTION, Central
from stillroom_shared.release import Release, open_adapter, open_release, seal_adapter
from stillroom_shared.settings import load_settings
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import COORDINATOR, OBSERVERS, READERS, PrivacyStatement
from stillroom_simulations.epsilon_context import check_epsilon_context
from stillroom_simulations.federation import BatchedUpdates, make_plan, mine_population, run_federation
from stillroom_simulations.joint_audit import audit_jointly, audit_search
from stillroom_simulations.tuning import RankScore, Tuning, _search_plan, candidate_grid, prepare_tuning, with_candidate

TEXTS = ("open the zip file", "list the members", "sort a list of words", "a tapir eats leaves", "read the index")
DEVICES = 4
TUNE = (
    "--candidate", "rounds.clip_norm=0.1,0.3", "--candidate", "rounds.local_learning_rate=0.5,1", "--trials", "3",
    "--shape", "2", "--evaluation-noise", "20", "--budget", "9", "--set", "rounds.noise_multiplier=8", "--set",
    "rounds.rounds=2", "--set", "rounds.sampling_rate=1", "--set", "rounds.delta=1e-3", "--set", "rounds.candidates=3",
    "--set", "seed=2",
)  # fmt: skip


def command(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), list(arguments))


def audit(*homes: Path) -> Result:
    return command("audit", "ledger", *map(str, homes))


def settle(folder: Path, release: Release, key: SigningKey) -> Path:
    """What `stillroom demo` leaves, as far as a search reads it."""
    shutil.copytree(release.folder, folder / "release")
    key.save(folder / "operator.key")
    release = open_release(folder / "release", trusted_key=key.public)
    for number in range(DEVICES):
        with Device.create(folder / "devices" / f"d{number}", release, link=True) as device:
            device.add(Passage(f"p{i}", "own", f"{text} {'again ' * number}") for i, text in enumerate(TEXTS))
            device.record([(f"how do i {text}", f"p{i}") for i, text in enumerate(TEXTS[: number + 1])])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_release: Release, signing_key: SigningKey) -> Path:
    """A demo's folder with a finished search; for reading only."""
    run = settle(tmp_path_factory.mktemp("tuning") / "run", tiny_release, signing_key)
    done = command("tune", str(run), *TUNE)
    assert done.exit_code == 0, done.output
    (run / "output.txt").write_text(done.output)
    return run


@pytest.fixture
def search(finished: Path, tmp_path: Path) -> Path:
    """A copy of the search's home, to break."""
    shutil.copytree(finished / "release", tmp_path / "release")
    return Path(shutil.copytree(finished / "search", tmp_path / "search"))


def drawn_of(home: Path) -> list[int]:
    with Ledger.open(home / LEDGER_FILE) as ledger:
        return next(list(purpose["drawn"]) for purpose in ledger.purposes() if "drawn" in purpose)


def test_an_operator_searches_and_devices_adopt_what_the_search_cost(finished: Path, signing_key: SigningKey) -> None:
    """An adapter that was the best of several and states the epsilon of one."""
    output, home = (finished / "output.txt").read_text(), finished / "search"
    for words in ("uncharged: WRONG", "trial 1 of", "best ", "search over settings", "rounds.clip_norm"):
        assert words in output
    check_epsilon_context(f"<pre>{output}</pre>")
    trials = len(drawn_of(home))
    assert trials >= 2, "choose another seed"
    release = open_release(finished / "release", trusted_key=signing_key.public)
    sealed = open_adapter(home / SELECTED_FOLDER, release=release, trusted_key=signing_key.public)
    stated = PrivacyStatement.model_validate(sealed.statement)
    with Coordinator(home / TRIALS_FOLDER / "0001") as trial:
        assert len(trial.ledger.events()) == 3, "two rounds and the evaluation"
        alone = epsilon(trial.ledger.events(), 1e-3, "RDP")
        assert set(trial.statement().against.values()) == {None}, "a trial promises nothing by itself"
    readers = stated.against[READERS]
    assert readers is not None and readers > alone
    assert stated.accountant == "RDP" and stated.search is not None
    for device in sorted((finished / "devices").iterdir()):
        with Ledger.open(device / DEVICE_LEDGER) as ledger:
            joined = [purpose for purpose in ledger.purposes() if "-trial-" in purpose["federation"]]
            assert len(joined) == 2 * trials, "a device takes part in every trial, and its own ledger adds up"
    with Device.open(finished / "devices" / "d0", release=release) as opened:
        opened.adopt(home / SELECTED_FOLDER)


def test_the_same_command_again_changes_nothing(finished: Path) -> None:
    """A search that is drawn again each time it is called costs once and looks many times."""
    with Ledger.open(finished / "search" / LEDGER_FILE) as ledger:
        before = ledger.head
    assert command("tune", str(finished), *TUNE).exit_code == 0
    with Ledger.open(finished / "search" / LEDGER_FILE) as ledger:
        assert ledger.head == before
    for change in ("rounds.noise_multiplier=4", "rounds.momentum=0.1"):
        other = command("tune", str(finished), *TUNE, "--set", change)
        assert other.exit_code == 1 and "holds another search" in other.output, "settings that are not charged"


def test_the_audit_of_a_search_tells_readers_from_those_who_saw_the_trials(finished: Path) -> None:
    """One figure for both would be wrong for one of them."""
    done = audit(finished / "search")
    assert done.exit_code == 0, done.output
    found = audit_search(finished / "search")
    trials = len(drawn_of(finished / "search"))
    assert found.trials == trials and f"{trials} trials were run" in done.output
    assert len(found.observed) == 3 * trials
    assert f"{math.ceil(epsilon(found.observed, 1e-3) * 100) / 100:.2f} (user level" in done.output
    assert all(isinstance(event, SampledGaussian) and event.sampling_rate == 1 for event in found.observed)
    check_epsilon_context(f"<pre>{done.output}</pre>")
    assert "No guarantee by itself" in audit(finished / "search" / TRIALS_FOLDER / "0001").output


def spend_in_a_trial(home: Path) -> None:
    """A round more than was charged, and one more than was reserved."""
    path = home / TRIALS_FOLDER / "0001"
    with Coordinator(path) as trial:
        for attempt in (2, 3):
            event = trial.ledger.events()[0]
            trial.ledger.spend(event, budget=None, purpose={"round": 9, "attempt": attempt})


def seal_another(home: Path) -> None:
    """The outcome of a trial that was not the best, or of none."""
    folder = home / SELECTED_FOLDER
    plan, key = SearchPlan.load(home), SigningKey.load(home / KEY_FILE)
    with Ledger.open(home / LEDGER_FILE) as ledger:
        made = plan.statement(ledger.events())
    shutil.rmtree(folder)
    with Coordinator(home / TRIALS_FOLDER / "0001") as trial:
        other = trial.adapter_after(0)
        seal_adapter(
            folder, other, release_id=trial.release.id, round=2, statement=made.model_dump(mode="json"), key=key
        )


def claim_less(home: Path) -> None:
    """The best adapter, sealed with the epsilon of one trial."""
    from stillroom_shared.adapter import Adapter
    from stillroom_shared.release import ADAPTER_NAME

    folder = home / SELECTED_FOLDER
    plan, key = SearchPlan.load(home), SigningKey.load(home / KEY_FILE)
    best = Adapter.load(folder / ADAPTER_NAME)
    with Ledger.open(home / LEDGER_FILE) as ledger:
        [search] = [event for event in ledger.events() if isinstance(event, Selection)]
    one: list[Event] = [event for event, count in search.trials[0] for _ in range(count)]
    claimed = plan.statement(one).model_copy(update={"search": search.repetitions.words})
    shutil.rmtree(folder)
    seal_adapter(folder, best, release_id="r", round=2, statement=claimed.model_dump(mode="json"), key=key)


def add_a_trial(home: Path) -> None:
    """A trial that nobody drew."""
    shutil.copytree(home / TRIALS_FOLDER / "0001", home / TRIALS_FOLDER / "0099")


def lose_a_row(home: Path) -> None:
    """The note of the last trial."""
    import sqlite3

    with sqlite3.connect(home / LEDGER_FILE) as database:
        database.execute("DELETE FROM ledger WHERE seq = 3")
    database.close()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (spend_in_a_trial, "which the search neither charged nor reserved"),
        (seal_another, "is not what the best trial"),
        (claim_less, "do not trust that adapter"),
        (add_a_trial, "is no trial that"),
        (lose_a_row, "row 3 is missing"),
    ],
)
def test_a_search_that_does_not_hold_is_named(search: Path, damage: Callable[[Path], None], named: str) -> None:
    """A discount is claimed for something that is not the outcome of the search that was charged."""
    damage(search)
    with pytest.raises(StillroomError, match=named):
        audit_search(search)
    assert audit(search).exit_code == 1


def federate(run: Path, home: Path, release: Release, key: SigningKey, name: str) -> Path:
    """A further run over the same devices."""
    overrides = {"rounds.rounds": "2", "rounds.noise_multiplier": "5", "rounds.candidates": "3", "rounds.delta": "1e-3"}
    rounds = load_settings(None, overrides | {"rounds.sampling_rate": "0.5"}).rounds
    homes = sorted((run / "devices").iterdir())
    plan = make_plan(
        rounds, name=name, release_folder=release.folder, enrolled=[path.name for path in homes],
        dimension=release.adapter_spec.size, seed=name,
    )  # fmt: skip
    from stillroom_client.training import Trainer

    records = mine_population(homes, release, candidates=3, threads=1)
    updates = BatchedUpdates(Trainer(release.folder, release.adapter_spec), records)
    run_federation(home, plan, homes, updates, operator=key, block=4)
    return home


def test_federations_and_searches_over_the_same_devices_add_up(
    finished: Path, tmp_path: Path, tiny_release: Release, signing_key: SigningKey
) -> None:
    """Each release with its own small epsilon, and nobody who adds them."""
    first = federate(finished, tmp_path / "first", tiny_release, signing_key, "first")
    second = federate(finished, tmp_path / "second", tiny_release, signing_key, "second")
    events: list[Event] = []
    for home in (first, second):
        with Ledger.open(home / LEDGER_FILE) as ledger:
            events += ledger.events()
    joint = audit_jointly([first, second])
    assert joint.against[READERS] == pytest.approx(epsilon(events, 1e-3))
    unsampled = [event.without_sampling() for event in events if not isinstance(event, Unprotected)]
    assert joint.against[OBSERVERS] == pytest.approx(epsilon(unsampled, 1e-3))
    assert joint.against[COORDINATOR] is None and joint.accountant == "PLD"
    assert audit_jointly([first, second], delta=1e-4).against[READERS] == pytest.approx(epsilon(events, 1e-4))

    everything = audit_jointly([first, finished / "search", second])
    with Ledger.open(finished / "search" / LEDGER_FILE) as ledger:
        events += ledger.events()
    assert everything.against[READERS] == pytest.approx(epsilon(events, 1e-3)) and everything.accountant == "RDP"
    readers, before = everything.against[READERS], joint.against[READERS]
    assert readers is not None and before is not None and readers > before
    seen = [*unsampled, *audit_search(finished / "search").observed]
    assert everything.against[OBSERVERS] == pytest.approx(epsilon(seen, 1e-3))
    done = audit(first, finished / "search", second)
    assert done.exit_code == 0 and "Together, for a device that is enrolled in all 3" in done.output
    check_epsilon_context(f"<pre>{done.output}</pre>")


def test_what_cannot_be_added_up_is_refused(
    finished: Path, search: Path, tmp_path: Path, tiny_release: Release, signing_key: SigningKey
) -> None:
    """A ledger that does not verify, a copy that counts twice, or a trial without its search."""
    import sqlite3

    first = federate(finished, tmp_path / "first", tiny_release, signing_key, "third")
    for homes, named in (
        ((finished / "search", search), "are one ledger or copies of it"),
        ((first, first), "are one ledger or copies of it"),
        ((first, finished / "search" / TRIALS_FOLDER / "0001"), "costs what that search costs"),
    ):
        done = audit(*homes)
        assert done.exit_code == 1 and named in done.output
    with sqlite3.connect(first / LEDGER_FILE) as database:
        database.execute("UPDATE ledger SET body = replace(body, '5.0', '9.0') WHERE seq = 2")
    database.close()
    done = audit(finished / "search", first)
    assert done.exit_code == 1 and "row 2 was altered" in done.output


ASKED = Tuning(
    choices=["rounds.clip_norm=0.1,0.3"], distribution="poisson", mean_trials=2.0, shape=0.0, retries=1,
    budget_epsilon=9.0, evaluation_noise=20.0,
)  # fmt: skip


def test_a_target_epsilon_is_met_by_the_whole_search(finished: Path, tmp_path: Path) -> None:
    """Noise that is calibrated for one trial: the search passes the target, or is refused."""
    target = {
        "rounds.rounds": "2",
        "rounds.noise_multiplier": "none",
        "rounds.target_epsilon": "3",
        "rounds.delta": "1e-3",
    }
    trials = prepare_tuning(load_settings(None, target), finished, tmp_path / "a", ASKED)
    reserved, search = trials.plan.events(trials)
    assert 2.9 < epsilon([*reserved, search], 1e-3) <= 3.0
    with pytest.raises(BudgetError, match="even at noise multiplier 1,000"):
        prepare_tuning(load_settings(None, target | {"rounds.target_epsilon": "0.2"}), finished, tmp_path / "b", ASKED)
    assert not (tmp_path / "b").exists()


def test_only_settings_of_rounds_can_be_searched_over(tmp_path: Path) -> None:
    """A candidate that changes the release, the population or the guarantee itself is no candidate."""
    for key, value in (("seed", "1"), ("adapter.rank", "2"), ("rounds.delta", "0.5"), ("rounds.clip", "1")):
        with pytest.raises(SettingsError):
            with_candidate(load_settings(None, {}), {key: value})
    with pytest.raises(SettingsError, match="offers nothing"):
        candidate_grid(["rounds.clip_norm"])
    for mechanism in ("none", "local"):
        with pytest.raises((SettingsError, BudgetError)):
            _search_plan(
                load_settings(None, {}), replace(ASKED, choices=[f"rounds.mechanism={mechanism}"]), 10, name="x"
            )
    assert "make them with" in command("tune", str(tmp_path), "--candidate", "rounds.clip_norm=0.1").output


def test_a_score_is_the_noisy_mean_of_bounded_device_scores(tiny_release: Release) -> None:
    """A score without noise, or one that a device moves by more than its event says, is a free look at private data."""
    from stillroom_client.training import Trainer
    from stillroom_shared.adapter import Adapter
    from stillroom_shared.randomness import Randomness

    spec = tiny_release.adapter_spec
    trainer = Trainer(tiny_release.folder, spec)
    adapter = Adapter(spec, np.zeros(spec.size, np.float32))
    vector = trainer.encode(adapter, [[2, 10, 3]])[0]
    best = Record(tokens=(2, 10, 3), candidates=np.stack([vector, -vector, -vector]).astype(np.float32))
    worst = Record(tokens=(2, 10, 3), candidates=np.stack([-vector, vector, vector]).astype(np.float32))
    mechanism = Central(clip_norm=1.0, noise_multiplier=2.0, sampling_rate=1.0, devices=4, dimension=1)
    assert mechanism.sensitivity == RESOLUTION
    scorer = RankScore(trainer, mechanism)
    assert scorer.event() == mechanism.event()
    records = {"a": [best, best], "b": [worst], "c": [], "d": [best, worst]}
    expected = (1 + 1 / 3 + 0 + 2 / 3) / 4
    found = [scorer.score(adapter, records, Randomness(seed=f"{i}")) for i in range(400)]
    deviation = 2.0 / 4
    assert abs(np.mean(found) - expected) < 5 * deviation / 20
    assert 0.85 * deviation < np.std(found) < 1.15 * deviation
