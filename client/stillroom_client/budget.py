"""`stillroom budget`: what a device has spent, on what, against whom, and what is left.

Two sums, and neither is ever shown without the other (DESIGN section 4, rule 6):

| sum | counts | holds against |
|---|---|---|
| own participations | rounds this device joined, un-amplified, from its own ledger | peers and network observers |
| all rounds | every round, amplified by sampling, from the signed statement of the adapter in use | readers of releases |

The first is what the limit is checked against. Against the coordinator, which sees single updates under `central`, neither
promises anything, and that is said each time; a device that took part under `local` only is promised the first against it too.
Where rounds under `local` are among them, the first sum is about one query (`accounting.in_one_unit`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stillroom_client.home import STORE_NAME, Identity, adapter_in_use
from stillroom_client.participation import KEY_FILE, LEDGER_FILE, Consent, open_ledger
from stillroom_client.store import Store
from stillroom_client.unlocking import unlock
from stillroom_client.witness import seen_ledger, why_refused
from stillroom_shared.accounting import epsilon
from stillroom_shared.errors import DataError, ReleaseError
from stillroom_shared.events import Event, LocalGaussian, Unit, Unprotected, event_from_json, in_one_unit
from stillroom_shared.ledger import Row
from stillroom_shared.release import open_release
from stillroom_shared.statement import COORDINATOR, OBSERVERS, READERS, PrivacyStatement

UNKNOWN = "unknown before the first adapter"


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """An epsilon with everything it needs to mean something. `epsilon` is infinity for "no guarantee"."""

    epsilon: float
    delta: float
    adversary: str
    unit: Unit = "user"

    def to_json(self) -> dict[str, Any]:
        """A flat object; None stands for "no guarantee", which JSON has no number for."""
        return vars(self) | {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None}


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one federation had of this device: `rounds` joined; `attempts` charged, at evaluations too; `declined` ones."""

    federation: str
    rounds: int
    attempts: int
    declined: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What this device saw of a coordinator: `rows` and `head` of its ledger, and why its last order was not followed."""

    federation: str
    rows: int | None
    head: str | None
    refused: str | None


@dataclass(frozen=True, kw_only=True)
class BudgetReport:
    """Everything `stillroom budget` shows.

    Attributes:
        seen: what the coordinator of each federation in `spent` showed of its own ledger.
        own: all participations together, un-amplified.
        coordinator: the same against the coordinator, if all were under `local`; None where it is promised nothing.
        released: all rounds of the federation, from the adapter in use; or why that is unknown.
        released_rounds: how many rounds `released` counts.
        rehearsal: the noise of those came from a known seed, and promises nothing to whoever knows it.
        left_epsilon: what the limit still allows; None without a limit.
        left_participations: how many more attempts like the last one cap and limit allow.
    """

    device: str
    spent: tuple[Spent, ...]
    seen: tuple[Seen, ...]
    own: Guarantee
    coordinator: Guarantee | None
    released: Guarantee | str
    released_rounds: int | None
    rehearsal: bool
    consent: Consent
    left_epsilon: float | None
    left_participations: int

    @property
    def needs_limit(self) -> bool:
        """The owner agreed to `local`, whose rounds are declined until a limit is set."""
        return "local" in self.consent.mechanisms and self.consent.limit_epsilon is None

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints; every epsilon stands beside its unit, delta and adversary."""
        coordinator = {"epsilon": None, "unit": self.own.unit, "adversary": COORDINATOR, "guarantee": "none"}
        if self.coordinator is not None:
            coordinator = self.coordinator.to_json()
        known = self.released.to_json() if isinstance(self.released, Guarantee) else {"unknown": self.released}
        return {
            "device": self.device,
            "spent": [vars(spent) for spent in self.spent],
            "coordinators": [vars(seen) for seen in self.seen],
            "own_participations": self.own.to_json()
            | {
                "limit": self.consent.limit_epsilon,
                "left": self.left_epsilon,
                "attempts": sum(spent.attempts for spent in self.spent),
                "cap": self.consent.participations,
                "left_attempts": self.left_participations,
                "needs_limit": self.needs_limit,
            },
            "all_rounds": known | {"adversary": READERS, "rounds": self.released_rounds, "rehearsal": self.rehearsal},
            "coordinator": coordinator,
        }


