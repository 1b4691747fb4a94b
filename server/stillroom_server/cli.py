"""`stillroom release` and `stillroom plan`: what an operator asks before shipping a release, and before spending.

Only typer is imported here; what a command needs is imported when it runs (`stillroom_shared.cli`).
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stillroom_server.distillery import cli as distillery


def register(app: typer.Typer) -> None:
    """Add the commands of the server room."""
    group = typer.Typer(name="release", help="Verify and show releases.", no_args_is_help=True)
    group.command()(verify)
    group.command()(operators)
    app.add_typer(group)
    planning = typer.Typer(name="plan", help="Reckon before anything is run.", no_args_is_help=True)
    planning.command()(tuning)
    # Typer drops the name of a group's only command, unless the group has a callback.
    planning.callback()(lambda: None)
    app.add_typer(planning)
    distillery.register(app)


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of the release.")],
    key: Annotated[str | None, typer.Option(help="Public key that must have signed it, in hexadecimal.")] = None,
) -> None:
    """Check every hash and the signature, and print what the release says about itself."""
    from stillroom_shared.release import open_release

    release = open_release(folder, trusted_key=key)
    typer.echo(release.manifest.model_dump_json(indent=2, exclude={"files"}))
    typer.echo("every file and the signature hold")


class Target(StrEnum):
    """Where a tower may go on from a release."""

    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    coreml = "coreml"
    executorch = "executorch"


def operators(
    folder: Annotated[Path, typer.Argument(help="Folder of a release or a model, or an ONNX file.")],
    target: Annotated[Target, typer.Option(help="Where it shall run.")] = Target.onnxruntime,
) -> None:
    """Check that a target has every operator of the exported towers; exit status 1 when one is missing."""
    from stillroom_server.distillery.compress.targets import SOURCES, check_operators, graphs

    found = [check_operators(path, target.value) for path in graphs(folder, target.value)]
    typer.echo("\n".join(one.text() for one in found))
    typer.echo(f"compared with {SOURCES[target.value]}")
    if any(one.missing for one in found):
        raise typer.Exit(1)


def tuning(
    devices: Annotated[int, typer.Option(help="Enrolled devices.")],
    rounds: Annotated[int, typer.Option(help="Rounds of one trial.")] = 15,
    sampling_rate: Annotated[float, typer.Option(help="Chance of a device to be in a round's cohort.")] = 0.2,
    noise_multiplier: Annotated[float, typer.Option(help="Noise standard deviation / sensitivity of a round.")] = 2.0,
    evaluation_noise: Annotated[float, typer.Option(help="The same of the evaluation that scores a trial.")] = 2.0,
    delta: Annotated[float | None, typer.Option(help="Of the guarantee.  [default: 1 / (10 x devices)]")] = None,
    trials: Annotated[str, typer.Option(help="Mean numbers of trials, comma-separated.")] = "2,5,10,20",
    retries: Annotated[int, typer.Option(help="Interruptions within a trial that are paid for beforehand.")] = 1,
    target_epsilon: Annotated[
        float | None, typer.Option(help="Also print the least noise at which each whole search meets it.")
    ] = None,
) -> None:
    """Print what a search over settings costs, by each way of counting, before anything is run."""
    import logging

    from stillroom_server.search_costs import plan_tuning

    logging.disable(logging.WARNING)  # orders at which a Renyi series does not converge are left out, and that is all
    typer.echo(
        plan_tuning(
            devices=devices, rounds=rounds, sampling_rate=sampling_rate, noise_multiplier=noise_multiplier,
            evaluation_noise=evaluation_noise, delta=delta, trials=trials, retries=retries,
            target_epsilon=target_epsilon,
        )
    )  # fmt: skip
