"""A search over a federation's settings, as an operator runs it, and what several ledgers cost together."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.held_back import set_held_back_key
from stillroom_client.participation import LEDGER_FILE as DEVICE_LEDGER
from stillroom_client.participation import Consent
from stillroom_client.scoring import held_back_difference, held_back_queries
from stillroom_server.adapters import ADAPTERS_FOLDER
from stillroom_server.coordinate import LEDGER_FILE, Coordinator
from stillroom_server.plan import PLAN_FILE, Plan
from stillroom_server.search import KEY_FILE, SELECTED_FOLDER, TRIALS_FOLDER, Search, notes
from stillroom_server.search_plan import Candidate, Outcome, SearchPlan
from stillroom_server.verdict import evaluations_in
from stillroom_shared.accounting import epsilon
from stillroom_shared.adapter import Adapter
from stillroom_shared.cli import build_app
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import BudgetError, LedgerError, SettingsError, StillroomError
from stillroom_shared.events import Event, SampledGaussian, Selection, Unprotected
from stillroom_shared.ledger import Ledger
from stillroom_shared.release import Release, open_adapter, open_release, seal_adapter
from stillroom_shared.settings import load_settings
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import COORDINATOR, OBSERVERS, READERS, PrivacyStatement, printed_epsilon
from stillroom_simulations.epsilon_context import check_epsilon_context
from stillroom_simulations.federation import (
    BatchedUpdates,
    SilentDevicesError,
    make_plan,
    mine_population,
    run_federation,
)
from stillroom_simulations.joint_audit import audit_jointly, audit_search
from stillroom_simulations.trial_plan import with_candidate
from stillroom_simulations.tuning import (
    HELD_BACK,
    FederationTrials,
    Tuning,
    _search_plan,
    candidate_grid,
    open_tuning,
    prepare_tuning,
    tuning_cost,
)

TEXTS = ("open the zip file", "list the members", "sort a list of words", "a tapir eats leaves", "read the index")
DEVICES = 4
TUNE = (
    "--candidate", "rounds.clip_norm=0.1,0.3", "--candidate", "rounds.local_learning_rate=0.5,1", "--trials", "3",
    "--shape", "2", "--budget", "9", "--set", "evaluation.noise_multiplier=20", "--set", "evaluation.held_back=0.4",
    "--set", "rounds.noise_multiplier=8", "--set", "rounds.rounds=2", "--set", "rounds.sampling_rate=1", "--set",
    "rounds.delta=1e-3", "--set", "rounds.candidates=3", "--set", "seed=2",
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
            set_held_back_key(device, bytes([number]) * 32)
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
    with Ledger.open(home / LEDGER_FILE) as ledger:
        cost = printed_epsilon(epsilon(ledger.events(), 1e-3))
    [row] = [line for line in output.splitlines() if line.startswith("negative binomial")]
    assert row.split()[-3] == cost == printed_epsilon(readers), "what is printed beforehand is what is charged"
    assert stated.accountant == "RDP" and stated.search is not None
    for device in sorted((finished / "devices").iterdir()):
        with Ledger.open(device / DEVICE_LEDGER) as ledger:
            joined = [purpose for purpose in ledger.purposes() if "-trial-" in purpose["federation"]]
            assert len(joined) == 3 * trials, "a device takes part in every trial, and its own ledger adds up"
            assert sum("evaluation" in purpose for purpose in joined) == trials
    with Device.open(finished / "devices" / "d0", release=release) as opened:
        opened.adopt(home / SELECTED_FOLDER)


def test_the_same_command_again_changes_nothing(finished: Path) -> None:
    """A search that is drawn again each time it is called costs once and looks many times."""
    with Ledger.open(finished / "search" / LEDGER_FILE) as ledger:
        before = ledger.head
    assert command("tune", str(finished), *TUNE).exit_code == 0
    with Ledger.open(finished / "search" / LEDGER_FILE) as ledger:
        assert ledger.head == before
    for change in (
        "rounds.noise_multiplier=4",
        "rounds.momentum=0.1",
        "evaluation.noise_multiplier=2",
        "evaluation.bound=0.2",
        "evaluation.held_back=0.3",
    ):
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


def begin_again(path: Path, plan: Plan) -> None:
    """The ledger of a trial, as it were if the trial had had this plan."""
    with Coordinator(path) as trial:
        charges = list(zip(trial.ledger.events(), trial.ledger.purposes(), strict=True))
        key, about = trial.key, {"federation": plan.federation, "plan": plan.content_hash}
    (path / PLAN_FILE).write_text(plan.model_dump_json())
    shutil.rmtree(path / ADAPTERS_FOLDER)
    Ledger.begin(path / LEDGER_FILE, key=key, about=about, spends=charges)


def enrol_others(home: Path) -> None:
    """A trial on devices that the search was not about."""
    path = home / TRIALS_FOLDER / "0001"
    begin_again(path, Plan.load(path).model_copy(update={"enrolled": ("d0", "d1", "d2", "d9")}))


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
        (enrol_others, "0001 enrolled other devices"),
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
    budget_epsilon=9.0,
)  # fmt: skip
QUIET = {
    "evaluation.noise_multiplier": "20",
    "evaluation.held_back": "0.4",
    "rounds.delta": "1e-3",
    "rounds.candidates": "3",
}


def test_a_target_epsilon_is_met_by_the_whole_search(finished: Path, tmp_path: Path) -> None:
    """Noise that is calibrated for one trial: the search passes the target, or is refused."""
    target = {
        "rounds.rounds": "2",
        "rounds.noise_multiplier": "none",
        "rounds.target_epsilon": "3",
        "rounds.delta": "1e-3",
    }
    for retries in (0, 3):
        asked = replace(ASKED, retries=retries)
        trials = prepare_tuning(load_settings(None, QUIET | target), finished, tmp_path / str(retries), asked)
        reserved, search = trials.plan.events(trials)
        assert len(reserved) == 2 * retries, "a round and an evaluation"
        cost = epsilon([*reserved, search], 1e-3)
        assert 2.9 < cost <= 3.0 and tuning_cost(trials).search == cost
    with pytest.raises(BudgetError, match="even at noise multiplier 1,000"):
        harder = QUIET | target | {"rounds.target_epsilon": "0.2"}
        prepare_tuning(load_settings(None, harder), finished, tmp_path / "b", ASKED)
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


@pytest.fixture
def run(tmp_path: Path, tiny_release: Release, signing_key: SigningKey) -> Path:
    """A demo's folder, to search over."""
    return settle(tmp_path / "run", tiny_release, signing_key)


