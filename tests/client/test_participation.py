"""The device's own say and its own ledger."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from stillroom_client.app import HOME_KEY, client_app
from stillroom_client.device import Device
from stillroom_client.participation import LEDGER_FILE, Consent, take_part
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import BudgetError, LedgerError, ProtocolError
from stillroom_shared.events import SampledGaussian
from stillroom_shared.ledger import Ledger
from stillroom_shared.protocol import RoundOrder, order_message, read_update
from stillroom_shared.release import Release
from stillroom_simulations.engine import InProcessGrid


def order(**changes: object) -> RoundOrder:
    fields: dict[str, object] = {
        "federation": "f", "release": "r", "round": 1, "attempt": 1, "mechanism": "central", "clip_norm": 1.0,
        "noise_multiplier": 2.0, "sampling_rate": 0.1, "devices": 50, "dimension": 256, "steps": 1, "learning_rate": 1.0,
        "temperature": 0.05, "candidates": 4,
    }  # fmt: skip
    return RoundOrder.model_validate(fields | changes)


def test_participation_is_recorded_without_amplification(tmp_path: Path) -> None:
    """Sampling hides nothing from the coordinator: a device that counts it believes it spent less than it did."""
    take_part(tmp_path, order())
    with Ledger.open(tmp_path / LEDGER_FILE) as ledger:
        ledger.verify()
        (event,) = ledger.events()
    assert isinstance(event, SampledGaussian)
    assert event.sampling_rate == 1.0
    assert event.noise_multiplier == 2.0


def test_what_was_not_agreed_to_is_declined(tmp_path: Path) -> None:
    """A coordinator that may choose `none` has no need of noise."""
    with pytest.raises(BudgetError, match="'none' is not among"):
        take_part(tmp_path, order(mechanism="none", clip_norm=None, noise_multiplier=None))
    assert not (tmp_path / LEDGER_FILE).exists()


def test_an_attempt_is_never_answered_twice(tmp_path: Path) -> None:
    """Two answers to one attempt are two contributions under one charge."""
    take_part(tmp_path, order())
    with pytest.raises(BudgetError, match="answered already"):
        take_part(tmp_path, order())
    take_part(tmp_path, order(attempt=2))


def turn(round_number: int, attempt: int = 1, **changes: object) -> RoundOrder:
    schedule = {"rounds": 9, "separation": 3, "participations": 2} | changes
    return order(
        mechanism="correlated", schedule=schedule, coefficients=(1024, 512, 256), round=round_number, attempt=attempt,
        sampling_rate=1 / 3,
    )  # fmt: skip


def test_turns_that_come_too_early_or_too_often_are_declined(tmp_path: Path) -> None:
    """The noise covers devices that keep their distance; a server that asks more often spends what nobody charged."""
    Consent(mechanisms=("correlated",)).save(tmp_path)
    take_part(tmp_path, turn(1))
    take_part(tmp_path, turn(1, attempt=2))
    with pytest.raises(BudgetError, match="comes 2 rounds after round 1"):
        take_part(tmp_path, turn(3))
    with pytest.raises(BudgetError, match="limits of a run never change"):
        take_part(tmp_path, turn(4, participations=3))
    take_part(tmp_path, turn(4, attempt=2))
    with pytest.raises(BudgetError, match="participation 3"):
        take_part(tmp_path, turn(7))
    with Ledger.open(tmp_path / LEDGER_FILE) as ledger:
        events = ledger.events()
    assert events == [turn(1).build_mechanism().participation_event()] * 3
    with pytest.raises(ProtocolError, match="needs the schedule"):
        take_part(tmp_path, order(mechanism="correlated"))


def test_the_cap_holds(tmp_path: Path) -> None:
    """A cap that is checked after the fact is no cap."""
    Consent(participations=2).save(tmp_path)
    for number in (1, 2):
        take_part(tmp_path, order(round=number))
    with pytest.raises(BudgetError, match="over the cap of 2"):
        take_part(tmp_path, order(round=3))


def test_two_processes_cannot_both_answer_one_attempt(tmp_path: Path) -> None:
    """Flower starts a process for every message: a check outside the write transaction is passed by both."""
    take_part(tmp_path, order())
    outcomes: list[str] = []

    def attempt() -> None:
        try:
            take_part(tmp_path, order(round=2))
            outcomes.append("joined")
        except BudgetError:
            outcomes.append("declined")

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["declined"] * 5 + ["joined"]


def test_another_federation_or_too_little_noise_is_declined_before_anything_is_spent(tmp_path: Path) -> None:
    """A spend for an order that is then refused lets a coordinator use up a device's participations."""
    Consent(federation="mine", minimum_noise_multiplier=1.0).save(tmp_path)
    with pytest.raises(ProtocolError, match="joined 'mine'"):
        take_part(tmp_path, order())
    with pytest.raises(BudgetError, match=r"noise multiplier 0\.1 is below"):
        take_part(tmp_path, order(federation="mine", noise_multiplier=0.1))
    assert not (tmp_path / LEDGER_FILE).exists()


