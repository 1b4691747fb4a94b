"""The in-process grid against a loop without Flower, and against everything that a network would not do."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from stillroom_shared.errors import ProtocolError, SettingsError
from stillroom_simulations.engine import Block, Faults, InProcessGrid, run_server_app
from stillroom_simulations.flower_internals import SUPERLINK_NODE_ID, ErrorCode

Vector = npt.NDArray[np.float64]
_NODES = {node_id: {"seed": node_id} for node_id in range(1000, 1200)}
_DIM = 5


def _content(**arrays: Vector) -> RecordDict:
    return RecordDict({name: ArrayRecord([array]) for name, array in arrays.items()})


def _vector(message: Message, name: str = "model") -> Vector:
    record = message.content[name]
    assert isinstance(record, ArrayRecord)
    return record.to_numpy_ndarrays()[0]


def _step(model: Vector, seed: int, visits: int) -> Vector:
    """What one client answers: depends on the model, on who it is and on how often it was asked before."""
    return 0.5 * model + np.random.default_rng(seed).normal(size=_DIM) / visits


def _visit(context: Context) -> int:
    """How often this node has been asked, this time included: kept in `Context.state`."""
    visits = context.state.config_records.setdefault("visits", ConfigRecord({"n": 0}))
    visits["n"] = 1 + cast(int, visits["n"])
    return cast(int, visits["n"])


def _numbers(content: RecordDict) -> list[int]:
    return cast(list[int], content.config_records["config"]["list"])


def _toy_client() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        visits = _visit(context)
        seed = int(context.node_config["seed"])
        return Message(_content(model=_step(_vector(message), seed, visits)), reply_to=message)

    return app


def _toy_server(
    rounds: int, after: Callable[[Iterable[Message]], Iterable[Message]] = lambda replies: replies
) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        model, cohort = np.zeros(_DIM), sorted(grid.get_node_ids())
        for round_ in range(1, rounds + 1):
            content = _content(model=model)
            messages = [Message(content, node_id, "train", group_id=str(round_)) for node_id in cohort]
            total = np.zeros(_DIM)
            for reply in after(grid.send_and_receive(messages)):
                total += _vector(reply) if reply.has_content() else 0.0
            model = total / len(cohort)
        context.state["model"] = ArrayRecord([model])

    return app


def _reference(rounds: int, *, silent: Callable[[int, int], bool] = lambda round_, node_id: False) -> Vector:
    """The same computation as a loop, without messages, apps or copies."""
    model, visits = np.zeros(_DIM), dict.fromkeys(_NODES, 0)
    for round_ in range(1, rounds + 1):
        total = np.zeros(_DIM)
        for node_id in sorted(_NODES):
            if not silent(round_, node_id):
                visits[node_id] += 1
                total += _step(model, node_id, visits[node_id])
        model = total / len(_NODES)
    return model


def _grid(client_app: ClientApp | None = None, **settings: object) -> InProcessGrid:
    return InProcessGrid(client_app=client_app or _toy_client(), nodes=_NODES, **settings)  # type: ignore[arg-type]


def _final_model(context: Context) -> Vector:
    return context.state.array_records["model"].to_numpy_ndarrays()[0]


def _send(grid: InProcessGrid, node_ids: Iterable[int], *, ttl: float | None = None, round_: int = 1) -> list[Message]:
    content = _content(model=np.ones(_DIM))
    return [grid.create_message(content, "train", node_id, str(round_), ttl) for node_id in node_ids]


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_equals_a_loop_without_flower(block: int) -> None:
    """A lost, doubled or misrouted message, or state that does not persist, would change the model a little."""
    context = run_server_app(_toy_server(3), _grid(block=block))
    np.testing.assert_allclose(_final_model(context), _reference(3), rtol=1e-12)
    assert np.abs(_final_model(context) - _reference(2)).max() > 0.01, "the comparison could not tell rounds apart"


def test_failing_and_offline_clients_are_silent_and_nobody_else_is() -> None:
    """A faulty node that took its neighbours in the block with it would look like ordinary dropout."""
    faults = Faults(
        drop=lambda round_, node_id: node_id % 7 == round_, fail=lambda round_, node_id: node_id % 11 == round_
    )
    expected = _reference(3, silent=lambda round_, node_id: node_id % 7 == round_ or node_id % 11 == round_)
    grid = _grid(faults=faults)
    np.testing.assert_allclose(_final_model(run_server_app(_toy_server(3), grid)), expected, rtol=1e-12)
    assert grid.failures == 0, "faults that were asked for are no defect of the ClientApp"


def test_messages_are_flowers() -> None:
    """Apps that route by metadata would work here and break on the deployment engine."""
    seen: list[Message] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(message)
        assert context.node_id == message.metadata.dst_node_id and context.run_config == {"rank": 4}
        return Message(_content(model=np.zeros(1)), reply_to=message)

    grid = _grid(app, run_config={"rank": 4}, run_id=77)
    sent = _send(grid, [1003, 1001], ttl=30.0, round_=9)
    replies = list(grid.send_and_receive(sent, timeout=10.0))
    for original, received, reply in zip(sent, seen, replies, strict=True):
        assert len(original.metadata.message_id) == 64
        assert received.metadata.message_id == original.metadata.message_id == reply.metadata.reply_to_message_id
        assert received.metadata.src_node_id == reply.metadata.dst_node_id == SUPERLINK_NODE_ID
        assert received.metadata.dst_node_id == reply.metadata.src_node_id == original.metadata.dst_node_id
        assert received.metadata.run_id == reply.metadata.run_id == grid.run.run_id == 77
        assert received.metadata.group_id == reply.metadata.group_id == "9"
        assert received.metadata.ttl == 30.0 and 0 < reply.metadata.ttl <= 30.0
    assert len({message.metadata.message_id for message in [*sent, *replies]}) == 4


def test_neither_side_sees_the_others_mutations() -> None:
    """Shared records make a simulation agree with itself while a deployment would not."""
    answers: list[RecordDict] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        received = list(_numbers(message.content))
        answer = _content(model=_vector(message))
        answer["config"] = ConfigRecord({"list": received})
        answers.append(answer)
        reply = Message(answer, reply_to=message)
        _numbers(message.content).append(99)
        message.content["model"] = ArrayRecord([np.full(_DIM, 99.0)])
        message.metadata.group_id, message.metadata.dst_node_id = "99", 1199
        return reply

    grid = _grid(app)
    content = _content(model=np.ones(_DIM))
    content["config"] = ConfigRecord({"list": [1, 2]})
    replies = grid.send_and_receive([grid.create_message(content, "train", node_id, "1") for node_id in (1000, 1001)])
    content["model"] = ArrayRecord([np.full(_DIM, -1.0)])  # after sending, before any client has run
    _numbers(content).append(-1)
    for node_id, reply in zip((1000, 1001), replies, strict=True):
        _numbers(answers[-1]).append(98)
        answers[-1]["model"] = ArrayRecord([np.full(_DIM, 98.0)])
        assert (reply.metadata.src_node_id, reply.metadata.group_id) == (node_id, "1")
        assert _numbers(reply.content) == [1, 2]
        np.testing.assert_array_equal(_vector(reply), np.ones(_DIM))


def test_clients_do_not_share_configuration() -> None:
    """A node that changes its run_config or node_config would change everybody's, or the caller's dictionary."""
    seen: list[tuple[object, object]] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append((context.run_config["rank"], context.node_config["seed"]))
        context.run_config["rank"] = context.node_config["seed"] = -1
        return Message(RecordDict(), reply_to=message)

    grid = _grid(app, run_config={"rank": 4})
    list(grid.send_and_receive(_send(grid, [1000, 1001])))
    assert seen == [(4, 1000), (4, 1001)] and _NODES[1000] == {"seed": 1000}


def test_a_client_that_raises_becomes_an_error_reply_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """An exception that ends the simulation, or quotes a query to the server, or vanishes unseen; its state stays."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        visits = _visit(context)
        if visits == 1:
            raise ValueError("how do I hide a body")
        return Message(_content(model=np.array([float(visits)])), reply_to=message)

    grid = _grid(app)
    (failed,) = grid.send_and_receive(_send(grid, [1000]))
    assert failed.has_error() and not failed.has_content()
    assert failed.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION and failed.metadata.src_node_id == 1000
    assert "body" not in repr(failed)
    assert grid.failures == 1 and "how do I hide a body" in caplog.text
    (retried,) = grid.send_and_receive(_send(grid, [1000]))
    assert _vector(retried) == [2.0]


