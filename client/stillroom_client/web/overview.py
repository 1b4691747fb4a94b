"""What the page says of learning and of privacy: the adapter in use, what was spent, what went out, what is agreed to."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stillroom_client.budget import budget_report
from stillroom_client.device import Device
from stillroom_client.participation import LEDGER_FILE, Consent
from stillroom_client.sent import last_sent
from stillroom_client.unlocking import unlock
from stillroom_shared.errors import MissingExtraError, StillroomError
from stillroom_shared.ledger import Ledger, Row
from stillroom_shared.statement import PrivacyStatement

_ATTEMPTS = 100  # of the history that the page lists
_OUTCOMES = {"purpose": "joined", "declined": "declined", "refused": "refused", "unlisted": "refused"}


def learned(device: Device) -> dict[str, Any]:
    """The release and the adapter that the device searches with, and what the adapter's statement promises."""
    release, adapter = device.release, device.adapter
    shown: dict[str, Any] = {"release": release.id, "release_round": release.manifest.adapter_round, "adapter": None}
    if adapter is not None:
        shown["adapter"] = {"round": adapter.round, "release": adapter.release_id, **_stated(adapter.statement)}
    return shown | {"opened": len(device.feedback())}


def privacy(home: Path) -> dict[str, Any]:
    """The consent, the last answer, and what was asked of the device; quick."""
    consent, sent = Consent.load(home), last_sent(home)
    shown: dict[str, Any] = {
        "consent": consent.model_dump(mode="json"),
        "needs_limit": "local" in consent.mechanisms and consent.limit_epsilon is None,
        "sent": None if sent is None else sent.model_dump(mode="json"),
        "attempts": [],
    }
    with suppress(StillroomError):  # `budget` says what is wrong with the ledger
        shown["attempts"] = _attempts(home)
    return shown


def budget(home: Path) -> dict[str, Any]:
    """What was spent: it may take seconds. What cannot be known is said in its place."""
    try:
        return {"budget": budget_report(home).to_json(), "problem": None}
    except StillroomError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        problem = str(MissingExtraError("the privacy panel", "federated", error.name or "dp_accounting"))
    return {"budget": None, "problem": problem}


def _stated(statement: Any) -> dict[str, Any]:
    try:
        found = PrivacyStatement.model_validate(statement)
    except ValidationError:
        return {"statement": None, "rehearsal": False}
    return {"statement": found.paragraph(), "rehearsal": found.rehearsal}


def _attempts(home: Path) -> list[dict[str, Any]]:
    """What was asked of this device and what became of it, latest first."""
    private = unlock(home)
    if not (private.folder / LEDGER_FILE).exists():
        return []
    with Ledger.open(private.folder / LEDGER_FILE, vault=private.vault) as ledger:
        found = [shown for row in ledger.rows() if (shown := _attempt(row))]
    return found[: -_ATTEMPTS - 1 : -1]


def _attempt(row: Row) -> dict[str, Any] | None:
    fields = row.fields
    for key, outcome in _OUTCOMES.items():
        if isinstance(asked := fields.get(key), dict) and "federation" in asked:
            return {
                "federation": asked["federation"],
                "round": asked["round"],
                "attempt": asked["attempt"],
                "purpose": "evaluation" if "evaluation" in asked else "round",
                "outcome": outcome,
                "reason": fields.get("reason"),
            }
    return None
