"""The server's steps, compared with the formulas of their papers and with torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillroom_server.optimizer import OptimizerState, ServerOptimizer

UPDATES = np.random.default_rng(0).normal(size=(6, 5))


def iterates(optimizer: ServerOptimizer) -> np.ndarray:
    state = OptimizerState.start(np.zeros(5))
    for update in UPDATES:
        state = optimizer.step(state, update)
    return state.history


def test_adam_is_that_of_torch() -> None:
    """A missing bias correction makes the first steps ten times as long."""
    values = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    reference = torch.optim.Adam([values], lr=0.1, betas=(0.9, 0.99), eps=1e-5)
    expected = []
    for update in UPDATES:
        values.grad = torch.from_numpy(-update)  # an update points downhill
        reference.step()
        expected.append(values.detach().numpy().copy())
    found = iterates(ServerOptimizer(name="adam", learning_rate=0.1, momentum=0.9, averaging=0.0))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_momentum_is_that_of_torch() -> None:
    """Momentum that scales the update by (1 - momentum) is ten times slower at the same rate."""
    values = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    reference = torch.optim.SGD([values], lr=0.1, momentum=0.9)
    expected = []
    for update in UPDATES:
        values.grad = torch.from_numpy(-update)
        reference.step()
        expected.append(values.detach().numpy().copy())
    found = iterates(ServerOptimizer(learning_rate=0.1, momentum=0.9, averaging=0.0))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(("averaging", "rows"), [(0.0, 1), (0.5, 3), (1.0, 6)])
def test_the_published_values_are_the_mean_of_the_last_iterates(averaging: float, rows: int) -> None:
    """An average that begins at the start carries the untrained adapter along."""
    optimizer = ServerOptimizer(learning_rate=1.0, momentum=0.5, averaging=averaging)
    state = OptimizerState.start(np.zeros(5))
    for update in UPDATES:
        state = optimizer.step(state, update)
    np.testing.assert_allclose(optimizer.released(state), state.history[-rows:].mean(axis=0))
