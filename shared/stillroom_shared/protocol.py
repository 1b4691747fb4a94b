"""The messages of a round: two exchanges with a closed schema. What is not listed here does not travel.

| message | server sends | device answers |
|---|---|---|
| `query.enrol` | nothing | its enrolment name |
| `train` | the adapter values and the public constants of the round | one vector of int32 of fixed length |

No metrics, no counts, no exception text: each would be a release that nobody accounted for. Both sides parse strictly;
anything else in a message is a `ProtocolError` (on the server: a zero update).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.errors import ProtocolError, StillroomError
from stillroom_shared.mechanism import Central, Mechanism, MechanismName, NoPrivacy, Update

TRAIN = "train"
ENROL = "query.enrol"

_VALUES = "values"


class RoundOrder(BaseModel):
    """The public constants of one attempt at one round; the same for every device.

    A device refuses an order whose federation or release is not its own. `steps`, `learning_rate` and `temperature` are
    the local work; the rest names the mechanism, so that a device can account for what it takes part in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str = Field(min_length=1)
    release: str = Field(min_length=1)
    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    mechanism: MechanismName
    clip_norm: float | None
    noise_multiplier: float | None
    sampling_rate: float = Field(gt=0, le=1)
    devices: int = Field(ge=1)
    dimension: int = Field(ge=1)
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    temperature: float = Field(gt=0)
    candidates: int = Field(ge=2)

    def build_mechanism(self) -> Mechanism:
        """The mechanism value that both sides use; an unknown one is refused by the schema."""
        if self.mechanism == "none":
            return NoPrivacy(sampling_rate=self.sampling_rate, devices=self.devices, dimension=self.dimension)
        if self.clip_norm is None or self.noise_multiplier is None:
            raise ProtocolError(
                f"round {self.round}: mechanism {self.mechanism!r} needs clip_norm and noise_multiplier"
            )
        return Central(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            devices=self.devices,
            dimension=self.dimension,
        )


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
        values = _read_vector(content.array_records["adapter"], np.dtype(np.float32))
        adapter = Adapter(spec, values.astype(np.float32))
    except (KeyError, TypeError, ValueError, ValidationError, StillroomError) as error:
        raise ProtocolError(
            f"the round's order cannot be read ({error}): server and device run different versions"
        ) from error
    if order.dimension != spec.size:
        raise ProtocolError(f"round {order.round}: dimension {order.dimension} is not the adapter's {spec.size} values")
    return order, adapter


def update_message(update: Update) -> RecordDict:
    """What a device answers: the bounded update and nothing else."""
    return RecordDict({"update": _vector(update)})


def read_update(content: RecordDict) -> Update:
    """What the server reads; `ProtocolError` for anything but one int32 vector."""
    _require_keys(content, {"update"})
    return _read_vector(content.array_records["update"], np.dtype(np.int32)).astype(np.int32)


def enrolment_message(name: str) -> RecordDict:
    """A device's answer to `query.enrol`."""
    return RecordDict({"enrolment": ConfigRecord({"name": name})})


def read_enrolment(content: RecordDict) -> str:
    """The enrolment name; `ProtocolError` when there is none."""
    _require_keys(content, {"enrolment"})
    name = dict[str, Any](content.config_records["enrolment"]).get("name")
    if not isinstance(name, str) or not name:
        raise ProtocolError(f"enrolment name {name!r} is not a non-empty string")
    return name


def _vector(values: NDArray[np.float32] | NDArray[np.int32]) -> ArrayRecord:
    return ArrayRecord({_VALUES: Array(values)})


def _read_vector(record: ArrayRecord, dtype: np.dtype[Any]) -> NDArray[Any]:
    if set(record) != {_VALUES}:
        raise ProtocolError(f"arrays {sorted(record)} arrived where only {_VALUES!r} may travel")
    try:
        values = record[_VALUES].numpy()  # NumPy's file format, pickled objects refused by Flower
    except (TypeError, ValueError, EOFError, OSError) as error:
        raise ProtocolError(f"vector cannot be read: {error}") from error
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype != dtype:
        raise ProtocolError(
            f"expected a one-dimensional vector of {dtype}, got {getattr(values, 'shape', type(values))}"
        )
    return values


def _require_keys(content: RecordDict, keys: set[str]) -> None:
    if set(content) != keys:
        raise ProtocolError(f"message holds {sorted(content)}: the protocol allows exactly {sorted(keys)}")
