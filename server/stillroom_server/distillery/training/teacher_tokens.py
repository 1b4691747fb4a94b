"""A teacher's token vectors of what a student reads: the teacher runs beside it, on the student's own tokens of a query.

A late-interaction model gives its vectors as it was trained to, an ordinary bi-encoder its normalised token vectors
(`teachers/late_interaction.token_model`). Passages are read with the teacher's own limits and prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.util import batch_to_device
from torch import Tensor


class TeacherTokens:
    """Signals of losses over tokens, without gradients. No module: it is neither trained, moved nor saved with the student."""

    def __init__(self, model: MultiVectorEncoder) -> None:
        self._model = model

    def of_queries(self, features: Mapping[str, Any]) -> dict[str, Tensor]:
        """Vectors (batch, tokens, dim) and mask of the tokens that the student reads."""
        vectors, mask = self._run({name: value for name, value in features.items() if name != "task"}, "query")
        return {"teacher_tokens": vectors, "teacher_mask": mask}

    def of_passages(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The same of one passage for each query."""
        vectors, mask = self._run(self._model.preprocess(list(texts), task="document"), "document")
        return {"teacher_passage_tokens": vectors, "teacher_passage_mask": mask}

    @torch.no_grad()
    def _run(self, features: Mapping[str, Any], task: str) -> tuple[Tensor, Tensor]:
        self._model.train(False)
        found = self._model(batch_to_device(dict(features), self._model.device), task=task)
        return found["token_embeddings"].float(), found["attention_mask"]
