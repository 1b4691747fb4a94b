"""Local work of a round: a few gradient steps on the adapter, from the device's own records.

A record is one query with constant vectors: its relevant passage and candidates from the device's own index (DESIGN
section 1). The loss is a softmax cross-entropy over those constants, so it is a sum over records and no record sees
another; there are no in-batch negatives. Only `B` is trained; the tower is frozen and dropout is off.

Many simulated clients share one forward pass on the frozen base, each with its own `B`. That is exact: rows of a batch
never mix, and a client's `B` receives gradient from its own rows only (tested against one client at a time).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.lowrank import LowRankLinear, attach, set_adapter, set_owners

_ROWS = 256
"""Records in one forward pass: keeps activations near 200 MB whatever the number of clients."""


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """What a device does in a round. Public constants, the same for every device.

    Attributes:
        steps: full passes over the device's records, one gradient step each.
        learning_rate: of plain gradient descent on the mean loss of the device's records.
        temperature: divides inner products of unit vectors before the softmax.
    """

    steps: int
    learning_rate: float
    temperature: float


@dataclass(frozen=True, eq=False)
class Record:
    """One training record, complete in itself.

    Attributes:
        tokens: token ids of the query, at most the release's `query_tokens`.
        candidates: (candidates, dim) float16 unit vectors; row 0 is the relevant passage. dim is that of the device's index.
    """

    tokens: tuple[int, ...]
    candidates: NDArray[np.float16]


class Trainer:
    """Computes updates for one device, or for many at once, on one copy of the frozen tower.

    `autocast` runs the matrix products in bfloat16 on processors that have it; results then differ from float32 by
    rounding only, and the reference test uses float32.
    """

    def __init__(self, query_tower: Path, spec: AdapterSpec, *, autocast: bool = False) -> None:
        self.spec = spec
        self._autocast = autocast
        self._tower = load_tower(query_tower)
        self._tower.train(False)  # dropout off; gradients flow all the same
        self._wrapped: dict[str, LowRankLinear] = attach(self._tower, spec, clients=1)

    def update(self, adapter: Adapter, records: Sequence[Record], work: LocalWork) -> NDArray[np.float32]:
        """The change of the flat adapter values, (size,), after the local work of one device; zero without records."""
        return np.asarray(self.updates(adapter, [records], work)[0], np.float32)

    def updates(self, adapter: Adapter, records: Sequence[Sequence[Record]], work: LocalWork) -> NDArray[np.float32]:
        """The same for many devices in one pass, (devices, size)."""
        devices = len(records)
        if not any(records):
            return np.zeros((devices, self.spec.size), np.float32)
        self._share(devices)
        set_adapter(self._wrapped, adapter)
        parameters = [self._wrapped[name].B for name in self.spec.names]
        start = [parameter.detach().clone() for parameter in parameters]
        for _ in range(work.steps):
            for parameter in parameters:
                parameter.grad = None
            for loss in self._losses(records, work.temperature):
                loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=work.learning_rate)
        with torch.no_grad():
            change = [(end - begin).reshape(devices, -1) for end, begin in zip(parameters, start, strict=True)]
            return np.asarray(torch.cat(change, dim=1).numpy(), np.float32)

    def record_gradients(
        self, values: NDArray[np.float32], records: Sequence[Record], temperature: float
    ) -> NDArray[np.float32]:
        """The gradient of each record's own loss at its own flat adapter values, both (records, size), many in a pass.

        Rows never mix, but share padding and blocking, so results differ from one record a pass by rounding: good enough for
        a simulation; a device uses `stillroom_client.private_training`.
        """
        found = np.zeros((len(records), self.spec.size), np.float32)
        order = sorted(range(len(records)), key=lambda row: (records[row].candidates.shape, len(records[row].tokens)))
        for block in _blocks([(row, records[row]) for row in order]):
            rows = [row for row, _ in block]
            found[rows] = self._gradients_of(values[rows], [record for _, record in block], temperature)
        return found

    def encode(self, adapter: Adapter, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Unit vectors of tokenized queries under an adapter, (queries, dim)."""
        self._share(1)
        set_adapter(self._wrapped, adapter)
        vectors = np.zeros((len(tokens), self.spec.dim), np.float32)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        with torch.inference_mode():
            for start in range(0, len(order), _ROWS):
                rows = order[start : start + _ROWS]
                owners = torch.zeros(len(rows), dtype=torch.int64)
                vectors[rows] = self._forward([tokens[i] for i in rows], owners).numpy()
        return vectors

    def tower_parameters(self) -> list[Tensor]:
        """The frozen parameters of the tower, the adapter left out."""
        return [value for name, value in self._tower.named_parameters() if not name.endswith(".B")]

    def _share(self, devices: int) -> None:
        """Give `B` one slot for each device."""
        for module in self._wrapped.values():
            if len(module.B) != devices:
                module.B = nn.Parameter(torch.zeros(devices, *module.B.shape[1:]))

    def _gradients_of(
        self, values: NDArray[np.float32], records: Sequence[Record], temperature: float
    ) -> NDArray[np.float32]:
        """One block of `record_gradients`: each record is a client of its own."""
        self._share(len(records))
        parameters = [self._wrapped[name].B for name in self.spec.names]
        with torch.no_grad():
            parts = torch.split(torch.from_numpy(values), [parameter[0].numel() for parameter in parameters], dim=1)
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part.reshape(parameter.shape))
        vectors = self._forward([record.tokens for record in records], torch.arange(len(records)))  # (rows, dim)
        found = torch.autograd.grad(record_losses(vectors, records, temperature).sum(), parameters)
        return np.asarray(torch.cat([part.flatten(start_dim=1) for part in found], dim=1).numpy(), np.float32)

    def _losses(self, records: Sequence[Sequence[Record]], temperature: float) -> Iterator[Tensor]:
        """Loss of each block of rows; together the sum over devices of the mean over each device's records."""
        rows = [(device, record) for device, own in enumerate(records) for record in own]
        rows.sort(key=lambda row: (row[1].candidates.shape, len(row[1].tokens)))
        for block in _blocks(rows):
            owners = torch.tensor([device for device, _ in block])
            weights = torch.tensor([1.0 / len(records[device]) for device, _ in block])
            vectors = self._forward([record.tokens for _, record in block], owners)  # (rows, dim)
            yield (record_losses(vectors, [record for _, record in block], temperature) * weights).sum()

    def _forward(self, tokens: Sequence[Sequence[int]], owners: Tensor) -> Tensor:
        """Mean-pooled unit vectors, (rows, dim) float32."""
        set_owners(self._wrapped, owners)
        return query_vectors(self._tower, tokens, autocast=self._autocast)


