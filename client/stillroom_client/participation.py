"""A device's own say: which mechanisms it agrees to, how often, and its own ledger of what it took part in.

The ledger is written before the update leaves. Its events are un-amplified (sampling hides nothing from the coordinator or
from an observer), and an attempt that is already recorded is never answered again.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from stillroom_shared.accounting import SampledGaussian
from stillroom_shared.errors import BudgetError
from stillroom_shared.ledger import Ledger
from stillroom_shared.mechanism import MechanismName
from stillroom_shared.protocol import RoundOrder
from stillroom_shared.signing import SigningKey

LEDGER_FILE = "ledger.sqlite3"
KEY_FILE = "device.key"
CONSENT_FILE = "consent.json"


class Consent(BaseModel):
    """What the owner agreed to: mechanisms, and a cap on participations that is fixed in advance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mechanisms: tuple[MechanismName, ...] = ("central",)
    participations: int = Field(default=200, ge=0)

    def save(self, home: Path) -> None:
        """Write `consent.json`."""
        (home / CONSENT_FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, home: Path) -> Consent:
        """Read `consent.json`; without one the default holds."""
        path = home / CONSENT_FILE
        return cls.model_validate_json(path.read_text()) if path.exists() else cls()


def take_part(home: Path, order: RoundOrder) -> None:
    """Record this participation durably, or decline with `BudgetError`; `LedgerError` when the ledger does not verify."""
    consent = Consent.load(home)
    if order.mechanism not in consent.mechanisms:
        raise BudgetError(
            f"mechanism {order.mechanism!r} is not among those agreed to {consent.mechanisms}: {home / CONSENT_FILE}"
        )
    key_path = home / KEY_FILE
    if not key_path.exists():
        SigningKey.generate().save(key_path)
    attempt = {"federation": order.federation, "round": order.round, "attempt": order.attempt}
    with Ledger.create(home / LEDGER_FILE, key=SigningKey.load(key_path), about={"device": True}) as ledger:
        joined = [row.fields["purpose"] for row in ledger.rows() if row.kind == "spend"]
        if attempt in joined:
            raise BudgetError(f"{attempt} was answered already: an attempt is never answered twice")
        if len(joined) >= consent.participations:
            raise BudgetError(
                f"participation {len(joined) + 1} is over the cap of {consent.participations} in {home / CONSENT_FILE}"
            )
        event = order.build_mechanism().event()
        ledger.spend(
            event.without_sampling() if isinstance(event, SampledGaussian) else event, budget=None, purpose=attempt
        )
