"""The Flower `ServerApp` of the operator's side. The same object runs in-process, on Ray and on a SuperLink.

The run configuration holds one key, `coordinator-home`: the folder with the plan, the key, the ledger and the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from stillroom_server.coordinate import Coordinator, RoundReport
from stillroom_shared.errors import SettingsError

HOME_KEY = "coordinator-home"


def coordinator_home(context: Context) -> Path:
    """The folder that the run configuration names; `SettingsError` when it names none."""
    home = context.run_config.get(HOME_KEY)
    if not home:
        raise SettingsError(f"run configuration lacks {HOME_KEY!r}: pass --run-config '{HOME_KEY}=\"/path\"'")
    return Path(str(home))


def server_app(on_round: Callable[[RoundReport], None] = lambda report: None) -> ServerApp:
    """A server app that calls `on_round` after each release."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        with Coordinator(coordinator_home(context)) as coordinator:
            coordinator.run(grid, on_round)

    return app


app = server_app()
