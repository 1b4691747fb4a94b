"""`stillroom tune`: a private search over the settings of rounds, on the devices of a demo.

Each trial is a federation of its own (plan, ledger, checkpoint) in `trials/NUMBER` of the search's home, through the real
apps, and marked as a trial: what it seals promises nothing by itself. `stillroom_server.search` charges, draws and selects.

The score is a private release too. `RankScore` stands where rounds of evaluation over the network will: it computes each
device's own score from what that device holds, sums them through `Central`, and does not appear on the devices' ledgers.

| what | goes wrong as |
|---|---|
| a device sends zero, because it declines or fails | `StillroomError`: trials would no longer be alike |
| a candidate changes something that is not about rounds | `SettingsError` |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Protocol

import numpy as np

from stillroom_client.training import Record, Trainer, native_bfloat16
from stillroom_server.coordinate import Coordinator
from stillroom_server.plan import Plan
from stillroom_server.search import KEY_FILE, TRIALS_FOLDER, Search
from stillroom_server.search_costs import SearchCost, calibrate_search, search_cost
from stillroom_server.search_plan import Candidate, Outcome, SearchPlan
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import SettingsError
from stillroom_shared.events import Event
from stillroom_shared.mechanism import Central
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import Release, open_release
from stillroom_shared.settings import RoundsSettings, Settings
from stillroom_shared.settings_file import load
from stillroom_shared.signing import SigningKey
from stillroom_simulations.federation import BatchedUpdates, RecordsByHome, make_plan, mine_population, run_federation


class Scorer(Protocol):
    """A private evaluation: what it costs, and what it finds."""

    def event(self) -> Event:
        """What one score releases."""
        ...

    def score(self, adapter: Adapter, records: RecordsByHome, randomness: Randomness) -> float:
        """A differentially private score of an adapter, the larger the better."""
        ...


@dataclass(frozen=True)
class RankScore:
    """The noisy mean over devices of 1 / rank of the passage that was opened, among a device's own candidates."""

    trainer: Trainer
    mechanism: Central

    def event(self) -> Event:
        """One release of a single number, every device taking part."""
        return self.mechanism.event()

    def score(self, adapter: Adapter, records: RecordsByHome, randomness: Randomness) -> float:
        """Each device's mean reciprocal rank lies in [0, 1], the clip norm; a device without records adds zero."""
        total = np.zeros(self.mechanism.length, np.int64)
        for own in records.values():
            total += self.mechanism.bound(np.array([self._of_device(adapter, own)], np.float32))
        return float(self.mechanism.release(total, randomness).update[0])

    def _of_device(self, adapter: Adapter, own: Sequence[Record]) -> float:
        if not own:
            return 0.0
        vectors = self.trainer.encode(adapter, [record.tokens for record in own])  # (records, dim)
        scores = [record.candidates @ vector for record, vector in zip(own, vectors, strict=True)]
        return float(np.mean([1 / (1 + np.count_nonzero(ranked[1:] > ranked[0])) for ranked in scores]))


