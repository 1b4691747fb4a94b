"""A device's own say: which mechanisms it agrees to, how often, up to which spend, and its own ledger of what it took part in.

The ledger is written before the update leaves. Its events are un-amplified (sampling hides nothing from the coordinator or
from an observer), and an attempt that is already recorded is never answered again.

Guarantees:
    - Cap and limit are checked inside the transaction that records the spend, over all federations together.
    - Under `local`, where the coordinator is the adversary, the owner's limit has to be set: a cap on participations bounds
      nothing for a query while whoever sends orders chooses their steps and noise, and the name of the next federation.
      Within one federation every order costs what the first one did.
    - The key is saved after the ledger's genesis is on disk, so a key without a ledger always means a loss, never a start.
    - An attempt that is not joined is recorded too, at no cost: receipts then look the same either way. They are made
      before any document, query or feedback is read, so they cannot depend on them.
    - A coordinator whose ledger went back in time since this device last answered it gets zeros, until it comes forward.
    - After a loss (`stillroom_client.recovery`) the device answers only federations whose receipts were replayed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom_client.home import Identity
from stillroom_client.refusals import note_unjoined, note_unlisted, require_room
from stillroom_client.separation import Turn, require_same_event, require_turn
from stillroom_client.unlocking import Private, unlock
from stillroom_client.witness import answered, binding, require_forward
from stillroom_shared.accounting import epsilon
from stillroom_shared.errors import BudgetError, LedgerError, ProtocolError, SettingsError
from stillroom_shared.events import Event, event_to_json, in_one_unit
from stillroom_shared.files import exclusive
from stillroom_shared.ledger import Budget, Ledger, Row
from stillroom_shared.local_rounds import LocalRounds
from stillroom_shared.mechanism import MechanismName
from stillroom_shared.protocol import EvaluationOrder, RoundOrder
from stillroom_shared.receipts import Attempt, Charges, Receipt, issue
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import OBSERVERS, printed_epsilon

LEDGER_FILE = "ledger.sqlite3"
KEY_FILE = "device.key"
CONSENT_FILE = "consent.json"
Order = RoundOrder | EvaluationOrder
"""What a device can be asked to take part in; one cap, one limit and one numbering of attempts for both."""
ABOUT = {"device": True}
_AFFORDABLE = 100.0  # epsilon beyond which a loose figure is told: the tight one takes minutes


class Consent(BaseModel):
    """What the owner agreed to.

    Attributes:
        federation: the only one this device answers; None for whichever its node is connected to.
        mechanisms: those it takes part in.
        minimum_noise_multiplier: least noise, as a multiple of the sensitivity, under which it takes part.
        participations: a cap that is fixed in advance.
        limit_epsilon: the most that all participations together may cost, un-amplified, at `limit_delta`; None for no limit
            besides the cap, and then rounds under `local` are declined.
        takes_part: False once the owner left (`leaving.py`): every order is declined, whatever else stands here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str | None = None
    mechanisms: tuple[MechanismName, ...] = ("central",)
    minimum_noise_multiplier: float = Field(default=0.5, ge=0)
    participations: int = Field(default=200, ge=0)
    limit_epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    limit_delta: float = Field(default=1e-5, gt=0, lt=1)
    takes_part: bool = True

    @property
    def budget(self) -> Budget | None:
        """The limit as a budget. Un-amplified, so it holds against those who see which rounds the device joins."""
        if self.limit_epsilon is None:
            return None
        return Budget(epsilon=self.limit_epsilon, delta=self.limit_delta, adversary=OBSERVERS)

    def save(self, home: Path) -> None:
        """Write `consent.json`, in one step."""
        unlock(home).write(CONSENT_FILE, f"{self.model_dump_json(indent=2)}\n".encode())

    @classmethod
    def load(cls, home: Path) -> Consent:
        """Read `consent.json`; without one the default holds. `SettingsError` names what does not fit."""
        path, private = home / CONSENT_FILE, unlock(home)
        try:
            return cls.model_validate_json(private.read(CONSENT_FILE))
        except FileNotFoundError:
            if unlock(home).folder != private.folder:  # encrypted, or decrypted, since: what was agreed to lies there
                return cls.load(home)
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "consent"
            raise SettingsError(f"{path}: {where}: {first['msg']} (got {str(first['input'])[:80]})") from error


