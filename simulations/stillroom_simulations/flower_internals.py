"""Every private Flower name that Stillroom touches, and why; written for Flower 1.41.

The in-process grid subclasses the public `flwr.serverapp.Grid`, but a few things that a grid has to do have no public
name: making a run, giving a message its id and source, answering in a node's place, the numbers of error codes. They
stand here and nowhere else, so that an update of Flower breaks one file. `tests/simulations/test_deployment.py` runs
the same apps on Flower's own engine and on ours, and fails when what stands here no longer describes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["SUPERLINK_NODE_ID", "ErrorCode", "Run", "acting_as_server", "copy_message", "error_from_link", "stamp"]


@contextmanager
def acting_as_server(run_id: int) -> Iterator[None]:
    """Let this process build instruction messages: `Message(...)` reads run and source node from process-wide state.

    A ServerApp process of the deployment engine sets that state once; here it is put back on leaving, so that several
    runs can follow each other (or nest) in one process.
    """
    before = TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id
    TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = run_id, SUPERLINK_NODE_ID, run_id
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before


def stamp(message: Message, *, message_id: str, run_id: int | None = None) -> None:
    """Give a message its id (and, on the way out, its run and source), as the link does; the metadata is read-only."""
    message.metadata.__dict__["_message_id"] = message_id
    if run_id is not None:
        message.metadata.__dict__.update(_run_id=run_id, _src_node_id=SUPERLINK_NODE_ID)


def copy_message(message: Message, *, content: RecordDict | None = None) -> Message:
    """A message that shares nothing mutable with the original, as if it had crossed a network.

    Array bytes are immutable and therefore shared, so a copy costs some 50 microseconds whatever the model's size.
    `content` replaces the original's, uncopied.
    """
    if content is None and message.has_content():
        content = deepcopy(message.content)
    error = deepcopy(message.error) if message.has_error() else None
    return make_message(metadata=deepcopy(message.metadata), content=content, error=error)


def error_from_link(*, run_id: int, message_id: str, reply_to: str, code: int) -> Message:
    """What the link answers in a node's place: the node is offline, or the message or its reply has expired.

    Source and destination are the link itself and the group may be empty: a server that wants to know which node and
    round are meant has to look up `reply_to_message_id`, on every engine.
    """
    metadata = Metadata(
        run_id=run_id,
        message_id=message_id,
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=reply_to,
        group_id="",
        created_at=time.time(),
        ttl=0.0,
        message_type=SYSTEM_MESSAGE_TYPE,
    )
    return make_message(metadata=metadata, error=Error(code, "the node is offline or the message has expired"))
