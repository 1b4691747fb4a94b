"""The service and its client are the device, seen through a wire: same hits, same errors, nothing more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.client.devices import ANIMALS, adapter_folder, passages

from stillroom_client.catalog import Embedded
from stillroom_client.documents import Document, Located, Position, Scalar
from stillroom_client.search import Change, Device, Feedback, FilterError, Hit
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError, NotFoundError, ReleaseError, SettingsError, StoreError
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey

grpc = pytest.importorskip("grpc")
pytest.importorskip("grpc_reflection")

from tests.client.served import code, serving  # noqa: E402

from stillroom_client.serving import client as clients  # noqa: E402
from stillroom_client.serving import codes, wire  # noqa: E402
from stillroom_client.serving import retrieval_pb2 as pb  # noqa: E402
from stillroom_client.serving.client import Client, connect  # noqa: E402
from stillroom_client.serving.places import Address  # noqa: E402
from stillroom_client.serving.retrieval_pb2_grpc import RetrievalStub  # noqa: E402
from stillroom_client.serving.server import GrpcServer  # noqa: E402
from stillroom_client.serving.work import Limits  # noqa: E402

SMALL = Limits(pending=3, k=20, streamed=40, query_characters=100, passage_characters=500, added=50, added_bytes=20_000)


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release) -> Iterator[Device]:
    """Thirty passages, ten of them of a document with pages and metadata of every type."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as made:
        made.add(passages(ANIMALS, "The {} eats leaves.") + passages([f"p{n}" for n in range(10)]))
        metadata: dict[str, Scalar] = {
            "type": "pdf",
            "year": 2024,
            "weight": 0.5,
            "signed": True,
            "section": "Größe > 天",
        }
        document = Document(path="/library/zoo.pdf", type="pdf", title="Zoo", metadata=metadata)
        located = [
            Located(
                Passage(f"zoo#{n}", "zoo", f"Page {n} lists members.", "Zoo"),
                Position(place=n, page=n + 1, line=None, start=n * 100, stop=n * 100 + 50),
                {"page": n + 1},
            )
            for n in range(10)
        ]
        fresh = made.catalog.lacking([item.passage for item in located])
        made.catalog.stage(fresh, made.embed(fresh))
        made.catalog.put(document, located)
        yield made


@pytest.fixture
def client(device: Device) -> Iterator[Client]:
    with serving(device), connect(device.home) as found:
        yield found


@pytest.fixture
def stub(device: Device) -> Iterator[Any]:
    """The bare stub, as programs in other languages have it, of a server with small limits."""
    with serving(device, limits=SMALL) as server:
        assert server.address is not None
        with grpc.insecure_channel(server.address.target) as channel:
            yield RetrievalStub(channel)  # type: ignore[no-untyped-call]


def counted(device: Device) -> list[int]:
    """How many passages each call of the device's tower embeds, from now on."""
    embedded, real = list[int](), device.embed

    def embed(passages: Sequence[Passage]) -> Embedded:
        embedded.append(len(passages))
        return real(passages)

    device.embed = embed  # type: ignore[method-assign]
    return embedded


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_hits_are_those_of_the_device_to_the_last_field(device: Device, client: Client, mode: Any) -> None:
    """Guards against a field that is lost on the wire, a None that becomes 0, and a filter that only one side knows."""
    for where in (None, "type=pdf and year>=2020", "owner=zoo and not page=3", "signed=true or weight<1"):
        expected = device.search("list its members", 12, mode=mode, where=where)
        assert client.search("list its members", 12, mode=mode, where=where) == expected
        assert list(client.stream("list its members", 12, mode=mode, where=where)) == expected
    assert any(hit.metadata["weight"] == 0.5 and hit.metadata["signed"] is True for hit in expected)
    assert {hit.position.line for hit in expected} == {None} and expected[0].position.stop
    assert len(client.search("leaves")) == 10
    assert client.status() == device.status()


