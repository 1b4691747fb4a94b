"""What the coordinator keeps of devices' ledgers."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
from pathlib import Path

import pytest

from stillroom_server.receipts import RECEIPTS_FILE, ReceiptBook
from stillroom_shared.errors import LedgerError, ProtocolError
from stillroom_shared.events import Event, SampledGaussian
from stillroom_shared.receipts import Attempt, issue
from stillroom_shared.signing import SigningKey

STEP = SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, sigma=2**29, dimension=10)
DEVICE = SigningKey.generate()


def shown(*rounds: int, key: SigningKey = DEVICE, device: str = "d", federation: str = "f") -> bytes:
    charges: dict[Attempt, Event] = {Attempt(number, 1): STEP for number in rounds}
    return issue("device", charges, federation=federation, device=device, key=key).model_dump_json().encode()


def kept(book: ReceiptBook, device: str = "d") -> list[int]:
    return [attempt.round for attempt in book.export(device, SigningKey.generate()).charges]


def test_a_ledger_that_went_back_is_refused_and_told_what_it_lacks(tmp_path: Path) -> None:
    """A restored backup spends again what it has forgotten."""
    book = ReceiptBook(tmp_path, federation="f")
    book.admit("d", shown(1, 2, 5))
    book.admit("d", shown(1, 2, 5, 6))
    with pytest.raises(
        LedgerError, match="'d' went back in time: it lacks round 5 attempt 1, round 6 attempt 1; hand it"
    ):
        ReceiptBook(tmp_path, federation="f").admit("d", shown(1, 2))  # also after a restart
    assert kept(book) == [1, 2, 5, 6]


def test_a_reply_that_was_lost_locks_nobody_out(tmp_path: Path) -> None:
    """The device charged a round whose answer never arrived: its ledger knows more, and that is in order."""
    book = ReceiptBook(tmp_path, federation="f")
    book.admit("d", shown(1))
    book.admit("d", shown(1, 2, 3))
    assert kept(book) == [1, 2, 3]


def _answered_and_killed(home: Path) -> None:
    with ReceiptBook(home, federation="f").round({Attempt(2, 1): STEP}) as admits:
        if admits("d", shown(1, 2)) and not admits("e", b"{"):
            os._exit(9)


def test_a_receipt_is_kept_when_its_round_comes_to_no_end(tmp_path: Path) -> None:
    """A device that answered, and whose ledger goes back after the coordinator crashed, would spend again unnoticed."""
    dying = multiprocessing.get_context("fork").Process(target=_answered_and_killed, args=(tmp_path,))
    dying.start()
    dying.join(20)
    assert dying.exitcode == 9
    book, another = ReceiptBook(tmp_path, federation="f"), ReceiptBook(tmp_path, federation="f")
    assert kept(book) == [1, 2]
    assert list(book.refused()) == ["e"]
    with book.round({Attempt(2, 2): STEP}) as admits:
        assert not admits("d", shown(2))
        another.admit("g", shown(1, device="g"))  # nobody is locked out while replies are awaited
        assert "it lacks round 1 attempt 1" in another.refused()["d"], "it is not on disk when its update is left out"


def test_after_the_replay_the_device_is_admitted_again(tmp_path: Path) -> None:
    """A backup that took part before anybody noticed: two histories, neither contains the other."""
    book = ReceiptBook(tmp_path, federation="f")
    book.admit("d", shown(1, 2, 3))
    with pytest.raises(LedgerError):
        book.admit("d", shown(1, 7))
    book.admit("d", shown(*{1, 7} | set(kept(book))))
    assert kept(book) == [1, 2, 3, 7]


def test_nobody_else_speaks_for_a_device(tmp_path: Path) -> None:
    """Whoever enrols under a taken name could fill its receipts with rounds, or hide that its ledger went back."""
    book = ReceiptBook(tmp_path, federation="f")
    book.admit("d", shown(1))
    with pytest.raises(ProtocolError, match="its earlier ones are by"):
        book.admit("d", shown(1, 2, 3, key=SigningKey.generate()))
    assert kept(book) == [1]


@pytest.mark.parametrize(
    "content", [b"{}", shown(1, device="e"), shown(1, federation="g"), shown(1).replace(b'"round', b"'")[:-9]]
)
def test_what_cannot_be_read_changes_nothing(tmp_path: Path, content: bytes) -> None:
    """A receipt about another device, kept as this one's, blames it for rounds it never joined."""
    book = ReceiptBook(tmp_path, federation="f")
    with pytest.raises(ProtocolError, match="device 'd'"):
        book.admit("d", content)
    assert kept(book) == []
    with sqlite3.connect(tmp_path / RECEIPTS_FILE) as database:
        assert database.execute("SELECT count(*) FROM signers").fetchone() == (0,)
    database.close()
