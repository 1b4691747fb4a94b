"""From a batch to the signals that losses read, for each kind of student; what a trainer calls its loss.

    batch of texts    -> the query tower's vectors beside the teacher's
    batch of lists    -> the same, and scores of the candidates beside the teachers' scores and the known grades

| student | student_scores | student_passages |
|---|---|---|
| tower, static table | inner products | the teacher's constants, or its own (`towers = both`) |
| tower, `ranked = corpus` | inner products with every public passage | the same constants |
| late interaction | MaxSim | - |
| reranker | logits | - |

With `ranked = corpus` the teacher's scores are its own inner products with every passage, and a passage is relevant if a
list of the query grades it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.scoring.colbert import colbert_kd_scores
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from torch.nn import functional

from stillroom_server.distillery.losses.composition import Composition
from stillroom_server.distillery.losses.signals import Signals
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.teacher_tokens import TeacherTokens
from stillroom_server.distillery.training.watching import Watched, watched

Features = Mapping[str, Any]


@dataclass
class Clock:
    """How far training is, which schedules of losses follow; and what each loss was since it was last asked.

    Attributes:
        progress: 0 to 1.

    >>> clock = Clock()
    >>> clock.note({"cosine": torch.tensor(0.5), "margin_mse": torch.tensor(2.0)})
    >>> clock.note({"cosine": torch.tensor(0.25)})  # of texts, which have no margins
    >>> clock.means()
    {'loss/cosine': 0.375, 'loss/margin_mse': 2.0}
    """

    progress: float = 0.0
    _noted: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def note(self, parts: Mapping[str, Tensor]) -> None:
        """Add one batch's losses."""
        for name, value in parts.items():
            total, batches = self._noted.get(name, (torch.zeros(()), 0))
            self._noted[name] = total + value.detach().float().cpu(), batches + 1

    def means(self) -> dict[str, float]:
        """Mean losses since the last call, each over the batches that have it."""
        found = {f"loss/{name}": float(total) / batches for name, (total, batches) in self._noted.items()}
        self._noted = {}
        return found


class _Objective(nn.Module):
    """What all share: the composition, constants and the clock. `model` is put in place by the trainer."""

    def __init__(self, model: nn.Module, composition: Composition, bank: Bank, clock: Clock) -> None:
        super().__init__()
        self.model = model
        self.composition = composition
        self._bank = bank
        self._clock = clock

    def _loss(self, signals: Signals) -> Tensor:
        total, parts = self.composition(signals, self._clock.progress)
        self._clock.note(parts)
        return cast(Tensor, total)

    def _reads(self, signal: str) -> bool:
        """Whether a loss reads it: only what is read has been embedded."""
        return signal in self.composition.needs

    def _answers(self, tokens: TeacherTokens | None, numbers: NDArray[np.int64]) -> dict[str, Tensor]:
        """The teacher's token vectors of each list's first passage, where a loss reads them."""
        if tokens is None or not self._reads("teacher_passage_tokens"):
            return {}
        return tokens.of_passages(self._bank.lessons.texts(self._bank.lessons.passages[numbers, 0]))

    def _scores(self, numbers: NDArray[np.int64]) -> Tensor | None:
        scores = self._bank.scores
        return None if scores is None else torch.from_numpy(np.array(scores[numbers]))

    def _grades(self, numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._bank.lessons.grades[numbers].astype(np.float32))


class TextObjective(_Objective):
    """Of a tower or a static table, over texts.

    Args:
        teacher: its model, run on the same tokens, where a loss compares hidden states or attentions; else None.
        tokens: whose token vectors a loss reads; else None.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        composition: Composition,
        bank: Bank,
        clock: Clock,
        teacher: SentenceTransformer | None = None,
        tokens: TeacherTokens | None = None,
    ) -> None:
        super().__init__(model, composition, bank, clock)
        # In a list: a teacher must neither be trained, moved nor saved with the student.
        self._teacher = [] if teacher is None else [teacher]
        self._tokens = tokens

    def forward(self, sentence_features: Sequence[Features], labels: Tensor) -> Tensor:
        """Loss of a batch whose labels are rows of texts."""
        [features] = sentence_features
        return self._loss(Signals(**self._queries(features, _numbers(labels))))

    def _queries(self, features: Features, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Signals of the queries, by name."""
        with watched(self.model, on=bool(self._teacher)) as student:
            vectors = self.model(dict(features))["sentence_embedding"].float()  # (batch, dim)
        found: dict[str, Any] = {"student_queries": vectors}
        if "attention_mask" in features:
            found["mask"] = features["attention_mask"]
        if self._bank.vectors is not None and self._reads("teacher_queries"):
            found["teacher_queries"] = self._bank.vectors_of(rows)
        if student is not None:
            found |= _states("student", student)
            with torch.no_grad(), watched(self._teacher[0], on=True) as teacher:
                self._teacher[0](dict(features))
            found |= _states("teacher", cast(Watched, teacher))
        if self._tokens is not None:
            found |= self._tokens.of_queries(features)
        return found


