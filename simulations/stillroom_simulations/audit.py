"""`stillroom audit ledger`: verify a ledger from nothing but its file, and say what it has spent, against whom.

| break | found by |
|---|---|
| a row altered, removed, reordered, or signed by another key | hashes, links and signatures; the row is named |
| rows cut off at the end, or an old copy | `head`, the hash of a row that a counterpart has seen, and every published adapter |
| an adapter whose statement says anything else than its charges cost | the same statement, computed again from the ledger |
| an adapter that leaves charges of its own rounds out | the rows that it covers, against all that were charged for its rounds |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from stillroom_server.adapters import ADAPTERS_FOLDER
from stillroom_server.coordinate import KEY_FILE, LEDGER_FILE
from stillroom_server.plan import PLAN_FILE, Plan
from stillroom_server.receipts import RECEIPTS_FILE, ReceiptBook
from stillroom_shared.errors import LedgerError, SettingsError
from stillroom_shared.ledger import Ledger, Row
from stillroom_shared.receipts import Receipt
from stillroom_shared.release import AdapterManifest
from stillroom_shared.sealed import open_sealed
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import PrivacyStatement, printed_epsilon


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
        rows = ledger.rows()
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
    made = plan.statement(rows)
    kept = (plan_home / RECEIPTS_FILE).is_file()  # looking must not make a book
    return LedgerAudit(
        statement=made,
        rows=len(rows),
        head=rows[-1].hash,
        adapters=_check_adapters(plan_home, plan, rows),
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


def stated_in(folder: Path, manifest: AdapterManifest) -> PrivacyStatement:
    """The statement that a sealed adapter makes; `LedgerError` when it makes none that can be checked."""
    try:
        return PrivacyStatement.model_validate(manifest.statement)
    except ValidationError as error:
        raise LedgerError(f"{folder} has no statement that can be checked ({error.error_count()} errors)") from error


def _check_adapters(home: Path, plan: Plan, rows: Sequence[Row]) -> int:
    """Every adapter states what the rows before it cost, and none was published before its charges; how many there are."""
    folders = sorted((home / ADAPTERS_FOLDER).glob("round-*"))
    key = str(rows[0].fields["key"])
    for folder in folders:
        manifest = open_sealed(folder, AdapterManifest, trusted_key=key)
        stated = stated_in(folder, manifest)
        if (seen := manifest.ledger) is None:
            raise LedgerError(f"{folder} does not say which rows of the ledger it covers: its statement proves nothing")
        if [row.hash for row in rows[seen.rows - 1 : seen.rows]] != [seen.head]:
            raise LedgerError(
                f"{folder} was published when the ledger had {seen.rows} rows with head {seen.head}; it ends with row "
                f"{rows[-1].seq} now and lacks that one: rows were cut off, or it is an old copy; restore the newest one"
            )
        if later := [row.seq for row in rows[seen.rows :] if _pays_for(row, manifest.round)]:
            raise LedgerError(
                f"{folder} covers {seen.rows} rows, but row {later[0]} was charged for its rounds too: it understates what "
                "they cost, do not trust that adapter"
            )
        recomputed = plan.statement(rows[: seen.rows])
        if recomputed.rounds < manifest.round:
            raise LedgerError(
                f"{folder} is of round {manifest.round}, the ledger was charged for {recomputed.rounds} before it was "
                "published: rounds without a charge; do not trust that adapter"
            )
        if misstated(stated, recomputed):
            raise LedgerError(
                f"{folder} states {_claims(stated)}; what the ledger was charged for comes to {_claims(recomputed)}: do not "
                "trust that adapter"
            )
    return len(folders)


def _pays_for(row: Row, last_round: int) -> bool:
    """Whether a row is a charge of a round up to this one, of a retry of it, or of an evaluation after it."""
    if row.kind != "spend":
        return False
    purpose = row.fields["purpose"]
    return "run" in purpose or purpose.get("round", purpose.get("after", last_round + 1)) <= last_round


def _claims(made: PrivacyStatement) -> str:
    costs = ", ".join(
        f"{'no guarantee' if value is None else f'epsilon {printed_epsilon(value)}'} against {name}"
        for name, value in made.against.items()
    )
    words = f"{costs or 'nothing'} ({made.unit} level, delta {made.delta:.1e}), {made.rounds} rounds"
    return f"{words}, {made.evaluations} evaluations, {made.devices:,} devices{', a rehearsal' * made.rehearsal}"


def misstated(stated: PrivacyStatement, recomputed: PrivacyStatement) -> bool:
    """Whether a statement claims less than its events cost, against anybody or by any accountant, or anything else than them.

    None is infinity. Claiming more deceives nobody, and accountants of other versions may.
    """

    def less(claim: float | None, cost: float | None) -> bool:
        return claim is not None and (cost is None or claim < cost * (1 - 1e-6))

    figures = {"against", "epsilon"}
    if stated.model_dump(exclude=figures) != recomputed.model_dump(exclude=figures):
        return True
    costs = [*recomputed.against.items(), *recomputed.epsilon.items()]
    claims = {**stated.against, **stated.epsilon}
    return any(less(claims.get(name, 0.0), cost) for name, cost in costs)
