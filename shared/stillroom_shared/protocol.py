"""The messages of rounds and evaluations: exchanges with a closed schema. What is not listed here does not travel.

| message | server sends | device answers |
|---|---|---|
| `query.enrol` | nothing | its enrolment name |
| `train` | the adapter values and the public constants of the round | one vector of int32 of fixed length, and a receipt |
| `evaluate` | two adapters and the public constants of the evaluation | the same, of length 2 |

The receipt tells which attempts of this federation the device was asked for, this one included, and travels where the
owner named the federation; it is a function of orders and of the device's ledger, never of documents, queries or
feedback, and is the same whether the device trained, declined or failed (`receipts.py`). It names every attempt each
time: a device lists at most 2,000 of a federation, some 8 bytes for each, and 128 KiB are refused.

No metrics, no counts, no exception text: each would be a release that nobody accounted for. Both sides parse strictly;
anything else in a message is a `ProtocolError` (on the server: a zero update).
"""

from __future__ import annotations

import io
import json
import math
from typing import Any, Literal, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.comparison import Comparison
from stillroom_shared.correlated import Correlated
from stillroom_shared.errors import ProtocolError, StillroomError
from stillroom_shared.heads import LedgerHead
from stillroom_shared.local_mechanism import Local
from stillroom_shared.local_rounds import LocalRounds
from stillroom_shared.mechanism import Central, MechanismName, NoPrivacy, Update

TRAIN = "train"
EVALUATE = "evaluate"
ENROL = "query.enrol"

_VALUES = "values"
_LARGEST_HEADER = 1024
_LARGEST_RECEIPT = 1 << 17


class Schedule(BaseModel):
    """When devices take turns; fixed before the first round of a run.

    Attributes:
        rounds: of the run.
        separation: rounds between two turns of a device; under `correlated` at least as many as there are coefficients.
        participations: most turns of a device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(ge=0)
    separation: int = Field(ge=1)
    participations: int = Field(ge=1)

    @classmethod
    def every(cls, separation: int, *, rounds: int) -> Self:
        """A turn every so many rounds.

        >>> Schedule.every(3, rounds=7).participations
        3
        """
        return cls(rounds=rounds, separation=separation, participations=max(1, math.ceil(rounds / separation)))


class RoundOrder(BaseModel):
    """The public constants of one attempt at one round; the same for every device.

    A device refuses an order whose federation or release is not its own. `steps`, `learning_rate` and `temperature` are
    the local work, from all but the share `held_back` of its queries (`stillroom_client.held_back`); the rest names the
    mechanism, so that a device can account for what it takes part in.

    Attributes:
        ledger: how far the coordinator's ledger has come with the spend of this attempt.
        schedule: of `correlated` and `local`, where devices take turns.
        coefficients: of `correlated`, of its strategy matrix, in units of 1 / `toeplitz.ONE`; integers, so that nobody computes
            them anew.
        records, record_rate: of `local`: most records that a device trains on, its latest, and the chance of each in a step.
        steps: passes over a device's records; under `local` noisy steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str = Field(min_length=1)
    release: str = Field(min_length=1)
    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    mechanism: MechanismName
    clip_norm: float | None
    noise_multiplier: float | None
    norm_bit: float = Field(default=0.0, ge=0, le=1)
    schedule: Schedule | None = None
    coefficients: tuple[int, ...] | None = Field(default=None, min_length=1)
    records: int | None = Field(default=None, ge=1)
    record_rate: float | None = Field(default=None, gt=0, le=1)
    sampling_rate: float = Field(gt=0, le=1)
    devices: int = Field(ge=1)
    dimension: int = Field(ge=1)
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    temperature: float = Field(gt=0)
    candidates: int = Field(ge=2)
    held_back: float = Field(default=0.0, ge=0, lt=1)
    ledger: LedgerHead | None = None

    def build_mechanism(self) -> Central | Correlated | LocalRounds | NoPrivacy:
        """The mechanism value that both sides use; an unknown one is refused by the schema."""
        if self.mechanism == "none":
            return NoPrivacy(sampling_rate=self.sampling_rate, devices=self.devices, dimension=self.dimension)
        if self.clip_norm is None or self.noise_multiplier is None:
            raise ProtocolError(
                f"round {self.round}: mechanism {self.mechanism!r} needs clip_norm and noise_multiplier"
            )
        if self.mechanism in ("correlated", "local"):
            return self._in_turns(self.clip_norm, self.noise_multiplier)
        return Central(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            devices=self.devices,
            dimension=self.dimension,
            norm_bit=self.norm_bit,
        )

    def _in_turns(self, clip_norm: float, noise_multiplier: float) -> Correlated | LocalRounds:
        if self.schedule is None or self.round > self.schedule.rounds:
            raise ProtocolError(
                f"round {self.round}: mechanism {self.mechanism!r} needs the schedule of a run that holds it"
            )
        run = self.schedule.model_dump() | {"devices": self.devices}
        if self.mechanism == "correlated" and self.coefficients is not None:
            return Correlated(
                clip_norm=clip_norm,
                noise_multiplier=noise_multiplier,
                coefficients=self.coefficients,
                dimension=self.dimension,
                **run,
            )
        if self.mechanism == "local" and self.records is not None and self.record_rate is not None:
            training = Local(
                clip_norm=clip_norm,
                noise_multiplier=noise_multiplier,
                sampling_rate=self.record_rate,
                steps=self.steps,
                records=self.records,
                dimension=self.dimension,
            )
            return LocalRounds(training=training, **run)
        raise ProtocolError(f"round {self.round}: mechanism {self.mechanism!r} lacks coefficients, or records and rate")


