"""What every benchmark file holds beside its figures, and how a figure is written (DESIGN section 9)."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

from stillroom_shared.processor import processor_name
from stillroom_simulations.goal import Goal
from stillroom_simulations.intervals import Interval

_VERSIONS = (
    "stillroom",
    "flwr",
    "torch",
    "sentence-transformers",
    "transformers",
    "onnxruntime",
    "faiss-cpu",
    "dp-accounting",
)


def figure(interval: Interval, unit: str, goal: str | None = None) -> dict[str, Any]:
    """A figure with its interval; where there is a goal, whether the whole interval holds it."""
    made: dict[str, Any] = {"value": interval.value, "interval": list(interval.ends), "unit": unit}
    if goal is not None:
        made |= {"goal": goal, "holds": Goal.parse(goal).holds(interval.ends)}
    return made


def outcome(found: Mapping[str, Any]) -> str:
    """What came of a figure's goal, in words.

    >>> [outcome({"value": 0.97, "interval": [low, 0.98], "goal": ">= 0.96", "holds": low >= 0.96}) for low in (0.963, 0.957)]
    ['holds', 'value only']
    >>> outcome({"value": 0.9, "interval": [0.89, 0.97], "goal": ">= 0.96", "holds": False})
    'missed'
    """
    if found["holds"]:
        return "holds"
    value = found.get("value") if "interval" in found else None
    return "value only" if value is not None and Goal.parse(found["goal"]).met(value) else "missed"


def commit() -> str:
    """The commit of the working directory, "unknown" outside of a checkout."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """The versions of the packages that figures depend on."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS if _installed(name)}


def machine(threads: int) -> str:
    """Processor, threads, system and Python."""
    return f"{processor_name()}, {threads} threads, {platform.system()}, Python {platform.python_version()}"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
