"""What a coordinator keeps of each device's ledger, so that one that went back in time is refused, told why, and recovers.

Guarantees:
    - What was kept is never taken back: an attempt that a device once showed in its receipt stays.
    - A device whose receipt lacks one of them is refused, with the attempts it lost; `export` is what it replays.
    - The first key that signs for a device is the only one from then on: nobody else can speak for its ledger.

Only what devices signed is kept. An answer alone proves no spend: a device that declines, or fails before its ledger is
asked, answers with zeros too.

Kept in `receipts.sqlite3` in the coordinator's home. It holds enrolment names, rounds and events, all of which the
coordinator knows from its own orders; see `stillroom_shared.receipts` for why a device may tell them.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from stillroom_shared.accounting import Event, event_from_json, event_to_json
from stillroom_shared.errors import LedgerError, ProtocolError
from stillroom_shared.receipts import Attempt, Receipt, issue, lost, read_receipt
from stillroom_shared.signing import SigningKey

RECEIPTS_FILE = "receipts.sqlite3"
_SHOWN = 5  # of the attempts that were lost, in a message
_SCHEMA = """
CREATE TABLE IF NOT EXISTS signers (device TEXT PRIMARY KEY, public_key TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS answered (
    device TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, event TEXT NOT NULL,
    PRIMARY KEY (device, round, attempt)
) STRICT, WITHOUT ROWID;
"""


class ReceiptBook:
    """The receipts of one federation.

    >>> import tempfile; from stillroom_shared.accounting import SampledGaussian
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

    def admit(self, device: str, content: bytes) -> None:
        """Read a device's receipt, and keep it when it covers all that was kept before.

        Raises:
            ProtocolError: it cannot be read, or another key signed the receipts of this device before.
            LedgerError: the device's ledger went back in time; the message says so to both sides.
        """
        with closing(self._connected()) as database, database:
            database.execute("BEGIN IMMEDIATE")
            known = database.execute("SELECT public_key FROM signers WHERE device = ?", (device,)).fetchone()
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
            database.execute("INSERT OR IGNORE INTO signers VALUES (?, ?)", (device, receipt.public_key))
            rows = [(device, *attempt, json.dumps(event_to_json(event))) for attempt, event in receipt.charges.items()]
            database.executemany("INSERT OR IGNORE INTO answered VALUES (?, ?, ?, ?)", rows)

    def export(self, device: str, key: SigningKey) -> Receipt:
        """The coordinator's receipt about a device, to be replayed there; empty when it never answered."""
        with closing(self._connected()) as database:
            return issue(
                "coordinator", self._kept(database, device), federation=self.federation, device=device, key=key
            )

    def _connected(self) -> sqlite3.Connection:
        try:
            return sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path} cannot be opened ({error}): check the folder and its disk") from error

    @staticmethod
    def _kept(database: sqlite3.Connection, device: str) -> dict[Attempt, Event]:
        rows = database.execute("SELECT round, attempt, event FROM answered WHERE device = ?", (device,))
        return {Attempt(number, attempt): event_from_json(json.loads(event)) for number, attempt, event in rows}
