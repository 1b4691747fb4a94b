"""Which losses count, how much, and when: the part of a recipe that `composition` reads. The losses' modules have formulas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import Field, model_validator

from stillroom_server.distillery.losses.alignment import Side
from stillroom_server.distillery.losses.layers import AttentionDistance
from stillroom_server.distillery.losses.schedules import Schedule, scheduled
from stillroom_server.distillery.losses.tokens import Pooling
from stillroom_shared.settings_file import Group

_TEMPERATURE = "divides scores before the softmax, while training only"
_SCALE = (
    "multiplies the student's scores where they meet the teacher's: cosines lie within 2 of each other, logits do not"
)
_LAYERS = "teacher's layer for each of the student's, -1 for none; empty for even distances"


class Weighted(Group):
    """One loss: its share of the sum over training."""

    weight: float = Field(0.0, ge=0, description="factor in the sum of losses, at the end of training")
    start_weight: float = Field(0.0, ge=0, description="the same at the start; not read when the schedule is constant")
    schedule: Schedule = Field("constant", description="how the factor goes from start to end")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of training in which the factor first rises from 0")

    @property
    def active(self) -> bool:
        """Whether it ever counts."""
        return self.weight > 0 or (self.schedule != "constant" and self.start_weight > 0)

    def at(self, progress: float) -> float:
        """The factor when this share of training is done."""
        return scheduled(self.schedule, progress, start=self.start_weight, end=self.weight, warmup=self.warmup)


class L2Settings(Weighted):
    """Mean squared distance of the student's vectors to the teacher's."""

    side: Side = Field("queries", description="which vectors are aligned")


class CosineSettings(Weighted):
    """Mean of one minus the cosine of the student's vectors to the teacher's."""

    side: Side = Field("queries", description="which vectors are aligned")


class MarginMseSettings(Weighted):
    """MarginMSE: the student's margins to each negative are the teacher's."""

    student_scale: float = Field(1.0, gt=0, description=_SCALE)


class MarginHingeSettings(Weighted):
    """Hinge: the relevant passage leads each negative by a margin, which may change over training."""

    margin: float = Field(0.2, ge=0, description="margin at the end of training, in units of the student's scores")
    start_margin: float = Field(0.0, ge=0, description="the same at the start; not read when constant")
    margin_schedule: Schedule = Field("constant", description="how the margin goes from start to end")

    def margin_at(self, progress: float) -> float:
        """The margin when this share of training is done."""
        return scheduled(self.margin_schedule, progress, start=self.start_margin, end=self.margin)


class ListwiseKlSettings(Weighted):
    """Kullback-Leibler divergence of the student's distribution over candidates from the teacher's, times T squared."""

    temperature: float = Field(1.0, gt=0, description=f"{_TEMPERATURE}, for student and teacher alike")
    student_scale: float = Field(1.0, gt=0, description=_SCALE)


class ContrastiveSettings(Weighted):
    """InfoNCE: candidates with a grade, or position 0 without grades, against negatives that a teacher mined."""

    temperature: float = Field(0.05, gt=0, description=_TEMPERATURE)
    in_batch: bool = Field(False, description="candidates of the batch's other queries are negatives too")


class SoftHardSettings(Weighted):
    """The teacher's distribution and the known relevant passages together."""

    alpha: float = Field(0.5, ge=0, le=1, description="share of the teacher; the rest is the grades'")
    temperature: float = Field(1.0, gt=0, description=f"{_TEMPERATURE}, in the teacher's share")
    hard_temperature: float = Field(1.0, gt=0, description=f"{_TEMPERATURE}, in the grades' share")
    student_scale: float = Field(1.0, gt=0, description=_SCALE)


class HiddenStatesSettings(Weighted):
    """Hidden states follow the teacher's, token by token."""

    layer_map: tuple[Annotated[int, Field(ge=-1)], ...] = Field((), description=f"{_LAYERS}; 0 is the embedding output")


class AttentionMapsSettings(Weighted):
    """Attention probabilities follow the teacher's."""

    layer_map: tuple[Annotated[int, Field(ge=-1)], ...] = Field((), description=f"{_LAYERS}; 0 is the first layer")
    distance: AttentionDistance = Field("kl", description="how far two maps are apart")


class TokenPoolingSettings(Weighted):
    """The student's vector of a query lies where the teacher's token vectors point together."""

    pooling: Pooling = Field("mean", description="weights of tokens: equal, or by what the relevant passage answers")
    temperature: float = Field(
        0.1, gt=0, description="divides similarities in `attended`; large values make weights equal"
    )


class TokenAlignmentSettings(Weighted):
    """A late-interaction student's token vectors lie where the teacher's do."""


class MatryoshkaSettings(Group):
    """Prefixes of vectors are vectors too: the losses of vectors count for them as well."""

    dims: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="lengths of prefixes; the whole vector counts anyway"
    )
    weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="factor of each length; empty for 1 each"
    )

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if len(set(self.dims)) < len(self.dims):
            raise ValueError(f"dims {self.dims}: give each length once")
        if self.weights and len(self.weights) != len(self.dims):
            raise ValueError(f"weights {self.weights} for dims {self.dims}: give one for each, or none")
        return self

    @property
    def prefixes(self) -> tuple[tuple[int, float], ...]:
        """(length, factor) of each."""
        return tuple(zip(self.dims, self.weights or (1.0,) * len(self.dims), strict=True))


class LossesSettings(Group):
    """What a recipe minimises: a weighted sum.

    >>> from stillroom_shared.settings_file import load
    >>> losses = load(LossesSettings(), None, {"cosine.weight": "1", "matryoshka.dims": "64,128"})
    >>> [name for name, _ in losses.active()], losses.matryoshka.prefixes
    (['cosine'], ((64, 1.0), (128, 1.0)))
    """

    l2: L2Settings = L2Settings()
    cosine: CosineSettings = CosineSettings()
    margin_mse: MarginMseSettings = MarginMseSettings()
    margin_hinge: MarginHingeSettings = MarginHingeSettings()
    listwise_kl: ListwiseKlSettings = ListwiseKlSettings()
    contrastive: ContrastiveSettings = ContrastiveSettings()
    soft_hard: SoftHardSettings = SoftHardSettings()
    hidden_states: HiddenStatesSettings = HiddenStatesSettings()
    attention_maps: AttentionMapsSettings = AttentionMapsSettings()
    token_pooling: TokenPoolingSettings = TokenPoolingSettings()
    token_alignment: TokenAlignmentSettings = TokenAlignmentSettings()
    matryoshka: MatryoshkaSettings = MatryoshkaSettings()

    @property
    def compares_layers(self) -> bool:
        """Whether any loss compares the student's layers with the teacher's."""
        return self.hidden_states.active or self.attention_maps.active

    def active(self) -> Iterator[tuple[str, Weighted]]:
        """Losses that count, by name."""
        for name in type(self).model_fields:
            group = getattr(self, name)
            if isinstance(group, Weighted) and group.active:
                yield name, group
