"""Accountants against each other, against closed forms, and against the figures of the literature."""

from __future__ import annotations

import math

import pytest
from tests.references.gaussian import gaussian_delta

from stillroom_shared.accounting import epsilon
from stillroom_shared.errors import BudgetError
from stillroom_shared.events import SampledGaussian, Unprotected, event_from_json, event_to_json, selection_of
from stillroom_shared.repetitions import NegativeBinomial, Poisson, Repetitions


def step(noise_multiplier: float, sampling_rate: float) -> SampledGaussian:
    return SampledGaussian(
        noise_multiplier=noise_multiplier,
        sampling_rate=sampling_rate,
        sigma=math.ceil(noise_multiplier * 2**28),
        dimension=9_216,
    )


@pytest.mark.parametrize("noise_multiplier", [1.0, 2.0, 5.0])
def test_one_release_without_sampling_matches_the_closed_form(noise_multiplier: float) -> None:
    """An accountant that forgets one direction of add-or-remove is below the exact value."""
    found = epsilon([step(noise_multiplier, 1.0)], 1e-5)
    assert gaussian_delta(found, noise_multiplier) <= 1e-5
    assert gaussian_delta(found - 0.01, noise_multiplier) > 1e-5


@pytest.mark.parametrize(("noise_multiplier", "rate", "rounds"), [(1.0, 0.1, 100), (2.0, 0.5, 20), (1.0, 0.2, 1000)])
def test_pld_is_below_rdp_and_close(noise_multiplier: float, rate: float, rounds: int) -> None:
    """Two independent derivations of the same quantity: a bug in one shows as a gap."""
    events = [step(noise_multiplier, rate)] * rounds
    pld, rdp = epsilon(events, 1e-5), epsilon(events, 1e-5, "RDP")
    assert pld <= rdp <= 1.25 * pld


def test_published_figures() -> None:
    """The reference setting z=1, q=0.1, T=100, delta=1e-5."""
    events = [step(1.0, 0.1)] * 100
    assert round(epsilon(events, 1e-5), 2) == 7.05
    assert round(epsilon(events, 1e-5, "RDP"), 2) == 7.90


def test_every_event_counts() -> None:
    """A retried round that is charged once would be free."""
    assert epsilon([step(2.0, 0.5)] * 3, 1e-4) > epsilon([step(2.0, 0.5)] * 2, 1e-4) > 0
    mixed = [step(2.0, 0.5), step(3.0, 0.5)]
    assert epsilon(mixed, 1e-4) == epsilon(mixed[::-1], 1e-4)


def test_a_single_unprotected_release_ends_the_guarantee() -> None:
    """Skipping what one cannot account for is how epsilons get small."""
    assert epsilon([step(2.0, 0.5), Unprotected(dimension=3)], 1e-4) == math.inf


def test_a_grid_too_coarse_certifies_nothing() -> None:
    """With few grid steps the discrete noise is not the Gaussian that is accounted for."""
    coarse = SampledGaussian(noise_multiplier=1.0, sampling_rate=0.5, sigma=4, dimension=9_216)
    assert epsilon([coarse], 1e-5) == math.inf


def test_hardly_any_noise_is_infinite_at_once() -> None:
    """Loss distributions of tiny noise fill gigabytes: a plan with a typing error would end the process."""
    assert epsilon([step(0.02, 0.2)] * 400, 1e-4) == math.inf
    assert epsilon([step(1.0, 1.0)] * 1_000, 1e-4) == math.inf


@pytest.mark.parametrize("drawn", [Poisson(mean=3.0), NegativeBinomial.with_mean(3.0, shape=0.0)])
def test_a_release_of_hardly_anything_has_a_cost(drawn: Repetitions) -> None:
    """Rounding makes its Renyi divergence negative: a search over it ends in an error of arithmetic."""
    hardly = step(2.0**18, 1e-4)
    assert 0 <= epsilon([hardly], 1e-5, "RDP") < 1e-3
    assert 0 <= epsilon([selection_of([[hardly]], drawn)], 1e-5) < 0.1
    assert 0 <= epsilon([selection_of([[hardly]], drawn), hardly], 1e-5) < 0.1


def test_rounding_costs_delta() -> None:
    """The distance between discrete and rounded noise must be paid, however small."""
    fine = step(1.0, 0.5)
    coarser = SampledGaussian(noise_multiplier=1.0, sampling_rate=0.5, sigma=20_000, dimension=100)
    assert fine.distance < coarser.distance
    assert epsilon([coarser], 1e-5) > epsilon([fine], 1e-5)


def test_the_slack_for_rounding_is_the_whole_slack() -> None:
    """(epsilon, delta') for the rounded noise is (epsilon, delta' + (1 + e^epsilon) tau) for the noise that is added."""
    delta, event = 1e-5, SampledGaussian(noise_multiplier=1.0, sampling_rate=1.0, sigma=12_000, dimension=100)
    found = epsilon([event], delta)
    slack = (1 + math.exp(found)) * event.distance
    assert 0.2 * delta < slack < delta, "the slack must matter, or the test would pass without it"
    assert gaussian_delta(found, 1.0) + slack <= delta
    assert gaussian_delta(found - 0.02, 1.0) + (1 + math.exp(found - 0.02)) * event.distance > delta


@pytest.mark.parametrize(
    "fields", [{"dimension": 0}, {"dimension": -5}, {"noise_multiplier": 1e30}, {"noise_multiplier": math.nan}]
)
def test_an_event_that_cannot_be_is_refused(fields: dict[str, float]) -> None:
    """A negative dimension would pay delta back."""
    sound = {"noise_multiplier": 1.0, "sampling_rate": 0.5, "sigma": 2**28, "dimension": 3}
    with pytest.raises(BudgetError):
        SampledGaussian(**(sound | fields))  # type: ignore[arg-type]


def test_events_survive_json_and_unknown_ones_are_refused() -> None:
    """A ledger whose events cannot be read back exactly cannot be verified."""
    for event in (step(2.0, 0.5), Unprotected(dimension=5)):
        assert event_from_json(event_to_json(event)) == event
    with pytest.raises(BudgetError, match="'laplace' is unknown"):
        event_from_json({"kind": "laplace", "scale": 1.0})
    with pytest.raises(BudgetError, match="fields of its kind"):
        event_from_json({"kind": "unprotected", "dimension": 1, "epsilon": 0.1})


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_delta_must_be_a_probability(delta: float) -> None:
    """Delta 1 makes every epsilon zero."""
    with pytest.raises(BudgetError, match="delta"):
        epsilon([step(2.0, 0.5)], delta)