def test_an_answer_that_is_no_reply_to_the_message_is_an_error() -> None:
    """A SuperLink refuses an answer to another message; accepting it here would credit one node with two updates."""
    first: list[Message] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        first.append(message)
        return Message(RecordDict(), reply_to=first[0]) if context.node_id < 1002 else None  # type: ignore[return-value]

    grid = _grid(app)
    good, *bad = grid.send_and_receive(_send(grid, [1000, 1001, 1002]))
    assert good.has_content()
    assert [(reply.metadata.src_node_id, reply.has_error()) for reply in bad] == [(1001, True), (1002, True)]


def test_prepare_gets_each_block_before_it_is_delivered() -> None:
    """A trainer that saw other objects, unreachable clients or half a block would train the wrong updates."""
    events: list[tuple[str, list[int]]] = []
    prepared: dict[int, tuple[Message, Context]] = {}
    app = ClientApp()

    def prepare(block: Block) -> None:
        events.append(("prepare", [context.node_id for _, context in block]))
        prepared.update({context.node_id: (message, context) for message, context in block})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        events.append(("train", [context.node_id]))
        assert prepared[context.node_id][0] is message and prepared[context.node_id][1] is context
        return Message(RecordDict(), reply_to=message)

    faults = Faults(drop=lambda _, node_id: node_id == 1001, fail=lambda _, node_id: node_id in (1002, 1005))
    grid = _grid(app, prepare=prepare, block=3, faults=faults)
    assert len(list(grid.send_and_receive(_send(grid, range(1000, 1007))))) == 7
    assert events == [
        ("prepare", [1000]), ("train", [1000]),
        ("prepare", [1003, 1004]), ("train", [1003]), ("train", [1004]),
        ("prepare", [1006]), ("train", [1006]),
    ]  # fmt: skip


