"""What the processor of this machine does natively."""

from __future__ import annotations

from pathlib import Path


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices natively; where it does not, float32 is faster."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
