"""Real device homes judge a candidate: what is better is published, what is ruined is rolled back, one device moves little."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.held_back import set_held_back_key
from stillroom_client.participation import LEDGER_FILE
from stillroom_client.training import Trainer
from stillroom_server.adapters import ADAPTERS_FOLDER
from stillroom_server.checkpoint import save_checkpoint
from stillroom_server.coordinate import KEY_FILE, Coordinator
from stillroom_server.verdict import Evaluation, Policy
from stillroom_shared.adapter import Adapter
from stillroom_shared.cli import build_app
from stillroom_shared.comparison import PRESENCE, SPREAD
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import SettingsError
from stillroom_shared.ledger import Ledger
from stillroom_shared.release import Release
from stillroom_shared.settings import EvaluationSettings, RoundsSettings
from stillroom_shared.signing import SigningKey
from stillroom_simulations.federation import BatchedUpdates, make_plan, mine_population, run_federation
from stillroom_simulations.private_evaluation import evaluate_simulated

DEVICES = 24
WORDS = ("open", "close", "read", "write", "zip", "tar", "files", "list", "sort", "search", "index", "tapir")
ROUNDS = RoundsSettings(
    rounds=4, sampling_rate=1.0, noise_multiplier=1.0, budget_epsilon=100.0, candidates=3, delta=1e-3, averaging=0.0
)
JUDGED = EvaluationSettings(held_back=0.5, noise_multiplier=0.5, bound=1.0)
NAMES = tuple(f"d{number:02d}" for number in range(DEVICES))


def settle(folder: Path, release: Release, answers: Adapter) -> list[Path]:
    """Devices whose passages stand where `answers` puts their queries: with it all are found, with another few."""
    queries = [f"how do i {word}" for word in WORDS]
    vectors = Encoder(release, adapter=answers).encode_queries(queries)
    homes = []
    for number, name in enumerate(NAMES):
        with Device.create(folder / name, release, link=True) as device:
            device.add([Passage(word, "own", f"about {word}") for word in WORDS], vectors)
            device.record(zip(queries[number % 4 :], WORDS[number % 4 :], strict=True))
            set_held_back_key(device, bytes([number]) * 32)
        homes.append(folder / name)
    return homes


@pytest.fixture
def with_candidate(tmp_path: Path, tiny_release: Release, signing_key: SigningKey) -> Callable[..., Path]:
    """A coordinator's home after one round that led to the given adapter."""

    def make(candidate: Adapter, name: str = "federation", judged: EvaluationSettings = JUDGED) -> Path:
        home = tmp_path / name
        plan = make_plan(
            ROUNDS, name="f", release_folder=tiny_release.folder, enrolled=NAMES,
            dimension=tiny_release.adapter_spec.size, seed="s", evaluation=judged,
        )  # fmt: skip
        plan.save(home)
        signing_key.save(home / KEY_FILE)
        with Coordinator(home) as coordinator:
            order = plan.order(round_number=1, attempt=1, release=tiny_release.id, dimension=candidate.spec.size)
            coordinator.ledger.spend(
                order.build_mechanism().event(), budget=plan.budget, purpose={"round": 1, "attempt": 1}
            )
            state = plan.optimizer.step(coordinator.state, np.zeros(candidate.spec.size))
            values = candidate.values.astype(np.float64)
            save_checkpoint(home / "state.npz", type(state)(values, state.velocity, state.square, values[None]), ())
        return home

    return make


def ruined(adapter: Adapter) -> Adapter:
    values = np.random.default_rng(3).normal(size=adapter.spec.size) * 20
    return Adapter(adapter.spec, values.astype(np.float32))


def test_what_finds_more_is_published_and_what_is_ruined_is_rolled_back(
    tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter, with_candidate: Callable[..., Path]
) -> None:
    """A private evaluation that lets a ruined adapter pass, or never lets a good one, is only spend."""
    settle(tmp_path / "good", tiny_release, tiny_adapter)
    home = with_candidate(tiny_adapter, "better")
    found, scores = evaluate_simulated(home, tmp_path / "good", Policy(require="better"))
    assert (found.verdict, scores.asked, scores.said) == ("publish", DEVICES, DEVICES)
    assert 0 < found.low < found.difference
    assert (home / ADAPTERS_FOLDER / "round-0001").is_dir()

    homes = settle(tmp_path / "fine", tiny_release, Adapter.zero(tiny_adapter.spec))
    home = with_candidate(ruined(tiny_adapter), "ruined")
    found, _ = evaluate_simulated(home, tmp_path / "fine", Policy())
    assert (found.verdict, found.high < 0) == ("roll back", True)
    with Coordinator(home) as coordinator:
        assert not coordinator.adapter.values.any()
    for device in homes:
        with Ledger.open(device / LEDGER_FILE) as ledger:
            assert ledger.purposes() == [{"federation": "f", "round": 1, "attempt": 2, "evaluation": 1}]


