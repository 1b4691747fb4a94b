"""The ledger: an append-only record of privacy spend, durable before anything is released.

One SQLite file, rows chained by SHA-256 and signed with Ed25519. `spend` checks the budget, commits the planned event with
an fsync, and only then returns; whoever releases must hold the returned row. A crash between the two leaves the spend
recorded, and a retry is charged again, because nobody can know whether the first attempt was seen.

Guarantees:
    - A row is on disk when `spend` or `record` returns: `synchronous=EXTRA`, because with FULL alone a power cut can bring
      the journal of a committed row back, and the row is then rolled back after it was relied on (sqlite.org/pragma.html).
    - A ledger appears whole, with its genesis, or not at all; what exists and is empty was damaged, and is never begun again.
    - Rows are never changed: `verify` recomputes every hash, link and signature and names the first row that does not hold.
    - Two writers cannot fork the chain: the head is read again inside the write transaction.
    - A budget that would be passed is refused before anything is written.

| case | result |
|---|---|
| missing or emptied file, for reading or for going on | `LedgerLostError` |
| altered, removed, reordered or unsigned row | `LedgerLostError` naming the row |
| a process killed inside a write | SQLite's journal rolls it back at the next start |
| full disk | `LedgerError`: nothing was written, nothing may be released |
| a file garbled, or cut in the middle of a page | `LedgerLostError`, naming the row where one can be read |
| rows cut off at the end | not visible in the file itself: compare `head` with the counterpart's copy |
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillroom_shared import database
from stillroom_shared.accounting import epsilon
from stillroom_shared.closing import Closing
from stillroom_shared.errors import BudgetError, LedgerError, LedgerLostError
from stillroom_shared.events import Event, event_from_json, event_to_json, in_one_unit
from stillroom_shared.files import exclusive, sync
from stillroom_shared.signing import SigningKey, verify
from stillroom_shared.statement import printed_epsilon
from stillroom_shared.vault import PLAIN, Vault

RowKind = Literal["genesis", "spend", "note"]
_GENESIS_LINK = "0" * 64
_COLUMNS = "seq, kind, body, link, hash, signature"
_REMEDY = "restore its newest copy, then replay the counterpart's receipts (`stillroom budget --recover` on a device)"
_SCHEMA = """
CREATE TABLE ledger (
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
    """The most that may ever be spent: `epsilon` at `delta`, by PLD, against `adversary`; the events decide what counts.

    It is about a user, or about one query where an event is (`accounting.in_one_unit`).
    """

    epsilon: float
    delta: float
    adversary: str = "readers of releases"

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or not 0 < self.delta < 1:
            raise BudgetError(
                f"budget epsilon {self.epsilon} at delta {self.delta}: epsilon must be positive, delta in (0, 1)"
            )

    def check(self, events: list[Event]) -> None:
        """Refuse events whose composition passes the budget, naming the last one."""
        unit, counted = in_one_unit(events)
        cost = epsilon(counted, self.delta)
        if cost > self.epsilon:
            raise BudgetError(
                f"{events[-1]} would bring the spend to epsilon {printed_epsilon(cost)} ({unit} level, delta "
                f"{self.delta:.1e}, against {self.adversary}): the budget is {self.epsilon:g}; stop here or raise the budget "
                "openly"
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


class Ledger(Closing):
    """An open ledger; use as a context manager.

    >>> import tempfile; from stillroom_shared.events import SampledGaussian
    >>> step = SampledGaussian(noise_multiplier=4.0, sampling_rate=0.5, sigma=2**30, dimension=10)
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with Ledger.create(Path(home) / "ledger.sqlite3", key=SigningKey.generate(), about={"federation": "toy"}) as ledger:
    ...         row = ledger.spend(step, budget=Budget(epsilon=1.0, delta=1e-4), purpose={"round": 1})
    ...         ledger.verify()
    ...         row.seq, ledger.events() == [step]
    (1, True)
    """

    def __init__(self, path: Path, *, key: SigningKey | None, public_key: str, vault: Vault = PLAIN) -> None:
        self.path = path
        self._key = key
        self._public_key = public_key
        # Never created: a file that vanished meanwhile must not come back empty.
        self._connection = database.connect(path, vault.database_key("ledger"), timeout=30.0)
        self._connection.execute("PRAGMA synchronous=EXTRA")
        # A rollback journal, not a write-ahead log: the one file is the ledger, whoever copies it.
        self._connection.execute("PRAGMA journal_mode=DELETE")

    @classmethod
    def create(cls, path: Path, *, key: SigningKey, about: dict[str, Any], vault: Vault = PLAIN) -> Ledger:
        """Open the ledger at `path` for writing, with a signed genesis row if there is no such file yet.

        An existing ledger is verified first; one whose genesis says something else than `about` is refused.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with exclusive(path.parent):
                if not path.exists():
                    cls.begin(path, key=key, about=about, vault=vault)
        return cls.resume(path, key=key, about=about, vault=vault)

    @classmethod
    def begin(
        cls,
        path: Path,
        *,
        key: SigningKey,
        about: dict[str, Any],
        note: dict[str, Any] | None = None,
        spends: Sequence[tuple[Event, dict[str, Any]]] = (),
        vault: Vault = PLAIN,
    ) -> None:
        """Write a new ledger, whole or not at all, in place of what is there. One caller at a time (`files.exclusive`).

        Args:
            note, spends: what follows the genesis; see `recover`.
            vault: encrypts the file, as wherever a ledger is opened.
        """
        partial = path.with_name(f"{path.name}.partial")
        for stale in (partial, _journal(partial), _journal(path)):
            stale.unlink(missing_ok=True)  # the journal of another file would be played back into this one
        partial.touch(mode=0o600)
        try:
            with cls(partial, key=key, public_key=key.public, vault=vault) as ledger, ledger._writing():
                ledger._connection.execute(_SCHEMA)
                ledger._append("genesis", {"about": about, "key": key.public})
                ledger._replay(note, spends)
        except database.errors() as error:
            raise LedgerError(f"{path} cannot be written ({error}): nothing may be released; free the disk") from error
        partial.rename(path)
        sync(path.parent)

    @classmethod
    def resume(cls, path: Path, *, key: SigningKey, about: dict[str, Any], vault: Vault = PLAIN) -> Ledger:
        """Open an existing ledger for writing, verified.

        Raises:
            LedgerLostError: it is gone or empty, or does not verify.
            LedgerError: its genesis says something else than `about`, or it cannot be opened now.
        """
        if not path.is_file() or not path.stat().st_size:
            raise LedgerLostError(f"{path} is gone or was emptied: what was spent is unknown; {_REMEDY}")
        ledger = cls._connect(path, key=key, public_key=key.public, vault=vault)
        try:
            ledger.verify()
            if (found := ledger.rows()[0].fields.get("about")) != about:
                raise LedgerError(
                    f"{path} belongs to {found}, not to {about}: use the ledger of this federation, or another path"
                )
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def open(cls, path: Path, *, public_key: str | None = None, vault: Vault = PLAIN) -> Ledger:
        """Open an existing ledger for reading; the key is pinned by the caller, or taken from the genesis row."""
        if not path.is_file():
            raise LedgerLostError(f"no ledger at {path}: check the path, or {_REMEDY}")
        ledger = cls._connect(path, key=None, public_key=public_key or "", vault=vault)
        if public_key is None:
            try:
                for row in ledger.rows()[:1]:  # an empty one is for `verify` to refuse
                    ledger._public_key = str(row.fields["key"])
            except (LedgerLostError, KeyError, TypeError, ValueError) as error:
                ledger.close()
                raise LedgerLostError(f"{path} is not a readable ledger ({error}); {_REMEDY}") from error
        return ledger

    @classmethod
    def _connect(cls, path: Path, *, key: SigningKey | None, public_key: str, vault: Vault) -> Ledger:
        try:
            return cls(path, key=key, public_key=public_key, vault=vault)
        except database.errors() as error:
            raise _unreadable(path, error) from error

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
        beside: Mapping[str, Any] | None = None,
    ) -> Row:
        """Check, then record durably. The caller applies the event only after this returned.

        `allowed` sees the purposes of all earlier spends and raises to refuse; it and the budget are checked inside the
        write transaction, so two processes cannot both pass. `beside` stands in the same row, durable with it.
        """
        if budget is not None:
            budget.check([*self.events(), event])  # before locking: accounting fills a cache and may take seconds
        with self._writing():
            allowed(self.purposes())
            if budget is not None:
                budget.check([*self.events(), event])
            return self._append("spend", {"event": event_to_json(event), "purpose": purpose, **(beside or {})})

    def recover(self, spends: Sequence[tuple[Event, dict[str, Any]]], *, note: dict[str, Any]) -> int:
        """Record what a counterpart witnessed and this ledger lacks, each an event and its purpose, all or nothing.

        No budget is asked: what was released cannot be refused any more. A purpose that is here already stays as it is.
        Returns how many spends were added.
        """
        with self._writing():
            return self._replay(note, spends)

    def record(self, note: dict[str, Any], *, allowed: Callable[[list[dict[str, Any]]], None] | None = None) -> Row:
        """Append something that costs nothing: a release's hash, a refusal.

        `allowed` sees all earlier notes and raises to refuse, inside the write transaction, as in `spend`.
        """
        with self._writing():
            if allowed is not None:
                allowed([row.fields for row in self.rows() if row.kind == "note"])
            return self._append("note", note)

    def rows(self) -> list[Row]:
        """Every row, in order."""
        try:
            found = list(self._connection.execute(f"SELECT {_COLUMNS} FROM ledger ORDER BY seq"))
        except database.errors(UnicodeError) as error:
            raise _unreadable(self.path, error) from error
        return [Row(*row) for row in found]

    def events(self) -> list[Event]:
        """Every event ever charged, released or not."""
        return [event_from_json(row.fields["event"]) for row in self.rows() if row.kind == "spend"]

    def purposes(self) -> list[dict[str, Any]]:
        """What each spend was for, in order."""
        return [row.fields["purpose"] for row in self.rows() if row.kind == "spend"]

    def genuine(self) -> list[Row]:
        """The rows of a damaged ledger that can still be read, each with a hash and a signature that hold."""
        found: list[Row] = []
        try:
            for columns in self._connection.execute(f"SELECT {_COLUMNS} FROM ledger"):
                row = Row(*columns)
                if _problem(row, row.seq, row.link, self._public_key) is None:
                    found.append(row)
        except database.errors(UnicodeError) as error:
            if not isinstance(problem := _unreadable(self.path, error), LedgerLostError):
                raise problem from error
        return found

    def verify(self) -> None:
        """Recompute the chain, the signatures and every event; `LedgerError` names the first row that does not hold."""
        link, rows = _GENESIS_LINK, self.rows()
        if not rows or rows[0].kind != "genesis":
            raise LedgerLostError(f"{self.path} has no genesis row: it was emptied or is no ledger; {_REMEDY}")
        for seq, row in enumerate(rows):
            if problem := _problem(row, seq, link, self._public_key):
                raise LedgerLostError(f"{self.path}: row {seq} {problem}; {_REMEDY}")
            link = row.hash

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._connection.close()

    def _head(self) -> Row | None:
        found = self._connection.execute(f"SELECT {_COLUMNS} FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
        return Row(*found) if found else None

    def _append(self, kind: RowKind, fields: dict[str, Any]) -> Row:
        if self._key is None:
            raise LedgerError(f"{self.path} is open for reading only: open it with its signing key to write")
        head = self._head()
        seq, link = (head.seq + 1, head.hash) if head else (0, _GENESIS_LINK)
        # Two histories that part must never have one hash again, also where both charge the same (`heads.py`).
        fields = {**fields, "nonce": secrets.token_hex(16)}
        body = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digest = _hash(seq, kind, body, link)
        row = Row(seq, kind, body, link, digest, self._key.sign(bytes.fromhex(digest)))
        self._connection.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?)", tuple(vars(row).values()))
        return row

    def _replay(self, note: dict[str, Any] | None, spends: Sequence[tuple[Event, dict[str, Any]]]) -> int:
        if note is not None:
            self._append("note", note)
        known = self.purposes()
        added = [(event, purpose) for event, purpose in spends if purpose not in known]
        for event, purpose in added:
            self._append("spend", {"event": event_to_json(event), "purpose": purpose, "recovered": True})
        return len(added)

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
            if isinstance(error, database.errors()):
                raise LedgerError(
                    f"{self.path} was not written ({error}): nothing may be released; free the disk"
                ) from error
            raise


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


def _unreadable(path: Path, error: Exception) -> LedgerError:
    """Whether the file is damaged, or only busy or out of reach for now."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return LedgerLostError(f"{path} is not a readable ledger ({error}); {_REMEDY}")
    return LedgerError(f"{path} cannot be read now ({error}): free it, and run the same command again")


def _hash(seq: int, kind: str, body: str, link: str) -> str:
    return hashlib.sha256(json.dumps([seq, kind, body, link], separators=(",", ":")).encode()).hexdigest()


def _problem(row: Row, seq: int, link: str, public_key: str) -> str | None:
    """What is wrong with a row at this place of the chain, if anything. A row is a stranger's bytes until it is signed."""
    if [type(value) for value in vars(row).values()] != [int, str, str, str, str, str]:
        return "was altered: its columns do not have their types"
    if row.seq != seq:
        return f"is missing: the next one is numbered {row.seq}"
    if row.link != link:
        return "does not follow the row before it"
    if row.hash != _hash(row.seq, row.kind, row.body, row.link):
        return "was altered: its hash does not hold"
    if not verify(public_key, row.signature, bytes.fromhex(row.hash)):
        return "is not signed by the ledger's key"
    if row.kind not in ("spend", "note") and (row.kind, seq) != ("genesis", 0):
        return f"is of kind {row.kind!r}, which cannot be accounted for"
    if row.kind == "spend":
        try:
            event_from_json(row.fields["event"])
            row.fields["purpose"]
        except (BudgetError, KeyError, TypeError, ValueError, AttributeError) as error:
            return f"holds no event that can be accounted for ({error})"
    return None
