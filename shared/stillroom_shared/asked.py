"""What several commands do with what they were asked: options as a mapping, and a quiet terminal."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from stillroom_shared.errors import SettingsError


def pairs(changes: Sequence[str]) -> dict[str, str]:
    """The `--set` options as a mapping.

    >>> pairs(["rounds.rounds=3", "rounds.delta=none"])
    {'rounds.rounds': '3', 'rounds.delta': 'none'}
    """
    for change in changes:
        if "=" not in change:
            raise SettingsError(f"--set {change!r} sets nothing: write it as KEY=VALUE, e.g. --set rounds.rounds=20")
    return {key.strip(): value.strip() for key, _, value in (change.partition("=") for change in changes)}


def numbers(seeds: str) -> list[int]:
    """Seeds as they stand on the command line.

    >>> numbers("0,1,2")
    [0, 1, 2]
    """
    try:
        return [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise SettingsError(f"--seeds {seeds!r} is no list of whole numbers: write it as 0,1,2") from None


def only_our_own_progress() -> None:
    """Keep the bars and the chatter of libraries off the terminal; has to come before they are imported."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)
    # onnxruntime.quantization sets the root logger to INFO when it is imported; the first to set it wins.
    logging.basicConfig(level=logging.WARNING)
