"""A simulated federation is the deployed one, only faster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stillroom_client.app import HOME_KEY, client_app
from stillroom_client.device import Device
from stillroom_client.participation import LEDGER_FILE, Consent, take_part
from stillroom_client.private_training import PrivateTrainer
from stillroom_client.training import Trainer
from stillroom_server.app import HOME_KEY as COORDINATOR_HOME
from stillroom_server.app import server_app
from stillroom_server.coordinate import KEY_FILE, Coordinator
from stillroom_server.plan import Plan
from stillroom_shared.accounting import epsilon
from stillroom_shared.adapter import Adapter
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import StillroomError
from stillroom_shared.ledger import Ledger
from stillroom_shared.local_mechanism import Local, descend
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import Release
from stillroom_shared.settings import RoundsSettings
from stillroom_shared.signing import SigningKey
from stillroom_simulations.engine import InProcessGrid, run_server_app
from stillroom_simulations.federation import (
    BatchedUpdates,
    batched_gradients,
    make_plan,
    mine_population,
    run_federation,
)
from stillroom_simulations.owners import CONSENT, agree

ROUNDS = RoundsSettings(
    rounds=2, sampling_rate=1.0, noise_multiplier=1.0, budget_epsilon=100.0, candidates=3, delta=1e-3
)
TEXTS = ("open the zip file", "list the members", "sort a list of words", "a tapir eats leaves", "read the index")


def settle(folder: Path, release: Release) -> list[Path]:
    homes = []
    for number in range(4):
        home = folder / f"d{number}"
        with Device.create(home, release, link=True) as device:
            device.add(Passage(f"p{i}", "own", f"{text} {'again ' * number}") for i, text in enumerate(TEXTS))
            device.record([(f"how do i {text}", f"p{i}") for i, text in enumerate(TEXTS[: number + 1])])
        homes.append(home)
    return homes


def plan_for(release: Release, rounds: RoundsSettings = ROUNDS) -> Plan:
    names = [f"d{number}" for number in range(4)]
    return make_plan(
        rounds, name="f", release_folder=release.folder, enrolled=names, dimension=release.adapter_spec.size, seed="s"
    )


def test_batched_federation_equals_devices_that_train_alone(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey
) -> None:
    """A shortcut of the simulation that a deployed device does not take would make every figure fiction."""
    plan = plan_for(tiny_release)
    batched_homes = settle(tmp_path / "batched", tiny_release)
    records = mine_population(batched_homes, tiny_release, candidates=3, threads=1)
    updates = BatchedUpdates(Trainer(tiny_release.folder, tiny_release.adapter_spec), records)
    run_federation(tmp_path / "b", plan, batched_homes, updates, operator=signing_key, block=3)

    alone_homes = settle(tmp_path / "alone", tiny_release)
    plan.save(tmp_path / "a")
    signing_key.save(tmp_path / "a" / KEY_FILE)
    grid = InProcessGrid(
        client_app=client_app(),
        nodes={number: {HOME_KEY: str(home)} for number, home in enumerate(alone_homes, start=2)},
        run_config={COORDINATOR_HOME: str(tmp_path / "a")},
    )
    run_server_app(server_app(), grid)
    with Coordinator(tmp_path / "b") as batched, Coordinator(tmp_path / "a") as alone:
        np.testing.assert_allclose(batched.state.iterate, alone.state.iterate, atol=1e-5)
        noise_only = np.linalg.norm(batched.state.history[0])
        assert noise_only > 0
        assert batched.statement() == alone.statement()


def test_turns_run_through_the_same_apps_and_the_devices_ledgers_agree(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey
) -> None:
    """Correlated noise that only the coordinator knows of: devices would charge themselves for something else."""
    turns = RoundsSettings(
        mechanism="correlated",
        rounds=4,
        separation=2,
        noise_multiplier=None,
        target_epsilon=3.0,
        delta=1e-3,
        candidates=3,
    )
    homes = settle(tmp_path / "devices", tiny_release)
    for home in homes:
        Consent(mechanisms=("correlated",)).save(home)
    records = mine_population(homes, tiny_release, candidates=3, threads=1)
    updates = BatchedUpdates(Trainer(tiny_release.folder, tiny_release.adapter_spec), records)
    run_federation(tmp_path / "f", plan_for(tiny_release, turns), homes, updates, operator=signing_key, block=3)
    with Coordinator(tmp_path / "f") as coordinator:
        made = coordinator.statement()
    assert made.mechanism == "correlated"
    assert 2.9 < made.epsilon_pld <= 3.0
    assert "take turns" in made.paragraph()
    for home in homes:
        with Ledger.open(home / LEDGER_FILE) as ledger:
            own = ledger.events()
        assert len(own) == 2
        assert made.epsilon_pld * 0.999 < epsilon(own, 1e-3) < made.epsilon_pld * 1.5, "rows that are cut off cost less"


def test_a_device_that_sends_zero_stops_the_simulation(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey
) -> None:
    """A device that fails sends zero by design; in a simulation that would only make the figures a little worse."""
    homes = settle(tmp_path, tiny_release)
    records = mine_population(homes, tiny_release, candidates=3, threads=1)
    (homes[2] / "consent.json").write_text('{"mechanisms": [], "participations": 5}')
    updates = BatchedUpdates(Trainer(tiny_release.folder, tiny_release.adapter_spec), records)
    with pytest.raises(StillroomError, match="1 devices sent zero"):
        run_federation(tmp_path / "f", plan_for(tiny_release), homes, updates, operator=signing_key, block=3)


def test_a_target_epsilon_is_calibrated_and_the_baseline_has_no_noise(tiny_release: Release) -> None:
    """A target that is silently ignored leaves the default noise, which may be less."""
    target = RoundsSettings(rounds=2, sampling_rate=0.5, noise_multiplier=None, target_epsilon=2.0, delta=1e-3)
    plan = plan_for(tiny_release, target)
    assert plan.noise_multiplier is not None
    assert plan.noise_multiplier > 0.5
    baseline = RoundsSettings(mechanism="none", clip_norm=None, noise_multiplier=None)
    assert plan_for(tiny_release, baseline).noise_multiplier is None


BASELINE = RoundsSettings(mechanism="none", clip_norm=None, noise_multiplier=None)
LOCAL = RoundsSettings(
    mechanism="local",
    rounds=4,
    separation=2,
    records=4,
    record_rate=0.5,
    local_steps=2,
    noise_multiplier=None,
    target_epsilon=3.0,
    candidates=3,
)


def test_under_local_the_devices_ledgers_hold_what_the_statement_says_against_everybody(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey
) -> None:
    """A cost that the coordinator states and no device enforces rests on trust in the coordinator, who is an adversary."""
    homes = settle(tmp_path / "devices", tiny_release)
    records = mine_population(homes, tiny_release, candidates=3, threads=1, one_per_query=True, most=4)
    updates = BatchedUpdates(Trainer(tiny_release.folder, tiny_release.adapter_spec), records, seed="s")
    plan = plan_for(tiny_release, LOCAL)
    for home in homes:  # what an earlier federation of the simulation gave away is not held against this one
        CONSENT.save(home)
        earlier = plan_for(tiny_release, BASELINE).order(round_number=1, attempt=1, release="r", dimension=9)
        take_part(home, earlier.model_copy(update={"federation": "earlier"}))
    limit = agree(homes, plan, tiny_release.adapter_spec.size).limit_epsilon
    assert limit is not None
    run_federation(tmp_path / "f", plan, homes, updates, operator=signing_key, block=3)
    with Coordinator(tmp_path / "f") as coordinator:
        made, run = coordinator.statement(), coordinator.ledger.events()
    assert plan.delta == 1 / (10 * 4 * 4), "as many queries as there may be"
    assert (made.unit, made.mechanism, made.rounds, made.participations) == ("query", "local", 4, 2)
    assert 2.9 < made.epsilon_pld <= 3.0
    assert set(made.against.values()) == {made.epsilon_pld}
    assert len(run) == 1
    assert made.epsilon_pld <= limit < made.epsilon_pld + 0.011
    agree(homes, plan, tiny_release.adapter_spec.size)  # as when it is resumed
    for home in homes:
        with Ledger.open(home / LEDGER_FILE) as ledger:
            own = ledger.events()
        assert len(own) == 2
        assert epsilon(own, plan.delta) == made.epsilon_pld


def test_both_sources_of_gradients_agree_and_so_do_the_updates(tiny_release: Release, tmp_path: Path) -> None:
    """Figures of a simulation whose gradients are not the device's would be about another mechanism."""
    spec = tiny_release.adapter_spec
    homes = settle(tmp_path, tiny_release)
    records = list(mine_population(homes, tiny_release, candidates=3, threads=1, one_per_query=True, most=4).values())
    values = np.random.default_rng(3).normal(size=(4, spec.size)).astype(np.float32) * np.float32(0.3)
    trainer, private = Trainer(tiny_release.folder, spec), PrivateTrainer(tiny_release.folder, spec)
    batched = list(batched_gradients(trainer, values, records, 0.1))
    alone = [
        (device, gradient)
        for device, own in enumerate(records)
        for gradient in private.gradients(Adapter(spec, values[device]), own, 0.1)
    ]
    assert [device for device, _ in batched] == [device for device, _ in alone]
    assert len(batched) > len(homes)
    longest = max(float(np.linalg.norm(gradient)) for _, gradient in alone)
    for (_, one), (_, other) in zip(batched, alone, strict=True):
        assert np.linalg.norm(one - other) < 1e-5 * longest

    mechanism = Local(
        clip_norm=0.3, noise_multiplier=1.0, sampling_rate=0.7, steps=1, records=4, dimension=spec.size
    )  # fmt: skip
    start = Adapter(spec, values[0])

    def streams() -> list[Randomness]:
        return [Randomness(seed=f"device {device}") for device in range(len(homes))]

    together = descend(
        mechanism,
        start.values,
        records,
        lambda iterates, chosen: batched_gradients(trainer, iterates, chosen, 0.1),
        learning_rate=0.5,
        randomness=streams(),
    )
    for device, stream in enumerate(streams()):
        own = private.update(start, records[device], mechanism, learning_rate=0.5, temperature=0.1, randomness=stream)
        np.testing.assert_allclose(together[device], own, atol=1e-6)
    assert np.abs(together).max() > 1e-3
