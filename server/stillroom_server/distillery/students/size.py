"""How large a student is, part by part: what a report or a search for an architecture compares.

Bytes are those of the weights alone: four each in float32; in int8 one each, plus a float32 scale for each row of a product
or a table, and vectors (biases, norms) as they are, which is what `stillroom_server.export.quantize` writes to within a few
percent. Operations count a multiplication with its addition as two, for one text of `tokens` tokens without padding, and
leave out norms, activations and softmax, which are a few percent. Looking a row up is not an operation.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn
from transformers import BertModel

from stillroom_server.distillery.students.towers import Model, bert_of, first_of, layers_of

_PLACES = (("embedding", "embeddings"), (".attention.", "attention"), ("encoder.layer", "feed_forward"))


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of one student.

    Attributes:
        embeddings: parameters of the tables of tokens, positions and types.
        attention: parameters of all layers' attention, norms included.
        feed_forward: parameters of all layers' feed-forward parts, norms included.
        head: parameters of what comes after the layers: projections, poolers, classifiers.
        float32_bytes, int8_bytes: of all weights.
        tokens: length of the text that `operations` are for.
        operations: arithmetic of one text.
    """

    embeddings: int
    attention: int
    feed_forward: int
    head: int
    float32_bytes: int
    int8_bytes: int
    tokens: int
    operations: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.embeddings + self.attention + self.feed_forward + self.head

    def to_json(self) -> str:
        """One line, with the sum."""
        return json.dumps({"parameters": self.parameters, **asdict(self)})


def size_of(student: Model, tokens: int | None = None) -> Size:
    """Measure a student; None counts operations at the most tokens it reads, and at 32 where that has no bound."""
    length = tokens or _limit(student)
    parts = {"embeddings": 0, "attention": 0, "feed_forward": 0, "head": 0}
    small = 0
    for name, parameter in student.named_parameters():
        part = next((part for text, part in _PLACES if text in name), "head")
        parts[part] += parameter.numel()
        small += parameter.numel() + 4 * len(parameter) if parameter.dim() == 2 else 4 * parameter.numel()
    return Size(
        **parts,
        float32_bytes=4 * sum(parts.values()),
        int8_bytes=small,
        tokens=length,
        operations=_operations(student, length),
    )


def _limit(student: Model) -> int:
    limit = student.max_seq_length
    return int(limit) if limit is not None and limit < 1 << 20 else 32


def _operations(student: Model, tokens: int) -> int:
    tower = None if isinstance(student[0], StaticEmbedding) else bert_of(student)
    count = sum(_product(module) for module in student if isinstance(module, Dense))
    if not isinstance(student, SentenceTransformer):
        count *= tokens  # the projection of late interaction is one of tokens
    if tower is None:
        return count + tokens * int(first_of(student).embedding_dim)
    return count + tokens * _layers(tower) + _attending(tower, tokens) + _head(student)


def _layers(tower: BertModel) -> int:
    products = [module for module in tower.encoder.modules() if isinstance(module, nn.Linear)]
    projection = getattr(tower, "projection", None)
    return sum(map(_product, [*products, *([projection] if projection is not None else [])]))


def _attending(tower: BertModel, tokens: int) -> int:
    """Queries with keys, and weights with values."""
    return sum(4 * tokens * tokens * int(layer.attention.self.all_head_size) for layer in layers_of(tower))


def _head(student: Model) -> int:
    scorer = first_of(student).auto_model
    if isinstance(scorer, BertModel):
        return 0  # its pooler, where it has one, is not used
    last = [*scorer.bert.pooler.modules(), scorer.classifier]
    return sum(_product(module) for module in last if isinstance(module, nn.Linear))


def _product(module: nn.Module) -> int:
    linear = module.linear if isinstance(module, Dense) else module
    assert isinstance(linear, nn.Linear)
    return 2 * linear.in_features * linear.out_features
