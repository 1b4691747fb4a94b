"""Each loss of the settings as one value: what it reads, the projection that it learns, and how it is computed.

This is the only place where names in the settings meet functions. Sizes that do not fit, and layer maps that name layers which
are not there, are refused here, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from stillroom_server.distillery.losses.alignment import cosine, l2
from stillroom_server.distillery.losses.checks import missing
from stillroom_server.distillery.losses.layers import attention_maps, hidden_states, uniform_map, uniform_state_map
from stillroom_server.distillery.losses.listwise import contrastive, listwise_kl, soft_hard
from stillroom_server.distillery.losses.margins import margin_hinge, margin_mse
from stillroom_server.distillery.losses.needs import reads
from stillroom_server.distillery.losses.settings import (
    AttentionMapsSettings,
    ContrastiveSettings,
    CosineSettings,
    HiddenStatesSettings,
    L2Settings,
    ListwiseKlSettings,
    LossesSettings,
    MarginHingeSettings,
    MarginMseSettings,
    SoftHardSettings,
    TokenPoolingSettings,
    Weighted,
)
from stillroom_server.distillery.losses.signals import Signals
from stillroom_server.distillery.losses.tokens import token_alignment, with_pooled_teacher
from stillroom_shared.errors import SettingsError


class Learned(NamedTuple):
    """A projection by name; losses that name the same one share it."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is known of student and teacher before the first batch; None is unknown, and refused where a loss needs it.

    Attributes:
        student_dim: length of the student's vectors (of its token vectors, for late interaction; 1 for a reranker).
        teacher_dim: length of the teacher's vectors.
        token_dims: length of token vectors, (student, teacher); the student's is read by `token_alignment` only.
        layers: number of transformer layers, (student, teacher).
        widths: of hidden states, (student, teacher).
        candidates: passages in each list.
    """

    student_dim: int
    teacher_dim: int | None = None
    token_dims: tuple[int, int] | None = None
    layers: tuple[int, int] | None = None
    widths: tuple[int, int] | None = None
    candidates: int | None = None


Value = Callable[[Signals, nn.Module | None, float], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """One loss of a composition.

    Attributes:
        name: as in the settings.
        settings: its weight and schedule.
        needs: names of `Signals` fields.
        value: from signals, the projection and progress, to a scalar.
        prepare: what is done to signals before they are truncated.
        learned: the projection that it trains, if any.
        truncates: whether shorter vectors mean something to it.
    """

    name: str
    settings: Weighted
    needs: frozenset[str]
    value: Value
    prepare: Callable[[Signals], Signals] = lambda signals: signals
    learned: Learned | None = None
    truncates: bool = True


def parts(settings: LossesSettings, sizes: Sizes) -> tuple[Part, ...]:
    """The losses that count, in the settings' order. Raises `SettingsError`."""
    found = tuple(_BUILDERS[name](group, sizes) for name, group in settings.active())
    if not found:
        raise SettingsError(f"no loss has a weight: set one of {', '.join(f'{name}.weight' for name in _BUILDERS)}")
    return found


def _alignment(name: str, function: Callable[..., Tensor], settings: L2Settings | CosineSettings, sizes: Sizes) -> Part:
    if sizes.teacher_dim is None:
        raise SettingsError(missing(name, "teacher_queries"))
    return Part(
        name=name,
        settings=settings,
        needs=reads(name, settings),
        value=lambda signals, project, _: function(signals, side=settings.side, project=project),
        learned=_learned("vectors", sizes.student_dim, sizes.teacher_dim),
    )


def _over_scores(name: str, settings: Weighted, sizes: Sizes, value: Value) -> Part:
    needs = reads(name, settings)
    if sizes.candidates is not None and sizes.candidates < 2 and "student_scores" in needs:
        raise SettingsError(
            f"loss {name} compares candidates, and lists have {sizes.candidates}: prepare lists of 2 or more"
        )
    return Part(name=name, settings=settings, needs=needs, value=value)


def _margin_mse(settings: MarginMseSettings, sizes: Sizes) -> Part:
    def value(signals: Signals, _: nn.Module | None, progress: float) -> Tensor:
        return margin_mse(signals, student_scale=settings.student_scale)

    return _over_scores("margin_mse", settings, sizes, value)


def _margin_hinge(settings: MarginHingeSettings, sizes: Sizes) -> Part:
    def value(signals: Signals, _: nn.Module | None, progress: float) -> Tensor:
        return margin_hinge(signals, margin=settings.margin_at(progress))

    return _over_scores("margin_hinge", settings, sizes, value)


