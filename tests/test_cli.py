"""The root command: fast, whole without the extras, and plain about what went wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from stillroom_shared import cli

ROOT = Path(__file__).resolve().parents[1]
HELP = "from stillroom_shared.cli import build_app; build_app()(['--help'])"
HEAVY = ("torch", "flwr", "transformers", "sentence_transformers", "numpy", "onnxruntime", "pydantic", "rich")

ROOM = """
import typer
from stillroom_shared.errors import SettingsError

def register(app: typer.Typer) -> None:
    @app.command()
    def refuse() -> None:
        "Refuse."
        raise SettingsError("rounds is -1: give at least 0")

    @app.command()
    def interrupt() -> None:
        "Be interrupted."
        raise KeyboardInterrupt

    @app.command()
    def crash() -> None:
        "Have a defect."
        raise ZeroDivisionError("a defect")

    @app.command()
    def needs(module: str) -> None:
        "Need a module."
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
"""


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Sources of the rooms on the command line, by name; the test may add to it before it runs a command."""
    sources = {"good": ROOM}

    def entry_points(group: str) -> list[EntryPoint]:
        assert group == cli.GROUP
        for name, source in sources.items():
            (tmp_path / f"room_{name}.py").write_text(source, encoding="utf-8")
            sys.modules.pop(f"room_{name}", None)
        return [EntryPoint(name, f"room_{name}:register", group) for name in sources]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "entry_points", entry_points)
    return sources


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.build_app(), list(arguments))


def test_help_is_fast() -> None:
    """Guards against an import at the top of a cli module that everyone who asks for help has to wait for."""
    script = Path(sys.executable).with_name("stillroom")
    command = [str(script), "--help"] if script.exists() else [sys.executable, "-c", HELP]
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    # Of the processor, not of the clock: what else the machine is doing is not ours.
    assert min(seconds) < 0.5, f"stillroom --help takes {seconds}"


def test_help_loads_nothing_heavy() -> None:
    """Guards against the same, on machines that are fast enough to hide it."""
    code = (
        f"import sys\ntry:\n    {HELP}\nfinally:\n    print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "demo" in done.stdout
    assert done.stderr.strip() == "[]"


def test_version() -> None:
    """Guards against a version that is written down twice."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert run("--version").stdout == f"stillroom {project['version']}\n"


def test_what_is_refused_is_one_line(rooms: dict[str, str]) -> None:
    """Guards against a traceback where a sentence helps, and against a refusal that exits as success."""
    done = run("refuse")
    assert (done.exit_code, done.stderr, done.stdout) == (1, "error: rounds is -1: give at least 0\n", "")


def test_interruption_says_how_to_go_on(rooms: dict[str, str]) -> None:
    """Guards against Ctrl-C that looks like a failure, or like success to a script."""
    done = run("interrupt")
    assert (done.exit_code, done.stderr) == (130, "interrupted; run the same command again to resume\n")


def test_a_defect_keeps_its_traceback(rooms: dict[str, str]) -> None:
    """Guards against a catch-all that hides where a defect is."""
    assert isinstance(run("crash").exception, ZeroDivisionError)


def test_a_missing_extra_is_named(rooms: dict[str, str]) -> None:
    """Guards against "No module named torch", which tells nobody what to install."""
    done = run("needs", "opacus")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ") and "pip install 'stillroom[federated]'" in done.stderr


def test_a_missing_module_of_ours_is_a_defect(rooms: dict[str, str]) -> None:
    """Guards against advice to install what is not an extra."""
    assert isinstance(run("needs", "stillroom_shared.nowhere").exception, ModuleNotFoundError)


def test_a_simulation_names_the_extra_that_brings_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a newcomer who installs one extra, then the next, then the next."""
    monkeypatch.setitem(sys.modules, "stillroom_simulations.report", None)
    monkeypatch.setitem(cli.EXTRA_OF, "stillroom_simulations", "server")
    assert "pip install 'stillroom[simulate]'" in run("report", "runs/demo").stderr


def test_a_room_that_cannot_be_imported_leaves_the_others(rooms: dict[str, str]) -> None:
    """Guards against one missing extra that takes the whole command line away, or a room that vanishes in silence."""
    rooms["lacking"] = "import opacus_of_tomorrow"
    rooms["bare"] = "raise ModuleNotFoundError('No module named torch', name='torch')"
    assert run("refuse").exit_code == 1
    listing = " ".join(run("--help").stdout.split())
    assert "refuse" in listing and "lacking commands: No module named 'opacus_of_tomorrow'" in listing
    unknown = run("search")
    assert unknown.exit_code == 2
    assert "'search'" in unknown.stderr and "pip install 'stillroom[federated]'" in unknown.stderr


def test_a_room_with_a_defect_is_not_silenced(rooms: dict[str, str]) -> None:
    """Guards against taking any failure of a room for a missing extra."""
    rooms["defect"] = "raise ZeroDivisionError"
    with pytest.raises(ZeroDivisionError):
        cli.build_app()


# Of modules whose package has another name.
PACKAGES = {
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio_health_checking",
    "grpc_reflection": "grpcio_reflection",
    "llama_index": "llama_index_core",
}


def test_extras_bring_what_is_promised() -> None:
    """Guards against a message that names an extra which does not bring the module, and a base that does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def modules(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in requirements}

    for module, extra in cli.EXTRA_OF.items():
        assert PACKAGES.get(module, module) in modules(project["optional-dependencies"][extra])
    assert not modules(project["dependencies"]) & set(cli.EXTRA_OF)


def test_demo_options_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against an option of `stillroom demo` that is accepted and ignored."""
    import stillroom_simulations
    from stillroom_shared.settings import Settings

    seen: list[tuple[Settings, Path]] = []
    stage = type(sys)("stillroom_simulations.demo")
    stage.run_demo = lambda settings, *, out, console: seen.append((settings, out))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stillroom_simulations.demo", stage)
    monkeypatch.setattr(stillroom_simulations, "demo", stage, raising=False)
    file = tmp_path / "mine.toml"
    file.write_text(textwrap.dedent("""
        [rounds]
        rounds = 2
        momentum = 0.5
    """), encoding="utf-8")  # fmt: skip
    monkeypatch.setenv("STILLROOM_SETTINGS", str(file))
    arguments = [
        "--scale",
        "full",
        "--seed",
        "7",
        "--data",
        "texts",
        "--set",
        "rounds.rounds=3",
        "--set",
        "rounds.delta=1e-5",
    ]
    done = run("demo", "--out", str(tmp_path), *arguments)
    assert done.exit_code == 0, done.output
    [(made, out)] = seen
    assert (made.corpus.scale, made.seed, made.corpus.data, out) == ("full", 7, Path("texts"), tmp_path)
    assert (made.rounds.rounds, made.rounds.momentum, made.rounds.delta) == (3, 0.5, 1e-5)
    assert run("demo", "--set", "rounds").stderr.startswith("error: --set 'rounds' sets nothing")
    assert run("demo", "--seed", "-1").stderr.startswith("error: setting seed is -1")
