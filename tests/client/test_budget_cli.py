"""`stillroom budget`: what the owner of a device reads about its spend, changes, and recovers."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from stillroom_client.device import Device
from stillroom_client.home import Identity
from stillroom_client.participation import (
    CONSENT_FILE,
    KEY_FILE,
    LEDGER_FILE,
    Consent,
    device_receipt,
    refuse,
    take_part,
)
from stillroom_client.witness import answered
from stillroom_shared.accounting import epsilon
from stillroom_shared.adapter import Adapter
from stillroom_shared.cli import build_app
from stillroom_shared.errors import BudgetError, LedgerError, LedgerLostError, ProtocolError
from stillroom_shared.events import Event, SampledGaussian
from stillroom_shared.ledger import Ledger
from stillroom_shared.protocol import RoundOrder
from stillroom_shared.receipts import Attempt, Receipt, issue, lost, read_receipt
from stillroom_shared.release import Release, seal_adapter
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import statement
from stillroom_simulations.epsilon_context import check_epsilon_context

OPERATOR = SigningKey.generate()
SPENT = SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, sigma=2**29, dimension=256)


def order(number: int, **changes: object) -> RoundOrder:
    fields: dict[str, object] = {
        "federation": "f", "release": "r", "round": number, "attempt": 1, "mechanism": "central", "clip_norm": 1.0,
        "noise_multiplier": 2.0, "sampling_rate": 0.1, "devices": 50, "dimension": 256, "steps": 1, "learning_rate": 1.0,
        "temperature": 0.05, "candidates": 4,
    }  # fmt: skip
    return RoundOrder.model_validate(fields | changes)


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(build_app(), ["budget", *(str(argument) for argument in arguments)])


def shown(home: Path, *options: str | Path) -> dict[str, Any]:
    done = run("--home", home, "--json", *options)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """As much of a home as a budget needs."""
    home = tmp_path / "home"
    home.mkdir()
    identity = Identity(name="d7", trusted_key=OPERATOR.public, document_tower_hash="0" * 64)
    (home / "device.json").write_text(identity.model_dump_json())
    return home


def receipt(
    folder: Path, rounds: list[int], *, key: SigningKey = OPERATOR, device: str = "d7", name: str = "f"
) -> Path:
    """What the coordinator hands out."""
    charges: dict[Attempt, Event] = {Attempt(number, 1): SPENT for number in rounds}
    made = issue("coordinator", charges, federation=name, device=device, key=key)
    path = folder / "receipt.json"
    path.write_bytes(made.model_dump_json().encode())
    return path


def joined(home: Path) -> list[int]:
    with Ledger.open(home / LEDGER_FILE) as ledger:
        ledger.verify()
        return [purpose["round"] for purpose in ledger.purposes()]


def test_what_was_spent_on_what_and_against_whom(home: Path) -> None:
    """An owner who reads only one of the two sums, or a bare number, believes in a guarantee that nobody gave."""
    for number in (1, 2, 4):
        take_part(home, order(number))
    take_part(home, order(4, attempt=2))
    take_part(home, order(1, federation="other"))
    found = shown(home)
    assert found["spent"] == [
        {"federation": "f", "rounds": 3, "attempts": 4, "declined": 0},
        {"federation": "other", "rounds": 1, "attempts": 1, "declined": 0},
    ]
    own = found["own_participations"]
    assert own["epsilon"] == pytest.approx(epsilon([SPENT] * 5, 1e-5)), "all federations together, un-amplified"
    assert (own["unit"], own["delta"], own["adversary"]) == ("user", 1e-5, "peers and network observers")
    assert (own["attempts"], own["cap"], own["left_attempts"], own["limit"]) == (5, 200, 195, None)
    assert found["coordinator"]["guarantee"] == "none"
    text = run("--home", home).stdout
    check_epsilon_context(f"<table>{text}</table>")
    assert "coordinator" in text and "no guarantee (none)" in text and "un-amplified" in text


def test_the_second_sum_comes_from_the_adapter_in_use(
    tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter, signing_key: SigningKey
) -> None:
    """Rounds this device never joined are in the adapter, too: readers of releases see all of them."""
    home = tmp_path / "home"
    with Device.create(home, tiny_release, link=True) as device:
        before = shown(home)["all_rounds"]
        assert before == {
            "unknown": "unknown before the first adapter", "adversary": "readers of releases", "rounds": None,
            "rehearsal": False,
        }  # fmt: skip
        assert "unknown before the first adapter" in run("--home", home).stdout
        assert not (home / LEDGER_FILE).exists(), "looking made a ledger"
        step = SampledGaussian(noise_multiplier=2.0, sampling_rate=0.5, sigma=2**29, dimension=tiny_adapter.spec.size)
        made = statement([step] * 20, delta=1e-4, devices=900, sampling_rate=0.5, clip_norm=0.3, rehearsal=True)
        seal_adapter(
            tmp_path / "adapter", tiny_adapter, release_id=tiny_release.id, round=20, key=signing_key,
            statement=made.model_dump(mode="json"),
        )  # fmt: skip
        device.adopt(tmp_path / "adapter")
    found = shown(home)["all_rounds"]
    assert found["epsilon"] == pytest.approx(epsilon([step] * 20, 1e-4))
    assert (found["delta"], found["rounds"], found["rehearsal"]) == (1e-4, 20, True)
    text = run("--home", home).stdout
    check_epsilon_context(f"<table>{text}</table>")
    assert "all 20 rounds" in text and "epsilon 4.90 (user level, delta 1.0e-04)" in text
    assert "Rehearsal" in text


def test_over_the_limit_the_device_declines_and_spends_nothing(home: Path) -> None:
    """A limit that is checked against amplified rounds, or after the spend, lets the coordinator take more than agreed."""
    limit = epsilon([SPENT] * 2, 1e-5) + 1e-6
    assert shown(home, "--limit", str(limit), "--delta", "1e-5")["own_participations"]["limit"] == limit
    for number in (1, 2):
        take_part(home, order(number))
    with pytest.raises(BudgetError, match=r"user level, delta 1\.0e-05, against peers and network observers"):
        take_part(home, order(3))
    own = shown(home)["own_participations"]
    assert joined(home) == [1, 2] and own["left_attempts"] == 0
    assert own["left"] == pytest.approx(1e-6, abs=1e-7)
    assert "Nothing is left" in run("--home", home).stdout
    shown(home, "--limit", str(epsilon([SPENT] * 3, 1e-5) + 1e-6))
    with pytest.raises(BudgetError, match="answered already"):
        take_part(home, order(3))  # with zeros, but answered
    take_part(home, order(4))
    assert joined(home) == [1, 2, 4]
    assert shown(home, "--limit", "none")["own_participations"]["left_attempts"] == 197


def test_the_limit_counts_all_federations_and_the_cap_still_holds(home: Path) -> None:
    """One limit for each federation is no limit: whoever runs two asks twice."""
    Consent(participations=5, limit_epsilon=epsilon([SPENT] * 2, 1e-5) + 1e-6).save(home)
    take_part(home, order(1))
    take_part(home, order(1, federation="g"))
    with pytest.raises(BudgetError, match="budget is"):
        take_part(home, order(1, federation="h"))
    Consent(participations=2, limit_epsilon=100.0).save(home)
    with pytest.raises(BudgetError, match="over the cap of 2"):
        take_part(home, order(2))


def test_what_is_left_is_what_can_still_be_joined(home: Path) -> None:
    """An estimate in place of the accountant promises rounds that are then declined."""
    Consent(limit_epsilon=epsilon([SPENT] * 4, 1e-5) + 1e-6).save(home)
    take_part(home, order(1))
    left = shown(home)["own_participations"]["left_attempts"]
    assert left == 3
    for number in (2, 3, 4):
        take_part(home, order(number))
    with pytest.raises(BudgetError):
        take_part(home, order(5))


@pytest.mark.parametrize("limit", ["-1", "0", "much", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(home: Path, limit: str) -> None:
    """A limit of NaN is never passed."""
    done = run("--home", home, f"--limit={limit}")
    assert done.exit_code == 1 and "give a positive epsilon or `none`" in done.stderr
    assert not (home / CONSENT_FILE).exists()


def test_an_order_from_before_the_last_is_declined(home: Path) -> None:
    """A coordinator whose ledger went back repeats rounds that it has released: the second release would be free."""
    take_part(home, order(3))
    with pytest.raises(ProtocolError, match="ledger went back in time"):
        take_part(home, order(2))
    take_part(home, order(1, federation="g"))
    assert joined(home) == [3, 1]


def test_a_backup_is_refused_by_its_counterpart_and_recovers(home: Path, tmp_path: Path) -> None:
    """The whole story: backup, more rounds, restore, a round on the old ledger, the receipt, and the larger spend."""
    Consent(federation="f").save(home)
    take_part(home, order(1))
    take_part(home, order(2))
    shutil.copy(home / LEDGER_FILE, tmp_path / "backup")
    for number in (3, 4):
        take_part(home, order(number))
    kept = device_receipt(home, "f").charges
    shutil.copy(tmp_path / "backup", home / LEDGER_FILE)
    take_part(home, order(7))
    assert lost(kept, device_receipt(home, "f").charges) == [Attempt(3, 1), Attempt(4, 1)]
    done = run("--home", home, "--recover", receipt(tmp_path, [1, 2, 3, 4]), "--json")
    assert done.exit_code == 0, done.output
    assert "4 attempts of federation 'f' are on the receipt: 2 were missing" in done.stderr
    assert json.loads(done.stdout)["spent"] == [{"federation": "f", "rounds": 5, "attempts": 5, "declined": 0}]
    assert lost(kept, device_receipt(home, "f").charges) == []
    assert joined(home) == [1, 2, 7, 3, 4]
    again = run("--home", home, "--recover", tmp_path / "receipt.json")
    assert "0 were missing" in again.stderr and joined(home) == [1, 2, 7, 3, 4]
    with pytest.raises(BudgetError, match="answered already"):
        take_part(home, order(4))


def test_what_is_recovered_is_charged_even_over_the_limit(home: Path, tmp_path: Path) -> None:
    """What was released cannot be refused any more."""
    Consent(limit_epsilon=epsilon([SPENT] * 2, 1e-5) + 1e-6).save(home)
    found = shown(home, "--recover", receipt(tmp_path, [1, 2, 3, 4, 5]))
    assert found["own_participations"]["left"] == 0 and joined(home) == [1, 2, 3, 4, 5]
    with pytest.raises(BudgetError):
        take_part(home, order(6))


@pytest.mark.parametrize("damage", ["gone", "empty", "garbled", "cut row"])
def test_a_lost_ledger_begins_again_from_receipts_and_what_can_be_read(home: Path, tmp_path: Path, damage: str) -> None:
    """Without this, a disk error ends a device; with a new ledger alone, it forgets what it spent."""
    for number in range(1, 4):
        take_part(home, order(number))
    take_part(home, order(1, federation="g"))
    path = home / LEDGER_FILE
    if damage == "gone":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbled":
        path.write_bytes(os.urandom(9_000))
    else:
        with sqlite3.connect(path) as database:
            database.execute("UPDATE ledger SET body = replace(body, '2.0', '9.0') WHERE seq = 1")
        database.close()
    with pytest.raises(LedgerLostError, match=r"stillroom budget --recover"):
        take_part(home, order(9))
    done = run("--home", home, "--recover", receipt(tmp_path, [1, 2]))
    salvaged = 3 if damage == "cut row" else 0
    assert done.exit_code == 0, done.output
    assert f"begins again, with {salvaged} spends of the old one" in done.stderr
    assert sorted(joined(home)) == ([1, 1, 2, 3] if salvaged else [1, 2])
    assert len(list(home.glob("*.damaged-*"))) == (damage != "gone"), "what was damaged stays for whoever can read it"
    take_part(home, order(9))
    with pytest.raises(LedgerError, match="what it spent on federation 'g' is unknown"):
        take_part(home, order(9, federation="g"))
    assert run("--home", home, "--recover", receipt(tmp_path, [1], name="g")).exit_code == 0
    take_part(home, order(9, federation="g"))


def test_only_the_trusted_operators_receipt_about_this_device_is_replayed(home: Path, tmp_path: Path) -> None:
    """Anybody's file could use up the budget, or say of a lost ledger that nothing was on it."""
    Consent(federation="f").save(home)
    take_part(home, order(1))
    stranger = receipt(tmp_path, [2], key=SigningKey.generate())
    assert "has public_key" in run("--home", home, "--recover", stranger).stderr
    assert "has device 'd8'" in run("--home", home, "--recover", receipt(tmp_path, [2], device="d8")).stderr
    assert "has federation 'g'" in run("--home", home, "--recover", receipt(tmp_path, [2], name="g")).stderr
    (tmp_path / "receipt.json").write_bytes(b"{")
    assert "cannot be read" in run("--home", home, "--recover", tmp_path / "receipt.json").stderr
    assert run("--home", home, "--recover", tmp_path / "absent").exit_code == 1
    assert joined(home) == [1]


