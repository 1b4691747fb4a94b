"""What a student of a recipe learns from, put together: losses, batches, and the trainer that runs them.

| student | learns from texts | learns from lists |
|---|---|---|
| tower, static table | with losses of the queries alone: alignment, hidden states, attentions | with every loss |
| late interaction, reranker | never | with every loss |

A tower learns from texts and lists in turns, by their numbers. Where no loss needs lists, none are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from torch import nn

from stillroom_server.distillery.compress.simulated import simulate_int8
from stillroom_server.distillery.losses.composition import Composition
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.batches import Unit, list_set, text_set
from stillroom_server.distillery.training.fitting import Given, fitted, reads_tokens, shape_of
from stillroom_server.distillery.training.objectives import (
    Clock,
    LateObjective,
    ListObjective,
    RerankObjective,
    TextObjective,
)
from stillroom_server.distillery.training.padding import less_padding
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_server.distillery.training.teacher_tokens import TeacherTokens
from stillroom_server.distillery.training.train import Student, train

Set = tuple[Unit, Dataset, nn.Module]


@dataclass(frozen=True, eq=False, kw_only=True)
class Curriculum:
    """Everything that training a student takes.

    Attributes:
        losses, training: settings.
        bank: lessons with what the teachers said of them.
        teacher: model whose hidden states and attentions are compared with, where a loss does that.
        tokens: model whose token vectors are compared with, where a loss does that.
        seed: of the projections of losses, and added to that of batch order.
    """

    losses: LossesSettings
    training: TrainingSettings
    bank: Bank
    teacher: SentenceTransformer | None = None
    tokens: MultiVectorEncoder | None = None
    seed: int = 0

    def learn(
        self, student: Student, folder: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Train `student` in place, from the checkpoint in `folder` if there is one; see `train`.

        Raises:
            SettingsError: a loss needs what the recipe does not provide.
        """
        composition, texts = fitted(self.losses, self.training, shape_of(student), self._given, seed=self.seed)
        sets = self._sets(student, composition, texts, clock := Clock())
        reads = not isinstance(student, SentenceTransformer) or self.training.towers == "both"
        settings = self.training.model_copy(update={"seed": self.training.seed + self.seed})
        simulated = simulate_int8(bert_of(student)) if settings.quantized else nullcontext()
        padded = less_padding(student) if isinstance(student, CrossEncoder) else nullcontext()
        with simulated, padded:
            train(
                student,
                sets,
                self.bank.lessons,
                settings,
                folder,
                composition=composition,
                clock=clock,
                passages=reads,
                progress=progress,
            )

    @property
    def _given(self) -> Given:
        lessons = self.bank.lessons
        return Given(
            dimension=self.bank.dimension,
            scores=self.bank.scores is not None,
            candidates=lessons.candidates if lessons.lists else None,
            layers=None if self._layers is None else shape_of(self._layers),
            tokens=shape_of(self.tokens) if self.tokens is not None and reads_tokens(self.losses) else None,
        )

    @property
    def _layers(self) -> SentenceTransformer | None:
        """The teacher whose layers are seen, where a loss compares them."""
        return self.teacher if self.losses.compares_layers else None

    @property
    def _seen(self) -> TeacherTokens | None:
        """The same of its tokens."""
        return TeacherTokens(self.tokens) if self.tokens is not None and reads_tokens(self.losses) else None

    def _sets(
        self, student: Student, composition: Composition, texts: frozenset[str], clock: Clock
    ) -> Mapping[str, Set]:
        lessons = self.bank.lessons
        numbers = np.arange(lessons.lists)
        layers, seen = self._layers, self._seen
        if layers is not None:
            # Fused attention, which models are loaded with, gives no maps.
            bert_of(layers).set_attn_implementation("eager")
        if isinstance(student, MultiVectorEncoder):
            late = LateObjective(student, composition, self.bank, clock, seen)
            return {"lists": ("list", list_set(lessons, numbers, whole=True), late)}
        if isinstance(student, CrossEncoder):
            objective = RerankObjective(student, composition, self.bank, clock)
            return {"lists": ("list", list_set(lessons, numbers, whole=True), objective)}
        assert isinstance(student, SentenceTransformer)
        both, beside = self.training.towers == "both", (self.bank, clock, layers, seen)
        sets: dict[str, Set] = {}
        if alone := composition.restricted(set(texts)):
            rows = np.arange(len(lessons)) if both else lessons.rows("query")
            sets["texts"] = "text", text_set(lessons, rows), TextObjective(student, alone, *beside)
        if composition.needs - texts:
            ranked = ListObjective(student, composition, *beside, corpus=self.training.ranked == "corpus")
            sets["lists"] = "list", list_set(lessons, numbers, whole=both), ranked
        return sets