def test_a_hit_of_any_content_survives_the_wire() -> None:
    """Guards against an integer that becomes a float, and against True that becomes 1."""
    values: dict[str, Scalar] = {"a": 1, "b": 1.0, "c": True, "d": "1", "e": -(2**62), "f": "", "g": False, "h": 0}
    hit = Hit(3, 0.1, "i", "o", "t", "x\0\u202e", None, 7, "/d", Position(place=4, line=0, stop=2**40), values)
    again = wire.hit_of(pb.Hit.FromString(wire.hit_message(hit).SerializeToString()))
    assert again == hit and [type(v) for v in again.metadata.values()] and again.position.page is None
    assert {name: type(value) for name, value in again.metadata.items()} == {n: type(v) for n, v in values.items()}
    with pytest.raises(DataError, match="metadata 'big' = "):
        wire.passage_message(Located(Passage("i", "o", "t"), metadata={"big": 2**70}))


def test_adding_is_one_change_that_keeps_metadata_and_place(device: Device, client: Client) -> None:
    """Guards against passages whose metadata no filter finds, and against an add that embeds what is stored."""
    new = [
        Located(
            Passage(f"n{n}", "", f"A numbat of kind {n}.", "Numbats"), Position(page=n + 1), {"kind": n, "wild": True}
        )
        for n in range(150)
    ]
    before = device.status().generation
    assert client.add(new) == Change(150, 0, 0)
    assert device.status().generation == before + 1
    [hit] = client.search("numbat", where="kind=7")
    assert (hit.passage_id, hit.owner, hit.title) == ("n7", device.identity.name, "Numbats")
    assert hit.position == Position(page=8) and hit.metadata == {"kind": 7, "wild": True, "owner": hit.owner}
    embedded = counted(device)
    changed: list[Passage | Located] = [Passage("n0", "", "Another text.", "Numbats"), *new[1:]]
    assert client.add(changed) == Change(0, 1, 149) and embedded == [1]
    assert client.add([Located(Passage("n1", "", new[1].passage.text, "Numbats"), metadata={"kind": 999})]) == Change(
        0, 0, 1
    )
    assert [hit.passage_id for hit in client.search("numbat", where="kind=999")] == ["n1"]
    assert client.remove(["n1", "never there"]) == 1
    assert client.remove(documents=["/library/zoo.pdf"]) == 10 and not device.has("zoo#1")


def test_a_stream_that_breaks_adds_nothing_and_its_work_is_not_lost(device: Device, stub: Any) -> None:
    """Guards against half of a change that is searched, and against embedding it all again after a break.

    The end of a cancelled stream and the news that it was cancelled race in the server, hence the repetition.
    """
    requests = [
        pb.AddRequest(passages=[pb.Passage(id=f"n{n}-{m}", text=f"numbat {n} {m}") for m in range(10)])
        for n in range(40)
    ]
    before = device.status().passages
    for n, request in enumerate(requests):
        asked = threading.Event()

        def slowly(request: pb.AddRequest = request, asked: threading.Event = asked) -> Iterator[pb.AddRequest]:
            yield request
            asked.wait(10)

        call = stub.Add.future(slowly())
        until(lambda n=n: device.store.query("SELECT count(*) FROM staged") == [(10 * (n + 1),)])  # type: ignore[misc]
        call.cancel()
        asked.set()
    embedded = counted(device)
    assert stub.Add(iter(requests[:5])).added == 50 and embedded == []
    assert not device.has("n5-0") and device.status().passages == before + 50


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (pb.Passage(text="x"), "has no id"),
        (pb.Passage(id="x", text="y" * 501), "at most 500"),
        (pb.Passage(id="x", metadata={"m": pb.Scalar(number=float("nan"))}), "metadata 'm' = nan"),
        (pb.Passage(id="x", metadata={"m": pb.Scalar()}), "metadata 'm' has no value"),
        (pb.Passage(id="zoo#1", text="stolen"), "occurs in /library/zoo.pdf"),
    ],
)
def test_passages_that_cannot_be_stored_are_refused_whole(device: Device, stub: Any, bad: Any, message: str) -> None:
    """Guards against a NaN that makes every filter fail, and against a passage torn out of its document."""
    before = device.status()
    with pytest.raises(grpc.RpcError) as refused:
        stub.Add(iter([pb.AddRequest(passages=[pb.Passage(id="good", text="good"), bad])]))
    assert code(refused) is grpc.StatusCode.INVALID_ARGUMENT and message in refused.value.details()
    assert device.status() == before


