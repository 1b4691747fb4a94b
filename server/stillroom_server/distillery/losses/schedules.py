"""Weights and margins over training: functions of progress alone, so that a run that is resumed goes on where it was.

With p = progress in [0, 1], w = warm-up share and t = (p - w) / (1 - w), never below 0:

    constant   end
    linear     start + (end - start) * t
    cosine     start + (end - start) * (1 - cos(pi * t)) / 2      slow, fast, slow (Loshchilov and Hutter, arXiv 1608.03983)

During warm-up the value rises linearly from 0 to the schedule's first value.
"""

from __future__ import annotations

import math
from typing import Literal

from stillroom_shared.errors import SettingsError

Schedule = Literal["constant", "linear", "cosine"]


def scheduled(schedule: Schedule, progress: float, *, start: float, end: float, warmup: float = 0.0) -> float:
    """The value at `progress`, the share of training that is done.

    >>> [scheduled("linear", p, start=1, end=3) for p in (0, 0.5, 1)]
    [1.0, 2.0, 3.0]
    >>> [scheduled("constant", p, start=0, end=3, warmup=0.5) for p in (0, 0.25, 0.5, 1)]
    [0.0, 1.5, 3.0, 3.0]

    Raises:
        SettingsError: progress is not in [0, 1].
    """
    if not 0 <= progress <= 1:
        raise SettingsError(f"progress is {progress}: give the share of steps that are done, from 0 to 1")
    share = max(0.0, (progress - warmup) / (1 - warmup))
    if schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    first = end if schedule == "constant" else start
    value = first + (end - first) * share
    return float(value * min(1.0, progress / warmup) if warmup else value)
