"""Are the cohorts Poisson samples? An exact test of how much their sizes vary.

Under Poisson sampling a cohort's size is Binomial(devices, rate), so it varies. A cohort of fixed size has the same mean and
no variance, and is another mechanism: accounted as Poisson, its epsilon is wrong. Too little and too much variation are
both rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import SettingsError

FALSE_ALARM = 1e-6
"""Real Poisson cohorts are rejected with at most this probability."""


def cohort_size_p_value(sizes: Sequence[int], *, devices: int, sampling_rate: float) -> float:
    """Two-sided p-value of the sum of squared distances of the sizes from the expected size, under Poisson sampling.

    Exact up to rounding of about 1e-12: the distribution of one squared distance, an integer, is convolved with itself. Time
    and memory grow with len(sizes) * devices * rate * (1 - rate), which suits simulations of up to some 10,000 devices.

    >>> cohort_size_p_value([95, 113, 88, 101, 90, 118], devices=1_000, sampling_rate=0.1) > 0.1
    True
    >>> cohort_size_p_value([100] * 6, devices=1_000, sampling_rate=0.1) < FALSE_ALARM
    True
    """
    if not sizes or min(sizes) < 0 or max(sizes) > devices or not 0 < sampling_rate <= 1:
        raise SettingsError(
            f"{len(sizes)} cohorts of {devices} devices at rate {sampling_rate}: give at least one size, each from 0 to "
            f"{devices}, and a rate in (0, 1]"
        )
    centre = round(devices * sampling_rate)
    distances = (np.arange(devices + 1) - centre) ** 2
    masses = _binomial(devices, sampling_rate)
    mean = float(masses @ distances)
    deviation = math.sqrt(max(0.0, float(masses @ distances.astype(np.float64) ** 2) - mean * mean))
    # Mass that far out would wrap around below; there is less of it than rounding can see.
    reach = len(sizes) * mean + 80 * math.sqrt(len(sizes)) * deviation + 2
    length = 1 << math.ceil(math.log2(reach))
    observed = sum((size - centre) ** 2 for size in sizes)
    if observed >= length:
        return 0.0
    one = np.bincount(distances % length, weights=masses, minlength=length)
    total = np.fft.irfft(np.fft.rfft(one) ** len(sizes), length)
    at_most, at_least = float(total[: observed + 1].sum()), float(total[observed:].sum())
    return min(1.0, max(0.0, 2 * min(at_most, at_least)))


def _binomial(trials: int, chance: float) -> NDArray[np.float64]:
    if chance == 1:
        return np.asarray(np.eye(1, trials + 1, trials)[0], np.float64)
    logs = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(chance)
        + (trials - k) * math.log1p(-chance)
        for k in range(trials + 1)
    ]
    return np.asarray(np.exp(logs), np.float64)
