"""The Flower `ClientApp` of a device. The same object runs in-process, on Ray and on a SuperNode.

The node configuration holds `device-home`. A device answers with a bounded vector of fixed length; when it declines, has
nothing to learn from, or fails, that vector is zero, so that silence tells nothing (DESIGN section 4, rule 2). Under `local`,
where the coordinator is an adversary, it is noise: what a device without records answers. No record is read for it, so it
costs nothing, and who declined cannot be told from who had nothing to say. Where its owner named the federation, its receipt
stands beside the vector in each of these cases, and lists this attempt in each; it is made before anything of the owner's is
read.

Flower's deployment engine starts a process for every message, so what only training needs is imported when it trains.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from stillroom_client.participation import refuse, require_joined, take_part
from stillroom_client.sent import note_sent
from stillroom_client.unlocking import unlock
from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.errors import ProtocolError
from stillroom_shared.local_mechanism import noise_alone
from stillroom_shared.local_rounds import LocalRounds
from stillroom_shared.mechanism import Mechanism, Update
from stillroom_shared.protocol import (
    EvaluationOrder,
    RoundOrder,
    enrolment_message,
    read_evaluation,
    read_order,
    update_message,
)
from stillroom_shared.randomness import Randomness

if TYPE_CHECKING:
    from stillroom_client.private_training import PrivateTrainer
    from stillroom_client.training import LocalWork, Trainer

HOME_KEY = "device-home"
# Flower sends the type and text of an exception to the coordinator: neither may quote anything of this device.
_SAYS_NOTHING = "this device cannot answer; its own log says why"
_log = logging.getLogger(__name__)


class UpdateSource(Protocol):
    """Computes a device's raw update, (dimension,) float32: alone, or in batches of simulated devices."""

    def check(self, home: Path, order: RoundOrder) -> None:
        """Raise when this order cannot be followed, before anything is spent on it."""
        ...

    def update(self, home: Path, order: RoundOrder, adapter: Adapter) -> NDArray[np.float32]:
        """The change of the adapter values after the local work that the order describes."""
        ...


class ScoreSource(Protocol):
    """Compares two adapters on a device's held-back queries: alone, or with an encoder that simulated devices share."""

    def check(self, home: Path, order: EvaluationOrder) -> None:
        """Raise when this order cannot be followed, before anything is spent on it."""
        ...

    def difference(self, home: Path, order: EvaluationOrder, baseline: Adapter, candidate: Adapter) -> float | None:
        """Mean nDCG of the candidate minus that of the baseline; None without held-back queries."""
        ...


class OwnUpdates:
    """The deployment's source: open the device, mine its records, train."""

    def check(self, home: Path, order: RoundOrder) -> None:
        """Refuse a round for another release than the device holds."""
        _require_release(home, order)

    def update(self, home: Path, order: RoundOrder, adapter: Adapter) -> NDArray[np.float32]:
        """Train on the device's own records."""
        from stillroom_client.device import Device
        from stillroom_client.encoder import Encoder
        from stillroom_client.records import mine_records

        mechanism = order.build_mechanism()
        with Device.open(home) as device:
            encoder, folder = Encoder(device.release), device.release.folder
            if not isinstance(mechanism, LocalRounds):
                records = mine_records(device, encoder, candidates=order.candidates, held_back_share=order.held_back)
                return _trainer(folder, adapter.spec).update(adapter, records, local_work(order))
            most = mechanism.training.records
            records = mine_records(
                device,
                encoder,
                candidates=order.candidates,
                one_per_query=True,
                most=most,
                held_back_share=order.held_back,
            )
        return _private_trainer(folder, adapter.spec).update(
            adapter,
            records,
            mechanism.training,
            learning_rate=order.learning_rate,
            temperature=order.temperature,
            randomness=Randomness(),
        )


class OwnScores:
    """The deployment's source: open the device, search its own index with both adapters."""

    def check(self, home: Path, order: EvaluationOrder) -> None:
        """Refuse an evaluation for another release than the device holds."""
        _require_release(home, order)

    def difference(self, home: Path, order: EvaluationOrder, baseline: Adapter, candidate: Adapter) -> float | None:
        """Score the device's own held-back queries."""
        from stillroom_client.device import Device
        from stillroom_client.encoder import Encoder
        from stillroom_client.scoring import held_back_difference

        with Device.open(home) as device:
            encoder = Encoder(device.release)
            return held_back_difference(
                device, encoder, baseline, candidate, share=order.held_back, cutoff=order.cutoff
            )