def test_one_device_moves_an_evaluation_by_at_most_the_sensitivity_through_its_own_search(
    tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter, with_candidate: Callable[..., Path]
) -> None:
    """Neighbouring populations, same noise: one device's owner opened nothing; the release moves by one bounded point."""
    judged = JUDGED.model_copy(update={"bound": 0.1})
    found: list[Evaluation] = []
    for name in ("with", "without"):
        homes = settle(tmp_path / name, tiny_release, tiny_adapter)
        if name == "without":
            with Device.open(homes[5]) as device:
                device.erase_feedback()
        home = with_candidate(tiny_adapter, f"home {name}", judged)
        found.append(evaluate_simulated(home, tmp_path / name, Policy())[0])
    moved = np.array(
        [
            found[0].difference - found[1].difference,
            (found[0].second_moment - found[1].second_moment) * SPREAD / judged.bound,
            (found[0].answered - found[1].answered) * PRESENCE * judged.bound,
        ]
    )
    norm = float(np.linalg.norm(moved * DEVICES))
    clip_norm = judged.bound * math.sqrt(1 + SPREAD**2 + PRESENCE**2)
    assert norm <= clip_norm * (1 + 1e-6)
    assert norm > 0.999 * clip_norm, "the bound is never reached: the test would pass for any bound"


def test_training_leaves_held_back_queries_out_and_goes_on_after_a_roll_back(
    tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter, signing_key: SigningKey
) -> None:
    """Rounds and evaluations share devices, ledgers and attempts: either one must not lock the other out."""
    homes = settle(tmp_path / "devices", tiny_release, tiny_adapter)
    everything = mine_population(homes, tiny_release, candidates=3, threads=1)
    records = mine_population(homes, tiny_release, candidates=3, threads=1, held_back=0.5)
    assert 0.3 < sum(map(len, records.values())) / sum(map(len, everything.values())) < 0.7
    updates = BatchedUpdates(Trainer(tiny_release.folder, tiny_release.adapter_spec), records)
    home = tmp_path / "federation"
    plan = make_plan(
        ROUNDS, name="f", release_folder=tiny_release.folder, enrolled=NAMES,
        dimension=tiny_release.adapter_spec.size, seed="s", evaluation=JUDGED,
    )  # fmt: skip

    class Enough(Exception):
        pass

    def stop(report: object) -> None:
        raise Enough

    with pytest.raises(Enough):
        run_federation(home, plan, homes, updates, operator=signing_key, block=64, on_round=stop)
    impossible = Policy(require="not-worse", margin=0.0)
    first, _ = evaluate_simulated(home, tmp_path / "devices", impossible)
    run_federation(home, plan, homes, updates, operator=signing_key, block=64)
    last, _ = evaluate_simulated(home, tmp_path / "devices", Policy(margin=1.0))
    assert (first.round, last.round, last.verdict) == (1, 4, "publish")
    for device in homes:
        with Ledger.open(device / LEDGER_FILE) as ledger:
            asked = [(p["round"], p["attempt"], p.get("evaluation")) for p in ledger.purposes()]
        assert asked == [(1, 1, None), (1, 2, 1), (2, 1, None), (3, 1, None), (4, 1, None), (4, 2, 2)]


def command(*words: Sequence[str] | str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(build_app(), [str(word) for word in words], catch_exceptions=False)
    return done.exit_code, done.stdout


def test_the_command_prints_what_was_found_and_what_followed(
    tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter, with_candidate: Callable[..., Path]
) -> None:
    """A verdict whose ground nobody can read is not checked by anybody."""
    devices = tmp_path / "devices"
    settle(devices, tiny_release, tiny_adapter)
    home = with_candidate(tiny_adapter)
    status, said = command("coordinate", "evaluate", home, "--devices", devices)
    assert status == 0
    for words in (
        "Evaluation 1",
        "after 1 round,",
        "nDCG@10 (95% +",
        "24 enrolled devices",
        "publish: the whole interval",
    ):
        assert words in said
    other = with_candidate(tiny_adapter, "other")
    Coordinator(other).close()
    with pytest.raises(SettingsError, match="holds no home of an enrolled device"):
        evaluate_simulated(other, tmp_path, Policy())
    with Ledger.open(other / "ledger.sqlite3") as ledger:
        assert len(ledger.events()) == 1
    for name in NAMES:  # attempts at this evaluation were answered already, by the same devices: zeros, and noise alone
        assert (devices / name / LEDGER_FILE).exists()
    status, said = command("coordinate", "evaluate", other, "--devices", devices, "--require", "better", "--json")
    assert (status, json.loads(said)["verdict"]) == (0, "roll back")
