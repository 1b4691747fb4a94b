"""What a federation has published: its sealed adapters, by the rounds that led to them, and beside them what evaluations found.

Everything in the folder has been released; whether something may be is decided elsewhere (`coordinate.py`, `verdict.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillroom_server.verdict import Evaluation
from stillroom_shared.adapter import Adapter
from stillroom_shared.files import replace_file
from stillroom_shared.heads import Position
from stillroom_shared.release import Release, open_adapter, seal_adapter
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import PrivacyStatement

ADAPTERS_FOLDER = "adapters"


@dataclass(frozen=True)
class Adapters:
    """The published adapters of one federation.

    Attributes:
        folder: in the coordinator's home; it appears with the first thing in it.
        release: whose query tower they adapt.
        key: of the coordinator, which signs them.
    """

    folder: Path
    release: Release
    key: SigningKey

    def after(self, rounds: int) -> Path:
        """Where the adapter after so many rounds is, or will be, sealed."""
        return self.folder / f"round-{rounds:04d}"

    def seal(self, rounds: int, adapter: Adapter, statement: PrivacyStatement, ledger: Position) -> None:
        """Publish an adapter beside its statement and where the ledger stood; `ReleaseError` when there is one already."""
        seal_adapter(
            self.after(rounds),
            adapter,
            release_id=self.release.id,
            round=rounds,
            statement=statement.model_dump(mode="json"),
            key=self.key,
            ledger=ledger,
        )

    def latest(self, rounds: int) -> tuple[int, Adapter]:
        """The last one after at most so many rounds, and after how many; zero after none."""
        for number in range(rounds, 0, -1):
            if (folder := self.after(number)).exists():
                return number, open_adapter(folder, release=self.release, trusted_key=self.key.public).adapter
        return 0, Adapter.zero(self.release.adapter_spec)

    def keep(self, found: Evaluation) -> None:
        """Write the copy of what an evaluation found, unless it is there."""
        if not (copy := self.folder / found.file_name).exists():
            self.folder.mkdir(exist_ok=True)
            replace_file(copy, found.model_dump_json(indent=1).encode())

    @property
    def evaluations(self) -> int:
        """How many copies there are."""
        return len(list(self.folder.glob("evaluation-*.json")))
