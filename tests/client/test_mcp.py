"""An assistant that talks to a device: a real client of the protocol, over standard input and output of a process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO

import pytest
from tests.client.devices import ROOT

from stillroom_client.search import Device
from stillroom_shared.cli import build_app
from stillroom_shared.corpus import Passage
from stillroom_shared.release import Release

pytest.importorskip("mcp.server.mcpserver")

from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.shared.exceptions import MCPError

from stillroom_client import mcp_server

CODE = "from stillroom_shared.cli import main; main()"
SECRETS = ("Tapirs", "leaves", "who eats", "members", "unsayable")


@pytest.fixture
def home(tmp_path: Path, tiny_release: Release) -> Path:
    from typer.testing import CliRunner

    Device.create(tmp_path / "home", tiny_release, link=True).close()
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "tapirs.md").write_text("# Tapirs\n\n" + "\n\n".join(f"Tapirs eat leaves, part {n}." for n in range(30)))
    (texts / "zip.txt").write_text("A zip file holds members.")
    added = CliRunner().invoke(build_app(), ["index", "add", str(texts), "--home", str(tmp_path / "home")])
    assert added.exit_code == 0, added.output
    with Device.open(tmp_path / "home") as device:
        device.add([Passage("/etc/passwd", "me", "No file, a passage.")])
    return tmp_path / "home"


def session(home: Path, errors: TextIO, talk: Callable[[Any], Awaitable[None]]) -> None:
    """Let `talk` speak with `stillroom mcp`, started as assistants start it."""
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "HOME")}
    server = StdioServerParameters(
        command=sys.executable, args=["-c", CODE, "mcp", "--home", str(home)], env=environment, cwd=ROOT
    )

    async def run() -> None:
        async with Client(stdio_client(server, errlog=errors)) as client:
            await talk(client)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_assistant_searches_reads_and_cites(home: Path, tmp_path: Path) -> None:
    """Guards against tools that an assistant may not call unasked, cannot page through, or that leave it without a source."""

    async def talk(client: Any) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"search", "read_passage", "read_document", "status"}
        for tool in tools.values():
            assert tool.annotations.read_only_hint and not tool.annotations.open_world_hint and tool.description
            assert all("description" in p for p in tool.input_schema.get("properties", {}).values()), tool.name
        found = (await client.call_tool("search", {"query": "who eats leaves", "k": 3})).structured_content["result"]
        assert [hit["rank"] for hit in found] == [1, 2, 3]
        assert found[0]["document"].endswith("tapirs.md") and found[0]["where"].startswith("line ")
        read = (await client.call_tool("read_passage", {"passage_id": found[0]["passage_id"]})).structured_content
        assert found[0]["snippet"][:20] in read["text"] and read["of_passages"] == 30 and read["passages"] in (2, 3)
        [content] = (await client.read_resource(found[0]["uri"])).contents
        assert found[0]["snippet"][:20] in content.text
        whole = (
            await client.call_tool("read_document", {"document": found[0]["document"], "first": 28})
        ).structured_content
        assert (whole["first"], whole["passages"], whole["of_passages"]) == (28, 2, 30)
        assert whole["text"] == "Tapirs eat leaves, part 28.\n\nTapirs eat leaves, part 29."
        held = (await client.call_tool("status", {})).structured_content
        assert held["documents"] == {"markdown": 1, "text": 1} and {"type", "path", "year"} <= set(
            held["filter_fields"]
        )
        arguments = {"query": "zip", "where": "type=text", "k": 9}
        assert len((await client.call_tool("search", arguments)).structured_content["result"]) == 1

    with open(tmp_path / "log", "w") as errors:
        session(home, errors, talk)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [json.loads(line)["message"].split()[0] for line in lines][:2] == ["ready", "search"]
    assert not any(word in line for line in lines for word in SECRETS)


def test_refusals_are_read_by_the_assistant_and_not_logged(home: Path, tmp_path: Path) -> None:
    """Guards against a crash for a bad filter, a file that is opened by its path, and a log of what was asked."""

    async def talk(client: Any) -> None:
        for tool, arguments, message in (
            ("search", {"query": "unsayable", "where": "unsayable ="}, "no field 'unsayable'"),
            ("search", {"query": "unsayable", "k": 51}, "less than or equal to 50"),
            ("read_passage", {"passage_id": "unsayable"}, "is not in this index"),
            ("read_document", {"document": "/etc/passwd"}, "is not in this index"),
            ("read_document", {"document": str(home.parent / "texts/tapirs.md"), "first": 30}, "out of range"),
        ):
            answer = await client.call_tool(tool, arguments)
            assert answer.is_error and message in answer.content[0].text, answer
        with pytest.raises(MCPError, match="not in this index"):
            await client.read_resource("stillroom://passage/unsayable")
        [content] = (await client.read_resource(mcp_server.uri_of("/etc/passwd"))).contents
        assert content.text == "No file, a passage."

    with open(tmp_path / "log", "w") as errors:
        session(home, errors, talk)
    assert not any(word in (tmp_path / "log").read_text() for word in SECRETS)


def test_a_defect_is_named_and_not_quoted(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a traceback with somebody's text in the log of an assistant."""

    async def talk(device: Device) -> None:
        async with Client(mcp_server.assistant_server(device)) as client:
            answer = await client.call_tool("search", {"query": "x"})
            assert answer.is_error and answer.content[0].text.endswith("a defect in Stillroom (ValueError)")  # type: ignore[union-attr]

    with Device.open(home) as device, caplog.at_level("DEBUG"):
        device.search = lambda *_, **__: (_ for _ in ()).throw(ValueError("secret text"))  # type: ignore[method-assign]
        asyncio.run(talk(device))
    assert "a defect: ValueError" in caplog.text and "secret" not in caplog.text


def test_long_documents_come_in_parts_that_fit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an answer that fills the context of the model, and against parts that overlap or leave gaps."""
    monkeypatch.setattr(mcp_server, "MOST_CHARACTERS", 100)
    with Device.open(home) as device:
        path = next(path for path in device.catalog.documents() if path.endswith("tapirs.md"))
        tools, place, parts = mcp_server._Tools(device), 0, list[str]()
        while place < 30:
            part = tools.read_document(path, place)
            assert part.first == place and part.passages >= 1 and len(part.text) <= 110
            parts.append(part.text)
            place += part.passages
        whole = [found.passage.text for found in device.catalog.passages_of(path)]
        assert "\n\n".join(parts) == "\n\n".join(whole)


def test_it_ends_when_the_assistant_leaves_and_nothing_else_is_on_standard_output(home: Path) -> None:
    """Guards against processes that pile up behind an assistant, and a stray line that breaks the protocol."""
    command = [sys.executable, "-c", CODE, "mcp", "--home", str(home)]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")
    missing = subprocess.run([*command[:-1], str(home / "no")], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert missing.returncode == 1 and missing.stdout == "" and "is not the home of a device" in missing.stderr
