"""Receipts: how a device and a coordinator notice that the other's ledger, or their own, went back in time.

A receipt names every attempt of one federation that one device answered, with the event that each costs the device
un-amplified. The device signs one about itself; the coordinator keeps the union of those that it was shown, and signs
that in turn when the device needs it. A ledger that lacks an attempt which the counterpart kept was rolled back, or lost
rows; replaying the counterpart's receipt adds what is missing and removes nothing, so the larger spend is kept.

Guarantees:
    - While the counterpart is honest, a ledger that lost an attempt is noticed: `lost` names it. A set is compared, not the
      head of a chain, so a lost reply or two histories that were merged do not lock a device out.
    - A receipt names attempts of one federation, the one that the device's owner named, and so tells its coordinator no
      more than the orders which that sent. Not the ledger's head: its row number counts rows of other federations.
      An attempt that was declined, for want of budget that other federations used up or for any other cause, is listed
      like one that was joined. Keys differ for each federation and operator
      (`SigningKey.derive`), so two coordinators cannot tell by them that they talk to one device.
    - Whoever forges a coordinator's receipt needs its key; a coordinator that lies in its own can only make a device
      decline, which it could do by not asking. It can withhold one: that is outside the guarantee.

| bytes that arrive | result |
|---|---|
| over 1 MiB, not this schema, another signer, federation or device, an attempt twice, an unknown event | `ProtocolError` |
| an older receipt than the last | whoever reads it adds nothing; `lost` names what it lacks |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from stillroom_shared.errors import BudgetError, ProtocolError, ReleaseError
from stillroom_shared.events import Event, event_from_json, event_to_json
from stillroom_shared.signing import SigningKey, verify

Signer = Literal["device", "coordinator"]
_LARGEST = 1 << 20
_Number = Annotated[int, Field(ge=1, lt=2**53)]
_Name = Annotated[str, Field(min_length=1, max_length=512)]


class Attempt(NamedTuple):
    """One try at one round of a federation; later ones compare greater."""

    round: int
    attempt: int


Charges = Mapping[Attempt, Event]
"""What each answered attempt costs a device, un-amplified."""


class Charge(BaseModel):
    """Attempts that cost the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    event: dict[str, JsonValue]
    attempts: tuple[tuple[_Number, _Number], ...] = Field(min_length=1)


class Receipt(BaseModel):
    """What one device answered in one federation, vouched for by `by`. Make one with `issue`, read one with `read_receipt`.

    >>> from stillroom_shared.events import SampledGaussian
    >>> key, event = SigningKey.generate(), SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, sigma=9, dimension=4)
    >>> shown = issue("device", {Attempt(1, 1): event}, federation="f", device="d", key=key)
    >>> kept = issue("device", {Attempt(1, 1): event, Attempt(3, 1): event}, federation="f", device="d", key=key)
    >>> lost(kept.charges, shown.charges), lost(shown.charges, kept.charges)
    ([Attempt(round=3, attempt=1)], [])
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["receipt"] = "receipt"
    schema_version: Literal[1] = 1
    by: Signer
    federation: _Name
    device: _Name
    charged: tuple[Charge, ...]
    public_key: str
    signature: str = ""

    @property
    def signed(self) -> bytes:
        """The bytes that are signed: canonical JSON of everything else; `kind` and `by` keep it from passing as another."""
        fields = self.model_dump(mode="json", exclude={"signature"})
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @cached_property
    def charges(self) -> dict[Attempt, Event]:
        """Event of each attempt, in order; `BudgetError` when one cannot be accounted for."""
        found = {
            Attempt(*attempt): event_from_json(charge.event) for charge in self.charged for attempt in charge.attempts
        }
        return dict(sorted(found.items()))


def issue(by: Signer, charges: Charges, *, federation: str, device: str, key: SigningKey) -> Receipt:
    """A signed receipt."""
    groups: dict[Event, list[Attempt]] = {}
    for attempt, event in sorted(charges.items()):
        groups.setdefault(event, []).append(attempt)
    charged = tuple(
        Charge(event=event_to_json(event), attempts=tuple((a.round, a.attempt) for a in attempts))
        for event, attempts in groups.items()
    )
    bare = Receipt(by=by, federation=federation, device=device, charged=charged, public_key=key.public)
    return bare.model_copy(update={"signature": key.sign(bare.signed)})


def read_receipt(content: bytes, *, by: Signer, device: str, federation: str | None, public_key: str | None) -> Receipt:
    """Parse and verify a stranger's bytes.

    Args:
        federation: the one it must be about; None: whichever it names.
        public_key: who must have signed it; None: whoever it names, for the first one of a device.

    Raises:
        ProtocolError: naming what does not hold.
    """
    if len(content) > _LARGEST:
        raise ProtocolError(f"a receipt of {len(content)} bytes is over the {_LARGEST} that may travel")
    try:
        receipt = Receipt.model_validate_json(content)
        whole = verify(receipt.public_key, receipt.signature, receipt.signed)
        charges = receipt.charges
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "receipt"
        raise ProtocolError(f"the receipt cannot be read ({where}: {first['msg']}): ask for it again") from error
    except (BudgetError, ReleaseError, TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"the receipt cannot be read ({error}): ask for it again") from error
    expected: dict[str, Any] = {"by": by, "device": device}
    expected |= {"federation": federation} if federation is not None else {}
    expected |= {"public_key": public_key} if public_key is not None else {}
    for name, value in expected.items():
        if (found := getattr(receipt, name)) != value:
            raise ProtocolError(f"the receipt has {name} {found!r}, not {value!r}: use the one that was made for this")
    if not whole:
        raise ProtocolError("the receipt was altered: its signature does not hold; ask for it again")
    if len(charges) != sum(len(charge.attempts) for charge in receipt.charged):
        raise ProtocolError("the receipt names an attempt twice: it cannot say what that cost; ask for it again")
    return receipt


def lost(kept: Charges, shown: Charges) -> list[Attempt]:
    """Attempts that the counterpart kept and a ledger shows no more, or shows with another event; empty: nothing is lost."""
    return sorted(attempt for attempt, event in kept.items() if shown.get(attempt) != event)
