"""The audit of real rounds (user level): silent where the mechanism is right, loud where it is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import stillroom_server.coordinate
import stillroom_shared.correlated
import stillroom_shared.local_mechanism
import stillroom_shared.mechanism
from stillroom_server.optimizer import ServerOptimizer
from stillroom_shared.local_mechanism import Local
from stillroom_shared.mechanism import RESOLUTION, Central
from stillroom_shared.noise import discrete_gaussian
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import Release
from stillroom_simulations.canaries import (
    CanaryRounds,
    canary_directions,
    canary_plan,
    canary_release,
    canary_weights,
    run_canary_rounds,
)
from stillroom_simulations.cohort_sizes import FALSE_ALARM, cohort_size_p_value
from stillroom_simulations.one_run_audit import OneRunAudit, audit_one_run

CANARIES, ROUNDS, RATE, DELTA = 1_000, 10, 0.1, 1e-5
EPSILON_ONE = 1.742
"""The noise multiplier of epsilon 1 (user level, delta 1e-5, against readers of releases) for these rounds."""

NOISE = {"central": EPSILON_ONE, "none": EPSILON_ONE, "local": 2.1039, "correlated": 3.7308}
"""The same for every mechanism, against the same; `none` has none."""
NOISY = {
    "central": stillroom_shared.mechanism,
    "local": stillroom_shared.local_mechanism,
    "correlated": stillroom_shared.correlated,
}

Audited = tuple[OneRunAudit, CanaryRounds]
Audit = Callable[..., Audited]


@pytest.fixture(scope="module")
def directions() -> np.ndarray:
    return canary_directions(CANARIES, Randomness(seed="directions"))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return canary_release(tmp_path_factory.mktemp("canaries") / "release", CANARIES)


@pytest.fixture
def audit(tmp_path: Path, release: Release, directions: np.ndarray) -> Audit:
    def run_audit(mechanism: str = "central", seed: str = "s") -> Audited:
        plan = canary_plan(
            release, canaries=CANARIES, mechanism=mechanism, noise_multiplier=NOISE[mechanism],  # type: ignore[arg-type]
            budget_epsilon=1.0, delta=DELTA, rounds=ROUNDS, sampling_rate=RATE, seed=seed,
        )  # fmt: skip
        kept: list[CanaryRounds] = []

        def run(present: np.ndarray) -> np.ndarray:
            kept.append(run_canary_rounds(tmp_path / seed, plan, directions, present))
            return kept[0].released

        seen = audit_one_run(
            run, directions, delta=DELTA, randomness=Randomness(seed=f"coins {seed}"), weights=canary_weights(plan)
        )
        return seen, kept[0]

    return run_audit


def sizes_p_value(rounds: CanaryRounds) -> float:
    return cohort_size_p_value(rounds.cohort_sizes, devices=CANARIES, sampling_rate=RATE)


@pytest.mark.parametrize(
    ("mechanism", "seed"), [("central", "a"), ("central", "b"), ("local", "a"), ("correlated", "a")]
)
def test_the_bound_stays_below_what_is_accounted_when_the_mechanism_is_right(
    audit: Audit, mechanism: str, seed: str
) -> None:
    """An audit that convicts sound rounds is switched off; one that sees nothing at all is no audit."""
    seen, rounds = audit(mechanism, seed=seed)
    assert 0.98 < rounds.statement.epsilon_pld <= 1.0
    assert seen.lower_bound < rounds.statement.epsilon_pld
    assert seen.correct > seen.guesses * 0.5 and 0 < seen.estimate < 3, "the attacker does not see the canaries"
    assert mechanism != "central" or sizes_p_value(rounds) > FALSE_ALARM
    assert rounds.statement.unit == ("query" if mechanism == "local" else "user")


def test_no_noise_exceeds_three(audit: Audit) -> None:
    """The non-private baseline through the same interface: an attack that misses this misses everything."""
    seen, rounds = audit("none")
    assert seen.lower_bound > 3
    assert seen.estimate == float("inf") == rounds.statement.epsilon_pld


@pytest.mark.parametrize("mechanism", ["central", "local", "correlated"])
def test_noise_five_times_too_small_is_caught(audit: Audit, monkeypatch: pytest.MonkeyPatch, mechanism: str) -> None:
    """A unit mix-up between clip norm and grid, or a sum scaled after the noise: the statement still says epsilon 1."""

    def too_small(sigma: int, count: int, randomness: Randomness) -> np.ndarray:
        return discrete_gaussian(sigma // 5, count, randomness)

    monkeypatch.setattr(NOISY[mechanism], "discrete_gaussian", too_small)
    seen, rounds = audit(mechanism)
    assert rounds.statement.epsilon_pld <= 1 < seen.lower_bound
    assert seen.estimate > 3


def test_everybody_in_every_round_is_caught(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amplification by a sampling that does not take place: the statement still says epsilon 1."""

    def census(enrolled: Sequence[str], sampling_rate: float, randomness: Randomness) -> tuple[str, ...]:
        return tuple(enrolled)

    monkeypatch.setattr(stillroom_server.coordinate, "poisson_cohort", census)
    seen, rounds = audit()
    assert rounds.statement.epsilon_pld <= 1 < seen.lower_bound
    assert sizes_p_value(rounds) < FALSE_ALARM


