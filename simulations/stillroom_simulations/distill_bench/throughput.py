"""How fast alignment trains, beside the plain recipe of Sentence Transformers, on the same texts for the same passes.

The plain recipe is the library's own for distillation of embeddings: random batches, float32, the teacher asked for each
batch's targets in the loop, `MSELoss`. Ours reads vectors that were made once, in batches of like length, in mixed precision
where the processor has it; making the vectors counts as part of its time. Both train the same student at the same rate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss
from torch import Tensor, nn, no_grad
from transformers import PrinterCallback

from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.students.make import make_student
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.teachers.bi_encoder import BiEncoder
from stillroom_server.distillery.teachers.settings import Precision, TeacherSettings
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.curriculum import Curriculum
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_server.distillery.vectors import VectorCache, embed_lessons
from stillroom_shared.processor import native_bfloat16
from stillroom_simulations.evaluating.towers import unit


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One way of training.

    Attributes:
        seconds: of all passes; for ours with the teacher's vectors.
        sentences_a_second: texts times passes over seconds.
        cosine: mean of the student's vectors to the teacher's, on texts held out.
    """

    seconds: float
    sentences_a_second: float
    cosine: float


FASTER = 2.5
"""Goal: sentences a second over those of the plain recipe."""
_AS_CLOSE = 0.01

Way = Callable[[SentenceTransformer, SentenceTransformer, list[str], TrainingSettings], None]


def compare_rates(
    teacher: SentenceTransformer,
    texts: list[str],
    held_out: list[str],
    student: StudentSettings,
    training: TrainingSettings,
    *,
    repeats: int = 1,
) -> dict[str, list[Rate]]:
    """Ours and the plain recipe on `texts`, in turns; each time both report how close they come on `held_out`."""
    targets = unit(np.asarray(teacher.encode(held_out, show_progress_bar=False)))
    found: dict[str, list[Rate]] = {name: [] for name in _WAYS}
    for _ in range(repeats):
        for name, way in _WAYS.items():
            found[name].append(_timed(way, teacher, texts, held_out, targets, student, training))
    return found


def rate_figures(rates: Mapping[str, Sequence[Rate]]) -> dict[str, dict[str, Any]]:
    """Medians of the repeats, and the ratio of neighbours in time with its least and largest.

    The goal holds when the least ratio does, and no repeat of ours comes less close to the teacher than the plain recipe's
    by more than `_AS_CLOSE`.
    """
    ours, plain = rates["ours"], rates["sentence-transformers"]
    ratios = [a.sentences_a_second / b.sentences_a_second for a, b in zip(ours, plain, strict=True)]
    as_close = all(a.cosine > b.cosine - _AS_CLOSE for a, b in zip(ours, plain, strict=True))
    made: dict[str, dict[str, Any]] = {
        f"rates.{name}": {
            "value": median(one.sentences_a_second for one in own),
            "unit": "sentences/s",
            "cosine": median(one.cosine for one in own),
        }
        for name, own in rates.items()
    }
    made["rates.ratio"] = {
        "value": median(ratios),
        "interval": [min(ratios), max(ratios)],
        "unit": "ratio",
        "goal": f">= {FASTER}",
        "holds": min(ratios) >= FASTER and as_close,
        "ratios": ratios,
    }
    return made


def _timed(
    way: Way,
    teacher: SentenceTransformer,
    texts: list[str],
    held_out: list[str],
    targets: NDArray[np.float32],
    settings: StudentSettings,
    training: TrainingSettings,
) -> Rate:
    student = make_student(settings, teacher)
    assert isinstance(student, SentenceTransformer)
    started = time.perf_counter()
    way(teacher, student, texts, training)
    seconds = time.perf_counter() - started
    vectors = unit(np.asarray(student.encode(held_out, show_progress_bar=False)))
    return Rate(
        seconds=seconds,
        sentences_a_second=len(texts) * training.epochs / seconds,
        cosine=float((targets * vectors).sum(axis=1).mean()),
    )


def _ours(
    teacher: SentenceTransformer, student: SentenceTransformer, texts: list[str], training: TrainingSettings
) -> None:
    losses = LossesSettings.model_validate({"cosine": {"weight": 1.0}})
    with tempfile.TemporaryDirectory() as folder:
        with LessonsWriter(Path(folder) / "lessons", candidates=1) as writer:
            writer.texts(texts, "query", writer.source("texts"))
        lessons = Lessons.open(Path(folder) / "lessons")
        precision: Precision = "bfloat16" if native_bfloat16() else "float32"
        embedder = BiEncoder(teacher, TeacherSettings(precision=precision, query_tokens=student.max_seq_length))
        vectors = embed_lessons(embedder, lessons, VectorCache(Path(folder) / "cache"), Path(folder) / "vectors.npy")
        curriculum = Curriculum(losses=losses, training=training, bank=Bank(lessons, vectors))
        curriculum.learn(student, Path(folder) / "training")


def _plain(
    teacher: SentenceTransformer, student: SentenceTransformer, texts: list[str], training: TrainingSettings
) -> None:
    loss = _InTheLoop(student, teacher)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            warmup_steps=training.warmup,
            weight_decay=training.weight_decay,
            max_grad_norm=training.gradient_norm,
            use_cpu=True,
            seed=training.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model=student, args=arguments, train_dataset=Dataset.from_dict({"text": texts}), loss=loss
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    student.train(False)


class _InTheLoop(nn.Module):
    """`MSELoss` on what the teacher says of each batch."""

    def __init__(self, model: SentenceTransformer, teacher: SentenceTransformer) -> None:
        super().__init__()
        self.model = model
        self._teacher = [teacher]  # not a part of what is trained
        self._loss = MSELoss(model)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        features = [dict(one) for one in sentence_features]
        with no_grad():
            targets = self._teacher[0](dict(features[0]))["sentence_embedding"]
        loss: Tensor = self._loss(features, targets)
        return loss


_WAYS: Mapping[str, Way] = {"ours": _ours, "sentence-transformers": _plain}