def _listwise_kl(settings: ListwiseKlSettings, sizes: Sizes) -> Part:
    def value(signals: Signals, _: nn.Module | None, progress: float) -> Tensor:
        return listwise_kl(signals, temperature=settings.temperature, student_scale=settings.student_scale)

    return _over_scores("listwise_kl", settings, sizes, value)


def _contrastive(settings: ContrastiveSettings, sizes: Sizes) -> Part:
    def value(signals: Signals, _: nn.Module | None, progress: float) -> Tensor:
        return contrastive(signals, temperature=settings.temperature, in_batch=settings.in_batch)

    return _over_scores("contrastive", settings, sizes, value)


def _soft_hard(settings: SoftHardSettings, sizes: Sizes) -> Part:
    def value(signals: Signals, _: nn.Module | None, progress: float) -> Tensor:
        return soft_hard(
            signals,
            alpha=settings.alpha,
            temperature=settings.temperature,
            hard_temperature=settings.hard_temperature,
            student_scale=settings.student_scale,
        )

    return _over_scores("soft_hard", settings, sizes, value)


def _hidden_states(settings: HiddenStatesSettings, sizes: Sizes) -> Part:
    if sizes.layers is None or sizes.widths is None:
        raise SettingsError(missing("hidden_states", "teacher_states"))
    student, teacher = sizes.layers
    layer_map = settings.layer_map or uniform_state_map(student, teacher)
    _check_map("hidden_states", layer_map, student + 1, teacher + 1)
    return Part(
        name="hidden_states",
        settings=settings,
        needs=reads("hidden_states", settings),
        value=lambda signals, project, _: hidden_states(signals, layer_map=layer_map, project=project),
        learned=_learned("states", *sizes.widths),
        truncates=False,
    )


def _attention_maps(settings: AttentionMapsSettings, sizes: Sizes) -> Part:
    if sizes.layers is None:
        raise SettingsError(missing("attention_maps", "teacher_attentions"))
    layer_map = settings.layer_map or uniform_map(*sizes.layers)
    _check_map("attention_maps", layer_map, *sizes.layers)
    return Part(
        name="attention_maps",
        settings=settings,
        needs=reads("attention_maps", settings),
        value=lambda signals, _, progress: attention_maps(signals, layer_map=layer_map, distance=settings.distance),
        truncates=False,
    )


def _token_pooling(settings: TokenPoolingSettings, sizes: Sizes) -> Part:
    if sizes.token_dims is None:
        raise SettingsError(missing("token_pooling", "teacher_tokens"))
    return Part(
        name="token_pooling",
        settings=settings,
        needs=reads("token_pooling", settings),
        # Pooled before vectors are truncated: what the passage answers is told from whole token vectors.
        prepare=partial(with_pooled_teacher, pooling=settings.pooling, temperature=settings.temperature),
        value=lambda signals, project, _: cosine(signals, project=project, loss="token_pooling"),
        learned=_learned("pooled", sizes.student_dim, sizes.token_dims[1]),
    )


def _token_alignment(settings: Weighted, sizes: Sizes) -> Part:
    if sizes.token_dims is None:
        raise SettingsError(missing("token_alignment", "teacher_tokens"))
    return Part(
        name="token_alignment",
        settings=settings,
        needs=reads("token_alignment", settings),
        value=lambda signals, project, _: token_alignment(signals, project=project),
        learned=_learned("tokens", *sizes.token_dims),
        truncates=False,
    )


def _learned(name: str, inputs: int, outputs: int) -> Learned | None:
    return Learned(name, inputs, outputs) if inputs != outputs else None


def _check_map(loss: str, layer_map: tuple[int, ...], student: int, teacher: int) -> None:
    if len(layer_map) != student or max(layer_map) >= teacher or max(layer_map) < 0:
        raise SettingsError(
            f"{loss}.layer_map {layer_map}: give one number for each of the student's {student}, "
            f"from 0 to {teacher - 1} or -1 for none, and not only -1"
        )


# Each builder takes its own kind of settings; that they belong together is what this table says.
_BUILDERS: Mapping[str, Callable[[Any, Sizes], Part]] = {
    "l2": partial(_alignment, "l2", l2),
    "cosine": partial(_alignment, "cosine", cosine),
    "margin_mse": _margin_mse,
    "margin_hinge": _margin_hinge,
    "listwise_kl": _listwise_kl,
    "contrastive": _contrastive,
    "soft_hard": _soft_hard,
    "hidden_states": _hidden_states,
    "attention_maps": _attention_maps,
    "token_pooling": _token_pooling,
    "token_alignment": _token_alignment,
}
