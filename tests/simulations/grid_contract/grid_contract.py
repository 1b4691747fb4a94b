"""What an app may rely on, on every engine: run by Flower's deployment engine and by the in-process grid alike.

Nodes are named by `device-home` in their configuration. The ServerApp writes its observations as JSON, without anything
that must differ (ids, times), so that two engines' files can be compared as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

SECRET = "what the device was asked"
server_app = ServerApp()
client_app = ClientApp()


@client_app.query("name")
def name(message: Message, context: Context) -> Message:
    """Answer with everything the node can see of itself."""
    seen = {"home": context.node_config["device-home"], "report": context.run_config["report"]}
    assert context.node_id == message.metadata.dst_node_id
    return Message(RecordDict({"seen": ConfigRecord(dict(seen))}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Double the vector; count visits; the first node fails on its first visit, after counting."""
    visits = context.state.config_records.setdefault("visits", ConfigRecord({"n": 0}))
    visits["n"] = 1 + cast(int, visits["n"])
    if message.content.config_records["fails"]["now"] and visits["n"] == 1:
        raise ValueError(SECRET)
    vector = message.content.array_records["vector"].to_numpy_ndarrays()[0]
    message.content["vector"] = ArrayRecord([np.zeros_like(vector)])
    reply = RecordDict({"vector": ArrayRecord([2 * vector]), "visits": ConfigRecord({"n": visits["n"]})})
    return Message(reply, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Three exchanges, an empty one, and a reply that does not exist."""
    nodes = sorted(grid.get_node_ids())
    asked = [Message(RecordDict(), node, "query.name", group_id="names", ttl=300.0) for node in nodes]
    names = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(asked, timeout=120.0)}
    order = sorted(nodes, key=lambda node: str(names[node].content.config_records["seen"]["home"]))
    found: dict[str, Any] = {
        "context": [context.node_id, dict(context.node_config), dict(context.run_config)],
        "iterator": _send_an_iterator(grid, nodes[0]),
        "empty": list(grid.send_and_receive([], timeout=5.0)),
        "seen": [dict(names[node].content.config_records["seen"]) for node in order],
        "rounds": [_round(grid, order, str(number)) for number in (1, 2)],
        "unknown": [_describe(reply, {}) for reply in grid.pull_messages(["0" * 64])],
    }
    Path(str(context.run_config["report"])).write_text(json.dumps(found, indent=1))


def _send_an_iterator(grid: Grid, node: int) -> str:
    try:
        replies = list(grid.send_and_receive(iter([Message(RecordDict(), node, "query.name", ttl=300.0)]), timeout=5.0))
    except Exception:
        return "refused"
    return f"{len(replies)} replies"


def _round(grid: Grid, order: list[int], group: str) -> list[dict[str, Any]]:
    vector = ArrayRecord([np.arange(3, dtype=np.float32)])
    sent = [
        Message(
            RecordDict({"vector": vector, "fails": ConfigRecord({"now": node == order[0]})}),
            node,
            "train",
            group_id=group,
        )
        for node in order
    ]
    replies = list(grid.send_and_receive(sent, timeout=120.0))
    places = {message.metadata.message_id: place for place, message in enumerate(sent)}
    return sorted((_describe(reply, places) for reply in replies), key=lambda each: each["replies to"])


def _describe(reply: Message, places: dict[str, int]) -> dict[str, Any]:
    metadata = reply.metadata
    found: dict[str, Any] = {
        "replies to": places.get(metadata.reply_to_message_id, metadata.reply_to_message_id),
        "from": "the link" if metadata.src_node_id == 1 else "a node",
        "to": metadata.dst_node_id,
        "group": metadata.group_id,
        "type": metadata.message_type,
        "time to live": metadata.ttl > 0,
        "id": len(metadata.message_id),
        "content": reply.has_content(),
    }
    if reply.has_error():
        return found | {"code": reply.error.code, "quotes the exception": SECRET in (reply.error.reason or "")}
    return found | {
        "vector": reply.content.array_records["vector"].to_numpy_ndarrays()[0].tolist(),
        "visits": reply.content.config_records["visits"]["n"],
    }
