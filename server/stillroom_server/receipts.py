"""What a coordinator keeps of each device's ledger, so that one that went back in time is refused, told why, and recovers.

Guarantees:
    - What was kept is never taken back: an attempt that a device once showed in its receipt stays. It is on disk before the
      update beside it enters a sum, also when the round does not come to its end.
    - A device whose receipt lacks one of them is refused, with the attempts it lost; `export` is what it replays.
    - The first key that signs for a device is the only one from then on: nobody else can speak for its ledger.
    - A device that showed a receipt once has to show one beside every update: leaving it away hides no loss. One that never
      did, because its owner named no federation, is admitted without.
    - A receipt counts only if it lists the attempt that was asked for, with its event: an older one, replayed, does not.
    - Refusing zeroes what one device contributes, because of receipts of that device alone, which do not depend on its
      documents, queries or feedback. The sum still moves by at most one bounded update when one device's data changes, so
      sensitivity and noise are what they are without receipts.

The device is not told in the next order, which is the same for every device: the operator reads the refusals
(`stillroom audit ledger`) and hands out the receipt (`stillroom audit receipt`). Refusals stand here and not in the
ledger, so that its head, which devices see, tells nothing of them.

Only what devices signed is kept. An answer alone proves no spend: a device that declines, or fails before its ledger is
asked, answers with zeros too.

Kept in `receipts.sqlite3` in the coordinator's home, with `receipts.sqlite3-wal` beside it while a round runs: copy both. It
holds enrolment names, rounds and events, all of which the coordinator knows from its own orders; see
`stillroom_shared.receipts` for why a device may tell them.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from stillroom_shared.errors import LedgerError, ProtocolError
from stillroom_shared.events import Event, event_from_json, event_to_json
from stillroom_shared.receipts import Attempt, Charges, Receipt, issue, lost, read_receipt
from stillroom_shared.signing import SigningKey

RECEIPTS_FILE = "receipts.sqlite3"
_SHOWN = 5  # of the attempts that were lost, in a message
_LONGEST_REASON = 500
_NOTHING: Mapping[Attempt, Event] = {}
_log = logging.getLogger(__name__)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS signers (device TEXT PRIMARY KEY, public_key TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS answered (
    device TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, event TEXT NOT NULL,
    PRIMARY KEY (device, round, attempt)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refused (device TEXT PRIMARY KEY, reason TEXT NOT NULL) STRICT;
"""
Admits = Callable[[str, bytes | None], bool]
"""Whether the update counts that came from a device, by name, with this receipt or without one."""


