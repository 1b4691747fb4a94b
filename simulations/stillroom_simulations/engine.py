"""The in-process engine: a real `ServerApp` and a real `ClientApp`, thousands of nodes, one process, no network.

`InProcessGrid` is a `flwr.serverapp.Grid`; the app objects cannot tell it from Flower's deployment engine, except by
speed. What it keeps of that engine, because a round that relies on less would break there:

- Nothing mutable is shared. Every record is copied when the server sends it and when the client answers.
- Messages go out when `send_and_receive` is called, and must come as a collection: Flower's grid walks them twice and
  fails on an iterator.
- A client that raises becomes an error reply; what it wrote to `Context.state` before stays. A node that is offline is
  answered by the link itself, whose replies name no node except through `reply_to_message_id`.
- Replies come in no order that a server may rely on.

What differs: replies are streamed (a client runs when its reply is asked for, and a reply is not kept once handed
over), so memory is flat in the number of clients; a message whose reply nobody asks for is not delivered. Time is
virtual: only `Faults.delay` counts against a timeout or a time to live, and nobody sleeps. The reason in a client's
error reply is a constant, where Flower 1.41 sends the coordinator the type and text of the exception
(`supernode/runtime/run_clientapp.py`), which can quote private data: an app that must not leak catches its own.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Self

import numpy as np
from flwr.app import Context, Error, Message, RecordDict, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from stillroom_shared.errors import ProtocolError, SettingsError
from stillroom_simulations.flower_internals import (
    SUPERLINK_NODE_ID,
    ErrorCode,
    Run,
    acting_as_server,
    copy_message,
    error_from_link,
    stamp,
)

Config = Mapping[str, UserConfigValue]
Block = Sequence[tuple[Message, Context]]
"""Messages about to be handed to the ClientApp one by one, each with its node's context."""

_LOG = logging.getLogger(__name__)
_CLIENT_FAILED = "the ClientApp raised an exception"
# A SuperLink calls a node offline after two missed heartbeats, which come every 30 s by default.
_SECONDS_UNTIL_OFFLINE = 60.0


def _never(round_: int, node_id: int) -> bool:
    return False


def _at_once(round_: int, node_id: int) -> float:
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, as functions of (round, node id); the round is the message's `group_id`, 0 if that is no number.

    drop: the node is offline: its ClientApp never runs, the link reports it unavailable after 60 virtual seconds.
    fail: the ClientApp raises before it does anything.
    delay: virtual seconds until the reply arrives. The ClientApp has run, even when the reply comes too late.

    >>> Faults(drop=lambda round_, node_id: round_ == 2).drop(2, 17)
    True
    >>> faults = Faults.random(seed=7, drop=0.25)
    >>> sum(faults.drop(1, node_id) for node_id in range(2, 1002))
    248
    """

    drop: Callable[[int, int], bool] = _never
    fail: Callable[[int, int], bool] = _never
    delay: Callable[[int, int], float] = _at_once

    @classmethod
    def random(cls, *, seed: int, drop: float = 0.0, fail: float = 0.0, delay: float = 0.0) -> Self:
        """Independent faults with these probabilities, and exponential delays with this mean in seconds.

        Each draw has its own generator, keyed by (seed, kind, round, node id): who fails does not depend on who else
        was asked or in which order, so an interrupted simulation resumes with the same faults.
        """
        for name, chance in (("drop", drop), ("fail", fail)):
            if not 0.0 <= chance <= 1.0:
                raise SettingsError(f"faults.{name} is {chance!r}: give a probability between 0 and 1")
        if delay < 0.0:
            raise SettingsError(f"faults.delay is {delay!r}: give a mean of at least 0 seconds")

        def generator(kind: int, round_: int, node_id: int) -> np.random.Generator:
            return np.random.default_rng((seed, kind, round_, node_id))

        return cls(
            drop=lambda round_, node_id: bool(generator(0, round_, node_id).random() < drop),
            fail=lambda round_, node_id: bool(generator(1, round_, node_id).random() < fail),
            delay=lambda round_, node_id: float(generator(2, round_, node_id).exponential(delay)),
        )


@dataclass(frozen=True, slots=True)
class _Delivery:
    """One message on its way: what was sent, the client's own copy of it, and what will happen."""

    sent: Message
    message: Message
    context: Context
    online: bool
    fails: bool
    seconds: float  # virtual, from sending to the reply's arrival


