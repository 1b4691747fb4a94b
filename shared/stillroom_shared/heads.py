"""How far a ledger has come, told to a counterpart so that it notices when that ledger goes back.

A coordinator shows the head of its ledger in every order, after the spend of that order was written, and in every adapter
that it publishes. A device keeps the last one that it saw of each federation, in its own ledger.

The head tells nothing that is not released: rows name rounds, attempts and events, which follow from the plan and from what was
released, and hashes of released rows; and each holds fresh random bytes. Because of those, two histories that part never have
the same hashes again, even where the same rounds are charged. What the coordinator learns from devices' receipts is no row of
its ledger.

| a device has seen n rows | answer |
|---|---|
| the order shows more, and row n is the one that was seen | goes on; the new head is kept |
| the same number and the same head | goes on |
| fewer, or no ledger at all | refuses: an old copy was restored, or rows were cut off |
| row n is another one | refuses, from then on: the ledger parted from the one that was seen |
| more than `TRAIL` rows ago | the number alone is compared |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

TRAIL = 1024
"""Rows that an order names besides the last: 16 KiB at most."""
_DIGITS = 16


class Position(BaseModel):
    """A row of a ledger: how many rows there are with it, and its hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(ge=1, lt=2**53)
    head: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class LedgerHead(Position):
    """The last row, and of the rows that lead to it the first 16 digits of each hash, in one string.

    >>> hashes = [character * 64 for character in "abcd"]
    >>> seen, later, other = head_of(hashes[:2]), head_of(hashes), head_of(["a" * 64, "e" * 64, "d" * 64])
    >>> later.went_back(seen), seen.went_back(None)
    (None, None)
    >>> seen.went_back(later)
    'has 2 rows where 4 were seen: an old copy was restored, or rows were cut off'
    >>> other.went_back(seen)
    'is another one than was seen: row 1 has changed, so an old copy was restored and went its own way'
    """

    trail: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{16})+$", max_length=_DIGITS * TRAIL)]

    @model_validator(mode="after")
    def _leads_to_the_head(self) -> Self:
        if len(self.trail) != _DIGITS * min(self.rows, TRAIL) or not self.head.startswith(self.trail[-_DIGITS:]):
            raise ValueError("the trail does not lead to the head")
        return self

    def went_back(self, seen: Position | None) -> str | None:
        """What is wrong with a ledger that shows this after `seen`, in words that follow its name; None: nothing is."""
        if seen is None:
            return None
        if self.rows < seen.rows:
            return f"has {self.rows} rows where {seen.rows} were seen: an old copy was restored, or rows were cut off"
        start = len(self.trail) - _DIGITS * (self.rows - seen.rows + 1)
        found = self.head if self.rows == seen.rows else self.trail[start : start + _DIGITS] if start >= 0 else ""
        if not seen.head.startswith(found):
            return (
                f"is another one than was seen: row {seen.rows - 1} has changed, so an old copy was restored and went its "
                "own way"
            )
        return None

    @property
    def position(self) -> Position:
        """What a counterpart keeps of it."""
        return Position(rows=self.rows, head=self.head)


def head_of(hashes: Sequence[str]) -> LedgerHead:
    """What a ledger with rows of these hashes shows."""
    trail = "".join(each[:_DIGITS] for each in hashes[-TRAIL:])
    return LedgerHead(rows=len(hashes), head=hashes[-1], trail=trail)
