"""Settings of a student: which kind it is, how it begins, and what is taken from it while it learns."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stillroom_shared.settings_file import Group

Kind = Literal["tower", "static", "late-interaction", "reranker"]
Criterion = Literal["taylor", "sensitivity"]
Scope = Literal["layer", "model"]


class StudentSettings(Group):
    """Who learns: its kind, how its weights begin, and what of it stays as it begins."""

    kind: Kind = Field("tower", description="`static` is a table of token vectors and a mean, for tiny devices")
    init: Literal["layers", "scratch"] = Field(
        "layers", description="`layers` keeps some of the teacher's, `scratch` is a small BERT of the shape below"
    )
    layers: tuple[int, ...] = Field((0, 2, 5), min_length=1, description="teacher layers that are kept, ascending")
    depth: int = Field(3, ge=1, le=48, description="layers of a student from scratch")
    width: int = Field(192, ge=4, le=4096, description="width of a student from scratch, a multiple of its heads")
    heads: int = Field(6, ge=1, le=64, description="attention heads in a layer of a student from scratch")
    feed_forward: int = Field(768, ge=1, le=65536, description="feed-forward neurons in a layer of such a student")
    embeddings: Literal["teacher", "random"] = Field(
        "teacher", description="what the embeddings from scratch begin as: the teacher's, narrowed by SVD, or noise"
    )
    vocabulary: int | None = Field(
        None, ge=1, description="most tokens that are kept, those that public texts use; none: the teacher's vocabulary"
    )
    rank: int | None = Field(
        None, ge=1, description="static: numbers kept of a token, mapped back to the teacher's space; none: all of them"
    )
    dimension: int | None = Field(
        None, ge=1, description="length of a vector; none: the teacher's, so that the student lives in its space"
    )
    token_dimension: int = Field(64, ge=1, description="late interaction: length of a token's vector")
    tokens: int | None = Field(
        None, ge=3, description="tokens of a text that are read; none: 32, or 256 of a pair for a reranker"
    )
    passage_tokens: int = Field(256, ge=3, description="late interaction: tokens of a passage that are read")
    freeze_embeddings: bool = Field(
        True,
        description="leave the embeddings of tokens, positions and types as they are; a static student, which is nothing but "
        "such a table, learns it whatever this says",
    )
    freeze_layers: tuple[int, ...] = Field((), description="the student's own layers that do not learn")
    seed: int = Field(0, ge=0, description="seed of all that begins random")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers {self.layers}: give the teacher's layers, from 0, in ascending order, each once")
        if self.init == "scratch" and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: change one of them")
        if self.init == "scratch" and self.embeddings == "random" and self.freeze_embeddings and self.kind != "static":
            raise ValueError("embeddings that begin random must learn: set freeze_embeddings to false")
        if beyond := [layer for layer in self.freeze_layers if not 0 <= layer < self.student_depth]:
            raise ValueError(f"freeze_layers {beyond}: the student has layers 0 to {self.student_depth - 1}")
        return self

    @property
    def student_depth(self) -> int:
        """Layers that the student begins with."""
        return len(self.layers) if self.init == "layers" else self.depth

    @property
    def text_tokens(self) -> int:
        """Tokens of a text, or of a reranker's pair, that are read, special tokens included."""
        return self.tokens or (256 if self.kind == "reranker" else 32)


class PruningSettings(Group):
    """What is taken from a student, in how many steps, and who teaches it in between."""

    heads: float = Field(0.0, ge=0, lt=1, description="fraction of the attention heads that is removed")
    neurons: float = Field(0.0, ge=0, lt=1, description="fraction of the feed-forward neurons that is removed")
    weights: float = Field(
        0.0, ge=0, lt=1, description="fraction of the single weights that becomes zero; smaller when packed, not faster"
    )
    criterion: Criterion = Field(
        "sensitivity",
        description="`taylor` needs a teacher's vectors of the student's length, or a teacher's scores for a reranker; "
        "`sensitivity` asks how far what the student says would move",
    )
    scope: Scope = Field(
        "layer", description="`layer` removes as much from each layer, `model` what matters least anywhere"
    )
    texts: int = Field(
        512,
        ge=1,
        description="public queries, or pairs of query and passage for a reranker, that importance is measured on",
    )
    steps: int = Field(1, ge=1, le=100, description="rounds of pruning, each followed by training")
    teacher: Literal["original", "pruned"] = Field(
        "original", description="who teaches after each step: the teacher, or the student as it was before the step"
    )
    seed: int = Field(0, ge=0, description="seed of the random directions of `sensitivity`")

    @property
    def teaches_itself(self) -> bool:
        """Whether the student is its successor's teacher."""
        return self.active and self.teacher == "pruned"

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return max(self.heads, self.neurons, self.weights) > 0