def test_every_query_in_every_step_is_caught(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coins that fall on everything: amplification by records is all that the statement's epsilon of 1 rests on."""
    monkeypatch.setattr(Local, "sample", lambda self, randomness: [True] * self.records)
    seen, rounds = audit("local")
    assert rounds.statement.epsilon_pld <= 1 < seen.lower_bound


def test_a_mechanism_that_does_not_clip_is_caught(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canaries at the clip norm exactly would never notice that nothing is clipped."""

    def unclipped(self: Central, delta: np.ndarray) -> np.ndarray:
        return np.trunc(delta.astype(np.float64) * (RESOLUTION / self.clip_norm)).astype(np.int32)

    monkeypatch.setattr(Central, "bound", unclipped)
    monkeypatch.setattr(Central, "admit", lambda self, update: True)
    seen, rounds = audit()
    assert rounds.statement.epsilon_pld <= 1 < seen.lower_bound


def test_cohorts_of_fixed_size_are_caught(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another mechanism with nearly the same releases: no attack on these sees it, the variance of the sizes does."""

    def fixed(enrolled: Sequence[str], sampling_rate: float, randomness: Randomness) -> tuple[str, ...]:
        order = sorted(enrolled, key=lambda name: randomness.bits(64))
        return tuple(order[: round(sampling_rate * len(enrolled))])

    monkeypatch.setattr(stillroom_server.coordinate, "poisson_cohort", fixed)
    _, rounds = audit()
    assert sizes_p_value(rounds) < FALSE_ALARM


def test_the_attacker_reads_every_release_and_nothing_else(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences of iterates that are not the released updates would hand the attacker something weaker."""
    handed: list[np.ndarray] = []
    step = ServerOptimizer.step

    def spy(self: ServerOptimizer, state: object, update: np.ndarray) -> object:
        handed.append(update)
        return step(self, state, update)  # type: ignore[arg-type]

    monkeypatch.setattr(ServerOptimizer, "step", spy)
    _, rounds = audit("none")
    np.testing.assert_allclose(rounds.released, np.array(handed), atol=1e-12)
    assert rounds.released.shape == (ROUNDS, 2 * CANARIES)


def test_directions_are_orthonormal_and_uniform(directions: np.ndarray) -> None:
    """Canaries that share a direction take each other's noise; ones on the axes miss a coordinate without any."""
    assert np.abs(directions @ directions.T - np.eye(CANARIES)).max() < 1e-12
    coordinates = directions.ravel() * np.sqrt(directions.shape[1])
    for power, moment in ((1, 0.0), (2, 1.0), (4, 3 * 2 * CANARIES / (2 * CANARIES + 2))):
        assert abs(np.mean(coordinates**power) - moment) < 0.02
    # QR's own signs would make the first coordinates lean one way.
    leaning = directions[np.arange(CANARIES), np.arange(CANARIES)]
    assert abs(np.mean(leaning > 0) - 0.5) < 4 * 0.5 / np.sqrt(CANARIES)
