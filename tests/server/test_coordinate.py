"""The round as a whole: sensitivity on neighbouring data, what is charged when, and what counts as zero."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from stillroom_server.app import HOME_KEY, server_app
from stillroom_server.checkpoint import save_checkpoint
from stillroom_server.coordinate import KEY_FILE, LEDGER_FILE, Coordinator, RoundReport
from stillroom_server.plan import Plan
from stillroom_shared.accounting import epsilon
from stillroom_shared.errors import LedgerError, ProtocolError, SettingsError
from stillroom_shared.events import CorrelatedGaussian, LocalGaussian, SampledGaussian
from stillroom_shared.ledger import Ledger
from stillroom_shared.mechanism import RESOLUTION
from stillroom_shared.protocol import Schedule, enrolment_message, read_order, update_message
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import OBSERVERS, READERS
from stillroom_simulations.engine import InProcessGrid, run_server_app

_HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'fortran_order': False, 'shape': (281474976710656,), }"
_HOSTILE = {"zip": b"PK\x03\x04garbage", "cut header": _HEADER[:40], "huge header": _HEADER.ljust(127) + b"\n"}
Behaviour = Callable[[Message, Context], Message]
DEVICES = 6


def honest(scale: float) -> Behaviour:
    """A device whose raw update is the same in every coordinate."""

    def answer(message: Message, context: Context) -> Message:
        order, adapter = read_order(message.content)
        raw = np.full(adapter.spec.size, scale, np.float32)
        return Message(update_message(order.build_mechanism().bound(raw)), reply_to=message)

    return answer


def app_of(behaviours: dict[str, Behaviour]) -> ClientApp:
    app = ClientApp()

    @app.query("enrol")
    def enrol(message: Message, context: Context) -> Message:
        return Message(enrolment_message(str(context.node_config["name"])), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return behaviours[str(context.node_config["name"])](message, context)

    return app


@pytest.fixture
def make_home(tmp_path: Path, tiny_release: Release, signing_key: SigningKey) -> Callable[..., Path]:
    def make(name: str = "federation", **changes: object) -> Path:
        fields: dict[str, object] = {
            "federation": "test", "release_folder": tiny_release.folder, "enrolled": tuple(f"d{i}" for i in range(DEVICES)),
            "mechanism": "central", "rounds": 2, "sampling_rate": 0.5, "clip_norm": 1.0, "noise_multiplier": 3.0,
            "budget_epsilon": 50.0, "delta": 1e-4, "local_steps": 1, "local_learning_rate": 1.0, "temperature": 0.05,
            "candidates": 4, "server_learning_rate": 1.0, "momentum": 0.0, "averaging": 0.0, "rehearsal": True, "seed": "s",
        }  # fmt: skip
        home = tmp_path / name
        Plan(**(fields | changes)).save(home)
        signing_key.save(home / KEY_FILE)
        return home

    return make


def run(home: Path, behaviours: dict[str, Behaviour]) -> np.ndarray:
    """The iterate after all rounds."""
    nodes = {number: {"name": name} for number, name in enumerate(behaviours, start=2)}
    grid = InProcessGrid(client_app=app_of(behaviours), nodes=nodes, run_config={HOME_KEY: str(home)})
    run_server_app(server_app(), grid)
    with Coordinator(home) as coordinator:
        return coordinator.state.iterate


class Enough(Exception):
    """Stops a run after some rounds."""


def run_rounds(home: Path, behaviours: dict[str, Behaviour], *, rounds: int) -> np.ndarray:
    """The iterate after the first rounds of a federation that is stopped there."""

    def on_round(report: RoundReport) -> None:
        if report.round == rounds:
            raise Enough

    nodes = {number: {"name": name} for number, name in enumerate(behaviours, start=2)}
    grid = InProcessGrid(client_app=app_of(behaviours), nodes=nodes, run_config={HOME_KEY: str(home)})
    with pytest.raises(Enough):
        run_server_app(server_app(on_round), grid)
    with Coordinator(home) as coordinator:
        assert len(coordinator.state.history) == rounds
        return coordinator.state.iterate


def everybody(**different: Behaviour) -> dict[str, Behaviour]:
    return {f"d{i}": honest(0.01 * (i + 1)) for i in range(DEVICES)} | different


def test_zeroing_one_device_moves_the_release_by_at_most_the_sensitivity(make_home: Callable[..., Path]) -> None:
    """Neighbouring populations, same randomness: the released sums differ by one bounded update, and by a whole one."""
    options = {"rounds": 1, "sampling_rate": 1.0}
    huge, zero = everybody(d3=honest(1e6)), everybody(d3=honest(0.0))
    difference = run(make_home("with", **options), huge) - run(make_home("without", **options), zero)
    in_steps = difference * DEVICES * RESOLUTION  # clip norm 1, denominator 6
    norm = float(np.linalg.norm(in_steps))
    assert norm <= RESOLUTION * (1 + 1e-9)
    assert norm > 0.999 * RESOLUTION, "the bound is never reached: the test would pass for any clip norm"


@pytest.mark.parametrize(
    "kind",
    [
        "raises",
        "wrong type",
        "too long",
        "too large",
        "extra record",
        "silent",
        "other record",
        "zip",
        "cut header",
        "huge header",
    ],
)
def test_whatever_a_device_does_counts_as_zero(make_home: Callable[..., Path], kind: str) -> None:
    """An update that is dropped with its weight, or that aborts the round, makes the release depend on who failed."""

    def misbehave(message: Message, context: Context) -> Message:
        _, adapter = read_order(message.content)
        size = adapter.spec.size
        if kind == "raises":
            raise RuntimeError("private text")
        if kind == "wrong type":
            return Message(update_message(np.ones(size, np.float64)), reply_to=message)
        if kind == "too long":
            return Message(update_message(np.ones(size + 1, np.int32)), reply_to=message)
        if kind == "too large":
            return Message(update_message(np.full(size, RESOLUTION, np.int32)), reply_to=message)
        if kind == "other record":
            return Message(RecordDict({"update": ConfigRecord({})}), reply_to=message)
        if kind in _HOSTILE:
            array = Array(dtype="int32", shape=(size,), stype="numpy.ndarray", data=_HOSTILE[kind])
            return Message(RecordDict({"update": ArrayRecord({"values": array})}), reply_to=message)
        content = update_message(np.ones(size, np.int32))
        content["more"] = content["update"]
        return Message(content, reply_to=message)

    options = {"rounds": 1, "sampling_rate": 1.0}
    expected = run(make_home("zero", **options), everybody(d3=honest(0.0)))
    behaviours = everybody(d3=misbehave)
    if kind == "silent":
        del behaviours["d3"]
    np.testing.assert_array_equal(run(make_home("odd", **options), behaviours), expected)


def test_an_empty_cohort_releases_noise_at_the_same_cost(make_home: Callable[..., Path]) -> None:
    """Skipping the round when nobody was sampled would tell readers that nobody was."""
    home = make_home(rounds=1, sampling_rate=1e-9)
    iterate = run(home, everybody())
    assert np.linalg.norm(iterate) > 0
    with Coordinator(home) as coordinator:
        assert len(coordinator.ledger.events()) == 1


def test_the_spend_is_durable_before_any_device_is_asked(make_home: Callable[..., Path]) -> None:
    """A ledger written after the round misses every round that crashes."""
    home = make_home(rounds=1, sampling_rate=1.0)
    seen: list[int] = []

    def look(message: Message, context: Context) -> Message:
        with Ledger.open(home / LEDGER_FILE) as ledger:
            seen.append(len(ledger.events()))
        return honest(0.1)(message, context)

    run(home, everybody(d0=look))
    assert seen == [1]


def test_a_crash_between_spend_and_release_leaves_the_spend_and_the_retry_is_charged(
    make_home: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can know whether a crashed round was seen, so it must not be free to try again."""
    home = make_home(rounds=1)
    with monkeypatch.context() as patched:
        patched.setattr(
            "stillroom_server.coordinate.save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run(home, everybody())
    with Coordinator(home) as coordinator:
        assert len(coordinator.ledger.events()) == 1
        assert not coordinator.finished
    run(home, everybody())
    with Coordinator(home) as coordinator:
        purposes = [row.fields["purpose"] for row in coordinator.ledger.rows() if row.kind == "spend"]
        assert purposes == [{"round": 1, "attempt": 1}, {"round": 1, "attempt": 2}]
        assert coordinator.statement().rounds == 2


def test_a_round_over_the_budget_is_not_run(make_home: Callable[..., Path]) -> None:
    """A budget that is only reported after the fact protects nobody."""
    plan = Plan.load(make_home("probe"))
    event = plan.order(round_number=1, attempt=1, release="r", dimension=10).build_mechanism().event()
    home = make_home(rounds=5, budget_epsilon=epsilon([event] * 2, plan.delta) + 0.01)
    run(home, everybody())
    with Coordinator(home) as coordinator:
        assert len(coordinator.state.history) == len(coordinator.ledger.events()) == 2
        notes = [row.fields for row in coordinator.ledger.rows() if row.kind == "note"]
        assert "budget" in notes[-1]["stopped"]


def test_a_resumed_run_equals_an_uninterrupted_one(make_home: Callable[..., Path]) -> None:
    """State that lives only in memory (momentum, averages) is lost by a restart without anybody noticing."""
    options = {"rounds": 4, "momentum": 0.9, "averaging": 0.5, "server_optimizer": "adam", "clip_quantile": 0.5}
    straight = run(make_home("straight", **options), everybody())
    home = make_home("resumed", **options)
    rounds = 0

    def stop_in_round_three(message: Message, context: Context) -> Message:
        nonlocal rounds
        order, _ = read_order(message.content)
        rounds = order.round
        return honest(0.01)(message, context)

    class Stop(Exception):
        pass

    def on_round(report: object) -> None:
        if len_history() == 2:
            raise Stop

    def len_history() -> int:
        with Coordinator(home) as coordinator:
            return len(coordinator.state.history)

    nodes = {number: {"name": f"d{number - 2}"} for number in range(2, 2 + DEVICES)}
    grid = InProcessGrid(
        client_app=app_of(everybody(d0=stop_in_round_three)), nodes=nodes, run_config={HOME_KEY: str(home)}
    )
    with pytest.raises(Stop):
        run_server_app(server_app(on_round), grid)
    np.testing.assert_allclose(run(home, everybody()), straight, rtol=1e-12)


def test_the_clip_norm_follows_the_norms(make_home: Callable[..., Path]) -> None:
    """A clip norm that is told to devices but not used for the release scales every update wrongly."""
    told: list[float | None] = []

    def remember(message: Message, context: Context) -> Message:
        order, _ = read_order(message.content)
        told.append(order.clip_norm)
        return honest(1e6)(message, context)

    home = make_home(rounds=3, sampling_rate=1.0, clip_quantile=0.5, noise_multiplier=0.5, budget_epsilon=1e3)
    run(home, {f"d{i}": remember for i in range(DEVICES)})
    norms = sorted({norm for norm in told if norm is not None})
    assert len(norms) == 3
    assert told[0] == norms[0] == 1.0
    assert norms[2] > norms[1] > 1.0, "all updates are clipped, so the norm grows"
    with Coordinator(home) as coordinator:
        assert len(coordinator.unclipped) == 3
        events = [event for event in coordinator.ledger.events() if isinstance(event, SampledGaussian)]
        assert len(events) == 3 and all(event.dimension == coordinator.spec.size + 1 for event in events)


SCHEDULE = Schedule(rounds=5, separation=3, participations=2)
TURNS = {
    "mechanism": "correlated", "rounds": 5, "sampling_rate": 1 / 3, "schedule": SCHEDULE, "noise_multiplier": 2.0,
    "coefficients": (1024, 512, 256),
}  # fmt: skip


def test_a_run_of_turns_is_charged_once_and_before_anybody_is_asked(make_home: Callable[..., Path]) -> None:
    """Rows that share noise and are charged one by one cost more, or less, than they are worth."""
    home, seen, asked = make_home(**TURNS), set(), []

    def look(message: Message, context: Context) -> Message:
        with Ledger.open(home / LEDGER_FILE) as ledger:
            seen.add(len(ledger.events()))
        asked.append((str(context.node_config["name"]), read_order(message.content)[0].round))
        return honest(0.01)(message, context)

    run(home, {f"d{i}": look for i in range(DEVICES)})
    assert seen == {1}
    with Coordinator(home) as coordinator:
        (event,) = coordinator.ledger.events()
        made = coordinator.statement()
    assert isinstance(event, CorrelatedGaussian)
    assert (made.rounds, made.sampling, made.participations, made.separation) == (5, "turns", 2, 3)
    assert made.against[READERS] == made.against[OBSERVERS] == epsilon([event], 1e-4)
    for name in {name for name, _ in asked}:
        turns = sorted(number for own, number in asked if own == name)
        assert len(turns) <= 2
        assert all(later - earlier == 3 for earlier, later in pairwise(turns))
    assert len({name for name, _ in asked}) == DEVICES


def test_a_row_that_was_formed_before_a_crash_is_the_one_that_is_applied(
    make_home: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forming it again with fresh noise would release two noisy versions of what was charged once."""
    straight = run(make_home("straight", **TURNS), everybody())
    home = make_home("crashed", **TURNS)
    saved = 0

    def save_twice(*arguments: object) -> None:
        nonlocal saved
        saved += 1
        if saved == 3:
            raise KeyboardInterrupt  # the third row is on disk, the checkpoint knows two
        save_checkpoint(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr("stillroom_server.coordinate.save_checkpoint", save_twice)
        with pytest.raises(KeyboardInterrupt):
            run(home, everybody())
    liars = {f"d{i}": honest(1e3) for i in range(DEVICES)}
    third = run_rounds(make_home("three", **TURNS), everybody(), rounds=3)
    np.testing.assert_allclose(run_rounds(home, liars, rounds=3), third, rtol=1e-12)
    np.testing.assert_allclose(run(home, everybody()), straight, rtol=1e-12)
    with Coordinator(home) as coordinator:
        assert len(coordinator.ledger.events()) == 1


@pytest.mark.parametrize("restored", [("state.npz", "rows.npz"), ("state.npz",), ("rows.npz",)])
@pytest.mark.parametrize("copies", ["old", "deleted"])
def test_a_restored_checkpoint_of_a_run_of_turns_releases_nothing_again(
    make_home: Callable[..., Path], copies: str, restored: tuple[str, ...]
) -> None:
    """The run was charged once, so a second version of row 3 would be paid for by nobody: their difference is its sum."""
    home, asked = make_home(**TURNS), []
    last = 3 if "rows.npz" in restored else 4  # a checkpoint one round behind its rows is a crash

    def look(message: Message, context: Context) -> Message:
        asked.append(read_order(message.content)[0].round)
        return honest(0.01)(message, context)

    devices: dict[str, Behaviour] = {f"d{i}": look for i in range(DEVICES)}
    run_rounds(home, devices, rounds=2)
    old = {name: (home / name).read_bytes() for name in restored}
    run_rounds(home, devices, rounds=last)
    newest = {name: (home / name).read_bytes() for name in restored}
    for name in restored:
        (home / name).unlink() if copies == "deleted" else (home / name).write_bytes(old[name])
    asked.clear()
    with pytest.raises(LedgerError, match="restore the newest"):
        run(home, devices)
    assert asked == []
    for name in restored:
        (home / name).write_bytes(newest[name])
    run(home, devices)
    assert set(asked) == set(range(last + 1, 6))


def test_a_ledger_that_lacks_a_round_of_a_run_of_turns_is_refused(make_home: Callable[..., Path]) -> None:
    """The one charge is in every copy of it, so the charge alone does not tell an old copy."""
    for name, options in (("rows", TURNS), ("private", LOCAL)):
        home = make_home(name, **options)
        run_rounds(home, everybody(), rounds=2)
        old = (home / LEDGER_FILE).read_bytes()
        run_rounds(home, everybody(), rounds=3)
        (home / LEDGER_FILE).write_bytes(old)
        with pytest.raises(LedgerError, match="no charge for round 3"):
            Coordinator(home)


@pytest.mark.parametrize("point", ["record_formed", "save_checkpoint"])
def test_a_private_run_goes_on_after_a_crash_and_not_after_its_checkpoint_went_back(
    make_home: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """One round behind its ledger is a crash, which devices' caps cover; two were released to somebody."""
    home = make_home(**LOCAL)
    run_rounds(home, everybody(), rounds=1)
    old = (home / "state.npz").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(f"stillroom_server.coordinate.{point}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(home, everybody())
    run_rounds(home, everybody(), rounds=3)
    newest = (home / "state.npz").read_bytes()
    (home / "state.npz").write_bytes(old)
    with pytest.raises(LedgerError, match=r"released 1 rounds, .* that 3 were formed: .* restore the newest copy"):
        run(home, everybody())
    (home / "state.npz").unlink()
    with pytest.raises(LedgerError, match=r"released 0 rounds, .* that 3 were formed"):
        Coordinator(home)
    (home / "state.npz").write_bytes(newest)
    run(home, everybody())


LOCAL = {
    "mechanism": "local", "rounds": 4, "sampling_rate": 1 / 2, "noise_multiplier": 2.0, "local_steps": 2, "records": 8,
    "record_rate": 0.5, "schedule": Schedule(rounds=4, separation=2, participations=2),
}  # fmt: skip


def test_a_private_run_is_charged_once_and_retries_cost_nothing_more(make_home: Callable[..., Path]) -> None:
    """Devices cap their attempts, so a retry is covered; an attempt that has the number of an earlier one is declined."""
    home, seen, asked = make_home(**LOCAL), set(), []
    died: list[int] = []

    def look(message: Message, context: Context) -> Message:
        order, _ = read_order(message.content)
        with Ledger.open(home / LEDGER_FILE) as ledger:
            seen.add(len(ledger.events()))
        asked.append((str(context.node_config["name"]), order.round, order.attempt))
        return honest(0.01)(message, context)

    def die(report: RoundReport) -> None:
        if report.round == 2 and not died:
            died.append(report.round)
            raise Enough

    nodes = {number: {"name": f"d{number - 2}"} for number in range(2, 2 + DEVICES)}
    grid = InProcessGrid(
        client_app=app_of({f"d{i}": look for i in range(DEVICES)}), nodes=nodes, run_config={HOME_KEY: str(home)}
    )
    with pytest.raises(Enough):
        run_server_app(server_app(die), grid)
    with Coordinator(home) as coordinator:  # a third round was asked for, and then the process died
        coordinator.ledger.record({"asked": {"round": 3, "attempt": 1}})
    run_server_app(server_app(), grid)
    assert seen == {1}
    assert {attempt for _, number, attempt in asked if number == 3} == {2}
    with Coordinator(home) as coordinator:
        (event,) = coordinator.ledger.events()
        made = coordinator.statement()
        mean = coordinator.state.history[0]
    assert isinstance(event, LocalGaussian)
    assert event.releases == 4
    assert (made.unit, made.rounds, made.sampling, made.steps, made.participations) == ("query", 4, "turns", 2, 2)
    assert set(made.against.values()) == {epsilon([event], 1e-4)}
    assert "against the coordinator too: epsilon" in made.paragraph()
    assert "query level" in made.paragraph() and "user level" not in made.paragraph()
    np.testing.assert_allclose(mean, 0.01, atol=1e-6)


def test_a_plan_under_local_needs_its_constants_and_counts_queries(make_home: Callable[..., Path]) -> None:
    """A delta that is small for devices is large for all their queries."""
    for missing in ("schedule", "records", "record_rate"):
        with pytest.raises(ValueError, match=missing):
            make_home(**(LOCAL | {missing: None}))
    with pytest.raises(ValueError, match="48 queries be exposed outright"):
        make_home(**(LOCAL | {"delta": 0.03}))
    with pytest.raises(ValueError, match="clip_quantile"):
        make_home(**(LOCAL | {"clip_quantile": 0.5}))


def test_a_plan_of_turns_that_the_noise_does_not_cover_is_refused(make_home: Callable[..., Path]) -> None:
    """One turn more than the sensitivity was computed for."""
    few = SCHEDULE.model_copy(update={"participations": 1})
    with pytest.raises(ValueError, match="participation 2"):
        make_home(**(TURNS | {"schedule": few}))
    with pytest.raises(ValueError, match=r"sampling rate 0\.5"):
        make_home(**(TURNS | {"sampling_rate": 0.5}))
    with pytest.raises(ValueError, match="do not go together"):
        make_home(**(TURNS | {"mechanism": "central"}))
    with pytest.raises(ValueError, match="clip_quantile"):
        make_home(**(TURNS | {"clip_quantile": 0.5}))


def test_two_nodes_with_one_name_count_once(make_home: Callable[..., Path]) -> None:
    """A device that enrols twice would double its sensitivity."""
    options = {"rounds": 1, "sampling_rate": 1.0}
    single = run(make_home("single", **options), everybody())
    home = make_home("double", **options)
    names = [f"d{i}" for i in range(DEVICES)]
    nodes = {number: {"name": name} for number, name in enumerate([*names, "d3"], start=2)}
    grid = InProcessGrid(client_app=app_of(everybody()), nodes=nodes, run_config={HOME_KEY: str(home)})
    run_server_app(server_app(), grid)
    with Coordinator(home) as coordinator:
        np.testing.assert_array_equal(coordinator.state.iterate, single)


def test_a_seed_needs_a_rehearsal(make_home: Callable[..., Path]) -> None:
    """Noise from a seed in a settings file can be subtracted by whoever reads the file."""
    with pytest.raises(ValueError, match="rehearsal"):
        make_home(rehearsal=False)
    home = make_home("marked", rounds=1)
    run(home, everybody())
    with Coordinator(home) as coordinator:
        assert "known seed" in coordinator.statement().paragraph()


def test_a_plan_is_not_changed_under_a_running_federation(make_home: Callable[..., Path]) -> None:
    """Less noise from round three on, with the ledger of rounds one and two."""
    home = make_home()
    with pytest.raises(SettingsError, match="holds another plan"):
        Plan.load(home).model_copy(update={"noise_multiplier": 0.1}).save(home)


def test_a_ledger_outlives_a_version_that_adds_a_field(make_home: Callable[..., Path]) -> None:
    """Every upgrade would lock operators out of their own ledgers."""

    class LaterPlan(Plan):
        added: int | None = None

    plan = Plan.load(make_home())
    later = LaterPlan.model_validate(plan.model_dump())
    assert later.content_hash == plan.content_hash
    assert later.model_copy(update={"added": 1}).content_hash != plan.content_hash
    assert plan.model_copy(update={"norm_bit": 0.2}).content_hash != plan.content_hash


def test_a_ledger_that_knows_less_than_the_checkpoint_is_refused(make_home: Callable[..., Path]) -> None:
    """Removing the ledger, or restoring an old copy, would start the spend again below the adapter that was released."""
    home = make_home(rounds=2)
    run(home, everybody())
    (home / LEDGER_FILE).unlink()
    with pytest.raises(LedgerError, match="no charge for round 1"):
        Coordinator(home)


def test_nobody_online_is_waited_for_or_paid_for(make_home: Callable[..., Path]) -> None:
    """A server that starts before its devices would spend the whole budget on noise."""
    home = make_home(reply_timeout_seconds=0.01)
    grid = InProcessGrid(client_app=app_of({}), nodes={}, run_config={HOME_KEY: str(home)})
    with pytest.raises(ProtocolError, match="0 of 1 awaited nodes"):
        run_server_app(server_app(), grid)
    with Coordinator(home) as coordinator:
        assert coordinator.ledger.events() == []
    eager = make_home("eager", wait_for_nodes=0, rounds=1)
    assert np.linalg.norm(run(eager, {})) > 0


def test_a_delta_that_exposes_somebody_is_refused(make_home: Callable[..., Path]) -> None:
    """At delta 1/N the mechanism that publishes one device's data is private."""
    with pytest.raises(ValueError, match="exposed outright"):
        make_home(delta=0.5)


def test_an_unreadable_message_does_not_stop_the_round(make_home: Callable[..., Path]) -> None:
    """An empty reply is what a device of another version sends."""
    options = {"rounds": 1, "sampling_rate": 1.0}
    expected = run(make_home("zero", **options), everybody(d2=honest(0.0)))
    empty = everybody(d2=lambda message, context: Message(RecordDict(), reply_to=message))
    np.testing.assert_array_equal(run(make_home("empty", **options), empty), expected)
