"""Importing search stays light: it is what a phone or a small server pays at every start."""

from __future__ import annotations

import os
import subprocess
import sys

HEAVY = ("torch", "transformers", "flwr", "sentence_transformers", "opacus", "dp_accounting", "onnx", "pandas", "scipy")


def test_search_loads_nothing_that_trains() -> None:
    """Guards against one convenient import at the top of a module that pulls in gigabytes."""
    code = (
        f"import sys; from stillroom_client.search import Device, Encoder, Hit; print(set(sys.modules) & set({HEAVY}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_search_imports_in_under_a_second() -> None:
    """Guards against a slow start. Processor time, so that a busy machine does not fail it; the best of three."""
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", "import stillroom_client.search"], check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0 < min(seconds) < 1.0, f"import stillroom_client.search takes {seconds}"
