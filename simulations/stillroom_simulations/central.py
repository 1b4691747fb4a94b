"""Central fine-tuning: what the same adapter would gain if all records lay in one place. The ceiling for federation.

AdamW on `B` over mini-batches of the pooled records, with a linear decay. No privacy, no clipping; only a yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stillroom_client.training import LocalWork, Record, Trainer
from stillroom_shared.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class CentralWork:
    """Steps of `batch_size` records; the peak learning rate decays linearly to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    temperature: float


def fine_tune_centrally(
    trainer: Trainer,
    records: Sequence[Record],
    work: CentralWork,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Adapter:
    """The adapter after training on all records together, from zero."""
    generator = np.random.default_rng([seed, 0xCE])
    one_step = LocalWork(steps=1, learning_rate=1.0, temperature=work.temperature)
    values = torch.nn.Parameter(torch.zeros(trainer.spec.size))
    optimizer = torch.optim.AdamW([values], lr=work.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=work.steps)
    for step in range(1, work.steps + 1):
        batch = [records[i] for i in generator.choice(len(records), min(work.batch_size, len(records)), replace=False)]
        adapter = Adapter(trainer.spec, values.detach().numpy().copy())
        # One plain step of length one is minus the gradient of the batch's mean loss.
        values.grad = torch.from_numpy(-trainer.update(adapter, batch, one_step))
        optimizer.step()
        schedule.step()
        progress(step, work.steps)
    return Adapter(trainer.spec, values.detach().numpy().astype(np.float32))
