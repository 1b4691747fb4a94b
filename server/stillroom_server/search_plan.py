"""What a private search is over, and everything about it that is fixed and public before its first trial."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stillroom_server.search_costs import repetitions_of
from stillroom_shared.errors import SettingsError, StillroomError
from stillroom_shared.events import Event, Selection, selection_of
from stillroom_shared.files import replace_file
from stillroom_shared.ledger import Budget
from stillroom_shared.mechanism import MechanismName
from stillroom_shared.repetitions import Repetitions
from stillroom_shared.statement import PrivacyStatement, statement

PLAN_FILE = "search.json"
Candidate = Mapping[str, str]
"""Settings by dotted key, as text."""


class SearchPlan(BaseModel):
    """Every public constant of a search. Frozen; written once as `search.json` into its home.

    Attributes:
        search: its name.
        candidates: the public list that trials are drawn from, with replacement and alike.
        base: everything else that the cost or the outcome of a trial follows from, whole: rounds, evaluation, release,
            devices. What differs between two runs of one search would escape its charge.
        distribution, mean_trials, shape: of the number of trials; the shape is that of the negative binomial.
        retries: how many interruptions within a trial are paid for beforehand.
        budget_epsilon: the most that the search may cost, user level, at `delta`, against readers of releases.
        devices, sampling_rate, clip_norm, mechanism: for the statement; None and the largest where candidates differ.
        seed: fixes all randomness; allowed only in a rehearsal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    search: str = Field(min_length=1)
    candidates: tuple[dict[str, str], ...] = Field(min_length=1)
    base: str = ""
    distribution: Literal["negative-binomial", "poisson"] = "negative-binomial"
    mean_trials: float
    shape: float = 0.0
    retries: int = Field(default=1, ge=0)
    budget_epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    devices: int = Field(ge=1)
    sampling_rate: float = Field(gt=0, le=1)
    clip_norm: float | None = None
    mechanism: MechanismName = "central"
    rehearsal: bool = False
    seed: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.seed is not None and not self.rehearsal:
            raise ValueError(
                "seed: a number of trials from a known seed hides nothing; remove it, or set rehearsal = true"
            )
        try:
            _ = self.repetitions
        except StillroomError as error:
            raise ValueError(f"mean_trials: {error}") from error
        return self

    @property
    def repetitions(self) -> Repetitions:
        """How the number of trials is drawn."""
        return repetitions_of(self.distribution, self.mean_trials, shape=self.shape)

    @property
    def budget(self) -> Budget:
        """What every spend is checked against."""
        return Budget(epsilon=self.budget_epsilon, delta=self.delta)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the plan, for the ledger's genesis row; defaults are left out, as in `Plan.content_hash`."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()

    def events(self, trials: Trials) -> tuple[list[Event], Selection]:
        """What is charged before the first trial: the reserved retries, and the search itself."""
        again: Counter[Event] = Counter()
        for candidate in self.candidates:
            again |= Counter(trials.retry(candidate))
        search = selection_of([trials.events(candidate) for candidate in self.candidates], self.repetitions)
        return list(again.elements()) * self.retries, search

    def statement(self, events: Sequence[Event]) -> PrivacyStatement:
        """The statement of what a search was charged for."""
        return statement(
            events,
            delta=self.delta,
            devices=self.devices,
            sampling_rate=self.sampling_rate,
            clip_norm=self.clip_norm,
            rehearsal=self.rehearsal,
            mechanism=self.mechanism,
        )

    def save(self, home: Path) -> None:
        """Write `search.json`; an existing different one is refused: its number of trials is drawn, and stays."""
        home.mkdir(parents=True, exist_ok=True)
        path = home / PLAN_FILE
        if path.exists() and SearchPlan.load(home) != self:
            raise SettingsError(
                f"{path} holds another search: finish it with its own settings; one in another home is charged beside it"
            )
        replace_file(path, f"{self.model_dump_json(indent=2)}\n".encode())

    @classmethod
    def load(cls, home: Path) -> SearchPlan:
        """Read `search.json`; `SettingsError` names the field that does not fit."""
        path = home / PLAN_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise SettingsError(f"no search at {path}: name the home of a search") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise SettingsError(f"{path}: {'.'.join(map(str, first['loc'])) or 'search'}: {first['msg']}") from error


@dataclass(frozen=True)
class Outcome:
    """What a trial brings: its private score, the larger the better, and the sealed adapter that it would release."""

    score: float
    folder: Path


class Trials(Protocol):
    """What is searched over. A trial is a pure function of its candidate, the devices, and fresh randomness."""

    def events(self, candidate: Candidate) -> Sequence[Event]:
        """Everything one trial releases: its rounds, and the evaluation that scores it."""
        ...

    def retry(self, candidate: Candidate) -> Sequence[Event]:
        """What a trial that was interrupted releases once more when it goes on."""
        ...

    def run(self, candidate: Candidate, number: int) -> Outcome:
        """Run trial `number`, or go on with it; the whole of it costs `events`, and `retry` for each interruption."""
        ...
