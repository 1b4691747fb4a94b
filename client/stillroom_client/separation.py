"""A device's own check of what a run of turns relies on: few participations, and enough rounds between two of them.

The sensitivity of a run with correlated noise (`stillroom_shared.correlated`) holds only for devices that keep both limits, and
the cost of a run under `local` only for those that keep the first. The server's rotation keeps them; the device does not take
its word, and looks into its own ledger before it answers.

| round asked for | answer |
|---|---|
| the first in this federation | yes, if the cap is at least 1 |
| the round of the last participation, a higher attempt | yes: the rows take in one attempt, the cap counts rounds |
| the same, under `local` | yes, if the cap allows: each attempt is an update of its own, the cap counts attempts |
| the same attempt, or a lower one | `BudgetError` |
| fewer than `separation` rounds after the last one, or before it | `BudgetError` |
| a round beyond the cap | `BudgetError` |
| other limits than at an earlier participation | `BudgetError`: the noise was computed for those |

Evaluations between rounds add nothing to a row, and do not count here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stillroom_shared.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One attempt at one round, with the limits of its run; as a dictionary it is the purpose of the spend in the ledger."""

    federation: str
    round: int
    attempt: int
    separation: int
    participations: int

    def purpose(self) -> dict[str, Any]:
        """What the ledger records."""
        return asdict(self)


def require_turn(turn: Turn, joined: Sequence[dict[str, Any]], *, every_attempt: bool = False) -> None:
    """Raise `BudgetError` unless the limits hold; `joined` are the purposes of all earlier spends of this device.

    `every_attempt`: the cap counts attempts, not rounds.

    >>> first = Turn(federation="toy", round=3, attempt=1, separation=4, participations=2)
    >>> require_turn(first, [])
    >>> require_turn(Turn(federation="toy", round=6, attempt=1, separation=4, participations=2), [first.purpose()])
    Traceback (most recent call last):
    stillroom_shared.errors.BudgetError: round 6 of 'toy' comes 3 rounds after round 3, which this device joined: ...
    """
    earlier = [p for p in joined if p.get("federation") == turn.federation and "evaluation" not in p]
    limits = (turn.separation, turn.participations)
    for purpose in earlier:
        if "separation" not in purpose:
            continue  # replayed from a receipt, which names attempts only; it counts all the same
        if (promised := (purpose.get("separation"), purpose.get("participations"))) != limits:
            raise BudgetError(
                f"round {turn.round} of {turn.federation!r} names separation and participations {limits}, earlier rounds "
                f"{promised}: the limits of a run never change; join another federation"
            )
    if every_attempt and len(earlier) >= turn.participations:
        raise BudgetError(
            f"attempt {turn.attempt} at round {turn.round} of {turn.federation!r} would be participation {len(earlier) + 1}: "
            f"{turn.participations} were accounted for, retries among them"
        )
    rounds = sorted({int(purpose["round"]) for purpose in earlier})
    if rounds and turn.round == rounds[-1]:
        answered = max(int(purpose["attempt"]) for purpose in earlier if purpose["round"] == turn.round)
        if turn.attempt <= answered:
            raise BudgetError(
                f"attempt {turn.attempt} at round {turn.round} of {turn.federation!r}: attempt {answered} was answered "
                "already; only a later one can be"
            )
        return
    if rounds and turn.round - rounds[-1] < turn.separation:
        raise BudgetError(
            f"round {turn.round} of {turn.federation!r} comes {turn.round - rounds[-1]} rounds after round {rounds[-1]}, which "
            f"this device joined: the noise covers rounds at least {turn.separation} apart"
        )
    if len(rounds) >= turn.participations:
        raise BudgetError(
            f"round {turn.round} of {turn.federation!r} would be participation {len(rounds) + 1}: the noise covers "
            f"{turn.participations}"
        )
