"""What an architecture search is: the shapes that are tried, the bounds that they keep, and how much is spent on each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import Field, model_validator

from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_shared.settings_file import Group

Shape = dict[str, int | None]
"""A value for each of `AXES`."""
AXES = ("depth", "width", "heads", "feed_forward", "vocabulary")
_MOST_SHAPES = 100_000

Positive = Annotated[int, Field(ge=1)]


class ArchitectureSettings(Group):
    """Which shape of a small BERT is best: choices, bounds, and how much is spent on the search."""

    depth: tuple[Positive, ...] = Field((1, 2, 3, 4, 6), min_length=1, description="layers to choose from")
    width: tuple[Positive, ...] = Field(
        (96, 128, 192, 256, 312, 384), min_length=1, description="widths to choose from"
    )
    heads: tuple[Positive, ...] = Field(
        (4, 6, 8, 12), min_length=1, description="attention heads to choose from, where the width is a multiple of them"
    )
    feed_forward: tuple[Positive, ...] = Field(
        (256, 384, 512, 768, 1024, 1536), min_length=1, description="feed-forward neurons to choose from"
    )
    vocabulary: tuple[Positive, ...] = Field((), description="tokens that are kept to choose from; empty: all of them")
    latency_ms: float | None = Field(
        None, gt=0, description="bound of the median milliseconds of one query on one thread, int8"
    )
    latency_ratio: float | None = Field(
        None, gt=0, description="bound of the same over the teacher's in float32, measured side by side"
    )
    bytes: int | None = Field(None, ge=1, description="bound of the int8 file's size")
    trials: int = Field(30, ge=1, description="shapes within the bounds that are trained, those stopped early included")
    shapes: int = Field(300, ge=1, description="shapes that are measured at most, those out of bounds included")
    minutes: float | None = Field(
        None, gt=0, description="no trial begins when the search has worked so long; none: no limit"
    )
    random: int = Field(10, ge=1, description="shapes drawn at random before the sampler follows what was good")
    keep: float = Field(
        0.5, gt=0, le=1, description="share of the finished trials that one must be among to go on; 1 stops none"
    )
    patience: int = Field(5, ge=1, description="finished trials before any is stopped early")
    texts: int = Field(20_000, ge=1, description="texts that a trial aligns its student on, in each pass")
    epochs: float = Field(1.0, gt=0, description="passes of a trial")
    queries: int = Field(500, ge=1, description="queries held out of all trials, on which students are compared")
    evaluations: int = Field(4, ge=1, description="times that a trial is evaluated, its end included")
    seed: int = Field(0, ge=0, description="of the sampler, and of what is held out")

    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        for axis in AXES:
            choices = getattr(self, axis)
            if list(choices) != sorted(set(choices)):
                raise ValueError(f"{axis} {choices}: give the choices in ascending order, each once")
        if alone := [width for width in self.width if all(width % heads for heads in self.heads)]:
            raise ValueError(f"width {alone[0]} is no multiple of any of heads {self.heads}: change one of them")
        if (count := math.prod(map(len, self.choices.values()))) > _MOST_SHAPES:
            raise ValueError(f"{count:,} combinations are more than {_MOST_SHAPES:,}: give fewer choices")
        return self

    @property
    def choices(self) -> dict[str, tuple[int | None, ...]]:
        """The choices of each axis, ascending; None stands for a whole vocabulary."""
        return {axis: getattr(self, axis) or (None,) for axis in AXES}

    def all_shapes(self) -> Iterator[Shape]:
        """Every shape that can be: widths are multiples of heads. The smallest one first.

        >>> toy = ArchitectureSettings(depth=(1, 2), width=(32, 48), heads=(3, 4), feed_forward=(64,))
        >>> [(shape["depth"], shape["width"], shape["heads"]) for shape in toy.all_shapes()]
        [(1, 32, 4), (1, 48, 3), (1, 48, 4), (2, 32, 4), (2, 48, 3), (2, 48, 4)]
        """
        vocabularies = self.choices["vocabulary"]
        for values in itertools.product(self.depth, self.width, self.heads, self.feed_forward, vocabularies):
            width, heads = values[1], values[2]
            if width % heads == 0:
                yield dict(zip(AXES, values, strict=True))


def student_of(base: StudentSettings, shape: Shape) -> StudentSettings:
    """The settings of a student of this shape from scratch; all else as in `base`."""
    return StudentSettings.model_validate({**base.model_dump(), "init": "scratch", **shape})
