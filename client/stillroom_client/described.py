"""What filters see of a store: the fields of its passages in SQL, and the rows that fulfil a condition."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from stillroom_client.store import Store

_FIELDS = {"id": "p.id", "owner": "p.owner", "title": "p.title"}
_DESCRIBED = "described.metadata"


def fields(store: Store) -> Callable[[str], str | None]:
    """What a filter's field is in SQL, over the passage `p` as `described`; None when no passage has one of this name."""

    def field(name: str) -> str | None:
        if name in _FIELDS or not re.fullmatch(r"[\w.-]+", name):
            return _FIELDS.get(name)
        some = store.query(f"SELECT 1 FROM described, json_each({_DESCRIBED}) WHERE key = ? LIMIT 1", (name,))
        return f"json_extract({_DESCRIBED}, '$.\"{name}\"')" if some else None

    return field


def field_names(store: Store) -> list[str]:
    """The names that a filter may compare."""
    found = store.query(f"SELECT DISTINCT key FROM described, json_each({_DESCRIBED})")
    return sorted({*_FIELDS, *(name for (name,) in found)})


def select(store: Store, condition: str, values: Sequence[object] = ()) -> NDArray[np.int64]:
    """Rows of the passages `p` that fulfil a condition in SQL (`filters.py`), ascending."""
    joint = "JOIN described ON described.row = p.row" if _DESCRIBED in condition else ""
    rows = f"SELECT p.row AS row FROM passages p {joint} WHERE {condition} ORDER BY p.row"
    # One string: 100,000 tuples take 20 times longer.
    joined = store.query(f"SELECT group_concat(row) FROM ({rows})", tuple(values))[0][0]
    return np.array(joined.split(",") if joined else [], np.int64)
