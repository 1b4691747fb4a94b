"""Die in the middle: what tests of crashes need."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from types import FrameType
from typing import Any

KILLED = 9
"""Exit status of a process that died so."""


def kill_at_line(number: int, traced: Collection[str]) -> None:
    """Leave without any clean-up when so many lines of these source files have been reached from now on."""
    seen = 0

    def line(frame: FrameType, kind: str, argument: Any) -> Any:
        nonlocal seen
        if kind == "line":
            seen += 1
            if seen == number:
                os._exit(KILLED)
        return line

    sys.settrace(lambda frame, kind, argument: line if frame.f_code.co_filename in traced else None)
