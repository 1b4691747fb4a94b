"""`stillroom demo`, `report`, `tune`, `evaluate`, `audit`, `coordinate` and `bench`: federations in one process, and measuring.

Only typer is imported here; what a command needs is imported when it runs (`stillroom_shared.cli`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from stillroom_shared.asked import numbers, only_our_own_progress, pairs
from stillroom_shared.errors import SettingsError
from stillroom_simulations.distill_bench.cli import bench_distill
from stillroom_simulations.evaluating.cli import evaluate as evaluate_command


def register(app: typer.Typer) -> None:
    """Add the commands of the simulations room."""
    app.command()(demo)
    app.command()(report)
    app.command()(tune)
    app.command("evaluate")(evaluate_command)
    group = typer.Typer(name="audit", help="Check what was spent and what leaked.", no_args_is_help=True)
    group.command()(ledger)
    group.command()(canaries)
    group.command()(receipt)
    app.add_typer(group)
    coordinated = typer.Typer(name="coordinate", help="Run what a coordinator decides.", no_args_is_help=True)
    coordinated.command()(evaluate)
    # A second command keeps the name of the first: typer drops the name of a group's only command.
    coordinated.callback()(lambda: None)
    app.add_typer(coordinated)
    measured = typer.Typer(name="bench", help="Measure the figures of record.", no_args_is_help=True)
    measured.command("demo")(bench_demo)
    measured.command("privacy")(bench_privacy)
    measured.command("search")(bench_search)
    measured.command("distill")(bench_distill)
    app.add_typer(measured)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results; the same one again resumes.")] = Path("runs/demo"),
    scale: Annotated[str | None, typer.Option(help="How much text: small or full.  [default: small]")] = None,
    data: Annotated[str | None, typer.Option(help="A BEIR-layout folder in place of the docstrings here.")] = None,
    seed: Annotated[str | None, typer.Option(help="Seed of the simulated population and its rounds.")] = None,
    settings: Annotated[
        Path | None, typer.Option(envvar="STILLROOM_SETTINGS", help="A TOML file; docs/settings.md lists its keys.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
) -> None:
    """Distil a release, improve it on simulated devices under differential privacy, and report on every step."""
    only_our_own_progress()
    from rich.console import Console

    from stillroom_shared.settings import load_settings
    from stillroom_simulations.demo import run_demo

    named = {"corpus.scale": scale, "corpus.data": data, "seed": seed}
    overrides = {key: value for key, value in named.items() if value is not None} | pairs(changes or [])
    run_demo(load_settings(settings, overrides), out=out, console=Console(highlight=False))


def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `stillroom demo --out` wrote.")]) -> None:
    """Write report.html again from results.json."""
    from stillroom_simulations.report import rewrite_report

    typer.echo(rewrite_report(folder))


def ledger(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Homes of coordinators or searches, or a ledger with the plan beside it; several add up.",
        ),
    ],
    key: Annotated[str | None, typer.Option(help="Public key that must have signed every row, in hexadecimal.")] = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Hash of the last row that a counterpart has seen of this ledger."),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Of several ledgers together.  [default: the smallest of their plans]")
    ] = None,
) -> None:
    """Verify every row and print the privacy statement, or what several ledgers cost together; exit status 1 on any break."""
    from stillroom_simulations.audit import audit_ledger
    from stillroom_simulations.joint_audit import audit_jointly, audit_search, is_search, observed_words

    trust = "signed by the key you named" if key else "consistent with itself; name --key to prove whose they are"
    whole = "the head you named is among them" if head else "name --head to prove that none is cut off at the end"
    if len(paths) > 1:
        if head is not None:
            raise SettingsError(f"--head {head} is of one ledger: name that ledger alone, then all of them without it")
        typer.echo(f"{audit_jointly(paths, public_key=key, delta=delta).text()}\n\nrows are {trust}")
        return
    [path] = paths
    if delta is not None:
        raise SettingsError(f"--delta {delta} is for several ledgers: one is stated at the delta of its plan")
    if is_search(path):
        searched = audit_search(path, public_key=key, head=head)
        typer.echo(f"{searched.rows} rows verified, {trust}; {whole}\nhead {searched.head}\n")
        typer.echo(f"{searched.statement.paragraph()}\n\n{observed_words(searched)}")
        return
    found = audit_ledger(path, public_key=key, head=head)
    typer.echo(f"{found.rows} rows verified, {trust}; {whole}\nhead {found.head}")
    typer.echo(f"{found.adapters} published adapters state what its events cost")
    for device, reason in found.refused.items():
        typer.echo(f"refused: device {device!r}, whose updates count as zero: {reason}")
    typer.echo(f"\n{found.statement.paragraph()}")


def tune(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `stillroom demo --out` wrote.")],
    candidates: Annotated[
        list[str],
        typer.Option("--candidate", metavar="KEY=V1,V2", help="Values of a setting to draw from; repeated: all pairs."),
    ],
    home: Annotated[
        Path | None, typer.Option(help="Home of the search; the same resumes.  [default: DIR/search]")
    ] = None,
    trials: Annotated[float, typer.Option(help="Mean number of trials.")] = 5.0,
    distribution: Annotated[
        str, typer.Option(help="Of the number of trials: negative-binomial or poisson.")
    ] = "negative-binomial",
    shape: Annotated[float, typer.Option(help="Of the negative binomial; 0: logarithmic, 1: geometric.")] = 0.0,
    retries: Annotated[int, typer.Option(help="Interruptions within a trial that are paid for beforehand.")] = 1,
    budget: Annotated[float, typer.Option(help="Most epsilon of the search, against readers of releases.")] = 8.0,
    settings: Annotated[
        Path | None, typer.Option(envvar="STILLROOM_SETTINGS", help="A TOML file; docs/settings.md lists its keys.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
) -> None:
    """Search over settings of rounds on a demo's devices, privately: the best of a hidden number of trials, all charged."""
    only_our_own_progress()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orders at which a Renyi series does not converge are left out
    from stillroom_server.search_costs import planning_table
    from stillroom_shared.settings import load_settings
    from stillroom_simulations.tuning import Tuning, open_tuning, prepare_tuning, trial_words, tuning_cost

    asked = Tuning(
        choices=candidates, distribution=distribution, mean_trials=trials, shape=shape, retries=retries,
        budget_epsilon=budget,
    )  # fmt: skip
    made = prepare_tuning(load_settings(settings, pairs(changes or [])), folder, home or folder / "search", asked)
    typer.echo(planning_table([tuning_cost(made)], made.plan.delta))
    typer.echo(f"\n{trial_words(made)}\n")
    with open_tuning(made) as search:
        sealed = search.run(lambda done, drawn: typer.echo(f"trial {done} of {drawn} is finished"))
        best = search.best
        typer.echo(
            f"\nbest     trial {best['trial']}, {best['settings']}\nadapter  {sealed}"
            if best
            else "\nno trial was drawn"
        )
        typer.echo(f"\n{search.statement().paragraph()}")


