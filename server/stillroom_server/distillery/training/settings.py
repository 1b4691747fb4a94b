"""How a student is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stillroom_shared.settings_file import Group

Learned = Literal["query", "both"]
Ranked = Literal["listed", "corpus"]


class TrainingSettings(Group):
    """Of the trainer of Sentence Transformers that the student's kind has."""

    towers: Learned = Field(
        "query", description="`query`: passages keep the vectors of `documents`; `both`: the student embeds them too"
    )
    ranked: Ranked = Field(
        "listed", description="what a query's softmax is over: its `listed` candidates, or the whole `corpus`"
    )
    quantized: bool = Field(
        False, description="simulate int8 in the forward pass, so that the student learns to bear it"
    )
    epochs: float = Field(3.0, gt=0, le=1000, description="passes over what is learned from")
    batch_size: int = Field(64, ge=1, le=8192, description="texts, or lists, in a step of one process")
    accumulate: int = Field(1, ge=1, le=1024, description="batches whose gradients make one step")
    learning_rate: float = Field(5e-4, gt=0, lt=1, description="peak learning rate")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of steps in which the rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="how the rate falls afterwards")
    weight_decay: float = Field(0.01, ge=0, lt=1, description="decoupled, of AdamW")
    gradient_norm: float = Field(1.0, gt=0, description="longer gradients are shortened to this")
    bfloat16: Literal["auto", "on", "off"] = Field(
        "auto", description="mixed precision; `auto`: where the processor multiplies bfloat16 natively"
    )
    save_minutes: float = Field(2.0, gt=0, description="an interrupted run loses at most this much")
    log_steps: int = Field(20, ge=1, description="steps between two points of the TensorBoard curves")
    seed: int = Field(0, ge=0, description="of batch order")
