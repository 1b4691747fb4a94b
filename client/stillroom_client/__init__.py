"""The device's side of Stillroom: it indexes and searches its owner's documents, and takes part in rounds.

The public names are loaded when first asked for: the command line imports this package to print its help, and must not
wait for an inference engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom_client.search import CacheLimits, Change, Device, Encoder, Feedback, FilterError, Hit, Status

__all__ = ["CacheLimits", "Change", "Device", "Encoder", "Feedback", "FilterError", "Hit", "Status"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("stillroom_client.search"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
