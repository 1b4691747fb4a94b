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
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from torch import nn

from stillroom_server.distillery.compress.simulated import simulate_int8
from stillroom_server.distillery.losses.composition import Composition, compose
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.batches import Unit, list_set, text_set
from stillroom_server.distillery.training.objectives import (
    Clock,
    LateObjective,
    ListObjective,
    RerankObjective,
    TextObjective,
)
from stillroom_server.distillery.training.padding import less_padding
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_server.distillery.training.train import Student, train
from stillroom_shared.errors import SettingsError

Set = tuple[Unit, Dataset, nn.Module]


@dataclass(frozen=True, eq=False, kw_only=True)
class Curriculum:
    """Everything that training a student takes.

    Attributes:
        losses, training: settings.
        bank: lessons with what the teachers said of them.
        teacher: model whose hidden states and attentions are compared with, where a loss does that.
        seed: of the projections of losses, and added to that of batch order.
    """

    losses: LossesSettings
    training: TrainingSettings
    bank: Bank
    teacher: SentenceTransformer | None = None
    seed: int = 0

    def learn(
        self, student: Student, folder: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Train `student` in place, from the checkpoint in `folder` if there is one; see `train`.

        Raises:
            SettingsError: a loss needs what the recipe does not provide.
        """
        clock, composition = Clock(), self._composition(student)
        sets = self._sets(student, composition, clock)
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

    def _composition(self, student: Student) -> Composition:
        # Over the whole corpus a list of one candidate is enough to know what is relevant.
        corpus = isinstance(student, SentenceTransformer) and self.training.ranked == "corpus"
        layered = isinstance(student, SentenceTransformer) and self.losses.compares_layers
        towers = (bert_of(student), bert_of(self._teacher)) if layered else None
        return compose(
            self.losses,
            student_dim=_dimension(student),
            teacher_dim=self.bank.dimension,
            layers=towers and (towers[0].config.num_hidden_layers, towers[1].config.num_hidden_layers),
            widths=towers and (towers[0].config.hidden_size, towers[1].config.hidden_size),
            candidates=self.bank.lessons.candidates if self.bank.lessons.lists and not corpus else None,
            seed=self.seed,
        )

    @property
    def _teacher(self) -> SentenceTransformer:
        if self.teacher is None:
            raise SettingsError(
                "losses hidden_states and attention_maps compare layers with a bi-encoder's: name it as `documents`"
            )
        # Fused attention, which models are loaded with, gives no maps.
        bert_of(self.teacher).set_attn_implementation("eager")
        return self.teacher

    def _sets(self, student: Student, composition: Composition, clock: Clock) -> Mapping[str, Set]:
        lessons = self.bank.lessons
        numbers = np.arange(lessons.lists)
        if isinstance(student, CrossEncoder | MultiVectorEncoder):
            scored = {"student_scores", "grades"} | ({"teacher_scores"} if self.bank.scores is not None else set())
            late = isinstance(student, MultiVectorEncoder)
            composition.check(scored | ({"student_tokens", "mask"} if late else set()))
            objective = (LateObjective if late else RerankObjective)(student, composition, self.bank, clock)
            return {"lists": ("list", list_set(lessons, numbers, whole=True), objective)}
        assert isinstance(student, SentenceTransformer)
        texts, lists = self._available
        composition.check(texts | lists)
        teacher = self._teacher if self.losses.compares_layers else None
        sets: dict[str, Set] = {}
        if alone := composition.restricted(texts):
            rows = lessons.rows("query") if self.training.towers == "query" else np.arange(len(lessons))
            sets["texts"] = "text", text_set(lessons, rows), TextObjective(student, alone, self.bank, clock, teacher)
        if composition.needs - texts:
            if not lessons.lists:
                raise SettingsError("the losses need lists of candidates, and the lessons have none: add data.sources")
            corpus = self.training.ranked == "corpus"
            make = partial(ListObjective, corpus=corpus)
            both = self.training.towers == "both"
            sets["lists"] = (
                "list",
                list_set(lessons, numbers, whole=both),
                make(student, composition, self.bank, clock, teacher),
            )
        return sets

    @property
    def _available(self) -> tuple[set[str], set[str]]:
        """Names of the signals of a batch of texts, and of those that lists add, for towers and tables."""
        vectors, corpus = self.bank.vectors is not None, self.training.ranked == "corpus"
        texts = {"student_queries", "mask"} | ({"teacher_queries"} if vectors else set())
        if self.losses.compares_layers:
            texts |= {"student_states", "student_attentions", "teacher_states", "teacher_attentions"}
        if not vectors and (corpus or self.training.towers == "query"):
            raise SettingsError(
                f"training.towers is {self.training.towers} and training.ranked {self.training.ranked}: passages need vectors "
                "that stay, name their teacher as `documents`, or set towers to both and ranked to listed"
            )
        if corpus and self.training.towers == "both":
            raise SettingsError("training.ranked is corpus: its vectors are constants, set training.towers to query")
        lists = {"student_passages", "student_scores", "grades"} | (
            {"teacher_passages"} if vectors and not corpus else set()
        )
        return texts, lists | ({"teacher_scores"} if corpus or self.bank.scores is not None else set())


def _dimension(student: Student) -> int:
    if isinstance(student, CrossEncoder):
        return 1
    found: int | None = cast(Any, student).get_embedding_dimension()
    if found is None:
        raise SettingsError("the student does not say how long its vectors are: give it a pooling module")
    return int(found)
