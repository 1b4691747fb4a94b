"""The JSON interface of the page (`docs/web.md`): each path one function from what was asked to what is answered.

Everything is a POST, so no query stands in an address, and each body is a closed schema. Errors are `{"error": message}`:

| status | when |
|---|---|
| 400 | the body, a filter (with `place`, characters before what cannot be read) or a setting |
| 401, 403, 405, 413, 415, 421 | `guard.py` |
| 404 | no such path, or a passage that is not indexed any more |
| 409 | a later search of the same tab came, or the consent changed since it was shown |
| 500, 503 | a defect of ours; the store, the release or the ledger cannot be used |
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping
from traceback import extract_tb
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom_client.device import Device
from stillroom_client.filters import FilterError
from stillroom_client.leaving import join, leave
from stillroom_client.participation import Consent
from stillroom_client.ranking import Mode
from stillroom_client.store import Feedback
from stillroom_client.web.answers import feedback_json, hit_json, moved, passage_json
from stillroom_client.web.desk import Desk, SupersededError
from stillroom_client.web.guard import Answer
from stillroom_client.web.narrowing import Narrowing, choices
from stillroom_client.web.overview import budget, learned, privacy
from stillroom_shared.errors import BudgetError, DataError, SettingsError, StillroomError

_log = logging.getLogger(__name__)
_ABOUT_A_PASSAGE = ("/api/passage", "/api/opened")
_COMPARED = 10  # results, without the adapter and with it


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Nothing(_Asked):
    """A body without fields: `{}`."""


class Search(_Asked):
    """`tab` and `number` order the searches of one tab: the highest number wins. Those without a tab are all made."""

    query: str = Field(max_length=2_000)
    k: int = Field(default=20, ge=1, le=100)
    mode: Mode = "hybrid"
    narrow: Narrowing = Narrowing()
    tab: str = Field(default="", max_length=64)
    number: int = Field(default=0, ge=0)


class Look(_Asked):
    """A passage with `reach` neighbours on each side; the words of `query` are marked in it."""

    id: str = Field(max_length=10_000)
    query: str = Field(default="", max_length=2_000)
    reach: int = Field(default=3, ge=0, le=200)


class Opened(_Asked):
    """A result that was opened after a query."""

    query: str = Field(min_length=1, max_length=2_000)
    id: str = Field(max_length=10_000)


class Erase(_Asked):
    """One pair; everything without it."""

    opened: Opened | None = None


class Join(_Asked):
    """`seen` is the consent as it was shown; `agree` has to be true."""

    agree: Literal[True]
    seen: dict[str, Any]
    limit_epsilon: float | None = Field(gt=0, allow_inf_nan=False)


class Api:
    """The paths under `/api/` of one device."""

    def __init__(self, device: Device, desk: Desk) -> None:
        self._device, self._desk = device, desk
        self._paths: Mapping[str, tuple[type[_Asked], Callable[[Any], Awaitable[Any]]]] = {
            "/api/status": (Nothing, lambda _: desk.run(self._status)),
            "/api/search": (Search, self._search),
            "/api/passage": (Look, lambda a: desk.run(lambda: passage_json(device, a.id, a.query, a.reach))),
            "/api/opened": (Opened, lambda a: desk.run(lambda: self._record(a))),
            "/api/feedback": (Nothing, lambda _: desk.run(lambda: {"opened": feedback_json(device)})),
            "/api/feedback/erase": (Erase, lambda a: desk.run(lambda: self._erase(a))),
            "/api/learned": (Search, lambda a: desk.run(lambda: self._learned(a))),
            "/api/privacy": (Nothing, lambda _: desk.run(lambda: privacy(device.home))),
            "/api/budget": (Nothing, lambda _: desk.aside(lambda: budget(device.home))),
            "/api/leave": (Nothing, lambda _: desk.run(lambda: _consent(leave(device.home)))),
            "/api/join": (Join, lambda a: desk.run(lambda: self._join(a))),
        }

    async def answer(self, path: str, body: bytes) -> Answer:
        """The answer to a request that the guard let through."""
        if path not in self._paths:
            return Answer.error(404, f"there is no {path[:80]}")
        schema, work = self._paths[path]
        try:
            return Answer.of(await work(schema.model_validate_json(body)))
        except (ValidationError, StillroomError, SupersededError) as error:
            return _refused(error, path)
        except Exception as error:  # its message may quote a document or a query, and terminals are often kept in files
            passed = " < ".join(
                f"{frame.filename}:{frame.lineno}" for frame in reversed(extract_tb(error.__traceback__))
            )
            _log.error("%s cannot be answered: %s at %s", path, type(error).__name__, passed)
            return Answer.error(500, "a defect of Stillroom: the terminal of `stillroom serve` shows where")

    def _status(self) -> dict[str, Any]:
        device = self._device
        with device.store.reading() as generation:
            return {
                "device": device.identity.name,
                "generation": generation.number,
                "passages": device.store.count(),
                "choices": choices(device),
                "opened": len(device.feedback()),
                "add": f"stillroom index add PATH... --home {shlex.quote(str(device.home))}",
            }

    async def _search(self, asked: Search) -> dict[str, Any]:
        if not asked.tab:  # a program's: none of them replaces another
            return await self._desk.run(lambda: self._found(asked))
        return await self._desk.latest(asked.tab, asked.number, lambda: self._found(asked))

    def _found(self, asked: Search) -> dict[str, Any]:
        began = time.perf_counter()
        where = asked.narrow.checked(self._device)
        words = asked.query.strip()
        hits = self._device.search(words, asked.k, mode=asked.mode, where=where) if words else []
        shown = [hit_json(hit, words) for hit in hits]
        return {"results": shown, "where": where, "milliseconds": round((time.perf_counter() - began) * 1000, 1)}

    def _record(self, asked: Opened) -> dict[str, Any]:
        self._device.record([Feedback(asked.query.strip(), asked.id)])
        return {"opened": len(self._device.feedback())}

    def _erase(self, asked: Erase) -> dict[str, Any]:
        pair = None if asked.opened is None else Feedback(asked.opened.query, asked.opened.id)
        return {"erased": self._device.erase_feedback(pair), "opened": len(self._device.feedback())}

    def _learned(self, asked: Search) -> dict[str, Any]:
        device, words = self._device, asked.query.strip()
        shown = learned(device)
        if not words or shown["adapter"] is None or asked.mode == "bm25":
            return shown | {"compared": None}
        where = asked.narrow.checked(device)
        before, after = (
            device.search(words, _COMPARED, mode=asked.mode, where=where, adapted=adapted) for adapted in (False, True)
        )
        return shown | {"compared": moved(before, after, words)}

    def _join(self, asked: Join) -> dict[str, Any]:
        return _consent(
            join(self._device.home, seen=Consent.model_validate(asked.seen), limit_epsilon=asked.limit_epsilon)
        )


def _consent(consent: Consent) -> dict[str, Any]:
    return {"consent": consent.model_dump(mode="json")}


def _refused(error: ValidationError | StillroomError | SupersededError, path: str) -> Answer:
    if isinstance(error, SupersededError):
        return Answer.error(409, "a later search of this tab has come")
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        return Answer.error(400, f"{where}: {first['msg']}")
    if isinstance(error, FilterError):
        return Answer.error(400, str(error).partition("\n")[0], place=error.place)
    if isinstance(error, DataError) and path in _ABOUT_A_PASSAGE:
        return Answer.error(404, str(error))
    status = {SettingsError: 400, BudgetError: 409}.get(type(error), 503)
    return Answer.error(status, str(error))
