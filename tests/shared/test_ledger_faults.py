"""The ledger under faults: killed processes, concurrent ones, full disks, torn and garbled files."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom_shared.errors import BudgetError, LedgerError, LedgerLostError
from stillroom_shared.events import SampledGaussian
from stillroom_shared.ledger import Budget, Ledger
from stillroom_shared.signing import SigningKey

ROOT = Path(__file__).resolve().parents[2]
STEP = SampledGaussian(noise_multiplier=4.0, sampling_rate=1.0, sigma=2**30, dimension=10)
ABOUT = {"federation": "test"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: a killed process loses no cache, and a thousand fsyncs take a minute."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as made:
        yield Path(made)


def faults(scenario: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.ledger_faults", scenario, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("scenario", ["first", "next"])
def test_killed_at_every_line_nothing_is_released_unrecorded_and_the_next_start_works(
    folder: Path, scenario: str
) -> None:
    """Between any two lines: a key without its ledger, half a ledger, or a release ahead of its row would be the end."""
    found = faults(scenario, folder)
    assert found["failures"] == []
    assert found["statuses"] == {"9": found["points"] - 1, "0": 1}, "every line was reached, and then the whole run"
    assert found["points"] > 150
    # Kills before, between and after the two steps: a spend that was not released stays recorded.
    assert found["nothing"] > 50 and found["recorded_only"] >= 1 and found["released"] == 1


def test_the_check_sees_a_release_ahead_of_its_spend(folder: Path) -> None:
    """Guards the test above against never failing."""
    assert "released without a record: [5]" in faults("careless", folder)["failures"][0]


def test_killed_inside_a_write_the_journal_is_rolled_back(folder: Path) -> None:
    """Half a page on the disk: without its journal the file would be unreadable, or a row would be half there."""
    found = faults("torn", folder)
    assert found["failures"] == []
    assert found["points"] > 50 and found["journals"] > 30 and found["released"] > 10
    assert set(found["statuses"]) == {"-25", "0"}, "SIGXFSZ killed it, until the limit was large enough"


def test_a_full_disk_refuses_and_loses_nothing(folder: Path) -> None:
    """An error of the file system that passes for success releases without a record."""
    found = faults("full", folder)
    assert found["failures"] == []
    assert found["points"] > 50 and found["released"] > 10
    assert set(found["statuses"]) == {"3", "0"}, "a LedgerError and nothing else"


def test_killed_at_random_times(folder: Path) -> None:
    """SIGKILL does not wait for the end of a line: inside a commit, a journal is left for the next start."""
    found = faults("random", folder)
    assert found["failures"] == []
    assert found["points"] >= 60 and found["released"] > 10 and found["journals"] >= 1


def test_concurrent_processes_never_pass_the_budget_nor_fork_the_chain(folder: Path) -> None:
    """Each process checks against what it saw: outside the transaction, four of them would pass the last place together."""
    path, key = folder / "ledger", filled(folder / "ledger", rows=4)
    key.save(folder / "key")
    script = f"""
import os
from pathlib import Path
from stillroom_shared.accounting import epsilon
from stillroom_shared.events import SampledGaussian
from stillroom_shared.errors import BudgetError
from stillroom_shared.ledger import Budget, Ledger
from stillroom_shared.signing import SigningKey
step = SampledGaussian(noise_multiplier=4.0, sampling_rate=1.0, sigma=2**30, dimension=10)
key = SigningKey.load(Path({str(folder / "key")!r}))
costs = [epsilon([step] * n, 1e-6) for n in range(1, 8)]  # once, for all children
budget = Budget(epsilon=costs[5] + 1e-9, delta=1e-6)
for _ in range(4):
    if not os.fork():
        with Ledger.create(Path({str(path)!r}), key=key, about={ABOUT!r}) as ledger:
            os.write(1, b"r")
            try:
                while True:
                    ledger.spend(step, budget=budget, purpose={{}})
                    os.write(1, b"s")
            except BudgetError:
                os._exit(0)
for _ in range(4):
    assert os.wait()[1] == 0
"""
    # Two places are left. While somebody else is writing, all four see that, and wait to write.
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"rrrr"
        time.sleep(0.3)
        other.execute("ROLLBACK")
        assert process.stdout.read() == b"ss"
    other.close()
    assert process.returncode == 0
    with Ledger.open(path, public_key=key.public) as ledger:
        ledger.verify()
        assert ledger.events() == [STEP] * 6


def filled(path: Path, rows: int = 30) -> SigningKey:
    key = SigningKey.generate()
    with Ledger.create(path, key=key, about=ABOUT) as ledger:
        for number in range(rows):
            ledger.spend(STEP, budget=None, purpose={"round": number})
    return key


def resumed(path: Path, key: SigningKey) -> list[Any]:
    with Ledger.resume(path, key=key, about=ABOUT) as ledger:
        return ledger.events()


def test_a_file_cut_off_anywhere_is_refused_with_the_remedy(folder: Path) -> None:
    """A shorter file that still opens says that less was spent; an empty one that is begun again, that nothing was."""
    key = filled(folder / "ledger")
    whole = (folder / "ledger").read_bytes()
    for length in range(0, len(whole), 509):
        (folder / "ledger").write_bytes(whole[:length])
        with pytest.raises(LedgerLostError, match="receipts"):
            resumed(folder / "ledger", key)
        with pytest.raises(LedgerLostError, match="receipts"):
            Ledger.create(folder / "ledger", key=key, about=ABOUT)
    (folder / "ledger").write_bytes(whole)
    assert resumed(folder / "ledger", key) == [STEP] * 30


def test_a_garbled_file_is_refused_or_complete(folder: Path) -> None:
    """Bytes that rot where SQLite does not look must not lower the spend."""
    key = filled(folder / "ledger")
    whole = (folder / "ledger").read_bytes()
    refused = 0
    for place in range(0, len(whole) - 64, 257):
        (folder / "ledger").write_bytes(
            whole[:place] + bytes(b ^ 0x5A for b in whole[place:][:64]) + whole[place + 64 :]
        )
        try:
            assert resumed(folder / "ledger", key) == [STEP] * 30
        except LedgerError as error:
            refused += 1
            assert "receipts" in str(error) or "cannot be read now" in str(error)
    assert refused > 40  # of 112; the others are in free space and in the index, which no reading touches


def test_a_hot_journal_is_rolled_back_and_a_garbled_one_is_no_silent_loss(folder: Path) -> None:
    """A journal that belongs to nothing must not be played back into a ledger that is sound."""
    key = filled(folder / "ledger")
    (folder / "ledger-journal").write_bytes(os.urandom(5_000))
    assert resumed(folder / "ledger", key) == [STEP] * 30
    # A journal left behind, as a dying process leaves it: the ledger's next reader undoes the half-written row.
    script = f"""
