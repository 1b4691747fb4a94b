"""A home survives the death of whoever works on it: nothing committed is lost, nothing half-indexed is served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_kills_while_adding_changing_removing_and_compacting(tmp_path: Path) -> None:
    """Guards against an index that is ahead of its store, a compaction that loses the old files before the new ones count,
    and a history that is forgotten too early. Hundreds of points: see the module for how to run it longer."""
    command = [sys.executable, "-m", "tests.client.home_faults", str(tmp_path), "151", "25"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["points"] > 60 and found["unfinished"] >= 20 and found["kinds"] == ["hnsw"]
