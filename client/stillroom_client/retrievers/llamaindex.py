"""A device as a LlamaIndex retriever.

    from stillroom_client import connect
    from stillroom_client.retrievers.llamaindex import StillroomRetriever

    retriever = StillroomRetriever(connect("my-device"), k=5)
    nodes = retriever.retrieve("how are keys rotated")

`retrieve` and `aretrieve` work as with any retriever, and so do the query engines that take one.
"""

from __future__ import annotations

import asyncio

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode

from stillroom_client.ranking import Hit, Mode
from stillroom_client.retrievers.source import Searcher, described


class StillroomRetriever(BaseRetriever):
    """The k best passages as nodes: id and text are the passage's, its document is the source, `metadata` all else.

    Args:
        searcher: an open `Device`, or a `Client` of a served one; the caller closes it.
        k, mode, where: as in `Device.search`.
    """

    def __init__(self, searcher: Searcher, *, k: int = 10, mode: Mode = "hybrid", where: str | None = None) -> None:
        super().__init__()
        self._searcher = searcher
        self._k, self._mode, self._where = k, mode, where

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._searcher.search(query_bundle.query_str, self._k, mode=self._mode, where=self._where)
        return [NodeWithScore(node=_node(hit), score=hit.score) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _node(hit: Hit) -> TextNode:
    metadata = described(hit)
    node = TextNode(
        id_=hit.passage_id,
        text=hit.text,
        metadata=metadata,
        start_char_idx=hit.position.start,
        end_char_idx=hit.position.stop,
        # Of all this, a model reads where the text comes from; the rest would cost it tokens.
        excluded_llm_metadata_keys=[name for name in metadata if name not in ("source", "title", "page", "section")],
        excluded_embed_metadata_keys=list(metadata),
    )
    if hit.document:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=hit.document)
    return node
