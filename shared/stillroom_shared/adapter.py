"""The adapter: the only part of a release that learns in federated rounds.

A low-rank update of chosen projections of the query tower (LoRA, Hu et al. 2021, arXiv 2106.09685) with `A` frozen at a
public random value and only `B` trained (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313). With `A` fixed, averaging `B` over
devices is exactly averaging the product `B A`, so a sum of updates means what the server thinks it means.

An adapted projection computes `W x + b + B (A x)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from stillroom_shared.errors import ReleaseError

Target = Literal["query", "value"]
TARGETS: tuple[Target, ...] = ("query", "value")


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Which projections are adapted, and the seed of the public random `A`.

    Attributes:
        rank: inner dimension of the update, at least 1.
        layers: indices of the adapted transformer layers, ascending.
        targets: adapted projections of each layer's self-attention.
        dim: width of the tower (input and output of the projections).
        seed: seed of `A`; public, the same on every device of a federation.

    >>> spec = AdapterSpec(rank=4, layers=(0, 1, 2), targets=("query", "value"), dim=384, seed=0)
    >>> spec.names[:2], spec.size
    (('layer.0.query', 'layer.0.value'), 9216)
    """

    rank: int
    layers: tuple[int, ...]
    targets: tuple[Target, ...]
    dim: int
    seed: int

    def __post_init__(self) -> None:
        if self.rank < 1 or self.dim < self.rank:
            raise ReleaseError(f"adapter rank {self.rank} is out of range: choose 1 to {self.dim}, the tower's width")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ReleaseError(f"adapter layers {self.layers} must be distinct layer indices in ascending order")
        if not self.targets or len(set(self.targets)) != len(self.targets) or set(self.targets) - set(TARGETS):
            raise ReleaseError(f"adapter targets {self.targets} must be distinct names among {TARGETS}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapted projections, in the order of the flat vector."""
        return tuple(f"layer.{layer}.{target}" for layer in self.layers for target in self.targets)

    @property
    def size(self) -> int:
        """Trained values in total: the length of an update."""
        return len(self.names) * self.dim * self.rank

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` is its inverse."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> AdapterSpec:
        """Read `to_json` back; an unknown or missing field raises `TypeError`."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        return cls(**values)

    def frozen(self) -> dict[str, NDArray[np.float32]]:
        """The public random `A` of each projection, (rank, dim), entries of variance 1/dim.

        PCG64 and its standard normal are stable across NumPy versions and platforms by NumPy's stream guarantee for bit
        generators; the release carries `A` inside its ONNX file, so a device never depends on that.
        """
        generator = np.random.Generator(np.random.PCG64(self.seed))
        shape = (self.rank, self.dim)
        return {name: (generator.standard_normal(shape) / np.sqrt(self.dim)).astype(np.float32) for name in self.names}


@dataclass(frozen=True, eq=False)
class Adapter:
    """Trained values `B` for one spec, as the flat float32 vector that rounds sum and devices apply.

    >>> spec = AdapterSpec(rank=2, layers=(0,), targets=("value",), dim=4, seed=0)
    >>> Adapter.zero(spec).matrices()["layer.0.value"].shape
    (4, 2)
    """

    spec: AdapterSpec
    values: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.values.shape != (self.spec.size,) or self.values.dtype != np.float32:
            raise ReleaseError(
                f"adapter values have shape {self.values.shape} and type {self.values.dtype}: "
                f"this spec needs ({self.spec.size},) float32"
            )
        if not np.isfinite(self.values).all():
            raise ReleaseError("adapter values contain NaN or infinity: discard this adapter and fetch it again")

    @classmethod
    def zero(cls, spec: AdapterSpec) -> Adapter:
        """The adapter that changes nothing: every federation starts from it."""
        return cls(spec, np.zeros(spec.size, np.float32))

    def matrices(self) -> dict[str, NDArray[np.float32]]:
        """`B` of each projection, (dim, rank), as views of the flat vector."""
        shape = (len(self.spec.names), self.spec.dim, self.spec.rank)
        return dict(zip(self.spec.names, self.values.reshape(shape), strict=True))

    def to_bytes(self) -> bytes:
        """Safetensors with one tensor for each projection and the spec as metadata."""
        return bytes(save(self.matrices(), metadata={"spec": json.dumps(self.spec.to_json(), sort_keys=True)}))

    def save(self, path: Path) -> None:
        """Write `to_bytes()`; whoever publishes it seals the folder (see `stillroom_shared.release`)."""
        path.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """Read what `save` wrote; `ReleaseError` names the file when it is not an adapter."""
        try:
            with safe_open(path, framework="numpy") as file:
                spec = AdapterSpec.from_json(json.loads((file.metadata() or {})["spec"]))
                parts = [np.asarray(file.get_tensor(name), np.float32).reshape(-1) for name in spec.names]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ReleaseError(f"{path} is not an adapter ({error}): fetch it again from its release") from error
        return cls(spec, np.concatenate(parts))
