"""A device's own say: which mechanisms it agrees to, how often, and its own ledger of what it took part in.

The ledger is written before the update leaves. Its events are un-amplified (sampling hides nothing from the coordinator or
from an observer), and an attempt that is already recorded is never answered again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stillroom_shared.accounting import SampledGaussian
from stillroom_shared.errors import BudgetError, LedgerError, ProtocolError
from stillroom_shared.ledger import Ledger
from stillroom_shared.mechanism import MechanismName
from stillroom_shared.protocol import RoundOrder
from stillroom_shared.signing import SigningKey

LEDGER_FILE = "ledger.sqlite3"
KEY_FILE = "device.key"
CONSENT_FILE = "consent.json"


class Consent(BaseModel):
    """What the owner agreed to.

    Attributes:
        federation: the only one this device answers; None for whichever its node is connected to.
        mechanisms: those it takes part in.
        minimum_noise_multiplier: least noise, as a multiple of the sensitivity, under which it takes part.
        participations: a cap that is fixed in advance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str | None = None
    mechanisms: tuple[MechanismName, ...] = ("central",)
    minimum_noise_multiplier: float = Field(default=0.5, ge=0)
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
    """Record this participation durably, or decline before anything is spent.

    Raises:
        BudgetError: the mechanism, its noise, the cap or the attempt is not agreed to.
        LedgerError: the device's ledger is gone or does not verify, so what was spent is unknown.
        ProtocolError: the order is for another federation than the device has joined.
    """
    consent = Consent.load(home)
    if consent.federation not in (None, order.federation):
        raise ProtocolError(
            f"the order is of federation {order.federation!r}, this device joined {consent.federation!r}"
        )
    if order.noise_multiplier is not None and order.noise_multiplier < consent.minimum_noise_multiplier:
        raise BudgetError(
            f"noise multiplier {order.noise_multiplier} is below the {consent.minimum_noise_multiplier} agreed to in "
            f"{home / CONSENT_FILE}"
        )
    if order.mechanism not in consent.mechanisms:
        raise BudgetError(
            f"mechanism {order.mechanism!r} is not among those agreed to {consent.mechanisms}: {home / CONSENT_FILE}"
        )
    key_path, ledger_path = home / KEY_FILE, home / LEDGER_FILE
    if not key_path.exists():
        SigningKey.generate().save(key_path)
    elif not ledger_path.exists():
        raise LedgerError(
            f"{ledger_path} is gone but {key_path} is there: what was spent is unknown; restore the ledger"
        )
    attempt = {"federation": order.federation, "round": order.round, "attempt": order.attempt}

    def allowed(joined: list[dict[str, Any]]) -> None:
        if attempt in joined:
            raise BudgetError(f"{attempt} was answered already: an attempt is never answered twice")
        if len(joined) >= consent.participations:
            raise BudgetError(
                f"participation {len(joined) + 1} is over the cap of {consent.participations} in {home / CONSENT_FILE}"
            )

    with Ledger.create(ledger_path, key=SigningKey.load(key_path), about={"device": True}) as ledger:
        event = order.build_mechanism().event()
        ledger.spend(
            event.without_sampling() if isinstance(event, SampledGaussian) else event,
            budget=None,
            purpose=attempt,
            allowed=allowed,
        )
