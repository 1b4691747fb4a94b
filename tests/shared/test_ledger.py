"""The ledger: durable before release, never forked, never silently changed."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stillroom_shared.accounting import epsilon
from stillroom_shared.errors import BudgetError, LedgerError
from stillroom_shared.events import SampledGaussian
from stillroom_shared.ledger import Budget, Ledger
from stillroom_shared.signing import SigningKey

STEP = SampledGaussian(noise_multiplier=4.0, sampling_rate=0.5, sigma=2**30, dimension=10)
ABOUT = {"federation": "test"}


def made(path: Path, rows: int = 3) -> SigningKey:
    key = SigningKey.generate()
    with Ledger.create(path, key=key, about=ABOUT) as ledger:
        for number in range(1, rows + 1):
            ledger.spend(STEP, budget=None, purpose={"round": number, "attempt": 1})
    return key


def test_a_crash_right_after_the_spend_leaves_it_recorded(tmp_path: Path) -> None:
    """A spend that is still in a buffer when the process dies is a release without a record."""
    script = f"""
import os, signal
from pathlib import Path
from stillroom_shared.events import SampledGaussian
from stillroom_shared.ledger import Ledger
from stillroom_shared.signing import SigningKey
key = SigningKey.generate(); key.save(Path({str(tmp_path / "key")!r}))
ledger = Ledger.create(Path({str(tmp_path / "ledger")!r}), key=key, about={ABOUT!r})
step = SampledGaussian(noise_multiplier=4.0, sampling_rate=0.5, sigma=2**30, dimension=10)
ledger.spend(step, budget=None, purpose={{"round": 1}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    key = SigningKey.load(tmp_path / "key")
    with Ledger.create(tmp_path / "ledger", key=key, about=ABOUT) as ledger:
        assert ledger.events() == [STEP]


def test_the_budget_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    """A refusal that has already been recorded or, worse, applied is no refusal."""
    budget = Budget(epsilon=epsilon([STEP] * 2, 1e-4) + 1e-6, delta=1e-4)
    with Ledger.create(tmp_path / "ledger", key=SigningKey.generate(), about=ABOUT) as ledger:
        for _ in range(2):
            ledger.spend(STEP, budget=budget, purpose={})
        with pytest.raises(BudgetError, match=r"would bring the spend to epsilon .*user level, delta"):
            ledger.spend(STEP, budget=budget, purpose={})
        assert ledger.events() == [STEP] * 2
        ledger.verify()


@pytest.mark.parametrize("noise", [4.0, 1e-3])
def test_a_refusal_prints_no_spend_smaller_than_it_is(noise: float) -> None:
    """Rounded to the nearest, a spend over the budget can be printed as the budget; one without bound has to print too."""
    step = SampledGaussian(noise_multiplier=noise, sampling_rate=1.0, sigma=2**30, dimension=10)
    cost = epsilon([step], 1e-4)
    with pytest.raises(BudgetError, match="to epsilon") as refused:
        Budget(epsilon=min(cost, 50.0) - 1e-3, delta=1e-4).check([step])
    printed = re.search(r"to epsilon (\S+) .*the budget is ([0-9.]+);", str(refused.value))
    assert printed is not None
    assert float(printed[1]) >= cost > float(printed[2])


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE ledger SET body = replace(body, '4.0', '9.0') WHERE seq = 2", "row 2 was altered"),
        ("DELETE FROM ledger WHERE seq = 2", "row 2 is missing"),
        ("DELETE FROM ledger WHERE seq = 0", "no genesis row"),
        (
            "UPDATE ledger SET signature = (SELECT signature FROM ledger WHERE seq = 1) WHERE seq = 3",
            "row 3 is not signed",
        ),
        ("UPDATE ledger SET kind = 'note' WHERE seq = 1", "row 1 was altered"),
    ],
)
def test_any_change_is_named(tmp_path: Path, statement: str, problem: str) -> None:
    """An edit of the file by hand must not lower the spend."""
    key = made(tmp_path / "ledger")
    with sqlite3.connect(tmp_path / "ledger") as database:
        database.execute(statement)
    database.close()
    with Ledger.open(tmp_path / "ledger", public_key=key.public) as ledger, pytest.raises(LedgerError, match=problem):
        ledger.verify()


def test_a_chain_rewritten_by_somebody_else_does_not_verify(tmp_path: Path) -> None:
    """Recomputing every hash is easy; the signature is what an attacker lacks."""
    key = made(tmp_path / "ledger")
    made(tmp_path / "forged", rows=1)
    with (
        Ledger.open(tmp_path / "forged", public_key=key.public) as ledger,
        pytest.raises(LedgerError, match="not signed"),
    ):
        ledger.verify()


def test_concurrent_writers_keep_one_chain(tmp_path: Path) -> None:
    """Two processes that both read the head and then write would fork the chain or lose a spend."""
    path, key = tmp_path / "ledger", SigningKey.generate()
    Ledger.create(path, key=key, about=ABOUT).close()

    def spend() -> None:
        with Ledger.create(path, key=key, about=ABOUT) as ledger:
            for _ in range(10):
                ledger.spend(STEP, budget=None, purpose={})

    writers = [threading.Thread(target=spend) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with Ledger.open(path, public_key=key.public) as ledger:
        ledger.verify()
        assert len(ledger.events()) == 40


def test_the_ledger_of_another_federation_is_refused(tmp_path: Path) -> None:
    """Spending on the wrong ledger hides the spend from the right one."""
    key = made(tmp_path / "ledger")
    with pytest.raises(LedgerError, match="belongs to"):
        Ledger.create(tmp_path / "ledger", key=key, about={"federation": "other"})


def test_reading_needs_a_ledger_and_cannot_write(tmp_path: Path) -> None:
    """A missing ledger that is silently created says that nothing was ever spent."""
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "junk").write_bytes(b"not a database at all, but long enough to look like one" * 100)
    with pytest.raises(LedgerError, match="not a readable ledger"):
        Ledger.open(tmp_path / "junk")
    key = made(tmp_path / "ledger")
    with (
        Ledger.open(tmp_path / "ledger", public_key=key.public) as ledger,
        pytest.raises(LedgerError, match="reading only"),
    ):
        ledger.record({"note": 1})
