"""The coordinator's checkpoint: what all rounds so far have come to. It holds what was released, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stillroom_server.optimizer import OptimizerState
from stillroom_shared.files import replace_file

STATE_FILE = "state.npz"


def save_checkpoint(path: Path, state: OptimizerState, unclipped: Sequence[float]) -> None:
    """Write the checkpoint: whole or absent, and outlasting a power cut, or a released round would be forgotten."""
    content = io.BytesIO()
    np.savez(content, **vars(state), unclipped=np.array(unclipped, np.float64))
    replace_file(path, content.getvalue())


def load_checkpoint(path: Path, size: int) -> tuple[OptimizerState, tuple[float, ...]]:
    """The optimizer's state, and the shares of unclipped updates that rounds released."""
    if not path.exists():
        return OptimizerState.start(np.zeros(size)), ()
    with np.load(path, allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in ("iterate", "velocity", "square", "history")}
        state = OptimizerState(**values, restart=int(arrays["restart"]) if "restart" in arrays else 0)
        return state, tuple(arrays["unclipped"].tolist())
