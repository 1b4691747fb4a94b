"""An evaluation as a whole: what is charged when, what counts as zero, what the verdict does, and kills in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from stillroom_server.adapters import ADAPTERS_FOLDER
from stillroom_server.app import HOME_KEY, server_app
from stillroom_server.coordinate import KEY_FILE, LEDGER_FILE, Coordinator
from stillroom_server.evaluation import evaluation_app
from stillroom_server.plan import Plan
from stillroom_server.verdict import Evaluation, Policy
from stillroom_shared.accounting import epsilon
from stillroom_shared.errors import BudgetError, LedgerError, SettingsError
from stillroom_shared.events import SampledGaussian
from stillroom_shared.ledger import Ledger
from stillroom_shared.mechanism import RESOLUTION
from stillroom_shared.protocol import enrolment_message, read_evaluation, read_order, update_message
from stillroom_shared.release import Release, open_adapter
from stillroom_shared.signing import SigningKey
from stillroom_simulations.audit import audit_ledger
from stillroom_simulations.engine import InProcessGrid, run_server_app

DEVICES = 40
NAMES = tuple(f"d{i}" for i in range(DEVICES))
Answer = Callable[[Message, Context], Message]


def scoring(difference: float | None) -> Answer:
    """A device whose difference is known."""

    def answer(message: Message, context: Context) -> Message:
        order, _, _ = read_evaluation(message.content)
        return Message(update_message(order.comparison.answer(difference)), reply_to=message)

    return answer


def app_of(behaviours: dict[str, Answer]) -> ClientApp:
    """Devices that train alike and evaluate as they are told."""
    app = ClientApp()

    @app.query("enrol")
    def enrol(message: Message, context: Context) -> Message:
        return Message(enrolment_message(str(context.node_config["name"])), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order, adapter = read_order(message.content)
        raw = np.full(adapter.spec.size, 0.01, np.float32)
        return Message(update_message(order.build_mechanism().bound(raw)), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return behaviours[str(context.node_config["name"])](message, context)

    return app


@pytest.fixture
def make_home(tmp_path: Path, tiny_release: Release, signing_key: SigningKey) -> Callable[..., Path]:
    def make(name: str = "federation", **changes: object) -> Path:
        fields: dict[str, object] = {
            "federation": "test", "release_folder": tiny_release.folder, "enrolled": NAMES, "mechanism": "central",
            "rounds": 4, "sampling_rate": 0.5, "clip_norm": 1.0, "noise_multiplier": 3.0, "budget_epsilon": 50.0,
            "delta": 1e-4, "local_steps": 1, "local_learning_rate": 1.0, "temperature": 0.05, "candidates": 4,
            "server_learning_rate": 1.0, "momentum": 0.9, "averaging": 0.5, "held_back": 0.2, "evaluation_noise": 1.0,
            "rehearsal": True, "seed": "s",
        }  # fmt: skip
        home = tmp_path / name
        Plan(**(fields | changes)).save(home)
        signing_key.save(home / KEY_FILE)
        return home

    return make


class Enough(Exception):
    """Stops a run after some rounds."""


def grid_for(home: Path, behaviours: dict[str, Answer] | None = None) -> InProcessGrid:
    behaviours = behaviours or dict.fromkeys(NAMES, scoring(0.1))
    nodes = {number: {"name": name} for number, name in enumerate(behaviours, start=2)}
    return InProcessGrid(client_app=app_of(behaviours), nodes=nodes, run_config={HOME_KEY: str(home)})


def run_rounds(home: Path, rounds: int | None = None) -> None:
    """Run to the end, or only up to a round."""

    def on_round(report: object) -> None:
        if getattr(report, "round") == rounds:  # noqa: B009
            raise Enough

    if rounds is None:
        run_server_app(server_app(), grid_for(home))
        return
    with pytest.raises(Enough):
        run_server_app(server_app(on_round), grid_for(home))


def judge(
    home: Path, difference: float = 0.1, policy: Policy | None = None, *, different: dict[str, Answer] | None = None
) -> Evaluation:
    """One evaluation in which all devices found the same difference."""
    found: list[Evaluation] = []
    behaviours = dict.fromkeys(NAMES, scoring(difference)) | (different or {})
    run_server_app(evaluation_app(policy or Policy(), found.append), grid_for(home, behaviours))
    return found[0]


def state_of(home: Path) -> tuple[np.ndarray, int, int]:
    """Iterate, rounds and the last rolled-back round."""
    with Coordinator(home) as coordinator:
        return coordinator.adapter.values, len(coordinator.state.history), coordinator.state.restart


def purposes(home: Path) -> list[dict[str, object]]:
    with Ledger.open(home / LEDGER_FILE) as ledger:
        ledger.verify()
        return ledger.purposes()


def test_a_better_candidate_is_published_with_a_statement_that_counts_its_evaluation(
    make_home: Callable[..., Path], tiny_release: Release
) -> None:
    """An evaluation that is left out of the statement is spend that nobody is told of."""
    home = make_home(rounds=2)
    run_rounds(home)
    assert not (home / ADAPTERS_FOLDER).exists(), "nothing is published before it was judged"
    candidate, _, _ = state_of(home)
    found = judge(home)
    assert (found.verdict, found.round, found.baseline, found.attempt) == ("publish", 2, 0, 2)
    assert found.low < 0.1 < found.high
    sealed = open_adapter(home / ADAPTERS_FOLDER / "round-0002", release=tiny_release, trusted_key=None)
    np.testing.assert_array_equal(sealed.adapter.values, candidate)
    with Coordinator(home) as coordinator:
        made = coordinator.statement()
        events = coordinator.ledger.events()
    assert (made.rounds, made.evaluations) == (2, 1)
    assert made.epsilon_pld == epsilon(events, made.delta) > epsilon(events[:2], made.delta)
    assert sealed.statement == made.model_dump(mode="json")
    assert "2 rounds and 1 evaluation cost" in made.paragraph()
    assert audit_ledger(home).adapters == 1
    assert purposes(home)[-1] == {"evaluation": 1, "attempt": 2, "after": 2}
    copy = Evaluation.model_validate_json((home / ADAPTERS_FOLDER / "evaluation-0001.json").read_text())
    assert copy == found


def test_a_worse_candidate_is_rolled_back_and_rounds_go_on_from_what_stands(
    make_home: Callable[..., Path], tiny_release: Release
) -> None:
    """Momentum, averages or round numbers that survive the roll-back bring the bad rounds back, or release one twice."""
    home = make_home()
    run_rounds(home, 1)
    published = judge(home)
    stands, _, _ = state_of(home)
    run_rounds(home, 3)
    assert not np.array_equal(state_of(home)[0], stands)
    found = judge(home, -0.1)
    assert (found.verdict, found.number, found.baseline, found.round) == ("roll back", 2, published.round, 3)
    after, rounds, restart = state_of(home)
    np.testing.assert_array_equal(after, stands)
    assert (rounds, restart) == (3, 3)
    assert len(purposes(home)) == 5, "what was spent stays spent"
    assert not (home / ADAPTERS_FOLDER / "round-0003").exists()
    with pytest.raises(SettingsError, match="round 3 was rolled back"):
        judge(home)
    assert len(purposes(home)) == 5

    run_rounds(home)
    assert [purpose.get("round") for purpose in purposes(home)] == [1, None, 2, 3, None, 4]
    with Coordinator(home) as coordinator:
        step = coordinator.state.iterate - stands
        np.testing.assert_allclose(coordinator.state.velocity, step, atol=1e-6)
        np.testing.assert_allclose(coordinator.adapter.values, coordinator.state.iterate, atol=1e-6)
    again = judge(home)
    assert (again.number, again.baseline, again.verdict) == (3, 1, "publish")
    with pytest.raises(SettingsError, match="is published already"):
        judge(home)


def test_before_anything_was_published_the_release_itself_is_the_baseline(make_home: Callable[..., Path]) -> None:
    """A first adapter that is ruined must not stay because there is nothing to go back to."""
    home = make_home()
    run_rounds(home, 2)
    seen: list[tuple[bool, bool]] = []

    def look(message: Message, context: Context) -> Message:
        _, baseline, candidate = read_evaluation(message.content)
        seen.append((bool(baseline.values.any()), bool(candidate.values.any())))
        return scoring(-0.2)(message, context)

    assert judge(home, -0.2, different={"d0": look}).verdict == "roll back"
    assert seen == [(False, True)]
    assert not state_of(home)[0].any()


def test_the_spend_of_an_evaluation_is_durable_before_any_device_is_asked(make_home: Callable[..., Path]) -> None:
    """A ledger written after the evaluation misses every one that crashes."""
    home = make_home(rounds=1)
    run_rounds(home)
    seen: list[int] = []

    def look(message: Message, context: Context) -> Message:
        seen.append(len(purposes(home)))
        return scoring(0.1)(message, context)

    judge(home, different={"d0": look})
    assert seen == [2]


def test_a_budget_that_would_be_passed_refuses_before_anybody_is_asked(make_home: Callable[..., Path]) -> None:
    """An evaluation beside the budget would be free."""
    home = make_home(rounds=1, wait_for_nodes=1)
    run_rounds(home)
    with Coordinator(home) as coordinator:
        spent = coordinator.statement().epsilon_pld
    plan = Plan.load(home)
    event = plan.evaluation(number=1, round_number=1, attempt=1, release="r").build_mechanism().event()
    tight = make_home("tight", rounds=1, budget_epsilon=epsilon([*_events(home), event], plan.delta) + 0.01)
    run_rounds(tight)
    asked: list[str] = []

    def remember(message: Message, context: Context) -> Message:
        asked.append(str(context.node_config["name"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(tight, different={"d0": remember})
    assert asked == ["d0"]
    with pytest.raises(BudgetError, match="the budget is"):
        judge(tight, different={"d0": remember})
    assert asked == ["d0"], "the second attempt, charged again, would pass the budget"
    assert len(purposes(tight)) == 2

    poor = make_home("poor", rounds=3, budget_epsilon=spent + 0.01)
    run_rounds(poor)
    assert purposes(poor) == [], "a round after which no evaluation can follow is not run"


def _events(home: Path) -> list[SampledGaussian]:
    with Ledger.open(home / LEDGER_FILE) as ledger:
        return [event for event in ledger.events() if isinstance(event, SampledGaussian)]


def test_killed_between_charge_and_result_nothing_has_changed_and_the_retry_is_charged(
    make_home: Callable[..., Path],
) -> None:
    """Nobody can know what was seen of an evaluation that crashed: it must not be free to try again."""
    home = make_home(rounds=1)
    run_rounds(home)
    before = state_of(home)[0]

    def killed(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(home, different={"d3": killed})
    np.testing.assert_array_equal(state_of(home)[0], before)
    assert not (home / ADAPTERS_FOLDER).exists()
    assert judge(home).attempt == 3
    assert [p.get("attempt") for p in purposes(home) if "evaluation" in p] == [2, 3]
    with Coordinator(home) as coordinator:
        assert coordinator.statement().evaluations == 2


@pytest.mark.parametrize("difference", [0.1, -0.1])
@pytest.mark.parametrize("point", ["settle", "replace_file", "publish", "save_checkpoint"])
def test_killed_after_the_verdict_it_is_carried_out_at_the_next_start(
    make_home: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, difference: float, point: str
) -> None:
    """A verdict that is lost is paid for twice; one that is half done publishes what the next round forgets."""
    home = make_home(rounds=2)
    run_rounds(home)
    candidate = state_of(home)[0]
    killed: list[int] = []

    def die(*arguments: object, **others: object) -> None:
        killed.append(1)
        raise KeyboardInterrupt

    module = {"replace_file": "adapters", "save_checkpoint": "coordinate"}.get(point, "coordinate.Coordinator")
    with monkeypatch.context() as patched:
        if point == "settle":  # only the one after the verdict
            patched.setattr("stillroom_server.evaluation.evaluations_in", lambda rows: _armed(patched, die))
        else:
            patched.setattr(f"stillroom_server.{module}.{point}", die)
        with suppress(KeyboardInterrupt):
            judge(home, difference)
    assert killed or (point, difference) in (("publish", -0.1), ("save_checkpoint", 0.1))
    rows = purposes(home)
    after, rounds, restart = state_of(home)
    published = (home / ADAPTERS_FOLDER / "round-0002").exists()
    if difference > 0:
        np.testing.assert_array_equal(after, candidate)
        assert (published, rounds, restart) == (True, 2, 0)
    else:
        assert not after.any()
        assert (published, rounds, restart) == (False, 2, 2)
    assert (home / ADAPTERS_FOLDER / "evaluation-0001.json").exists()
    assert purposes(home) == rows, "carrying out a verdict costs nothing more"
    assert audit_ledger(home).rows >= 4


def _armed(patched: pytest.MonkeyPatch, die: Callable[..., None]) -> list[Evaluation]:
    """No evaluation so far; and from here on, `settle` is where the process dies."""
    patched.setattr("stillroom_server.coordinate.Coordinator.settle", die)
    return []


def test_whatever_a_device_answers_counts_as_zero(make_home: Callable[..., Path]) -> None:
    """An answer that is dropped with its weight, or that is larger than the noise was made for, decides for everybody."""

    def raises(message: Message, context: Context) -> Message:
        raise RuntimeError("private text")

    def says(update: np.ndarray) -> Answer:
        return lambda message, context: Message(update_message(update), reply_to=message)

    def more(message: Message, context: Context) -> Message:
        content = update_message(np.zeros(3, np.int32))
        content["more"] = content["update"]
        return Message(content, reply_to=message)

    hostile: dict[str, Answer] = {
        "raises": raises,
        "too long": says(np.ones(4, np.int32)),
        "floats": says(np.ones(3, np.float64)),
        "too large": says(np.full(3, RESOLUTION, np.int32)),
        "just too large": says(np.array([RESOLUTION, 1, 0], np.int32)),
        "extra": more,
        "empty": lambda message, context: Message(RecordDict(), reply_to=message),
    }
    names = [f"d{number}" for number in range(len(hostile))]
    expected = make_home("expected", rounds=1)
    run_rounds(expected)
    honest = judge(expected, different=dict.fromkeys(names, scoring(None)))
    home = make_home("hostile", rounds=1)
    run_rounds(home)
    assert judge(home, different=dict(zip(names, hostile.values(), strict=True))) == honest
    silent = make_home("silent", rounds=1)
    run_rounds(silent)
    found: list[Evaluation] = []
    there = {name: scoring(0.1) for name in NAMES if name not in names}
    run_server_app(evaluation_app(Policy(), found.append), grid_for(silent, there))
    assert found[0] == honest


def test_without_held_back_queries_or_a_candidate_nothing_is_spent(make_home: Callable[..., Path]) -> None:
    """An evaluation on queries that were trained on, or of nothing, is worth nothing and costs the same."""
    home = make_home("unjudged", held_back=0.0, rounds=1)
    run_rounds(home)
    assert (home / ADAPTERS_FOLDER / "round-0001").exists(), "without it, rounds are published as they always were"
    with pytest.raises(SettingsError, match="held_back is 0 in the plan"):
        judge(home)
    fresh = make_home("fresh")
    with pytest.raises(SettingsError, match="no round has been released"):
        judge(fresh)
    assert len(purposes(home)) == 1
    assert purposes(fresh) == []


def test_plans_whose_promise_an_evaluation_would_break_are_refused(make_home: Callable[..., Path]) -> None:
    """Where the server cannot sample a round, it cannot sample an evaluation either."""
    turns = {
        "mechanism": "correlated", "rounds": 4, "sampling_rate": 0.5, "noise_multiplier": 2.0,
        "schedule": {"rounds": 4, "separation": 2, "participations": 2}, "coefficients": (1024, 512),
    }  # fmt: skip
    with pytest.raises(ValueError, match="devices take turns"):
        make_home(**turns, evaluation_rate=0.5)
    with pytest.raises(ValueError, match="noise multiplier"):
        make_home(evaluation_noise=2.0**21)
    plan = Plan.load(make_home("plain", held_back=0.0))
    assert plan.content_hash == plan.model_copy(update={"held_back": 0.0}).content_hash
    assert plan.model_copy(update={"held_back": 0.1}).content_hash != plan.content_hash


def test_turns_are_judged_between_rows_and_go_on(make_home: Callable[..., Path]) -> None:
    """A roll-back that sets the row number back would release a row twice."""
    turns = {
        "mechanism": "correlated", "rounds": 4, "sampling_rate": 0.5, "noise_multiplier": 2.0,
        "schedule": {"rounds": 4, "separation": 2, "participations": 2}, "coefficients": (1024, 512),
    }  # fmt: skip
    home = make_home(**turns)
    run_rounds(home, 2)
    assert judge(home, -0.2).verdict == "roll back"
    assert not state_of(home)[0].any()
    run_rounds(home)
    assert state_of(home)[1:] == (4, 2)
    assert judge(home).verdict == "publish"
    with Coordinator(home) as coordinator:
        made = coordinator.statement()
        assert (made.rounds, made.evaluations, len(coordinator.ledger.events())) == (4, 2, 3)
    assert audit_ledger(home).adapters == 1


def test_the_policy_decides_by_the_interval(make_home: Callable[..., Path]) -> None:
    """A verdict by the estimate alone publishes whatever noise lifts above zero."""
    home = make_home(rounds=1)
    run_rounds(home)
    found = judge(home, 0.005, Policy(require="better"))
    assert found.difference > 0 or found.low < 0
    assert found.low < 0 < found.high
    assert found.verdict == "roll back"
    lenient = make_home("lenient", rounds=1)
    run_rounds(lenient)
    same = judge(lenient, 0.005, Policy(margin=0.05))
    assert (same.low, same.verdict) == (found.low, "publish")
    with pytest.raises(SettingsError, match="--require best"):
        Policy.checked("best", 0.01)


def test_a_ledger_or_a_checkpoint_that_went_back_behind_an_evaluation_is_refused(
    make_home: Callable[..., Path],
) -> None:
    """An old copy of either brings a rolled-back adapter back, or forgets what its evaluation cost."""
    home = make_home(rounds=1)
    run_rounds(home)
    old_ledger, old_state = (home / LEDGER_FILE).read_bytes(), (home / "state.npz").read_bytes()
    judge(home, -0.2)
    newest = (home / LEDGER_FILE).read_bytes()
    (home / LEDGER_FILE).write_bytes(old_ledger)
    with pytest.raises(LedgerError, match="one of them is an old copy"):
        Coordinator(home)
    (home / LEDGER_FILE).write_bytes(newest)
    (home / "state.npz").write_bytes(old_state)
    assert not state_of(home)[0].any(), "the verdict is carried out again"


def test_evaluations_are_sampled_and_divided_by_a_public_number(make_home: Callable[..., Path]) -> None:
    """A mean over those who answered tells how many did."""
    home = make_home(rounds=1, evaluation_rate=0.5, evaluation_noise=0.5)
    run_rounds(home)
    asked: list[str] = []

    def remember(message: Message, context: Context) -> Message:
        asked.append(str(context.node_config["name"]))
        return scoring(0.1)(message, context)

    found = judge(home, different=dict.fromkeys(NAMES, remember))
    assert 8 <= len(asked) == len(set(asked)) <= 32
    expected = 0.1 * len(asked) / (0.5 * DEVICES)
    assert abs(found.difference - expected) < 4 * found.noise
    assert found.low < 0.1 < found.high