@dataclass(frozen=True, eq=False)
class FederationTrials:
    """Trials that are federations over simulated devices (`stillroom_server.search.Trials`).

    Attributes:
        home: of the search.
        plan: of the search.
        settings: what candidates change; its noise multiplier is known.
        devices: home of each enrolled device by name.
        records: training records of every device's home, for a number of candidates.
    """

    home: Path
    plan: SearchPlan
    settings: Settings
    release: Release
    devices: Mapping[str, Path]
    records: Callable[[int], RecordsByHome]
    trainer: Trainer
    scorer: Scorer
    operator: SigningKey

    def events(self, candidate: Candidate) -> list[Event]:
        """The rounds of a trial, and its evaluation."""
        return trial_events(self._plan(candidate, 0), self.release, self.scorer)

    def retry(self, candidate: Candidate) -> list[Event]:
        """The round that was interrupted, if rounds are charged one by one, or the evaluation: both, to be safe."""
        plan = self._plan(candidate, 0)
        again = [] if plan.mechanism == "correlated" else self.events(candidate)[: min(1, plan.rounds)]
        return [*again, self.scorer.event()]

    def run(self, candidate: Candidate, number: int) -> Outcome:
        """Run the federation, or what is left of it, then score its adapter."""
        home, plan = self._home(number), self._plan(candidate, number)
        records = self.records(plan.candidates)
        updates = BatchedUpdates(self.trainer, records)
        homes = list(self.devices.values())
        run_federation(home, plan, homes, updates, operator=self.operator, block=self.settings.speed.block)
        with Coordinator(home) as coordinator:
            attempt = 1 + sum("evaluation" in purpose for purpose in coordinator.ledger.purposes())
            charged = {"evaluation": attempt}
            coordinator.ledger.spend(self.scorer.event(), budget=plan.budget, purpose=charged)
            seed = None if plan.seed is None else f"{plan.seed}/evaluation/{attempt}"
            score = self.scorer.score(coordinator.adapter, records, Randomness(seed=seed))
            return Outcome(score, coordinator.published)

    def _home(self, number: int) -> Path:
        return self.home / TRIALS_FOLDER / f"{number:04d}"

    def _plan(self, candidate: Candidate, number: int) -> Plan:
        folder = os.path.relpath(self.release.folder, self._home(number))
        made = make_plan(
            with_candidate(self.settings, candidate).rounds,
            # Devices never answer an attempt twice: each trial of each search is a federation of its own.
            name=f"{self.plan.search}-{self.plan.content_hash[:8]}-trial-{number:04d}",
            release_folder=Path(folder),
            enrolled=sorted(self.devices),
            dimension=self.release.adapter_spec.size,
            seed=f"{self.plan.seed}/trial/{number}",
        )
        return made.model_copy(
            update={
                "trial_of": self.plan.search,
                "budget_epsilon": self.plan.budget_epsilon,
                "delta": self.plan.delta,
            }
        )


def trial_events(plan: Plan, release: Release, scorer: Scorer) -> list[Event]:
    """Everything that a trial with this plan releases."""
    order = plan.order(round_number=1, attempt=1, release=release.id, dimension=release.adapter_spec.size)
    charges = min(1, plan.rounds) if plan.mechanism == "correlated" else plan.rounds
    return [order.build_mechanism().event()] * charges + [scorer.event()]


def with_candidate(settings: Settings, candidate: Candidate) -> Settings:
    """The settings of one candidate. Raises `SettingsError` for what is unknown, out of range, or not about rounds."""
    for key in candidate:
        if not key.startswith("rounds.") or key in ("rounds.delta", "rounds.budget_epsilon", "rounds.target_epsilon"):
            raise SettingsError(
                f"candidate {key} cannot be searched over: name settings of rounds, e.g. rounds.clip_norm"
            )
    return load(settings, None, candidate)


