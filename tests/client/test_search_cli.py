"""What the owner of a device types, and what he reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from stillroom_client import adding
from stillroom_client.catalog import Embedded
from stillroom_client.search import Device, Hit
from stillroom_client.show import hits_table, plain, snippet
from stillroom_shared.cli import build_app
from stillroom_shared.corpus import Passage
from stillroom_shared.release import Release

TEXTS = {"tapirs.md": "# Tapirs\n\nTapirs eat leaves.\n\nThey swim.", "zip.txt": "A zip file holds members."}


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(build_app(), [str(argument) for argument in arguments])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def home(tmp_path: Path, tiny_release: Release) -> Path:
    done = run("index", "create", "--home", tmp_path / "home", "--release", tiny_release.folder)
    assert done.exit_code == 0, done.output
    return tmp_path / "home"


def test_from_nothing_to_an_answer(tmp_path: Path, tiny_release: Release, texts: Path) -> None:
    """Guards against a first hour that ends in a traceback: create, add, search, status, in that order."""
    home, key = tmp_path / "home", tiny_release.manifest.public_key
    created = run("index", "create", "--home", home, "--release", tiny_release.folder, "--trust", key)
    assert created.exit_code == 0 and f"trusts key {key}" in created.stdout
    assert f"Next: stillroom index add PATH... --home {home}" in created.stdout
    assert "compare it with" not in created.stdout
    assert run("index", "add", texts, "--home", home).stdout == (
        "documents: 2 added, 0 changed, 0 unchanged, 0 removed, 0 not read\n"
        "3 added, 0 replaced, 0 unchanged, 0 removed: 3 passages\n"
    )
    hits = json.loads(run("search", "who swims", "--home", home, "--json").stdout)
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert {hit["text"] for hit in hits} == {"Tapirs eat leaves.", "They swim.", "A zip file holds members."}
    assert {hit["title"] for hit in hits} == {"Tapirs", ""} and {hit["owner"] for hit in hits} == {"home"}
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert len(json.loads(run("search", "who swims", "--home", home, "--json", "-k", "1").stdout)) == 1
    table = run("search", "who swims", "--home", home).stdout
    assert all(word in table for word in ("score", "owner", "They swim.", f"{hits[0]['score']:.3f}"))
    state = json.loads(run("index", "status", "--home", home, "--json").stdout)
    assert (state["passages"], state["index"], state["release"]) == (3, "current", tiny_release.id)
    assert "3 of 32 dimensions" in run("index", "status", "--home", home).stdout


def test_adding_again_follows_the_files(home: Path, texts: Path) -> None:
    """Guards against paragraphs that are deleted from a file and found for ever."""
    run("index", "add", texts, "--home", home)
    (texts / "tapirs.md").write_text("# Tapirs\n\nTapirs eat leaves.\n\nThey sleep.\n\nThey run.")
    assert run("index", "add", texts, "--home", home).stdout == (
        "documents: 0 added, 1 changed, 1 unchanged, 0 removed, 0 not read\n"
        "2 added, 0 replaced, 2 unchanged, 1 removed: 4 passages\n"
    )
    found = json.loads(run("search", "who swims", "--home", home, "--json").stdout)
    assert "They swim." not in {hit["text"] for hit in found}


def test_bad_files_are_named_and_the_rest_is_found(home: Path, texts: Path) -> None:
    """Guards against an exit status that says all is well, a remark that controls the terminal, and hits without a place."""
    (texts / "broken\x1b[2J.pdf").write_bytes(b"%PDF- broken")
    (texts / "tool.py").write_text("def swim(x):\n    return x\n")
    done = run("index", "add", texts, "--home", home)
    assert done.exit_code == 1 and "1 not read" in done.stdout
    assert "broken[2J.pdf: is no PDF that can be read" in done.stderr and "\x1b[2J" not in done.stderr
    hits = json.loads(run("search", "swim", "--home", home, "--json").stdout)
    found = {hit["metadata"]["name"]: hit for hit in hits}
    assert found["tool.py"]["metadata"]["symbol"] == "swim" and found["tool.py"]["position"]["line"] == 1
    assert found["tool.py"]["document"] == str(texts / "tool.py")
    assert "tool.py, line 1" in run("search", "swim", "--home", home).stdout
    again = json.loads(run("index", "add", texts, "--home", home, "--json").stdout)
    assert again["documents"] == {"added": 0, "changed": 0, "unchanged": 3, "removed": 0, "failed": 1}
    assert (again["embedded"], again["passages"]["total"], again["remarks"][0]["kind"]) == (0, 4, "failed")
    assert "3 documents removed, 4 passages: 0 left" in run("index", "remove", texts, "--home", home).stdout


def test_an_interrupted_add_keeps_the_batches_behind_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an hour of embedding that Ctrl-C throws away, and against half a document that is found."""
    (tmp_path / "long.txt").write_text("\n\n".join(f"paragraph {n}" for n in range(10)))
    monkeypatch.setattr(adding, "_BATCH", 4)
    real, calls = Device.embed, []

    def interrupted(self: Device, passages: Sequence[Passage]) -> Embedded:
        calls.append(len(passages))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, passages)

    monkeypatch.setattr(Device, "embed", interrupted)
    done = run("index", "add", tmp_path / "long.txt", "--home", home)
    assert done.exit_code == 130
    assert json.loads(run("index", "status", "--home", home, "--json").stdout)["passages"] == 0
    assert "10 added, 0 replaced, 0 unchanged" in run("index", "add", tmp_path / "long.txt", "--home", home).stdout
    assert calls == [4, 4, 2, 2]


