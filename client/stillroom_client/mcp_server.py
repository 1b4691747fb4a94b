"""A device for assistants: the Model Context Protocol over standard input and output (modelcontextprotocol.io).

Three tools, all of them read-only, and passages as resources. Nothing listens and nothing is sent: the process answers
whoever started it. What it answers, that assistant sees, and with it whoever runs the assistant's model.

Standard output carries the protocol alone. What there is to log goes to standard error as a line of JSON each, without
queries, documents or the text of an error, because assistants keep these lines in files.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from typing import Annotated, Any, ParamSpec, TypeVar

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceNotFoundError, ToolError
from mcp.server.mcpserver.resources import ResourceSecurity
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from stillroom_client.described import field_names
from stillroom_client.device import Device
from stillroom_client.documents import Found, Scalar
from stillroom_client.ranking import Hit, Mode
from stillroom_client.show import snippet
from stillroom_shared.errors import DataError, NotFoundError, StillroomError

P = ParamSpec("P")
R = TypeVar("R")

MOST_HITS = 50
MOST_CHARACTERS = 40_000
"""Of one answer: about 10,000 tokens of a model's context."""

_LOG = logging.getLogger("stillroom.mcp")
_READ_ONLY = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)
_INSTRUCTIONS = (
    "Searches the documents that the user keeps on this machine. `search` finds passages; `read_passage` gives one with its "
    "surroundings, `read_document` a document in parts; `status` says what is there. Cite passages by document, page or line."
)


class FoundPassage(BaseModel):
    """A passage that was found, best first."""

    rank: int
    score: float
    passage_id: str
    title: str
    snippet: str = Field(description="Its most relevant part; read_passage gives all of it")
    document: str = Field(description="Path of its document, empty for a passage of its own")
    where: str = Field(description="Page or line in the document")
    owner: str
    uri: str = Field(description="The resource that has it whole")


class Text(BaseModel):
    """A part of a document, or a passage of its own."""

    document: str
    title: str
    text: str
    first: int = Field(description="Place of its first passage in the document, from 0")
    passages: int = Field(description="How many passages this is")
    of_passages: int = Field(description="How many the document has")
    metadata: dict[str, Scalar]


class Held(BaseModel):
    """What the device holds."""

    device: str
    passages: int
    documents: dict[str, int] = Field(description="Documents of each type")
    owners: dict[str, int] = Field(description="Passages of each owner")
    filter_fields: list[str] = Field(description="Names that `where` of search may compare")


def assistant_server(device: Device) -> MCPServer[Any]:
    """The server of an open device, which the caller closes."""
    server: MCPServer[Any] = MCPServer(
        "stillroom", title="Stillroom", instructions=_INSTRUCTIONS, version=version("stillroom"), log_level="CRITICAL"
    )
    tools = _Tools(device)
    for title, tool in (
        ("Search documents", tools.search),
        ("Read a passage", tools.read_passage),
        ("Read a document", tools.read_document),
        ("What is indexed", tools.status),
    ):
        server.add_tool(_answering(tool), title=title, annotations=_READ_ONLY, structured_output=True)

    # An id may be the path of a file: it is looked up in the index, never opened.
    @server.resource(
        "stillroom://passage/{+passage_id}",
        name="passage",
        description="The text of a passage, by the id that `search` gives.",
        mime_type="text/plain",
        security=ResourceSecurity(exempt_params={"passage_id"}),
    )
    def passage(passage_id: str) -> str:
        try:
            return tools.passage(passage_id).passage.full_text
        except NotFoundError as error:
            raise ResourceNotFoundError(str(error)) from None

    return server


