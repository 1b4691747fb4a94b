"""After a loss, or with a restored backup: a device's ledger takes over what a coordinator's receipt says it answered.

Guarantees:
    - What the ledger lacks is charged, nothing is taken back, and no limit is asked: what was released cannot be refused.
    - A ledger that is gone or damaged begins again with every row whose signature holds; the damaged file stays beside it.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stillroom_client.home import Identity
from stillroom_client.participation import ABOUT, KEY_FILE, LEDGER_FILE, Consent, load_key, open_ledger, purpose_of
from stillroom_client.unlocking import unlock
from stillroom_client.witness import answered
from stillroom_shared.errors import LedgerError, LedgerLostError
from stillroom_shared.events import event_from_json
from stillroom_shared.files import exclusive
from stillroom_shared.ledger import Ledger, Row
from stillroom_shared.receipts import lost, read_receipt


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What `recover` did. `salvaged` counts spends taken over from a damaged ledger, None when it was sound."""

    federation: str
    witnessed: int
    added: int
    salvaged: int | None


def recover(home: Path, content: bytes) -> Recovery:
    """Replay a coordinator's receipt about this device: what the ledger lacks is charged, nothing is taken back.

    A ledger that is gone or damaged begins again, with what can be salvaged of it; the damaged file stays beside it.

    Raises:
        ProtocolError: the receipt is not of the trusted operator, not about this device, or of a federation it did not join.
        LedgerError: the device's key is gone.
    """
    identity, consent = Identity.load(home), Consent.load(home)
    receipt = read_receipt(
        content, by="coordinator", device=identity.name, federation=consent.federation, public_key=identity.trusted_key
    )
    salvaged: int | None = None
    try:
        ledger = open_ledger(home)
    except LedgerLostError:
        with exclusive(home):
            salvaged = _begin_again(home)
        ledger = open_ledger(home)
    with ledger:
        missing = lost(receipt.charges, answered(ledger.rows(), receipt.federation))
        spends = [(receipt.charges[attempt], purpose_of(receipt.federation, *attempt)) for attempt in missing]
        added = ledger.recover(spends, note={"replayed": receipt.federation})
    return Recovery(federation=receipt.federation, witnessed=len(receipt.charges), added=added, salvaged=salvaged)


def _begin_again(home: Path) -> int:
    """A new ledger in place of one that is lost, with the rows of it that hold; how many spends those are."""
    private = unlock(home)
    ledger_path, key_path = private.folder / LEDGER_FILE, private.folder / KEY_FILE
    if not key_path.exists():
        raise LedgerError(f"{key_path} is gone: restore the key, without it no row can be told from a forged one")
    key = load_key(private)
    rows: list[Row] = []
    with suppress(LedgerLostError), Ledger.open(ledger_path, public_key=key.public, vault=private.vault) as damaged:
        rows = damaged.genuine()
    if ledger_path.exists():
        (private.folder / f"{LEDGER_FILE}.damaged-{secrets.token_hex(4)}").hardlink_to(ledger_path)
    spends = [(event_from_json(row.fields["event"]), row.fields["purpose"]) for row in rows if row.kind == "spend"]
    Ledger.begin(ledger_path, key=key, about=ABOUT, note={"begun_again": True}, spends=spends, vault=private.vault)
    return len(spends)
