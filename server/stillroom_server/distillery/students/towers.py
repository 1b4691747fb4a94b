"""Towers of students: some of a teacher's layers, or a small BERT from scratch, without dropout.

**Layers**: the student starts as the teacher with layers left out (Sanh et al. 2019, arXiv 1910.01108; Jiao et al. 2020,
arXiv 1909.10351 compare which). **Scratch**: any depth, width, heads and feed-forward size. Where it is narrower than the
teacher, its embeddings are the teacher's on their leading right singular vectors: of all tables of that rank the closest in
the Frobenius norm (Eckart and Young 1936), so tokens that the teacher holds for alike begin alike. One rotation serves
tokens, positions and types, since a BERT adds them up.

Dropout is off in the modules and in the config, so it stays off when the student is loaded again: a student imitates a fixed
target, and devices need dropout 0 for gradients of single records (DESIGN section 1).

| case | what happens |
|---|---|
| layers that the teacher lacks, not ascending or none | `SettingsError` |
| embeddings of the teacher, wider than the teacher's | `SettingsError`: begin random |
| as wide as the teacher's | copied as they are |
| more tokens than the teacher has positions | `SettingsError` |
| vectors of tokens that are longer than the tower is wide | `SettingsError` |
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel

from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_shared.errors import SettingsError

Model = SentenceTransformer | CrossEncoder | MultiVectorEncoder
AnyModel = TypeVar("AnyModel", SentenceTransformer, CrossEncoder, MultiVectorEncoder)
BertLike = TypeVar("BertLike", BertModel, BertForSequenceClassification)
_SHAPE = frozenset(
    {"vocab_size", "pad_token_id", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    | {"max_position_embeddings", "head_size", "layer_heads", "layer_neurons", "output_size"}
)
_NAMES = frozenset({"model_type", "architectures", "transformers_version"})
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def bert_of(model: Model) -> BertModel:
    """The transformer inside a bi-encoder, a cross-encoder or a late-interaction model; `SettingsError` if not a BERT."""
    inner = getattr(first_of(model), "auto_model", None)
    tower = inner.bert if isinstance(inner, BertForSequenceClassification) else inner
    if not isinstance(tower, BertModel):
        raise SettingsError(f"the model's tower is a {type(inner).__name__}: students are made of BERT towers only")
    return tower


def layers_of(tower: BertModel) -> list[Any]:
    """The layers; Any, because torch types what stands in a `ModuleList` as a tensor or a module."""
    return list(tower.encoder.layer)


def first_of(model: Model) -> Any:
    """What reads a text; Any for the same reason."""
    return model[0]


def linear_of(module: object) -> nn.Linear | None:
    """The map of a `Dense` that does nothing else; None of any other module."""
    if not isinstance(module, Dense) or module.use_residual or not isinstance(module.activation_function, nn.Identity):
        return None
    return module.linear


def with_tower(model: AnyModel, tower: BertModel) -> AnyModel:
    """A copy of the model around another tower of the same width; the tower itself is not copied."""
    # What stands in the memo is taken for copied already, so the old tower is not.
    student = copy.deepcopy(model, {id(bert_of(model)): tower})
    scorer = first_of(student).auto_model
    if scorer is not tower:  # a cross-encoder's head has a config of its own, with settings that the tower's lacks
        shape = {name: value for name, value in tower.config.to_dict().items() if name in _SHAPE}
        rest = {name: value for name, value in scorer.config.to_dict().items() if name not in _NAMES}
        scorer.config = type(tower.config)(**(rest | shape))
    return student


def refuse_sizes(settings: StudentSettings, *, width: int, positions: int) -> None:
    """Raises `SettingsError` for a student that a teacher of this width, with so many positions, cannot begin."""
    if settings.kind == "static":  # it has neither layers nor positions
        if (own := settings.dimension or 0) > width:
            raise SettingsError(f"dimension {own} is above the teacher's {width}: a static student has at most as many")
        return
    scratch = settings.init == "scratch"
    if scratch and settings.embeddings == "teacher" and settings.width > width:
        raise SettingsError(
            f"width {settings.width} is above the teacher's {width}: set embeddings to random, or be narrower"
        )
    own = settings.width if scratch else width
    if settings.kind == "late-interaction" and settings.token_dimension > own:
        raise SettingsError(
            f"token_dimension {settings.token_dimension} is above the tower's width {own}: choose at most as many"
        )
    read = {"tokens": settings.text_tokens}
    if settings.kind == "late-interaction":
        read["passage_tokens"] = settings.passage_tokens
    for name, tokens in read.items():
        if tokens > positions:
            raise SettingsError(f"{name} {tokens}: the teacher knows {positions} positions, read at most as many")


def drop_layers(tower: BertModel, layers: Sequence[int]) -> BertModel:
    """A copy of a tower with only these layers. Raises `SettingsError` for layers that it does not have."""
    depth = tower.config.num_hidden_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise SettingsError(f"layers {tuple(layers)}: give ascending layer numbers from 0 to {depth - 1}")
    # What is left out is not copied first: it stands in the memo as if it were done already.
    left_out = {id(layer): nn.Identity() for number, layer in enumerate(tower.encoder.layer) if number not in layers}
    student = copy.deepcopy(tower, dict(left_out))
    student.encoder.layer = nn.ModuleList(student.encoder.layer[number] for number in layers)
    for number, layer in enumerate(layers_of(student)):
        layer.attention.self.layer_idx = number
    student.config.num_hidden_layers = len(layers)
    return student


def from_scratch(settings: StudentSettings, teacher: BertModel) -> BertModel:
    """A small BERT of the settings' shape, with the teacher's vocabulary; equal for an equal seed."""
    source = teacher.config
    fields = source.to_dict() | {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.heads,
        "intermediate_size": settings.feed_forward,
        "model_type": BertConfig.model_type,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        student = BertModel(BertConfig(**fields), add_pooling_layer=teacher.pooler is not None)
    if settings.embeddings == "teacher":
        _copy_embeddings(student, teacher)
    return student


@torch.no_grad()
def _copy_embeddings(student: BertModel, teacher: BertModel) -> None:
    width, wide = student.config.hidden_size, teacher.config.hidden_size
    basis = None if width == wide else leading_directions(teacher.embeddings.word_embeddings.weight, width)
    for name in _TABLES:
        table = teacher.embeddings.get_parameter(f"{name}.weight")
        student.embeddings.get_parameter(f"{name}.weight").copy_(table if basis is None else table @ basis)
    if basis is None:
        student.embeddings.LayerNorm.load_state_dict(teacher.embeddings.LayerNorm.state_dict())


@torch.no_grad()
def leading_directions(rows: Tensor, count: int) -> Tensor:
    """The leading right singular vectors of a table (n, dim) as columns, (dim, count), the largest first.

    From the Gram matrix, (dim, dim) in float64, rather than from the tall table. Signs are settled, so that equal tables give
    equal directions on every machine.
    """
    tall = rows.double()
    directions: Tensor = principal_directions(tall.T @ tall)[1][:, :count].to(rows.dtype)
    return directions


def principal_directions(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (dim,) of a symmetric matrix (dim, dim), falling, and its eigenvectors as columns, with settled signs.

    The value of largest magnitude in each is positive.
    """
    values, vectors = torch.linalg.eigh(moments)  # ascending
    vectors = vectors.flip(1)
    largest = vectors.abs().argmax(0)
    return values.flip(0), vectors * torch.sign(vectors[largest, torch.arange(vectors.shape[1])])


def without_dropout(tower: BertLike) -> BertLike:
    """The same tower or scorer, dropout off here and in its config; attention computed in the way that trains fastest."""
    for module in tower.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        setattr(tower.config, name, 0.0)
    plain_attention(tower)
    return tower


def plain_attention(model: nn.Module) -> None:
    """Have every transformer in a model compute attention in the way that is fastest here: as plain products.

    The fused attention of a processor makes one product for each head of each text in its backward pass. A step of 64 pairs in
    bfloat16 took 1.2 to 1.4 times as long at 128 tokens and 1.3 to 1.8 times at 256, one without gradients 1.0 to 1.1 times;
    in float32 they are equal within a tenth.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while this lasts; then each module is in its own mode again, which may differ from its parent's."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def freeze(tower: BertModel, *, embeddings: bool, layers: Sequence[int] = ()) -> BertModel:
    """The same tower, learning everywhere else. Loading a folder forgets it: freeze again."""
    tower.requires_grad_(True)
    tower.embeddings.requires_grad_(not embeddings)
    for number in layers:
        tower.encoder.layer[number].requires_grad_(False)
    return tower
