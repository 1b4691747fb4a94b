"""Local work under `local`: query-level DP-SGD on the device's records (see `stillroom_shared.local_mechanism`).

Opacus (Yousefpour et al. 2021, arXiv 2109.12298) computes the gradient of each record; clipping to the integer grid, coins
and noise are the mechanism's. Opacus' own would not do: `make_private` takes sampling rate and denominator from the size of
the private data, and its noise and sums are of floating-point numbers (arXiv 2207.10635).

Guarantees:
    - Each forward pass holds one record. Rows of one pass share its padding and the blocking of its matrix products, so
      that a record moves the last bits of other gradients (measured: by up to 600 grid steps), which the sensitivity
      of a sum of integers leaves out. This way a gradient is a function of its record and the adapter, bit for bit,
      for three times the time of one pass over ten records.
    - Every pass is checked: Opacus saw one row for each record, in every trained parameter, once. Otherwise `PrivacyError`
      names the culprit and nothing has left the device.
    - Only the adapter is trained, dropout is off, the module is in train mode (otherwise Opacus catches no activations).

None of these refusals depends on the records.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from stillroom_client.training import Record, load_tower, query_vectors, record_losses
from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.errors import PrivacyError, ProtocolError
from stillroom_shared.local_mechanism import Local
from stillroom_shared.lowrank import LowRankLinear, attach, set_adapter
from stillroom_shared.randomness import Randomness


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

        The round must have been charged to the device's ledger (`stillroom_shared.local_mechanism.charge`). Without
        records the update is noise.

        Raises:
            PrivacyError: Opacus does not see one row for each record, or more than the adapter would be trained.
            ProtocolError: mechanism and adapter differ in dimension.
        """
        set_adapter(self._wrapped, adapter)
        optimizer = IntegerOptimizer(self.parameters, mechanism, learning_rate=learning_rate, randomness=randomness)
        own = records[-mechanism.records :]
        for _ in range(mechanism.steps):
            coins = mechanism.sample(randomness)
            chosen = [record for record, taken in zip(own, coins, strict=False) if taken]
            self.accumulate(optimizer, chosen, temperature)
            optimizer.step()
        return self._values() - adapter.values

    def accumulate(self, optimizer: IntegerOptimizer, records: Sequence[Record], temperature: float) -> None:
        """Add the bounded gradient of each record to the optimizer's sum, one pass for each."""
        for record in records:
            self.backward([record], temperature)
            optimizer.accumulate(records=1)

    def backward(self, records: Sequence[Record], temperature: float) -> None:
        """One pass of Opacus over records with equally many candidates: a row for each in every `grad_sample`."""
        require_per_record(self.tower, self.parameters)
        vectors = query_vectors(self.tower, [record.tokens for record in records])
        losses = record_losses(vectors, records, temperature)  # (rows,)
        with warnings.catch_warnings():
            # Of the lowest layer, whose inputs are frozen embeddings: its outputs are all that is needed.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            losses.sum().backward()  # type: ignore[no-untyped-call]

    def _values(self) -> NDArray[np.float32]:
        flat = [parameter.detach().reshape(-1) for parameter in self.parameters.values()]
        return np.asarray(torch.cat(flat).numpy(), np.float32)


class IntegerOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is published without types
    """Opacus' optimizer with sums of integers and discrete noise: gradient descent on a mechanism's releases.

    Attributes:
        total: (dimension,) int64, the bounded gradients since the last step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mechanism: Local,
        *,
        learning_rate: float,
        randomness: Randomness,
    ) -> None:
        super().__init__(
            torch.optim.SGD(list(parameters.values()), lr=learning_rate),
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",  # the release is divided by the mechanism's denominator already
        )
        size = sum(parameter.numel() for parameter in parameters.values())
        if size != mechanism.dimension:
            raise ProtocolError(
                f"the mechanism is for {mechanism.dimension} values, the adapter has {size}: build it from the adapter"
            )
        self._parameters, self._mechanism, self._randomness = dict(parameters), mechanism, randomness
        self.total = np.zeros(mechanism.dimension, np.int64)
        self.zero_grad()

    def accumulate(self, *, records: int) -> None:
        """Take over what the last pass left, after checking that it was a pass over `records` records."""
        require_one_row_each(self._parameters, records)
        self.clip_and_accumulate()
        self.zero_grad()

    def clip_and_accumulate(self) -> None:
        """Bound the gradient of each record to the grid and add it to `total`."""
        for gradient in per_record_gradients(self._parameters):
            self.total += self._mechanism.bound(gradient)

    def add_noise(self) -> None:
        """Turn `total` into a release, in `grad`. A sum is noised once: afterwards `total` is zero."""
        released = self._mechanism.release(self.total, self._randomness)
        self.total = np.zeros_like(self.total)
        start = 0
        for parameter in self._parameters.values():
            part = released[start : start + parameter.numel()]
            parameter.grad = torch.from_numpy(part).to(parameter.dtype).view_as(parameter)
            start += parameter.numel()

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Noise what was accumulated, possibly nothing: an empty batch is a release like any other."""
        if any(getattr(parameter, "grad_sample", None) is not None for parameter in self.params):
            raise PrivacyError("a pass was not accumulated: call accumulate(records=...) after each backward pass")
        self.add_noise()
        return True


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
