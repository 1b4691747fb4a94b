"""The devices behind a grid: who is online, which enrolled name a node answers for, and which answers count.

Guarantees:
    - Each enrolled name has at most one node, each node at most one answer that counts.
    - Silence, an error, and bytes that cannot be read or do not fit count as the zero vector; nothing that a device sends
      stops a round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from stillroom_server.plan import Plan
from stillroom_shared.errors import ProtocolError
from stillroom_shared.mechanism import Mechanism, Total
from stillroom_shared.protocol import ENROL, read_enrolment, read_update, shown_receipt

_POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)


def wait_for_nodes(grid: Grid, plan: Plan) -> set[int]:
    """The nodes that are online, once there are at least `plan.wait_for_nodes`: noise over nobody would waste budget.

    Raises `ProtocolError` when they do not come within the reply timeout.
    """
    patience = time.monotonic() + plan.reply_timeout_seconds
    while len(nodes := set(grid.get_node_ids())) < plan.wait_for_nodes:
        if time.monotonic() > patience:
            raise ProtocolError(
                f"{len(nodes)} of {plan.wait_for_nodes} awaited nodes are online after {plan.reply_timeout_seconds:.0f} s: "
                "start the devices, or lower wait_for_nodes in the plan"
            )
        time.sleep(_POLL_SECONDS)
    return nodes


def enrolled_nodes(grid: Grid, plan: Plan) -> dict[str, int]:
    """Which node answers for which enrolled name; a name that two nodes claim goes to the lower node id."""
    questions = [
        Message(RecordDict(), dst_node_id=node, message_type=ENROL, group_id="enrol")
        for node in sorted(grid.get_node_ids())
    ]
    found: dict[str, int] = {}
    enrolled = set(plan.enrolled)
    for reply in grid.send_and_receive(questions, timeout=plan.reply_timeout_seconds):
        if reply.has_error():
            continue
        try:
            name = read_enrolment(reply.content)
        except Exception:
            _log.exception("node %d does not enrol", reply.metadata.src_node_id)
            continue
        node = reply.metadata.src_node_id
        if name in enrolled:
            found[name] = min(node, found.get(name, node))
    return found


def sum_updates(replies: Iterable[Message], mechanism: Mechanism, admits: Callable[[int, bytes | None], bool]) -> Total:
    """The exact sum of the admissible updates, (length,) int64; each node counts once, everything else is zero.

    `admits` says whether the receipt of a node, or its absence, lets its update count: each node by its own alone, so the
    sensitivity stays what it is.
    """
    total = np.zeros(mechanism.length, np.int64)
    answered: set[int] = set()
    for reply in replies:
        node = reply.metadata.src_node_id
        if reply.has_error() or node in answered:
            continue
        answered.add(node)
        try:
            shown = admits(node, shown_receipt(reply.content))
            update = read_update(reply.content, mechanism.length)
            admitted = shown and mechanism.admit(update)
        except Exception:  # whatever a device's bytes lead to, the round goes on: it was charged, and others answered
            _log.exception("node %d sent what cannot be read: it counts as zero", node)
            continue
        if admitted:
            total += update
    return total