def test_a_ledger_without_its_key_is_not_begun_again(home: Path, tmp_path: Path) -> None:
    """Whoever deletes the key would otherwise have deleted the spend."""
    take_part(home, order(1))
    (home / KEY_FILE).unlink()
    for _ in range(2):
        with pytest.raises(LedgerError, match="restore the key"):
            take_part(home, order(2))
    assert run("--home", home, "--recover", receipt(tmp_path, [1])).exit_code == 1
    assert not (home / KEY_FILE).exists()


def test_a_receipt_says_nothing_of_other_federations(home: Path) -> None:
    """Row numbers, hashes, keys or a missing line would each tell one coordinator about another's rounds."""
    twin = home.parent / "twin"
    twin.mkdir()
    shutil.copy(home / "device.json", twin)
    take_part(home, order(1))
    shutil.copytree(home, twin, dirs_exist_ok=True)
    Consent(limit_epsilon=epsilon([SPENT] * 4, 1e-5) + 1e-6).save(home)
    Consent(limit_epsilon=epsilon([SPENT] * 4, 1e-5) + 1e-6).save(twin)
    for number in (1, 2, 3):
        take_part(home, order(number, federation="another"))  # uses up the limit
    take_part(twin, order(2))
    with pytest.raises(BudgetError):
        take_part(home, order(2))
    for each in (home, twin):
        Consent(federation="f").save(each)
    alone, busy = device_receipt(twin, "f").model_dump_json(), device_receipt(home, "f").model_dump_json()
    assert alone == busy, "also where the device declined"
    key = SigningKey.load(home / KEY_FILE).public
    assert "another" not in busy and key not in busy
    with Ledger.open(home / LEDGER_FILE) as ledger:
        assert not any(row.hash in busy for row in ledger.rows())
    first = device_receipt(home, "f").public_key
    Consent(federation="another").save(home)
    assert device_receipt(home, "another").public_key != first
    for named in ("another", None):
        Consent(federation=named).save(home)
        with pytest.raises(ProtocolError, match="no receipt for federation 'f'"):
            device_receipt(home, "f")
    read_receipt(busy.encode(), by="device", device="d7", federation="f", public_key=None)


