"""The plan of a federation: every public constant of its rounds, fixed before the first one.

What the accountant relies on (enrolled devices, sampling rate, noise, clip norm, number of rounds, budget) stands here and
nowhere else; the ledger's genesis row holds the plan's hash, so a plan changed midway is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stillroom_server.clipping import AdaptiveClip
from stillroom_server.cohort import Rotation
from stillroom_server.optimizer import OptimizerName, ServerOptimizer
from stillroom_shared.errors import SettingsError, StillroomError
from stillroom_shared.events import event_from_json
from stillroom_shared.ledger import Budget, Row
from stillroom_shared.mechanism import MechanismName
from stillroom_shared.protocol import EvaluationOrder, RoundOrder, Schedule
from stillroom_shared.statement import PrivacyStatement, statement

PLAN_FILE = "plan.json"


class Plan(BaseModel):
    """Frozen; written once as `plan.json` into the coordinator's home.

    Attributes:
        federation: name that devices joined.
        release_folder: the release whose query tower learns; relative paths start at the coordinator's home.
        enrolled: names of all enrolled devices; their number is public and is the N of the accounting.
        rounds: number of releases to make.
        clip_norm: of every round; of the first one where `clip_quantile` is given.
        clip_quantile: the share of updates that are to stay unclipped: each round's clip norm follows the noisy share of
            the round before. None keeps the clip norm.
        clip_rate, norm_bit: step of the clip norm's logarithm; size of the bit that is asked for, in clip norms.
        budget_epsilon: the most epsilon (at `delta`, against readers of releases; of a user, under `local` of a query) that
            may ever be spent.
        sampling_rate: chance of a device to be in a cohort; where devices take turns, the share of them whose turn it is.
        schedule: of `correlated` and `local`: when devices take turns.
        coefficients: of `correlated`: of the noise, in units of 1 / `toeplitz.ONE`.
        records, record_rate: of `local`: most records that a device trains on, and the chance of each in a step.
        local_steps: passes over a device's records; under `local` noisy steps.
        held_back: share of each device's queries that is never trained on. Above 0, no adapter is published before an
            evaluation on them let it pass (`evaluation.py`).
        evaluation_bound: largest difference of one device's nDCG that an evaluation counts.
        evaluation_noise: noise multiplier of an evaluation.
        evaluation_rate: chance of a device to be asked in an evaluation.
        wait_for_nodes: how many nodes must be online before a round is charged; who is online is no private data.
        seed: fixes all randomness; allowed only in a rehearsal, whose statements promise nothing.
        trial_of: the search (`stillroom_server.search`) that these rounds are one trial of; what it publishes by itself
            then promises nothing, because the search decides what is seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str = Field(min_length=1)
    release_folder: Path
    enrolled: tuple[str, ...] = Field(min_length=1)
    mechanism: MechanismName
    rounds: int = Field(ge=0)
    schedule: Schedule | None = None
    coefficients: tuple[int, ...] | None = Field(default=None, min_length=1)
    records: int | None = Field(default=None, ge=1)
    record_rate: float | None = Field(default=None, gt=0, le=1)
    sampling_rate: float = Field(gt=0, le=1)
    clip_norm: float | None = Field(default=None, gt=0)
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    clip_rate: float = Field(default=0.2, gt=0)
    norm_bit: float = Field(default=0.1, gt=0, le=1)
    noise_multiplier: float | None = Field(default=None, gt=0)
    budget_epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(gt=0, lt=1)
    local_steps: int = Field(ge=1)
    local_learning_rate: float = Field(gt=0)
    temperature: float = Field(gt=0)
    candidates: int = Field(ge=2)
    server_optimizer: OptimizerName = "momentum"
    server_learning_rate: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    averaging: float = Field(ge=0, le=1)
    held_back: float = Field(default=0.0, ge=0, lt=1)
    evaluation_bound: float = Field(default=0.1, gt=0, le=1)
    evaluation_noise: float = Field(default=4.0, gt=0)
    evaluation_rate: float = Field(default=1.0, gt=0, le=1)
    reply_timeout_seconds: float = Field(default=600.0, gt=0)
    wait_for_nodes: int = Field(default=1, ge=0)
    rehearsal: bool = False
    seed: str | None = None
    trial_of: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.seed is not None and not self.rehearsal:
            raise ValueError("seed: noise from a known seed protects nobody; remove it, or set rehearsal = true")
        if len(set(self.enrolled)) != len(self.enrolled):
            raise ValueError("enrolled: a name occurs twice, and a device that is sampled twice breaks the sensitivity")
        units, unit = len(self.enrolled) * (self.records or 1), "queries" if self.mechanism == "local" else "devices"
        if self.mechanism != "none" and self.delta >= 1 / units:
            raise ValueError(
                f"delta {self.delta} lets one of {units} {unit} be exposed outright: choose at most a tenth of 1/{units}"
            )
        if self.mechanism != "none" and None in (self.clip_norm, self.noise_multiplier, self.budget_epsilon):
            raise ValueError(f"mechanism {self.mechanism!r} needs clip_norm, noise_multiplier and budget_epsilon")
        self._require_schedule()
        if self.mechanism == "none" and self.clip_quantile is not None:
            raise ValueError(f"clip_quantile {self.clip_quantile}: mechanism none clips nothing, remove it")
        if self.held_back:
            self._require_evaluation()
        return self

    def _require_evaluation(self) -> None:
        """Raise `ValueError` where an evaluation, which is a `central` release, would promise less than the rounds do."""
        if self.mechanism not in ("none", "central", "correlated"):
            raise ValueError(
                f"held_back {self.held_back}: under {self.mechanism!r} the coordinator sees noise only, an evaluation would "
                "show it single differences; set held_back to 0"
            )
        if self.mechanism == "correlated" and self.evaluation_rate != 1:
            raise ValueError(
                f"evaluation_rate {self.evaluation_rate}: devices take turns where they cannot be sampled, which an evaluation "
                "cannot do either; set it to 1"
            )
        try:
            self.evaluation(number=1, round_number=1, attempt=1, release="any").build_mechanism()
        except StillroomError as error:
            raise ValueError(f"evaluation: {error}") from error

    def _require_schedule(self) -> None:
        """Raise `ValueError` unless there is what the mechanism needs and nothing else, and it covers every round."""
        for names, mechanisms in (
            (("schedule",), ("correlated", "local")),
            (("coefficients",), ("correlated",)),
            (("records", "record_rate"), ("local",)),
        ):
            for name in names:
                if (getattr(self, name) is None) != (self.mechanism not in mechanisms):
                    raise ValueError(
                        f"{name}: mechanism {self.mechanism!r} and {name} {getattr(self, name)} do not go together"
                    )
        if self.schedule is None:
            return
        if self.clip_quantile is not None:
            raise ValueError(
                "clip_quantile: a run of turns is charged with one clip norm, which cannot move; remove it"
            )
        if self.schedule.rounds != self.rounds or self.sampling_rate != 1 / self.schedule.separation:
            raise ValueError(
                f"schedule of {self.schedule.rounds} rounds, each device every {self.schedule.separation}: the plan has "
                f"{self.rounds} rounds at sampling rate {self.sampling_rate}"
            )
        try:
            if self.rounds:
                self.rotation.cohort(self.rounds)
                self.order(round_number=1, attempt=1, release="any", dimension=1).build_mechanism()
        except StillroomError as error:
            raise ValueError(f"schedule: {error}") from error

    @property
    def rotation(self) -> Rotation:
        """Whose turn it is, where devices take turns."""
        assert self.schedule is not None
        return Rotation(
            federation=self.federation,
            enrolled=self.enrolled,
            separation=self.schedule.separation,
            participations=self.schedule.participations,
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 of the plan, for the ledger's genesis row.

        Fields at their defaults are left out, so that a ledger outlives versions that add one; `plan.json` names all of them,
        so a default that changes is noticed.
        """
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()

    @property
    def budget(self) -> Budget | None:
        """The budget that every spend is checked against; None for the non-private baseline."""
        return None if self.budget_epsilon is None else Budget(epsilon=self.budget_epsilon, delta=self.delta)

    @property
    def optimizer(self) -> ServerOptimizer:
        """The server's optimizer."""
        return ServerOptimizer(
            name=self.server_optimizer,
            learning_rate=self.server_learning_rate,
            momentum=self.momentum,
            averaging=self.averaging,
        )

    @property
    def adaptive_clip(self) -> AdaptiveClip | None:
        """How the clip norm moves; None when it does not."""
        if self.clip_norm is None or self.clip_quantile is None:
            return None
        return AdaptiveClip(first=self.clip_norm, quantile=self.clip_quantile, rate=self.clip_rate)

    def order(
        self, *, round_number: int, attempt: int, release: str, dimension: int, unclipped: Sequence[float] = ()
    ) -> RoundOrder:
        """What devices are told in one attempt at one round; `unclipped` are the shares released by the rounds before."""
        clip = self.adaptive_clip
        return RoundOrder(
            federation=self.federation,
            release=release,
            round=round_number,
            attempt=attempt,
            mechanism=self.mechanism,
            clip_norm=clip.norm_after(unclipped) if clip else self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            norm_bit=self.norm_bit if clip else 0.0,
            schedule=self.schedule,
            coefficients=self.coefficients,
            records=self.records,
            record_rate=self.record_rate,
            sampling_rate=self.sampling_rate,
            devices=len(self.enrolled),
            dimension=dimension,
            steps=self.local_steps,
            learning_rate=self.local_learning_rate,
            temperature=self.temperature,
            candidates=self.candidates,
            held_back=self.held_back,
        )

    def evaluation(self, *, number: int, round_number: int, attempt: int, release: str) -> EvaluationOrder:
        """What devices are told in one attempt at one evaluation; `SettingsError` when no query is held back for it."""
        if not self.held_back:
            raise SettingsError(
                "held_back is 0 in the plan, so every query was trained on and none can judge: set held_back in the plan "
                "(in the demo: --set evaluation.held_back=0.2) before the first round"
            )
        return EvaluationOrder(
            federation=self.federation,
            release=release,
            round=round_number,
            attempt=attempt,
            evaluation=number,
            noise_multiplier=self.evaluation_noise,
            sampling_rate=self.evaluation_rate,
            devices=len(self.enrolled),
            bound=self.evaluation_bound,
            held_back=self.held_back,
        )

    def statement(self, rows: Sequence[Row]) -> PrivacyStatement:
        """The statement of what these rows of the coordinator's ledger charged."""
        spends = [row.fields for row in rows if row.kind == "spend"]
        return statement(
            [event_from_json(spend["event"]) for spend in spends],
            delta=self.delta,
            devices=len(self.enrolled),
            sampling_rate=self.sampling_rate,
            clip_norm=self.clip_norm,
            rehearsal=self.rehearsal,
            mechanism=self.mechanism,
            trial_of=self.trial_of,
            evaluations=sum("evaluation" in spend["purpose"] for spend in spends),
        )

    def save(self, home: Path) -> None:
        """Write `plan.json`; an existing different plan is refused, because its ledger relies on it."""
        home.mkdir(parents=True, exist_ok=True)
        path = home / PLAN_FILE
        if path.exists() and Plan.load(home) != self:
            raise SettingsError(
                f"{path} holds another plan: finish that federation; in another home over the same devices both spends add up"
            )
        path.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, home: Path) -> Plan:
        """Read `plan.json`; `SettingsError` names the field that does not fit."""
        path = home / PLAN_FILE
        try:
            return cls.model_validate_json(path.read_text())
        except FileNotFoundError as error:
            raise SettingsError(f"no plan at {path}: write one with Plan.save") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "plan"
            raise SettingsError(f"{path}: {where}: {first['msg']} (got {str(first['input'])[:80]})") from error
