"""What `stillroom index add` shows: a bar with rate and time left while it works, a line about each file that was not read,
and what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stillroom_client.adding import Added, Tally
from stillroom_client.show import plain
from stillroom_client.walking import Remark
from stillroom_shared.progress import span

_WARMING = 2.0  # seconds before a rate says something


class AddingView:
    """A bar on a terminal's standard error, nothing there elsewhere; results on standard output.

    Args:
        as_json: results as one line of JSON a run.
    """

    def __init__(self, *, as_json: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._json = as_json
        self._clock = clock
        self._console = Console(stderr=True, soft_wrap=True)
        self._out = Console(soft_wrap=True, highlight=False, markup=False)
        self._bar: Progress | None = None
        self._started: float | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True, refresh_per_second=4)
            self._task = self._bar.add_task("looking", total=None, state="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def report(self, tally: Tally) -> None:
        """Show how far it is."""
        if self._bar is None:
            return
        if self._started is None:
            self._started = self._clock()
        state = progress_line(tally, self._clock() - self._started)
        self._bar.update(
            self._task, description="indexing", total=tally.of_bytes or None, completed=tally.bytes, state=state
        )

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        self._console.print(text, markup=False, highlight=False)

    def show(self, done: Added, news: Sequence[Remark], total: int) -> None:
        """What came of a run; `news` are its remarks that were not made before."""
        for remark in news:
            self.say(f"{plain(remark.path)}: {plain(remark.text)}")
        if self._json:
            self._out.print(json.dumps(_json(done, total), ensure_ascii=False), soft_wrap=True)
            return
        passages = done.passages
        if done.hidden and news:
            self.say(f"{done.hidden:,} hidden or generated files and folders were passed over")
        self._out.print(
            f"documents: {done.added:,} added, {done.changed:,} changed, {done.unchanged:,} unchanged, "
            f"{done.removed:,} removed, {done.failed:,} not read"
        )
        self._out.print(
            f"{passages.added:,} added, {passages.replaced:,} replaced, {passages.unchanged:,} unchanged, "
            f"{passages.removed:,} removed: {total:,} passages"
        )


def progress_line(tally: Tally, seconds: float) -> str:
    """Files, rate and time left.

    >>> progress_line(Tally(files=3, of_files=10, bytes=250, of_bytes=1000, passages=120), seconds=20)
    '3 of 10 files, 6 passages/s, about 60 s left'
    """
    parts = [f"{tally.files:,} of {tally.of_files:,} files"]
    if seconds >= _WARMING and tally.passages:
        parts.append(f"{tally.passages / seconds:,.0f} passages/s")
    if seconds >= _WARMING and tally.bytes:
        parts.append(f"about {span(seconds * max(tally.of_bytes - tally.bytes, 0) / tally.bytes)} left")
    return ", ".join(parts)


def _json(done: Added, total: int) -> dict[str, object]:
    return {
        "documents": {name: getattr(done, name) for name in ("added", "changed", "unchanged", "removed", "failed")},
        "passages": {**asdict(done.passages), "total": total},
        "embedded": done.embedded,
        "hidden": done.hidden,
        "remarks": [asdict(remark) for remark in done.remarks],
    }
