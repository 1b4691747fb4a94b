"""Latency and size of a shape, before it learns: both are those of any weights.

The student is made, exported as int8 and fed one query at a time, on one thread, in turns with the teacher's float32 file:
each query once to the one, once to the other. A block is all queries; its ratio is that of its two medians, and the figures
are medians over blocks. So a neighbour that slows the machine down for a while slows both, and one that takes the processor
away for a moment moves no median.

Time is that of the thread on a processor, which is what the clock on the wall shows where nothing else runs. It covers the
tower, the mean over tokens and the linear map to the teacher's space, where a student has one; tokenizing is left out on both
sides. The map counts as float32 in the bytes.

| case | what happens |
|---|---|
| no queries | `DataError` |
| a student that cannot be exported | `ReleaseError` of the exporter |
| queries longer than what the student reads | cut to that for both |
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense

from stillroom_server.bert_graph import INPUTS
from stillroom_server.distillery.architecture.result import Measured
from stillroom_server.distillery.students.make import make_student
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.export import export, quantize
from stillroom_shared.errors import DataError, SettingsError

Feed = dict[str, Any]
_WARM_UP = 3


@dataclass(frozen=True, eq=False)
class Latency:
    """Measures shapes of towers beside their teacher; what `search` calls `measure`.

    Attributes:
        teacher: a bi-encoder, whose latency is the unit.
        queries: public queries such as a device will be asked.
        texts: public texts whose tokens a trimmed vocabulary keeps.
        blocks: repetitions of all queries.
        clock: seconds.
    """

    teacher: SentenceTransformer
    queries: Sequence[str]
    texts: Sequence[str] = ()
    blocks: int = 9
    clock: Callable[[], float] = time.thread_time

    def __post_init__(self) -> None:
        if not self.queries:
            raise DataError("no queries to measure latency with: give some public ones")

    def __call__(self, settings: StudentSettings) -> Measured:
        """The figures of one shape; some seconds."""
        student = make_student(settings, self.teacher, self.texts)
        if not isinstance(student, SentenceTransformer):
            raise SettingsError(f"student.kind {settings.kind}: shapes are searched for towers")
        with tempfile.TemporaryDirectory() as name:
            whole, small = Path(name, "float32.onnx"), Path(name, "int8.onnx")
            export(bert_of(student), whole)
            quantize(whole, small, blockwise=False)  # as a release's query tower
            size, session = small.stat().st_size, _session(small)
        linear = _map_of(student)
        own = _encoder(session, self._feeds(student, settings.text_tokens), linear)
        teacher = _encoder(self._session, self._feeds(self.teacher, settings.text_tokens), None)
        ratio, teacher_ms = in_turns(own, teacher, len(self.queries), blocks=self.blocks, clock=self.clock)
        return Measured(ratio * teacher_ms, size + (0 if linear is None else linear.nbytes), teacher_ms)

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "teacher.onnx")
            export(bert_of(self.teacher), path)
            return _session(path)

    def _feeds(self, model: SentenceTransformer, tokens: int) -> list[Feed]:
        return [_feed(model.tokenizer, query, tokens) for query in self.queries]


def in_turns(
    one: Callable[[int], object],
    other: Callable[[int], object],
    count: int,
    *,
    blocks: int,
    clock: Callable[[], float] = time.thread_time,
) -> tuple[float, float]:
    """Time two functions of 0 to `count` - 1 in turns, after a warm-up.

    Returns:
        the ratio of `one` to `other`, and milliseconds of a call of `other`: medians over blocks of medians within them.
    """
    for number in range(min(_WARM_UP, count)):
        one(number), other(number)
    ratios, milliseconds = [], []
    for _ in range(blocks):
        took: tuple[list[float], list[float]] = ([], [])
        for number in range(count):
            for function, times in zip((one, other), took, strict=True):
                begun = clock()
                function(number)
                times.append(clock() - begun)
        mine, others = (statistics.median(times) for times in took)
        ratios.append(mine / others)
        milliseconds.append(1000 * others)
    return statistics.median(ratios), statistics.median(milliseconds)


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # One thread each means the calling one, whose time is what is taken.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feed(tokenizer: Any, query: str, tokens: int) -> Feed:
    ids = tokenizer(query, truncation=True, max_length=tokens)["input_ids"]
    found = np.array([ids], np.int64)  # (1, tokens)
    return dict(zip(INPUTS, (found, np.ones_like(found), np.zeros_like(found)), strict=True))


def _map_of(student: SentenceTransformer) -> NDArray[np.float32] | None:
    """What stands between the mean and the vector, (width, dim)."""
    found = [module for module in student if isinstance(module, Dense)]
    return np.ascontiguousarray(found[0].linear.weight.detach().numpy().T) if found else None


def _encoder(
    session: onnxruntime.InferenceSession, feeds: Sequence[Feed], linear: NDArray[np.float32] | None
) -> Callable[[int], object]:
    def encode(number: int) -> object:
        [states] = session.run(None, feeds[number])  # (1, tokens, width)
        mean = states[0].mean(axis=0)
        return mean if linear is None else mean @ linear

    return encode
