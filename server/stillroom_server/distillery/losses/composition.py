"""The weighted sum of losses that a recipe minimises.

    total = sum over losses of weight(progress) * (L + sum over prefixes d of weight_d * L(truncated to d))

A composition owns what is learned beside the student (projections), and nothing of the student: temperatures, margins and
weights are constants of training, none of them enters the student's files, and at inference its scores are used as they are.
Give its parameters to the optimizer (Sentence Transformers' trainers take those of a loss module by themselves).

| case | what happens |
|---|---|
| no loss has a weight | refused when composed |
| a signal that the recipe does not provide | `check` names loss, signal and remedy |
| a weight that is 0 now (a warm-up's first step) | computed and told, adds nothing; its projection has a gradient, 0 |
| prefixes as long as the vectors, or for losses without vectors alone | refused when composed |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillroom_server.distillery.losses.alignment import Projection
from stillroom_server.distillery.losses.checks import missing
from stillroom_server.distillery.losses.matryoshka import truncated
from stillroom_server.distillery.losses.needs import VECTORS
from stillroom_server.distillery.losses.parts import Part, Sizes, parts
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.losses.signals import Signals
from stillroom_shared.errors import SettingsError


class Composition(nn.Module):
    """Made by `compose`.

    Attributes:
        parts: the losses that count.
        prefixes: (length, factor) of each shorter vector that counts too.
        projections: what is learned beside the student, by name.
    """

    def __init__(self, losses: tuple[Part, ...], prefixes: tuple[tuple[int, float], ...], *, seed: int) -> None:
        super().__init__()
        self.parts = losses
        self.prefixes = prefixes
        generator = torch.Generator().manual_seed(seed)
        wanted = {part.learned.name: part.learned for part in losses if part.learned}
        self.projections = nn.ModuleDict(
            {name: Projection(one.inputs, one.outputs, generator) for name, one in sorted(wanted.items())}
        )

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals that it reads; grades are read too where they are."""
        return frozenset(signal for part in self.parts for signal in self._needs_of(part))

    def check(self, available: set[str]) -> None:
        """Raises `SettingsError` that names every loss with a signal that is not in `available`, and the remedies."""
        absent = [
            self._refusal(part, signal)
            for part in self.parts
            for signal in sorted(self._needs_of(part) - available)
        ]  # fmt: skip
        if absent:
            raise SettingsError("\n".join(absent))

    def restricted(self, available: set[str]) -> Composition | None:
        """The losses that `available` signals suffice for, with the same projections; None when there is none."""
        enough = tuple(part for part in self.parts if self._needs_of(part) <= available)
        if not enough:
            return None
        fewer = Composition(enough, self.prefixes, seed=0)
        fewer.projections = self.projections
        return fewer

    def weights(self, progress: float) -> dict[str, float]:
        """The factor of each loss when this share of training is done."""
        return {part.name: part.settings.at(progress) for part in self.parts}

    def forward(self, signals: Signals, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, a scalar with gradient, and each part before its weight, detached.

        Args:
            signals: what is known about the batch.
            progress: share of training that is done, from 0 to 1.

        Returns:
            the sum, and values by name; `margin_mse@128` is that of the first 128 values of the vectors.
        """
        terms: list[Tensor] = []
        told: dict[str, Tensor] = {}
        for part in self.parts:
            weight = part.settings.at(progress)
            project = self.projections[part.learned.name] if part.learned else None
            prepared = part.prepare(signals)
            views = [(part.name, weight, prepared)]
            if part.truncates:
                views += [
                    (f"{part.name}@{dim}", weight * factor, truncated(prepared, dim)) for dim, factor in self.prefixes
                ]
            for name, factor, view in views:
                value = part.value(view, project, progress)
                told[name] = value.detach()
                terms.append(factor * value)
        return torch.stack(terms).sum(), told

    def _needs_of(self, part: Part) -> frozenset[str]:
        by_scores = self.prefixes and part.truncates and "student_scores" in part.needs
        return part.needs | VECTORS if by_scores else part.needs

    def _refusal(self, part: Part, signal: str) -> str:
        if signal in part.needs:
            return missing(part.name, signal)
        return (
            f"matryoshka.dims over loss {part.name} needs {signal}: scores of shorter vectors are inner products of them, and "
            f"other scores cannot be shortened: take a tower as student, or leave matryoshka.dims empty"
        )


def compose(
    settings: LossesSettings,
    *,
    student_dim: int,
    teacher_dim: int | None = None,
    token_dims: tuple[int, int] | None = None,
    layers: tuple[int, int] | None = None,
    widths: tuple[int, int] | None = None,
    candidates: int | None = None,
    seed: int = 0,
) -> Composition:
    """The losses of the settings for a student and a teacher of these sizes; `Sizes` says what each is.

    >>> losses = LossesSettings.model_validate({"cosine": {"weight": 1}, "margin_mse": {"weight": 0.5, "warmup": 0.1}})
    >>> composition = compose(losses, student_dim=2, teacher_dim=2)
    >>> sorted(composition.needs)
    ['student_queries', 'student_scores', 'teacher_queries', 'teacher_scores']
    >>> signals = Signals(
    ...     student_queries=torch.tensor([[1.0, 0.0]]), teacher_queries=torch.tensor([[0.0, 1.0]]),
    ...     student_scores=torch.tensor([[1.0, 0.5]]), teacher_scores=torch.tensor([[3.0, 0.5]]),
    ... )
    >>> total, told = composition(signals, progress=1.0)
    >>> total.item(), {name: value.item() for name, value in told.items()}
    (3.0, {'cosine': 1.0, 'margin_mse': 4.0})

    Raises:
        SettingsError: no loss has a weight, or the sizes do not fit.
    """
    sizes = Sizes(
        student_dim=student_dim,
        teacher_dim=teacher_dim,
        token_dims=token_dims,
        layers=layers,
        widths=widths,
        candidates=candidates,
    )
    found, prefixes = parts(settings, sizes), settings.matryoshka.prefixes
    if prefixes and max(prefixes)[0] >= student_dim:
        raise SettingsError(
            f"matryoshka.dims {settings.matryoshka.dims}: give lengths below {student_dim}, that of the student's vectors, "
            "which count anyway"
        )
    if prefixes and not any(part.truncates for part in found):
        names = ", ".join(part.name for part in found)
        raise SettingsError(f"matryoshka.dims {settings.matryoshka.dims}: {names} reads no vectors: leave it empty")
    return Composition(found, prefixes, seed=seed)
