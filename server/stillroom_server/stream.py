"""The rows of a run with correlated noise, across crashes: a row is on disk, and in the ledger, before anybody learns it.

A row of `stillroom_shared.correlated` needs the sums of the rounds before it, so a run has a private state between rounds. It
lives in one file, replaced in one step; there is no copy in memory that could say something else after a failed write. Once
the file is durable the ledger names the row, with its hash (`charges.py`); only then is the row handed out.

Guarantees:
    - For each row, at most one y_t ever leaves `release` and `pending`. A crash before the file is replaced: the row's noise
      was seen by nobody, is lost with the process, and the row is formed again with fresh noise of whatever sum the next
      attempt brings. A crash after that: the file holds the row, and `pending` names it in the ledger, unless it is named
      there, and hands out that very one.
    - Nor after a copy of the file was restored, with the caller's checkpoint or without: the ledger knows the rows that were
      handed out, so a file that lacks one of them, or holds another one in its place, is refused.
    - Noise is drawn for one sum and kept nowhere, so no two sums share it.
    - Rows are formed in order, by one process at a time, for one federation, plan and mechanism; anything else is refused.

What is at stake in the file (mode 0600): exact sums of the last bands - 1 cohorts, against which central noise promises
nothing. The usual implementation keeps the last noise rows, or the seed they come from. That is the same exposure: noise and
released rows together give C x = y - z, hence the sums; and sums with released rows give the noise. In both cases the server
has seen the sums when the devices answered. A sum leaves the file with the last row that needs it; after row T none is left.

| state file | result |
|---|---|
| absent before row 1 | the run begins |
| lacks a row that the ledger names (deleted, an old copy), or holds another | `LedgerError`: it would be released twice |
| one row ahead of the ledger | a crash between the two: that row is `pending`; a new sum for it is refused |
| further ahead of the ledger, or the caller applied what it does not name | `LedgerError`: the ledger is an old copy |
| behind what the caller has applied, or more than one row ahead of it | `LedgerError`: one of the two is an old copy |
| one row ahead of what the caller has applied | that row is `pending` |
| of another federation, plan or mechanism; unreadable; open in another process | `LedgerError` |

What no check here can see: file, checkpoint and ledger restored together, to a time before row t was released. The devices see
it by the ledger's head and answer zeros, but the sums of the bands - 1 rounds before are in the restored file. So another
version of row t, with fresh noise, is released all the same: one more release about the devices of round t, since y_t - y_t' is
C_0 x_t with the noise of both, and about those of the rounds before it, which nobody charged.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_server.charges import Formed, last_formed, record_formed
from stillroom_shared.closing import Closing
from stillroom_shared.correlated import Correlated, RunState
from stillroom_shared.errors import LedgerError
from stillroom_shared.files import replace_file, sync
from stillroom_shared.ledger import Ledger
from stillroom_shared.mechanism import Total
from stillroom_shared.randomness import Randomness

_OLD_LEDGER = "the ledger is an old copy; restore its newest one, without it nobody knows which rows were released"


class RowStream(Closing):
    """The rows of one run. Use as a context manager; it holds a lock on the file until then.

    A coordinator that has applied `applied` updates goes on with `pending(applied)`, and only if that is None asks the
    devices of round `applied + 1` and calls `release`. The run's event must be in the ledger before the first of these calls.

    >>> import tempfile; from stillroom_shared.signing import SigningKey
    >>> mechanism = Correlated(
    ...     clip_norm=1.0, noise_multiplier=2.0, coefficients=(1024, 512), participations=1, separation=2, rounds=2,
    ...     devices=10, dimension=3)
    >>> with tempfile.TemporaryDirectory() as home:
    ...     ledger = Ledger.create(Path(home) / "ledger.sqlite3", key=SigningKey.generate(), about={})
    ...     with ledger, RowStream(Path(home) / "rows.npz", mechanism, ledger=ledger, federation="toy", plan="hash") as stream:
    ...         update = stream.release(1, np.zeros(3, np.int64), Randomness())
    ...         stream.row, bool((stream.pending(0) == update).all()), stream.pending(1)
    (1, True, None)
    """

    def __init__(self, path: Path, mechanism: Correlated, *, ledger: Ledger, federation: str, plan: str) -> None:
        self.path = path
        self.ledger = ledger
        self.mechanism = mechanism
        about = {"federation": federation, "plan": plan, "mechanism": asdict(mechanism)}
        self._about = json.loads(json.dumps(about))  # as it will be read back
        self._lock = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            self._take_lock()
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def row(self) -> int:
        """Number of rows that have been formed."""
        return self._read().row

    def pending(self, applied: int) -> NDArray[np.float64] | None:
        """The mean update of a row that was formed but not applied before a crash; None when there is none.

        `applied` is the number of rows whose updates the caller has made durable. `LedgerError` when the file is behind it, or
        more than one row ahead, or the ledger does not name all of them.
        """
        state, named = self._read(), last_formed(self.ledger).round
        if state.row not in (applied, applied + 1):
            raise LedgerError(
                f"{self.path} is at row {state.row}, the checkpoint at row {applied}: one of them is an old copy; restore the "
                "newest of both, or a row would be released twice"
            )
        if applied > named:
            raise LedgerError(f"the checkpoint is at row {applied}, {self.ledger.path} names {named}: {_OLD_LEDGER}")
        if state.row == applied:
            return None
        self._make_durable()
        if state.row > named:
            record_formed(self.ledger, Formed.of(state.row, state.noisy))
        return self.mechanism.update(state)

    def release(self, row: int, total: Total, randomness: Randomness) -> NDArray[np.float64]:
        """Form row `row` of the round's sum, make it durable, name it in the ledger, and only then return the mean update.

        The update is (dimension,).
        """
        state = self._read()
        if row != state.row + 1 or state.row > last_formed(self.ledger).round:
            raise LedgerError(
                f"row {row} is out of order: {self.path} is at row {state.row}; "
                + (
                    "it was formed already, ask for it with pending"
                    if row == state.row
                    else "ask for the row before with pending, or restore the newest copy"
                )
            )
        formed = self.mechanism.step(state, total, randomness)
        self._write(formed)
        record_formed(self.ledger, Formed.of(row, formed.noisy))
        return self.mechanism.update(formed)

    def close(self) -> None:
        """Let another process open the run; safe to call twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LedgerError(
                f"{self.path} is open in another process: one coordinator at a time forms rows"
            ) from error

    def _make_durable(self) -> None:
        """A write that was cut short after its rename is visible, but a power failure could still take it back."""
        sync(self.path)
        sync(self.path.parent)

    def _write(self, state: RunState) -> None:
        content = io.BytesIO()
        np.savez(content, about=np.array(json.dumps(self._about)), **vars(state))
        replace_file(self.path, content.getvalue())

    def _read(self) -> RunState:
        if self._lock < 0:
            raise LedgerError(f"{self.path} was closed: open the run again")
        state = self._in_file() if self.path.exists() else self.mechanism.start()
        named = last_formed(self.ledger)
        if state.row > named.round + 1:
            raise LedgerError(
                f"{self.path} is at row {state.row}, {self.ledger.path} names {named.round}: {_OLD_LEDGER}"
            )
        if state.row < named.round or (0 < state.row == named.round and Formed.of(state.row, state.noisy) != named):
            raise LedgerError(
                f"{self.path} is at row {state.row}, {self.ledger.path} names row {named.round} of hash {named.hash[:16]}: the "
                "file is an old copy or gone; restore the newest copy of it and of the checkpoint, or a row would be released "
                "twice"
            )
        return state

    def _in_file(self) -> RunState:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                state = RunState(int(arrays["row"]), arrays["noisy"], arrays["sums"], arrays["estimates"])
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise LedgerError(
                f"{self.path} cannot be read ({error}): restore its newest copy; without it the run has ended, and what was "
                "released stays released"
            ) from error
        if about != self._about:
            differ = [name for name in self._about if about.get(name) != self._about[name]]
            raise LedgerError(
                f"{self.path} belongs to another {' and '.join(differ)}: use the home of that run, or a new one"
            )
        return state
