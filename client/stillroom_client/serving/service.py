"""The `Retrieval` service over an open device: each method checks its request, does its work in a thread, and answers.

Nothing of a request is kept or logged. A defect is logged by the name of its class and the lines it passed through, without
its message, which may quote a document.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import wraps
from itertools import islice
from traceback import extract_tb
from typing import Any, NoReturn, TypeVar

from grpc.aio import InternalError, ServicerContext

from stillroom_client.device import Device
from stillroom_client.documents import Located
from stillroom_client.ranking import Hit
from stillroom_client.serving import retrieval_pb2 as pb
from stillroom_client.serving import wire
from stillroom_client.serving.codes import ERROR_KEY, OverloadedError, code_of
from stillroom_client.serving.retrieval_pb2_grpc import RetrievalServicer
from stillroom_client.serving.work import Limits, Work
from stillroom_client.store import Change, Feedback, TowerChangedError
from stillroom_shared.errors import DataError, SettingsError

Context = ServicerContext[Any, Any]
Request = TypeVar("Request")
Response = TypeVar("Response")

_LOG = logging.getLogger("stillroom.serving")
_K = 10
_BATCH = 64  # passages that are embedded between two looks at whether the call is still wanted


def answering(
    method: Callable[[Any, Request, Context], Awaitable[Response]],
) -> Callable[[Any, Request, Context], Awaitable[Response]]:
    """Turn what a method raises into a status code (`codes.py`)."""

    @wraps(method)
    async def answer(self: Any, request: Request, context: Context) -> Response:
        try:
            return await method(self, request, context)
        except Exception as error:
            await refuse(context, error, method.__name__)

    return answer


async def refuse(context: Context, error: Exception, method: str) -> NoReturn:
    """End a call with the status code of an error."""
    code, message, name = code_of(error)
    if not name:
        passed = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(extract_tb(error.__traceback__)))
        _LOG.error("a defect in %s: %s at %s", method, type(error).__name__, passed)
    await context.abort(code, message, ((ERROR_KEY, name),) if name else ())


class Retrieval(RetrievalServicer):
    """Answers for one device, which the caller closes after `work`."""

    def __init__(self, device: Device, work: Work) -> None:
        self._device = device
        self._work = work
        self._limits: Limits = work.limits

    @answering
    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:
        """See retrieval.proto, as for the other methods."""
        response = await self._work.read(context, lambda: pb.SearchResponse(hits=self._hits(request, self._limits.k)))
        if (size := response.ByteSize()) > self._limits.message_bytes:
            raise OverloadedError(
                f"{len(response.hits)} hits take {size:,} bytes, a message may have {self._limits.message_bytes:,}: "
                "ask for fewer, or use SearchStream"
            )
        return response

    @answering
    async def SearchStream(self, request: pb.SearchRequest, context: Context) -> None:
        # Everything is read first: a client that reads slowly must not hold a view of the store open.
        hits = await self._work.read(context, lambda: self._hits(request, self._limits.streamed))
        async with self._work.time_of(context, self._limits.seconds):
            for hit in hits:
                await context.write(hit)

    @answering
    async def Add(self, requests: AsyncIterator[pb.AddRequest], context: Context) -> pb.AddResponse:
        async with self._work.time_of(context, self._limits.adding_seconds) as end:
            located = await self._received(requests, end)
            await _still_there(context)
            change = await self._work.write_before(end, lambda: self._put(located))
        return pb.AddResponse(added=change.added, replaced=change.replaced, unchanged=change.unchanged)

    @answering
    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveResponse:
        def remove() -> int:
            removed = self._device.remove(request.ids) if request.ids else 0
            return removed + (self._device.catalog.remove(request.documents) if request.documents else 0)

        return pb.RemoveResponse(removed=await self._work.write(context, remove))

    @answering
    async def RecordFeedback(self, request: pb.RecordFeedbackRequest, context: Context) -> pb.RecordFeedbackResponse:
        opened = [Feedback(item.query, item.passage_id) for item in request.opened]
        for item in opened:
            self._check_query(item.query)
        await self._work.write(context, lambda: self._device.record(opened))
        return pb.RecordFeedbackResponse()

    @answering
    async def ListFeedback(self, request: pb.ListFeedbackRequest, context: Context) -> pb.ListFeedbackResponse:
        opened = await self._work.read(context, self._device.feedback)
        response = pb.ListFeedbackResponse(opened=(pb.Opened(query=q, passage_id=i) for q, i in opened))
        if response.ByteSize() > self._limits.message_bytes:
            raise OverloadedError(
                f"{len(opened):,} opened results pass the limit of one message: `stillroom feedback list` shows them"
            )
        return response

    @answering
    async def EraseFeedback(self, request: pb.EraseFeedbackRequest, context: Context) -> pb.EraseFeedbackResponse:
        return pb.EraseFeedbackResponse(erased=await self._work.write(context, self._device.erase_feedback))

    @answering
    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        return await self._work.read(context, lambda: wire.status_message(self._device.status()))

    def _hits(self, request: pb.SearchRequest, most: int) -> list[pb.Hit]:
        k = request.k or _K
        if k > most:
            raise SettingsError(f"k = {k} is out of range: at most {most:,} here; SearchStream gives more than Search")
        self._check_query(request.query)
        mode = wire.mode_of(request.mode)
        hits = self._device.search(request.query, k, mode=mode, where=request.where or None)
        messages = [wire.hit_message(hit) for hit in hits]
        if request.snippets:
            for message, hit in zip(messages, hits, strict=True):
                _show(message, hit, request.query)
        return messages

    def _check_query(self, query: str) -> None:
        if not query.strip():
            raise SettingsError("the query is empty: say what you look for")
        if len(query) > self._limits.query_characters:
            raise SettingsError(
                f"the query has {len(query):,} characters: {self._limits.query_characters:,} are read; shorten it"
            )

    async def _received(self, requests: AsyncIterator[pb.AddRequest], end: float) -> list[Located]:
        """The passages of all messages, embedded as they come in."""
        located: list[Located] = []
        size = 0
        async for request in requests:
            size += request.ByteSize()
            fresh = [self._located(message) for message in request.passages]
            if len(located) + len(fresh) > self._limits.added or size > self._limits.added_bytes:
                raise OverloadedError(
                    f"one Add takes {self._limits.added:,} passages and {self._limits.added_bytes:,} bytes: "
                    "send the rest with another"
                )
            located += fresh
            batches = iter(fresh)
            while batch := list(islice(batches, _BATCH)):
                await self._work.write_before(end, lambda batch=batch: self._embed(batch))  # type: ignore[misc]
        return located

    def _located(self, message: pb.Passage) -> Located:
        found = wire.located_of(message, self._device.identity.name)
        p, most = found.passage, self._limits.passage_characters
        if not p.id:
            raise DataError("a passage has no id: give each one of its own, by which it is replaced and removed")
        if (length := len(p.id) + len(p.full_text)) > most:
            raise DataError(f"passage {p.id[:200]!r} has {length:,} characters: at most {most:,}; cut it into several")
        for name, value in found.metadata.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(f"passage {p.id!r}: metadata {name!r} = {value} is no number that can be stored")
        return found

    def _embed(self, batch: Sequence[Located]) -> None:
        """Make the vectors that are not known; they outlive a stream that breaks."""
        catalog = self._device.catalog
        while lacking := catalog.lacking([item.passage for item in batch]):
            with suppress(
                TowerChangedError
            ):  # another release is in use since: what is lacking is another question now
                catalog.stage(lacking, self._device.embed(lacking))

    def _put(self, located: Sequence[Located]) -> Change:
        self._embed(located)  # nothing, unless another release came while the stream did
        change = self._device.catalog.put_lone(located)
        self._device.catalog.unstage()
        return change


async def _still_there(context: Context) -> None:
    """Go on only if the client still waits.

    To gRPC's readers a stream that was cancelled, or whose connection broke, ends like one that is complete; the news
    that it was may come later. Headers cannot be sent to it, though.
    """
    try:
        await context.send_initial_metadata(())
    except InternalError:
        raise asyncio.CancelledError from None


def _show(message: pb.Hit, hit: Hit, query: str) -> None:
    from stillroom_client.show import highlights, snippet

    message.snippet = snippet(hit.text, query)
    message.highlights.extend(pb.Span(start=a, stop=b) for a, b in highlights(message.snippet, query))


async def drained(work: Work, grace: float) -> None:
    """Return when no call is pending, or after `grace` seconds."""
    for _ in range(int(grace * 100)):
        if not work.pending:
            return
        await asyncio.sleep(0.01)
