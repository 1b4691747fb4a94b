"""Checkpoints of a trainer: the newest that is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


def newest_checkpoint(folder: Path, whole: Callable[[Path], bool]) -> str | None:
    """The newest checkpoint in a folder, or None; those that a killed process left unfinished are removed.

    Args:
        whole: whether what is written last is there, and can be read.
    """
    for one in folder.glob("checkpoint-*"):
        if not whole(one):
            shutil.rmtree(one)
    newest: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None  # type: ignore[no-untyped-call]
    return newest
