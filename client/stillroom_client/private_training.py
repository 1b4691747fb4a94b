"""Local work under `local`: query-level DP-SGD on the device's records (see `stillroom_shared.local_mechanism`).

Opacus (Yousefpour et al. 2021, arXiv 2109.12298) computes the gradient of each record; the steps, with coins, clipping to the
integer grid, sums and noise, are `stillroom_shared.local_mechanism.descend`. Opacus' own would not do: `make_private` takes
sampling rate and denominator from the size of the private data, its optimizer adds floating-point noise to a floating-point
sum (arXiv 2207.10635).

Guarantees:
    - Each forward pass holds one record. Rows of one pass share its padding and the blocking of its matrix products, so
      that a record moves the last bits of other gradients (measured: by up to 600 grid steps), which the sensitivity
      of a sum of integers leaves out. This way a gradient is a function of its record and the adapter, bit for bit,
      for three times the time of one pass over ten records.
    - Every pass is checked: Opacus saw one row for each record, in every trained parameter, once. Otherwise `PrivacyError`
      names the culprit and nothing has left the device.
    - Only the adapter is trained, dropout is off, the module is in train mode (otherwise Opacus catches no activations).
    - A record on which the tower fails counts as zero, alone: a device that gave up because of one record would withdraw all
      the others with it, which is more than one query's worth of a difference.

None of the refusals depends on the records.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from torch import Tensor, nn

from stillroom_client.training import Record, load_tower, query_vectors, record_losses
from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.errors import PrivacyError, ProtocolError, StillroomError
from stillroom_shared.local_mechanism import Local, descend
from stillroom_shared.lowrank import LowRankLinear, attach, set_adapter
from stillroom_shared.randomness import Randomness

_log = logging.getLogger(__name__)


class PrivateTrainer:
    """Computes a device's update under `local`, on a copy of the frozen tower that Opacus watches.

    Attributes:
        spec: of the adapter; its order is that of every flat vector here.
        tower: the tower under Opacus' hooks.
        parameters: the trained `B` by name, in the order of `spec.names`.
    """

    def __init__(self, query_tower: Path, spec: AdapterSpec) -> None:
        self.spec = spec
        tower = load_tower(query_tower)
        for module in tower.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._wrapped = attach(tower, spec)
        self.parameters = {name: self._wrapped[name].B for name in spec.names}
        # Not strict: `A` is a buffer, which Opacus refuses because it could hold statistics of a batch; it is constant.
        self.tower = GradSampleModule(tower, loss_reduction="sum", strict=False)
        self.tower.train(True)

    def update(
        self,
        adapter: Adapter,
        records: Sequence[Record],
        mechanism: Local,
        *,
        learning_rate: float,
        temperature: float,
        randomness: Randomness,
    ) -> NDArray[np.float32]:
        """The change of the flat adapter values, (size,), after all steps: private already, whatever happens to it.

        The round must be in the device's ledger (`stillroom_client.participation.take_part`). Without records the update is
        noise.

        Raises:
            PrivacyError: Opacus does not see one row for each record, or more than the adapter would be trained.
            ProtocolError: mechanism and adapter differ in dimension.
        """
        if mechanism.dimension != self.spec.size:
            raise ProtocolError(
                f"the mechanism is for {mechanism.dimension} values, the adapter has {self.spec.size}: build it from "
                "the adapter"
            )
        require_per_record(self.tower, self.parameters)

        def gradients(
            values: NDArray[np.float32], chosen: Sequence[Sequence[Record]]
        ) -> Iterator[tuple[int, NDArray[np.float32]]]:
            found = self.gradients(Adapter(self.spec, values[0]), chosen[0], temperature)
            return ((0, gradient) for gradient in found)

        change = descend(
            mechanism, adapter.values, [records], gradients, learning_rate=learning_rate, randomness=[randomness]
        )
        return np.asarray(change[0], np.float32)

    def gradients(
        self, adapter: Adapter, records: Sequence[Record], temperature: float
    ) -> Iterator[NDArray[np.float32]]:
        """The gradient of each record, (size,), one pass for each; none for a record on which the tower fails."""
        set_adapter(self._wrapped, adapter)
        for record in records:
            try:
                self.backward([record], temperature)
                (gradient,) = self.take(1)
            except StillroomError:
                raise
            except Exception:
                _log.exception("a record counts as zero: the tower failed on it")
                self._forget()
            else:
                yield gradient

    def backward(self, records: Sequence[Record], temperature: float) -> None:
        """One pass of Opacus over records with equally many candidates: a row for each in every `grad_sample`."""
        require_per_record(self.tower, self.parameters)
        vectors = query_vectors(self.tower, [record.tokens for record in records])
        losses = record_losses(vectors, records, temperature)  # (rows,)
        with warnings.catch_warnings():
            # Of the lowest layer, whose inputs are frozen embeddings: its outputs are all that is needed.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            losses.sum().backward()  # type: ignore[no-untyped-call]

    def take(self, records: int) -> NDArray[np.float32]:
        """What the last pass left, (records, size), after checking that it was one pass over `records` records."""
        try:
            require_one_row_each(self.parameters, records)
            return per_record_gradients(self.parameters)
        finally:
            self._forget()

    def _forget(self) -> None:
        """Drop gradients, and what a pass that failed half-way left in Opacus' hooks: the next record must not see it."""
        for module in self._wrapped.values():
            module.activations = []  # type: ignore[assignment]
            module.__dict__.pop("max_batch_len", None)
        for parameter in self.parameters.values():
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            parameter.__dict__.pop("_current_grad_sample", None)


