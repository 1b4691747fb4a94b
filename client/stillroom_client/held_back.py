"""Which of a device's queries are kept from training, so that an adapter can be judged by them.

A keyed hash of the query decides, so the split needs no memory: it is the same in every round, and a query that comes again
falls where it fell before. The key is the device's own: which queries are held back is nobody else's business, and a
question that many people ask is not kept from training on all devices at once.

Guarantees:
    - At one share, no held-back query becomes a training record, and no training query is scored.
    - What differs only in case, accents, spaces or punctuation falls on one side: the tower reads it (nearly) alike.
    - Each query by itself: adding or removing one moves no other, which the query-level unit of `local` relies on.
    - A larger share holds back a superset. So two federations with different shares on one device do mix: what one trains
      on, the other may score.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillroom_client.device import Device

_KEY_NAME = "held-back key"
_BYTES = 8  # of the digest that decide


@dataclass(frozen=True)
class HeldBack:
    """The split of one device.

    >>> split = HeldBack(key=bytes(32), share=0.2)
    >>> sum(split.holds(f"query {number}") for number in range(1_000))
    197
    >>> split.holds("How do I open it?") == split.holds("how do i  OPEN it")
    True
    """

    key: bytes
    share: float

    def holds(self, query: str) -> bool:
        """Whether this query is kept from training."""
        digest = hmac.digest(self.key, essence(query).encode(), hashlib.sha256)
        return int.from_bytes(digest[:_BYTES]) < self.share * 256.0**_BYTES


def held_back(device: Device, share: float) -> HeldBack:
    """The device's split; its key is made when it is first asked for."""
    return HeldBack(device.store.secret(_KEY_NAME) if share else b"", share)


def set_held_back_key(device: Device, key: bytes) -> None:
    """For simulations: a key that a rerun finds again. One that the device has already stays."""
    device.store.secret(_KEY_NAME, first=key)


def essence(query: str) -> str:
    """What is hashed: letters and digits without case and accents, one space between words; the text if there are none.

    >>> essence("  Où est-ce,  ZIP?"), essence("???")
    ('ou est ce zip', '???')
    """
    plain = (c for c in unicodedata.normalize("NFKD", query.casefold()) if not unicodedata.combining(c))
    words = "".join(c if c.isalnum() else " " for c in plain).split()
    return " ".join(words) or query.strip()
