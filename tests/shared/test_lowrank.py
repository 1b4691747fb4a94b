"""The adapter on the torch side: batched clients, merging, and the zero adapter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.errors import ReleaseError
from stillroom_shared.lowrank import LowRankLinear, attach, attached, merge, set_adapter, set_owners

SPEC = AdapterSpec(rank=3, layers=(0, 1), targets=("query", "value"), dim=32, seed=7)


def tower() -> BertModel:
    """A random two-layer tower with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    model.train(False)
    return model


def random_adapter(seed: int) -> Adapter:
    return Adapter(SPEC, np.random.default_rng(seed).standard_normal(SPEC.size).astype(np.float32) * 0.3)


def batch(rows: int = 6, tokens: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[::2, 5:] = 0
    return {"input_ids": torch.randint(1, 64, (rows, tokens), generator=generator), "attention_mask": mask}


def vectors(model: BertModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = inputs["attention_mask"].unsqueeze(-1)
    hidden: torch.Tensor = model(**inputs).last_hidden_state
    return (hidden * mask).sum(1) / mask.sum(1)


def gradients(wrapped: dict[str, LowRankLinear], scalar: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(wrapped, torch.autograd.grad(scalar, [module.B for module in wrapped.values()]), strict=True))


def test_zero_adapter_changes_nothing() -> None:
    """A branch that is not exactly zero at the start would move every device away from the released tower."""
    plain, adapted = tower(), tower()
    attach(adapted, SPEC)
    assert torch.equal(vectors(plain, batch()), vectors(adapted, batch()))


def test_merged_equals_attached() -> None:
    """A transposed or mis-scaled product would ship torch weights that differ from what devices trained."""
    model = tower()
    set_adapter(attach(model, SPEC), random_adapter(3))
    expected, merged = vectors(model, batch()), merge(model)
    assert not attached(merged) and attached(model), "merge must return a plain copy and leave the adapted tower alone"
    assert set(merged.state_dict()) == set(tower().state_dict())
    torch.testing.assert_close(vectors(merged, batch()), expected, rtol=1e-4, atol=1e-5)
    # Guard: the adapter matters, so the comparison above is not of two equal towers.
    assert (vectors(tower(), batch()) - expected).abs().max() > 1e-2


def test_batched_clients_equal_one_at_a_time() -> None:
    """If a row used another client's `B`, one device's data would train another's update: forward and gradient."""
    owners, inputs = torch.tensor([2, 0, 1, 2, 2, 0]), batch()
    together = tower()
    wrapped = attach(together, SPEC, clients=3)
    with torch.no_grad():
        for client in range(3):
            for name, matrix in random_adapter(client).matrices().items():
                wrapped[name].B[client] = torch.from_numpy(matrix)
    set_owners(wrapped, owners)
    batched = vectors(together, inputs)
    weight = torch.linspace(-1, 1, batched.numel()).reshape(batched.shape)
    gradient = gradients(wrapped, (batched * weight).sum())
    for client in range(3):
        alone, rows = tower(), owners == client
        single = attach(alone, SPEC)
        set_adapter(single, random_adapter(client))
        expected = vectors(alone, {k: v[rows] for k, v in inputs.items()})
        own = gradients(single, (expected * weight[rows]).sum())
        torch.testing.assert_close(batched[rows], expected, rtol=1e-4, atol=1e-5)
        for name in SPEC.names:
            torch.testing.assert_close(gradient[name][client], own[name], rtol=1e-3, atol=1e-5)
            assert own[name].abs().max() > 1e-3


def test_only_b_is_trained() -> None:
    """A trainable base or `A` would be updated on the device and never leave it: the server's sum would be wrong."""
    model = tower()
    wrapped = attach(model, SPEC)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trained) == SPEC.size
    assert {id(p) for p in trained} == {id(w.B) for w in wrapped.values()}
    for name, a in SPEC.frozen().items():
        assert np.array_equal(wrapped[name].A.numpy(), a)


def test_names_keep_the_order_of_the_flat_vector() -> None:
    """A different order would permute an update's values between layers without any error."""
    assert tuple(attach(tower(), SPEC)) == SPEC.names


def test_set_adapter_starts_every_client_from_it() -> None:
    """A client left at zero would start its round from another point than the broadcast one."""
    wrapped = attach(tower(), SPEC, clients=3)
    set_adapter(wrapped, random_adapter(5))
    for name, matrix in random_adapter(5).matrices().items():
        assert all(np.array_equal(b, matrix) for b in wrapped[name].B.detach().numpy())


def test_misuse_is_refused() -> None:
    """Silent broadcasting would hide missing owners, a doubled adapter, or a spec for another tower."""
    model = tower()
    wrapped = attach(model, SPEC, clients=2)
    with pytest.raises(ReleaseError, match="set_owners"):
        vectors(model, batch())
    set_owners(wrapped, torch.tensor([0]))
    with pytest.raises(ReleaseError, match="6 rows"):
        vectors(model, batch())
    with pytest.raises(ReleaseError, match="holds 2 clients"):
        merge(model)
    with pytest.raises(ReleaseError, match="attached to this tower already"):
        attach(model, SPEC)
    for other in (replace(SPEC, dim=64), replace(SPEC, layers=(0, 2))):
        with pytest.raises(ReleaseError, match="does not fit"):
            attach(tower(), other)
    with pytest.raises(ReleaseError, match="attach its spec"):
        set_adapter(attach(tower(), SPEC), Adapter.zero(replace(SPEC, targets=("value",))))
    with pytest.raises(ReleaseError, match="64 columns"):
        LowRankLinear(torch.nn.Linear(32, 32), torch.zeros(3, 64))
