"""A client of a device that is served: the searches of `Device`, from another process.

    with connect(Path("my-device")) as client:
        for hit in client.search("how are keys rotated"):
            print(hit.score, hit.title)

It returns the values and raises the errors that `Device` does, and `ServiceError` where the service does not answer. What only
reads is tried again when the connection breaks, four times within seconds (gRFC A6); what writes never is, because the first
try may have been done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stillroom_client.analysis import clean
from stillroom_client.device import Status
from stillroom_client.documents import Located
from stillroom_client.ranking import Hit, Mode
from stillroom_client.serving import retrieval_pb2 as pb
from stillroom_client.serving import wire
from stillroom_client.serving.access import certificate_of, token_of
from stillroom_client.serving.codes import raised
from stillroom_client.serving.places import Address, read_address
from stillroom_client.serving.retrieval_pb2_grpc import RetrievalStub
from stillroom_client.store import Change, Feedback
from stillroom_shared.closing import Closing
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import SettingsError

T = TypeVar("T")

_SERVICE = "stillroom.retrieval.v1.Retrieval"
_MESSAGE_BYTES = 2**20  # of passages: a quarter of what a server takes
_STREAM_PASSAGES = 5_000
_STREAM_BYTES = 32 * 2**20
_RETRIES = {
    "methodConfig": [
        {
            "name": [
                {"service": _SERVICE, "method": method}
                for method in ("Search", "SearchStream", "ListFeedback", "Status")
            ],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def connect(
    target: Path | str, *, timeout: float = 30.0, token: str | None = None, certificate: bytes | None = None
) -> Client:
    """A client of a device that `stillroom serve` serves.

    Args:
        target: the home of the device; or "unix:PATH", or "HOST:PORT" with its token and certificate.
        timeout: seconds for each call; adding has half an hour.
        token: of a server on loopback; read from the home when that is the target.
        certificate: the server's, in PEM; the same.

    Raises:
        ServiceError: the home is not served.
        SettingsError: the target is none of these.
    """
    if not timeout > 0:
        raise SettingsError(f"timeout = {timeout} is out of range: give the seconds to wait for an answer")
    if isinstance(target, Path) or Path(target).is_dir():
        home = Path(target)
        address = read_address(home)
        if address.secure:
            token, certificate = token or token_of(home), certificate or certificate_of(home)
    elif target.startswith("unix:"):
        address = Address(target, secure=False)
    elif target.rpartition(":")[2].isdigit():
        if not (token and certificate):
            raise SettingsError(f"{target} needs a token and a certificate: name the home, or give both")
        address = Address(target, secure=True)
    else:
        raise SettingsError(f"{target!r} is neither a home, nor unix:PATH, nor HOST:PORT: name one")
    return Client(_channel(address, token, certificate), str(address), timeout=timeout)


class Client(Closing):
    """An open connection; threads may share it. `connect` makes one."""

    def __init__(self, channel: grpc.Channel, server: str, *, timeout: float) -> None:
        self.server = server
        self._channel = channel
        self._timeout = timeout
        self._stub: Any = RetrievalStub(channel)  # type: ignore[no-untyped-call]

    def search(self, text: str, k: int = 10, *, mode: Mode = "hybrid", where: str | None = None) -> list[Hit]:
        """The k best passages for a plain text, best first; see `Device.search`. At most 1,000."""
        request = self._request(text, k, mode, where)
        response: pb.SearchResponse = self._call(self._stub.Search, request)
        return [wire.hit_of(message) for message in response.hits]

    def stream(self, text: str, k: int = 10, *, mode: Mode = "hybrid", where: str | None = None) -> Iterator[Hit]:
        """The same one by one, at most 10,000; leaving the loop ends the call."""
        call = self._stub.SearchStream(self._request(text, k, mode, where), timeout=self._timeout)
        try:
            for message in call:
                yield wire.hit_of(message)
        except grpc.RpcError as error:
            raise raised(error, self.server) from None
        finally:
            call.cancel()

    def add(self, passages: Iterable[Passage | Located]) -> Change:
        """Add or replace passages by their ids, embedded by the device; an owner of "" is the device's name.

        Up to 5,000 passages are one change, searched from then on; more are several. Not tried again by itself: calling it
        again after an error is safe, what was stored is neither embedded nor touched.

        Args:
            passages: `Located` for one with metadata and a position.
        """
        messages = (wire.passage_message(given) for given in passages)
        added = replaced = unchanged = 0
        while requests := list(_stream(messages)):
            response: pb.AddResponse = self._call(self._stub.Add, iter(requests), timeout=max(self._timeout, 1_800.0))
            added, replaced = added + response.added, replaced + response.replaced
            unchanged += response.unchanged
        return Change(added, replaced, unchanged)

    def remove(self, ids: Iterable[str] = (), *, documents: Iterable[str] = ()) -> int:
        """Remove passages by id and documents by path, with vectors and feedback; how many passages there were."""
        request = pb.RemoveRequest(ids=list(ids), documents=list(documents))
        response: pb.RemoveResponse = self._call(self._stub.Remove, request)
        return response.removed

    def record(self, opened: Iterable[Feedback | tuple[str, str]]) -> None:
        """Keep which passage was opened after which query, on the device; `NotFoundError` for an unknown passage."""
        pairs = (pb.Opened(query=query, passage_id=passage) for query, passage in opened)
        self._call(self._stub.RecordFeedback, pb.RecordFeedbackRequest(opened=pairs))

    def feedback(self) -> list[Feedback]:
        """What was opened, (query, passage id), each pair once, latest last."""
        response: pb.ListFeedbackResponse = self._call(self._stub.ListFeedback, pb.ListFeedbackRequest())
        return [Feedback(item.query, item.passage_id) for item in response.opened]

    def erase_feedback(self) -> int:
        """Forget what was opened, on the disk too; how many pairs there were."""
        response: pb.EraseFeedbackResponse = self._call(self._stub.EraseFeedback, pb.EraseFeedbackRequest())
        return response.erased

    def status(self) -> Status:
        """What the device holds, as one generation."""
        response: pb.StatusResponse = self._call(self._stub.Status, pb.StatusRequest())
        return wire.status_of(response)

    def healthy(self) -> bool:
        """Whether the service says that it serves; False too when it does not answer."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(service=_SERVICE), timeout=self._timeout)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Leave; calls that wait fail."""
        self._channel.close()

    def _request(self, text: str, k: int, mode: Mode, where: str | None) -> pb.SearchRequest:
        if not 1 <= k < 2**32:
            raise SettingsError(f"k = {k} is out of range: ask for at least 1 result")
        return pb.SearchRequest(query=clean(text), k=k, mode=wire.mode_number(mode), where=clean(where or ""))

    def _call(self, method: Callable[..., T], request: Any, *, timeout: float | None = None) -> T:
        try:
            return method(request, timeout=timeout or self._timeout)
        except grpc.RpcError as error:
            raise raised(error, self.server) from None


def _channel(address: Address, token: str | None, certificate: bytes | None) -> grpc.Channel:
    # Not through a proxy of the environment: the server is on this machine.
    options = [("grpc.service_config", json.dumps(_RETRIES)), ("grpc.enable_http_proxy", 0)]
    if not address.secure:
        return grpc.insecure_channel(address.target, options)
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(certificate), grpc.access_token_call_credentials(token or "")
    )
    return grpc.secure_channel(address.target, credentials, options)


def _stream(messages: Iterator[pb.Passage]) -> Iterator[pb.AddRequest]:
    """Requests of one stream, as large as a server takes; nothing when no passage is left."""
    request, size, total = pb.AddRequest(), 0, 0
    for message in islice(messages, _STREAM_PASSAGES):
        request.passages.append(message)
        size, total = size + message.ByteSize(), total + message.ByteSize()
        if size >= _MESSAGE_BYTES:
            yield request
            request, size = pb.AddRequest(), 0
        if total >= _STREAM_BYTES:
            break
    if request.passages:
        yield request
