"""What last left this device: when, for which round, how many bytes. For its owner to see; nothing is decided by it.

The ledger says what was spent, durably and before anything leaves; this says what went, after it was made. It is kept on the
device only, and a disk that cannot take it changes no answer.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom_client.unlocking import unlock
from stillroom_shared.errors import EncryptionError
from stillroom_shared.files import exclusive

if TYPE_CHECKING:
    from stillroom_shared.protocol import EvaluationOrder, RoundOrder

SENT_FILE = "sent.json"
_log = logging.getLogger(__name__)


class Sent(BaseModel):
    """The last answer of a device, handed to Flower.

    Attributes:
        at: in UTC.
        size: bytes of its vector and of the receipt beside it.
        own: made from this device's data; False for the answer of a device that declined, failed or has left, which looks
            the same and holds nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str
    round: int
    attempt: int
    purpose: Literal["round", "evaluation"]
    at: datetime
    size: int
    own: bool


def note_sent(home: Path, order: RoundOrder | EvaluationOrder, *, size: int, own: bool) -> None:
    """Write down an answer, in one step; whatever goes wrong is only logged."""
    sent = Sent(
        federation=order.federation,
        round=order.round,
        attempt=order.attempt,
        purpose="evaluation" if hasattr(order, "evaluation") else "round",
        at=datetime.now(UTC).replace(microsecond=0),
        size=size,
        own=own,
    )
    try:
        with exclusive(home):  # or the note could be written in the clear while the home is being encrypted
            unlock(home, terminal=False).write(SENT_FILE, f"{sent.model_dump_json(indent=1)}\n".encode())
    except (OSError, EncryptionError):
        _log.exception("what was sent could not be written down")


def last_sent(home: Path) -> Sent | None:
    """The last answer; None before the first, or where the note of it was lost."""
    private = unlock(home)
    try:
        return Sent.model_validate_json(private.read(SENT_FILE))
    except (OSError, ValidationError, EncryptionError):
        return None
