"""What retrievers search, and what they say of a hit: the same two for every framework."""

from __future__ import annotations

from typing import Any, Protocol

from stillroom_client.ranking import Hit, Mode


class Searcher(Protocol):
    """`Device` of a home, in this process; or `Client` of one that is served (`connect`). Threads may share both."""

    def search(self, text: str, k: int = 10, *, mode: Mode = "hybrid", where: str | None = None) -> list[Hit]:
        """The k best passages, best first."""


def described(hit: Hit) -> dict[str, Any]:
    """All that is known of a hit but its text: the metadata that filters see, and over it

    | name | is |
    |---|---|
    | `source` | path of its document, or the id of a passage that was added alone |
    | `passage_id`, `owner`, `title` | the passage's; without a title of its own the document's, where there is one |
    | `rank`, `score`, `dense_rank`, `bm25_rank` | of this search |
    | `document`, `place`, `page`, `line`, `start`, `stop` | where it stands |

    What a hit does not have is left out.
    """
    position = hit.position
    own = {
        "source": hit.document or hit.passage_id,
        "passage_id": hit.passage_id,
        "owner": hit.owner,
        "title": hit.title or None,
        "rank": hit.rank,
        "score": hit.score,
        "dense_rank": hit.dense_rank,
        "bm25_rank": hit.bm25_rank,
        "document": hit.document or None,
        "place": position.place if hit.document else None,
        "page": position.page,
        "line": position.line,
        "start": position.start,
        "stop": position.stop,
    }
    return {**hit.metadata, **{name: value for name, value in own.items() if value is not None}}
