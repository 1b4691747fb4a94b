"""Adaptive clipping: the clip norm follows a quantile of the norms of updates (Andrew et al. 2021, arXiv 1905.03871).

Pure post-processing of the noisy share of unclipped updates that each round releases, so it costs what `Central` with a norm
bit says, and nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_FURTHEST = 10.0
"""Steps of the logarithm never leave this range: noise alone must not walk the clip norm out of all bounds."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """The clip norm of each round, as a function of what was released before it.

    Where more updates than `quantile` are unclipped the norm is too large and shrinks; where fewer are, it grows.

    Attributes:
        first: the clip norm of the first round.
        quantile: the share of updates that are to stay unclipped, in (0, 1).
        rate: step of the norm's logarithm for a share that is off by one.

    >>> clip = AdaptiveClip(first=0.3, quantile=0.5, rate=0.2)
    >>> round(clip.norm_after([]), 3), round(clip.norm_after([0.0]), 3), round(clip.norm_after([1.0, 1.0]), 3)
    (0.3, 0.332, 0.246)
    """

    first: float
    quantile: float
    rate: float

    def norm_after(self, unclipped: Sequence[float]) -> float:
        """The clip norm after rounds that released these shares of unclipped updates, oldest first.

        A noisy share outside of [0, 1] is taken for the nearest possible one.
        """
        steps = sum(self.quantile - min(max(share, 0.0), 1.0) for share in unclipped)
        return self.first * math.exp(min(max(self.rate * steps, -_FURTHEST), _FURTHEST))