def ask(home: Path, asked: RoundOrder) -> Receipt | None:
    """What the app does with an order, all but the training."""
    try:
        return take_part(home, asked)
    except Exception as error:
        return refuse(home, asked, error)


def test_where_a_receipt_ends_follows_from_the_orders_of_its_federation_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound on unjoined attempts, or one over all federations, ends the list where other federations' spends say."""
    monkeypatch.setattr("stillroom_client.refusals.MOST_LISTED", 4)
    twin, budget = home.parent / "twin", epsilon([SPENT] * 3, 1e-5) + 1e-6
    take_part(home, order(1))
    shutil.copytree(home, twin)
    Consent(federation="another", limit_epsilon=budget).save(home)
    for number in range(1, 9):  # two are joined and six are not
        ask(home, order(number, federation="another"))
    Consent(federation="f", limit_epsilon=budget).save(home)
    Consent(federation="f").save(twin)
    for number in range(2, 9):
        busy, idle = ask(home, order(number)), ask(twin, order(number))
        assert busy is not None and busy == idle
        assert list(busy.charges) == [Attempt(earlier, 1) for earlier in range(1, min(number, 4) + 1)]
    assert joined(home) == [1, 1, 2], "of f, another, another"
    assert joined(twin) == [1, 2, 3, 4], "what is joined and not listed would tell from what is not joined"
    found = shown(twin)
    assert "4 attempts of 'f' were asked for" in found["coordinators"][0]["refused"]


