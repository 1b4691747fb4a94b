"""`stillroom audit ledger`: verify a ledger from nothing but its file, and say what it has spent, against whom."""

from __future__ import annotations

from pathlib import Path

from stillroom_server.coordinate import LEDGER_FILE
from stillroom_server.plan import PLAN_FILE, Plan
from stillroom_shared.errors import LedgerError
from stillroom_shared.ledger import Ledger
from stillroom_shared.statement import PrivacyStatement, statement


def audit_ledger(path: Path, *, public_key: str | None = None) -> tuple[PrivacyStatement, int]:
    """Verify every row and recompute the statement from the events; returns it with the number of rows.

    Args:
        path: the ledger of a coordinator, or the coordinator's home, with its plan beside it.
        public_key: the key that must have signed; without it the ledger is only shown to be consistent with itself.

    Raises:
        LedgerError: naming the first row that does not hold, or that the plan is not the one the ledger began with.
    """
    ledger_path = path / LEDGER_FILE if path.is_dir() else path
    plan_home = ledger_path.parent
    with Ledger.open(ledger_path, public_key=public_key) as ledger:
        ledger.verify()
        rows, events = ledger.rows(), ledger.events()
    about = rows[0].fields["about"]
    if not (plan_home / PLAN_FILE).is_file():
        raise LedgerError(
            f"no {PLAN_FILE} beside {ledger_path}: keep the plan with the ledger, it holds delta and devices"
        )
    plan = Plan.load(plan_home)
    if about.get("plan") != plan.content_hash:
        raise LedgerError(
            f"{ledger_path} began with another plan than {plan_home / PLAN_FILE}: restore the original plan"
        )
    made = statement(
        events,
        delta=plan.delta,
        devices=len(plan.enrolled),
        sampling_rate=plan.sampling_rate,
        clip_norm=plan.clip_norm,
        rehearsal=plan.rehearsal,
        mechanism=plan.mechanism,
    )
    return made, len(rows)