class ReceiptBook:
    """The receipts of one federation.

    >>> import tempfile; from stillroom_shared.events import SampledGaussian
    >>> step = SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, sigma=2**29, dimension=4)
    >>> device, folder = SigningKey.generate(), tempfile.TemporaryDirectory()
    >>> book = ReceiptBook(Path(folder.name), federation="toy")
    >>> def receipt(charges): return issue("device", charges, federation="toy", device="d7", key=device)
    >>> book.admit("d7", receipt({Attempt(1, 1): step}).model_dump_json().encode())
    >>> book.admit("d7", receipt({}).model_dump_json().encode())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    stillroom_shared.errors.LedgerError: the ledger of device 'd7' went back in time: it lacks round 1 attempt 1; ...
    >>> folder.cleanup()
    """

    def __init__(self, home: Path, *, federation: str) -> None:
        self.path = home / RECEIPTS_FILE
        self.federation = federation
        with closing(self._connected()) as database:
            database.executescript(_SCHEMA)

    def admit(self, device: str, content: bytes | None, asked: Charges = _NOTHING) -> None:
        """Read a device's receipt, and keep it when it covers all that was kept before.

        Args:
            content: what it showed; None when it showed nothing.
            asked: what the receipt has to list, because the device was asked for it before it wrote the receipt.

        Raises:
            ProtocolError: it cannot be read, is an old one, or another key signed the receipts of this device before.
            LedgerError: the device's ledger went back in time, or is not shown any more; the message says so to both sides.
        """
        with closing(self._connected()) as database, database:
            database.execute("BEGIN IMMEDIATE")
            self._admit(database, device, content, asked)

    @contextmanager
    def round(self, asked: Charges) -> Iterator[Admits]:
        """The receipts of one round, each on disk before its update can enter a sum: a crash in mid-round loses none.

        No lock is held while replies are awaited. A refusal is logged and kept for the operator until the device is admitted
        again.
        """
        with closing(self._connected()) as database:

            def admits(device: str, content: bytes | None) -> bool:
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    try:
                        self._admit(database, device, content, asked)  # writes nothing before it has checked everything
                    except (ProtocolError, LedgerError) as error:
                        _log.warning("an update counts as zero: %s", error)
                        reason = str(error)[:_LONGEST_REASON]
                        database.execute("INSERT OR REPLACE INTO refused VALUES (?, ?)", (device, reason))
                        return False
                    database.execute("DELETE FROM refused WHERE device = ?", (device,))
                return True

            yield admits

    def refused(self) -> dict[str, str]:
        """Why the last update of a device did not count, by device; those whose last one did are absent."""
        with closing(self._connected()) as database:
            return dict(database.execute("SELECT device, reason FROM refused ORDER BY device").fetchall())

    def export(self, device: str, key: SigningKey) -> Receipt:
        """The coordinator's receipt about a device, to be replayed there; empty when it never answered."""
        with closing(self._connected()) as database:
            return issue(
                "coordinator", self._kept(database, device), federation=self.federation, device=device, key=key
            )

    def _admit(self, database: sqlite3.Connection, device: str, content: bytes | None, asked: Charges) -> None:
        known = database.execute("SELECT public_key FROM signers WHERE device = ?", (device,)).fetchone()
        if content is None and known is None:
            return
        if content is None:
            raise LedgerError(
                f"device {device!r} showed receipts before and shows none now: its ledger is gone or does not verify, or its "
                "owner named another federation; hand it its receipt (`stillroom audit receipt`), which it replays with "
                "`stillroom budget --recover`"
            )
        try:
            receipt = read_receipt(content, by="device", device=device, federation=self.federation, public_key=None)
        except ProtocolError as error:
            raise ProtocolError(f"device {device!r}: {error}") from error
        if known and known[0] != receipt.public_key:
            raise ProtocolError(
                f"device {device!r} shows a receipt by key {receipt.public_key}, its earlier ones are by {known[0]}: "
                "restore its key beside its ledger, or enrol it under another name"
            )
        if missing := lost(self._kept(database, device), receipt.charges):
            named = ", ".join(f"round {a.round} attempt {a.attempt}" for a in missing[:_SHOWN])
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise LedgerError(
                f"the ledger of device {device!r} went back in time: it lacks {named}{more}; hand it its receipt "
                f"(`stillroom audit receipt`), which it replays with `stillroom budget --recover`"
            )
        if absent := lost(asked, receipt.charges):
            raise ProtocolError(
                f"device {device!r} shows a receipt that does not list round {absent[0].round} attempt {absent[0].attempt} "
                "at its cost: it is an old one, or the device does not record what it answers"
            )
        database.execute("INSERT OR IGNORE INTO signers VALUES (?, ?)", (device, receipt.public_key))
        rows = [(device, *attempt, json.dumps(event_to_json(event))) for attempt, event in receipt.charges.items()]
        database.executemany("INSERT OR IGNORE INTO answered VALUES (?, ?, ?, ?)", rows)

    def _connected(self) -> sqlite3.Connection:
        try:
            database = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
            # A log that is written ahead: one fsync for each receipt where a rollback journal needs several, a quarter of the
            # time. In this mode FULL is enough for a commit to outlast a power cut (sqlite.org/pragma.html).
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            return database
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path} cannot be opened ({error}): check the folder and its disk") from error

    @staticmethod
    def _kept(database: sqlite3.Connection, device: str) -> dict[Attempt, Event]:
        rows = database.execute("SELECT round, attempt, event FROM answered WHERE device = ?", (device,))
        return {Attempt(number, attempt): event_from_json(json.loads(event)) for number, attempt, event in rows}