def set_limit(home: Path, epsilon: str, delta: float | None) -> Consent:
    """Write another limit into the consent of a device: a number, or "none". Over it, the device declines from now on.

    Raises:
        SettingsError: it is no positive number, or the delta no probability.
    """
    Identity.load(home)  # a consent in a folder that is no device binds nobody
    unlock(home)
    with exclusive(home):  # who leaves meanwhile has left, and nobody encrypts the home meanwhile
        before = Consent.load(home)
        try:
            limits = {
                "limit_epsilon": None if epsilon == "none" else float(epsilon),
                "limit_delta": delta or before.limit_delta,
            }
            changed = Consent.model_validate(before.model_dump() | limits)
        except ValueError as error:
            raise SettingsError(
                f"limit {epsilon} at delta {delta}: give a positive epsilon or `none`, and a delta in (0, 1)"
            ) from error
        changed.save(home)
    return changed


def require_joined(home: Path) -> None:
    """`BudgetError` when the owner has left: asked before an order is followed, as it is charged, and before an answer goes."""
    if not Consent.load(home).takes_part:
        raise BudgetError(f"the owner has left: {home / CONSENT_FILE} says that this device takes part in no round")


def take_part(home: Path, order: Order) -> Receipt | None:
    """Record this participation durably, or decline before anything is spent.

    Returns:
        The receipt that travels with the update, with this attempt on it; None where the owner named no federation.

    Raises:
        BudgetError: the mechanism, its noise, the cap, the limit or the attempt is not agreed to; or, under `local`, there is
            no limit, or other constants than at the first order of this federation.
        LedgerError: the device's ledger is gone or does not verify, so what was spent is unknown.
        ProtocolError: the order is for another federation than the device has joined, or older than one it has answered;
            or the coordinator's ledger went back in time.
    """
    consent = Consent.load(home)
    require_joined(home)
    _require_agreed(consent, order, home)
    mechanism = order.build_mechanism()
    event = mechanism.participation_event()
    attempt, purpose = Attempt(order.round, order.attempt), purpose_of(order.federation, order.round, order.attempt)
    turn = None
    if isinstance(order, EvaluationOrder):
        purpose["evaluation"] = order.evaluation
    elif order.schedule is not None:
        turn = Turn(
            **purpose,
            separation=order.schedule.separation,
            participations=order.schedule.participations,
            training=asdict(mechanism.training) if isinstance(mechanism, LocalRounds) else None,
        )
        purpose = turn.purpose()

    def allowed(joined: list[dict[str, Any]]) -> None:
        require_joined(home)
        if purpose in joined:
            raise BudgetError(f"{purpose} was answered already: an attempt is never answered twice")
        if turn is not None:
            require_turn(turn, joined, every_attempt=order.mechanism == "local")
        now = ledger.rows()
        if not isinstance(order, EvaluationOrder):
            require_same_event(event, order.federation, now)
        require_room(now, order.federation)
        if len(joined) >= consent.participations:
            raise BudgetError(
                f"participation {len(joined) + 1} is over the cap of {consent.participations} in {home / CONSENT_FILE}"
            )

    with open_ledger(home) as ledger:
        rows = ledger.rows()
        _require_replayed(rows, order.federation)
        before = binding(rows, order.federation)
        if attempt in before:
            raise BudgetError(f"{purpose} was answered already: an attempt is never answered twice")
        if any(earlier > attempt for earlier in before):
            raise ProtocolError(
                f"{purpose} comes after {max(before)} was answered: the order is late, or the coordinator's ledger went back "
                "in time; it must not release again what it has charged once"
            )
        require_forward(rows, order.federation, order.ledger)
        if isinstance(mechanism, LocalRounds) and consent.limit_epsilon is None:
            raise BudgetError(_without_limit(home, mechanism, ledger.events(), consent.limit_delta))
        seen = {"ledger": order.ledger.position.model_dump()} if order.ledger else {}
        try:
            allowed(ledger.purposes())  # before the accountant, which an absurd order would keep busy; again inside
            ledger.spend(event, budget=consent.budget, purpose=purpose, allowed=allowed, beside=seen)
        except BudgetError as error:
            fields = {"declined": purpose, "event": event_to_json(event), **seen}
            note_unjoined(ledger, fields, error, named=consent.federation is not None)
            raise
        if consent.federation is None:
            return None
        return _receipt(home, answered(rows, order.federation) | {attempt: event}, order.federation)