def client_app(source: UpdateSource | None = None, scores: ScoreSource | None = None) -> ClientApp:
    """A client app that takes its updates from `source`, and what it makes of adapters from `scores`."""
    app = ClientApp()
    updates = source or OwnUpdates()
    own_scores = scores or OwnScores()

    @app.query("enrol")
    def enrol(message: Message, context: Context) -> Message:
        from stillroom_client.device import Device

        try:
            return Message(enrolment_message(Device.name_of(_home(context))), reply_to=message)
        except Exception:
            _log.exception("this device cannot enrol")
            raise ProtocolError(_SAYS_NOTHING) from None

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            order, adapter = read_order(message.content)
            mechanism = order.build_mechanism()
        except Exception:
            _log.exception("the order of a round cannot be followed")
            raise ProtocolError(_SAYS_NOTHING) from None
        content = _answer(
            context,
            order,
            check=lambda home: updates.check(home, order),
            made=lambda home: mechanism.bound(updates.update(home, order, adapter)),
            otherwise=lambda: nothing(mechanism, order),
        )
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        try:
            order, baseline, candidate = read_evaluation(message.content)
        except Exception:
            _log.exception("the order of an evaluation cannot be followed")
            raise ProtocolError(_SAYS_NOTHING) from None
        content = _answer(
            context,
            order,
            check=lambda home: own_scores.check(home, order),
            made=lambda home: order.comparison.answer(own_scores.difference(home, order, baseline, candidate)),
            otherwise=lambda: order.comparison.answer(None),
        )
        return Message(content, reply_to=message)

    return app


def _answer(
    context: Context,
    order: RoundOrder | EvaluationOrder,
    *,
    check: Callable[[Path], None],
    made: Callable[[Path], Update],
    otherwise: Callable[[], Update],
) -> RecordDict:
    """All that leaves the device for an order: what it made, or else what a device sends that has nothing; and a receipt.

    Args:
        check: raises when the order cannot be followed, before anything is spent on it.
        made: the answer, from the device's home, once this participation is on its ledger.
        otherwise: the answer of a device that declines or fails, whatever the reason.
    """
    home, receipt, own = None, None, False
    try:
        home = _home(context)
        try:
            check(home)
            receipt = take_part(home, order)
        except Exception as error:
            receipt = refuse(home, order, error)
            raise
        answer = made(home)
        require_joined(home)  # who left while this was made takes nothing more part
        own = True
    except Exception:  # whatever went wrong stays here: an error report would be a release nobody accounted for
        _log.exception("round %d, attempt %d: this device answers as one that has nothing", order.round, order.attempt)
        answer = otherwise()
    content = update_message(answer, receipt.model_dump_json() if receipt else None)
    if home is not None:
        note_sent(home, order, size=_size(content), own=own)
    return content


def _size(content: RecordDict) -> int:
    """Bytes of an answer: its vector as it is serialized, and the receipt."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    return arrays + sum(len(str(v).encode()) for record in content.config_records.values() for v in record.values())


def nothing(mechanism: Mechanism, order: RoundOrder) -> Update:
    """What a device answers that declines, fails or has no records: zero, or under `local` fresh noise."""
    if isinstance(mechanism, LocalRounds):
        change = noise_alone(mechanism.training, learning_rate=order.learning_rate, randomness=Randomness())
        return mechanism.bound(change)
    return np.zeros(mechanism.length, np.int32)


def local_work(order: RoundOrder) -> LocalWork:
    """The local work that an order asks for."""
    from stillroom_client.training import LocalWork

    return LocalWork(steps=order.steps, learning_rate=order.learning_rate, temperature=order.temperature)


def _require_release(home: Path, order: RoundOrder | EvaluationOrder) -> None:
    from stillroom_client.device import Device

    with Device.open(home) as device:
        if device.release.id != order.release:
            raise ProtocolError(
                f"the order is for release {order.release[:12]}, this device holds {device.release.id[:12]}"
            )


def _home(context: Context) -> Path:
    home = context.node_config.get(HOME_KEY)
    if not home:
        raise ProtocolError(f"node configuration lacks {HOME_KEY!r}: pass --node-config '{HOME_KEY}=\"/path\"'")
    unlock(Path(str(home)), terminal=False)  # now, and with a reason: nobody sits at a node to be asked
    return Path(str(home))


@lru_cache(maxsize=1)
def _trainer(folder: Path, spec: AdapterSpec) -> Trainer:
    from stillroom_client.training import Trainer

    return Trainer(folder, spec)


@lru_cache(maxsize=1)
def _private_trainer(folder: Path, spec: AdapterSpec) -> PrivateTrainer:
    from stillroom_client.private_training import PrivateTrainer

    return PrivateTrainer(folder, spec)


app = client_app()
