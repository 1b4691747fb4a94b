"""Encryption at rest: what is on the disk, and what a thief who writes, a crash or a mistake can do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.client.devices import units
from tests.client.lived_in import QUERY, SECRET, anywhere, contents, found_in, lived_in, structured
from tests.client.test_participation import order

from stillroom_client import memory_folder, recovery, sent, text_index, unlocking
from stillroom_client.device import Device
from stillroom_client.encrypting import Protection, decrypt, encrypt
from stillroom_client.home import Identity
from stillroom_client.participation import CONSENT_FILE, LEDGER_FILE, Consent, open_ledger
from stillroom_client.sent import SENT_FILE, last_sent
from stillroom_client.unlocking import Private, unlock
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError, EncryptionError, LedgerError, LedgerLostError
from stillroom_shared.files import exclusive
from stillroom_shared.release import Release

pytest.importorskip("sqlcipher3")

PASSPHRASE = "correct horse battery staple"


@pytest.fixture(autouse=True)
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing unlocked by another test, and no passphrase in the environment."""
    unlocking.forget()
    monkeypatch.delenv(unlocking.FILE_VARIABLE, raising=False)


def test_no_byte_of_an_encrypted_home_tells_what_is_in_it(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against one file that was forgotten. The same search finds everything in a home in the clear."""
    planted = lived_in(tmp_path / "plain", tiny_release)
    missed = [what for what, places in found_in(tmp_path / "plain", planted).items() if not places]
    assert not missed, f"the search is blind to {missed}"
    planted |= lived_in(tmp_path / "home", tiny_release, Protection(PASSPHRASE))
    assert anywhere(tmp_path / "home", planted) == {}
    assert structured(tmp_path / "home") == []
    with Device.open(tmp_path / "home") as device:
        assert [hit.passage_id for hit in device.search("zirconium", 1, mode="bm25")] == [SECRET.id]
        assert device.feedback()[0].query == QUERY
        found = anywhere(tmp_path / "home", planted)  # with its log and its indexes open
    assert found == {}


def test_a_home_is_the_same_after_encrypting_and_decrypting(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a conversion that loses a row, its order, a number that must not come again, or the ledger's chain."""
    home = tmp_path / "home"
    planted = lived_in(home, tiny_release)
    before = holdings(home)
    encrypt(home, Protection(PASSPHRASE))
    assert anywhere(home, planted) == {}
    unlocking.forget()
    with pytest.raises(EncryptionError, match="stays locked"):
        Device.open(home)
    with Device.open(home, key=PASSPHRASE) as device:
        device.refresh_index()
    assert holdings(home) == before
    assert anywhere(home, planted) == {} and structured(home) == []
    decrypt(home)
    assert holdings(home) == before
    assert not (home / "sealed").exists() and not list(home.glob(".*.partial"))
    missed = [what for what, places in found_in(home, planted).items() if not places and "index" not in what]
    assert not missed
    with Device.open(home) as device:
        assert [hit.passage_id for hit in device.search("zirconium", 1, mode="bm25")] == [SECRET.id]


def holdings(home: Path) -> dict[str, object]:
    """All that a home holds, whatever it is kept in."""
    with Device.open(home) as device:
        tables = [
            row[0] for row in device.store.query("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY 1")
        ]
        rows = {table: device.store.query(f"SELECT * FROM {table}") for table in tables}
        rows["meta"] = [row for row in rows["meta"] if row[0] != "identity"]  # noted when an encrypted home is opened
        made = device.store.query("SELECT type, name, sql FROM sqlite_schema ORDER BY 1, 2")
    with open_ledger(home) as ledger:
        return {"rows": rows, "made": made, "ledger": ledger.rows(), "consent": Consent.load(home), "head": ledger.head}


def test_a_home_that_is_open_elsewhere_is_not_converted(tmp_path: Path, tiny_release: Release) -> None:
    """What the other one writes into the old files would be lost without a word."""
    home = tmp_path / "home"
    lived_in(home, tiny_release)
    changes: list[Callable[[], None]] = [lambda: encrypt(home, Protection(PASSPHRASE)), lambda: decrypt(home)]
    for change in changes:
        before = holdings(home)
        with Device.open(home) as device:
            device.store.count()
            with pytest.raises(DataError, match="end whatever has this home open"):
                change()
        with open_ledger(home) as ledger, ledger._writing(), pytest.raises(DataError, match="nothing was changed"):
            change()
        assert holdings(home) == before
        change()
        assert holdings(home) == before


def test_what_is_not_of_this_home_is_refused_or_built_anew(tmp_path: Path, tiny_release: Release) -> None:
    """A thief who may also write: files of another home, old ones and altered ones must neither be used nor stop a search."""
    one, other = tmp_path / "one", tmp_path / "other"
    for home in (one, other):
        lived_in(home, tiny_release, Protection(PASSPHRASE))
    old = contents(one)
    with Device.open(one) as device:
        device.remove([SECRET.id])
        device.refresh_index()
        stamp = indexed(one).name
    wrongs: list[Callable[[], object]] = [
        lambda: shutil.copy(other / "sealed/index.faiss", one / "sealed/index.faiss"),
        lambda: (one / "sealed/index.faiss").write_bytes(old[one / "sealed/index.faiss"]),
        lambda: shutil.copy(indexed(one), one / "sealed/index.faiss"),
        lambda: flip(one / "sealed/index.faiss"),
        lambda: shutil.copy(indexed(other), indexed(one)),
        lambda: indexed(one).write_bytes(
            next(old[p] for p in old if p.parent.name == "index.tantivy" and one in p.parents)
        ),
        lambda: flip(indexed(one)),
        lambda: indexed(one).write_bytes(b""),
    ]
    for wrong in wrongs:
        wrong()
        with Device.open(one) as device:
            assert (device.status().index, device.status().text_index) != ("current", "current")
            assert device.search("zirconium", 3, mode="bm25") == []
            assert SECRET.id not in device.search_many(units(1, tiny_release.dimension), 200)[0]
            assert device.status().index == device.status().text_index == "current"
    assert indexed(one).name == stamp
    for name, error in (
        ("store.sqlite3", DataError), ("ledger.sqlite3", LedgerError), ("consent.json", EncryptionError),
        ("device.key", EncryptionError),
    ):  # fmt: skip
        kept = (one / "sealed" / name).read_bytes()
        for path in (one / "sealed").glob(f"{name}-*"):
            path.unlink()
        shutil.copy(other / "sealed" / name, one / "sealed" / name)
        with pytest.raises(error):
            holdings(one)
        (one / "sealed" / name).write_bytes(kept)
    holdings(one)


def indexed(home: Path) -> Path:
    [place] = (home / "sealed/index.tantivy").iterdir()
    return place


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_without_a_folder_in_memory_words_are_found_and_nothing_is_written(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a machine without tmpfs on which Tantivy's files fall back to a disk."""
    monkeypatch.setattr(memory_folder, "_base", lambda: None)
    home = tmp_path / "home"
    planted = lived_in(home, tiny_release, Protection(PASSPHRASE))
    with Device.open(home) as device:
        assert [hit.passage_id for hit in device.search("zirconium", 1, mode="bm25")] == [SECRET.id]
        assert device.status().text_index == "missing"
    assert not list((home / "sealed/index.tantivy").rglob("*")) and anywhere(home, planted) == {}


def test_a_folder_in_memory_is_of_its_owner_and_goes_with_him(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against words that stay in memory after a kill, and against a folder that another user has laid out."""
    if not memory_folder.in_memory(Path("/dev/shm")):
        pytest.skip("this machine has no tmpfs")
    assert not memory_folder.in_memory(tmp_path) and not memory_folder.in_memory(Path("/proc"))
    place = Path("/dev/shm") / f"stillroom-test-{os.getpid()}"
    place.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    try:
        if not (child := os.fork()):
            with memory_folder.memory_folder() as folder:
                assert folder is not None
                (folder / "words").write_text("zirconium")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        [base] = place.iterdir()
        [left] = base.iterdir()
        assert (left / "words").exists() and left.stat().st_mode & 0o077 == base.stat().st_mode & 0o077 == 0
        with memory_folder.memory_folder() as one, memory_folder.memory_folder() as other:
            assert one is not None and other is not None
            assert sorted(base.iterdir()) == sorted((one, other))  # what is in use stays
        assert list(base.iterdir()) == []
        base.rmdir()
        base.symlink_to(tmp_path)
        with memory_folder.memory_folder() as folder:
            assert folder is None or place not in folder.parents
        assert list(tmp_path.iterdir()) == []
    finally:
        shutil.rmtree(place)


def test_words_of_an_encrypted_home_are_brought_forward(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an index that is built anew for every passage: at 100,000 that takes seconds each time."""
    home, written = tmp_path / "home", []
    lived_in(home, tiny_release, Protection(PASSPHRASE))
    write = text_index._write

    def counted(index: Any, added: Any, gone: Any) -> None:
        batch = list(added)
        written.append((len(batch), len(gone)))
        write(index, batch, gone)

    monkeypatch.setattr(text_index, "_write", counted)
    with Device.open(home) as device:
        device.add([Passage("new", "me", "A porphyry vase.", "")], units(1, tiny_release.dimension))
        device.remove(["p3"])
        assert [hit.passage_id for hit in device.search("porphyry wordp3", 5, mode="bm25")] == ["new"]
    assert written == [(1, 1)]


def test_another_trusted_key_is_refused(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a thief who writes to the disk and has the device trust releases and adapters of his own."""
    home = tmp_path / "home"
    Device.create(home, tiny_release, link=True, protection=Protection(PASSPHRASE)).close()
    Device.open(home).close()
    own = Identity.load(home)
    (home / "device.json").write_text(own.model_copy(update={"trusted_key": "0" * 64}).model_dump_json(indent=1) + "\n")
    with pytest.raises(EncryptionError, match="was altered"):
        Device.open(home)
    (home / "device.json").write_text(own.model_dump_json(indent=1) + "\n")
    Device.open(home).close()


def test_a_damaged_note_of_what_was_sent_is_none(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a privacy panel that shows nothing, not even the switch to leave, because of it."""
    home = tmp_path / "home"
    Device.create(home, tiny_release, link=True, protection=Protection(PASSPHRASE)).close()
    unlock(home).write(SENT_FILE, b"{}")
    flip(home / "sealed" / SENT_FILE)
    assert last_sent(home) is None
    unlocking.forget()
    with pytest.raises(EncryptionError, match="stays locked"):
        last_sent(home)


def test_a_note_of_what_was_sent_does_not_stay_in_the_clear(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a round that ends while its home is being encrypted, and writes where that was before."""
    home = tmp_path / "home"
    Device.create(home, tiny_release, link=True).close()
    worker = threading.Thread(target=encrypt, args=(home, Protection(PASSPHRASE)))

    def slow(home: Path, **given: Any) -> Private:
        found = unlock(home, **given)
        worker.start()
        worker.join(1)
        return found

    monkeypatch.setattr(sent, "unlock", slow)
    sent.note_sent(home, order(), size=7, own=True)
    worker.join(60)
    monkeypatch.undo()
    assert not (home / SENT_FILE).exists()
    assert (noted := last_sent(home)) is not None and noted.size == 7


@pytest.mark.parametrize("back", [False, True])
def test_a_consent_that_moves_while_it_is_read_is_not_the_default(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    """Guards against an owner's limit that a round does not see because the home is encrypted, or decrypted, just then."""
    home = tmp_path / "home"
    Device.create(home, tiny_release, link=True, protection=Protection(PASSPHRASE) if back else None).close()
    asked = Consent(federation="f", limit_epsilon=1.0, takes_part=False)
    asked.save(home)
    real, convert = Private.read, [lambda: decrypt(home) if back else encrypt(home, Protection(PASSPHRASE))]

    def late(private: Private, name: str) -> bytes:
        if convert and name == CONSENT_FILE and sys._getframe(1).f_code.co_name == "load":
            convert.pop()()
        return real(private, name)

    monkeypatch.setattr(Private, "read", late)
    assert Consent.load(home) == asked and not convert


def test_a_file_in_the_clear_that_was_put_beside_sealed_ones_is_not_removed(
    tmp_path: Path, tiny_release: Release
) -> None:
    """Guards against a restored backup that is overwritten because it looks like a leftover."""
    home = tmp_path / "home"
    lived_in(home, tiny_release, Protection(PASSPHRASE))
    (home / "store.sqlite3").write_bytes(b"from a backup")
    Device.open(home).close()
    with pytest.raises(EncryptionError, match="move them away first"):
        decrypt(home)
    assert (home / "store.sqlite3").read_bytes() == b"from a backup"


def test_a_lost_ledger_is_recovered_in_an_encrypted_home(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a new ledger, or the damaged copy beside it, that is written in the clear, or cannot be read on."""
    home = tmp_path / "home"
    planted = lived_in(home, tiny_release, Protection(PASSPHRASE))
    identity, ledger_file = Identity.load(home), home / "sealed" / LEDGER_FILE
    content = bytearray(ledger_file.read_bytes())
    content[100:200] = bytes(100)
    ledger_file.write_bytes(content)
    with pytest.raises(LedgerLostError):
        open_ledger(home).close()
    with pytest.raises(DataError, match="--recover"):
        decrypt(home)
    with exclusive(home):
        assert recovery._begin_again(home) == 0
    with open_ledger(home) as ledger:
        assert ledger.rows()[1].fields["begun_again"]
    assert len(list((home / "sealed").glob("*.damaged-*"))) == 1 and identity.name == "home"
    assert anywhere(home, planted) == {}
    decrypt(home)
    with open_ledger(home) as ledger:
        ledger.verify()


def test_a_home_in_the_clear_needs_no_library_of_encryption(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a base installation that fails, or starts slower, for want of what only encryption uses."""
    lived_in(tmp_path / "sealed", tiny_release, Protection(PASSPHRASE))
    lived_in(tmp_path / "plain", tiny_release)
    code = (
        "import sys; sys.modules['sqlcipher3'] = sys.modules['keyring'] = None\n"
        "from pathlib import Path; from stillroom_client.device import Device\n"
        "from stillroom_shared.errors import MissingExtraError\n"
        "home = Path(sys.argv[1]); device = Device.open(home / 'plain'); print(device.store.count())\n"
        "try: Device.open(home / 'sealed', key=sys.argv[2])\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, PASSPHRASE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, said = done.stdout.splitlines()
    assert int(count) == 121 and "pip install 'stillroom[encrypted]'" in said
