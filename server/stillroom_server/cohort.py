"""Who takes part in a round: an independent coin for each enrolled device.

Poisson sampling, because that is what the accountant amplifies; a cohort of fixed size is another mechanism. The coin's
probability is the exact rational value of the sampling rate, from the cryptographic generator.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillroom_shared.randomness import Randomness


def poisson_cohort(enrolled: Sequence[str], sampling_rate: float, randomness: Randomness) -> tuple[str, ...]:
    """The sampled devices, in order; possibly none.

    >>> len(poisson_cohort([f"device-{i}" for i in range(1_000)], 0.2, Randomness(seed="toy")))
    213
    """
    numerator, denominator = float(sampling_rate).as_integer_ratio()
    return tuple(name for name in enrolled if randomness.bernoulli(numerator, denominator))
