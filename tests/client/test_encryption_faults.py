"""Killed while a home is encrypted, decrypted or added to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.client.devices import ROOT

from stillroom_shared.release import Release

pytest.importorskip("sqlcipher3")


def test_killed_at_any_point_a_home_is_whole_and_tells_nothing(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against half a home, a file in the clear that nobody removes, and a log or temporary file with plain pages.

    The control: the same search in a home in the clear, killed in the same way, finds what was being added.
    """
    folder = tmp_path / "homes"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.client.encryption_faults", str(folder), str(tiny_release.folder), "97", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["sealed"] > 2 and found["plain"] > 2  # on both sides of the one rename
    assert found["killed"] == found["control"] == 2 and found["batches"] > 2
    assert found["left"] == [] and found["opened"] == []
