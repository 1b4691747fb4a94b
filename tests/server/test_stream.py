"""A run survives a crash at every point of every write, and no row is ever released twice."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.references.factorization import toeplitz

from stillroom_server import stream
from stillroom_server.charges import Formed, record_formed
from stillroom_server.stream import RowStream
from stillroom_shared.correlated import Correlated
from stillroom_shared.errors import LedgerError, ProtocolError
from stillroom_shared.files import replace_file
from stillroom_shared.ledger import Ledger
from stillroom_shared.mechanism import RESOLUTION
from stillroom_shared.randomness import Randomness
from stillroom_shared.signing import SigningKey
from stillroom_shared.toeplitz import reconstruct

ROUNDS = 6
MECHANISM = Correlated(
    clip_norm=0.5, noise_multiplier=0.2, coefficients=(1024, 640, 400), participations=2, separation=3, rounds=ROUNDS,
    devices=30, dimension=4,
)  # fmt: skip


class Crash(BaseException):
    """The process ends here."""


KEY = SigningKey.generate()
_ledgers: list[Ledger] = []


def ledger_of(home: Path) -> Ledger:
    _ledgers.append(Ledger.create(home / "ledger.sqlite3", key=KEY, about={}))
    return _ledgers[-1]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _ledgers:
        _ledgers.pop().close()


def opened(home: Path, mechanism: Correlated = MECHANISM, federation: str = "f", plan: str = "p") -> RowStream:
    return RowStream(home / "rows.npz", mechanism, ledger=ledger_of(home), federation=federation, plan=plan)


def total_of(row: int, attempt: int) -> NDArray[np.int64]:
    """What the devices send differs from one attempt to the next."""
    return np.arange(4) * RESOLUTION + 100 * row + attempt


def noisy_of(content: bytes) -> NDArray[np.int64]:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return np.asarray(arrays["noisy"])


class Operator:
    """A coordinator with a checkpoint; `seen` are all updates that ever left the stream, by row."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.applied: list[NDArray[np.float64]] = []
        self.seen: dict[int, list[NDArray[np.float64]]] = {}
        self.sums: dict[int, list[NDArray[np.int64]]] = {}

    def go_on(self) -> None:
        """One life of the process: until the run is finished or the process ends."""
        with opened(self.home) as rows:
            while len(self.applied) < ROUNDS:
                number = len(self.applied) + 1
                update = rows.pending(len(self.applied))
                if update is None:
                    sums = self.sums.setdefault(number, [])
                    sums.append(total_of(number, len(sums)))
                    update = rows.release(number, sums[-1], Randomness())
                self.seen.setdefault(number, []).append(update)
                self.checkpoint(update)

    def checkpoint(self, update: NDArray[np.float64]) -> None:
        self.applied.append(update)