def run(device: Device) -> None:
    """Answer on standard input and output until the assistant closes them."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json())
    logging.basicConfig(handlers=[handler], level=logging.CRITICAL, force=True)
    _LOG.setLevel(logging.INFO)
    _LOG.info("ready")
    assistant_server(device).run("stdio")


class _Tools:
    """What the assistant may do; the docstrings are what it reads."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def search(
        self,
        query: Annotated[str, Field(description="What to look for, in plain words", max_length=2_000)],
        k: Annotated[int, Field(description="How many passages", ge=1, le=MOST_HITS)] = 8,
        mode: Annotated[Mode, Field(description="By meaning (dense), by words (bm25), or by both")] = "hybrid",
        where: Annotated[
            str | None,
            Field(description="Only passages that fulfil this, such as: type=pdf and year>=2020. Fields: see status"),
        ] = None,
    ) -> list[FoundPassage]:
        """Search the user's own documents by meaning and by words; the best passages first."""
        return [_found(hit, query) for hit in self._device.search(query, k, mode=mode, where=where or None)]

    def read_passage(
        self,
        passage_id: Annotated[str, Field(description="As search gives it")],
        around: Annotated[int, Field(description="Passages before and after it, of its document", ge=0, le=20)] = 1,
    ) -> Text:
        """Read a passage whole, with what stands before and after it in its document."""
        with self._device.store.reading():
            found = self._passage(passage_id)
            if not found.document:
                return _text([found], 0, 1)
            whole = self._device.catalog.passages_of(found.document)
        place = next(n for n, other in enumerate(whole) if other.passage.id == passage_id)
        start = max(place - around, 0)
        return _text(whole[start : place + around + 1], start, len(whole))

    def read_document(
        self,
        document: Annotated[str, Field(description="Its path, as search gives it")],
        first: Annotated[int, Field(description="Place of the first passage to read, from 0", ge=0)] = 0,
    ) -> Text:
        """Read a document from a place on, as much as fits; go on at `first` + `passages` while there is more."""
        whole = self._device.catalog.passages_of(document)
        if not whole:
            raise NotFoundError(f"document {document!r} is not in this index: take a path that search shows")
        if first >= len(whole):
            raise DataError(f"first = {first} is out of range: the document has {len(whole)} passages")
        return _text(whole[first:], first, len(whole))

    def status(self) -> Held:
        """Say what is indexed: how many passages and documents, of whom, and what searches can be filtered by."""
        status = self._device.status()
        return Held(
            device=status.name,
            passages=status.passages,
            documents=status.documents,
            owners=dict(list(status.owners.items())[:50]),
            filter_fields=field_names(self._device.store),
        )

    def passage(self, passage_id: str) -> Found:
        """A passage; `NotFoundError` when there is none of this id."""
        with self._device.store.reading():
            return self._passage(passage_id)

    def _passage(self, passage_id: str) -> Found:
        [row] = self._device.store.rows([passage_id]).tolist()
        return self._device.catalog.found([row])[row]


def _answering(tool: Callable[P, R]) -> Callable[P, R]:
    """What Stillroom refuses, the assistant reads; of a defect, only its class."""

    @wraps(tool)
    def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        started = time.monotonic()
        outcome = "answered"
        try:
            return tool(*args, **kwargs)
        except StillroomError as error:
            outcome = type(error).__name__
            raise ToolError(str(error)) from None
        except Exception as error:
            outcome = f"a defect: {type(error).__name__}"
            raise ToolError(f"a defect in Stillroom ({type(error).__name__})") from None
        finally:
            _LOG.info("%s %s in %.0f ms", tool.__name__, outcome, (time.monotonic() - started) * 1e3)

    return answer


def _found(hit: Hit, query: str) -> FoundPassage:
    return FoundPassage(
        rank=hit.rank,
        score=round(hit.score, 4),
        passage_id=hit.passage_id,
        title=hit.title,
        snippet=snippet(hit.text, query, length=500),
        document=hit.document,
        where=str(hit.position),
        owner=hit.owner,
        uri=uri_of(hit.passage_id),
    )


def uri_of(passage_id: str) -> str:
    """The resource of a passage.

    >>> uri_of("/home/me/a b.md#3")
    'stillroom://passage/%2Fhome%2Fme%2Fa%20b.md%233'
    """
    from urllib.parse import quote

    return f"stillroom://passage/{quote(passage_id, safe='')}"


def _text(found: list[Found], first: int, of: int) -> Text:
    """As many passages as fit into an answer, at least one, which is cut if need be."""
    taken: list[str] = []
    size = 0
    for item in found:
        size += len(item.passage.text)
        if taken and size > MOST_CHARACTERS:
            break
        taken.append(item.passage.text[:MOST_CHARACTERS])
    head = found[0]
    return Text(
        document=head.document,
        title=head.passage.title,
        text="\n\n".join(taken),
        first=first,
        passages=len(taken),
        of_passages=of,
        metadata=dict(head.metadata),
    )


class _Json(logging.Formatter):
    """A line of JSON; the text of exceptions is left out."""

    def format(self, record: logging.LogRecord) -> str:
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line = {"time": written, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        return json.dumps(line | ({"exception": kind} if kind else {}))
