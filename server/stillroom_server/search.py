"""A private search over settings: the best of a random number of trials, charged for as a whole before the first one.

Trying settings on private data and keeping the best is itself a release of private data. Here the settings of each trial are
drawn blindly from a public list, the number of trials K from a distribution that is fixed beforehand, and only the trial with
the best private score is sealed, with a statement that counts the whole search (Papernot and Steinke 2022, arXiv 2110.03620;
`stillroom_shared.repetitions` states theorems and assumptions).

Guarantees:
    - One row of the ledger charges the search and holds K and the settings of every trial. It is durable before the first
      trial, so a crash never draws again, and a search is drawn once in its home.
    - What lies in the published adapter follows from the plan and the best trial: not K, not when, not what went wrong. A
      trial that is interrupted in its middle goes on from retries that were charged beforehand, whether used or not.
    - A score is a private output of its trial: the events of a trial include those of the evaluation that scores it.

Whoever sees trials (devices, the network, readers of this ledger and of the trials' own ledgers) has no discount: for them the
trials are plain composition, which their ledgers hold (`stillroom audit ledger`).

| case | result |
|---|---|
| K = 0, possible under Poisson | nothing is sealed; the release stays as it is |
| the process ends between two trials | the next start goes on with the next one |
| the process ends within a trial | that trial goes on, at the cost of a reserved retry; without one left: `BudgetError` |
| a score that is not finite | loses against every other |
| equal scores | the first one wins |
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stillroom_server.search_costs import repetitions_of
from stillroom_shared.accounting import Event, Selection, selection_of
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import BudgetError, LedgerError, SettingsError, StillroomError
from stillroom_shared.files import replace_file
from stillroom_shared.ledger import Budget, Ledger
from stillroom_shared.mechanism import MechanismName
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import ADAPTER_NAME, AdapterManifest, seal_adapter
from stillroom_shared.repetitions import Repetitions
from stillroom_shared.sealed import open_sealed
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import PrivacyStatement, statement

PLAN_FILE = "search.json"
LEDGER_FILE = "ledger.sqlite3"
KEY_FILE = "coordinator.key"
SELECTED_FOLDER = "selected"
TRIALS_FOLDER = "trials"
Candidate = Mapping[str, str]
"""Settings by dotted key, as text."""


class SearchPlan(BaseModel):
    """Every public constant of a search. Frozen; written once as `search.json` into its home.

    Attributes:
        search: its name.
        candidates: the public list that trials are drawn from, with replacement and alike.
        base: what candidates change, whole: settings that differ between two runs of one search would escape its charge.
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


class Search:
    """One search in one home: plan, key, ledger. Use as a context manager."""

    def __init__(self, home: Path, trials: Trials, *, release_id: str) -> None:
        self.home = home
        self.plan = SearchPlan.load(home)
        self._trials = trials
        self._release = release_id
        if not (home / KEY_FILE).exists():
            SigningKey.generate().save(home / KEY_FILE)
        self.key = SigningKey.load(home / KEY_FILE)
        about = {"search": self.plan.search, "plan": self.plan.content_hash}
        self.ledger = Ledger.create(home / LEDGER_FILE, key=self.key, about=about)

    def run(self, on_trial: Callable[[int, int], None] = lambda done, trials: None) -> Path | None:
        """Charge, draw, run what is left, and seal the best trial; where it is, or None when none was drawn."""
        drawn = self._drawn()
        if drawn is None:
            drawn = self._charge()
        for number, index in enumerate(drawn, start=1):
            if number not in {note["trial"] for note in notes(self.ledger, "finished")}:
                candidate = self.plan.candidates[index]
                self._begin(number)
                outcome = self._trials.run(candidate, number)
                score = outcome.score if math.isfinite(outcome.score) else None
                found = open_sealed(outcome.folder, AdapterManifest, trusted_key=None)
                folder = os.path.relpath(outcome.folder, self.home)
                self.ledger.record(
                    {"finished": {"trial": number, "score": score, "folder": folder, "adapter": found.id}}
                )
            on_trial(number, len(drawn))
        return self._seal() if drawn else None

    def statement(self) -> PrivacyStatement:
        """What has been spent, from the ledger's events."""
        return self.plan.statement(self.ledger.events())

    @property
    def best(self) -> dict[str, Any] | None:
        """Number and settings of the best trial so far; None before the first, or when none was drawn."""
        if not (finished := notes(self.ledger, "finished")):
            return None
        number, drawn = best_of(finished)["trial"], self._drawn() or []
        return {"trial": number, "settings": dict(self.plan.candidates[drawn[number - 1]])}

    def _charge(self) -> list[int]:
        """Pay for the search and its retries, and draw: the last row holds both, so that neither is without the other."""
        reserved, search = self.plan.events(self._trials)
        self.plan.budget.check([*reserved, search])
        paid = sum("reserved" in purpose for purpose in self.ledger.purposes())
        for place, event in enumerate(reserved[paid:], start=paid):
            self.ledger.spend(event, budget=self.plan.budget, purpose={"reserved": place})
        randomness = Randomness() if self.plan.seed is None else Randomness(seed=f"{self.plan.seed}/search")
        count = search.repetitions.draw(randomness)
        drawn = [randomness.below(len(self.plan.candidates)) for _ in range(count)]

        def once(earlier: list[dict[str, Any]]) -> None:
            if any("drawn" in purpose for purpose in earlier):
                raise LedgerError(f"{self.ledger.path} holds a search that was drawn meanwhile: run the command again")

        self.ledger.spend(search, budget=self.plan.budget, purpose={"drawn": drawn}, allowed=once)
        return drawn

    def _drawn(self) -> list[int] | None:
        return next((list(purpose["drawn"]) for purpose in self.ledger.purposes() if "drawn" in purpose), None)

    def _begin(self, number: int) -> None:
        """Note that a trial begins or goes on; the second is refused when no reserved retry is left."""
        begun = [note["trial"] for note in notes(self.ledger, "began")]
        used = sum(count - 1 for count in Counter(begun).values())
        if number in begun and used >= self.plan.retries:
            raise BudgetError(
                f"trial {number} was interrupted and none of {self.plan.retries} reserved retries is left: going on is not "
                "paid for; begin another search in another home, with more retries, and both are charged"
            )
        self.ledger.record({"began": {"trial": number}})

    def _seal(self) -> Path:
        """Seal the best trial's adapter with the statement of the search."""
        folder = self.home / SELECTED_FOLDER
        if folder.exists():
            return folder
        best = best_of(notes(self.ledger, "finished"))
        source = self.home / best["folder"]
        found = open_sealed(source, AdapterManifest, trusted_key=None)
        if found.id != best["adapter"]:
            raise LedgerError(
                f"{source} is not what trial {best['trial']} released: restore it, it cannot be had again for free"
            )
        seal_adapter(
            folder,
            Adapter.load(source / ADAPTER_NAME),
            release_id=self._release,
            round=found.round,
            statement=self.statement().model_dump(mode="json"),
            key=self.key,
        )
        return folder

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def notes(ledger: Ledger, name: str) -> list[dict[str, Any]]:
    """What the notes of this name say, in order."""
    return [row.fields[name] for row in ledger.rows() if row.kind == "note" and name in row.fields]


def best_of(finished: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The note of the best trial; of equals, the first one's."""
    return max(sorted(finished, key=lambda note: note["trial"]), key=lambda note: _score(note))


def _score(note: Mapping[str, Any]) -> float:
    return -math.inf if note["score"] is None else float(note["score"])
