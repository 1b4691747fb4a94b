"""Retrievers of other frameworks give what the device gives, with all that is known of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.client.devices import ANIMALS, passages

from stillroom_client.documents import Document, Located, Position
from stillroom_client.search import Device
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import StillroomError
from stillroom_shared.release import Release

ALL = {"source", "passage_id", "owner", "title", "rank", "score", "dense_rank", "bm25_rank", "document", "place", "page",
       "line", "start", "stop", "type", "year", "section"}  # fmt: skip


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release) -> Iterator[Device]:
    with Device.create(tmp_path / "home", tiny_release, link=True) as made:
        made.add(passages(ANIMALS))
        document = Document(path="/d/a.md", type="markdown", title="A", metadata={"type": "markdown", "year": 2024})
        found = Located(
            Passage("a#1", "me", "A numbat reads.", "A"),
            Position(place=1, page=2, line=3, start=4, stop=19),
            {"section": "A > B"},
        )
        made.catalog.stage([found.passage], made.embed([found.passage]))
        made.catalog.put(document, [replace(found)])
        yield made


@pytest.fixture(params=["home", "served"])
def searcher(device: Device, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Both ways: a home in this process, and one that is served."""
    if request.param == "home":
        yield device
        return
    pytest.importorskip("grpc_reflection")
    from tests.client.served import serving

    from stillroom_client.serving.client import connect

    with serving(device), connect(device.home) as client:
        yield client


def test_langchain_gets_documents_with_everything(device: Device, searcher: Any) -> None:
    """Guards against a chain that cannot cite: a document without page, line, path or score."""
    pytest.importorskip("langchain_core")
    from langchain_core.runnables import RunnableLambda

    from stillroom_client.retrievers.langchain import StillroomRetriever

    retriever = StillroomRetriever(searcher=searcher, k=3)
    found = retriever.invoke("numbat reads")
    expected = device.search("numbat reads", 3)
    assert [(d.page_content, d.id, d.metadata["score"]) for d in found] == [
        (hit.text, hit.passage_id, hit.score) for hit in expected
    ]
    [own] = [d for d in found if d.id == "a#1"]
    assert set(own.metadata) == ALL and own.metadata["section"] == "A > B"
    assert (own.metadata["source"], own.metadata["page"], own.metadata["line"]) == ("/d/a.md", 2, 3)
    assert {d.metadata["source"] for d in found if d.id != "a#1"} <= set(ANIMALS)
    assert asyncio.run(retriever.ainvoke("numbat reads")) == found
    assert retriever.batch(["numbat reads"] * 2) == [found, found]
    assert (retriever | RunnableLambda(len)).invoke("numbat reads") == 3
    filtered = StillroomRetriever(searcher=searcher, k=20, mode="dense", where="type=markdown")
    assert [d.id for d in filtered.invoke("numbat")] == ["a#1"]
    with pytest.raises(StillroomError, match="there is no field 'nothing'"):
        StillroomRetriever(searcher=searcher, where="nothing=1").invoke("x")


def test_llamaindex_gets_nodes_with_everything(device: Device, searcher: Any) -> None:
    """Guards against nodes whose score or source is lost, and against `aretrieve` that blocks the loop."""
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import MetadataMode, TextNode

    from stillroom_client.retrievers.llamaindex import StillroomRetriever

    retriever = StillroomRetriever(searcher, k=3)
    found = retriever.retrieve("numbat reads")
    expected = device.search("numbat reads", 3)
    assert [(n.node.get_content(), n.node.node_id, n.score) for n in found] == [
        (hit.text, hit.passage_id, hit.score) for hit in expected
    ]
    [own] = [n.node for n in found if n.node.node_id == "a#1"]
    assert set(own.metadata) == ALL and own.source_node is not None and own.source_node.node_id == "/d/a.md"
    assert isinstance(own, TextNode)
    assert (own.start_char_idx, own.end_char_idx) == (4, 19)
    assert "page: 2" in own.get_content(MetadataMode.LLM) and "score" not in own.get_content(MetadataMode.LLM)
    assert own.get_content(MetadataMode.EMBED) == "A numbat reads."
    assert [n.node.node_id for n in asyncio.run(retriever.aretrieve("numbat reads"))] == [n.node.node_id for n in found]
    filtered = StillroomRetriever(searcher, k=20, where="type=markdown")
    assert [n.node.node_id for n in filtered.retrieve("numbat")] == ["a#1"]


@pytest.mark.parametrize("name", ["langchain", "llamaindex"])
def test_waiting_for_an_answer_does_not_block_the_loop(name: str) -> None:
    """Guards against an async variant that is the blocking one under another name."""
    module = pytest.importorskip(f"stillroom_client.retrievers.{name}", exc_type=ImportError)
    import threading

    met = threading.Barrier(2, timeout=10)

    class Slow:
        def search(self, *_: Any, **__: Any) -> list[Any]:
            met.wait()
            return []

    retriever = module.StillroomRetriever(**{"searcher": Slow()})
    ask = retriever.ainvoke if name == "langchain" else retriever.aretrieve

    async def both() -> list[Any]:
        return list(await asyncio.gather(ask("a"), ask("b")))

    assert asyncio.run(both()) == [[], []]