import os, sqlite3
connection = sqlite3.connect({str(folder / "ledger")!r}, isolation_level=None)
connection.execute("PRAGMA cache_size=1"); connection.execute("PRAGMA cache_spill=1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE ledger SET body = body || hex(zeroblob(3000))")
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    assert (folder / "ledger-journal").stat().st_size > 0
    half_written = (folder / "ledger").read_bytes()
    assert resumed(folder / "ledger", key) == [STEP] * 30
    assert (folder / "ledger").read_bytes() != half_written, "nothing was half written: the journal was not needed"


def test_a_stale_journal_is_not_played_into_a_new_ledger(folder: Path) -> None:
    """SQLite takes any journal of that name for its own."""
    key = filled(folder / "old")
    script = f"""
import os, sqlite3
connection = sqlite3.connect({str(folder / "old")!r}, isolation_level=None)
connection.execute("PRAGMA cache_size=1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE ledger SET body = body || hex(zeroblob(3000))")
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    for name in ("ledger-journal", "ledger.partial-journal"):
        (folder / name).write_bytes((folder / "old-journal").read_bytes())
    with Ledger.create(folder / "ledger", key=key, about=ABOUT) as ledger:
        assert [row.kind for row in ledger.rows()] == ["genesis"]


def test_a_commit_survives_a_power_cut_right_after_it(folder: Path) -> None:
    """With FULL, the deletion of the journal may be undone by a power cut, and the committed row is then rolled back."""
    filled(folder / "ledger", rows=1)
    with Ledger.open(folder / "ledger") as ledger:
        (level,) = ledger._connection.execute("PRAGMA synchronous").fetchone()
        (mode,) = ledger._connection.execute("PRAGMA journal_mode").fetchone()
    assert (level, mode) == (3, "delete")  # EXTRA: https://sqlite.org/pragma.html#pragma_synchronous


def test_rows_that_are_no_rows_are_refused(folder: Path) -> None:
    """Whoever can write the file can write any type into it: a crash is not a refusal."""
    key = filled(folder / "ledger", rows=2)
    for columns in ("X'00', X'01', 7, NULL, 1.5", "'spend', '{', '', 'zz', ''", "'spend', X'ff', 'a', 'b', 'c'"):
        odd = folder / "odd"
        odd.unlink(missing_ok=True)
        with sqlite3.connect(odd) as database:
            database.execute(f"ATTACH '{folder / 'ledger'}' AS own")
            database.execute("CREATE TABLE ledger AS SELECT * FROM own.ledger")
            database.execute(f"INSERT INTO ledger VALUES (3, {columns})")
        database.close()
        with pytest.raises(LedgerLostError, match="row 3"):
            resumed(odd, key)


def test_a_signed_row_of_an_unknown_kind_is_refused(folder: Path) -> None:
    """A later version's kind of spend that this one skips would not count."""
    key = filled(folder / "ledger", rows=1)
    with Ledger.resume(folder / "ledger", key=key, about=ABOUT) as ledger, ledger._writing():
        ledger._append("charge", {"event": {}})  # type: ignore[arg-type]
    with pytest.raises(LedgerLostError, match="row 2 is of kind 'charge'"):
        resumed(folder / "ledger", key)


def test_a_busy_ledger_is_not_a_lost_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery that takes a lock for damage would begin the ledger again beside the one that is in use."""
    key = filled(folder / "ledger", rows=1)
    other = sqlite3.connect(folder / "ledger", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    real = sqlite3.connect
    monkeypatch.setattr("sqlite3.connect", lambda *a, **k: real(*a, **(k | {"timeout": 0.05})))
    with pytest.raises(LedgerError, match="locked") as caught:
        resumed(folder / "ledger", key)
    other.close()
    assert not isinstance(caught.value, LedgerLostError)
    assert resumed(folder / "ledger", key) == [STEP]


def test_the_budget_names_who_it_holds_against() -> None:
    """A refusal that quotes an epsilon without its adversary is quoted that way."""
    budget = Budget(epsilon=0.1, delta=1e-6, adversary="peers and network observers")
    with pytest.raises(BudgetError, match=r"user level, delta 1\.0e-06, against peers and network observers"):
        budget.check([STEP])
