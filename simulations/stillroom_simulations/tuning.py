"""`stillroom tune`: a private search over the settings of rounds, on the devices of a demo.

Each trial is a federation of its own (plan, ledger, checkpoint) in `trials/NUMBER` of the search's home, through the real
apps, and marked as a trial: what it seals promises nothing by itself. Its score is that of a private evaluation
(`stillroom_server.evaluation`) at its end: the noisy mean, over devices, of how much better the trial's adapter finds what
their held-back queries opened than the release alone. Devices record it like the rounds, and hold back the same queries in
every trial. `stillroom_server.search` charges, draws and selects; `trial_plan.py` says what a trial costs.

| what | goes wrong as |
|---|---|
| a device sends zero, because it declines or fails | `SilentDevicesError`, now and at every later start: trials are not alike |
| `evaluation.held_back` is 0, as by default | a trial has to be scored: `HELD_BACK` is taken |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from stillroom_client.training import Trainer
from stillroom_server.coordinate import Coordinator
from stillroom_server.plan import Plan
from stillroom_server.search import KEY_FILE, LEDGER_FILE, TRIALS_FOLDER, Search, notes
from stillroom_server.search_costs import SearchCost, calibrate_search, search_cost
from stillroom_server.search_plan import Candidate, Outcome, SearchPlan
from stillroom_server.verdict import Policy, evaluations_in
from stillroom_shared.errors import SettingsError
from stillroom_shared.events import Event
from stillroom_shared.ledger import Ledger
from stillroom_shared.processor import native_bfloat16
from stillroom_shared.release import Release, open_release
from stillroom_shared.settings import EvaluationSettings, RoundsSettings, Settings
from stillroom_shared.signing import SigningKey
from stillroom_simulations.federation import (
    BatchedUpdates,
    RecordsByHome,
    SilentDevicesError,
    mine_population,
    run_federation,
)
from stillroom_simulations.private_evaluation import evaluate_homes
from stillroom_simulations.trial_plan import TrialBase, names_hash, with_candidate

HELD_BACK = 0.2
"""Share of each device's queries that trials are scored by, unless the settings give one."""
_UNLIKE = "unlike"


@dataclass(frozen=True, eq=False)
class FederationTrials:
    """Trials that are federations over simulated devices (`stillroom_server.search.Trials`).

    Attributes:
        home: of the search.
        plan: of the search; its `base` says all that costs follow from.
        devices: home of each enrolled device by name.
        records: training records of every device's home, for a number of candidates; of no held-back query.
    """

    home: Path
    plan: SearchPlan
    release: Release
    devices: Mapping[str, Path]
    records: Callable[[int], RecordsByHome]
    trainer: Trainer
    operator: SigningKey
    block: int

    @property
    def base(self) -> TrialBase:
        """What all trials have in common."""
        return TrialBase.of(self.plan)

    def events(self, candidate: Candidate) -> list[Event]:
        """The rounds of a trial, and its evaluation."""
        return self.base.events(self._plan(candidate, 0))

    def retry(self, candidate: Candidate) -> list[Event]:
        """A round and an evaluation."""
        return self.base.retry(self._plan(candidate, 0))

    def run(self, candidate: Candidate, number: int) -> Outcome:
        """Run the federation, or what is left of it, then have the devices score its adapter."""
        home = self._home(number)
        _require_alike(home)
        try:
            self._federate(home, self._plan(candidate, number))
        except SilentDevicesError as error:
            with Coordinator(home) as coordinator:  # the next start finds all rounds done, and nobody silent
                coordinator.ledger.record({_UNLIKE: str(error)})
            raise
        with Coordinator(home) as coordinator:
            [found] = evaluations_in(coordinator.ledger.rows())
            return Outcome(found.difference, coordinator.published)

    def _federate(self, home: Path, plan: Plan) -> None:
        """All rounds and the evaluation, or what is left of them."""
        homes = list(self.devices.values())
        updates = BatchedUpdates(self.trainer, self.records(plan.candidates))
        run_federation(home, plan, homes, updates, operator=self.operator, block=self.block)
        with Coordinator(home) as coordinator:
            if evaluations_in(coordinator.ledger.rows()):
                return
        _, scores = evaluate_homes(home, homes, Policy(require="nothing"))
        if scores.silent:
            raise SilentDevicesError(f"{scores.silent} devices did not score {home} and sent zeros: see the log above")

    def _home(self, number: int) -> Path:
        return self.home / TRIALS_FOLDER / f"{number:04d}"

    def _plan(self, candidate: Candidate, number: int) -> Plan:
        folder = Path(os.path.relpath(self.release.folder, self._home(number)))
        return self.base.plan(self.plan, candidate, number, enrolled=sorted(self.devices), release_folder=folder)


