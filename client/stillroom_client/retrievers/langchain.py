"""A device as a LangChain retriever.

    from stillroom_client import connect
    from stillroom_client.retrievers.langchain import StillroomRetriever

    retriever = StillroomRetriever(searcher=connect("my-device"), k=5)
    documents = retriever.invoke("how are keys rotated")

`invoke`, `ainvoke`, `batch` and chains work as with any retriever. LangChain sends queries and documents to LangSmith while
LANGSMITH_TRACING is set; nothing here sets it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from stillroom_client.ranking import Mode
from stillroom_client.retrievers.source import described


class StillroomRetriever(BaseRetriever):
    """The k best passages as documents: `page_content` is the text, `id` the passage's, `metadata` all else (`described`).

    Attributes:
        searcher: an open `Device`, or a `Client` of a served one; the caller closes it.
        k, mode, where: as in `Device.search`.
    """

    searcher: Any = Field(repr=False, exclude=True)  # a `Searcher`; pydantic cannot check protocols
    k: int = Field(default=10, ge=1)
    mode: Mode = "hybrid"
    where: str | None = None

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self._documents(query)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        return await asyncio.to_thread(self._documents, query)

    def _documents(self, query: str) -> list[Document]:
        hits = self.searcher.search(query, self.k, mode=self.mode, where=self.where)
        return [Document(page_content=hit.text, id=hit.passage_id, metadata=described(hit)) for hit in hits]
