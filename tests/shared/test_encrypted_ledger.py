"""The ledger under a vault: the same guarantees, and nothing of it on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stillroom_shared import database
from stillroom_shared.errors import LedgerError, LedgerLostError
from stillroom_shared.events import SampledGaussian
from stillroom_shared.ledger import Ledger, _unreadable
from stillroom_shared.signing import SigningKey
from stillroom_shared.vault import PLAIN, Vault

pytest.importorskip("sqlcipher3")

KEY = SigningKey.generate()
EVENT = SampledGaussian(noise_multiplier=4.0, sampling_rate=0.5, sigma=2**30, dimension=10)
VAULT = Vault(bytes(range(32)))


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("vault", [VAULT, PLAIN], ids=["encrypted", "plain"])
def test_neither_the_ledger_nor_its_journal_says_what_was_spent_on(tmp_path: Path, vault: Vault) -> None:
    """Guards against a rollback journal with pages in the clear. The control: in a plain one the same search finds them."""
    path = tmp_path / "ledger.sqlite3"
    with Ledger.create(path, key=KEY, about={"federation": "davos"}, vault=vault) as ledger:
        for number in range(20):
            ledger.spend(EVENT, budget=None, purpose={"federation": "davos", "round": number})
        ledger._connection.execute("PRAGMA cache_size = 1")
        with ledger._writing():  # pages are written, and their old content journalled, before the end
            for number in range(60):
                ledger._append("note", {"davos": number})
            during = on_disk(tmp_path)
    assert set(during) == {"ledger.sqlite3", "ledger.sqlite3-journal"} and len(during["ledger.sqlite3-journal"]) > 4096
    assert {b"davos" in content for content in during.values()} == {vault.is_plain}
    assert (b"davos" in path.read_bytes()) == vault.is_plain
    with Ledger.resume(path, key=KEY, about={"federation": "davos"}, vault=vault) as ledger:
        ledger.verify()
        assert len(ledger.rows()) == 81 and len(ledger.events()) == 20


def test_a_killed_write_is_rolled_back_by_the_encrypted_journal(tmp_path: Path) -> None:
    """Guards against a journal that cannot be played back: the ledger would be lost with the first power cut."""
    path, copy = tmp_path / "a" / "ledger.sqlite3", tmp_path / "b"
    with Ledger.create(path, key=KEY, about={}, vault=VAULT) as ledger:
        ledger.spend(EVENT, budget=None, purpose={"round": 1})
        head = ledger.head
        ledger._connection.execute("PRAGMA cache_size = 1")
        with ledger._writing():
            for number in range(60):
                ledger._append("note", {"number": number})
            shutil.copytree(path.parent, copy)  # what a power cut would leave
    assert (copy / "ledger.sqlite3-journal").stat().st_size
    with Ledger.resume(copy / "ledger.sqlite3", key=KEY, about={}, vault=VAULT) as ledger:
        assert ledger.head == head and len(ledger.rows()) == 2


def test_a_wrong_key_or_an_altered_page_is_a_lost_ledger_and_a_busy_one_is_not(tmp_path: Path) -> None:
    """Guards against a ledger that is begun again because another process held it for a moment."""
    path = tmp_path / "ledger.sqlite3"
    Ledger.create(path, key=KEY, about={}, vault=VAULT).close()
    for wrong in (Vault(bytes(32)), PLAIN):
        with pytest.raises(LedgerLostError):
            Ledger.resume(path, key=KEY, about={}, vault=wrong)
    holder, other = (database.connect(path, VAULT.database_key("ledger"), timeout=0.1) for _ in range(2))
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(database.errors()) as busy:
        other.execute("SELECT * FROM ledger")
    assert isinstance(busy.value, Exception)
    told = _unreadable(path, busy.value)
    assert isinstance(told, LedgerError) and not isinstance(told, LedgerLostError)
    holder.close()
    other.close()
    content = bytearray(path.read_bytes())
    content[4096 + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(LedgerLostError):
        Ledger.resume(path, key=KEY, about={}, vault=VAULT)
