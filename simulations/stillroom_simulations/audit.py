"""`stillroom audit ledger`: verify a ledger from nothing but its file, and say what it has spent, against whom.

| break | found by |
|---|---|
| a row altered, removed, reordered, or signed by another key | hashes, links and signatures; the row is named |
| rows cut off at the end, or an old copy | `head`, the hash of a row that a counterpart has seen, and every published adapter |
| an adapter whose statement claims another epsilon | the same statement, computed again from the events it covers |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from pydantic import ValidationError

from stillroom_server.coordinate import ADAPTERS_FOLDER, KEY_FILE, LEDGER_FILE
from stillroom_server.plan import PLAN_FILE, Plan
from stillroom_server.receipts import RECEIPTS_FILE, ReceiptBook
from stillroom_shared.errors import LedgerError, SettingsError
from stillroom_shared.events import Event
from stillroom_shared.ledger import Ledger, Row
from stillroom_shared.receipts import Receipt
from stillroom_shared.release import AdapterManifest
from stillroom_shared.sealed import open_sealed
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import PrivacyStatement, rounds_of, statement


@dataclass(frozen=True, kw_only=True)
class LedgerAudit:
    """A ledger that holds: its statement, how many rows, the hash of the last one, and how many adapters were checked.

    `refused` names devices whose last update did not count because of their own ledgers, and why.
    """

    statement: PrivacyStatement
    rows: int
    head: str
    adapters: int
    refused: Mapping[str, str]


def audit_ledger(path: Path, *, public_key: str | None = None, head: str | None = None) -> LedgerAudit:
    """Verify every row, and recompute from the events the statement and those of all adapters published beside it.

    Args:
        path: the ledger of a coordinator, or the coordinator's home, with its plan beside it.
        public_key: the key that must have signed; without it the ledger is only shown to be consistent with itself.
        head: hash of a row that somebody has seen; without it nobody can tell whether rows were cut off at the end.

    Raises:
        LedgerError: naming the first row that does not hold, the adapter whose statement does not, or that the plan is not
            the one the ledger began with.
    """
    ledger_path = path / LEDGER_FILE if path.is_dir() else path
    plan_home = ledger_path.parent
    with Ledger.open(ledger_path, public_key=public_key) as ledger:
        ledger.verify()
        rows, events = ledger.rows(), ledger.events()
    if head is not None and head.lower() not in {row.hash for row in rows}:
        raise LedgerError(
            f"{ledger_path} ends with row {rows[-1].seq} and lacks the row of hash {head}: rows after it were cut off, or it "
            "is an old copy; restore the newest one"
        )
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
    made = _statement(events, plan, evaluations=_evaluations(rows))
    kept = (plan_home / RECEIPTS_FILE).is_file()  # looking must not make a book
    return LedgerAudit(
        statement=made,
        rows=len(rows),
        head=rows[-1].hash,
        adapters=_check_adapters(plan_home, plan, events, rows),
        refused=ReceiptBook(plan_home, federation=plan.federation).refused() if kept else {},
    )


def export_receipt(home: Path, device: str) -> Receipt:
    """The coordinator's signed receipt about one device, for `stillroom budget --recover`.

    Raises:
        SettingsError: the plan enrols no such device.
    """
    plan = Plan.load(home)
    if device not in plan.enrolled:
        raise SettingsError(
            f"device {device!r} is not enrolled in {plan.federation!r}: take a name from {home / PLAN_FILE}"
        )
    return ReceiptBook(home, federation=plan.federation).export(device, SigningKey.load(home / KEY_FILE))


def _evaluations(rows: Sequence[Row]) -> int:
    return sum("evaluation" in row.fields["purpose"] for row in rows if row.kind == "spend")


def _statement(events: Sequence[Event], plan: Plan, *, evaluations: int) -> PrivacyStatement:
    return statement(
        events,
        delta=plan.delta,
        devices=len(plan.enrolled),
        sampling_rate=plan.sampling_rate,
        clip_norm=plan.clip_norm,
        rehearsal=plan.rehearsal,
        mechanism=plan.mechanism,
        trial_of=plan.trial_of,
        evaluations=evaluations,
    )


def _check_adapters(home: Path, plan: Plan, events: Sequence[Event], rows: Sequence[Row]) -> int:
    """Every adapter states what the first of the ledger's events cost; how many adapters there are."""
    folders = sorted((home / ADAPTERS_FOLDER).glob("round-*"))
    key = str(rows[0].fields["key"])
    for folder in folders:
        manifest = open_sealed(folder, AdapterManifest, trusted_key=key)
        try:
            stated = PrivacyStatement.model_validate(manifest.statement)
        except ValidationError as error:
            raise LedgerError(
                f"{folder} has no statement that can be checked ({error.error_count()} errors)"
            ) from error
        seen = manifest.ledger
        if seen is not None and [row.hash for row in rows[seen.rows - 1 : seen.rows]] != [seen.head]:
            raise LedgerError(
                f"{folder} was published when the ledger had {seen.rows} rows with head {seen.head}; it ends with row "
                f"{rows[-1].seq} now and lacks that one: rows were cut off, or it is an old copy; restore the newest one"
            )
        paid = list(accumulate(map(rounds_of, events)))  # rounds that the first, second, ... charge pays for, in all
        charged = stated.rounds + stated.evaluations
        if charged and charged not in paid:
            raise LedgerError(
                f"{folder} was published after {charged} charged rounds, the ledger holds {max(paid, default=0)} and "
                f"ends with row {rows[-1].seq}: rows after it were cut off; restore the newest copy"
            )
        recomputed = _statement(events[: sum(own <= charged for own in paid)], plan, evaluations=stated.evaluations)
        if (stated.unit, stated.delta) != (recomputed.unit, recomputed.delta) or understated(stated, recomputed):
            raise LedgerError(
                f"{folder} states {stated.against}, its {charged} rounds cost {recomputed.against} at delta "
                f"{recomputed.delta}, {recomputed.unit} level: do not trust that adapter"
            )
    return len(folders)


def understated(stated: PrivacyStatement, recomputed: PrivacyStatement) -> bool:
    """Whether an adapter claims less than its events cost, against anybody or by any accountant; None is infinity."""

    def less(claim: float | None, cost: float | None) -> bool:
        return claim is not None and (cost is None or claim < cost * (1 - 1e-6))

    costs = [*recomputed.against.items(), *recomputed.epsilon.items()]
    claims = {**stated.against, **stated.epsilon}
    return any(less(claims.get(name, 0.0), cost) for name, cost in costs)