def receipt(
    home: Annotated[Path, typer.Argument(help="A coordinator's home.")],
    device: Annotated[str, typer.Option(help="Name under which the device is enrolled.")],
    out: Annotated[Path, typer.Option(help="The file to write; hand it to the device's owner only.")],
) -> None:
    """Write what the coordinator saw a device answer, signed: the device replays it with `stillroom budget --recover`."""
    from stillroom_shared.files import replace_file
    from stillroom_simulations.audit import export_receipt

    made = export_receipt(home, device)
    replace_file(out, made.model_dump_json(indent=1).encode())
    typer.echo(f"{out}: {len(made.charges)} attempts of device {device!r}, for `stillroom budget --recover` there")


def canaries(
    mechanism: Annotated[str, typer.Option(help="Which to audit: central, correlated, local or none.")] = "central",
    epsilon: Annotated[float, typer.Option(help="What it is calibrated to, against readers of releases.")] = 1.0,
    delta: Annotated[float, typer.Option(help="Of the guarantee; below 1 / canaries.")] = 1e-5,
    canaries: Annotated[int, typer.Option(help="Canary devices, or queries; more give a tighter bound.")] = 1_000,
    rounds: Annotated[int, typer.Option(help="Rounds to run.")] = 10,
    sampling_rate: Annotated[float, typer.Option(help="Probability with which a canary joins a round or step.")] = 0.1,
    seed: Annotated[int | None, typer.Option(help="Fixes all randomness.  [default: none is fixed]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack simulated rounds: a lower bound beside what is accounted for; exit status 1 when they contradict."""
    import json

    from rich.console import Console

    from stillroom_shared.progress import Progress
    from stillroom_simulations.canary_audit import STAGES, CanaryAuditSettings, audit_canaries

    settings = CanaryAuditSettings.checked(
        mechanism=mechanism, epsilon=epsilon, delta=delta, canaries=canaries, rounds=rounds,
        sampling_rate=sampling_rate, seed=seed,
    )  # fmt: skip
    progress = Progress(STAGES, console=Console(stderr=True, highlight=False))
    done = audit_canaries(settings, progress=progress)
    typer.echo(json.dumps(done.to_json(), indent=2) if as_json else done.text())
    if done.broken:
        raise typer.Exit(1)


def evaluate(
    home: Annotated[Path, typer.Argument(help="A coordinator's home.")],
    devices: Annotated[Path, typer.Option(help="Folder with the homes of simulated devices.")],
    require: Annotated[
        str, typer.Option(help="What the interval must show before the candidate is published: not-worse or better.")
    ] = "not-worse",
    margin: Annotated[float, typer.Option(help="Under not-worse: the loss of nDCG@10 that must be excluded.")] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the candidate with what is published, privately, on held-back queries; then publish it or roll back."""
    import json

    from rich.console import Console

    from stillroom_server.verdict import Policy
    from stillroom_shared.progress import Progress
    from stillroom_simulations.evaluation_table import evaluation_table
    from stillroom_simulations.private_evaluation import evaluate_simulated

    policy = Policy.checked(require, margin)
    console = Console(stderr=True, highlight=False)
    with Progress({"evaluate": 30.0}, console=console).stage("evaluate") as stage:
        found, scores = evaluate_simulated(home, devices, policy, progress=stage)
        stage.note(
            f"{scores.said} of {scores.asked} simulated devices had held-back queries; a coordinator never sees that"
        )
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=1))
        return
    for part in evaluation_table(found, home):
        Console(highlight=False).print(part, soft_wrap=isinstance(part, str))


def bench_demo(
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    folder: Annotated[Path, typer.Option(help="Where the runs go; the same folder again resumes.")] = Path(
        "runs/bench"
    ),
    out: Annotated[Path, typer.Option(help="The benchmark file to write.")] = Path("benchmarks/results/demo.json"),
    scale: Annotated[str, typer.Option(help="How much text: small or full.")] = "full",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
) -> None:
    """Run the demo for several seeds, fine-tune centrally beside it, and write the figures with their intervals."""
    only_our_own_progress()
    from rich.console import Console

    from stillroom_shared.settings import load_settings
    from stillroom_simulations.bench import bench_demo as measure

    settings = load_settings(None, {"corpus.scale": scale} | pairs(changes or []))
    measure(settings, seeds=numbers(seeds), folder=folder, out=out, console=Console(highlight=False))


def bench_privacy(
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    data: Annotated[
        list[Path] | None, typer.Option(help="A BEIR-layout folder to measure on too; may be repeated.")
    ] = None,
    silos: Annotated[
        list[Path] | None,
        typer.Option(help="Measure this one of them with one device for each owner too; may be repeated."),
    ] = None,
    families: Annotated[
        str, typer.Option(help="Which to measure, comma-separated.")
    ] = "central,correlated,turns,local",
    folder: Annotated[Path, typer.Option(help="Where the runs go; that of `bench demo` spares distilling.")] = Path(
        "runs/bench"
    ),
    out: Annotated[Path, typer.Option(help="The benchmark file to write.")] = Path("benchmarks/results/privacy.json"),
    chart: Annotated[Path, typer.Option(help="The picture to draw.")] = Path("docs/images/privacy.svg"),
    scale: Annotated[str, typer.Option(help="How much text: small or full.")] = "full",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
) -> None:
    """Measure what each mechanism costs in quality at each epsilon, and draw it; the same folder again resumes."""
    only_our_own_progress()
    from rich.console import Console

    from stillroom_shared.settings import load_settings
    from stillroom_simulations.utility import bench_privacy as measure

    settings = load_settings(None, {"corpus.scale": scale} | pairs(changes or []))
    words = [
        f"--seeds {seeds}",
        *(f"--data {path.name}" for path in data or []),
        *(f"--silos {path.name}" for path in silos or []),
    ]
    words += [f"--families {families}", f"--scale {scale}"]
    words += [f"--set {change}" for change in changes or [] if not change.startswith("speed.")]  # changes no figure
    measure(
        settings, seeds=numbers(seeds), data=data or [], silos=silos or [], families=families.split(","), folder=folder,
        out=out, chart=chart, console=Console(highlight=False),
        command=" ".join(["stillroom bench privacy", *words]),
    )  # fmt: skip


def bench_search(
    release: Annotated[Path, typer.Option(help="Release to search with, of an operator you trust.")],
    data: Annotated[list[Path], typer.Option(help="A BEIR-layout folder to search in; may be repeated.")],
    folder: Annotated[
        Path, typer.Option(help="Where vectors and homes go; the same folder again spares embedding.")
    ] = Path("runs/bench-search"),
    out: Annotated[Path, typer.Option(help="The benchmark file to write.")] = Path("benchmarks/results/search.json"),
    chart: Annotated[Path, typer.Option(help="The picture to draw.")] = Path("docs/images/search-growth.svg"),
    passages: Annotated[
        int, typer.Option(min=2_001, help="How far to grow; beyond the real ones, drawn passages.")
    ] = 100_000,
    questions: Annotated[int, typer.Option(min=50, help="Dev questions to ask.")] = 500,
    others: Annotated[bool, typer.Option(help="Compare with others (extra `compare`).")] = True,
    load: Annotated[float, typer.Option(min=0, help="Seconds to serve 64 clients for; 0: not at all.")] = 60,
) -> None:
    """Measure search on a device, beside other searches on the same passages and questions, in one run."""
    only_our_own_progress()
    from rich.console import Console

    from stillroom_simulations.search_bench.report import show
    from stillroom_simulations.search_bench.run import Asked
    from stillroom_simulations.search_bench.run import bench_search as measure

    words = [*(f"--data {path.name}" for path in data), f"--passages {passages}", f"--questions {questions}"]
    made = measure(
        Asked(release, data, folder, passages, questions, others, load), out=out, console=Console(highlight=False),
        command=" ".join(["stillroom bench search", *words, *([] if others else ["--no-others"])]),
    )  # fmt: skip
    show(made, console=Console(), chart=chart)