def test_a_trial_is_scored_by_the_private_evaluation_on_what_no_trial_trains_on(finished: Path, tmp_path: Path) -> None:
    """A score beside the ledgers of the devices, or on the queries that were trained on."""
    release, home = open_release(finished / "release", trusted_key=None), finished / "search"
    encoder, trials = Encoder(release), len(drawn_of(home))
    trained_on = prepare_tuning(load_settings(None, QUIET), finished, tmp_path / "again", ASKED).records(3)
    with Ledger.open(home / LEDGER_FILE) as ledger:
        scores = {note["trial"]: note["score"] for note in notes(ledger, "finished")}
    assert len(set(scores.values())) == trials, "each trial has noise of its own"
    asked = {name: 0 for name in ("train", "score")}
    for number in range(1, trials + 1):
        with Coordinator(home / TRIALS_FOLDER / f"{number:04d}") as trial:
            [found] = evaluations_in(trial.ledger.rows())
            assert (found.difference, found.held_back, found.baseline) == (scores[number], 0.4, 0)
            adapter, zero = trial.adapter, Adapter.zero(trial.spec)
        truth = []
        for home_of_device in sorted((finished / "devices").iterdir()):
            with Device.open(home_of_device, release=release) as device:
                own = held_back_difference(device, encoder, zero, adapter, share=0.4, cutoff=10)
                scored = set(held_back_queries(device, 0.4))
                trained = {query for query, _ in device.feedback()} - scored
            assert len(trained_on[str(home_of_device)]) == len(trained)
            asked["train"], asked["score"] = asked["train"] + len(trained), asked["score"] + len(scored)
            truth.append(min(max(own or 0.0, -found.bound), found.bound))
        assert abs(found.difference - sum(truth) / DEVICES) < 5 * found.noise
    assert min(asked.values()) > 0, "the guard: both sides have queries"


def test_without_a_share_in_the_settings_trials_hold_one_back(run: Path, tmp_path: Path) -> None:
    """The settings of a demo hold nothing back: trials would be scored by what they were trained on."""
    trials = prepare_tuning(load_settings(None, {"rounds.delta": "1e-3"}), run, tmp_path / "search", ASKED)
    assert trials.base.evaluation.held_back == HELD_BACK
    rounds, evaluation = trials.events({})[:-1], trials.events({})[-1]
    plan = trials._plan({}, 1)
    order = plan.evaluation(number=1, round_number=1, attempt=1, release=trials.release.id)
    assert plan.held_back == HELD_BACK and evaluation == order.build_mechanism().event()
    assert len(rounds) == plan.rounds and trials.retry({}) == [rounds[0], evaluation]
    with pytest.raises(SettingsError, match=r"rounds\.rounds is 0"):
        prepare_tuning(load_settings(None, QUIET | {"rounds.rounds": "0"}), run, tmp_path / "none", ASKED)


class Swapped:
    """Trials, each of which runs another candidate than the one it drew."""

    def __init__(self, trials: FederationTrials) -> None:
        self.trials, self.events, self.retry = trials, trials.events, trials.retry

    def run(self, candidate: Candidate, number: int) -> Outcome:
        [other] = [own for own in self.trials.plan.candidates if own != candidate]
        return self.trials.run(other, number)


