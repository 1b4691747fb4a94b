"""The adapter on the torch side: a BERT tower whose chosen projections compute `W x + b + B (A x)`.

Training and export share this module, so that what a device trains is what a release carries (LoRA, Hu et al. 2021,
arXiv 2106.09685; `A` frozen, Sun et al. 2024, arXiv 2403.12313). One forward pass can serve many clients on the shared
frozen base: each then has its own `B`, applied as a batched product (as in Punica, Chen et al. 2023, arXiv 2310.18547).

The only module of this room that imports torch; nothing else here imports it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.errors import ReleaseError


class LowRankLinear(nn.Module):
    """A linear projection with a low-rank branch: `base(x) + (x Aᵀ) Bᵀ`.

    Attributes:
        base: the frozen projection, dim_in to dim_out.
        A: (rank, dim_in) buffer, public and never trained.
        B: (dim_out, rank) parameter; (clients, dim_out, rank) when many clients share the forward pass.
        owners: (batch,) indices of the client that owns each row; required exactly when `B` has a client axis.

    >>> layer = LowRankLinear(nn.Linear(3, 2), torch.ones(1, 3), clients=2)
    >>> with torch.no_grad():
    ...     _ = layer.B[1].fill_(1.0)  # client 0 keeps zeros
    >>> layer.owners, x = torch.tensor([0, 1]), torch.ones(2, 1, 3)
    >>> (layer(x) - layer.base(x)).round(decimals=4).squeeze(1).tolist()
    [[0.0, 0.0], [3.0, 3.0]]
    """

    A: Tensor

    def __init__(self, base: nn.Linear, a: Tensor, *, clients: int | None = None) -> None:
        super().__init__()
        rank, dim_in = a.shape
        if dim_in != base.in_features:
            raise ReleaseError(f"A has {dim_in} columns, the projection {base.in_features} inputs: they must agree")
        self.base = base
        self.register_buffer("A", a.detach().clone())
        lead = () if clients is None else (clients,)
        self.B = nn.Parameter(torch.zeros(*lead, base.out_features, rank))
        self.owners: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Project (batch, tokens, dim_in) to (batch, tokens, dim_out)."""
        low = x @ self.A.T  # (batch, tokens, rank)
        if self.B.dim() == 2:
            return self.base(x) + low @ self.B.T  # type: ignore[no-any-return]  # nn.Linear.__call__ is untyped
        if self.owners is None or self.owners.shape != x.shape[:1]:
            raise ReleaseError(
                f"{len(self.B)} clients share this projection but `owners` does not name one for each of the "
                f"{len(x)} rows: call set_owners before the forward pass"
            )
        # index_select, because its backward is one index_add; advanced indexing sorts the indices first.
        own = self.B.index_select(0, self.owners)  # (batch, dim_out, rank)
        return self.base(x) + torch.bmm(low, own.transpose(1, 2))  # type: ignore[no-any-return]


def attach(model: BertModel, spec: AdapterSpec, clients: int | None = None) -> dict[str, LowRankLinear]:
    """Wrap the projections that `spec` names, in place, with `B` zero; freeze everything else.

    Args:
        clients: number of clients that share a forward pass, or None for one adapter.

    Returns:
        The wrapped projections by name, in the order of the flat vector (`spec.names`).

    Raises:
        ReleaseError: the tower has another width, lacks a layer, or has an adapter attached already.
    """
    check_fit(model.config, spec)
    if attached(model):
        raise ReleaseError("an adapter is attached to this tower already: merge it, or start from the plain tower")
    model.requires_grad_(False)
    frozen = spec.frozen()
    wrapped = {}
    for layer in spec.layers:
        attention = _self_attention(model, layer)
        for target in spec.targets:
            name = f"layer.{layer}.{target}"
            base = attention.get_submodule(target)
            assert isinstance(base, nn.Linear)
            wrapped[name] = LowRankLinear(base, torch.from_numpy(frozen[name]), clients=clients).to(base.weight.device)
            setattr(attention, target, wrapped[name])
    return wrapped


def check_fit(config: BertConfig, spec: AdapterSpec) -> None:
    """Raise `ReleaseError` unless a tower of this configuration can take adapters of this spec."""
    if spec.dim != config.hidden_size or spec.layers[-1] >= config.num_hidden_layers:
        raise ReleaseError(
            f"adapter spec {spec} does not fit a tower of {config.num_hidden_layers} layers "
            f"and width {config.hidden_size}: choose its layers and dim"
        )


def attached(model: BertModel) -> dict[str, LowRankLinear]:
    """The wrapped projections of a tower by name; empty for a plain one."""
    return {
        f"layer.{number}.{target}": module
        for number in range(model.config.num_hidden_layers)
        for target, module in _self_attention(model, number).named_children()
        if isinstance(module, LowRankLinear)
    }


def set_adapter(wrapped: Mapping[str, LowRankLinear], adapter: Adapter) -> None:
    """Load `B` into the wrapped projections; where many clients share them, every client starts from it."""
    if set(wrapped) != set(adapter.spec.names):
        raise ReleaseError(f"the adapter is for {adapter.spec.names}, the tower has {tuple(wrapped)}: attach its spec")
    with torch.no_grad():
        for name, matrix in adapter.matrices().items():
            wrapped[name].B.copy_(torch.from_numpy(matrix))


def set_owners(wrapped: Mapping[str, LowRankLinear], owners: Tensor | None) -> None:
    """State which client owns each row of the next batch: (batch,) int64 indices."""
    for module in wrapped.values():
        module.owners = owners


def merge(model: BertModel) -> BertModel:
    """A plain copy of an adapted tower, with `B A` added into the weights it adapts.

    Raises:
        ReleaseError: many clients share the tower, so there is no single `B` to merge.
    """
    plain = copy.deepcopy(model)
    for name, module in attached(plain).items():
        if module.B.dim() != 2:
            raise ReleaseError(f"{name} holds {len(module.B)} clients: merge a tower that was attached without clients")
        with torch.no_grad():
            module.base.weight += module.B @ module.A
        _, layer, target = name.split(".")
        setattr(_self_attention(plain, int(layer)), target, module.base)
    return plain


def _self_attention(model: BertModel, layer: int) -> nn.Module:
    return model.get_submodule(f"encoder.layer.{layer}.attention.self")
