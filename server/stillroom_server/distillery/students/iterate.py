"""Pruning in steps, with training in between: less is lost than by one cut of the same size.

Each step removes the same fraction of what is left (the geometric schedule of Frankle and Carbin 2019, arXiv 1803.03635):
after step i of n a part (1 - f)^(i/n) is left. Heads and neurons are few, so they are counted from those that there were
before the first step: the last step leaves what one cut would, however many steps there were. Single weights are many, and
are counted from those that are left.

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
from stillroom_server.distillery.students.pruning import Counts, counts_of, prune_structured
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
    original, begun = student if original is None else original, counts_of(student)
    for number in range(1, settings.steps + 1):
        teacher = student if settings.teacher == "pruned" else original
        pruned = prune_once(student, at_step(settings, number), texts, targets, begun=begun)
        masks = masks_of(pruned)
        with held(pruned, masks):
            student = train(pruned, teacher)
        if settings.weights:
            apply_masks(student, masks)  # for trainers that hand back another object, or an average of several
    return student


def prune_once(
    student: AnyModel,
    settings: PruningSettings,
    texts: Texts = (),
    targets: NDArray[np.float32] | None = None,
    *,
    begun: Counts | None = None,
) -> AnyModel:
    """By structure first, then single weights of what is left; the given student is not changed.

    Args:
        begun: heads and neurons that fractions are of (`prune_structured`).
    """
    if settings.heads or settings.neurons:
        student = prune_structured(student, settings, texts, targets, begun=begun)
    return prune_magnitude(student, settings.weights)


def at_step(settings: PruningSettings, number: int) -> PruningSettings:
    """One of the steps, from 1: fractions of all heads and neurons that are gone after it, of the weights left before it.

    >>> settings = PruningSettings(neurons=0.75, weights=0.75, steps=2)
    >>> [(step.neurons, step.weights) for step in (at_step(settings, 1), at_step(settings, 2))]
    [(0.5, 0.5), (0.75, 0.5)]
    """
    done, each = number / settings.steps, 1 / settings.steps
    shares = {"heads": done, "neurons": done, "weights": each}
    fractions = {name: 1 - (1 - getattr(settings, name)) ** share for name, share in shares.items()}
    return settings.model_copy(update={**fractions, "steps": 1})
