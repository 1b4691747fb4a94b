"""Auditing a ledger from its file alone."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from stillroom_server.adapters import ADAPTERS_FOLDER
from stillroom_server.coordinate import KEY_FILE, LEDGER_FILE, Coordinator
from stillroom_server.plan import Plan
from stillroom_server.receipts import ReceiptBook
from stillroom_shared.cli import build_app
from stillroom_shared.events import SampledGaussian
from stillroom_shared.heads import Position
from stillroom_shared.ledger import Ledger
from stillroom_shared.receipts import Attempt, issue, read_receipt
from stillroom_shared.release import Release, seal_adapter
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import statement
from stillroom_simulations.audit import audit_ledger
from stillroom_simulations.epsilon_context import check_epsilon_context


def audit(home: Path, *options: str) -> Result:
    return CliRunner().invoke(build_app(), ["audit", "ledger", str(home), *options])


@pytest.fixture
def federation(tmp_path: Path, tiny_release: Release, signing_key: SigningKey) -> Path:
    home = tmp_path / "federation"
    Plan(
        federation="audited", release_folder=tiny_release.folder, enrolled=tuple(f"d{i}" for i in range(100)),
        mechanism="central", rounds=3, sampling_rate=0.5, clip_norm=1.0, noise_multiplier=3.0, budget_epsilon=50.0,
        delta=1e-3, local_steps=1, local_learning_rate=1.0, temperature=0.05, candidates=4, server_learning_rate=1.0,
        momentum=0.0, averaging=0.0,
    ).save(home)  # fmt: skip
    signing_key.save(home / KEY_FILE)
    with Coordinator(home) as coordinator:
        for number in range(1, 4):
            order = coordinator.plan.order(round_number=number, attempt=1, release="r", dimension=coordinator.spec.size)
            event = order.build_mechanism().event()
            coordinator.ledger.spend(event, budget=coordinator.plan.budget, purpose={"round": number, "attempt": 1})
    return home


def test_a_sound_ledger_prints_its_statement(federation: Path, signing_key: SigningKey) -> None:
    """An audit that prints a bare epsilon would be quoted without its adversary."""
    done = CliRunner().invoke(build_app(), ["audit", "ledger", str(federation), "--key", signing_key.public])
    assert done.exit_code == 0, done.output
    assert "4 rows verified" in done.output
    assert "coordinator there is no differential privacy guarantee" in done.output
    check_epsilon_context(done.output)


def test_a_broken_ledger_fails_and_names_the_row(federation: Path) -> None:
    """Exit status 0 with a warning passes in every script."""
    with sqlite3.connect(federation / LEDGER_FILE) as database:
        database.execute("UPDATE ledger SET body = replace(body, '3.0', '9.0') WHERE seq = 2")
    database.close()
    done = audit(federation)
    assert done.exit_code == 1
    assert "row 2 was altered" in done.output


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("DELETE FROM ledger WHERE seq = 1", "row 1 is missing"),
        ("UPDATE ledger SET kind = 'note' WHERE seq = 3", "row 3 was altered"),
        ("UPDATE ledger SET signature = '00' WHERE seq = 3", "row 3 is not signed"),
        ("UPDATE ledger SET seq = 9 WHERE seq = 3", "row 3 is missing: the next one is numbered 9"),
        ("DELETE FROM ledger", "no genesis row"),
    ],
)
def test_every_break_exits_with_1_and_names_the_row(federation: Path, damage: str, named: str) -> None:
    """A break that only some command notices is not noticed."""
    with sqlite3.connect(federation / LEDGER_FILE) as database:
        database.execute(damage)
    database.close()
    done = audit(federation)
    assert done.exit_code == 1
    assert named in done.output


def test_rows_cut_off_at_the_end_are_seen_by_who_kept_the_head(federation: Path) -> None:
    """What is left of a cut chain is sound: only the counterpart's copy of the head can tell."""
    with Ledger.open(federation / LEDGER_FILE) as ledger:
        rows = ledger.rows()
    assert f"head {rows[3].hash}" in audit(federation).output
    for seen in rows:  # an older head is on the chain: nothing was cut off
        done = audit(federation, "--head", seen.hash)
        assert done.exit_code == 0 and "the head you named is among them" in done.output
    with sqlite3.connect(federation / LEDGER_FILE) as database:
        database.execute("DELETE FROM ledger WHERE seq = 3")
    database.close()
    assert audit(federation).exit_code == 0
    done = audit(federation, "--head", rows[3].hash)
    assert done.exit_code == 1
    assert "ends with row 2 and lacks the row" in done.output


def test_every_epsilon_is_recomputed_from_the_events(federation: Path) -> None:
    """A statement that is copied, not computed, says whatever was written: here three rounds, two of them a retry."""
    import dp_accounting
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    with Ledger.open(federation / LEDGER_FILE) as ledger:
        bodies = [json.loads(row.body) for row in ledger.rows() if row.kind == "spend"]
    accountant = PLDAccountant()
    for body in bodies:
        gaussian = dp_accounting.GaussianDpEvent(body["event"]["noise_multiplier"])
        accountant.compose(dp_accounting.PoissonSampledDpEvent(body["event"]["sampling_rate"], gaussian))
    found = audit_ledger(federation).statement
    assert found.against["readers of releases"] == pytest.approx(accountant.get_epsilon(1e-3), rel=1e-6)