def per_record_gradients(parameters: Mapping[str, nn.Parameter]) -> NDArray[np.float32]:
    """The gradients that Opacus left on the parameters, (records, dimension)."""
    rows = [parameter.grad_sample.flatten(start_dim=1) for parameter in parameters.values()]  # type: ignore[attr-defined]
    return np.asarray(torch.cat(rows, dim=1).detach().numpy(), np.float32)


def require_one_row_each(parameters: Mapping[str, nn.Parameter], records: int) -> None:
    """Refuse, naming the parameter, unless each holds exactly one row for each of `records` records."""
    for name, parameter in parameters.items():
        found = getattr(parameter, "grad_sample", None)
        if found is None:
            raise PrivacyError(
                f"{name}.B has no gradient for each record: Opacus saw no row where {records} were expected; run one "
                "backward pass through it in train mode"
            )
        if isinstance(found, list):
            raise PrivacyError(
                f"{name}.B holds the gradients of {len(found)} passes: accumulate after each backward pass"
            )
        if found.shape != (records, *parameter.shape):
            raise PrivacyError(
                f"{name}.B: Opacus saw {len(found)} rows for {records} records, gradients of shape "
                f"{tuple(found.shape)}: give one row to each record, and its candidates as constants"
            )


def require_per_record(tower: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse, naming the module or parameter, a tower in which a gradient would not be its record's alone."""
    adapter = {id(parameter) for parameter in parameters.values()}
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapter:
            raise PrivacyError(f"{name} is trainable and no part of the adapter: freeze it, requires_grad_(False)")
    for name, module in tower.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            raise PrivacyError(
                f"{name} drops out with probability {module.p}: gradients would depend on a global generator; set it to 0"
            )
        if isinstance(module, LowRankLinear) and not module.training:
            raise PrivacyError(f"{name} is in evaluation mode, where Opacus catches no activations: call train(True)")


@register_grad_sampler(LowRankLinear)  # type: ignore[untyped-decorator]
def _gradients_of_b(module: LowRankLinear, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradient of `B` for each row, (rows, dim_out, rank); Opacus calls it after the module's backward pass."""
    if module.B.dim() != 2:
        raise PrivacyError(f"`B` is shared by {len(module.B)} clients: attach the adapter without clients")
    low = activations[0] @ module.A.T  # (rows, tokens, rank)
    return {module.B: torch.einsum("nto,ntr->nor", backprops, low)}
