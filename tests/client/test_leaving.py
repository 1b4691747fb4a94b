"""To leave a federation and to join again; and what the owner reads about what went out last."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict
from tests.client.test_participation import order

from stillroom_client.app import HOME_KEY, client_app
from stillroom_client.budget import budget_report
from stillroom_client.device import Device
from stillroom_client.leaving import join, leave
from stillroom_client.participation import CONSENT_FILE, LEDGER_FILE, Consent, open_ledger, set_limit, take_part
from stillroom_client.sent import SENT_FILE, last_sent
from stillroom_client.witness import require_forward
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import BudgetError, DataError, SettingsError
from stillroom_shared.files import exclusive
from stillroom_shared.protocol import RoundOrder, order_message, read_update
from stillroom_shared.release import Release
from stillroom_simulations.engine import InProcessGrid


class Ones:
    """A source of updates that are not zero; `meanwhile` happens while one is made."""

    def __init__(self, meanwhile: object = None) -> None:
        self.meanwhile = meanwhile

    def check(self, home: Path, order: RoundOrder) -> None:
        pass

    def update(self, home: Path, order: RoundOrder, adapter: Adapter) -> np.ndarray:
        if callable(self.meanwhile):
            self.meanwhile()
        return np.ones(adapter.spec.size, np.float32)


@pytest.fixture
def home(tmp_path: Path, tiny_release: Release) -> Path:
    Device.create(tmp_path / "home", tiny_release, link=True, name="d").close()
    return tmp_path / "home"


def answer(home: Path, source: Ones, adapter: Adapter, number: int = 1) -> RecordDict:
    content = order_message(order(dimension=adapter.spec.size, round=number), adapter)
    grid = InProcessGrid(client_app=client_app(source), nodes={2: {HOME_KEY: str(home)}})
    (reply,) = grid.send_and_receive([grid.create_message(content, "train", 2, "1")])
    assert not reply.has_error()
    return reply.content


def test_who_left_answers_nothing_and_looks_like_who_has_nothing(home: Path, tiny_adapter: Adapter) -> None:
    """Guards against a switch that the next order does not see, and one that tells the coordinator who left."""
    Consent(federation="f").save(home)
    joined = answer(home, Ones(), tiny_adapter)
    assert read_update(joined, tiny_adapter.spec.size).any()
    leave(home)
    left = answer(home, Ones(), tiny_adapter, 2)
    assert not read_update(left, tiny_adapter.spec.size).any()
    assert set(left) == set(joined) == {"update", "receipt"}
    with open_ledger(home) as ledger:
        assert len(ledger.events()) == 1
    [spent] = budget_report(home).spent
    assert (spent.attempts, spent.declined) == (1, 1)


def test_an_update_that_is_being_made_is_withheld(home: Path, tiny_adapter: Adapter) -> None:
    """Guards against training that outlives the consent: it takes minutes, and its owner has said no."""
    sent = answer(home, Ones(lambda: leave(home)), tiny_adapter)
    assert not read_update(sent, tiny_adapter.spec.size).any()
    assert (note := last_sent(home)) is not None and not note.own


def test_who_leaves_between_the_check_and_the_charge_is_not_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a consent that is read once, early: accounting takes seconds."""

    def slowly(*arguments: object) -> None:
        Consent(takes_part=False).save(tmp_path)
        require_forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("stillroom_client.participation.require_forward", slowly)
    with pytest.raises(BudgetError, match="the owner has left"):
        take_part(tmp_path, order())
    with open_ledger(tmp_path) as ledger:
        assert ledger.events() == []


def test_leaving_is_on_the_disk_and_keeps_everything_else(home: Path) -> None:
    """Guards against a consent that loses its limit on the way, and one that others can read."""
    before = Consent(federation="f", mechanisms=("local",), limit_epsilon=3.0, participations=7)
    before.save(home)
    leave(home)
    leave(home)
    assert Consent.load(home) == before.model_copy(update={"takes_part": False})
    assert (home / CONSENT_FILE).stat().st_mode & 0o777 == 0o600
    with pytest.raises(BudgetError, match="the owner has left"):
        take_part(home, order())
    assert not (home / LEDGER_FILE).exists()  # nothing was spent, so nothing is begun
    with pytest.raises(DataError, match="is not the home of a device"):
        leave(home.parent)


def test_a_changed_limit_does_not_bring_back_who_left(home: Path) -> None:
    """Guards against a lost update: `stillroom budget --limit` reads the consent, the page writes it, the command writes it."""
    with exclusive(home):
        changing = threading.Thread(target=set_limit, args=(home, "4", None))
        changing.start()
        changing.join(0.3)
        assert changing.is_alive()  # it waits for who holds the home
        Consent(takes_part=False).save(home)
    changing.join()
    assert Consent.load(home) == Consent(takes_part=False, limit_epsilon=4.0)


def test_joining_again_takes_the_consent_that_was_shown(home: Path) -> None:
    """Guards against an agreement to one limit that is carried out with another."""
    shown = leave(home)
    set_limit(home, "9", None)
    with pytest.raises(SettingsError, match="changed since it was shown"):
        join(home, seen=shown, limit_epsilon=1.0)
    assert not Consent.load(home).takes_part
    shown = Consent.load(home)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SettingsError, match="positive epsilon"):
            join(home, seen=shown, limit_epsilon=wrong)
    assert join(home, seen=shown, limit_epsilon=1.5) == Consent.load(home) == Consent(limit_epsilon=1.5)
    take_part(home, order(noise_multiplier=9.0))


def test_local_is_not_joined_without_a_limit(home: Path) -> None:
    """Guards against consent to a mechanism that bounds nothing without one."""
    Consent(mechanisms=("local",), takes_part=False).save(home)
    with pytest.raises(BudgetError, match="needs a limit"):
        join(home, seen=Consent.load(home), limit_epsilon=None)
    assert not Consent.load(home).takes_part


def test_what_went_out_last_is_kept_with_its_size(home: Path, tiny_adapter: Adapter) -> None:
    """Guards against a panel that shows a size which was never that of anything, or the round before."""
    assert last_sent(home) is None
    for number in (3, 4):
        content = answer(home, Ones(), tiny_adapter, number)
    note = last_sent(home)
    assert note is not None and (note.federation, note.round, note.attempt, note.purpose) == ("f", 4, 1, "round")
    vector = content.array_records["update"]
    assert note.own and note.size == sum(len(array.data) for array in vector.values())
    assert 4 * tiny_adapter.spec.size < note.size < 4 * tiny_adapter.spec.size + 500
    assert abs(datetime.now(UTC) - note.at) < timedelta(minutes=1)
    assert (home / SENT_FILE).stat().st_mode & 0o777 == 0o600
    Consent(federation="f").save(home)
    answer(home, Ones(), tiny_adapter, 5)
    assert (last := last_sent(home)) is not None and last.size > note.size  # the receipt travels too


def test_a_note_that_cannot_be_written_changes_no_answer(home: Path, tiny_adapter: Adapter) -> None:
    """Guards against a full disk that a coordinator can see."""
    (home / f"{SENT_FILE}.partial").mkdir()
    assert read_update(answer(home, Ones(), tiny_adapter), tiny_adapter.spec.size).any()
    assert last_sent(home) is None
    (home / SENT_FILE).write_text("{")
    assert last_sent(home) is None
