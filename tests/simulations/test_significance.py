"""The paired randomisation test: against every outcome, its rate of false findings, and what must not pass for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.references import significance as reference

from stillroom_shared.errors import DataError
from stillroom_simulations.significance import holm, paired_randomisation

Floats = NDArray[np.float64]
REPEATS, QUERIES = 1_500, 60
# Few distinct differences, zeros among them, as metrics of ranked lists give: ties of the statistic are common.
DIFFERENCES = st.lists(st.sampled_from([0.0, 0.1, -0.1, 0.3, -0.5, 0.37]), min_size=1, max_size=6)


def seeded() -> np.random.Generator:
    return np.random.default_rng(7)


@settings(max_examples=60, deadline=None)
@given(st.lists(DIFFERENCES, min_size=1, max_size=2))
def test_small_cases_are_exact(sets: list[list[float]]) -> None:
    """A tie that rounding breaks, a set that weighs by its queries, or the observed outcome left out, all shift p."""
    [found] = paired_randomisation(sets, generator=seeded())
    assert found == pytest.approx(reference.randomisation(sets), abs=1e-12)


def test_sampling_agrees_with_all_outcomes() -> None:
    """The sampled test is the one that large sets get; a wrong sign or a wrong scale would show here only."""
    table = seeded().normal(0.05, 0.2, (14, 3))
    exact = paired_randomisation([table], generator=seeded())
    sampled = paired_randomisation([table], generator=seeded(), resamples=2**13)  # fewer than there are outcomes
    assert exact.tolist() == [reference.randomisation([column]) for column in table.T.tolist()]
    errors = np.sqrt(exact * (1 - exact) / 2**13)
    assert (np.abs(sampled - exact) < 4 * errors + 2 / 2**13).all() and (sampled != exact).any()


def null_differences(generator: np.random.Generator) -> Floats:
    """Two systems of which neither is better; queries differ in how far apart they can be."""
    spread = generator.choice([0.0, 0.1, 0.6], p=[0.4, 0.4, 0.2], size=QUERIES)
    found: Floats = generator.choice([-1.0, 1.0], size=QUERIES) * spread
    return found


def ours(differences: Floats, generator: np.random.Generator) -> float:
    return float(paired_randomisation([differences], generator=generator, resamples=999)[0])


def one_sided(differences: Floats, generator: np.random.Generator) -> float:
    """Wrong: half of the two-sided value."""
    return ours(differences, generator) / 2


def unpaired(differences: Floats, generator: np.random.Generator) -> float:
    """Wrong: scores are shuffled between queries as well, as if easy and hard queries were exchangeable."""
    hard = np.linspace(0, 1, QUERIES)
    scores = np.concatenate([hard + differences, hard])
    shuffled = [generator.permutation(scores) for _ in range(99)]
    means = np.array([abs(own[:QUERIES].mean() - own[QUERIES:].mean()) for own in shuffled])
    return float((1 + (means >= abs(differences.mean())).sum()) / 100)


def rate(test: Callable[[Floats, np.random.Generator], float], repeats: int) -> float:
    """How often a difference that is none is found at the 0.1 level."""
    generator = np.random.default_rng(3)
    return float(np.mean([test(null_differences(generator), generator) <= 0.1 for _ in range(repeats)]))


def far(share: float, repeats: int) -> bool:
    """More than four standard errors from 0.1."""
    return abs(share - 0.1) > 4 * math.sqrt(0.1 * 0.9 / repeats)


def test_false_findings_are_as_rare_as_stated() -> None:
    """A p-value that is too small sells luck as progress; one that is too large hides it. Wrong tests must be noticed."""
    assert not far(rate(ours, REPEATS), REPEATS)
    assert far(rate(one_sided, REPEATS), REPEATS)
    assert far(rate(unpaired, 300), 300)


def test_a_difference_is_found_and_none_is_not() -> None:
    """The test must have power, and columns must not be mixed up."""
    better = np.abs(null_differences(seeded())) - 0.02
    table = np.stack([better, np.zeros(QUERIES), -better], axis=1)
    low, none, negative = paired_randomisation([table], generator=seeded())
    assert low < 0.001 and none == 1.0 and negative == low


@given(st.lists(st.sampled_from([0.001, 0.01, 0.02, 0.02, 0.04, 0.3, 0.9]), min_size=1, max_size=6))
def test_holm_equals_its_definition(values: list[float]) -> None:
    """Bonferroni is too strict, no correction too lax, and the order of the models must not matter."""
    assert holm(values) == pytest.approx(reference.holm(values))


def test_what_is_refused() -> None:
    """NaN compares as false, so a broken score would come out as significant."""
    for wrong in ([[0.1, float("nan")]], [np.zeros((0, 2))], [], [np.zeros((2, 1)), np.zeros((2, 2))]):
        with pytest.raises(DataError, match="differences"):
            paired_randomisation(wrong, generator=seeded())
