"""Statements say no more than holds: per adversary, rounded up, and nothing where nothing is promised."""

from __future__ import annotations

import re

import pytest

from stillroom_shared.events import SampledGaussian, Unprotected
from stillroom_shared.statement import COORDINATOR, OBSERVERS, READERS, PrivacyStatement, statement


def step(noise_multiplier: float) -> SampledGaussian:
    sigma = int(noise_multiplier * 2**28)
    return SampledGaussian(noise_multiplier=noise_multiplier, sampling_rate=0.2, sigma=sigma, dimension=9_216)


def made(*events: SampledGaussian | Unprotected, **changes: object) -> PrivacyStatement:
    fields: dict[str, object] = {
        "delta": 1e-4, "devices": 1_000, "sampling_rate": 0.2, "clip_norm": 0.3, "rehearsal": False,
    }  # fmt: skip
    return statement(list(events), **(fields | changes))  # type: ignore[arg-type]


def test_every_adversary_has_its_own_figure() -> None:
    """The amplified figure alone is the smallest, and holds against nobody who sees the cohort."""
    found = made(*[step(2.0)] * 10)
    readers, observers = found.against[READERS], found.against[OBSERVERS]
    assert readers is not None
    assert observers is not None
    assert observers > 2 * readers
    assert found.against[COORDINATOR] is None
    for words in (READERS, OBSERVERS, "the coordinator there is no differential privacy guarantee"):
        assert words in found.paragraph()


def test_printed_figures_are_rounded_up() -> None:
    """4.904 printed as 4.90 is a guarantee that does not hold."""
    found = made(*[step(2.0)] * 7)
    printed = [float(figure) for figure in re.findall(r"epsilon (\d+\.\d+)", found.paragraph())]
    exact = [found.against[READERS], found.against[OBSERVERS]]
    assert len(printed) == 2
    for shown, value in zip(printed, exact, strict=True):
        assert value is not None
        assert value <= shown < value + 0.01


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (made(step(2.0), Unprotected(dimension=3)), "neither clipped nor noised"),
        (made(mechanism="none"), "neither clipped nor noised"),
        (made(*[step(0.02)] * 400), "too little noise"),
    ],
)
def test_no_guarantee_is_said_in_words_that_are_true(found: PrivacyStatement, says: str) -> None:
    """Infinity printed as a number, or as the wrong reason, misleads whoever reads it."""
    assert says in found.paragraph()
    assert found.epsilon["PLD"] is None
    assert not re.search(r"epsilon \d", found.paragraph())