def test_declining_does_not_fill_the_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that asks without end, under one name or many, would grow the ledger by a row each time."""
    monkeypatch.setattr("stillroom_client.refusals.MOST_LISTED", 3)
    Consent(participations=0).save(home)
    for number in range(1, 8):
        with pytest.raises(BudgetError, match=r"over the cap of 0|3 attempts of 'f' were asked for"):
            take_part(home, order(number))
        ask(home, order(number))
        ask(home, order(number, federation=f"name {number}"))
    with Ledger.open(home / LEDGER_FILE) as ledger:
        rows = ledger.rows()
        assert sum(len(answered(rows, name)) for name in ("f", *(f"name {number}" for number in range(1, 8)))) == 3
        assert ledger.events() == []
    assert len(rows) <= 1 + 2 * 3
    assert sum(spent["declined"] for spent in shown(home)["spent"]) == 3


def test_a_repeated_attempt_is_shown_to_the_owner_and_on_no_receipt(home: Path) -> None:
    """A coordinator that was restored from an old copy repeats rounds: the owner is the one who can tell somebody."""
    Consent(federation="f").save(home)
    for number in (1, 2, 3):
        ask(home, order(number))
    assert shown(home)["coordinators"][0]["refused"] is None
    before = device_receipt(home, "f")
    for _ in range(20):
        for number in (2, 3):
            assert ask(home, order(number)) == before
    (seen,) = shown(home)["coordinators"]
    assert "answered already: an attempt is never answered twice" in seen["refused"]
    assert "The last order of f was not followed" in run("--home", home).stdout
    with Ledger.open(home / LEDGER_FILE) as ledger:
        assert len(ledger.rows()) == 1 + 3 + 1, "once, however often"
    ask(home, order(4))
    assert shown(home)["coordinators"][0]["refused"] is None and joined(home) == [1, 2, 3, 4]


def test_an_owner_who_agreed_to_local_without_a_limit_is_told(home: Path) -> None:
    """Every round is declined then, and a device that only waits looks as if nobody asked."""
    Consent(mechanisms=("local",)).save(home)
    assert shown(home)["own_participations"]["needs_limit"]
    assert "`stillroom budget --limit EPSILON`" in run("--home", home).stdout
    assert not shown(home, "--limit", "2")["own_participations"]["needs_limit"]


def test_looking_at_no_device_makes_nothing(tmp_path: Path) -> None:
    """A typo in --home must not become a device that has spent nothing."""
    for options in ([], ["--limit", "3"], ["--recover", str(tmp_path)]):
        done = run("--home", tmp_path / "typo", *options)
        assert done.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_torn_consent_is_named(home: Path) -> None:
    """The default in place of an unreadable consent agrees to what the owner never saw."""
    (home / CONSENT_FILE).write_text('{"participations": -3}')
    assert "consent.json: participations" in run("--home", home).stderr


def test_the_command_line_loads_no_accountant_for_its_help() -> None:
    """dp_accounting takes a second; everybody who asks for help would wait for it."""
    code = (
        "import sys\nfrom stillroom_shared.cli import build_app\ntry:\n    build_app()(['budget', '--help'])\n"
        "finally:\n    print(sorted({'dp_accounting', 'flwr', 'torch', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--recover" in done.stdout and done.stderr.strip() == "[]"
