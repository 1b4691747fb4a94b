"""From text to vectors on the device: `tokenizers`, ONNX Runtime and NumPy; neither torch nor transformers.

A vector is the mean of the tower's last hidden states, L2-normalized (Reimers and Gurevych 2019, arXiv 1908.10084).

Texts are encoded one at a time, without padding. Dynamic quantization takes one scale for all activations of a run,
so in a batch a text's vector would depend on its neighbours (measured: a mean cosine of 0.993 between the two, as
much as int8 itself costs), and on a CPU batches of passages are slower, not faster. So a vector depends on its text
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stillroom_client.sessions import Session
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import ADAPTER_INPUT, Precision, Release, SealedAdapter

Vectors = NDArray[np.float32]
STATES = "last_hidden_state"
"""The output of a tower's file, (batch, tokens, dimension)."""

_NO_ADAPTER: Mapping[str, Vectors] = {}
_COUNT = itertools.count(1)


class Encoder:
    """The two towers of a release. Safe to call from many threads; `adopt` may run between any two queries.

    Args:
        release: an opened release; its files are verified again as they are read.
        precision: "int8" or "float32".
        threads: texts that are encoded at the same time, each on one core.
        adapter: applied from the start; None for the release's own.

    `state` is a number that no other encoder of this process has, and another one after each `adopt`: read before a query is
    encoded, it tells whether two vectors came from the same towers.
    """

    def __init__(
        self,
        release: Release,
        *,
        precision: Precision = "int8",
        threads: int = 1,
        adapter: Adapter | SealedAdapter | None = None,
    ) -> None:
        self.release = release
        self._precision = precision
        self._threads = threads
        self._queries = self._tower(release.query_onnx(precision), release.query_tokens)
        self._adapter: Mapping[str, Vectors] = {}
        self.adopt(adapter)

    @cached_property
    def _documents(self) -> OnnxTower:
        return self._tower(self.release.document_onnx(self._precision), self.release.document_tokens)

    def _tower(self, onnx: Path, tokens: int) -> OnnxTower:
        release = self.release
        return OnnxTower(release.read(release.tokenizer_file), release.read(onnx), tokens)

    def adopt(self, adapter: Adapter | SealedAdapter | None) -> None:
        """Encode the next query with another adapter; None returns to the release's own.

        Raises:
            ReleaseError: the adapter is of another spec or for another release; the one in use stays.
        """
        if isinstance(adapter, SealedAdapter):
            if adapter.release_id != self.release.id:
                raise ReleaseError(
                    f"the adapter is for release {adapter.release_id}, this encoder runs {self.release.id}: "
                    "fetch the adapter of your release"
                )
            adapter = adapter.adapter
        if adapter is not None and adapter.spec != self.release.adapter_spec:
            raise ReleaseError(
                f"the adapter has spec {adapter.spec}, release {self.release.id} takes {self.release.adapter_spec}: "
                "fetch the adapter of your release"
            )
        matrices = {} if adapter is None else adapter.matrices()
        # One assignment, so that a query sees the old adapter or the new one, never a mixture. A copy, because the
        # caller's array may change.
        self._adapter = {ADAPTER_INPUT + name: matrix.copy() for name, matrix in matrices.items()}
        self.state = next(_COUNT)

    def encode_queries(self, texts: Iterable[str]) -> Vectors:
        """Query vectors, (texts, dimension), in the given order, L2-normalized."""
        return self._encode(self._queries, texts, self._adapter)

    def encode_queries_unadapted(self, texts: Iterable[str]) -> Vectors:
        """The same by the release alone, whichever adapter is in use."""
        return self._encode(self._queries, texts, {})

    def tokenize_queries(self, texts: Iterable[str]) -> list[tuple[int, ...]]:
        """Token ids as the query tower reads them, special tokens included: what training needs of a query."""
        return [self._queries.tokens(text) for text in texts]

    def encode_documents(self, texts: Iterable[str]) -> Vectors:
        """Document vectors, (texts, dimension), in the given order, L2-normalized."""
        return self._encode(self._documents, texts, {})

    def _encode(self, tower: OnnxTower, texts: Iterable[str], matrices: Mapping[str, Vectors]) -> Vectors:
        def vector(text: str) -> Vectors:
            return tower.vector(text, matrices)

        texts = list(texts)
        if self._threads == 1 or len(texts) < 2:
            rows: Iterator[Vectors] = map(vector, texts)
            return _stacked(rows, len(texts), self.release.dimension)
        with ThreadPoolExecutor(self._threads) as pool:  # tokenizer and session leave the interpreter lock
            return _stacked(pool.map(vector, texts), len(texts), self.release.dimension)


class OnnxTower:
    """An ONNX file from tokens to states, and its tokenizer. Safe to call from many threads.

    Args:
        tokenizer: content of a `tokenizer.json`.
        onnx: content of a file that gives `last_hidden_state`.
        tokens: of a text that are read; None leaves it to the tokenizer.
        special: whether [CLS] and [SEP] stand around a text, which a static table was not made with.
    """

    def __init__(self, tokenizer: bytes, onnx: bytes, tokens: int | None, *, special: bool = True) -> None:
        self._tokenizer = Tokenizer.from_buffer(tokenizer)
        if tokens is not None:
            self._tokenizer.enable_truncation(tokens)
        self._tokenizer.no_padding()
        self._special = special
        self.session = Session(onnx)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of one text, cut at the tower's limit."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=self._special).ids)

    def mean(self, text: str, matrices: Mapping[str, Vectors] = _NO_ADAPTER) -> Vectors:
        """The mean state of one text's tokens, (dimension,)."""
        ids = self.tokens(text)
        states: Vectors = self.session.run(STATES, ids, [0] * len(ids), matrices)  # (tokens, dimension)
        return states.mean(axis=0)  # type: ignore[no-any-return]  # NumPy types the mean loosely

    def vector(self, text: str, matrices: Mapping[str, Vectors] = _NO_ADAPTER) -> Vectors:
        """The same, normalized."""
        mean = self.mean(text, matrices)
        return mean / np.sqrt(mean @ mean)  # type: ignore[no-any-return]  # NumPy types the quotient loosely


def _stacked(rows: Iterator[Vectors], count: int, dimension: int) -> Vectors:
    vectors = np.empty((count, dimension), np.float32)
    for number, row in enumerate(rows):
        vectors[number] = row
    return vectors
