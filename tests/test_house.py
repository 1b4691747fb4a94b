"""The house: what depends on what, what is shipped, what is documented."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from stillroom_shared.cli import build_app

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("shared", "server", "client", "simulations")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def sources(room: str) -> Iterator[Path]:
    """Every file of a room's package, relative to the room."""
    for path in sorted((ROOT / room / f"stillroom_{room}").rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            yield path.relative_to(ROOT / room)


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache", "--no-logo"],
        cwd=root,
        env={"PYTHONPATH": ":".join(str(root / room) for room in ROOMS)},
        capture_output=True,
        text=True,
    )


def commands(group: click.Group, path: tuple[str, ...] = ("stillroom",)) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield " ".join((*path, name)), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def command_line() -> click.Group:
    root = typer.main.get_command(build_app())
    assert isinstance(root, click.Group)
    return root


def test_import_contracts_hold_and_can_break(tmp_path: Path) -> None:
    """Guards against a contract that looks at the wrong packages and therefore always holds."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    held = lint_imports(tmp_path)
    assert held.returncode == 0, held.stdout + held.stderr
    plants = {
        "server/stillroom_server/planted.py": "import stillroom_client.device\nimport tests",
        "client/stillroom_client/planted.py": "import torch",
        "shared/stillroom_shared/planted.py": "def late() -> None:\n    import flwr",
    }
    for name, text in plants.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    search = tmp_path / "client/stillroom_client/search.py"
    search.write_text(search.read_text(encoding="utf-8") + "\nimport stillroom_client.planted\n", encoding="utf-8")
    broken = lint_imports(tmp_path)
    for contract in PROJECT["tool"]["importlinter"]["contracts"]:
        assert re.search(re.escape(contract["name"]) + r"\s+BROKEN", broken.stdout), (contract["name"], broken.stdout)


def test_the_wheel_holds_every_file_of_every_room_and_nothing_else(tmp_path: Path) -> None:
    """Guards against a wheel that loses a subpackage, a template or py.typed, or that ships tests."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
        [points] = [name for name in shipped if name.endswith("entry_points.txt")]
        assert "stillroom = stillroom_shared.cli:main" in archive.read(points).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in shipped)
    files = {str(path) for room in ROOMS for path in sources(room)}
    assert {name for name in shipped if ".dist-info/" not in name} == files
    assert all(f"stillroom_{room}/py.typed" in files for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_what_a_type_checker_sees(room: str) -> None:
    """Guards against a public name that moved away, and one that exists for type checkers or at run time only."""
    package = importlib.import_module(f"stillroom_{room}")
    tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    declared = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert package.__all__ == sorted(declared) and declared
    for name, module in declared.items():
        public = getattr(package, name)
        assert public is getattr(importlib.import_module(module), name)
        assert public.__doc__, f"{package.__name__}.{name} has no docstring"
        assert not (Path(str(package.__file__)).parent / f"{name}.py").exists(), (
            f"{name} is a module too: which one comes?"
        )
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


def test_public_names_cost_nothing_until_they_are_used() -> None:
    """Guards against a package whose import loads torch for whoever wants one small value of it."""
    code = "import sys, {}; print(sorted(set(sys.modules) & {{'torch', 'flwr', 'numpy', 'pydantic'}}))"
    modules = ", ".join(f"stillroom_{room}" for room in ROOMS)
    done = subprocess.run([sys.executable, "-c", code.format(modules)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help_and_a_line_in_the_manual() -> None:
    """Guards against a command that only its author knows."""
    manual = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    found = dict(commands(command_line()))
    assert {"stillroom demo", "stillroom search"} <= set(found)
    for name, command in found.items():
        assert command.help, f"{name} has no help"
        assert f"`{name}" in manual, f"{name} has no line in docs/index.md"
        for parameter in command.params:
            described = getattr(parameter, "help", None)
            assert described or parameter.name == "help", f"{name}: {parameter.name} has no help"


def test_the_manual_names_only_commands_that_exist() -> None:
    """Guards against a page that sends a reader to a command that was renamed or never written."""
    found = {name for name, _ in commands(command_line())}
    for page in PAGES:
        for words in re.findall(r"(?:^\$ |`)stillroom ((?:[a-z]+ ?)+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            first = words.split()
            assert any(" ".join(("stillroom", *first[:end])) in found for end in (1, 2)), (
                f"{page.name}: stillroom {words}"
            )


def test_links_between_pages_lead_somewhere() -> None:
    """Guards against a picture or a page that was moved."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_the_changelog_knows_this_version() -> None:
    """Guards against a version that nobody can look up."""
    assert f"## [{PROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_what_is_required_and_torch_by_release_only() -> None:
    """Guards against figures of record whose versions nobody wrote down, and a pin that forces one build of torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]:
        name = re.split(r"[^\w-]", requirement)[0]
        assert name == "stillroom" or name in pinned, f"{name} is not in constraints.txt"
        assert name != "torch" or re.fullmatch(r"torch>=[\d.]+", requirement)
    assert "+" not in pinned["torch"]
