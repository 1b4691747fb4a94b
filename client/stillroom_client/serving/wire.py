"""The values of a device as messages of `retrieval.proto`, and back. Nothing is lost on the way: the tests compare."""

from __future__ import annotations

from collections.abc import Mapping

from stillroom_client.device import Status
from stillroom_client.documents import NOWHERE, Located, Metadata, Position, Scalar
from stillroom_client.ranking import Hit, Mode
from stillroom_client.serving import retrieval_pb2 as pb
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError, SettingsError

_MODES: dict[int, Mode] = {
    pb.MODE_UNSPECIFIED: "hybrid",
    pb.MODE_DENSE: "dense",
    pb.MODE_BM25: "bm25",
    pb.MODE_HYBRID: "hybrid",
}
_NUMBERS: dict[Mode, pb.Mode] = {"dense": pb.MODE_DENSE, "bm25": pb.MODE_BM25, "hybrid": pb.MODE_HYBRID}
_FIELDS = ("page", "line", "start", "stop")


def mode_of(number: int) -> Mode:
    """The mode of a request; `SettingsError` for one of a later version."""
    if number not in _MODES:
        raise SettingsError(f"mode = {number} is unknown: one of {', '.join(pb.Mode.keys())}")
    return _MODES[number]


def mode_number(mode: str) -> pb.Mode:
    """The mode in a request."""
    if found := next((number for name, number in _NUMBERS.items() if name == mode), None):
        return found
    raise SettingsError(f"mode = {mode!r} is unknown: one of {', '.join(_NUMBERS)}")


def hit_message(hit: Hit) -> pb.Hit:
    """A hit, without snippet."""
    return pb.Hit(
        rank=hit.rank,
        score=hit.score,
        passage_id=hit.passage_id,
        owner=hit.owner,
        title=hit.title,
        text=hit.text,
        dense_rank=hit.dense_rank,
        bm25_rank=hit.bm25_rank,
        document=hit.document,
        position=_position_message(hit.position),
        metadata=_metadata_message(hit.metadata),
    )


def hit_of(message: pb.Hit) -> Hit:
    """The hit that a device returned."""
    return Hit(
        rank=message.rank,
        score=message.score,
        passage_id=message.passage_id,
        owner=message.owner,
        title=message.title,
        text=message.text,
        dense_rank=message.dense_rank if message.HasField("dense_rank") else None,
        bm25_rank=message.bm25_rank if message.HasField("bm25_rank") else None,
        document=message.document,
        position=_position_of(message.position),
        metadata=_metadata_of(message.metadata),
    )


def passage_message(given: Passage | Located) -> pb.Passage:
    """A passage to add."""
    located = given if isinstance(given, Located) else Located(given)
    p = located.passage
    try:
        return pb.Passage(
            id=p.id,
            text=p.text,
            title=p.title,
            owner=p.owner,
            metadata=_metadata_message(located.metadata),
            position=_position_message(located.position) if located.position != NOWHERE else None,
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"passage {p.id!r} cannot be sent: {error}") from error


def located_of(message: pb.Passage, owner: str) -> Located:
    """A passage that was sent.

    Args:
        owner: of one that names none.
    """
    passage = Passage(message.id, message.owner or owner, message.text, message.title)
    return Located(passage, _position_of(message.position), _metadata_of(message.metadata))


def status_message(status: Status) -> pb.StatusResponse:
    """What a device holds."""
    return pb.StatusResponse(
        name=status.name,
        generation=status.generation,
        passages=status.passages,
        owners=status.owners,
        dimension=status.dimension,
        index=status.index,
        text_index=status.text_index,
        feedback=status.feedback,
        documents=status.documents,
    )


def status_of(message: pb.StatusResponse) -> Status:
    """The status that a device gave, the largest counts first as there."""
    return Status(
        name=message.name,
        generation=message.generation,
        passages=message.passages,
        owners=_most_first(message.owners),
        dimension=message.dimension,
        index=message.index,  # type: ignore[arg-type]  # a word of a later version is shown as it is
        text_index=message.text_index,  # type: ignore[arg-type]
        feedback=message.feedback,
        documents=_most_first(message.documents),
    )


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _position_message(position: Position) -> pb.Position:
    return pb.Position(
        place=position.place, page=position.page, line=position.line, start=position.start, stop=position.stop
    )


def _position_of(message: pb.Position) -> Position:
    known = {name: getattr(message, name) for name in _FIELDS if message.HasField(name)}
    return Position(place=message.place, **known)


def _metadata_message(metadata: Metadata) -> dict[str, pb.Scalar]:
    return {name: _scalar_message(name, value) for name, value in metadata.items()}


def _scalar_message(name: str, value: Scalar) -> pb.Scalar:
    match value:
        case bool():  # an int too, so it comes first
            return pb.Scalar(flag=value)
        case int() if -(2**63) <= value < 2**63:
            return pb.Scalar(integer=value)
        case float():
            return pb.Scalar(number=value)
        case str():
            return pb.Scalar(text=value)
    raise DataError(
        f"metadata {name!r} = {value!r} is no text, number or truth value of 64 bits: leave it out, or spell it"
    )


def _metadata_of(message: Mapping[str, pb.Scalar]) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    for name, value in message.items():
        if (kind := value.WhichOneof("value")) is None:
            raise DataError(f"metadata {name!r} has no value: leave it out")
        found[name] = getattr(value, kind)
    return found
