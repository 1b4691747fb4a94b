"""What a run of `stillroom demo` found: the schema of results.json, which the report is drawn from.

Closed and frozen: an unknown key, a missing one, a figure that is not finite or a verdict that its own interval
contradicts is refused, so a report never shows what was not measured. The keys stay stable within one `schema`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from stillroom_shared.errors import DataError
from stillroom_simulations.goal import Goal
from stillroom_simulations.intervals import Interval

Metric = Literal["ndcg_at_10", "recall_at_10", "mrr_at_10"]
Stage = Literal["teacher", "student", "federated", "federated_nonprivate", "device"]
ExampleStage = Literal["teacher", "student", "federated"]
STAGES: tuple[Stage, ...] = ("teacher", "student", "federated", "federated_nonprivate", "device")


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"the lower end {ends[0]} is above the upper end {ends[1]}: give [low, high]")
    return ends


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(ge=0)]
Ends = Annotated[tuple[float, float], AfterValidator(_ordered)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OwnIndexQuality(_Value):
    """Mean metrics over test queries with 95% intervals; each query is asked of its own device's index."""

    ndcg_at_10: Share
    recall_at_10: Share
    mrr_at_10: Share
    intervals: dict[Metric, Ends]


class Quality(OwnIndexQuality):
    """Mean metrics over test queries with 95% intervals, over the whole private corpus."""

    own_index: OwnIndexQuality | None = None


class Ratio(_Value):
    """A figure with a goal. It holds when the whole interval does: the lower end of `>=`, the upper end of `<=`.

    >>> [Ratio.judge(Interval(0.97, low, 0.98), ">= 0.96").holds for low in (0.963, 0.957)]
    [True, False]
    """

    value: float
    interval: Ends
    goal: str
    holds: bool

    @classmethod
    def judge(cls, interval: Interval, goal: str) -> Self:
        """The figure against a goal such as ">= 0.96" or "<= 0.005"."""
        return cls(value=interval.value, interval=interval.ends, goal=goal, holds=Goal.parse(goal).holds(interval.ends))

    @model_validator(mode="after")
    def _verdict_is_true(self) -> Self:
        if self.holds != (found := Goal.parse(self.goal).holds(self.interval)):
            raise ValueError(f"holds is {self.holds}, but interval {self.interval} against {self.goal!r} says {found}")
        return self


class CorpusFacts(_Value):
    """Which text was measured on: `hash` is of both sides, counts are of the private side."""

    name: str
    hash: Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")]
    passages: Count
    queries: dict[Literal["train", "dev", "test"], Count]
    public_owners: tuple[str, ...]
    private_owners: tuple[str, ...]


class Privacy(_Value):
    """The guarantee: epsilon and delta for one `unit`, against `adversary`.

    Attributes:
        epsilon: against `adversary`; None says that there is no guarantee.
        against: epsilon for every adversary, where the accountant gave more than one.
        noise_multiplier: noise standard deviation / sensitivity.
        sampling_rate: chance of a device to be in a round's cohort.
        coordinator: epsilon against it, or "none" where it is promised nothing.
        paragraph: the statement in plain words, `PrivacyStatement.paragraph()`.
    """

    epsilon: Positive | None
    delta: Share
    unit: str
    mechanism: str
    adversary: str
    noise_multiplier: Positive | None
    sampling_rate: Share
    rounds: Count
    devices: Count
    clip_norm: Positive | None
    accountant: str
    epsilon_by_accountant: dict[str, Positive | None]
    against: dict[str, Positive | None] = {}
    coordinator: Literal["none"] | Positive
    paragraph: str


class RoundsOn(_Value):
    """Which queries `rounds` and `rounds_nonprivate` were measured on, and what the teacher has on the same ones.

    Without it the report draws no level of the teacher: one of other queries would not compare.
    """

    split: Literal["dev", "test"]
    teacher_ndcg_at_10: Share


class Round(_Value):
    """Quality after a private round; epsilon is what all rounds so far have spent. Round 0 is the student."""

    round: Count
    epsilon: Positive | None
    ndcg_at_10: Share
    cohort: Count
    update_norm: Positive | None


class NonPrivateRound(_Value):
    """One round of the non-private baseline."""

    round: Count
    ndcg_at_10: Share


class Tower(_Value):
    """Size of a tower as it is shipped."""

    parameters: Count
    bytes: Count


class AdapterSize(_Value):
    """Size of what a round changes."""

    values: Count
    bytes: Count


class DeviceFacts(_Value):
    """The simulated population."""

    count: Count
    passages_min: Count
    passages_median: Positive
    passages_max: Count
    index_bytes_per_passage: Positive


class SearchLatency(_Value):
    """One search on one device, from text to hits."""

    p50_ms: Positive
    p99_ms: Positive
    queries: Count


class Result(_Value):
    """One passage of a ranking."""

    passage_id: str
    text: str
    relevant: bool


class Example(_Value):
    """One query, and what three towers find first."""

    query: str
    owner: str
    answer_id: str
    results: dict[ExampleStage, tuple[Result, ...]]


class Results(_Value):
    """Everything one run found."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    corpus: CorpusFacts
    seed: int
    scale: str
    versions: dict[str, str]
    machine: str
    teacher: Quality
    student: Quality
    federated: Quality
    federated_nonprivate: Quality
    device: Quality
    ratios: dict[str, Ratio]
    privacy: Privacy
    rounds: tuple[Round, ...]
    rounds_nonprivate: tuple[NonPrivateRound, ...]
    rounds_on: RoundsOn | None = None
    query_tower: Tower
    document_tower: Tower
    adapter: AdapterSize
    devices: DeviceFacts
    search: SearchLatency
    seconds: dict[str, Positive]
    peak_memory_bytes: Count
    examples: tuple[Example, ...]

    @model_validator(mode="after")
    def _rounds_in_order(self) -> Self:
        for name, numbers in (
            ("rounds", [r.round for r in self.rounds]),
            ("rounds_nonprivate", [r.round for r in self.rounds_nonprivate]),
        ):
            if numbers != sorted(set(numbers)):
                raise ValueError(f"{name} are numbered {numbers}: each must be there once, in order")
        spent = [r.epsilon for r in self.rounds if r.epsilon is not None]
        if spent != sorted(spent):
            raise ValueError(
                f"rounds: epsilon falls from one round to the next in {spent}; spent privacy does not come back"
            )
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "results") -> Self:
        """Validate a mapping laid out like results.json.

        Raises:
            DataError: naming each field that is wrong.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise DataError(_complaints(source, error)) from error

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read results.json."""
        try:
            values = json.loads(file.read_bytes())
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror}): `stillroom demo --out DIR` writes it"
            ) from error
        except ValueError as error:
            raise DataError(f"{file} is not JSON ({error}): run `stillroom demo` again") from error
        return cls.parse(values, str(file))

    def save(self, file: Path) -> None:
        """Write results.json."""
        file.write_text(self.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")

    @property
    def stages(self) -> dict[Stage, Quality]:
        """Quality by stage, in the order of the pipeline."""
        return {stage: getattr(self, stage) for stage in STAGES}


def _complaints(source: str, error: ValidationError) -> str:
    lines = [f"field {'.'.join(map(str, e['loc'])) or '(whole)'}: {e['msg']}" for e in error.errors()]
    return f"{source} does not fit the schema: " + "; ".join(lines)
