"""What a device's ledger says about one federation: the attempts that it answered, and how far the coordinator's ledger was.

Pure functions over the rows of an open ledger. Rows name an attempt as the purpose of a spend, as `declined` (for want of
budget) or as `refused` (anything else); receipts list the three alike. A refused attempt binds nobody: the order of a
coordinator that restored the wrong copy must not make those of the right one look late. `unlisted` are refusals that only the
owner reads: of an attempt that is listed already, or comes too late for the list (`stillroom_client.refusals`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stillroom_shared.errors import ProtocolError
from stillroom_shared.events import Event, event_from_json
from stillroom_shared.heads import LedgerHead, Position
from stillroom_shared.ledger import Row
from stillroom_shared.receipts import Attempt

_ANSWERED = ("purpose", "declined")
_SHOWN = (*_ANSWERED, "refused")


def answered(rows: Sequence[Row], federation: str) -> dict[Attempt, Event]:
    """Every attempt of a federation that this device was asked for, joined or not, with its event: what a receipt lists."""
    return {attempt: event_from_json(fields["event"]) for attempt, fields in _attempts(rows, federation, _SHOWN)}


def binding(rows: Sequence[Row], federation: str) -> set[Attempt]:
    """The attempts that are never answered again, and nothing before them either."""
    return {attempt for attempt, _ in _attempts(rows, federation, _ANSWERED)}


def seen_ledger(rows: Sequence[Row], federation: str) -> Position | None:
    """How far the coordinator's ledger was when this device last answered it; None before that."""
    shown = [fields["ledger"] for _, fields in _attempts(rows, federation, _ANSWERED) if fields.get("ledger")]
    return max((Position(**each) for each in shown), key=lambda position: position.rows, default=None)


def require_forward(rows: Sequence[Row], federation: str, shown: LedgerHead | None) -> None:
    """Raise `ProtocolError` when the coordinator's ledger went back since this device last saw it.

    What it released under the rows that are gone is not in its sums any more: a round that it repeats is not charged twice.
    """
    seen = seen_ledger(rows, federation)
    problem = None
    if shown is not None:
        problem = shown.went_back(seen)
    elif seen is not None:
        problem = f"is not shown any more, {seen.rows} rows were seen"
    if problem and seen is not None:
        raise ProtocolError(
            f"the ledger of federation {federation!r} went back in time: it {problem}; this device answers with zeros until "
            f"the operator restores its newest copy, which `stillroom audit ledger --head {seen.head}` recognizes"
        )


def why_refused(rows: Sequence[Row], federation: str) -> str | None:
    """Why the last order of a federation was declined or refused; None when it was joined."""
    last = last_row(rows, federation)
    return None if last is None else last.get("reason")


def last_row(rows: Sequence[Row], federation: str) -> dict[str, Any] | None:
    """The fields of the last row about an attempt of a federation; None before the first."""
    found = [fields for _, fields in _attempts(rows, federation, (*_SHOWN, "unlisted"))]
    return found[-1] if found else None


def _attempts(rows: Sequence[Row], federation: str, keys: Sequence[str]) -> Iterator[tuple[Attempt, dict[str, Any]]]:
    for row in rows:
        fields = row.fields
        purpose = next((fields[key] for key in keys if key in fields), None)
        if purpose and purpose["federation"] == federation:
            yield Attempt(purpose["round"], purpose["attempt"]), fields