def refuse(home: Path, order: Order, why: Exception) -> Receipt | None:
    """Record that an order was not followed, and why; what it returns looks as if it had been.

    Raises:
        LedgerError: the device's ledger is gone or does not verify, so there is nothing to show: that is what the coordinator
            is to notice.
    """
    consent = Consent.load(home)
    if consent.federation not in (None, order.federation):
        return None
    if consent.federation is None and not (unlock(home).folder / KEY_FILE).exists():
        return None  # nothing was spent and nothing will be shown: an order alone makes no ledger
    event = order.build_mechanism().participation_event()
    attempt = Attempt(order.round, order.attempt)
    with open_ledger(home) as ledger:
        charges = answered(ledger.rows(), order.federation)
        purpose = purpose_of(order.federation, *attempt)
        if attempt in charges:
            note_unlisted(ledger, purpose, why)
        elif note_unjoined(
            ledger,
            {"refused": purpose, "event": event_to_json(event)},
            why,
            named=consent.federation is not None,
        ):
            charges[attempt] = event
    return None if consent.federation is None else _receipt(home, charges, order.federation)


def open_ledger(home: Path) -> Ledger:
    """The device's ledger for writing, with its key; both are made on first use.

    Raises:
        LedgerError: one of the two is gone, or the ledger does not verify.
    """
    private = unlock(home)
    if not (private.folder / KEY_FILE).exists():
        with exclusive(home):
            private = unlock(home)  # it may have been encrypted meanwhile
            if not (private.folder / KEY_FILE).exists():
                _begin(private)
    return Ledger.resume(private.folder / LEDGER_FILE, key=load_key(private), about=ABOUT, vault=private.vault)


def load_key(private: Private) -> SigningKey:
    """The key that signs a device's ledger."""
    return SigningKey.load(private.folder / KEY_FILE, vault=private.vault)


def device_receipt(home: Path, federation: str) -> Receipt:
    """What this device tells the coordinator of a federation about its own ledger, and nothing about any other.

    Raises:
        ProtocolError: the owner named another federation, or none: whoever the node is connected to could then ask for the
            rounds of a federation that is not his.
    """
    if (named := Consent.load(home).federation) != federation:
        raise ProtocolError(
            f"no receipt for federation {federation!r}: the owner named {named!r} in {home / CONSENT_FILE}, name it there"
        )
    with open_ledger(home) as ledger:
        charges = answered(ledger.rows(), federation)
    return _receipt(home, charges, federation)


def _receipt(home: Path, charges: Charges, federation: str) -> Receipt:
    identity = Identity.load(home)
    key = load_key(unlock(home)).derive("receipts", federation, identity.trusted_key)
    return issue("device", charges, federation=federation, device=identity.name, key=key)


def _require_agreed(consent: Consent, order: Order, home: Path) -> None:
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


def _without_limit(home: Path, mechanism: LocalRounds, before: list[Event], delta: float) -> str:
    """What the owner reads who agreed to `local` and set no limit: the command, with what the run would need."""
    unit, events = in_one_unit([*before, mechanism.event()])
    cost = epsilon(events, delta, "RDP")  # quick and never too small; PLD of millions of steps is neither
    cost = epsilon(events, delta) if cost < _AFFORDABLE else cost
    finite = math.isfinite(cost)
    return (
        "`local` needs a limit, because it promises something against the coordinator, who sends the orders: set one with "
        f"`stillroom budget --home {home} --limit {printed_epsilon(cost) if finite else 'EPSILON'}`. With what was spent "
        f"before, the {mechanism.participations} trainings that this run may ask for cost "
        + (f"epsilon {printed_epsilon(cost)}" if finite else "more than any epsilon")
        + f" ({unit} level, delta {delta:.1e}, against {OBSERVERS})"
    )


def _require_replayed(rows: Sequence[Row], federation: str) -> None:
    """After a loss, what was spent on a federation is unknown until its coordinator said what it saw."""
    notes = [row.fields for row in rows if row.kind == "note"]
    if any("begun_again" in note for note in notes) and not any(note.get("replayed") == federation for note in notes):
        raise LedgerError(
            f"this device's ledger was lost once, and what it spent on federation {federation!r} is unknown: replay the "
            "receipt of its coordinator (`stillroom budget --recover FILE`)"
        )


def purpose_of(federation: str, round_number: int, attempt: int) -> dict[str, Any]:
    """What the ledger records of an attempt, without the limits of its run."""
    return {"federation": federation, "round": round_number, "attempt": attempt}


def _begin(private: Private) -> None:
    """The first ledger of a device, then its key: nothing can have been spent before the key is there."""
    key_path, ledger_path = private.folder / KEY_FILE, private.folder / LEDGER_FILE
    if ledger_path.exists() and ledger_path.stat().st_size:
        with Ledger.open(ledger_path, vault=private.vault) as left:
            if len(left.rows()) > 1:
                raise LedgerError(
                    f"{key_path} is gone but {ledger_path} holds spends: restore the key beside its ledger"
                )
    key = SigningKey.generate()
    Ledger.begin(ledger_path, key=key, about=ABOUT, vault=private.vault)
    key.save(key_path, vault=private.vault)