def test_a_search_whose_trials_did_not_run_what_they_drew_is_named(run: Path, tmp_path: Path) -> None:
    """Drawn blindly on paper: the operator runs what he likes, or what costs more than was drawn."""
    settings = load_settings(None, QUIET | {"rounds.rounds": "1", "rounds.sampling_rate": "1"})
    for choice in ("rounds.server_learning_rate=0.2,0.5", "rounds.noise_multiplier=4,8"):
        home = tmp_path / choice.split(",")[0]
        asked = replace(
            ASKED, choices=[choice], distribution="negative-binomial", mean_trials=1.01, budget_epsilon=20.0
        )
        trials = prepare_tuning(settings, run, home, asked)
        with Search(home, Swapped(trials), release_id=trials.release.id) as search:
            search.run()
        name = choice.split("=")[0].removeprefix("rounds.")
        with pytest.raises(LedgerError, match=rf"0001 is not the trial 1 .* that was drawn.*: it has {name}"):
            audit_search(home)


class Cheaper:
    """Trials that tell the search that their evaluation has more noise than it has."""

    def __init__(self, trials: FederationTrials) -> None:
        self.trials, self.run = trials, trials.run

    def events(self, candidate: Candidate) -> list[Event]:
        *rounds, evaluation = self.trials.events(candidate)
        assert isinstance(evaluation, SampledGaussian)
        return [*rounds, replace(evaluation, noise_multiplier=2 * evaluation.noise_multiplier)]

    def retry(self, candidate: Candidate) -> list[Event]:
        return self.events(candidate)


def test_a_search_that_was_charged_for_other_trials_is_named(run: Path, tmp_path: Path) -> None:
    """Each trial is what it drew, and the search was charged as if that cost less."""
    settings = load_settings(None, QUIET | {"rounds.rounds": "1", "rounds.sampling_rate": "1"})
    asked = replace(ASKED, distribution="negative-binomial", mean_trials=1.01)
    trials = prepare_tuning(settings, run, tmp_path / "search", asked)
    with Search(tmp_path / "search", Cheaper(trials), release_id=trials.release.id) as search:
        search.run()
    with pytest.raises(LedgerError, match=r"0001 is a trial that releases .* was not charged for"):
        audit_search(tmp_path / "search")


def test_an_interrupted_evaluation_is_charged_again_and_stays_within_what_was_reserved(
    run: Path, tmp_path: Path
) -> None:
    """Killed between the charge and the noise: nobody knows what was seen, and the score is drawn anew."""
    settings = load_settings(None, QUIET | {"rounds.rounds": "1", "rounds.sampling_rate": "1"})
    asked = replace(ASKED, distribution="negative-binomial", mean_trials=1.01)
    trials = prepare_tuning(settings, run, tmp_path / "search", asked)
    [first, *_] = homes = list(trials.devices.values())
    with open_tuning(trials) as search:
        drawn = search._charge(*search._events())
        search._begin(1)
        plan = trials._plan(trials.plan.candidates[drawn[0]], 1)
    trial = trials._home(1)
    updates = BatchedUpdates(trials.trainer, trials.records(plan.candidates))
    run_federation(trial, plan, homes, updates, operator=trials.operator, block=4)
    with Coordinator(trial) as coordinator:
        order = plan.evaluation(number=1, round_number=1, attempt=2, release=trials.release.id)
        charged = {"evaluation": 1, "attempt": 2, "after": 1}
        coordinator.ledger.spend(order.build_mechanism().event(), budget=plan.budget, purpose=charged)
    with open_tuning(trials) as search:
        assert search.run() is not None
    with Coordinator(trial) as coordinator:
        assert len(coordinator.ledger.events()) == 3 and len(evaluations_in(coordinator.ledger.rows())) == 1
    with Ledger.open(first / DEVICE_LEDGER) as ledger:
        assert [purpose["attempt"] for purpose in ledger.purposes() if purpose["round"] == 1][:2] == [1, 3]
    audit_search(tmp_path / "search")


@pytest.mark.parametrize(("fit", "named"), [(0, "1 devices sent zero"), (1, "1 devices did not score")])
def test_a_device_that_stops_answering_ends_the_search_for_good(
    run: Path, tmp_path: Path, fit: int, named: str
) -> None:
    """Trials with fewer devices than were charged for, compared with the others as if they were alike."""
    settings = load_settings(None, QUIET | {"rounds.rounds": "1", "rounds.sampling_rate": "1"})
    asked = replace(ASKED, distribution="negative-binomial", mean_trials=1.01, retries=2)
    trials = prepare_tuning(settings, run, tmp_path / "search", asked)
    limit = epsilon(trials.events(trials.plan.candidates[0])[:fit], 1e-5) + 1e-6
    Consent(limit_epsilon=limit, limit_delta=1e-5).save(run / "devices" / "d1")
    for _ in range(2):
        with open_tuning(trials) as search, pytest.raises(SilentDevicesError, match=named):
            search.run()
    with Coordinator(trials._home(1)) as coordinator:
        assert len(coordinator.ledger.events()) == 1 + fit, "nothing more was asked"
