"""Microseconds a sample of the discrete Gaussian and of its slow twin, interleaved.

Run `PYTHONPATH=. python benchmarks/noise.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from tests.references import canonne_kamath_steinke

from stillroom_shared.noise import discrete_gaussian
from stillroom_shared.randomness import Randomness

COUNT, REPEATS = 9_216, 9


def microseconds(draw: Callable[[int, int, Randomness], object], sigma: int) -> float:
    """Of one sample, in one vector of COUNT."""
    begin = time.perf_counter()
    draw(sigma, COUNT, Randomness())
    return (time.perf_counter() - begin) / COUNT * 1e6


if __name__ == "__main__":
    for exponent in (0, 29, 44):
        pairs = [
            [
                microseconds(draw, 1 << exponent)
                for draw in (discrete_gaussian, canonne_kamath_steinke.discrete_gaussian)
            ]
            for _ in range(REPEATS)
        ]
        fast, slow = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"sigma 2^{exponent}: {fast:.3f} us, slow twin {slow:.2f} us, {slow / fast:.0f} times")