def test_a_defect_in_prepare_is_not_taken_for_failing_clients() -> None:
    """A broken trainer that looked like sixty-four failing devices would still produce a figure."""

    def prepare(block: Block) -> None:
        raise ZeroDivisionError

    grid = _grid(prepare=prepare)
    with pytest.raises(ZeroDivisionError):
        list(grid.send_and_receive(_send(grid, [1000])))


def test_memory_is_flat_in_the_number_of_clients() -> None:
    """Replies kept until the round ends make ten thousand clients need ten thousand updates of memory."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(_content(model=np.zeros(25_000)), reply_to=message)  # 200 kB

    def peak(after: Callable[[Iterable[Message]], Iterable[Message]]) -> int:
        grid = _grid(app)
        messages = _send(grid, _NODES)
        tracemalloc.start()
        try:
            for _reply in after(grid.send_and_receive(messages)):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(iter) < 5_000_000
    assert peak(list) > 35_000_000, "200 replies that are kept would have to show"


def test_messages_that_wait_share_their_content() -> None:
    """One copy of the model's description for each client of the cohort, before the first has run."""
    grid = _grid()
    content = RecordDict({"numbers": ConfigRecord({"list": [1] * 10_000})})  # 80 kB, and mutable
    messages = [grid.create_message(content, "train", node_id, "1") for node_id in _NODES]
    tracemalloc.start()
    try:
        grid.push_messages(messages)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_no_messages_no_replies() -> None:
    """An empty cohort happens under Poisson sampling; it must not hang, fail or call the trainer with nothing."""
    blocks: list[Block] = []
    grid = _grid(prepare=blocks.append)
    assert list(grid.send_and_receive([])) == list(grid.pull_messages([])) == [] and not blocks


def test_what_a_superlink_would_not_deliver_is_refused() -> None:
    """On Flower's engine each of these fails, or is dropped with a line in a log and the server goes on without."""
    grid = _grid()
    good, other = _send(grid, [1000, 1001])
    grid.push_messages([good])
    with pytest.raises(ProtocolError, match="pass a list"):
        grid.send_and_receive(message for message in [good])
    with pytest.raises(ProtocolError, match="node 7 is not in this grid"):
        grid.send_and_receive(_send(grid, [7]))
    with pytest.raises(ProtocolError, match="no reply_to"):
        grid.send_and_receive([Message(RecordDict(), reply_to=good)])
    other.metadata.ttl = 0.0
    with pytest.raises(ProtocolError, match="ttl above 0"):
        grid.send_and_receive([other])
    with pytest.raises(SettingsError, match="Flower's own"):
        InProcessGrid(client_app=_toy_client(), nodes={1: {}})
    with pytest.raises(SettingsError, match="block is 0"):
        _grid(block=0)