class EvaluationOrder(BaseModel):
    """The public constants of one attempt at one evaluation; the same for every device.

    Attributes:
        round: the last round that was released. A device answers each attempt of a federation once and in order, so attempts
            at an evaluation are numbered on from those at that round.
        evaluation: its number in the federation.
        bound: largest difference of nDCG that counts, see `Comparison`.
        held_back: share of a device's queries that it scores, never trained on.
        cutoff: results of each query that are looked at.
        ledger: how far the coordinator's ledger has come with the spend of this attempt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str = Field(min_length=1)
    release: str = Field(min_length=1)
    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    evaluation: int = Field(ge=1)
    mechanism: Literal["central"] = "central"
    noise_multiplier: float = Field(gt=0)
    sampling_rate: float = Field(gt=0, le=1)
    devices: int = Field(ge=1)
    bound: float = Field(gt=0, le=1)
    held_back: float = Field(gt=0, lt=1)
    cutoff: Literal[10] = 10
    ledger: LedgerHead | None = None

    @property
    def comparison(self) -> Comparison:
        """How differences are bounded, summed and read."""
        return Comparison(
            bound=self.bound,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            devices=self.devices,
        )

    def build_mechanism(self) -> Central:
        """The mechanism value that both sides use."""
        return self.comparison.mechanism


def evaluation_message(order: EvaluationOrder, baseline: Adapter, candidate: Adapter) -> RecordDict:
    """What the server sends to a device that is to compare two adapters."""
    fields = {"order": order.model_dump_json(), "spec": json.dumps(candidate.spec.to_json(), sort_keys=True)}
    return RecordDict(
        {
            "evaluation": ConfigRecord(dict(fields)),
            "baseline": _vector(baseline.values),
            "candidate": _vector(candidate.values),
        }
    )


def read_evaluation(content: RecordDict) -> tuple[EvaluationOrder, Adapter, Adapter]:
    """The order, the baseline and the candidate, as a device reads them; `ProtocolError` says what does not fit."""
    _require_keys(content, {"evaluation", "baseline", "candidate"})
    try:
        fields = content.config_records["evaluation"]
        order = EvaluationOrder.model_validate_json(str(fields["order"]))
        spec = AdapterSpec.from_json(json.loads(str(fields["spec"])))
        baseline, candidate = (_read_adapter(content, name, spec) for name in ("baseline", "candidate"))
        order.build_mechanism()
    except (KeyError, TypeError, ValueError, ValidationError, StillroomError) as error:
        raise ProtocolError(
            f"the order of an evaluation cannot be read ({error}): server and device run different versions"
        ) from error
    return order, baseline, candidate


def order_message(order: RoundOrder, adapter: Adapter) -> RecordDict:
    """What the server sends to a device of the cohort."""
    fields = {"order": order.model_dump_json(), "spec": json.dumps(adapter.spec.to_json(), sort_keys=True)}
    return RecordDict({"round": ConfigRecord(dict(fields)), "adapter": _vector(adapter.values)})


def read_order(content: RecordDict) -> tuple[RoundOrder, Adapter]:
    """What a device reads; `ProtocolError` says what does not fit."""
    _require_keys(content, {"round", "adapter"})
    try:
        fields = content.config_records["round"]
        order = RoundOrder.model_validate_json(str(fields["order"]))
        spec = AdapterSpec.from_json(json.loads(str(fields["spec"])))
        adapter = _read_adapter(content, "adapter", spec)
    except (KeyError, TypeError, ValueError, ValidationError, StillroomError) as error:
        raise ProtocolError(
            f"the round's order cannot be read ({error}): server and device run different versions"
        ) from error
    if order.dimension != spec.size:
        raise ProtocolError(f"round {order.round}: dimension {order.dimension} is not the adapter's {spec.size} values")
    return order, adapter


def update_message(update: Update, receipt: str | None = None) -> RecordDict:
    """What a device answers: the bounded update, its receipt as JSON where the owner allows one, and nothing else."""
    shown = {} if receipt is None else {"receipt": ConfigRecord({"receipt": receipt})}
    return RecordDict({"update": _vector(update), **shown})


def read_update(content: RecordDict, length: int) -> Update:
    """What the server reads; `ProtocolError` for anything but one int32 vector of this length, with a receipt or without."""
    _require_keys(content, {"update", "receipt"} & {"update", *content})
    record = content["update"]
    if not isinstance(record, ArrayRecord):
        raise ProtocolError(f"an update is a vector, not a {type(record).__name__}")
    return _read_vector(record, np.dtype(np.int32), length).astype(np.int32)


def shown_receipt(content: RecordDict) -> bytes | None:
    """The receipt beside an update, not read yet; None where there is none, `ProtocolError` for anything else."""
    if "receipt" not in content:
        return None
    record = content["receipt"]
    text = dict[str, Any](record).get("receipt") if isinstance(record, ConfigRecord) and len(record) == 1 else None
    if not isinstance(text, str) or len(text) > _LARGEST_RECEIPT:
        raise ProtocolError(f"a receipt is one text of at most {_LARGEST_RECEIPT} characters: this is not one")
    return text.encode()


def enrolment_message(name: str) -> RecordDict:
    """A device's answer to `query.enrol`."""
    return RecordDict({"enrolment": ConfigRecord({"name": name})})