def test_limits_are_refused_with_their_number(stub: Any) -> None:
    """Guards against a request that takes the memory or the time of everybody else."""
    for method, request, expected, message in (
        (stub.Search, pb.SearchRequest(query="x", k=21), "INVALID_ARGUMENT", "at most 20"),
        (lambda r: list(stub.SearchStream(r)), pb.SearchRequest(query="x", k=41), "INVALID_ARGUMENT", "at most 40"),
        (stub.Search, pb.SearchRequest(query="x" * 101), "INVALID_ARGUMENT", "has 101 characters"),
        (stub.Search, pb.SearchRequest(query=" \n"), "INVALID_ARGUMENT", "query is empty"),
        (stub.Search, pb.SearchRequest(query="x", mode=9), "INVALID_ARGUMENT", "mode = 9 is unknown"),  # type: ignore[arg-type]
        (stub.Search, pb.SearchRequest(query="x" * (5 * 2**20)), "RESOURCE_EXHAUSTED", "larger than max"),
        (
            lambda r: stub.Add(iter([r] * 6)),
            pb.AddRequest(passages=[pb.Passage(id=f"{n}", text="x") for n in range(10)]),
            "RESOURCE_EXHAUSTED",
            "takes 50 passages",
        ),
        (
            lambda r: stub.Add(iter([r] * 50)),
            pb.AddRequest(passages=[pb.Passage(id="x", text="x" * 490)]),
            "RESOURCE_EXHAUSTED",
            "20,000 bytes",
        ),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            method(request)
        assert (code(refused).name, message in refused.value.details()) == (expected, True), refused.value.details()
    assert len(list(stub.SearchStream(pb.SearchRequest(query="leaves", k=40)))) == 30
    assert len(stub.Search(pb.SearchRequest(query="leaves")).hits) == 10


def test_an_answer_larger_than_a_message_says_so(device: Device) -> None:
    """Guards against a client that sees its own library's error about bytes, with no way on."""
    device.add([Passage(f"long{n}", "zoo", "leaf " * 200) for n in range(20)])
    with serving(device, limits=Limits(message_bytes=10_000)), connect(device.home) as client:
        with pytest.raises(codes.OverloadedError, match=r"20 hits take .* ask for fewer, or use SearchStream"):
            client.search("leaf", 20, mode="bm25")
        assert len(list(client.stream("leaf", 20, mode="bm25"))) == 20


def test_snippets_are_given_when_asked_for(stub: Any) -> None:
    """Guards against highlights that are off by the length of what was cut."""
    request = pb.SearchRequest(query="list members", k=1, snippets=True, where="type=pdf")
    [hit] = stub.Search(request).hits
    shown = [hit.snippet[span.start : span.stop] for span in hit.highlights]
    assert "lists" in shown and "members" in shown
    [plain] = stub.Search(pb.SearchRequest(query="list members", k=1)).hits
    assert not plain.snippet and not plain.highlights


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SettingsError("k"), "INVALID_ARGUMENT"),
        (FilterError("f"), "INVALID_ARGUMENT"),
        (DataError("d"), "INVALID_ARGUMENT"),
        (NotFoundError("n"), "NOT_FOUND"),
        (StoreError("s"), "UNAVAILABLE"),
        (ReleaseError("ä" * 9_000), "FAILED_PRECONDITION"),
    ],
)
def test_each_error_arrives_as_itself(device: Device, client: Client, error: Exception, expected: str) -> None:
    """Guards against a client that has to read messages to know what went wrong, and a message too long for its header."""

    def failing(*_: object, **__: object) -> None:
        raise error

    device.search = failing  # type: ignore[method-assign,assignment]
    with pytest.raises(type(error)) as found:
        client.search("x")
    assert type(found.value) is type(error) and str(found.value)[:50] == str(error)[:50]
    with grpc.insecure_channel(client.server) as channel, pytest.raises(grpc.RpcError) as refused:
        RetrievalStub(channel).Search(pb.SearchRequest(query="x"))  # type: ignore[no-untyped-call]
    assert code(refused).name == expected