def test_refusals_say_what_to_do(home: Path, tmp_path: Path, tiny_release: Release) -> None:
    """Guards against an empty table where the index is empty, and against tracebacks."""
    nowhere = tmp_path / "no where"
    for arguments, message in (
        (("search", "x", "--home", home), f"empty: add documents with `stillroom index add PATH... --home {home}`"),
        (("search", "x", "--home", nowhere), f"stillroom index create --home '{nowhere}' --release RELEASE"),
        (("index", "status", "--home", nowhere), "is not the home of a device"),
        (("index", "remove", tmp_path / "x.txt", "--home", home), "x.txt is not in this index"),
        (("index", "create", "--home", home, "--release", tiny_release.folder), "exists and is not empty"),
        (("index", "create", "--home", nowhere, "--release", nowhere), "manifest.json cannot be read"),
        (("feedback", "opened", "x", "p9", "--home", home), "passage 'p9' is not in this index"),
    ):  # fmt: skip
        done = run(*arguments)
        assert done.exit_code == 1 and done.stderr.startswith("error: ") and message in done.stderr, done.output
        assert done.stderr.count("\n") == 1
    (home / "release" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json has been altered" in run("index", "status", "--home", home).stderr
    assert not nowhere.exists()


def test_feedback_is_kept_listed_and_erased(home: Path, texts: Path) -> None:
    """Guards against feedback that its owner can neither see nor take back."""
    run("index", "add", texts, "--home", home)
    assert run("feedback", "list", "--home", home).stdout == "nothing was opened yet\n"
    hit = json.loads(run("search", "who swims", "--home", home, "--json").stdout)[0]
    assert run("feedback", "opened", "who swims", hit["passage_id"], "--home", home).exit_code == 0
    assert run("feedback", "list", "--home", home).stdout == f"who swims  ->  {hit['passage_id']}\n"
    listed = json.loads(run("feedback", "list", "--home", home, "--json").stdout)
    assert listed == [{"query": "who swims", "passage_id": hit["passage_id"]}]
    assert run("feedback", "erase", "--home", home).stdout == "1 opened results erased\n"
    assert json.loads(run("feedback", "list", "--home", home, "--json").stdout) == []


def test_modes_and_filters_from_the_command_line(home: Path, texts: Path) -> None:
    """Guards against options that are shown and ignored, ranks without a list, and a place that is shown wrongly."""
    run("index", "add", texts, "--home", home)
    both, words = (
        json.loads(run("search", "a swimming tapir", "--home", home, "--json", *more).stdout)
        for more in ((), ("--mode", "bm25"))
    )
    assert [hit["text"] for hit in words] == ["They swim.", "Tapirs eat leaves."] or len(words) == 2
    assert all(hit["dense_rank"] is None and hit["bm25_rank"] == hit["rank"] for hit in words)
    assert sorted(hit["dense_rank"] for hit in both) == [1, 2, 3] and {hit["bm25_rank"] for hit in both} == {1, 2, None}
    for hit in words:
        marked = [hit["snippet"][start:stop] for start, stop in hit["highlights"]]
        assert marked in (["swim"], ["Tapirs"])
    table = run("search", "a swimming tapir", "--home", home).stdout
    assert (
        "dense  bm25" in table and "dense  bm25" not in run("search", "tapir", "--home", home, "--mode", "bm25").stdout
    )
    titled = ("search", "a swimming tapir", "--home", home, "--json", "--where")
    assert len(json.loads(run(*titled, "title=Tapirs and not owner=zoo").stdout)) == 2
    assert [h["text"] for h in json.loads(run(*titled, "title!='Tapirs'").stdout)] == ["A zip file holds members."]
    refused = run("search", "x", "--home", home, "--where", "title=Tapirs and colour=red")
    assert refused.exit_code == 1
    assert refused.stderr == "error: there is no field 'colour'\n  title=Tapirs and colour=red\n" + " " * 19 + "^\n"
    assert run("search", "x", "--home", home, "--where", "owner=zoo").stdout == "no passage fulfils the filter\n"
    nothing = run("search", "xylophone", "--home", home, "--mode", "bm25")
    assert nothing.stdout == "no passage has a word of the query\n"
    assert run("search", "x", "--home", home, "--mode", "fuzzy").exit_code == 2
    assert json.loads(run("index", "status", "--home", home, "--json").stdout)["text_index"] == "current"


def without_styles(output: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", output)


def rendered(hits: list[Hit], query: str, *, width: int = 100) -> str:
    console = Console(width=width, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(hits_table(hits, query))
    return capture.get()


def test_documents_cannot_write_markup_or_control_the_terminal() -> None:
    """Guards against a document that hides text, forges colours, or sends escape sequences to whoever finds it."""
    evil = "[bold red]not markup[/bold red] [link=file:///x]y[/link] \x1b]0;owned\x07 \x1b[2J\u202egnissim\u200b\x9b31m"
    hits = [Hit(1, 0.5, "p1", "zoo", "", evil), Hit(2, 0.4, evil, evil, evil, "markup")]
    output = rendered(hits, "markup", width=500)
    for sequence in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e", "\u200b"):
        assert sequence not in output
    assert "[bold red]not markup[/bold red] [link=file:///x]y[/link] ]0;owned [2Jgnissim31m" in without_styles(output)
    assert re.search(r"\x1b\[1mmarkup", output), "the query's word is not in bold"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_nothing_is_cut_from_an_id(width: int) -> None:
    """Guards against an id that cannot be passed on to `stillroom feedback opened`."""
    key = "/home/somebody/documents/notes about animals.md#0123456789ab"
    lines = rendered([Hit(1, 0.5, key, "zoo", "", "text " * 90)], "x", width=width).splitlines()
    assert max(len(without_styles(line)) for line in lines) <= width
    cyan = "".join("".join(re.findall(r"\x1b\[36m(.*?)\x1b\[0m", line)).strip() for line in lines)
    assert cyan.replace(" ", "") == key.replace(" ", "")


def test_a_snippet_shows_the_sentence_that_answers() -> None:
    """Guards against ten results that all show a first sentence that says nothing."""
    text = "Parameters are listed below. Opens an archive for reading. It lists the members of a zip file. Closes it."
    assert snippet(text, "list zip members") == "… It lists the members of a zip file. Closes it."
    assert snippet(text, "something else entirely").startswith("Parameters are listed below. Opens")
    assert snippet(text, "") == text and snippet("", "x") == ""
    long = snippet("word " * 200, "word", length=30)
    assert len(long) <= 30 and long.endswith("word …")
    assert snippet("x" * 500, "y", length=30) == "x" * 28 + " …"
    assert plain("tab\there\r\nnext\x00") == "tab here next"


def test_the_first_answer_needs_one_process_and_no_network(home: Path, texts: Path) -> None:
    """Guards against a search that works only with what another command left in memory, or that asks a server."""
    run("index", "add", texts, "--home", home)
    code = "import socket; socket.socket.connect = None; from stillroom_shared.cli import main; main()"
    command = [sys.executable, "-c", code, "search", "who swims", "--home", str(home), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": ""})
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 3 and done.stderr == ""
