"""What a demo's release says that it learned from."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from stillroom_shared.corpus import Corpus, Passage
from stillroom_shared.settings import Settings
from stillroom_simulations.run_context import RunContext


def context(folder: Path, owners: tuple[str, ...], data: Path | None = None) -> RunContext:
    made = Settings()
    made = made.model_copy(update={"corpus": made.corpus.model_copy(update={"data": data})})
    run = RunContext(made, folder)
    public = Corpus("zoo", tuple(Passage(f"p-{owner}", owner, "A text.") for owner in owners), (), {})
    run.__dict__["corpora"] = public, public
    return run


def test_packages_are_named_with_version_and_licence_and_folders_by_their_owners(tmp_path: Path) -> None:
    """Guards against a release whose text nobody can trace: an operator answers for its licences."""
    numpy, python = context(tmp_path, ("numpy", "python")).public_sources
    assert (numpy["name"], numpy["facts"]["version"]) == ("numpy", importlib.metadata.version("numpy"))
    assert numpy["facts"]["licence"] and python["facts"]["licence"] == "PSF-2.0"
    assert {one["facts"]["kind"] for one in (numpy, python)} == {"docstrings"}
    assert context(tmp_path, ("tapirs",), tmp_path).public_sources == [{"name": "tapirs", "facts": {"kind": "beir"}}]