def publish(federation: Path, key: SigningKey, *, round_number: int = 3, rows: int = 4, **claims: object) -> None:
    """Seal an adapter of round 3 whose statement claims something else than the ledger's."""
    with Coordinator(federation) as coordinator:
        hashes = [row.hash for row in coordinator.ledger.rows()]
        seal_adapter(
            federation / ADAPTERS_FOLDER / f"round-{round_number:04d}", coordinator.adapter,
            release_id=coordinator.release.id, round=round_number,
            statement=coordinator.statement().model_dump(mode="json") | claims, key=key,
            ledger=Position(rows=rows, head=hashes[rows - 1]) if rows else None,
        )  # fmt: skip


def test_a_published_adapter_states_what_the_ledger_holds(federation: Path, signing_key: SigningKey) -> None:
    """Devices read the adapter, not the ledger: an epsilon that is smaller there misleads all of them."""
    publish(federation, signing_key)
    done = audit(federation)
    assert done.exit_code == 0, done.output
    assert "1 published adapters state" in done.output


@pytest.mark.parametrize(
    ("claims", "problem"),
    [
        (
            {"against": {"readers of releases": 0.5, "peers and network observers": 9.0, "the coordinator": None}},
            "states",
        ),
        (
            {"against": {"readers of releases": 90.0, "peers and network observers": 90.0, "the coordinator": 1.0}},
            "states",
        ),
        ({"against": {}}, "states"),
        ({"delta": 1e-2}, "states"),
        ({"rounds": 2}, "states"),
        ({"rounds": 5}, "states"),
        ({"rounds": 0, "epsilon": {}, "against": {}}, "states"),
        ({"devices": 10**6}, "states"),
        ({"rehearsal": True}, "states"),
        ({"evaluations": 1}, "states"),
        ({"clip_norm": 0.5}, "states"),
        ({"epsilon": {"PLD": 99.0, "RDP": 99.0}}, None),
        ({"rows": 0}, "does not say which rows"),
        ({"rows": 3}, "row 3 was charged for its rounds too"),
        ({"round_number": 4}, "4, the ledger was charged for 3"),
    ],
)
def test_an_adapter_that_claims_less_than_its_events_cost_fails(
    federation: Path, signing_key: SigningKey, claims: dict[str, Any], problem: str | None
) -> None:
    """Claiming a larger epsilon than it cost deceives nobody; every other difference does."""
    publish(federation, signing_key, **claims)
    done = audit(federation)
    assert done.exit_code == (0 if problem is None else 1), done.output
    assert problem is None or problem in done.output


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_whole_statement_of_fewer_rounds_fails(federation: Path, signing_key: SigningKey, rounds: int) -> None:
    """Each of its fields fits the others, and it was really true once: for another adapter."""
    with Coordinator(federation) as coordinator:
        events, plan = coordinator.ledger.events()[:rounds], coordinator.plan
    earlier = statement(
        events, delta=plan.delta, devices=100, sampling_rate=0.5, clip_norm=1.0, rehearsal=False, mechanism="central"
    )
    publish(federation, signing_key, **earlier.model_dump(mode="json"))
    done = audit(federation)
    assert done.exit_code == 1
    assert f"level, delta 1.0e-03), {rounds} rounds" in done.output


def test_a_receipt_is_written_for_an_enrolled_device_only(
    federation: Path, signing_key: SigningKey, tmp_path: Path
) -> None:
    """A receipt for a misspelt name is empty, and would tell its reader that nothing was lost."""
    event = SampledGaussian(noise_multiplier=3.0, sampling_rate=1.0, sigma=2**30, dimension=7)
    shown = issue("device", {Attempt(2, 1): event}, federation="audited", device="d7", key=SigningKey.generate())
    ReceiptBook(federation, federation="audited").admit("d7", shown.model_dump_json().encode())
    out = tmp_path / "receipt.json"
    arguments = ["audit", "receipt", str(federation), "--out", str(out), "--device"]
    assert CliRunner().invoke(build_app(), [*arguments, "d7"]).exit_code == 0
    found = read_receipt(
        out.read_bytes(), by="coordinator", device="d7", federation="audited", public_key=signing_key.public
    )
    assert found.charges == {Attempt(2, 1): event}
    other = CliRunner().invoke(build_app(), [*arguments, "d700"])
    assert other.exit_code == 1 and "is not enrolled" in other.output


def test_another_key_or_another_plan_fails(federation: Path) -> None:
    """A ledger that anybody may have written, or a plan with a kinder delta, proves nothing."""
    other = CliRunner().invoke(build_app(), ["audit", "ledger", str(federation), "--key", SigningKey.generate().public])
    assert other.exit_code == 1
    assert "not signed" in other.output
    plan = federation / "plan.json"
    plan.write_text(plan.read_text().replace("0.001", "0.002"))
    changed = CliRunner().invoke(build_app(), ["audit", "ledger", str(federation)])
    assert changed.exit_code == 1
    assert "another plan" in changed.output