def candidate_grid(choices: Sequence[str]) -> tuple[dict[str, str], ...]:
    """Every combination of the values given for each setting.

    >>> candidate_grid(["rounds.clip_norm=0.1,0.3", "rounds.rounds=5"])
    ({'rounds.clip_norm': '0.1', 'rounds.rounds': '5'}, {'rounds.clip_norm': '0.3', 'rounds.rounds': '5'})
    """
    lists: dict[str, list[str]] = {}
    for choice in choices:
        key, equals, values = choice.partition("=")
        if not equals or not all(values.split(",")):
            raise SettingsError(f"candidate {choice!r} offers nothing: write it as rounds.clip_norm=0.1,0.3")
        lists[key.strip()] = [value.strip() for value in values.split(",")]
    return tuple(dict(zip(lists, chosen, strict=True)) for chosen in product(*lists.values()))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is asked of a search; see `SearchPlan` for the fields it shares."""

    choices: Sequence[str]
    distribution: str
    mean_trials: float
    shape: float
    retries: int
    budget_epsilon: float
    evaluation_noise: float


def prepare_tuning(settings: Settings, run: Path, home: Path, asked: Tuning) -> FederationTrials:
    """The trials of a search over the devices of a demo's folder, its plan written into `home`.

    Where the settings give a target epsilon, the noise is the least at which the whole search meets it.
    """
    if not (run / "release").is_dir() or not (run / "devices").is_dir():
        raise SettingsError(f"{run} holds no release and devices: make them with `stillroom demo --out {run}`")
    operator = SigningKey.load(run / "operator.key")
    release = open_release(run / "release", trusted_key=operator.public)
    devices = {path.name: path for path in sorted((run / "devices").iterdir()) if path.is_dir()}
    trainer = Trainer(release.folder, release.adapter_spec, autocast=native_bfloat16())
    evaluation = Central(
        clip_norm=1.0, noise_multiplier=asked.evaluation_noise, sampling_rate=1.0, devices=len(devices), dimension=1
    )
    plan = _search_plan(settings, asked, len(devices), name=run.name)
    known: dict[int, RecordsByHome] = {}

    def records(candidates: int) -> RecordsByHome:
        if candidates not in known:
            homes = list(devices.values())
            known[candidates] = mine_population(homes, release, candidates=candidates, threads=settings.speed.threads)
        return known[candidates]

    def trials(given: Settings) -> FederationTrials:
        scorer = RankScore(trainer, evaluation)
        return FederationTrials(home, plan, given, release, devices, records, trainer, scorer, operator)

    fixed = settings if settings.rounds.target_epsilon is None else _calibrated(settings, plan, trials)
    made = replace(trials(fixed), plan=plan.model_copy(update={"base": fixed.rounds.model_dump_json()}))
    for candidate in plan.candidates:
        made.events(candidate)  # refuses a candidate that cannot be, before anything is written
    made.plan.save(home)
    if not (home / KEY_FILE).exists():
        operator.save(home / KEY_FILE)
    return made


def tuning_cost(trials: FederationTrials) -> SearchCost:
    """What the search costs, by each way of counting; before anything is charged."""
    events = [trials.events(candidate) for candidate in trials.plan.candidates]
    return search_cost(events, trials.plan.repetitions, trials.plan.delta)


def open_tuning(trials: FederationTrials) -> Search:
    """The search, to run or to read."""
    return Search(trials.home, trials, release_id=trials.release.id)


def _search_plan(settings: Settings, asked: Tuning, devices: int, *, name: str) -> SearchPlan:
    candidates = candidate_grid(asked.choices)
    rounds = [with_candidate(settings, candidate).rounds for candidate in candidates]
    rates = [1 / own.separation if own.mechanism == "correlated" else own.sampling_rate for own in rounds]
    norms, mechanisms = {own.clip_norm for own in rounds}, {own.mechanism for own in rounds}
    if unaccounted := mechanisms & {"none", "local"}:
        raise SettingsError(
            f"rounds.mechanism {unaccounted.pop()} cannot be searched over: choose central or correlated; without noise "
            "nothing is private, and a score of users does not go with a guarantee for queries"
        )
    if len(mechanisms) > 1:
        raise SettingsError(f"candidates of mechanisms {sorted(mechanisms)}: search over the settings of one mechanism")
    return SearchPlan.model_validate(
        {
            "search": f"search-{name}",
            "candidates": candidates,
            "distribution": asked.distribution,
            "mean_trials": asked.mean_trials,
            "shape": asked.shape,
            "retries": asked.retries,
            "budget_epsilon": asked.budget_epsilon,
            "delta": settings.rounds.delta or 1 / (10 * devices),
            "devices": devices,
            "sampling_rate": max(rates),
            "clip_norm": norms.pop() if len(norms) == 1 else None,
            "mechanism": mechanisms.pop(),
            "rehearsal": True,
            "seed": f"{settings.seed}",
        }
    )


def _calibrated(settings: Settings, plan: SearchPlan, trials: Callable[[Settings], FederationTrials]) -> Settings:
    """The settings with the least noise at which the search and its reserved retries meet the target epsilon."""
    target = settings.rounds.target_epsilon
    assert target is not None

    def noisy(noise: float) -> Settings:
        fixed = settings.rounds.model_dump() | {"target_epsilon": None, "noise_multiplier": noise}
        return settings.model_copy(update={"rounds": RoundsSettings.model_validate(fixed)})

    noise = calibrate_search(
        target_epsilon=target,
        delta=plan.delta,
        repetitions=plan.repetitions,
        candidates=lambda noise: [trials(noisy(noise)).events(candidate) for candidate in plan.candidates],
        beside=lambda noise: plan.events(trials(noisy(noise)))[0],
    )
    return noisy(noise)
