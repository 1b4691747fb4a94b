"""A device in rounds under `local`: charged before it trains, at most as often as was accounted for, and never silent."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.references.gaussian import exact_norm_at_most

from stillroom_client.app import HOME_KEY, OwnUpdates, client_app
from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.participation import LEDGER_FILE, Consent, open_ledger, purpose_of, take_part
from stillroom_client.private_training import PrivateTrainer
from stillroom_client.records import mine_records
from stillroom_shared.accounting import epsilon
from stillroom_shared.adapter import Adapter
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import BudgetError, ProtocolError
from stillroom_shared.events import Event, LocalGaussian, SampledGaussian
from stillroom_shared.ledger import Ledger
from stillroom_shared.local_mechanism import Local, noise_alone
from stillroom_shared.local_rounds import LocalRounds
from stillroom_shared.protocol import RoundOrder, order_message, read_update
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import Release
from stillroom_simulations.engine import InProcessGrid

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

OPENED = [("what eats leaves", "p3"), ("how do i sort", "p2"), ("zip", "p0"), ("list members of the tar file", "p1")]
AGREED = Consent(mechanisms=("local",), limit_epsilon=50.0)
TEXTS = ("open the zip file", "list the members", "sort a list of words", "a tapir eats leaves", "read the index")


def order(round_number: int = 1, attempt: int = 1, **changes: object) -> RoundOrder:
    fields: dict[str, object] = {
        "federation": "f", "release": "r", "round": round_number, "attempt": attempt, "mechanism": "local",
        "clip_norm": 0.05, "noise_multiplier": 2.0, "sampling_rate": 0.5, "devices": 50, "dimension": 256, "steps": 3,
        "learning_rate": 1.0, "temperature": 0.1, "candidates": 4, "records": 8, "record_rate": 0.5,
        "schedule": {"rounds": 8, "separation": 2, "participations": 3},
    }  # fmt: skip
    return RoundOrder.model_validate(fields | changes)


def settle(home: Path, release: Release, opened: list[tuple[str, str]]) -> Path:
    with Device.create(home, release, link=True) as device:
        device.add(Passage(f"p{number}", "own", text) for number, text in enumerate(TEXTS))
        device.record(opened)
    AGREED.save(home)
    return home


def spent(home: Path) -> list[Event]:
    with Ledger.open(home / LEDGER_FILE) as ledger:
        ledger.verify()
        return list(ledger.events())


class TestParticipation:
    """What a device's own ledger allows."""

    def test_a_participation_is_one_event_with_every_step_at_the_rate_of_records(self, tmp_path: Path) -> None:
        """Steps that are charged one by one can be charged in part; a cohort's rate amplifies against nobody here."""
        AGREED.save(tmp_path)
        take_part(tmp_path, order())
        (event,) = spent(tmp_path)
        assert isinstance(event, LocalGaussian)
        step = SampledGaussian(noise_multiplier=2.0, sampling_rate=0.5, sigma=2**29, dimension=256)
        assert epsilon([event], 1e-5) == epsilon([step] * 3, 1e-5)

    def test_the_cap_counts_every_attempt(self, tmp_path: Path) -> None:
        """A retry is another update of the same records, which the coordinator sees beside the first."""
        AGREED.save(tmp_path)
        take_part(tmp_path, order(1))
        take_part(tmp_path, order(1, attempt=2))
        with pytest.raises(BudgetError, match="comes 1 rounds after"):
            take_part(tmp_path, order(2))
        take_part(tmp_path, order(3))
        with pytest.raises(BudgetError, match="would be participation 4"):
            take_part(tmp_path, order(3, attempt=2))
        with pytest.raises(BudgetError, match="would be participation 4"):
            take_part(tmp_path, order(5))
        run = order().build_mechanism().event()
        assert epsilon(spent(tmp_path), 1e-5) == epsilon([run], 1e-5), "what the coordinator charged for the run"

    def test_limit_and_consent_hold_as_for_every_mechanism(self, tmp_path: Path) -> None:
        """A mechanism with another kind of event must not slip past the owner's limit."""
        with pytest.raises(BudgetError, match="'local' is not among"):
            take_part(tmp_path, order())
        once = epsilon([order().build_mechanism().participation_event()], 1e-5)
        Consent(mechanisms=("local",), limit_epsilon=once * 1.01).save(tmp_path)
        take_part(tmp_path, order(1))
        with pytest.raises(BudgetError, match="query level"):
            take_part(tmp_path, order(3))
        assert len(spent(tmp_path)) == 1

    def test_a_user_level_participation_counts_double_beside_a_query_level_one(self, tmp_path: Path) -> None:
        """One query turns a device's update into another one, which moves a sum by twice the clip norm."""
        Consent(mechanisms=("local", "central")).save(tmp_path)
        central: dict[str, Any] = {"mechanism": "central", "schedule": None, "records": None, "record_rate": None}
        take_part(tmp_path, order(1, federation="g", **central))
        query = order().build_mechanism().participation_event()
        whole = SampledGaussian(noise_multiplier=1.0, sampling_rate=1.0, sigma=2**29, dimension=256)
        both = epsilon([query, whole], 1e-5)
        Consent(mechanisms=("local", "central"), limit_epsilon=both - 0.01).save(tmp_path)
        with pytest.raises(BudgetError, match="query level"):
            take_part(tmp_path, order())
        Consent(mechanisms=("local", "central"), limit_epsilon=both + 0.01).save(tmp_path)
        take_part(tmp_path, order(3))

    @pytest.mark.parametrize(
        "changes",
        [
            {"steps": 1_000},
            {"noise_multiplier": 0.5},
            {"noise_multiplier": 3.0},
            {"record_rate": 1.0},
            {"records": 9},
            {"clip_norm": 0.06},
            {"dimension": 300},
            {"schedule": {"rounds": 8, "separation": 1, "participations": 3}},
            {"schedule": {"rounds": 8, "separation": 2, "participations": 4}},
            {"mechanism": "central", "schedule": None, "records": None, "record_rate": None},
        ],
    )
    def test_a_run_is_held_to_the_constants_of_its_first_order(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        """The run is charged for those: more steps, less noise or a higher rate later cost what nobody was told of."""
        AGREED.model_copy(update={"mechanisms": ("local", "central")}).save(tmp_path)
        take_part(tmp_path, order(1))
        with pytest.raises(BudgetError, match="limits of a run never change"):
            take_part(tmp_path, order(3, **changes))
        take_part(tmp_path, order(5))
        assert spent(tmp_path) == [order().build_mechanism().participation_event()] * 2

    def test_a_mechanism_is_not_exchanged_for_local_within_a_federation(self, tmp_path: Path) -> None:
        """What was asked for first is what readers of the federation's statement are told."""
        AGREED.model_copy(update={"mechanisms": ("local", "central")}).save(tmp_path)
        take_part(tmp_path, order(1, mechanism="central", schedule=None, records=None, record_rate=None))
        with pytest.raises(BudgetError, match="limits of a run never change"):
            take_part(tmp_path, order(3))

    def test_what_was_replayed_from_a_receipt_holds_a_run_too(self, tmp_path: Path) -> None:
        """Receipts name no limits: after a recovery, noise and steps would be the coordinator's choice again."""
        AGREED.save(tmp_path)
        with open_ledger(tmp_path) as ledger:
            event = order().build_mechanism().participation_event()
            ledger.recover([(event, purpose_of("f", 1, 1))], note={"replayed": "f"})
        with pytest.raises(BudgetError, match="limits of a run never change"):
            take_part(tmp_path, order(3, steps=1_000))
        take_part(tmp_path, order(5))

    def test_without_a_limit_no_round_is_joined_and_the_owner_is_told_which_would_do(self, tmp_path: Path) -> None:
        """A cap on participations bounds nothing: each federation has steps, noise and a cap of its own choice."""
        Consent(mechanisms=("local",), limit_delta=1e-6).save(tmp_path)
        with pytest.raises(BudgetError, match=r"stillroom budget --home .* --limit \d") as declined:
            take_part(tmp_path, order())
        assert spent(tmp_path) == []
        run = epsilon([order().build_mechanism().event()], 1e-6)
        (needed,) = re.findall(r"--limit ([\d.]+)`", str(declined.value))
        assert run <= float(needed) < run + 0.011
        assert f"epsilon {needed} (query level, delta 1.0e-06, against peers and network observers)" in str(
            declined.value
        )
        Consent(mechanisms=("local",), limit_epsilon=float(needed), limit_delta=1e-6).save(tmp_path)
        for number in (1, 3, 5):
            take_part(tmp_path, order(number))
        with pytest.raises(BudgetError, match="budget is"):
            take_part(tmp_path, order(federation="another name"))

    def test_whatever_is_asked_for_the_ledger_stays_within_the_limit(self, tmp_path: Path) -> None:
        """The coordinator is the adversary: it chooses federations, rounds, steps, rates and noise, order by order."""
        generator, limit, joined = random.Random(1), 6.0, 0
        Consent(mechanisms=("local",), limit_epsilon=limit).save(tmp_path)
        for number in range(1, 13):
            asked = order(
                number,
                federation=f"f{number % 5}",
                steps=generator.choice((1, 40)),
                noise_multiplier=generator.choice((1.0, 2.0)),
                record_rate=generator.choice((0.2, 1.0)),
                schedule={"rounds": 12, "separation": 1, "participations": 12},
            )
            try:
                take_part(tmp_path, asked)
                joined += 1
            except BudgetError:
                continue
        events = spent(tmp_path)
        assert 2 < len(events) == joined < 12
        assert 0.5 * limit < epsilon(events, 1e-5) <= limit

    def test_an_order_that_lacks_a_constant_is_refused(self, tmp_path: Path) -> None:
        """A constant that the device makes up may follow from its records."""
        AGREED.save(tmp_path)
        for missing in ("schedule", "records", "record_rate", "noise_multiplier"):
            lacking: dict[str, Any] = {missing: None}
            with pytest.raises(ProtocolError, match=r"'local' (needs|lacks)"):
                take_part(tmp_path, order(**lacking))


class TestAnswers:
    """What leaves the device, through the app that a SuperNode runs."""

    def ask(self, home: Path, adapter: Adapter, asked: RoundOrder) -> np.ndarray:
        grid = InProcessGrid(client_app=client_app(OwnUpdates()), nodes={2: {HOME_KEY: str(home)}})
        message = grid.create_message(order_message(asked, adapter), "train", 2, "1")
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error()
        assert set(reply.content) == {"update"}
        return np.asarray(read_update(reply.content, adapter.spec.size), np.float64) * 2.0**-24

    def test_declining_failing_and_having_nothing_look_alike(
        self, tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Zeros would tell the coordinator, an adversary here, who declined and whose training failed."""
        size = tiny_adapter.spec.size
        asked = order(dimension=size, release=tiny_release.id)
        empty = settle(tmp_path / "empty", tiny_release, [])
        declining = settle(tmp_path / "declining", tiny_release, OPENED)
        Consent(mechanisms=("central",)).save(declining)
        failing = settle(tmp_path / "failing", tiny_release, OPENED)
        answers = {"empty": self.ask(empty, tiny_adapter, asked), "declining": self.ask(declining, tiny_adapter, asked)}
        with monkeypatch.context() as broken:
            broken.setattr(PrivateTrainer, "update", lambda *arguments, **options: 1 / 0)
            answers["failing"] = self.ask(failing, tiny_adapter, asked)
        step = 2.0 * 0.05 / (0.5 * 8)
        expected, error = step * np.sqrt(3), 4 * step * np.sqrt(3) / np.sqrt(2 * size)
        for name, answer in answers.items():
            assert abs(answer.std() - expected) < error, name
            assert abs(answer.mean()) < 4 * expected / np.sqrt(size), name
        assert len(spent(empty)) == len(spent(failing)) == 1
        assert not (declining / LEDGER_FILE).exists(), "noise that no record went into costs nothing"

    @pytest.mark.parametrize("size", [0.0, 0.5, 2.0**34, 1e30, 3.4e38])
    def test_who_declines_answers_bit_for_bit_like_who_has_nothing(
        self,
        tmp_path: Path,
        tiny_release: Release,
        tiny_adapter: Adapter,
        monkeypatch: pytest.MonkeyPatch,
        size: float,
    ) -> None:
        """Other arithmetic is another distribution: differences of huge iterates are zeros, or lie on their grid."""
        stream: list[Randomness] = []

        def fresh() -> Randomness:
            stream.append(Randomness(seed="the same noise for every device"))
            return stream[-1]

        monkeypatch.setattr("stillroom_client.app.Randomness", fresh)
        adapter = Adapter(tiny_adapter.spec, np.full_like(tiny_adapter.values, size))
        asked = order(dimension=adapter.spec.size, release=tiny_release.id)
        homes = {name: settle(tmp_path / name, tiny_release, []) for name in ("empty", "declining", "failing")}
        Consent(mechanisms=("central",)).save(homes["declining"])
        answers = {name: self.ask(homes[name], adapter, asked) for name in ("empty", "declining")}
        with monkeypatch.context() as broken:
            broken.setattr(PrivateTrainer, "update", lambda *arguments, **options: 1 / 0)
            answers["failing"] = self.ask(homes["failing"], adapter, asked)
        with monkeypatch.context() as wrong:
            wrong.setattr("stillroom_client.app.noise_alone", lambda *a, **options: 0.9 * noise_alone(*a, **options))
            scaled = self.ask(homes["declining"], adapter, asked)
        assert len(stream) == 5, "one of them did not draw from the stream that is compared; who fails makes a second"
        assert len(spent(homes["empty"])) == 1 and not (homes["declining"] / LEDGER_FILE).exists()
        assert len(np.unique(answers["empty"])) > adapter.spec.size / 2, "a lattice, or zeros"
        np.testing.assert_array_equal(answers["empty"], answers["declining"])
        np.testing.assert_array_equal(answers["empty"], answers["failing"])
        assert not np.array_equal(answers["empty"], scaled)

    def test_an_attempt_that_was_answered_gets_fresh_noise_and_no_record(
        self, tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter
    ) -> None:
        """The same update twice, or a second one under one charge."""
        asked = order(
            dimension=tiny_adapter.spec.size, release=tiny_release.id, noise_multiplier=0.6, record_rate=1.0, records=4,
            clip_norm=0.5, steps=1,
        )  # fmt: skip
        home = settle(tmp_path / "d", tiny_release, OPENED)
        first, second = (self.ask(home, tiny_adapter, asked) for _ in "ab")
        assert len(spent(home)) == 1
        assert np.abs(first - second).max() > 0
        with Device.open(home) as device:
            records = mine_records(device, Encoder(device.release), candidates=4, one_per_query=True, most=4)
        trainer = PrivateTrainer(tiny_release.folder, tiny_adapter.spec)
        mechanism = asked.build_mechanism()
        assert isinstance(mechanism, LocalRounds)
        signal = np.sum(
            [mechanism.training.bound(g).astype(np.float64) for g in trainer.gradients(tiny_adapter, records, 0.1)], 0
        ) * (-0.5 / 2**28 / 4)
        along = [float(answer @ signal / np.linalg.norm(signal)) for answer in (first, second)]
        deviation = 0.6 * 0.5 / 4
        assert np.linalg.norm(signal) > 2 * deviation, "the signal drowns: nothing would be seen"
        assert abs(along[0] - np.linalg.norm(signal)) < 4 * deviation
        assert abs(along[1]) < 4 * deviation


def test_removing_a_query_moves_the_devices_sum_by_its_bounded_gradient_alone(
    tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter
) -> None:
    """Neighbouring data through the whole path: feedback, mined records, gradients, integer sum."""
    trainer, mechanism = (
        PrivateTrainer(tiny_release.folder, tiny_adapter.spec),
        Local(
            clip_norm=0.05,
            noise_multiplier=1.0,
            sampling_rate=1.0,
            steps=1,
            records=8,
            dimension=tiny_adapter.spec.size,
        ),
    )

    def total(home: Path, opened: list[tuple[str, str]]) -> NDArray[np.int64]:
        settle(home, tiny_release, opened)
        with Device.open(home) as device:
            records = mine_records(device, Encoder(device.release), candidates=4, one_per_query=True, most=8)
        bounded = [mechanism.bound(gradient) for gradient in trainer.gradients(tiny_adapter, records, 0.1)]
        return np.asarray(np.sum(bounded, axis=0), np.int64)

    everything, moved = total(tmp_path / "all", OPENED), []
    for absent, query in enumerate(OPENED):
        difference = everything - total(tmp_path / f"without {absent}", [q for q in OPENED if q != query])
        np.testing.assert_array_equal(difference, total(tmp_path / f"only {absent}", [query]))
        assert exact_norm_at_most(difference, mechanism.sensitivity)
        moved.append(float(np.linalg.norm(difference.astype(np.float64))))
    assert max(moved) > 0.999 * mechanism.sensitivity, "no gradient was clipped: any clip norm would pass"
