"""A recipe's losses for one student: whether it can have what they read, known before any teacher has worked.

| student | has of a text | and of a list |
|---|---|---|
| tower, static table | its vector, mask and layers, and the teacher's | scores, candidates, the teacher's passages |
| late interaction | - | token vectors, scores |
| reranker | - | scores |

A teacher of layers or tokens runs on the student's own tokens, so both must read with one vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from sentence_transformers import CrossEncoder, MultiVectorEncoder
from transformers import BertForSequenceClassification, BertModel

from stillroom_server.distillery.losses.composition import Composition, compose
from stillroom_server.distillery.losses.needs import needs
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.students.settings import Kind
from stillroom_server.distillery.students.towers import bert_of, first_of
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_server.distillery.training.train import Student
from stillroom_shared.errors import SettingsError

OTHER_VOCABULARY = (
    "losses of layers and tokens run the teacher on the student's tokens, and their vocabularies differ: leave "
    "student.vocabulary out, or name a teacher with the student's tokenizer"
)
_QUERY_TOKENS = frozenset({"teacher_tokens", "teacher_mask"})
_BY_PLACE = frozenset({"margin_mse", "margin_hinge"})
"""Losses to which position 0 of a list is the relevant passage; grades tell the others (`contrastive`, `soft_hard`)."""
_PASSAGE_TOKENS = frozenset({"teacher_passage_tokens", "teacher_passage_mask"})


@dataclass(frozen=True, eq=False, kw_only=True)
class Shape:
    """What losses have to know of a model.

    Attributes:
        kind: of student; a teacher that embeds is a tower, one with token vectors late interaction.
        dimension: of its vectors, or of its token vectors; 1 for a reranker.
        layers, width: of its BERT; None where there is none in it.
        vocabulary: ids by token; None is unknown, and taken for the same.
    """

    kind: Kind
    dimension: int
    layers: int | None = None
    width: int | None = None
    vocabulary: Mapping[str, int] | None = None

    @property
    def embeds(self) -> bool:
        """Whether it has one vector for each text."""
        return self.kind in ("tower", "static")


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
    layers: Shape | None = None
    tokens: Shape | None = None


def fitted(
    losses: LossesSettings, training: TrainingSettings, student: Shape, given: Given, *, seed: int = 0
) -> tuple[Composition, frozenset[str]]:
    """The losses of a student, and the signals that a text alone has for it.

    Raises:
        SettingsError: a loss cannot be had, with the remedy.
    """
    for teacher in (given.layers, given.tokens):
        if teacher is not None and _other(student.vocabulary, teacher.vocabulary):
            raise SettingsError(OTHER_VOCABULARY)
    layers, widths = _towers(student, given.layers) if losses.compares_layers else (None, None)
    # Over the whole corpus a list of one candidate is enough to know what is relevant.
    corpus = student.embeds and training.ranked == "corpus"
    if corpus and (by_place := [name for name, _ in losses.active() if name in _BY_PLACE]):
        raise SettingsError(
            f"training.ranked is corpus, and {' and '.join(by_place)} takes the first passage for the relevant one: set it to "
            "listed, or give listwise_kl or contrastive a weight instead"
        )
    if corpus and losses.contrastive.active and losses.contrastive.in_batch:
        raise SettingsError(
            "training.ranked is corpus, where all queries have the same candidates, and losses.contrastive.in_batch takes "
            "those of others: set one of them back"
        )
    composition = compose(
        losses,
        student_dim=student.dimension,
        teacher_dim=given.dimension,
        token_dims=None if given.tokens is None else (student.dimension, given.tokens.dimension),
        layers=layers,
        widths=widths,
        candidates=None if corpus else given.candidates,
        seed=seed,
    )
    texts, lists = _signals(losses, training, student, given)
    composition.check(set(texts | lists))
    _refuse_length(training, student, given, lists=bool(composition.needs - texts))
    if composition.needs - texts and given.candidates is None:
        raise SettingsError("the losses need lists of candidates, and the lessons have none: add data.sources")
    return composition, texts


def _refuse_length(training: TrainingSettings, student: Shape, given: Given, *, lists: bool) -> None:
    """Inner products with the passages' constants take vectors of their length; a projection is dropped after training."""
    constant = student.embeds and training.towers == "query" and lists
    if constant and student.dimension != given.dimension:
        raise SettingsError(
            f"the student's vectors have {student.dimension} values, and passages keep those of `documents`, which have "
            f"{given.dimension}: set student.dimension to {given.dimension}, let `begins` name a teacher of as many values, or "
            "set training.towers to both and ranked to listed"
        )


def _towers(student: Shape, teacher: Shape | None) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Layers and widths, (student, teacher); None for a student whose layers nobody sees, which is refused by signals."""
    if teacher is None:
        raise SettingsError(
            "losses hidden_states and attention_maps compare layers with a bi-encoder's: name it as `documents`"
        )
    if not student.embeds:
        return None, None
    for who, one in (("student", student), ("teacher", teacher)):
        if one.layers is None or one.width is None:
            raise SettingsError(
                f"losses hidden_states and attention_maps compare layers of BERT towers, and the {who} has none: set their "
                "weights to 0"
            )
    sizes = (student.layers, teacher.layers), (student.width, teacher.width)
    return cast(tuple[tuple[int, int], tuple[int, int]], sizes)


def _signals(
    losses: LossesSettings, training: TrainingSettings, student: Shape, given: Given
) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the signals of a batch of texts, and of those that lists add."""
    corpus = training.ranked == "corpus"
    lists = {"student_scores", "grades"} | (_PASSAGE_TOKENS if given.tokens is not None else set())
    of_tokens = _QUERY_TOKENS if given.tokens is not None else frozenset[str]()
    if not student.embeds:
        lists |= {"teacher_scores"} if given.scores else set()
        lists |= {"student_tokens", "mask"} | of_tokens if student.kind == "late-interaction" else set()
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


def _other(one: Mapping[str, int] | None, other: Mapping[str, int] | None) -> bool:
    return one is not None and other is not None and one != other


def reads_tokens(losses: LossesSettings) -> bool:
    """Whether any loss reads a teacher's token vectors."""
    return "teacher_tokens" in needs(losses)


def shape_of(model: Student) -> Shape:
    """That of a model. Raises `SettingsError` when it does not say how long its vectors are."""
    inner = getattr(first_of(model), "auto_model", None)
    tower = bert_of(model) if isinstance(inner, BertModel | BertForSequenceClassification) else None
    dimension: int | None = 1 if isinstance(model, CrossEncoder) else cast(Any, model).get_embedding_dimension()
    if dimension is None:
        raise SettingsError("the student does not say how long its vectors are: give it a pooling module")
    kind: Kind = "late-interaction" if isinstance(model, MultiVectorEncoder) else "tower"
    return Shape(
        kind="reranker" if isinstance(model, CrossEncoder) else kind,
        dimension=int(dimension),
        layers=None if tower is None else tower.config.num_hidden_layers,
        width=None if tower is None else tower.config.hidden_size,
        vocabulary=model.tokenizer.get_vocab(),
    )
