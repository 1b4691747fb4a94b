"""A cross-encoder as a teacher: query and passage are read together, its score is the raw logit.

Any Sentence Transformers `CrossEncoder` with one output. The logit, not its sigmoid: saturated scores tell passages apart no
more, and losses on differences of scores (MarginMSE, arXiv 2010.02666) need a scale without ends.

All pairs of a call are sorted by length, so that padding is not wasted. As for a bi-encoder, results are equal up to rounding
whatever else is in the call: within 2e-5 of a logit in float32 (tested on a random tower of width 32).

| case | what happens |
|---|---|
| query and passage together are longer than the limit | the longer one is cut |
| the same pair several times in a call | computed once |
| a query without passages | an empty array |
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import sentence_transformers
from torch import nn

from stillroom_server.distillery.students.towers import plain_attention
from stillroom_server.distillery.teachers.base import FloatArray
from stillroom_server.distillery.teachers.bi_encoder import autocast, identity_of
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_shared.errors import SettingsError


class CrossEncoder:
    """A `Teacher`.

    Attributes:
        model: the model itself.
        settings: text limits, prompts, batch size and precision are read. A pair may have as many tokens as both limits
            together, if both are set; prompts are put before each text.
    """

    def __init__(self, model: sentence_transformers.CrossEncoder, settings: TeacherSettings) -> None:
        if model.num_labels != 1:
            raise SettingsError(
                f"teacher {settings.model!r} has {model.num_labels} outputs: a cross-encoder that teaches has one"
            )
        if settings.precision == "bfloat16" and model.device.type == "cpu":
            plain_attention(model)
        self.model = model
        self.settings = settings

    @cached_property
    def identity(self) -> str:
        """See `Teacher`."""
        return identity_of("cross-encoder", self.model, self.settings)

    @property
    def pair_tokens(self) -> int | None:
        """Tokens of a pair that are read, if fewer than the model can."""
        query, passage = self.settings.query_tokens, self.settings.passage_tokens
        return None if query is None or passage is None else min(query + passage, self.model.max_seq_length or 1 << 30)

    def score(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[FloatArray]:
        """Logits; see `Teacher`."""
        before_query, before_passage = self.settings.query_prompt or "", self.settings.passage_prompt or ""
        row: dict[tuple[str, str], int] = {}
        rows = [
            [row.setdefault((before_query + query, before_passage + text), len(row)) for text in own]
            for query, own in zip(queries, passages, strict=True)
        ]
        if not row:
            return [np.zeros(0, np.float32) for _ in rows]
        limit = self.pair_tokens
        reading: dict[str, Any] = (
            {} if limit is None else {"processing_kwargs": {"text": {"max_length": limit, "truncation": True}}}
        )
        with autocast(self.model, self.settings):
            logits = self.model.predict(
                list(row),
                batch_size=self.settings.batch_size,
                show_progress_bar=False,
                activation_fn=nn.Identity(),
                **reading,
            )
        return [np.asarray(logits[np.array(own, np.int64)], np.float32) for own in rows]
