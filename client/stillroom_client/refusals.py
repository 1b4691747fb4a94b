"""What a device keeps of the attempts that it does not join: enough for receipts and for its owner, and never without end.

An attempt that is not joined is a row at no cost, so that a receipt lists it like one that was. How long the list may grow is
a public constant, for joined and other attempts of a federation together: where it ends then follows from the orders of that
federation alone. A bound on unjoined ones, or one over all federations, would tell one coordinator what others had spent.

| attempt that is not joined | kept as | on receipts |
|---|---|---|
| for want of budget | `declined` | yes |
| for another reason | `refused` | yes |
| on the list already, or beyond `MOST_LISTED` of its federation | `unlisted`, unless the row before says so already | no |
| while no federation is named, beyond `MOST_LISTED` unjoined ones of all | nothing: no receipt travels | - |

Beyond `MOST_LISTED` attempts of its federation none is joined: one that was, and is on no receipt, would look like none, and
one that is listed alone would tell who declined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillroom_client.witness import answered, last_row
from stillroom_shared.errors import BudgetError, StillroomError
from stillroom_shared.ledger import Ledger, Row

MOST_LISTED = 2_000
"""Attempts of one federation, joined or not; also so many unjoined ones of all while none is named: disks are finite."""
_LONGEST_REASON = 500
_NOT_JOINED = {"declined", "refused"}


def require_room(rows: Sequence[Row], federation: str) -> None:
    """Raise `BudgetError` when no further attempt of this federation can be listed."""
    if len(answered(rows, federation)) >= MOST_LISTED:
        raise BudgetError(
            f"{MOST_LISTED:,} attempts of {federation!r} were asked for, the most that a receipt lists: none is joined any "
            "more; join another federation"
        )


def note_unjoined(ledger: Ledger, fields: dict[str, Any], why: Exception, *, named: bool) -> bool:
    """Record an attempt that is not joined, and why; False when receipts do not list it.

    Args:
        fields: `declined` or `refused`, the purpose that a spend would have had, and what stands beside it.
        named: whether the owner named a federation, and receipts travel.
    """
    purpose = next(fields[key] for key in _NOT_JOINED if key in fields)
    rows, reason = ledger.rows(), _reason(why)
    unjoined = sum(not row.fields.keys().isdisjoint(_NOT_JOINED) for row in rows)
    if len(answered(rows, purpose["federation"])) >= MOST_LISTED or (not named and unjoined >= MOST_LISTED):
        note_unlisted(ledger, purpose, why)
        return False
    ledger.record({**fields, "reason": reason})
    return True


def note_unlisted(ledger: Ledger, purpose: dict[str, Any], why: Exception) -> None:
    """Show the owner why an attempt was not joined that is listed already or never will be; receipts say nothing of it.

    A coordinator that repeats a round shows up here, as one does that was restored from an old copy. Never two in a row, so
    there are at most as many as rows that are listed.
    """
    last = last_row(ledger.rows(), purpose["federation"])
    if last is not None and "unlisted" not in last and last.get("reason") != _reason(why):
        ledger.record({"unlisted": purpose, "reason": _reason(why)})


def _reason(why: Exception) -> str:
    """What the owner reads: the text of what Stillroom raised; another exception's may quote what is private."""
    return str(why)[:_LONGEST_REASON] if isinstance(why, StillroomError) else type(why).__name__
