"""The rows of a run with correlated noise, across crashes: a row is on disk before anybody learns it.

A row of `stillroom_shared.correlated` needs the sums of the rounds before it, so a run has a private state between rounds. It
lives in one file, replaced in one step; there is no copy in memory that could say something else after a failed write.

Guarantees:
    - For each row, at most one y_t ever leaves `release` and `pending`. A crash before the file is replaced: the row's noise
      was seen by nobody, is lost with the process, and the row is formed again with fresh noise of whatever sum the next
      attempt brings. A crash after that: the file holds the row, and `pending` hands out that very one.
    - Noise is drawn for one sum and kept nowhere, so no two sums share it.
    - Rows are formed in order, by one process at a time, for one federation, plan and mechanism; anything else is refused.

What is at stake in the file (mode 0600): exact sums of the last bands - 1 cohorts, against which central noise promises
nothing. The usual implementation keeps the last noise rows, or the seed they come from. That is the same exposure: noise and
released rows together give C x = y - z, hence the sums; and sums with released rows give the noise. In both cases the server
has seen the sums when the devices answered. A sum leaves the file with the last row that needs it; after row T none is left.

| state file | result |
|---|---|
| absent before row 1 | the run begins |
| absent or behind what the caller has applied (deleted, an old copy) | `LedgerError`: rows would be released twice |
| one row ahead of what the caller has applied | that row is `pending`; a new sum for it is refused |
| of another federation, plan or mechanism; unreadable; open in another process | `LedgerError` |

Roll-back of this file together with all that its caller keeps is not visible here; that is for the ledger's counterpart.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.correlated import Correlated, RunState
from stillroom_shared.errors import LedgerError
from stillroom_shared.files import replace_file, sync
from stillroom_shared.mechanism import Total
from stillroom_shared.randomness import Randomness


class RowStream:
    """The rows of one run. Use as a context manager; it holds a lock on the file until then.

    A coordinator that has applied `applied` updates goes on with `pending(applied)`, and only if that is None asks the
    devices of round `applied + 1` and calls `release`. The run's event must be in the ledger before the first of these calls.

    >>> import tempfile
    >>> mechanism = Correlated(
    ...     clip_norm=1.0, noise_multiplier=2.0, coefficients=(1024, 512), participations=1, separation=2, rounds=2,
    ...     devices=10, dimension=3)
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with RowStream(Path(home) / "rows.npz", mechanism, federation="toy", plan="plan hash") as stream:
    ...         update = stream.release(1, np.zeros(3, np.int64), Randomness())
    ...         stream.row, bool((stream.pending(0) == update).all()), stream.pending(1)
    (1, True, None)
    """

    def __init__(self, path: Path, mechanism: Correlated, *, federation: str, plan: str) -> None:
        self.path = path
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
        more than one row ahead.
        """
        state = self._read()
        if state.row not in (applied, applied + 1):
            raise LedgerError(
                f"{self.path} is at row {state.row}, the checkpoint at row {applied}: one of them is an old copy; restore the "
                "newest of both, or a row would be released twice"
            )
        if state.row == applied:
            return None
        self._make_durable()
        return self.mechanism.update(state)

    def release(self, row: int, total: Total, randomness: Randomness) -> NDArray[np.float64]:
        """Form row `row` of the round's sum, make it durable, and only then return the mean update, (dimension,)."""
        state = self._read()
        if row != state.row + 1:
            raise LedgerError(
                f"row {row} is out of order: {self.path} is at row {state.row}; "
                + ("it was formed already, ask for it with pending" if row == state.row else "restore the newest copy")
            )
        formed = self.mechanism.step(state, total, randomness)
        self._write(formed)
        return self.mechanism.update(formed)

    def close(self) -> None:
        """Let another process open the run; safe to call twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        if not self.path.exists():
            return self.mechanism.start()
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