def budget_report(home: Path) -> BudgetReport:
    """Read and verify the device's ledger, and add up.

    Raises:
        DataError: this is no home of a device.
        LedgerError: the ledger is gone or does not verify, so what was spent is unknown.
    """
    identity, consent = Identity.load(home), Consent.load(home)
    rows: list[Row] = []
    folder = unlock(home).folder
    if (folder / LEDGER_FILE).exists() or (folder / KEY_FILE).exists():  # looking must not make a ledger
        with open_ledger(home) as ledger:
            rows = ledger.rows()
    events = [event_from_json(row.fields["event"]) for row in rows if row.kind == "spend"]
    unit, counted = in_one_unit(events)
    own = Guarantee(
        epsilon=epsilon(counted, consent.limit_delta), delta=consent.limit_delta, adversary=OBSERVERS, unit=unit
    )
    private = bool(events) and all(isinstance(event, LocalGaussian) for event in events)
    stated = _stated(home, identity)
    spent = _by_federation(rows)
    return BudgetReport(
        device=identity.name,
        spent=spent,
        seen=tuple(_seen(rows, each.federation) for each in spent),
        own=own,
        coordinator=replace(own, adversary=COORDINATOR) if private else None,
        released=stated if isinstance(stated, str) else _against_readers(stated),
        released_rounds=None if isinstance(stated, str) else stated.rounds,
        rehearsal=not isinstance(stated, str) and stated.rehearsal,
        consent=consent,
        left_epsilon=None if consent.limit_epsilon is None else max(0.0, consent.limit_epsilon - own.epsilon),
        left_participations=_participations_left(events, consent),
    )


def _by_federation(rows: Sequence[Row]) -> tuple[Spent, ...]:
    joined = [row.fields["purpose"] for row in rows if row.kind == "spend"]
    declined = Counter(
        row.fields[kind]["federation"] for row in rows for kind in ("declined", "refused") if kind in row.fields
    )
    names = sorted({purpose["federation"] for purpose in joined} | set(declined))
    return tuple(
        Spent(
            federation=name,
            rounds=len({p["round"] for p in joined if p["federation"] == name and "evaluation" not in p}),
            attempts=sum(purpose["federation"] == name for purpose in joined),
            declined=declined[name],
        )
        for name in names
    )


def _seen(rows: Sequence[Row], federation: str) -> Seen:
    ledger = seen_ledger(rows, federation)
    return Seen(
        federation=federation,
        rows=ledger.rows if ledger else None,
        head=ledger.head if ledger else None,
        refused=why_refused(rows, federation),
    )


def _participations_left(events: Sequence[Event], consent: Consent) -> int:
    """How many more attempts like the last one fit under cap and limit; the limit is asked by bisection."""
    most = max(0, consent.participations - len(events))
    if events and isinstance(events[-1], LocalGaussian) and consent.limit_epsilon is None:
        return 0
    if consent.limit_epsilon is None or not events or isinstance(events[-1], Unprotected):
        return most
    fits = 0
    while fits < most:
        middle = (fits + most + 1) // 2
        _, counted = in_one_unit([*events, *[events[-1]] * middle])
        if epsilon(counted, consent.limit_delta) <= consent.limit_epsilon:
            fits = middle
        else:
            most = middle - 1
    return fits


def _stated(home: Path, identity: Identity) -> PrivacyStatement | str:
    """The statement of the adapter in use, or why there is none."""
    try:
        private = unlock(home)
        with Store(private.folder / STORE_NAME, private.vault) as store:
            folder = store.in_use().folder
        release = open_release(home / folder, trusted_key=identity.trusted_key)
        adapter = adapter_in_use(home, folder, release, identity.trusted_key)
    except (DataError, ReleaseError) as error:
        return f"unknown: {error}"
    if adapter is None:
        return UNKNOWN
    try:
        return PrivacyStatement.model_validate(adapter.statement)
    except ValidationError:
        return "unknown: the adapter in use has no statement that this version reads; ask its publisher, or update Stillroom"


def _against_readers(found: PrivacyStatement) -> Guarantee:
    value = found.against.get(READERS) if found.unit != "none" else None
    return Guarantee(
        epsilon=math.inf if value is None else value,
        delta=found.delta,
        adversary=READERS,
        unit="query" if found.unit == "query" else "user",
    )
