"""A device's own check of what a run of turns relies on: few participations, and enough rounds between two of them.

The sensitivity of a run with correlated noise (`stillroom_shared.correlated`) holds only for devices that keep both limits, and
the cost of a run under `local` only for those that keep the first, with the noise, rate and steps of its first order. The
server's rotation and plan keep them; the device does not take its word, and looks into its own ledger before it answers.

| round asked for | answer |
|---|---|
| the first in this federation | yes, if the cap is at least 1 |
| the round of the last participation, a higher attempt | yes: the rows take in one attempt, the cap counts rounds |
| the same, under `local` | yes, if the cap allows: each attempt is an update of its own, the cap counts attempts |
| the same attempt, or a lower one | `BudgetError` |
| fewer than `separation` rounds after the last one, or before it | `BudgetError` |
| a round beyond the cap | `BudgetError` |
| other limits than at an earlier participation | `BudgetError`: the noise was computed for those |
| under `local`, another constant of the training than at an earlier participation | `BudgetError`: so was the run's charge |
| another event than at an earlier participation, one of the two under `local` | the same, also where a receipt was replayed |

Evaluations between rounds add nothing to a row, and do not count here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stillroom_shared.errors import BudgetError
from stillroom_shared.events import Event, LocalGaussian, event_from_json
from stillroom_shared.ledger import Row

_FIXED = ("separation", "participations", "training")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One attempt at one round, with the limits of its run; as a dictionary it is the purpose of the spend in the ledger.

    `training`: under `local`, every constant of the device's DP-SGD (`stillroom_shared.local_mechanism.Local`).
    """

    federation: str
    round: int
    attempt: int
    separation: int
    participations: int
    training: Mapping[str, Any] | None = None

    def purpose(self) -> dict[str, Any]:
        """What the ledger records."""
        return {name: value for name, value in asdict(self).items() if value is not None}


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
    named = turn.purpose()
    for purpose in earlier:  # one that was replayed from a receipt names no limits; it counts all the same
        for limit in _FIXED:
            if limit in purpose and purpose[limit] != named.get(limit):
                raise BudgetError(
                    f"round {turn.round} of {turn.federation!r} names {limit} {named.get(limit)}, earlier rounds "
                    f"{purpose[limit]}: the limits of a run never change; join another federation"
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


def require_same_event(event: Event, federation: str, rows: Sequence[Row]) -> None:
    """Raise `BudgetError` when a federation under `local` asks for something that costs otherwise than before.

    `rows` are those of the device's ledger. Every spend has its event, one that was replayed from a receipt too. Evaluations
    are of another mechanism, under a consent of their own, and do not count here.
    """
    for row in rows:
        if row.kind != "spend" or "evaluation" in (purpose := row.fields["purpose"]):
            continue
        before = event_from_json(row.fields["event"])
        local = isinstance(event, LocalGaussian) or isinstance(before, LocalGaussian)
        if purpose.get("federation") == federation and local and before != event:
            raise BudgetError(
                f"{event} is not what federation {federation!r} asked for before, {before}: the limits of a run never change; "
                "join another federation"
            )
