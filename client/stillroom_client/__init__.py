"""The device's side of Stillroom: it indexes and searches its owner's documents, and takes part in rounds.

The public names are loaded when first asked for: the command line imports this package to print its help, and must not
wait for an inference engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom_client.search import (
        CacheLimits,
        Change,
        Device,
        Encoder,
        Feedback,
        FilterError,
        Hit,
        Located,
        Position,
        Status,
    )
    from stillroom_client.serving.client import Client, connect

__all__ = [
    "CacheLimits",
    "Change",
    "Client",
    "Device",
    "Encoder",
    "Feedback",
    "FilterError",
    "Hit",
    "Located",
    "Position",
    "Status",
    "connect",
]
_SERVED = ("Client", "connect")  # need the extra `serve`


def __getattr__(name: str) -> Any:
    if name in _SERVED:
        return getattr(_serving_client(name), name)
    if name in __all__:
        return getattr(import_module("stillroom_client.search"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _serving_client(name: str) -> Any:
    try:
        return import_module("stillroom_client.serving.client")
    except ModuleNotFoundError as error:
        from stillroom_shared.errors import MissingExtraError

        if (error.name or "").partition(".")[0] in ("google", "grpc", "grpc_health"):
            raise MissingExtraError(f"stillroom_client.{name}", "serve", str(error.name)) from error
        raise