def test_a_removed_ledger_is_not_begun_again(tmp_path: Path) -> None:
    """A device that forgets what it spent spends it again."""
    take_part(tmp_path, order())
    (tmp_path / LEDGER_FILE).unlink()
    with pytest.raises(LedgerError, match="is gone"):
        take_part(tmp_path, order(round=2))


def test_a_device_whose_ledger_is_damaged_takes_no_part(tmp_path: Path) -> None:
    """Starting a new ledger would forget what was spent."""
    take_part(tmp_path, order())
    (tmp_path / LEDGER_FILE).write_bytes(b"gone" * 1000)
    for suffix in ("-wal", "-shm"):
        (tmp_path / (LEDGER_FILE + suffix)).unlink(missing_ok=True)
    with pytest.raises(LedgerError):
        take_part(tmp_path, order(round=2))


class _Leaky:
    """A source of updates that fails with private text."""

    def check(self, home: Path, order: RoundOrder) -> None:
        pass

    def update(self, home: Path, order: RoundOrder, adapter: Adapter) -> np.ndarray:
        raise RuntimeError("the query was: am I ill")


def test_a_failing_device_answers_with_a_zero_vector_and_nothing_else(
    tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter
) -> None:
    """Exception text, an error reply or a missing answer each tell the coordinator something about the data."""
    Device.create(tmp_path / "home", tiny_release, link=True, name="d").close()
    content = order_message(order(dimension=tiny_adapter.spec.size), tiny_adapter)
    grid = InProcessGrid(client_app=client_app(_Leaky()), nodes={2: {HOME_KEY: str(tmp_path / "home")}})
    message = grid.create_message(content, "train", 2, "1")
    (reply,) = grid.send_and_receive([message])
    assert not reply.has_error()
    assert set(reply.content) == {"update"}
    update = read_update(reply.content, tiny_adapter.spec.size)
    assert update.shape == (tiny_adapter.spec.size,)
    assert not update.any()


def test_an_order_that_cannot_be_read_says_nothing_of_the_device(tmp_path: Path) -> None:
    """Flower sends the text of an exception to the coordinator; a home path is private."""
    app = client_app(_Leaky())
    context = Context(
        run_id=1, node_id=2, node_config={HOME_KEY: str(tmp_path / "secret")}, state=RecordDict(), run_config={}
    )
    grid = InProcessGrid(client_app=app, nodes={2: {HOME_KEY: str(tmp_path / "secret")}})
    for kind in ("train", "query.enrol"):
        message: Message = grid.create_message(RecordDict(), kind, 2, "1")
        grid.push_messages([message])
        with pytest.raises(Exception) as caught:
            app(message, context)
        assert "secret" not in str(caught.value)
        assert caught.value.__suppress_context__
