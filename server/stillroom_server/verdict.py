"""What an evaluation found, and what follows from it: the candidate is published, or the rounds behind it are rolled back.

The verdict is a function of the released interval and of a policy that was fixed before: post-processing, it costs nothing.
It stands as a note in the coordinator's ledger before anything is done about it, so a coordinator that was killed in between
finds it there and does it then. A spend without a note is an evaluation that nobody saw the end of: it is charged again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from stillroom_shared.comparison import Estimate
from stillroom_shared.errors import SettingsError
from stillroom_shared.ledger import Row

Verdict = Literal["publish", "roll back"]
Requirement = Literal["not-worse", "better", "nothing"]
NOTE = "evaluated"


class Policy(BaseModel):
    """What the interval must show before a candidate is published.

    `better`: all of it lies above 0. `not-worse`, the default: all of it lies above `-margin` times the least share of devices
    that scored something, so a loss of `margin` among those is excluded (a non-inferiority test), and silence shows nothing.
    The burden of proof is the candidate's in both, and an evaluation that is too noisy to tell, or that hardly anybody
    answered, lets nothing pass. `better` alone would roll back many good candidates of small federations, whose rounds
    are paid for and cannot be had back; "publish unless shown to be worse" would let any ruin pass that noise hides.
    `nothing` is for the trials of a search, which are compared with each other and published by the search alone.

    >>> from dataclasses import replace
    >>> found = Estimate(
    ...     difference=0.004, low=-0.003, high=0.011, noise=0.001, second_moment=0.01, answered=0.6, least_answered=0.5)
    >>> Policy().verdict(found), Policy(require="better").verdict(found), Policy(margin=0.004).verdict(found)
    ('publish', 'roll back', 'roll back')
    >>> Policy().verdict(replace(found, least_answered=0.2))
    'roll back'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    require: Requirement = "not-worse"
    margin: float = Field(default=0.01, ge=0, le=1)

    @classmethod
    def checked(cls, require: str, margin: float) -> Policy:
        """From the command line, where `nothing` is no choice; `SettingsError` says what fits."""
        if require not in ("not-worse", "better") or not 0 <= margin <= 1:
            raise SettingsError(
                f"--require {require} --margin {margin}: require `better` or `not-worse`, with a margin from 0 to 1"
            )
        return cls.model_validate({"require": require, "margin": margin})

    def threshold(self, least_answered: float) -> float:
        """What the lower end of the interval must exceed, in nDCG averaged over all enrolled devices."""
        return -self.margin * min(max(least_answered, 0.0), 1.0) if self.require == "not-worse" else 0.0

    def verdict(self, found: Estimate) -> Verdict:
        """What follows; an interval that is no interval lets nothing pass."""
        if self.require == "nothing":
            return "publish"
        return (
            "publish" if math.isfinite(found.low) and found.low > self.threshold(found.least_answered) else "roll back"
        )


class Evaluation(BaseModel):
    """One finished evaluation; computed from public values and the noisy release only.

    Attributes:
        number: of the evaluation in the federation.
        round: rounds that led to the candidate.
        attempt: as devices were told.
        baseline: rounds that led to the published adapter it was compared with; 0: none yet, the release as it is.
        difference, low, high: mean over all enrolled devices of the change in nDCG@10, with its 95% interval.
        noise: standard deviation of the noise in `difference`.
        second_moment: released estimate of the mean squared difference of devices.
        answered, least_answered: share of enrolled devices that scored something, as released, and its lower bound.
        epsilon: of all charges so far against readers of releases, user level, at `delta`; None: no guarantee.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    number: int
    round: int
    attempt: int
    baseline: int
    difference: float
    low: float
    high: float
    noise: float
    second_moment: float
    answered: float
    least_answered: float
    bound: float
    noise_multiplier: float
    sampling_rate: float
    devices: int
    held_back: float
    policy: Policy
    verdict: Verdict
    epsilon: float | None
    delta: float
    rehearsal: bool

    @property
    def file_name(self) -> str:
        """Of the copy beside the adapters."""
        return f"evaluation-{self.number:04d}.json"


def evaluations_in(rows: Sequence[Row]) -> list[Evaluation]:
    """Every finished evaluation of a ledger, in order."""
    notes = [row.fields for row in rows if row.kind == "note"]
    return [Evaluation.model_validate(note[NOTE]) for note in notes if NOTE in note]


def last_rolled_back(evaluations: Sequence[Evaluation]) -> int:
    """The last round that was rolled back; 0: none."""
    return max((found.round for found in evaluations if found.verdict == "roll back"), default=0)