def load_tower(query_tower: Path) -> BertModel:
    """The query tower of a release, frozen."""
    # Eager attention: for queries this short, the fused one's backward pass is the slower.
    tower = BertModel.from_pretrained(
        query_tower, add_pooling_layer=False, local_files_only=True, attn_implementation="eager"
    )
    tower.requires_grad_(False)
    return tower


def query_vectors(tower: nn.Module, tokens: Sequence[Sequence[int]], *, autocast: bool = False) -> Tensor:
    """Mean-pooled unit vectors of tokenized queries, (rows, dim) float32."""
    length = max(map(len, tokens))
    ids = torch.zeros(len(tokens), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(tokens):
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = tower(input_ids=ids, attention_mask=mask).last_hidden_state  # (rows, tokens, dim)
    weights = mask.unsqueeze(-1).float()
    return functional.normalize((hidden.float() * weights).sum(1) / weights.sum(1), dim=-1)


def record_losses(vectors: Tensor, records: Sequence[Record], temperature: float) -> Tensor:
    """Softmax cross-entropy of each record over its own candidates, (rows,); as many candidates in every record.

    Candidates of a short index (`matryoshka.py`) are compared with the query's vector cut in the same way.
    """
    candidates = torch.from_numpy(np.stack([record.candidates for record in records])).float()
    if (short := candidates.shape[-1]) < vectors.shape[-1]:
        vectors = functional.normalize(vectors[:, :short], dim=-1)
    scores = torch.einsum("rd,rcd->rc", vectors, candidates) / temperature  # (rows, candidates)
    relevant = torch.zeros(len(records), dtype=torch.int64)
    return functional.cross_entropy(scores, relevant, reduction="none")


def _blocks(rows: list[tuple[int, Record]]) -> Iterator[list[tuple[int, Record]]]:
    """Runs of at most `_ROWS` rows with candidates of one shape, so that they stack without padding."""
    start = 0
    for end in range(1, len(rows) + 1):
        full = end - start == _ROWS
        if end == len(rows) or full or rows[end][1].candidates.shape != rows[start][1].candidates.shape:
            yield rows[start:end]
            start = end