def _require_alike(home: Path) -> None:
    """Refuse to go on with a trial in which a device sent zero: with it the search would be another one."""
    if not (home / LEDGER_FILE).is_file():
        return
    with Ledger.open(home / LEDGER_FILE) as ledger:
        for reason in notes(ledger, _UNLIKE):
            raise SilentDevicesError(
                f"{home} is not like other trials: {reason}; begin another search in another home, and both are charged"
            )


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


def prepare_tuning(settings: Settings, run: Path, home: Path, asked: Tuning) -> FederationTrials:
    """The trials of a search over the devices of a demo's folder, its plan written into `home`.

    How a trial is scored stands in the settings of `evaluation`; where these hold nothing back, `HELD_BACK` is. Where the
    settings give a target epsilon, the noise is the least at which the whole search meets it.
    """
    if not (run / "release").is_dir() or not (run / "devices").is_dir():
        raise SettingsError(f"{run} holds no release and devices: make them with `stillroom demo --out {run}`")
    operator = SigningKey.load(run / "operator.key")
    release = open_release(run / "release", trusted_key=operator.public)
    devices = {path.name: path for path in sorted((run / "devices").iterdir()) if path.is_dir()}
    trainer = Trainer(release.folder, release.adapter_spec, autocast=native_bfloat16())
    evaluation = settings.evaluation
    if not evaluation.held_back:
        evaluation = EvaluationSettings.model_validate(evaluation.model_dump() | {"held_back": HELD_BACK})
    plan = _search_plan(settings, asked, len(devices), name=run.resolve().name)
    known: dict[int, RecordsByHome] = {}

    def records(candidates: int) -> RecordsByHome:
        if candidates not in known:
            known[candidates] = mine_population(
                list(devices.values()), release, candidates=candidates, threads=settings.speed.threads,
                held_back=evaluation.held_back,
            )  # fmt: skip
        return known[candidates]

    def trials(rounds: RoundsSettings) -> FederationTrials:
        base = TrialBase(
            rounds=rounds,
            evaluation=evaluation,
            release=release.id,
            dimension=release.adapter_spec.size,
            devices=names_hash(devices),
        )
        whole = plan.model_copy(update={"base": base.model_dump_json()})
        return FederationTrials(home, whole, release, devices, records, trainer, operator, settings.speed.block)

    rounds = settings.rounds
    made = trials(rounds if rounds.target_epsilon is None else _calibrated(rounds, plan, trials))
    for candidate in plan.candidates:
        made.events(candidate)  # refuses a candidate that cannot be, before anything is written
    made.plan.save(home)
    if not (home / KEY_FILE).exists():
        operator.save(home / KEY_FILE)
    return made


def tuning_cost(trials: FederationTrials) -> SearchCost:
    """What the search and its reserved retries cost, by each way of counting; before anything is charged."""
    plan = trials.plan
    reserved, _ = plan.events(trials)
    events = [trials.events(candidate) for candidate in plan.candidates]
    return search_cost(events, plan.repetitions, plan.delta, beside=reserved)


def trial_words(trials: FederationTrials) -> str:
    """How each trial is scored."""
    judged = trials.base.evaluation
    return (
        f"each trial is scored privately: by how much more of what was opened its adapter finds than the release alone, on "
        f"{judged.held_back:.0%} of each\ndevice's queries, which no trial trains on (nDCG@10, noise multiplier "
        f"{judged.noise_multiplier:g}, bound {judged.bound:g}: settings evaluation.*)"
    )


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


def _calibrated(
    rounds: RoundsSettings, plan: SearchPlan, trials: Callable[[RoundsSettings], FederationTrials]
) -> RoundsSettings:
    """The rounds with the least noise at which the search and its reserved retries meet the target epsilon."""
    target = rounds.target_epsilon
    assert target is not None

    def noisy(noise: float) -> RoundsSettings:
        return RoundsSettings.model_validate(rounds.model_dump() | {"target_epsilon": None, "noise_multiplier": noise})

    noise = calibrate_search(
        target_epsilon=target,
        delta=plan.delta,
        repetitions=plan.repetitions,
        candidates=lambda noise: [trials(noisy(noise)).events(candidate) for candidate in plan.candidates],
        beside=lambda noise: plan.events(trials(noisy(noise)))[0],
    )
    return noisy(noise)