class ListObjective(TextObjective):
    """Of a tower or a static table, over lists of candidates whose vectors are constants, the listed ones or the corpus."""

    def __init__(self, *args: Any, corpus: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self._corpus = corpus

    def forward(self, sentence_features: Sequence[Features], labels: Tensor) -> Tensor:
        """Loss of a batch whose labels are numbers of lists."""
        numbers = _numbers(labels)
        queries = self._queries(sentence_features[0], self._bank.lessons.queries[numbers])
        ranked = self._over_corpus if self._corpus else self._over_list
        found: dict[str, Any] = {**queries, **ranked(queries, numbers, sentence_features[1:])}
        found |= self._answers(self._tokens, numbers)
        return self._loss(Signals(**found))

    def _over_list(
        self, queries: Mapping[str, Tensor], numbers: NDArray[np.int64], passages: Sequence[Features]
    ) -> dict[str, Tensor | None]:
        constants: Tensor | None
        if passages:  # both towers learn
            columns = [self.model(dict(one))["sentence_embedding"].float() for one in passages]
            vectors = torch.stack(columns, dim=1)  # (batch, k, dim)
            constants = self._constants(numbers) if self._reads("teacher_passages") else None
        else:
            vectors = constants = cast(Tensor, self._constants(numbers))
        return {
            "student_passages": vectors,
            "teacher_passages": constants,
            "student_scores": torch.einsum("bd,bkd->bk", queries["student_queries"], vectors),
            "teacher_scores": self._scores(numbers),
            "grades": self._grades(numbers),
        }

    def _constants(self, numbers: NDArray[np.int64]) -> Tensor | None:
        return None if self._bank.vectors is None else self._bank.vectors_of(self._bank.lessons.passages[numbers])

    def _over_corpus(
        self, queries: Mapping[str, Tensor], numbers: NDArray[np.int64], passages: Sequence[Features]
    ) -> dict[str, Tensor | None]:
        corpus = self._bank.passages  # (passages, dim)
        return {
            "student_passages": corpus.expand(len(numbers), -1, -1),
            "student_scores": queries["student_queries"] @ corpus.T,
            "teacher_scores": self._bank.vectors_of(self._bank.lessons.queries[numbers]) @ corpus.T
            if self._reads("teacher_scores")
            else None,
            "grades": self._bank.grades_of(self._bank.lessons.queries[numbers]),
        }


class LateObjective(_Objective):
    """Of a late-interaction student, over lists whose passages it reads; `teacher`'s token vectors where a loss reads them."""

    def __init__(
        self,
        model: MultiVectorEncoder,
        composition: Composition,
        bank: Bank,
        clock: Clock,
        teacher: TeacherTokens | None = None,
    ) -> None:
        super().__init__(model, composition, bank, clock)
        self._teacher = teacher

    def forward(self, sentence_features: Sequence[Features], labels: Tensor) -> Tensor:
        """Loss of a batch whose labels are numbers of lists."""
        numbers = _numbers(labels)
        tokens, masks = zip(*(self._tokens(one) for one in sentence_features), strict=True)
        scores = colbert_kd_scores(tokens[0], _padded(tokens[1:]), masks[0], _padded(masks[1:]))  # (batch, k)
        taught: dict[str, Any] = {} if self._teacher is None else self._teacher.of_queries(sentence_features[0])
        taught |= self._answers(self._teacher, numbers)
        return self._loss(
            Signals(
                **taught,
                student_tokens=tokens[0],
                mask=masks[0],
                student_scores=scores,
                teacher_scores=self._scores(numbers),
                grades=self._grades(numbers),
            )
        )

    def _tokens(self, features: Features) -> tuple[Tensor, Tensor]:
        """Vectors of tokens, (batch, tokens, dim), and which of them count, (batch, tokens)."""
        found = self.model(dict(features), task=features.get("task"))
        return found["token_embeddings"].float(), found["attention_mask"].bool()


class RerankObjective(_Objective):
    """Of a cross-encoder, over lists: it reads each pair of query and passage."""

    def forward(
        self, inputs: Sequence[Sequence[str]], labels: Tensor, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """Loss of a batch whose labels are numbers of lists; `inputs` are columns of texts, the query's first."""
        numbers = _numbers(torch.as_tensor(labels))
        queries, *passages = inputs
        pairs = [(query, passage) for query, *row in zip(queries, *passages, strict=True) for passage in row]
        model = cast(CrossEncoder, self.model)
        read = batch_to_device(model.preprocess(pairs, prompt=prompt, task=task), model.device)
        logits = cast(Callable[..., dict[str, Tensor]], model)(read)["scores"].float()
        return self._loss(
            Signals(
                student_scores=logits.view(len(queries), len(passages)),
                teacher_scores=self._scores(numbers),
                grades=self._grades(numbers),
            )
        )


def _numbers(labels: Tensor) -> NDArray[np.int64]:
    return np.asarray(labels.cpu().numpy(), np.int64).reshape(-1)


def _states(whose: str, seen: Watched) -> dict[str, tuple[Tensor, ...]]:
    return {f"{whose}_states": seen.states, f"{whose}_attentions": seen.attentions}


def _padded(columns: Sequence[Tensor]) -> Tensor:
    """Columns of (batch, tokens, ...) with their tokens filled up by zeros, as (batch, columns, tokens, ...)."""
    longest = max(column.shape[1] for column in columns)
    widths = [[0, 0] * (column.dim() - 2) + [0, longest - column.shape[1]] for column in columns]
    return torch.stack([functional.pad(one, width) for one, width in zip(columns, widths, strict=True)], dim=1)
