"""What a writer of lessons keeps, and which texts share a batch, with everything in memory: dictionaries, sets and lists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

ROLES = ("query", "passage")
POOL = 32


def identity(texts: Sequence[tuple[str, str]], pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[int], str]:
    """(row of each text, places of the pairs that are kept, hash) of (text, role), then (place of query, of passage)."""
    digest = hashlib.sha256()
    rows: dict[tuple[str, str], int] = {}
    for text, role in texts:
        if (text, role) not in rows:
            rows[text, role] = len(rows)
            digest.update(hashlib.blake2b(text.encode(), digest_size=15).digest() + bytes([ROLES.index(role)]))
    found = [rows[one] for one in texts]
    kept: dict[tuple[int, int], int] = {}
    for place, (query, passage) in enumerate(pairs):
        pair = found[query], found[passage]
        if pair not in kept:
            kept[pair] = place
            digest.update(json.dumps([pair[0], [pair[1]], [1]]).encode())
    return found, list(kept.values()), digest.hexdigest()


def like_lengths(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Batches of a random order whose pools are sorted by length, in a random order."""
    generator = np.random.default_rng(seed)
    order, batches = generator.permutation(len(lengths)).tolist(), []
    for begin in range(0, len(order), POOL * batch_size):
        pool = sorted(order[begin : begin + POOL * batch_size], key=lambda row: lengths[row])
        batches += [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]
