"""A recipe's losses for one student: whether it can have what they read, known before any teacher has worked.

| student | has of a text | and of a list |
|---|---|---|
| tower, static table | its vector, mask and layers, and the teacher's | scores, candidates, the teacher's passages |
| late interaction | - | token vectors, scores |
| reranker | - | scores |

A teacher of layers or tokens runs on the student's own tokens, so both must read with one vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from stillroom_server.distillery.losses.composition import Composition, compose
from stillroom_server.distillery.losses.needs import needs
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_server.distillery.training.train import Student
from stillroom_shared.errors import SettingsError

_QUERY_TOKENS = frozenset({"teacher_tokens", "teacher_mask"})
_PASSAGE_TOKENS = frozenset({"teacher_passage_tokens", "teacher_passage_mask"})


@dataclass(frozen=True, eq=False, kw_only=True)
class Given:
    """What there is, or will be, beside the texts.

    Attributes:
        dimension: of the vectors of `documents`; None where there are none.
        scores: whether lists have scores.
        candidates: passages in each list; None where there are no lists.
        layers: the teacher whose hidden states and attentions are compared with.
        tokens: the teacher whose token vectors are.
    """

    dimension: int | None = None
    scores: bool = False
    candidates: int | None = None
    layers: SentenceTransformer | None = None
    tokens: MultiVectorEncoder | None = None


def fitted(
    losses: LossesSettings, training: TrainingSettings, student: Student, given: Given, *, seed: int = 0
) -> tuple[Composition, frozenset[str]]:
    """The losses of a student, and the signals that a text alone has for it.

    Raises:
        SettingsError: a loss cannot be had, with the remedy.
    """
    for teacher in (given.layers, given.tokens):
        if teacher is not None and student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
            raise SettingsError(
                "losses of layers and tokens run the teacher on the student's tokens, and their vocabularies differ: leave "
                "student.vocabulary out, or name a teacher with the student's tokenizer"
            )
    if losses.compares_layers and given.layers is None:
        raise SettingsError(
            "losses hidden_states and attention_maps compare layers with a bi-encoder's: name it as `documents`"
        )
    layered = isinstance(student, SentenceTransformer) and losses.compares_layers
    towers = (bert_of(student), bert_of(given.layers)) if layered else None
    dimension = _dimension(student)
    # Over the whole corpus a list of one candidate is enough to know what is relevant.
    corpus = isinstance(student, SentenceTransformer) and training.ranked == "corpus"
    composition = compose(
        losses,
        student_dim=dimension,
        teacher_dim=given.dimension,
        token_dims=None if given.tokens is None else (dimension, _dimension(given.tokens)),
        layers=towers and (towers[0].config.num_hidden_layers, towers[1].config.num_hidden_layers),
        widths=towers and (towers[0].config.hidden_size, towers[1].config.hidden_size),
        candidates=None if corpus else given.candidates,
        seed=seed,
    )
    texts, lists = _signals(losses, training, student, given)
    composition.check(set(texts | lists))
    if composition.needs - texts and given.candidates is None:
        raise SettingsError("the losses need lists of candidates, and the lessons have none: add data.sources")
    return composition, texts


def _signals(
    losses: LossesSettings, training: TrainingSettings, student: Student, given: Given
) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the signals of a batch of texts, and of those that lists add."""
    corpus = training.ranked == "corpus"
    lists = {"student_scores", "grades"} | (_PASSAGE_TOKENS if given.tokens is not None else set())
    of_tokens = _QUERY_TOKENS if given.tokens is not None else frozenset[str]()
    if isinstance(student, CrossEncoder | MultiVectorEncoder):
        lists |= {"teacher_scores"} if given.scores else set()
        lists |= {"student_tokens", "mask"} | of_tokens if isinstance(student, MultiVectorEncoder) else set()
        return frozenset(), frozenset(lists)
    texts = {"student_queries", "mask"} | of_tokens | ({"teacher_queries"} if given.dimension is not None else set())
    if losses.compares_layers:
        texts |= {"student_states", "student_attentions", "teacher_states", "teacher_attentions"}
    if given.dimension is None and (corpus or training.towers == "query"):
        raise SettingsError(
            f"training.towers is {training.towers} and training.ranked {training.ranked}: passages need vectors "
            "that stay, name their teacher as `documents`, or set towers to both and ranked to listed"
        )
    if corpus and training.towers == "both":
        raise SettingsError("training.ranked is corpus: its vectors are constants, set training.towers to query")
    lists |= {"student_passages"} | ({"teacher_passages"} if given.dimension is not None and not corpus else set())
    return frozenset(texts), frozenset(lists | ({"teacher_scores"} if corpus or given.scores else set()))


def reads_tokens(losses: LossesSettings) -> bool:
    """Whether any loss reads a teacher's token vectors."""
    return "teacher_tokens" in needs(losses)


def _dimension(student: Student) -> int:
    if isinstance(student, CrossEncoder):
        return 1
    found: int | None = cast(Any, student).get_embedding_dimension()
    if found is None:
        raise SettingsError("the student does not say how long its vectors are: give it a pooling module")
    return int(found)
