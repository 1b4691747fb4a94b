"""Stages: skipped when done, repeated when their input changed, gone on with when interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillroom_shared.errors import SettingsError
from stillroom_shared.workspace import Workspace


def test_an_interrupted_stage_keeps_its_outputs_and_its_time(tmp_path: Path) -> None:
    """Deleting what an interrupted stage wrote would make every resume a restart."""
    space, output = Workspace(tmp_path), tmp_path / "part.txt"

    def interrupted() -> None:
        output.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        space.stage("s", "k", ["part.txt"], interrupted)
    assert "s" not in space.seconds()

    def finish() -> None:
        output.write_text(output.read_text() + " whole")

    assert not space.stage("s", "k", ["part.txt"], finish)
    assert output.read_text() == "half whole"
    assert "s" in space.seconds()


def test_another_key_removes_the_outputs_and_runs_again(tmp_path: Path) -> None:
    """A stale output under a new key would be reported as a new figure."""
    space, folder = Workspace(tmp_path), tmp_path / "out"

    def work() -> None:
        folder.mkdir()
        (folder / "file").write_text("x")

    assert not space.stage("s", "one", ["out"], work)
    assert space.stage("s", "one", ["out"], work)
    assert not space.stage("s", "two", ["out"], work)


def test_what_no_stage_made_is_left_alone(tmp_path: Path) -> None:
    """A run in the folder of a project would remove the project's own `model` and `training`."""
    space, own = Workspace(tmp_path), tmp_path / "model" / "mine"
    own.parent.mkdir()
    own.write_text("x")
    for refused in (
        lambda: space.check({"train": ["training"], "export": ["model"]}),
        lambda: space.stage("export", "key", ["model"], lambda: None),
    ):
        with pytest.raises(SettingsError, match=r"model is there, and no run is known to have made it: name another"):
            refused()
    assert own.read_text() == "x"
    space.check({"train": ["training"]})


@pytest.mark.parametrize("output", ["..", "../elsewhere", ".", "/etc"])
def test_outputs_outside_the_folder_are_refused(tmp_path: Path, output: str) -> None:
    """Removing outputs is removing trees."""
    with pytest.raises(SettingsError, match="not inside"):
        Workspace(tmp_path / "run").stage("s", "k", [output], lambda: None)
