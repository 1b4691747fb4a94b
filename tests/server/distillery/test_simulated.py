"""Simulated int8 in torch against the int8 file that ONNX Runtime runs, and what it leaves behind: nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import TINY_SPEC
from torch import nn
from transformers import BertModel

from stillroom_server.distillery.compress.simulated import rounded_inputs, rounded_weights, simulate_int8
from stillroom_server.export import export, quantize
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import SettingsError
from stillroom_shared.lowrank import attach, set_adapter

Vectors = NDArray[np.float32]
LENGTHS = (9, 3, 14, 1)


@pytest.fixture(scope="module")
def tower(tiny_towers: tuple[BertModel, BertModel]) -> BertModel:
    """A copy, so that no test changes what others share."""
    return copy.deepcopy(tiny_towers[0])


def texts(vocabulary: int) -> list[NDArray[np.int64]]:
    generator = np.random.default_rng(3)
    return [generator.integers(5, vocabulary, (1, length)) for length in LENGTHS]


def padded(rows: list[NDArray[np.int64]]) -> dict[str, torch.Tensor]:
    ids, mask = (torch.zeros(len(rows), max(LENGTHS), dtype=torch.int64) for _ in range(2))
    for number, row in enumerate(rows):
        ids[number, : row.shape[1]] = torch.from_numpy(row[0])
        mask[number, : row.shape[1]] = 1
    return {"input_ids": ids, "attention_mask": mask}


def means(tower: BertModel, inputs: dict[str, torch.Tensor]) -> Vectors:
    with torch.no_grad():
        states = tower(**inputs).last_hidden_state * inputs["attention_mask"][:, :, None]
    vectors: Vectors = nn.functional.normalize(states.sum(1), dim=-1).numpy()
    return vectors


@pytest.mark.parametrize("adapted", [False, True])
def test_a_padded_batch_computes_what_the_file_computes_one_by_one(
    tower: BertModel, tiny_adapter: Adapter, tmp_path: Path, adapted: bool
) -> None:
    """A scheme that is only like the file's trains a tower against roundings that no device makes.

    Float32 is some 0.99 away on these towers, so 0.9999 means the same roundings; a range that saw padding fails too.
    """
    adapter = tiny_adapter if adapted else Adapter.zero(TINY_SPEC)
    export(tower, tmp_path / "tower.onnx", adapter)
    quantize(tmp_path / "tower.onnx", tmp_path / "tower.int8.onnx", blockwise=False)
    session = onnxruntime.InferenceSession(tmp_path / "tower.int8.onnx", providers=["CPUExecutionProvider"])
    own, rows = copy.deepcopy(tower), texts(tower.config.vocab_size)
    set_adapter(attach(own, adapter.spec), adapter)
    plain = means(own, padded(rows))
    with simulate_int8(own):
        simulated = means(own, padded(rows))
    found = []
    for ids in rows:
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        mean = session.run(None, feed)[0][0].mean(0)
        found.append(mean / np.linalg.norm(mean))
    cosines = (np.stack(found) * simulated).sum(1)
    assert cosines.min() > 0.9999
    assert (np.stack(found) * plain).sum(1).max() < 0.9998, "as close without simulation: nothing was compared"


def test_gradients_go_straight_through() -> None:
    """The true derivative of a rounding is zero: a tower would train without an error and learn nothing."""
    torch.manual_seed(0)
    weights, x = torch.randn(3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    upstream = torch.randn(2, 5, 3)
    near_weights, near = rounded_weights(weights), rounded_inputs(x, None)
    assert not torch.equal(near_weights, weights) and not torch.equal(near, x)
    torch.autograd.backward((nn.functional.linear(near, near_weights) * upstream).sum())
    assert weights.grad is not None and x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ near_weights.detach())
    torch.testing.assert_close(weights.grad, torch.einsum("bto,bti->oi", upstream, near.detach()))


def test_every_encoder_weight_and_the_embeddings_learn(tower: BertModel) -> None:
    """A projection that was left out, or detached, stays as it is while the others move away from it."""
    own = copy.deepcopy(tower)
    with simulate_int8(own):
        own(**padded(texts(own.config.vocab_size))).last_hidden_state.square().sum().backward()
    parameters = dict(own.named_parameters())
    silent = [name for name, value in parameters.items() if value.grad is None or not value.grad.any()]
    # The bias of a key moves all scores of a query alike, so only rounding makes its gradient differ from zero.
    assert not [name for name in silent if not name.startswith("pooler") and not name.endswith("key.bias")]


def test_removal_leaves_no_trace(tower: BertModel) -> None:
    """Hooks that stay would round an exported float32 tower; renamed weights would break checkpoints and optimizers."""
    own = copy.deepcopy(tower)
    inputs = padded(texts(own.config.vocab_size))
    before, names, parameters = own(**inputs)[0], list(own.state_dict()), [id(p) for p in own.parameters()]
    simulation = simulate_int8(own)
    assert list(own.state_dict()) == names and [id(p) for p in own.parameters()] == parameters
    with pytest.raises(SettingsError, match="already"):
        simulate_int8(own)
    assert not torch.equal(own(**inputs)[0], before)
    simulation.remove()
    simulation.remove()
    assert torch.equal(own(**inputs)[0], before)
    assert not own._forward_pre_hooks and not [name for name, part in own.named_modules() if "forward" in vars(part)]


def test_a_copy_computes_with_its_own_weights(tower: BertModel) -> None:
    """A trainer that keeps a copy of the best tower would keep one that reads the other's weights."""
    own = copy.deepcopy(tower)
    with simulate_int8(own):
        twin, inputs = copy.deepcopy(own), padded(texts(own.config.vocab_size))
        before = own(**inputs)[0]
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(own(**inputs)[0], before) and not twin(**inputs)[0].any()


def test_an_additive_mask_is_refused(tower: BertModel) -> None:
    """Read as presence, an additive mask would count exactly the padding."""
    own = copy.deepcopy(tower)
    with simulate_int8(own), pytest.raises(SettingsError, match="attention_mask has shape"):
        own(input_ids=torch.ones(1, 2, dtype=torch.int64), attention_mask=torch.zeros(1, 1, 1, 2))


def test_zeros_stay_zeros() -> None:
    """A range of no width must not become NaN, which would spread over all weights."""
    assert not rounded_inputs(torch.zeros(1, 2, 3), None).any() and not rounded_weights(torch.zeros(2, 3)).any()
