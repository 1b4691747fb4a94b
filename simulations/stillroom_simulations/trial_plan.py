"""What the trials of `stillroom tune` are: everything that they have in common, and the plan that one candidate makes of it.

A trial is a federation with a private evaluation at its end, on queries that every device holds back in every trial alike.
Plan and events of each are functions of the search's `search.json` alone, so whoever audits computes them again.

| case | result |
|---|---|
| a candidate that changes something that is not about rounds, or changes what the guarantee is about | `SettingsError` |
| nothing is held back, or no round is run: nothing could be scored | `SettingsError` |
| a plan whose `base` is of another search | `SettingsError` |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom_server.plan import Plan
from stillroom_server.search_plan import Candidate, SearchPlan
from stillroom_shared.errors import SettingsError
from stillroom_shared.events import Event
from stillroom_shared.settings import EvaluationSettings, RoundsSettings, Settings
from stillroom_shared.settings_file import load
from stillroom_simulations.federation import make_plan

_FIXED = ("rounds.delta", "rounds.budget_epsilon", "rounds.target_epsilon")


class TrialBase(BaseModel):
    """What every trial starts from; stands in `SearchPlan.base` as JSON. Frozen.

    Attributes:
        rounds: what candidates change; the noise multiplier is known.
        evaluation: how a trial is scored; the share that is held back is above 0.
        release, dimension: id of the release whose query tower learns, and the length of an adapter of it.
        devices: `names_hash` of the enrolled devices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: RoundsSettings
    evaluation: EvaluationSettings
    release: str = Field(min_length=1)
    dimension: int = Field(ge=1)
    devices: str = Field(min_length=1)

    @classmethod
    def of(cls, plan: SearchPlan) -> Self:
        """From the plan of a search; `SettingsError` when it holds none."""
        try:
            return cls.model_validate_json(plan.base)
        except ValidationError as error:
            raise SettingsError(
                f"the plan of {plan.search!r} does not say what its trials start from ({error.error_count()} errors): name "
                "the home of a search that `stillroom tune` began"
            ) from error

    def plan(
        self, search: SearchPlan, candidate: Candidate, number: int, *, enrolled: Sequence[str], release_folder: Path
    ) -> Plan:
        """The plan of trial `number`, which drew this candidate."""
        settings = with_candidate(Settings(rounds=self.rounds, evaluation=self.evaluation), candidate)
        made = make_plan(
            settings.rounds,
            # Devices never answer an attempt twice: each trial of each search is a federation of its own.
            name=f"{search.search}-{search.content_hash[:8]}-trial-{number:04d}",
            release_folder=release_folder,
            enrolled=enrolled,
            dimension=self.dimension,
            seed=f"{search.seed}/trial/{number}",
            evaluation=self.evaluation,
        )
        changes = {"trial_of": search.search, "budget_epsilon": search.budget_epsilon, "delta": search.delta}
        return Plan.model_validate(made.model_dump() | changes)

    def round_events(self, plan: Plan) -> list[Event]:
        """What the rounds of a trial release; turns are charged once, as a whole."""
        order = plan.order(round_number=1, attempt=1, release=self.release, dimension=self.dimension)
        if not plan.rounds:
            raise SettingsError("rounds.rounds is 0: a trial without a round has nothing to score; choose at least 1")
        return [order.build_mechanism().event()] * (1 if plan.mechanism == "correlated" else plan.rounds)

    def evaluation_event(self, plan: Plan) -> Event:
        """What scoring a trial releases."""
        order = plan.evaluation(number=1, round_number=1, attempt=1, release=self.release)
        return order.build_mechanism().event()

    def events(self, plan: Plan) -> list[Event]:
        """Everything that a trial with this plan releases."""
        return [*self.round_events(plan), self.evaluation_event(plan)]

    def retry(self, plan: Plan) -> list[Event]:
        """What an interrupted trial releases once more: the round, if rounds are charged one by one, and the evaluation.

        One of the two was interrupted; which one is not known beforehand.
        """
        again = [] if plan.mechanism == "correlated" else self.round_events(plan)[:1]
        return [*again, self.evaluation_event(plan)]


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 of the sorted names of devices.

    >>> names_hash(["b", "a"]) == names_hash(["a", "b"]) != names_hash(["ab"])
    True
    """
    return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()


def with_candidate(settings: Settings, candidate: Candidate) -> Settings:
    """The settings of one candidate. Raises `SettingsError` for what is unknown, out of range, or not about rounds."""
    for key in candidate:
        if not key.startswith("rounds.") or key in _FIXED:
            raise SettingsError(
                f"candidate {key} cannot be searched over: name settings of rounds, e.g. rounds.clip_norm"
            )
    return load(settings, None, candidate)
