"""Adaptive clipping moves the right way, and comes to rest at its quantile."""

from __future__ import annotations

import numpy as np

from stillroom_server.clipping import AdaptiveClip
from stillroom_shared.mechanism import Central
from stillroom_shared.randomness import Randomness


def test_it_shrinks_when_nothing_is_clipped_and_grows_when_all_is() -> None:
    """The other sign looks like adaptation too, until the clip norm has left all norms behind."""
    clip = AdaptiveClip(first=0.3, quantile=0.5, rate=0.2)
    shrinking = [clip.norm_after([1.0] * rounds) for rounds in range(4)]
    growing = [clip.norm_after([0.0] * rounds) for rounds in range(4)]
    assert shrinking == sorted(shrinking, reverse=True)
    assert growing == sorted(growing)
    assert shrinking[-1] < 0.3 < growing[-1]
    assert clip.norm_after([0.5] * 100) == 0.3


def test_it_finds_the_quantile_of_the_norms_through_the_mechanism() -> None:
    """From far below and from far above, with the noise that is accounted for."""
    generator, dimension, devices = np.random.default_rng(0), 20, 500
    norms = generator.lognormal(0.0, 0.5, devices)  # median 1
    directions = generator.normal(size=(devices, dimension))
    updates = (directions / np.linalg.norm(directions, axis=1, keepdims=True) * norms[:, None]).astype(np.float32)
    for first in (0.05, 20.0):
        clip = AdaptiveClip(first=first, quantile=0.5, rate=0.3)
        shares: list[float] = []
        for number in range(60):
            mechanism = Central(
                clip_norm=clip.norm_after(shares), noise_multiplier=1.0, sampling_rate=1.0, devices=devices,
                dimension=dimension, norm_bit=0.1,
            )  # fmt: skip
            total = np.array([mechanism.bound(update) for update in updates], np.int64).sum(axis=0)
            released = mechanism.release(total, Randomness(seed=f"{first}/{number}")).unclipped
            assert released is not None
            shares.append(released)
        assert 0.85 < clip.norm_after(shares) / np.median(norms) < 1.15


def test_noise_alone_does_not_walk_it_away() -> None:
    """A share far outside of [0, 1], from noise over an empty cohort, must not move it further than a true one could."""
    clip = AdaptiveClip(first=0.3, quantile=0.5, rate=0.2)
    assert clip.norm_after([50.0]) == clip.norm_after([1.0])
    assert clip.norm_after([-50.0]) == clip.norm_after([0.0])
    assert 0 < clip.norm_after([1.0] * 100_000) < clip.norm_after([0.0] * 100_000) < float("inf")
