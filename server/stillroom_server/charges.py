"""What the coordinator's ledger knows of its rounds, and what it has to know before another one is formed.

A round of its own charge is charged again when it is repeated. A run of turns is charged once, so a second version of one of
its rounds would cost nothing by the spends alone. Its ledger therefore names each round that was formed, with the hash of its
noisy integers, before anybody learns them, and a checkpoint that is behind is refused:

| rounds in the checkpoint | result |
|---|---|
| as many as the ledger names | goes on |
| one fewer, under `correlated` | a crash before the checkpoint: goes on with that very row (`stream.py`) |
| one fewer, under `local` | the same: goes on with another attempt, which the devices' caps cover |
| two fewer or more (deleted, an old copy) | `LedgerError`: rounds would be released twice |
| more than the ledger names, or a round without a charge | `LedgerError`: the ledger is an old copy |

The hash is of what is released, so it tells nothing that the release does not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.correlated import Correlated
from stillroom_shared.errors import LedgerError
from stillroom_shared.ledger import Budget, Ledger
from stillroom_shared.local_rounds import LocalRounds

_WHOLE_RUN = {"run": 1}
"""Purpose of the one charge of a run whose devices take turns."""


@dataclass(frozen=True)
class Formed:
    """The last round of a run that the ledger names: its number, 0 before the first, and the hash of its noisy integers."""

    round: int = 0
    hash: str = ""

    @classmethod
    def of(cls, round_number: int, noisy: NDArray[np.int64]) -> Formed:
        """A round by what it releases, (dimension,) int64."""
        return cls(round_number, hashlib.sha256(noisy.astype("<i8").tobytes()).hexdigest())


def last_formed(ledger: Ledger) -> Formed:
    """What the last note of `record_formed` says."""
    notes = [row.fields for row in ledger.rows() if row.kind == "note"]
    return max(
        (Formed(note["formed"], note["hash"]) for note in notes if "formed" in note),
        key=lambda formed: formed.round,
        default=Formed(),
    )


def record_formed(ledger: Ledger, formed: Formed) -> None:
    """Name a round in the ledger, durably; nobody may learn it before."""
    ledger.record({"formed": formed.round, "hash": formed.hash})


def is_whole_run(ledger: Ledger) -> bool:
    """Whether a run was charged as a whole."""
    return _WHOLE_RUN in ledger.purposes()


def charge_run(ledger: Ledger, mechanism: Correlated | LocalRounds, budget: Budget | None) -> None:
    """Charge a run of turns as a whole, before its first round."""
    if not is_whole_run(ledger):
        ledger.spend(mechanism.event(), budget=budget, purpose=_WHOLE_RUN)


def attempts_at(ledger: Ledger, round_number: int) -> int:
    """Attempts at a round, and at evaluations after it: devices number both in one row."""
    asked = [row.fields["asked"] for row in ledger.rows() if row.kind == "note" and "asked" in row.fields]
    return sum(round_number in (own.get("round"), own.get("after")) for own in (*ledger.purposes(), *asked))


def require_covers(ledger: Ledger, released: int, checkpoint: Path) -> None:
    """Raise `LedgerError` unless ledger and checkpoint, with so many released rounds, are of one time; see the table above."""
    if is_whole_run(ledger):
        formed = last_formed(ledger).round
        if formed > released + 1:
            raise LedgerError(
                f"{checkpoint} has released {released} rounds, {ledger.path} knows that {formed} were formed: the checkpoint "
                "is an old copy or gone; restore the newest copy of the whole home, or what was charged once would be "
                "released twice; without it the run has ended, and what was released stays released"
            )
        missing = formed + 1 if formed < released else None
    else:
        charged = {purpose["round"] for purpose in ledger.purposes() if "round" in purpose}
        missing = min(set(range(1, released + 1)) - charged, default=None)
    if missing is not None:
        raise LedgerError(
            f"{ledger.path} has no charge for round {missing}, which {checkpoint} has released: "
            "restore the newest copy of the ledger; without it the spend is unknown"
        )
