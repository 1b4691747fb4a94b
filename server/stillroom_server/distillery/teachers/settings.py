"""What is known of a teacher before it is opened: kind, model, weight in a set, and the speed knobs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stillroom_shared.settings_file import Group

Kind = Literal["bi-encoder", "cross-encoder", "late-interaction", "bm25"]
Precision = Literal["float32", "bfloat16"]


class TeacherSettings(Group):
    """One teacher.

    >>> TeacherSettings(kind="bm25", weight=0.5).model
    'offline'
    """

    kind: Kind = Field("bi-encoder", description="how it reads a query and a passage; bm25 needs no model")
    model: str = Field("offline", min_length=1, description="folder or name; offline is the packaged all-MiniLM-L6-v2")
    weight: float = Field(1.0, gt=0, description="its share in a set of teachers")
    temperature: float = Field(1.0, gt=0, description="what its normalised scores are divided by in a set")
    query_tokens: int | None = Field(None, ge=4, description="of a query that are read; none reads what the model can")
    passage_tokens: int | None = Field(None, ge=4, description="the same of a passage")
    query_prompt: str | None = Field(None, description="put before a query; none takes the model's own prompt, if any")
    passage_prompt: str | None = Field(None, description="the same of a passage")
    batch_size: int = Field(32, ge=1, description="texts, or pairs of a cross-encoder, in one forward pass")
    precision: Precision = Field(
        "float32", description="bfloat16 is faster where the processor has it, and rounds more"
    )
    device: str | None = Field(None, description="cpu, cuda:0 and so on; none takes the best there is")
    token_cache_mib: int = Field(512, ge=0, description="late interaction: memory for vectors of passages seen before")
    bm25_k1: float = Field(1.2, ge=0, description="BM25: how slowly repetitions of a word stop counting")
    bm25_b: float = Field(0.75, ge=0, le=1, description="BM25: how much longer passages are held back")
    bm25_language: str = Field(
        "english", min_length=1, description="BM25: whose word endings are cut off; none keeps them"
    )