@pytest.mark.parametrize("point", ["before", "torn", "after"])
@pytest.mark.parametrize("row", range(1, ROUNDS + 1))
def test_a_crash_at_any_write_releases_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int, point: str
) -> None:
    """Two different rows of one round, or one noise on two sums, give the sums away by subtraction."""
    written: list[tuple[bytes, bool]] = []

    def failing(path: Path, content: bytes) -> None:
        number = len(written) + 1
        if point == "torn" and number == row:
            path.with_name(f"{path.name}.partial").write_bytes(content[: len(content) // 2])
        if point == "after" or number != row:
            replace_file(path, content)
        written.append((content, number != row))
        if number == row:
            raise Crash

    monkeypatch.setattr(stream, "replace_file", failing)
    operator = Operator(tmp_path)
    with pytest.raises(Crash):
        operator.go_on()
    assert row not in operator.seen, "the row left before it was durable"
    operator.go_on()

    assert len(written) == ROUNDS + (point != "after"), "the crash did not happen where it should"
    assert [len(operator.seen[number]) for number in range(1, ROUNDS + 1)] == [1] * ROUNDS
    attempts = {number: len(sums) for number, sums in operator.sums.items()}
    assert attempts == {number: 1 + (number == row and point != "after") for number in range(1, ROUNDS + 1)}

    survived = [content for content, kept in written if kept or point == "after"]
    noisy = np.array([noisy_of(content) for content in survived])
    expected = reconstruct(noisy, MECHANISM.coefficients) * (0.5 / RESOLUTION / MECHANISM.denominator)
    np.testing.assert_allclose(np.array(operator.applied), expected, rtol=1e-12)
    sums = np.array([operator.sums[number][-1] for number in range(1, ROUNDS + 1)])
    noise = noisy - toeplitz(MECHANISM.coefficients, ROUNDS) @ sums
    assert (abs(noise) < 12 * MECHANISM.sigma).all(), "a sum of another attempt is in a later row"
    if point != "after":
        sums[row - 1] = operator.sums[row][0]
        lost = noisy_of(written[row - 1][0]) - (toeplitz(MECHANISM.coefficients, ROUNDS) @ sums)[row - 1]
        assert (lost != noise[row - 1]).all(), "the noise of the lost row came back on another sum"


@pytest.mark.parametrize("point", ["before", "after"])
@pytest.mark.parametrize("row", range(1, ROUNDS + 1))
def test_a_crash_around_the_note_of_a_row_hands_out_the_row_that_was_formed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int, point: str
) -> None:
    """Between the row file and the ledger's note, and between the note and the checkpoint: neither asks the devices again."""
    noted: list[int] = []

    def failing(ledger: Ledger, formed: Formed) -> None:
        crash = formed.round == row and row not in noted
        noted.append(formed.round)
        if not (crash and point == "before"):
            record_formed(ledger, formed)
        if crash:
            raise Crash

    monkeypatch.setattr(stream, "record_formed", failing)
    operator = Operator(tmp_path)
    with pytest.raises(Crash):
        operator.go_on()
    assert row not in operator.seen, "the row left before the ledger named it"
    content = noisy_of((tmp_path / "rows.npz").read_bytes())
    operator.go_on()
    assert [len(operator.seen[number]) for number in range(1, ROUNDS + 1)] == [1] * ROUNDS
    assert [len(operator.sums[number]) for number in range(1, ROUNDS + 1)] == [1] * ROUNDS
    with ledger_of(tmp_path) as ledger:
        notes = [note.fields for note in ledger.rows()[1:]]
    assert [note["formed"] for note in notes] == list(range(1, ROUNDS + 1)), "each row is named once"
    assert notes[row - 1]["hash"] == Formed.of(row, content).hash


@pytest.mark.parametrize("restored", ["old", "deleted", "another"])
def test_a_restored_row_file_and_checkpoint_release_no_row_again(tmp_path: Path, restored: str) -> None:
    """Both of one time fit each other; the ledger, which is the newest, knows that later rows were handed out."""
    path = tmp_path / "rows.npz"
    operator = Operator(tmp_path)
    with opened(tmp_path) as rows:
        for number in range(1, ROUNDS + 1):
            if number == 4:
                old, applied = path.read_bytes(), len(operator.applied)
            operator.checkpoint(rows.release(number, total_of(number, 0), Randomness()))
    newest = path.read_bytes()
    if restored == "another":  # as many rows, of another history
        (other := tmp_path / "other").mkdir()
        with opened(other) as rows:
            for number in range(1, ROUNDS + 1):
                rows.release(number, total_of(number, 0), Randomness())
        path.write_bytes((other / "rows.npz").read_bytes())
    elif restored == "old":
        path.write_bytes(old)
        operator.applied = operator.applied[:applied]
    else:
        path.unlink()
        operator.applied = []
    with pytest.raises(LedgerError, match=f"names row {ROUNDS} of hash .*old copy or gone; restore the newest copy"):
        operator.go_on()
    assert operator.seen == {}
    path.write_bytes(newest)
    with opened(tmp_path) as rows:
        assert rows.pending(ROUNDS) is None


def test_a_ledger_that_lacks_a_row_is_refused(tmp_path: Path) -> None:
    """A ledger of an old time would take each row that it does not know for one that nobody has seen."""
    with opened(tmp_path) as rows:
        rows.release(1, total_of(1, 0), Randomness())
        old = (tmp_path / "ledger.sqlite3").read_bytes()
        rows.release(2, total_of(2, 0), Randomness())
    older = ledger_of(tmp_path / "empty").path.read_bytes()
    (tmp_path / "ledger.sqlite3").write_bytes(old)
    with opened(tmp_path) as rows, pytest.raises(LedgerError, match=r"at row 2, .* names 1: the ledger is an old copy"):
        rows.pending(2)
    (tmp_path / "ledger.sqlite3").write_bytes(older)
    with pytest.raises(LedgerError, match=r"at row 2, .* names 0: the ledger is an old copy"):
        opened(tmp_path)


@pytest.mark.parametrize("row", range(1, ROUNDS + 1))
def test_a_crash_before_the_checkpoint_hands_out_the_same_row_again(tmp_path: Path, row: int) -> None:
    """A coordinator that forgot what it applied must not get a second version of it, however often it dies."""

    class Forgetful(Operator):
        lives = 0

        def checkpoint(self, update: NDArray[np.float64]) -> None:
            if len(self.applied) + 1 == row and self.lives < 3:
                self.lives += 1
                raise Crash
            super().checkpoint(update)

    operator = Forgetful(tmp_path)
    for _ in range(3):
        with pytest.raises(Crash):
            operator.go_on()
    operator.go_on()
    assert [len(operator.seen[number]) for number in range(1, ROUNDS + 1)] == [1 + 3 * (n == row) for n in range(1, 7)]
    assert all((again == operator.seen[row][0]).all() for again in operator.seen[row])
    assert all(len(sums) == 1 for sums in operator.sums.values())


@pytest.mark.parametrize("point", ["before", "after"])
def test_a_failed_write_leaves_a_living_process_no_second_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """A full disk ends no process. A copy of the state in memory would then be behind the file, or ahead of it."""

    def failing(path: Path, content: bytes) -> None:
        if point == "after":
            replace_file(path, content)
        raise OSError("no space left on device")

    with opened(tmp_path) as rows:
        rows.release(1, total_of(1, 0), Randomness())
        with monkeypatch.context() as patched:
            patched.setattr(stream, "replace_file", failing)
            with pytest.raises(OSError, match="no space"):
                rows.release(2, total_of(2, 0), Randomness())
        if point == "before":
            assert rows.pending(1) is None
            update = rows.release(2, total_of(2, 1), Randomness())
        else:
            with pytest.raises(LedgerError, match="formed already"):
                rows.release(2, total_of(2, 1), Randomness())
            first = rows.pending(1)
            assert first is not None
            update = first
        again = rows.pending(1)
        assert again is not None and (again == update).all()


def test_a_row_out_of_order_is_refused(tmp_path: Path) -> None:
    """A row that is formed again, or skipped, is another strategy matrix than the one whose sensitivity is known."""
    with opened(tmp_path) as rows:
        for wrong in (0, 2, -1):
            with pytest.raises(LedgerError, match="out of order"):
                rows.release(wrong, total_of(1, 0), Randomness())
        rows.release(1, total_of(1, 0), Randomness())
        for wrong in (1, 3):
            with pytest.raises(LedgerError, match="out of order"):
                rows.release(wrong, total_of(1, 1), Randomness())
        assert rows.row == 1


def test_a_lost_or_old_file_is_refused(tmp_path: Path) -> None:
    """A coordinator that starts over after losing the file releases its first rows a second time."""
    path = tmp_path / "rows.npz"
    with opened(tmp_path) as rows:
        rows.release(1, total_of(1, 0), Randomness())
        old = path.read_bytes()
        for number in (2, 3):
            rows.release(number, total_of(number, 0), Randomness())
        with pytest.raises(LedgerError, match="at row 3, the checkpoint at row 1"):
            rows.pending(1)
    path.write_bytes(old)
    with pytest.raises(LedgerError, match=r"at row 1, .* names row 3"):
        opened(tmp_path)
    path.unlink()
    with pytest.raises(LedgerError, match=r"at row 0, .* names row 3"):
        opened(tmp_path)


def test_a_file_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    """Sums of another federation, or under other coefficients, would enter rows that are accounted for here."""
    with opened(tmp_path) as rows:
        rows.release(1, total_of(1, 0), Randomness())
    other = replace(MECHANISM, noise_multiplier=0.3)
    for changed, name in (
        ({"federation": "g"}, "federation"),
        ({"plan": "q"}, "plan"),
        ({"mechanism": other}, "mechanism"),
    ):
        with pytest.raises(LedgerError, match=f"belongs to another {name}"):
            opened(tmp_path, **changed)
    content = (tmp_path / "rows.npz").read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-40], b"no archive"):
        (tmp_path / "rows.npz").write_bytes(damaged)
        with pytest.raises(LedgerError, match="cannot be read"):
            opened(tmp_path)
    sums, flipped = total_of(1, 0).tobytes(), total_of(1, 1).tobytes()
    assert content.count(sums) == 1
    (tmp_path / "rows.npz").write_bytes(content.replace(sums, flipped))
    with pytest.raises(LedgerError, match="cannot be read"):
        opened(tmp_path)


