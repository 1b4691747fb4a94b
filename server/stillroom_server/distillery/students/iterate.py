"""Pruning in steps, with training in between: less is lost than by one cut of the same size.

Each step removes the same fraction of what is left (the geometric schedule of Frankle and Carbin 2019, arXiv 1803.03635).
After a step the student learns from its teacher again: from the original one, or from itself as it was before the step, a
teacher assistant that is close enough to be imitated (Mirzadeh et al. 2020, arXiv 1902.03393). Who teaches is a setting,
because neither always wins: close teachers are easier to follow, and pass on what they have lost.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from stillroom_server.distillery.students.importance import Texts
from stillroom_server.distillery.students.magnitude import apply_masks, held, masks_of, prune_magnitude
from stillroom_server.distillery.students.pruning import prune_structured
from stillroom_server.distillery.students.settings import PruningSettings
from stillroom_server.distillery.students.towers import AnyModel

Train = Callable[[AnyModel, SentenceTransformer | CrossEncoder | MultiVectorEncoder], AnyModel]


def prune_iteratively(
    student: AnyModel,
    settings: PruningSettings,
    train: Train[AnyModel],
    *,
    texts: Texts = (),
    targets: NDArray[np.float32] | None = None,
    original: SentenceTransformer | CrossEncoder | MultiVectorEncoder | None = None,
) -> AnyModel:
    """Prune and train `settings.steps` times.

    Args:
        train: (student, teacher) to the trained student, which may be the same object.
        texts, targets: what importance is measured on (`prune_structured`); not needed for single weights.
        original: the teacher that stays the same; None for the student as it is given.

    Returns:
        The student after the last training; pruned weights are zero in it.
    """
    step = each_step(settings)
    original = student if original is None else original
    for _ in range(settings.steps):
        teacher = student if settings.teacher == "pruned" else original
        pruned = prune_once(student, step, texts, targets)
        masks = masks_of(pruned)
        with held(pruned, masks):
            student = train(pruned, teacher)
        if settings.weights:
            apply_masks(student, masks)  # for trainers that hand back another object, or an average of several
    return student


def prune_once(
    student: AnyModel, settings: PruningSettings, texts: Texts = (), targets: NDArray[np.float32] | None = None
) -> AnyModel:
    """By structure first, then single weights of what is left; the given student is not changed."""
    if settings.heads or settings.neurons:
        student = prune_structured(student, settings, texts, targets)
    return prune_magnitude(student, settings.weights)


def each_step(settings: PruningSettings) -> PruningSettings:
    """What one of the steps removes, of what is left before it.

    >>> each_step(PruningSettings(neurons=0.75, steps=2)).neurons
    0.5
    """
    names = ("heads", "neurons", "weights")
    fractions = {name: 1 - (1 - getattr(settings, name)) ** (1 / settings.steps) for name in names}
    return settings.model_copy(update={**fractions, "steps": 1})