def numbered(configs: Iterable[Config]) -> dict[int, Config]:
    """`nodes` of a grid: these configurations, from the first id that is not Flower's own."""
    return dict(enumerate(configs, start=SUPERLINK_NODE_ID + 1))


class InProcessGrid(Grid):
    """A grid whose nodes live in this process.

    client_app: what every node runs.
    nodes: node id -> that node's `node_config`; ids 0 and 1 are Flower's own.
    run_config: what both sides find in `Context.run_config`.
    prepare: called with each block of messages before they are delivered one by one. This is where simulated clients
        are trained in batches: one pass computes the block's updates, and the ClientApp then finds its own.
        What it raises is a defect of the simulation and propagates.
    block: messages handed to `prepare` at once; at most so many copies are alive.

    `failures` counts ClientApps that raised: a figure measured while it grows is not to be trusted.
    """

    def __init__(
        self,
        *,
        client_app: ClientApp,
        nodes: Mapping[int, Config],
        run_config: Config | None = None,
        faults: Faults | None = None,
        prepare: Callable[[Block], None] | None = None,
        block: int = 64,
        run_id: int = 1,
    ) -> None:
        if block < 1:
            raise SettingsError(f"block is {block}: give at least 1 message")
        if reserved := [node_id for node_id in nodes if node_id <= SUPERLINK_NODE_ID]:
            raise SettingsError(f"node ids {reserved} are Flower's own: number nodes from {SUPERLINK_NODE_ID + 1}")
        self._client_app = client_app
        self._nodes = {node_id: dict(config) for node_id, config in nodes.items()}
        self._contexts: dict[int, Context] = {}
        self._faults = faults or Faults()
        self._prepare = prepare
        self._block = block
        self._sent: dict[str, Message] = {}
        self._serial = count()
        self._run = Run.create_empty(run_id)
        self._run.override_config = dict(run_config or {})
        self.failures = 0

    @property
    def run(self) -> Run:
        """The run this grid belongs to; `override_config` holds the run configuration."""
        return Run(**vars(self._run))

    def set_run(self, run: Run) -> None:
        """Replace the run, as Flower's engines do before they call a ServerApp."""
        self._run = run

    def get_node_ids(self) -> list[int]:
        """Every node, online or not, in the order given."""
        return list(self._nodes)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node; Flower's deprecated twin of `Message(content, dst_node_id, message_type, ...)`."""
        with acting_as_server(self._run.run_id):
            return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Copy each message and give it an id, which is also set on the message itself; clients run later.

        A content record shared by many messages is copied once here, and once more for each client it reaches.
        """
        if not isinstance(messages, Collection):
            raise ProtocolError(
                f"messages is a {type(messages).__name__}: pass a list; Flower's grid walks it more than once"
            )
        ids: list[str] = []
        copies: dict[int, RecordDict] = {}  # by identity: the caller's collection keeps the originals alive
        for message in messages:
            self._check(message)
            stamp(message, message_id=self._next_id(), run_id=self._run.run_id)
            kept = copy_message(message, content=copies.get(id(message.content)))
            copies[id(message.content)] = kept.content
            ids.append(message.metadata.message_id)
            self._sent[ids[-1]] = kept
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Stream the replies to these messages, however late; a second pull finds them gone, as on Flower's engines."""
        return self._replies(list(message_ids), timeout=None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send now; stream the replies that arrive within `timeout` virtual seconds (None: every reply)."""
        return self._replies(self.push_messages(messages), timeout=timeout)

    def _replies(self, message_ids: Sequence[str], *, timeout: float | None) -> Iterator[Message]:
        for start in range(0, len(message_ids), self._block):
            block = [self._sent.pop(each, each) for each in message_ids[start : start + self._block]]
            yield from (self._from_link(each, ErrorCode.MESSAGE_UNAVAILABLE) for each in block if isinstance(each, str))
            deliveries = [self._deliver(each) for each in block if isinstance(each, Message)]
            del block
            # Within a block the slow come last, so that delays reorder replies as a network would.
            deliveries.sort(key=lambda delivery: delivery.seconds)
            if self._prepare and (running := [(d.message, d.context) for d in deliveries if d.online and not d.fails]):
                self._prepare(running)
                del running
            deliveries.reverse()
            while deliveries:
                delivery = deliveries.pop()
                reply = self._reply(delivery)
                if timeout is None or min(delivery.seconds, delivery.sent.metadata.ttl) <= timeout:
                    yield reply

    def _deliver(self, sent: Message) -> _Delivery:
        node_id, group = sent.metadata.dst_node_id, sent.metadata.group_id
        round_ = int(group) if group.isdecimal() else 0
        if node_id not in self._contexts:
            self._contexts[node_id] = Context(
                run_id=self._run.run_id,
                node_id=node_id,
                node_config=self._nodes[node_id],
                state=RecordDict(),
                run_config=dict(self._run.override_config),
            )
        online = not self._faults.drop(round_, node_id)
        return _Delivery(
            sent=sent,
            message=copy_message(sent),
            context=self._contexts[node_id],
            online=online,
            fails=self._faults.fail(round_, node_id),
            seconds=self._faults.delay(round_, node_id) if online else _SECONDS_UNTIL_OFFLINE,
        )

    def _reply(self, delivery: _Delivery) -> Message:
        """The node's answer, or the link's in its place; the ClientApp runs here, if at all."""
        reply = self._answer(delivery) if delivery.online else None
        if delivery.seconds > delivery.sent.metadata.ttl:
            reply = self._from_link(delivery.sent.metadata.message_id, ErrorCode.MESSAGE_UNAVAILABLE)
        return reply or self._from_link(delivery.sent.metadata.message_id, ErrorCode.NODE_UNAVAILABLE)

    def _answer(self, delivery: _Delivery) -> Message:
        answer = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _CLIENT_FAILED), reply_to=delivery.sent)
        if not delivery.fails:
            try:
                answer = self._checked(self._client_app(delivery.message, delivery.context), delivery.sent)
            except Exception:
                self.failures += 1
                _LOG.exception("the ClientApp of node %d raised", delivery.context.node_id)
        reply = copy_message(answer)
        stamp(reply, message_id=self._next_id())
        return reply

    def _checked(self, answer: Message, sent: Message) -> Message:
        replies_to = answer.metadata.reply_to_message_id, answer.metadata.src_node_id
        if replies_to != (sent.metadata.message_id, sent.metadata.dst_node_id):
            raise ProtocolError(f"the answer replies to {replies_to}: return Message(content, reply_to=message)")
        return answer

    def _from_link(self, message_id: str, code: int) -> Message:
        return error_from_link(run_id=self._run.run_id, message_id=self._next_id(), reply_to=message_id, code=code)

    def _check(self, message: Message) -> None:
        metadata = message.metadata
        if metadata.reply_to_message_id or not message.has_content() or metadata.ttl <= 0:
            raise ProtocolError(f"{metadata} cannot be sent: give content, no reply_to, and a ttl above 0")
        if metadata.dst_node_id not in self._nodes:
            raise ProtocolError(f"node {metadata.dst_node_id} is not in this grid: send to one of get_node_ids()")

    def _next_id(self) -> str:
        return hashlib.sha256(f"{self._run.run_id}/{next(self._serial)}".encode()).hexdigest()


def run_server_app(server_app: ServerApp, grid: InProcessGrid, run_config: Config | None = None) -> Context:
    """Run a ServerApp to its end on this grid, and return its context (whose `state` the app may have filled).

    `run_config` replaces the grid's for the server side; on Flower's engines both sides see the same.
    """
    run = grid.run
    context = Context(
        run_id=run.run_id,
        node_id=SUPERLINK_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run.override_config if run_config is None else run_config),
    )
    with acting_as_server(run.run_id):
        server_app(grid, context)
    return context