def test_a_defect_tells_its_class_and_nothing_of_a_document(
    device: Device, client: Client, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against a traceback with somebody's text in a client, a log or a terminal."""

    def failing(text: str, *_: object, **__: object) -> None:
        raise ValueError(f"secret document and {text}")

    device.search = failing  # type: ignore[method-assign,assignment]
    with caplog.at_level(logging.DEBUG), pytest.raises(codes.ServiceError, match=r"INTERNAL.*ValueError") as found:
        client.search("private words")
    written = caplog.text + "".join(capfd.readouterr()) + str(found.value)
    assert "secret" not in written and "private" not in written
    assert "a defect in Search: ValueError at" in caplog.text and "test_serving.py" in caplog.text


def test_nothing_of_a_query_is_logged(
    client: Client, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against a debug log of what somebody searched for."""
    with caplog.at_level(logging.DEBUG):
        client.search("unspeakable okapi")
        with pytest.raises(FilterError):
            client.search("unspeakable okapi", where="unspeakable = ")
    assert "unspeakable" not in caplog.text + "".join(capfd.readouterr())


def blocked(device: Device) -> tuple[threading.Event, list[str]]:
    """Searches of the device wait for the event; the list has those that began."""
    go, begun, real = threading.Event(), list[str](), device.search

    def search(text: str, *rest: Any, **named: Any) -> list[Hit]:
        begun.append(text)
        go.wait(60)
        return real(text, *rest, **named)

    device.search = search  # type: ignore[method-assign]
    return go, begun


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_waits_too_long_or_is_cancelled_is_never_begun(device: Device) -> None:
    """Guards against a server that works for clients who left, while those who wait are late in turn."""
    go, begun = blocked(device)
    with serving(device, limits=Limits(workers=1)) as server:
        assert server.address is not None
        with grpc.insecure_channel(server.address.target) as channel:
            stub: Any = RetrievalStub(channel)  # type: ignore[no-untyped-call]
            first = stub.Search.future(pb.SearchRequest(query="first"))
            until(lambda: begun == ["first"])
            with pytest.raises(grpc.RpcError) as late:
                stub.Search(pb.SearchRequest(query="late"), timeout=0.2)
            assert code(late) is grpc.StatusCode.DEADLINE_EXCEEDED
            until(lambda: server._work.pending == 1)
            cancelled = stub.Search.future(pb.SearchRequest(query="cancelled"))
            until(lambda: server._work.pending == 2)
            cancelled.cancel()
            until(lambda: server._work.pending == 1)
            go.set()
            assert len(first.result().hits) == 10
            stub.Search(pb.SearchRequest(query="next"))
    assert begun == ["first", "next"]


def test_more_calls_than_may_wait_are_refused_at_once_and_health_still_answers(device: Device) -> None:
    """Guards against a queue that grows until every answer comes too late."""
    go, begun = blocked(device)
    with serving(device, limits=Limits(workers=1, pending=3)) as server, connect(device.home) as client:
        calls = [threading.Thread(target=client.search, args=(f"{n}",)) for n in range(3)]
        for call in calls:
            call.start()
        until(lambda: server._work.pending == 3 and len(begun) == 1)
        started = time.monotonic()
        with pytest.raises(codes.OverloadedError, match="3 calls are waiting already"):
            client.search("one too many")
        assert time.monotonic() - started < 1 and client.healthy()
        go.set()
        for call in calls:
            call.join()
        assert len(client.search("now")) == 10
    assert "one too many" not in begun


def test_the_server_ends_a_call_without_a_deadline(device: Device) -> None:
    """Guards against calls without deadline that hold their place for ever."""
    go, _ = blocked(device)
    with serving(device, limits=Limits(seconds=0.2)), connect(device.home) as client:
        with pytest.raises(codes.DeadlineError, match=r"not done within 0\.2 s"):
            client.search("x")
        go.set()


def test_a_deadline_of_the_client_names_the_remedy(device: Device) -> None:
    """Guards against "Deadline Exceeded" with nothing to do about it."""
    go, _ = blocked(device)
    with serving(device), connect(device.home, timeout=0.2) as client:
        with pytest.raises(codes.DeadlineError, match=r"in time|not done within"):
            client.search("x")
        go.set()


def test_what_has_begun_is_answered_when_the_server_stops(device: Device) -> None:
    """Guards against a restart that costs a search its answer."""
    go, begun = blocked(device)
    found: list[int] = []
    with serving(device, grace=5):
        client = connect(device.home)
        call = threading.Thread(target=lambda: found.append(len(client.search("x"))))
        call.start()
        until(lambda: bool(begun))
        threading.Timer(0.3, go.set).start()
    call.join()
    client.close()
    assert found == [10]
    with pytest.raises(codes.ServiceError, match="is not served: `stillroom serve --home"):
        connect(device.home)


def test_feedback_is_recorded_listed_and_erased(device: Device, client: Client) -> None:
    """Guards against feedback that is kept for a passage that is not there, and that cannot be taken back."""
    client.record([("who eats leaves", "tapir"), Feedback("lists", "zoo#1")])
    with pytest.raises(NotFoundError, match="passage 'nobody' is not in this index"):
        client.record([("x", "tapir"), ("x", "nobody")])
    assert client.feedback() == device.feedback() == [("who eats leaves", "tapir"), ("lists", "zoo#1")]
    assert client.erase_feedback() == 2 and device.feedback() == []


def test_health_and_reflection_are_those_of_grpc(device: Device, client: Client) -> None:
    """Guards against tools such as grpcurl and orchestrators that find nothing to talk to."""
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(client.server) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "stillroom.retrieval.v1.Retrieval"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"stillroom.retrieval.v1.Retrieval", "grpc.health.v1.Health"} <= set(database.get_services())
        methods = DescriptorPool(database).FindServiceByName("stillroom.retrieval.v1.Retrieval").methods_by_name
    assert {"Search", "SearchStream", "Add", "Remove", "Status", "RecordFeedback"} <= set(methods)


def test_reading_is_tried_again_and_writing_is_not() -> None:
    """Guards against an add that is done twice behind its caller's back."""
    import grpc as real

    seen: list[str] = []

    class Broken(real.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            method = details.method.rpartition("/")[2]

            def fail(_: Any, context: Any) -> Iterator[bytes]:
                seen.append(method)
                context.abort(real.StatusCode.UNAVAILABLE, "broken")
                yield b""

            return real.stream_stream_rpc_method_handler(fail)

    from concurrent.futures import ThreadPoolExecutor

    server = real.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Broken(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    address = Address(f"127.0.0.1:{port}", secure=False)
    with Client(clients._channel(address, None, None), "here", timeout=10) as client:
        calls: list[Callable[[], object]] = [
            lambda: client.search("x"), client.status, client.feedback, lambda: list(client.stream("x")),
            lambda: client.add(passages(["a"])), lambda: client.remove(["a"]), lambda: client.record([("q", "a")]),
            client.erase_feedback,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(codes.ServiceError, match="here does not answer"):
                call()
    server.stop(0)
    counted = {name: seen.count(name) for name in seen}
    assert all(counted[name] == 5 for name in ("Search", "Status", "ListFeedback", "SearchStream"))
    assert all(counted[name] == 1 for name in ("Add", "Remove", "RecordFeedback", "EraseFeedback"))


def test_large_additions_are_cut_into_messages_and_changes(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a client that cannot add more than one message, or one stream, holds."""
    monkeypatch.setattr(clients, "_STREAM_PASSAGES", 40)
    monkeypatch.setattr(clients, "_MESSAGE_BYTES", 500)
    tower = device.release.document_tower_hash
    monkeypatch.setattr(
        device, "embed", lambda given: Embedded(np.tile(np.eye(1, 32, dtype=np.float32), (len(given), 1)), tower)
    )
    with serving(device, limits=SMALL), connect(device.home) as client:
        before = device.status().generation
        assert client.add(passages([f"n{n}" for n in range(100)])) == Change(100, 0, 0)
        assert device.status().generation == before + 3 and client.add([]) == Change(0, 0, 0)


def test_an_adapter_that_another_process_adopts_is_searched_with_at_once(
    tmp_path: Path, device: Device, client: Client, tiny_release: Release, signing_key: SigningKey
) -> None:
    """Guards against a server that searches with the adapter of the day it was started."""
    before = client.search("list its members", mode="dense")
    folder = adapter_folder(tmp_path / "adapter", tiny_release, signing_key)
    with Device.open(device.home) as other:
        other.adopt(folder)
        expected = other.search("list its members", mode="dense")
    assert client.search("list its members", mode="dense") == expected != before


def test_a_server_that_cannot_search_does_not_start(tmp_path: Path, device: Device) -> None:
    """Guards against a service that says it is healthy and fails every search."""
    device.towers._release, device.towers._encoder = None, None
    (device.home / "release").unlink()
    with pytest.raises(ReleaseError), serving(device):
        pass
    with pytest.raises(codes.ServiceError, match="is not served"):
        connect(device.home)
    assert isinstance(GrpcServer(device), GrpcServer)
