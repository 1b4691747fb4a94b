"""Distillation of the query tower, on public text only.

The student is a few of the teacher's layers; it learns to put a query where the teacher puts it (alignment: one minus the
cosine to the teacher's vector, which is half the squared distance of unit vectors), and to rank a public query's relevant
passage above all other public passages, whose vectors are the teacher's and constant (softmax cross-entropy). Alignment
needs no relevance, so sentences cropped from public passages serve as further queries.

The document tower stays the teacher's, so every vector that a device has indexed stays valid.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardCallback
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stillroom_server.distillery.students.towers import drop_layers, freeze, with_tower, without_dropout
from stillroom_server.distillery.training.batches import like_lengths
from stillroom_server.teacher import TeacherVectors, tower_of
from stillroom_shared.corpus import Corpus, normalize
from stillroom_shared.settings import DistilSettings

QUERY_TOKENS = 32
_ALIGNMENT_WEIGHT = 10.0
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n\s*\n|\n\s*[-*]\s")
_SENTENCE_WORDS = range(4, 33)


@dataclass(frozen=True, eq=False)
class Lessons:
    """What the student learns from.

    Attributes:
        texts: public queries and cropped sentences.
        targets: the teacher's unit vectors for them, (texts, dim).
        relevant: row of the relevant passage, or -1 for a text without relevance, (texts,).
        passages: the teacher's unit vectors of the public passages, (passages, dim).
    """

    texts: list[str]
    targets: NDArray[np.float32]
    relevant: NDArray[np.int64]
    passages: NDArray[np.float32]


def public_lessons(
    public: Corpus,
    vectors: TeacherVectors,
    settings: DistilSettings,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Lessons:
    """Teacher vectors of the public training and test queries, of cropped sentences and of the public passages.

    Public dev queries are left out, so that distillation can be tuned on them.
    """
    queries = [q for q in public.queries if q.split != "dev" and public.qrels.get(q.id)]
    row_of = {passage.id: row for row, passage in enumerate(public.passages)}
    relevant = [row_of[next(iter(public.qrels[query.id]))] for query in queries]
    known = {normalize(query.text) for query in public.queries}
    sentences = crop_sentences((p.text for p in public.passages), skip=known)
    chosen = np.random.default_rng(settings.seed).permutation(len(sentences))[: settings.sentences]
    texts = [query.text for query in queries] + [sentences[i] for i in sorted(chosen)]
    total = len(texts) + len(public.passages)
    return Lessons(
        texts=texts,
        targets=vectors.encode(texts, progress=lambda done, of: progress(done * len(texts) // of, total)),
        relevant=np.array(relevant + [-1] * (len(texts) - len(relevant)), np.int64),
        passages=vectors.encode(
            [p.full_text for p in public.passages],
            progress=lambda done, of: progress(len(texts) + done * len(public.passages) // of, total),
        ),
    )


def crop_sentences(passages: Iterable[str], *, skip: set[str]) -> list[str]:
    """Sentences of 4 to 32 words that are mostly letters, each once, sorted.

    >>> crop_sentences(["Open the archive for reading. >>> z = 1 + 1 - (2) * 4 / 5"], skip=set())
    ['Open the archive for reading.']
    """
    found: dict[str, str] = {}
    for passage in passages:
        for piece in _SENTENCE_END.split(passage):
            sentence = " ".join(piece.split())
            wordy = len(sentence.split()) in _SENTENCE_WORDS and sum(map(str.isalpha, sentence)) > 0.6 * len(sentence)
            if wordy and normalize(sentence) not in skip:
                found.setdefault(normalize(sentence), sentence)
    return sorted(found.values())


def distil(
    teacher: SentenceTransformer,
    lessons: Lessons,
    settings: DistilSettings,
    *,
    autocast: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SentenceTransformer:
    """Train a student of the teacher's `settings.layers`; returns a Sentence Transformers model of the same modules."""
    student = make_student(teacher, settings.layers)
    dataset = Dataset.from_dict({"text": lessons.texts, "label": list(range(len(lessons.texts)))})
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=0.1,
            lr_scheduler_type="linear",
            weight_decay=0.01,
            max_grad_norm=1.0,
            bf16=autocast,
            use_cpu=True,
            seed=settings.seed,
            data_seed=settings.seed,
            batch_sampler=_LikeLengths,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model=student,
            args=arguments,
            train_dataset=dataset,
            loss=AlignAndRank(student, lessons, settings),
            callbacks=[_Watcher(progress)],
        )
        trainer.remove_callback(PrinterCallback)  # our own progress stands in its place
        trainer.remove_callback(SentenceTransformerModelCardCallback)  # the release writes its own description
        trainer.train()
    return student.eval()


def make_student(teacher: SentenceTransformer, layers: Sequence[int]) -> SentenceTransformer:
    """A copy of the teacher with only these layers, reading at most 32 tokens; embeddings frozen, dropout off."""
    student = with_tower(teacher, without_dropout(freeze(drop_layers(tower_of(teacher), layers), embeddings=True)))
    student.max_seq_length = QUERY_TOKENS
    return student


class AlignAndRank(nn.Module):
    """Alignment to the teacher's vector, and ranking over all public passages, both from constant vectors.

    The label of a text is its row in the lessons.
    """

    def __init__(self, model: SentenceTransformer, lessons: Lessons, settings: DistilSettings) -> None:
        super().__init__()
        self.model = model
        self._targets = torch.from_numpy(lessons.targets)
        self._relevant = torch.from_numpy(lessons.relevant)
        self._passages = torch.from_numpy(lessons.passages)
        self._ranking_weight = settings.ranking_weight
        self._temperature = settings.temperature

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Loss of one batch: a scalar."""
        (features,) = sentence_features
        vectors = self.model(features)["sentence_embedding"].float()  # (batch, dim)
        loss: Tensor = _ALIGNMENT_WEIGHT * (1 - (vectors * self._targets[labels]).sum(-1)).mean()
        relevant = self._relevant[labels]
        ranked = relevant >= 0
        if self._ranking_weight and bool(ranked.any()):
            scores = vectors[ranked] @ self._passages.T / self._temperature  # (ranked, passages)
            ranking = nn.functional.cross_entropy(scores, relevant[ranked], reduction="sum") / len(labels)
            loss = loss + self._ranking_weight * ranking
        return loss


class _LikeLengths(DefaultBatchSampler):
    """Random batches of texts of like length: padding wasted a third of the work otherwise."""

    def __init__(self, dataset: Dataset, batch_size: int, **options: Any) -> None:
        super().__init__(range(len(dataset)), batch_size=batch_size, drop_last=False)
        self._lengths = np.array([len(text) for text in dataset["text"]])
        self._seed = int(options.get("seed", 0))
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        yield from like_lengths(self._lengths, self.batch_size, np.random.default_rng([self._seed, self._epoch]))


class _Watcher(TrainerCallback):
    """Reports finished steps."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress(state.global_step, state.max_steps)
