"""To leave the rounds of a federation, and to join them again.

Guarantees
- `leave` is on disk when it returns. Every order that is charged later is declined, an update that is being made is
  withheld, and both look to the coordinator like a device that has nothing (`app.py`), so that leaving tells nobody anything.
- What was spent stays in the ledger: what left once cannot be called back.
- `join` takes the consent that the owner saw, with its cap and limit. If it changed meanwhile, nothing is joined.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stillroom_client.home import Identity
from stillroom_client.participation import CONSENT_FILE, Consent
from stillroom_client.unlocking import unlock
from stillroom_shared.errors import BudgetError, SettingsError
from stillroom_shared.files import exclusive


def leave(home: Path) -> Consent:
    """Take part in nothing from now on. Leaving twice is harmless.

    Raises:
        DataError: `home` is no home of a device.
    """
    Identity.load(home)
    unlock(home)
    with exclusive(home):
        left = Consent.load(home).model_copy(update={"takes_part": False})
        left.save(home)
    return left


def join(home: Path, *, seen: Consent, limit_epsilon: float | None) -> Consent:
    """Take part again, under what the owner agrees to now.

    Args:
        seen: the consent that the owner was shown.
        limit_epsilon: the limit from now on, at the delta that was shown; None for no limit besides the cap.

    Raises:
        SettingsError: the limit is no positive number, or the consent is not any more what was shown.
        BudgetError: `local` is agreed to and there is no limit.
    """
    Identity.load(home)
    unlock(home)
    with exclusive(home):
        if (now := Consent.load(home)) != seen:
            raise SettingsError(f"{home / CONSENT_FILE} changed since it was shown: look at it again, then join")
        if limit_epsilon is None and "local" in now.mechanisms:
            raise BudgetError("`local` needs a limit: give an epsilon that all rounds together may cost")
        changes: dict[str, Any] = {"takes_part": True, "limit_epsilon": limit_epsilon}
        try:
            joined = Consent.model_validate(now.model_dump() | changes)
        except ValidationError as error:
            raise SettingsError(f"limit {limit_epsilon}: give a positive epsilon, or none") from error
        joined.save(home)
    return joined
