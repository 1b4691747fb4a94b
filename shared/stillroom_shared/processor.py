"""What the processor of this machine does natively."""

from __future__ import annotations

import platform
from pathlib import Path


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices natively; where it does not, float32 is faster."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def processor_name() -> str:
    """What the processor calls itself, e.g. to tell whether two timings may be compared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
