"""Auditing a ledger from its file alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stillroom_server.coordinate import KEY_FILE, LEDGER_FILE, Coordinator
from stillroom_server.plan import Plan
from stillroom_shared.cli import build_app
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey
from stillroom_simulations.epsilon_context import check_epsilon_context


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
    done = CliRunner().invoke(build_app(), ["audit", "ledger", str(federation)])
    assert done.exit_code == 1
    assert "row 2 was altered" in done.output


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
