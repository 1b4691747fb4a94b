"""The ledger: an append-only record of privacy spend, durable before anything is released.

One SQLite file, rows chained by SHA-256 and signed with Ed25519. `spend` checks the budget, commits the planned event with
an fsync, and only then returns; whoever releases must hold the returned row. A crash between the two leaves the spend
recorded, and a retry is charged again, because nobody can know whether the first attempt was seen.

Guarantees:
    - A row is on disk (`synchronous=FULL`) when `spend` or `record` returns.
    - Rows are never changed: `verify` recomputes every hash, link and signature and names the first row that does not hold.
    - Two writers cannot fork the chain: the head is read again inside the write transaction.
    - A budget that would be passed is refused before anything is written.

| case | result |
|---|---|
| missing file opened for reading | `LedgerError` |
| altered, removed, reordered or unsigned row | `LedgerError` naming the row |
| torn write | SQLite's journal rolls it back at the next start |
| rows cut off at the end | not visible in the file itself: compare `head` with the counterpart's copy |
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from stillroom_shared.accounting import Event, epsilon, event_from_json, event_to_json
from stillroom_shared.errors import BudgetError, LedgerError
from stillroom_shared.signing import SigningKey, verify

RowKind = Literal["genesis", "spend", "note"]
_GENESIS_LINK = "0" * 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (
    seq INTEGER PRIMARY KEY CHECK (seq >= 0),
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    link TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE,
    signature TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that may ever be spent: `epsilon` at `delta`, by PLD, against readers of releases."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or not 0 < self.delta < 1:
            raise BudgetError(
                f"budget epsilon {self.epsilon} at delta {self.delta}: epsilon must be positive, delta in (0, 1)"
            )

    def check(self, events: list[Event]) -> None:
        """Refuse events whose composition passes the budget, naming the last one."""
        cost = epsilon(events, self.delta)
        if cost > self.epsilon:
            raise BudgetError(
                f"{events[-1]} would bring the spend to epsilon {cost:.3f} (user level, delta {self.delta:.1e}, against "
                f"readers of releases): the budget is {self.epsilon:.3f}; stop here or raise the budget openly"
            )


@dataclass(frozen=True)
class Row:
    """One verified-on-demand entry. `body` is canonical JSON; `hash` covers seq, kind, body and the previous hash."""

    seq: int
    kind: RowKind
    body: str
    link: str
    hash: str
    signature: str

    @property
    def fields(self) -> dict[str, Any]:
        """The body as a dictionary."""
        return dict(json.loads(self.body))


class Ledger:
    """An open ledger; use as a context manager.

    >>> import tempfile; from stillroom_shared.accounting import SampledGaussian
    >>> step = SampledGaussian(noise_multiplier=4.0, sampling_rate=0.5, sigma=2**30, dimension=10)
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with Ledger.create(Path(home) / "ledger.sqlite3", key=SigningKey.generate(), about={"federation": "toy"}) as ledger:
    ...         row = ledger.spend(step, budget=Budget(epsilon=1.0, delta=1e-4), purpose={"round": 1})
    ...         ledger.verify()
    ...         row.seq, ledger.events() == [step]
    (1, True)
    """

    def __init__(self, path: Path, *, key: SigningKey | None, public_key: str) -> None:
        self.path = path
        self._key = key
        self._public_key = public_key
        self._connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        self._connection.execute("PRAGMA synchronous=FULL")
        # A rollback journal, not a write-ahead log: the one file is the ledger, whoever copies it.
        self._connection.execute("PRAGMA journal_mode=DELETE")

    @classmethod
    def create(cls, path: Path, *, key: SigningKey, about: dict[str, Any]) -> Ledger:
        """Open the ledger at `path` for writing, with a signed genesis row if it is new.

        An existing ledger is verified first; one whose genesis says something else than `about` is refused.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        try:
            ledger = cls(path, key=key, public_key=key.public)
            ledger._connection.executescript(_SCHEMA)
            with ledger._writing():
                if not ledger._head():
                    ledger._append("genesis", {"about": about, "key": key.public})
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{path} cannot be opened for writing ({error}): free the disk, or recover from the counterpart's receipts"
            ) from error
        ledger.verify()
        if (found := ledger.rows()[0].fields["about"]) != about:
            ledger.close()
            raise LedgerError(
                f"{path} belongs to {found}, not to {about}: use the ledger of this federation, or another path"
            )
        return ledger

    @classmethod
    def open(cls, path: Path, *, public_key: str | None = None) -> Ledger:
        """Open an existing ledger for reading; the key is pinned by the caller, or taken from the genesis row."""
        if not path.is_file():
            raise LedgerError(f"no ledger at {path}: check the path, or recover from the counterpart's receipts")
        try:
            ledger = cls(path, key=None, public_key=public_key or "")
            if public_key is None:
                ledger._public_key = str(ledger.rows()[0].fields["key"])
        except (sqlite3.DatabaseError, IndexError, KeyError, ValueError) as error:
            raise LedgerError(
                f"{path} is not a readable ledger ({error}): recover from the counterpart's receipts"
            ) from error
        return ledger

    @property
    def head(self) -> str:
        """Hash of the last row: what the counterpart keeps to notice a roll-back."""
        head = self._head()
        return head.hash if head else _GENESIS_LINK

    def spend(
        self,
        event: Event,
        *,
        budget: Budget | None,
        purpose: dict[str, Any],
        allowed: Callable[[list[dict[str, Any]]], None] = lambda earlier: None,
    ) -> Row:
        """Check, then record durably. The caller applies the event only after this returned.

        `allowed` sees the purposes of all earlier spends and raises to refuse; it and the budget are checked inside the
        write transaction, so two processes cannot both pass.
        """
        if budget is not None:
            budget.check([*self.events(), event])  # before locking: accounting fills a cache and may take seconds
        with self._writing():
            allowed(self.purposes())
            if budget is not None:
                budget.check([*self.events(), event])
            return self._append("spend", {"event": event_to_json(event), "purpose": purpose})

    def record(self, note: dict[str, Any]) -> Row:
        """Append something that costs nothing: a release's hash, a refusal."""
        with self._writing():
            return self._append("note", note)

    def rows(self) -> list[Row]:
        """Every row, in order."""
        return [Row(*row) for row in self._connection.execute("SELECT * FROM ledger ORDER BY seq")]

    def events(self) -> list[Event]:
        """Every event ever charged, released or not."""
        return [event_from_json(row.fields["event"]) for row in self.rows() if row.kind == "spend"]

    def purposes(self) -> list[dict[str, Any]]:
        """What each spend was for, in order."""
        return [row.fields["purpose"] for row in self.rows() if row.kind == "spend"]

    def verify(self) -> None:
        """Recompute the chain, the signatures and every event; `LedgerError` names the first row that does not hold."""
        link = _GENESIS_LINK
        try:
            rows = self.rows()
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{self.path} cannot be read ({error}): recover from the counterpart's receipts"
            ) from error
        if not rows or rows[0].kind != "genesis":
            raise LedgerError(f"{self.path} has no genesis row: it was emptied or is no ledger; recover from receipts")
        for seq, row in enumerate(rows):
            problem = _problem(row, seq, link, self._public_key)
            if problem:
                raise LedgerError(f"{self.path}: row {seq} {problem}; recover from the counterpart's receipts")
            link = row.hash

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _head(self) -> Row | None:
        found = self._connection.execute("SELECT * FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
        return Row(*found) if found else None

    def _append(self, kind: RowKind, fields: dict[str, Any]) -> Row:
        if self._key is None:
            raise LedgerError(f"{self.path} is open for reading only: open it with its signing key to write")
        head = self._head()
        seq, link = (head.seq + 1, head.hash) if head else (0, _GENESIS_LINK)
        body = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digest = _hash(seq, kind, body, link)
        row = Row(seq, kind, body, link, digest, self._key.sign(bytes.fromhex(digest)))
        self._connection.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?)", tuple(vars(row).values()))
        return row

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One immediate transaction: the head cannot move between reading it and writing after it."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise LedgerError(
                    f"{self.path} was not written ({error}): nothing may be released; free the disk"
                ) from error
            raise


def _hash(seq: int, kind: str, body: str, link: str) -> str:
    return hashlib.sha256(json.dumps([seq, kind, body, link], separators=(",", ":")).encode()).hexdigest()


def _problem(row: Row, seq: int, link: str, public_key: str) -> str | None:
    """What is wrong with a row at this place of the chain, if anything."""
    if row.seq != seq:
        return f"is missing: the next one is numbered {row.seq}"
    if row.link != link:
        return "does not follow the row before it"
    if row.hash != _hash(row.seq, row.kind, row.body, row.link):
        return "was altered: its hash does not hold"
    if not verify(public_key, row.signature, bytes.fromhex(row.hash)):
        return "is not signed by the ledger's key"
    if row.kind == "spend":
        try:
            event_from_json(row.fields["event"])
        except (BudgetError, KeyError) as error:
            return f"holds no event that can be accounted for ({error})"
    return None
