"""DP-SGD on given per-record gradients, one record and one step at a time (Abadi et al. 2016, arXiv 1607.00133)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.noise import discrete_gaussian
from stillroom_shared.randomness import Randomness

GRID = 1 << 20
"""Grid steps in one clip norm."""


def dp_sgd(
    gradients: NDArray[np.float64],
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    randomness: Randomness,
) -> NDArray[np.float64]:
    """The noisy sums of all steps in clip norms, (steps, dimension); `gradients` are (records, dimension), clip norm 1.

    The loss is linear, so gradients do not depend on the parameters, which makes them the strongest canaries there are.
    """
    numerator, denominator = float(sampling_rate).as_integer_ratio()
    released = []
    for _ in range(steps):
        total = np.zeros(gradients.shape[1], np.int64)
        for gradient in gradients:
            if randomness.bernoulli(numerator, denominator):
                clipped = gradient / max(1.0, float(np.linalg.norm(gradient)))
                total += np.trunc(clipped * GRID).astype(np.int64)
        if noise_multiplier:
            total += discrete_gaussian(math.ceil(noise_multiplier * GRID), len(total), randomness)
        released.append(total / GRID)
    return np.array(released)
