"""A student before it learns, from its settings and its teacher.

| kind | what comes back | modules |
|---|---|---|
| tower | `SentenceTransformer` | Transformer, Pooling (the teacher's), Dense where widths differ, Normalize |
| static | `SentenceTransformer` | StaticEmbedding, Dense where `rank` is set, Normalize |
| late-interaction | `MultiVectorEncoder` | Transformer, Dense (tokens), MultiVectorMask, Normalize (tokens) |
| reranker | `CrossEncoder` | Transformer with one score |

All are modules of Sentence Transformers, so each saves, loads and trains as any model of its kind. A cross-encoder that
teaches a tower needs nothing here: the tower begins from the bi-encoder whose space it is to live in, and the
cross-encoder is a teacher of scores (`teachers/`).

Equal settings, teacher and seed give equal weights. The teacher is not changed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.students.static import make_static
from stillroom_server.distillery.students.towers import (
    Model,
    bert_of,
    drop_layers,
    first_of,
    freeze,
    from_scratch,
    leading_directions,
    refuse_sizes,
    with_tower,
    without_dropout,
)
from stillroom_server.distillery.students.vocabulary import trim_vocabulary
from stillroom_shared.errors import SettingsError


def make_student(settings: StudentSettings, teacher: Model, texts: Sequence[str] = ()) -> Model:
    """A student of the settings' kind.

    Args:
        teacher: a bi-encoder for towers, static tables and late interaction (or a late-interaction model for the last); a
            cross-encoder for a reranker, or a bi-encoder whose tower it begins from, with a head that has learned nothing.
        texts: public texts in which a static student counts tokens, and whose tokens a smaller vocabulary keeps; read for
            nothing else.

    Raises:
        SettingsError: the teacher is of another kind, or lacks what the settings want of it.
        DataError: the vocabulary is to be smaller, and there are no texts.
    """
    student = _with_all_tokens(settings, teacher, texts)
    if settings.vocabulary is None or settings.vocabulary >= len(student.tokenizer.get_vocab()):
        return student
    smaller: Model = trim_vocabulary(student, texts, size=settings.vocabulary).student  # type: ignore[type-var]
    return smaller


def _with_all_tokens(settings: StudentSettings, teacher: Model, texts: Sequence[str]) -> Model:
    if settings.kind == "reranker":
        return _reranker(settings, teacher)
    if settings.kind == "late-interaction":
        return _late_interaction(settings, teacher)
    if not isinstance(teacher, SentenceTransformer):
        raise SettingsError(
            f"a {settings.kind} student begins from a bi-encoder, not from a {type(teacher).__name__}: name the bi-encoder "
            "whose space it shall live in, and let this teacher score"
        )
    return make_static(settings, teacher, texts) if settings.kind == "static" else _tower(settings, teacher)


def _bert(settings: StudentSettings, teacher: BertModel) -> BertModel:
    refuse_sizes(settings, width=teacher.config.hidden_size, positions=teacher.config.max_position_embeddings)
    layers = settings.init == "layers"
    student = drop_layers(teacher, settings.layers) if layers else from_scratch(settings, teacher)
    freeze(student, embeddings=settings.freeze_embeddings, layers=settings.freeze_layers)
    return without_dropout(student)


def _tower(settings: StudentSettings, teacher: SentenceTransformer) -> SentenceTransformer:
    tower = _bert(settings, bert_of(teacher))
    width, wide = tower.config.hidden_size, bert_of(teacher).config.hidden_size
    space = teacher.get_embedding_dimension() or wide
    dimension = settings.dimension or space
    if width == wide and dimension == space:
        student = with_tower(teacher, tower)
    else:
        first = copy.deepcopy(teacher[0], {id(bert_of(teacher)): tower})
        modules: list[nn.Module] = [first, Pooling(width, pooling_mode=teacher[1].pooling_mode)]
        if width != dimension:
            modules.append(_dense(_orthogonal(dimension, width, settings.seed), "sentence_embedding"))
        student = SentenceTransformer(modules=[*modules, Normalize()], device="cpu")
        student.similarity_fn_name = "cosine"
    student.max_seq_length = settings.text_tokens
    return student


def _late_interaction(settings: StudentSettings, teacher: Model) -> MultiVectorEncoder:
    if isinstance(teacher, CrossEncoder):
        raise SettingsError("a late-interaction student begins from a bi-encoder or a late-interaction model")
    tower = _bert(settings, bert_of(teacher))
    first = copy.deepcopy(first_of(teacher), {id(bert_of(teacher)): tower})
    first.query_length, first.document_length = settings.text_tokens, settings.passage_tokens
    first.max_seq_length = max(settings.text_tokens, settings.passage_tokens)
    width, dimension = tower.config.hidden_size, settings.token_dimension
    known = [module for module in teacher if isinstance(module, Dense)]
    if isinstance(teacher, MultiVectorEncoder) and known and known[0].in_features == width:
        weight = _narrowed(known[0].linear.weight, dimension)
    else:
        weight = _orthogonal(dimension, width, settings.seed)
    last = [MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
    modules = [first, _dense(weight, "token_embeddings"), *last]
    return MultiVectorEncoder(modules=modules, device="cpu", prompts=_prompts(teacher))


def _reranker(settings: StudentSettings, teacher: Model) -> CrossEncoder:
    tower = _bert(settings, bert_of(teacher))
    same_width = tower.config.hidden_size == bert_of(teacher).config.hidden_size
    if isinstance(teacher, CrossEncoder) and same_width:
        student: CrossEncoder = with_tower(teacher, tower)
    else:
        student = _new_reranker(tower, teacher, settings.seed)
    without_dropout(first_of(student).auto_model)
    student.max_seq_length = settings.text_tokens
    return student


def _new_reranker(tower: BertModel, teacher: Model, seed: int) -> CrossEncoder:
    """A tower under a head of one score that has learned nothing."""
    config = copy.deepcopy(tower.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        scorer = BertForSequenceClassification(config)
        tower.pooler = scorer.bert.pooler if tower.pooler is None else tower.pooler
        scorer.bert = tower
        scorer.save_pretrained(folder)
        teacher.tokenizer.save_pretrained(folder)
        student: CrossEncoder = CrossEncoder(folder, device="cpu", local_files_only=True)
    first_of(student).auto_model.bert = tower  # as it was frozen
    return student


def _prompts(teacher: Model) -> dict[str, str]:
    return {name: teacher.prompts.get(name) or "" for name in ("query", "document")}


def _orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    """A random matrix with orthonormal rows or columns, (rows, columns): keeps inner products as well as any unlearned map."""
    weight = torch.empty(rows, columns)
    nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(seed))
    return weight


def _narrowed(weight: Tensor, dimension: int) -> Tensor:
    """A learned projection (known, width) cut to `dimension` outputs: of that rank the closest to it, rotated."""
    return (leading_directions(weight.detach().T, dimension).T @ weight.detach()).contiguous()


def _dense(weight: Tensor, name: str) -> Dense:
    dimension, width = weight.shape
    linear = nn.Identity()
    return Dense(width, dimension, bias=False, activation_function=linear, init_weight=weight, module_input_name=name)