def test_timeouts_and_times_to_live_count_virtual_seconds() -> None:
    """A late reply counted as in time, or a client that forgets what it did because its reply came late."""
    faults = Faults(drop=lambda _, node_id: node_id == 1003, delay=lambda _, node_id: (node_id - 1000) * 10.0)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        visits = _visit(context)
        return Message(RecordDict({"visits": ConfigRecord({"n": visits})}), reply_to=message)

    grid = _grid(app, faults=faults)

    def ask(*, timeout: float | None, ttl: float | None = None) -> dict[int, object]:
        messages = _send(grid, range(1000, 1004), ttl=ttl)
        replies = grid.send_and_receive(messages, timeout=timeout)
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        return {
            nodes[reply.metadata.reply_to_message_id]: reply.content.config_records["visits"]["n"]
            if reply.has_content()
            else f"error {reply.error.code}"
            for reply in replies
        }

    offline, expired = f"error {ErrorCode.NODE_UNAVAILABLE}", f"error {ErrorCode.MESSAGE_UNAVAILABLE}"
    assert ask(timeout=15.0) == {1000: 1, 1001: 1}
    assert ask(timeout=60.0) == {1000: 2, 1001: 2, 1002: 2, 1003: offline}
    assert ask(timeout=None, ttl=15.0) == {1000: 3, 1001: 3, 1002: expired, 1003: expired}
    assert ask(timeout=14.0, ttl=15.0) == {1000: 4, 1001: 4}
    assert ask(timeout=None) == {1000: 5, 1001: 5, 1002: 5, 1003: offline}


def test_the_link_answers_for_a_node_that_is_offline() -> None:
    """A server that reads the node from such a reply would blame, or count, the SuperLink."""
    grid = _grid(faults=Faults(drop=lambda _, node_id: True))
    (message,) = _send(grid, [1000])
    (reply,) = grid.send_and_receive([message])
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert reply.metadata.src_node_id == reply.metadata.dst_node_id == SUPERLINK_NODE_ID


def test_delays_reorder_replies() -> None:
    """A server that pairs replies with its own list by position passes as long as replies come in order."""
    grid = _grid(faults=Faults(delay=lambda _, node_id: float(-node_id % 5)), block=5)
    replies = [reply.metadata.src_node_id for reply in grid.send_and_receive(_send(grid, range(1000, 1010)))]
    assert replies == [1000, 1004, 1003, 1002, 1001, 1005, 1009, 1008, 1007, 1006]


def test_push_then_pull() -> None:
    """An app that polls must get every reply once, and an error instead of waiting for ever for one that is gone."""
    grid = _grid(block=2)
    ids = grid.push_messages(_send(grid, [1000, 1001, 1002]))
    first = list(grid.pull_messages(ids[1:]))
    assert [reply.metadata.src_node_id for reply in first] == [1001, 1002]
    again = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(ids)}
    assert again[ids[0]].has_content() and again[ids[0]].metadata.src_node_id == 1000
    assert {again[gone].error.code for gone in ids[1:]} == {ErrorCode.MESSAGE_UNAVAILABLE}


def test_random_faults_depend_on_seed_round_and_node_alone() -> None:
    """Faults drawn from one running generator change when a round is resumed or a cohort differs."""
    places = [(round_, node_id) for round_ in range(1, 11) for node_id in _NODES]

    def hits(fault: Callable[[int, int], bool], order: list[tuple[int, int]]) -> set[tuple[int, int]]:
        return {place for place in order if fault(*place)}

    faults = Faults.random(seed=3, drop=0.2, fail=0.2, delay=4.0)
    dropped = hits(faults.drop, places)
    assert dropped == hits(Faults.random(seed=3, drop=0.2).drop, places[::-1])
    assert abs(len(dropped) - 400) < 4 * np.sqrt(2000 * 0.2 * 0.8)
    for other in (hits(faults.fail, places), hits(Faults.random(seed=4, drop=0.2).drop, places)):
        # Independent sets of 400 in 2000 share about 80; a generator that is reused would share them all.
        assert abs(len(dropped & other) - 80) < 4 * np.sqrt(2000 * 0.04 * 0.96)
    assert abs(np.mean([faults.delay(*place) for place in places]) - 4.0) < 4 * 4.0 / np.sqrt(2000)
    assert not hits(Faults.random(seed=3).drop, places) and Faults.random(seed=3).delay(1, 1000) == 0.0


@pytest.mark.parametrize(("name", "value"), [("drop", 1.5), ("fail", -0.1), ("delay", -1.0), ("drop", float("nan"))])
def test_impossible_faults_are_refused(name: str, value: float) -> None:
    """A percentage given for a probability would drop every node."""
    with pytest.raises(SettingsError, match=f"faults.{name} is {value}"):
        Faults.random(seed=0, **{name: value})


def test_a_run_leaves_no_identity_behind() -> None:
    """Flower keeps the current run in process-wide state; a second run in this process would carry the first one's."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        Message(RecordDict(), 1000, "train")
        raise KeyError("the server app fails")

    with pytest.raises(KeyError):
        run_server_app(app, _grid())
    with pytest.raises(RuntimeError, match="not set"):
        Message(RecordDict(), 1000, "train")