def test_the_file_is_private_and_forgets(tmp_path: Path) -> None:
    """Whoever reads the file learns exact sums: only the owner may, and of no more rounds than the next rows need."""
    with opened(tmp_path) as rows:
        for number in range(1, ROUNDS + 1):
            rows.release(number, total_of(number, 0), Randomness())
            assert (tmp_path / "rows.npz").stat().st_mode & 0o777 == 0o600
            with np.load(tmp_path / "rows.npz", allow_pickle=False) as arrays:
                kept = [] if number == ROUNDS else list(range(max(1, number - 1), number + 1))
                assert arrays["sums"].tolist() == [total_of(earlier, 0).tolist() for earlier in kept]
    assert (tmp_path / "rows.npz.lock").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"rows.npz", "rows.npz.lock", "ledger.sqlite3"}


def test_a_sum_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    """A defect of the caller must not cost the run a row."""
    with opened(tmp_path) as rows:
        with pytest.raises(ProtocolError, match="a sum of shape"):
            rows.release(1, np.zeros(3, np.int64), Randomness())
        assert rows.row == 0
        rows.release(1, total_of(1, 0), Randomness())


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Two coordinators with one file would each form the next row, of the same state and with different noise."""
    with opened(tmp_path) as rows:
        with pytest.raises(LedgerError, match="open in another process"):
            opened(tmp_path)
        other = multiprocessing.get_context("fork").Process(target=_open_and_exit, args=(tmp_path,))
        other.start()
        other.join(20)
        assert other.exitcode == 3
    with pytest.raises(LedgerError, match="was closed"):
        rows.release(1, total_of(1, 0), Randomness())
    with opened(tmp_path) as rows:
        assert rows.row == 0


def _open_and_exit(home: Path) -> None:
    try:
        opened(home)
    except LedgerError:
        raise SystemExit(3) from None
