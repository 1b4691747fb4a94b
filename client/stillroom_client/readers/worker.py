"""The process that reads documents: one request after the other on its input, one answer each on its output.

A request is one line of JSON, {"name", "size"}, and `size` bytes. An answer is a line with its own length, and that many
bytes of JSON: a reading, or {"refused": why}. JSON, because what comes back was made from files that nobody vouches for.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import astuple
from typing import Any

from stillroom_client.readers.blocks import Block, Reading, UnreadableError
from stillroom_client.readers.kinds import read

MEMORY = 4 << 30  # bytes that reading one file may take


def main() -> None:
    """Serve until the input ends."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most), most))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a parser that prints must not spoil an answer
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        answer = json.dumps(answered(request["name"], sys.stdin.buffer.read(request["size"]))).encode()
        answers.write(b"%d\n" % len(answer) + answer)
        answers.flush()


def answered(name: str, content: bytes) -> dict[str, Any]:
    """A reading as JSON, or why there is none: a parser may raise whatever it likes."""
    try:
        found = read(name, content)
    except UnreadableError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": f"needs more than {MEMORY >> 30} GB to be read: split it"}
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return {"refused": f"is damaged, its parser gave up ({type(error).__name__}: {said})"}
    return {
        "type": found.type,
        "title": found.title,
        "metadata": dict(found.metadata),
        "notes": found.notes,
        "blocks": [astuple(block) for block in found.blocks],
    }


def reading(answer: dict[str, Any]) -> Reading:
    """The reading that an answer spells. `UnreadableError`: it is a refusal."""
    if refused := answer.get("refused"):
        raise UnreadableError(_clean(refused))
    blocks = (Block(_clean(text), tuple(map(_clean, above)), *rest) for text, above, *rest in answer["blocks"])
    metadata = {key: _clean(value) if isinstance(value, str) else value for key, value in answer["metadata"].items()}
    notes = tuple(map(_clean, answer["notes"]))
    return Reading(answer["type"], tuple(blocks), _clean(answer["title"]), metadata, notes)


def _clean(text: str) -> str:
    """What UTF-8 can hold: a damaged file may spell half a surrogate pair."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


if __name__ == "__main__":
    main()