def read_enrolment(content: RecordDict) -> str:
    """The enrolment name; `ProtocolError` when there is none."""
    _require_keys(content, {"enrolment"})
    record = content["enrolment"]
    name = dict[str, Any](record).get("name") if isinstance(record, ConfigRecord) else None
    if not isinstance(name, str) or not name:
        raise ProtocolError(f"enrolment name {name!r} is not a non-empty string")
    return name


def _read_adapter(content: RecordDict, name: str, spec: AdapterSpec) -> Adapter:
    values = _read_vector(content.array_records[name], np.dtype(np.float32), spec.size)
    return Adapter(spec, values.astype(np.float32))


def _vector(values: NDArray[np.float32] | NDArray[np.int32]) -> ArrayRecord:
    return ArrayRecord({_VALUES: Array(values)})


def _read_vector(record: ArrayRecord, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    """The vector of a record. Its header is a stranger's claim, so bytes are counted before NumPy allocates."""
    if set(record) != {_VALUES}:
        raise ProtocolError(f"arrays {sorted(record)} arrived where only {_VALUES!r} may travel")
    array = record[_VALUES]
    if len(array.data) > dtype.itemsize * length + _LARGEST_HEADER or tuple(array.shape) != (length,):
        raise ProtocolError(
            f"vector of shape {tuple(array.shape)} in {len(array.data)} bytes: expected {length} of {dtype}"
        )
    try:
        with io.BytesIO(array.data) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, declared = header(file)
            if shape != (length,) or declared != dtype:
                raise ProtocolError(f"vector declares {shape} of {declared}: expected {length} of {dtype}")
            values = np.frombuffer(file.read(), dtype)
    except ProtocolError:
        raise
    except Exception as error:  # NumPy's header parser raises whatever a stranger's bytes lead it to
        raise ProtocolError(f"vector cannot be read: {type(error).__name__}") from error
    if values.shape != (length,):
        raise ProtocolError(f"vector ends after {len(values)} values: expected {length} of {dtype}")
    return values


def _require_keys(content: RecordDict, keys: set[str]) -> None:
    if set(content) != keys:
        raise ProtocolError(f"message holds {sorted(content)}: the protocol allows exactly {sorted(keys)}")
