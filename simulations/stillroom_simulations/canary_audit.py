"""`stillroom audit canaries`: what an attacker gets out of one simulated federation, beside what the accountant promised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from stillroom_shared.correlated import calibrate_correlated
from stillroom_shared.errors import SettingsError
from stillroom_shared.local_mechanism import calibrate_local
from stillroom_shared.mechanism import MechanismName, calibrate
from stillroom_shared.progress import Progress
from stillroom_shared.randomness import Randomness
from stillroom_shared.statement import PrivacyStatement
from stillroom_simulations.canaries import (
    LOCAL_STEPS,
    CanaryRounds,
    canary_directions,
    canary_plan,
    canary_release,
    canary_schedule,
    canary_weights,
    run_canary_rounds,
)
from stillroom_simulations.cohort_sizes import FALSE_ALARM, cohort_size_p_value
from stillroom_simulations.one_run_audit import OneRunAudit, audit_one_run

STAGES = {"calibrate": 6.0, "canaries": 1.0, "rounds": 8.0}
"""Seconds on one core, for the default settings."""


class CanaryAuditSettings(BaseModel):
    """What is audited, and how hard one looks. The number of guesses follows from `canaries`, before anything is run.

    Attributes:
        epsilon: that the mechanism is calibrated to; `none` ignores it.
        canaries: enrolled devices, under `local` the queries of one, each present with probability 1/2.
        sampling_rate: see `canary_plan`.
        seed: fixes every coin, cohort and noise; without one they come from the operating system.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mechanism: MechanismName = "central"
    epsilon: float = Field(default=1.0, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    canaries: int = Field(default=1_000, ge=100, le=5_000)
    rounds: int = Field(default=10, ge=1)
    sampling_rate: float = Field(default=0.1, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0)

    @field_validator("sampling_rate")
    @classmethod
    def _whole_turns(cls, rate: float, info: ValidationInfo) -> float:
        if info.data.get("mechanism") == "correlated" and abs(1 / rate - round(1 / rate)) > 1e-9:
            raise ValueError(
                "under correlated a turn comes every 1 / rate rounds, choose one over a whole number, e.g. 0.1"
            )
        return rate

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.delta >= 1 / self.canaries:
            raise ValueError(f"choose at most a tenth of 1/{self.canaries}, or one device may be exposed outright")
        return self

    @classmethod
    def checked(cls, **values: object) -> Self:
        """Validate; `SettingsError` names the first option that does not fit."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "delta"  # the only rule between options
            value = first["input"] if first["loc"] else values[name]
            raise SettingsError(f"--{name.replace('_', '-')} is {value}: {first['msg']}") from error


@dataclass(frozen=True)
class CanaryAudit:
    """One audit: what is stated, and what was seen.

    Attributes:
        cohort_p_value: of the cohort sizes, were they Poisson samples; None where devices take turns.
    """

    statement: PrivacyStatement
    seen: OneRunAudit
    cohort_p_value: float | None

    @property
    def broken(self) -> bool:
        """Whether what was seen contradicts what is stated.

        False alarms: at most 5% by the bound's confidence, in practice far fewer, because the theorem is for worse
        mechanisms than a Gaussian; one in a million by the cohort sizes.
        """
        sampled = self.cohort_p_value is None or self.cohort_p_value >= FALSE_ALARM
        return self.seen.lower_bound > self.statement.epsilon_pld or not sampled

    def text(self) -> str:
        """The report: the statement, then what was seen, each figure called what it is."""
        seen = self.seen
        verdict = {
            True: "BROKEN: the audit contradicts the statement; treat what was released as unprotected",
            False: "the audit does not contradict the statement, which does not prove it",
        }
        cohorts = "by turns, nothing is sampled"
        if self.cohort_p_value is not None:
            cohorts = f"sizes as under Poisson sampling with p-value {self.cohort_p_value:.2g}"
        return "\n".join(
            [
                self.statement.paragraph(),
                "",
                f"audit     {seen.guesses:,} of {seen.canaries:,} canaries guessed present, {seen.correct:,} rightly; "
                f"the attacker reads all releases, delta {seen.delta:.1e}",
                f"bound     {seen.lower_bound:.2f} (a lower bound, not epsilon; confidence {seen.confidence:.0%})",
                f"estimate  {_number(seen.estimate)} (an estimate, not a bound)",
                f"cohorts   {cohorts}",
                verdict[self.broken],
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """The same for programs; null stands for infinity, and for "no guarantee" in the statement."""
        seen = self.seen
        return {
            "schema_version": 1,
            "statement": self.statement.model_dump(mode="json"),
            "attacker": {"canaries": seen.canaries, "guesses": seen.guesses, "correct": seen.correct},
            "lower_bound": {
                "value": seen.lower_bound,
                "delta": seen.delta,
                "confidence": seen.confidence,
                "meaning": "a lower bound, not epsilon (arXiv 2305.08846)",
            },
            "estimate": {
                "value": seen.estimate if math.isfinite(seen.estimate) else None,
                "delta": seen.delta,
                "meaning": "an estimate, not a bound (arXiv 2302.03098)",
            },
            "cohort_size_p_value": self.cohort_p_value,
            "broken": self.broken,
        }


def audit_canaries(settings: CanaryAuditSettings, *, progress: Progress) -> CanaryAudit:
    """Calibrate, enrol canaries, run the coordinator's rounds in a temporary folder, attack."""
    with progress.stage("calibrate") as stage:
        noise = _noise(settings)
        stage.note(f"noise multiplier {noise:.3f}" if noise else "no noise")
    seed = None if settings.seed is None else f"audit {settings.seed}"
    with progress.stage("canaries"):
        directions = canary_directions(settings.canaries, _randomness(seed, "directions"))
    finished: list[CanaryRounds] = []
    with TemporaryDirectory() as folder, progress.stage("rounds") as stage:
        plan = canary_plan(
            canary_release(Path(folder, "release"), settings.canaries),
            canaries=settings.canaries,
            mechanism=settings.mechanism,
            noise_multiplier=noise,
            budget_epsilon=settings.epsilon,
            delta=settings.delta,
            rounds=settings.rounds,
            sampling_rate=settings.sampling_rate,
            seed=seed,
        )

        def run(present: NDArray[np.bool_]) -> NDArray[np.float64]:
            finished.append(
                run_canary_rounds(
                    Path(folder, "home"),
                    plan,
                    directions,
                    present,
                    on_round=lambda report: stage(report.round, report.rounds),
                )
            )
            return finished[0].released

        seen = audit_one_run(
            run,
            directions,
            delta=settings.delta,
            randomness=_randomness(seed, "coins"),
            weights=canary_weights(plan),
        )
    [rounds] = finished
    sizes = None
    if plan.schedule is None:
        sizes = cohort_size_p_value(
            rounds.cohort_sizes, devices=settings.canaries, sampling_rate=settings.sampling_rate
        )
    return CanaryAudit(rounds.statement, seen, sizes)


def _noise(settings: CanaryAuditSettings) -> float | None:
    if settings.mechanism == "none":
        return None
    common: dict[str, Any] = {
        "target_epsilon": settings.epsilon,
        "delta": settings.delta,
        "rounds": settings.rounds,
        "clip_norm": 1.0,
        "dimension": 2 * settings.canaries,
    }
    schedule = canary_schedule(settings.mechanism, settings.rounds, settings.sampling_rate)
    if schedule is None:
        made = calibrate(**common, sampling_rate=settings.sampling_rate, devices=settings.canaries)
        return made.noise_multiplier
    if settings.mechanism == "local":
        queries: dict[str, Any] = {
            "sampling_rate": settings.sampling_rate,
            "records": settings.canaries,
            "steps": LOCAL_STEPS,
        }
        return calibrate_local(**common, **queries).noise_multiplier
    turns: dict[str, Any] = {"participations": schedule.participations, "separation": schedule.separation}
    return calibrate_correlated(**common, **turns, devices=settings.canaries).noise_multiplier


def _randomness(seed: str | None, use: str) -> Randomness:
    return Randomness() if seed is None else Randomness(seed=f"{seed}/{use}")


def _number(estimate: float) -> str:
    return f"{estimate:.2f}" if math.isfinite(estimate) else "beyond 200"
