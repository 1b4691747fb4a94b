"""Read the best results again: a cross-encoder scores query and passage together (Nogueira and Cho 2019, arXiv 1901.04085).

An optional last stage, with a model that the release brings; it needs `tokenizers` and ONNX Runtime only. Pairs are scored one
at a time, without padding, for the reason that texts are encoded so (`encoder.py`): under dynamic quantization a score would
depend on the other pairs of its batch. Measured with a 3-layer MiniLM of 384 dimensions, 20 pairs of up to 96 tokens on a busy
core: p50 300 ms one at a time, 736 ms as one padded batch, whose logits were off by 0.12 on average, with a spread of 2.

Its scores do not replace those of the stage before, they meet them (`stillroom_shared.scales.blended`). A small cross-encoder
has seen few queries, and errs elsewhere than vectors and words do: each makes up for the other (docs/figures.md). All results
that are shown were scored, so that one scale orders them: the best max(k, n) of the ranking are read, and a hit's score is the
logistic function of both, in (0, 1), where 0.5 is the mean of what was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stillroom_client.sessions import Session
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import (
    ONNX_FILES,
    RERANKER_FOLDER,
    RERANKER_SETTINGS,
    TOKENIZER_NAME,
    Release,
    RerankerSettings,
)

USUAL = 20
"""Results that are read again unless another number is asked for."""

LOGITS = "logits"
"""The output of a cross-encoder's file, (batch, 1)."""


class Reranker:
    """The cross-encoder of a release, int8. Safe to call from many threads.

    Args:
        threads: pairs that are scored at the same time, each on one core.

    Raises:
        ReleaseError: the release brings none, or one whose settings cannot be read.
    """

    def __init__(self, release: Release, *, threads: int = 1) -> None:
        if not release.has_reranker:
            raise ReleaseError(
                f"release {release.id} brings no reranker: search without it, or ask its operator for a release that has one"
            )
        folder = release.folder / RERANKER_FOLDER
        try:
            self.tokens = RerankerSettings.model_validate_json(release.read(folder / RERANKER_SETTINGS)).tokens
        except ValueError as error:
            raise ReleaseError(
                f"{folder / RERANKER_SETTINGS} cannot be read ({error}): upgrade Stillroom, or search without the reranker"
            ) from error
        self._threads = threads
        tokenizer, onnx = (release.read(folder / name) for name in (TOKENIZER_NAME, ONNX_FILES["int8"]))
        self._scorer = PairScorer(tokenizer, onnx, self.tokens)

    def logits(self, query: str, passages: Sequence[str]) -> NDArray[np.float64]:
        """How well each passage answers the query, (passages,)."""
        return self._scorer.logits(query, passages, threads=self._threads)


class PairScorer:
    """The ONNX file of a cross-encoder with one score, and its tokenizer. Safe to call from many threads.

    Args:
        tokenizer: content of a `tokenizer.json`.
        onnx: content of a file that gives `logits`.
        tokens: of query and passage together that are read; the longer of the two is cut first.
    """

    def __init__(self, tokenizer: bytes, onnx: bytes, tokens: int) -> None:
        self._tokenizer = Tokenizer.from_buffer(tokenizer)
        self._tokenizer.enable_truncation(tokens)
        self._tokenizer.no_padding()
        self.session = Session(onnx)

    def logits(self, query: str, passages: Sequence[str], *, threads: int = 1) -> NDArray[np.float64]:
        """The logit of each passage, (passages,)."""
        if threads == 1 or len(passages) < 2:
            found = [self._logit(query, passage) for passage in passages]
        else:
            with ThreadPoolExecutor(threads) as pool:  # tokenizer and session leave the interpreter lock
                found = list(pool.map(lambda passage: self._logit(query, passage), passages))
        return np.array(found, np.float64)

    def _logit(self, query: str, passage: str) -> float:
        pair = self._tokenizer.encode(query, passage)
        return float(self.session.run(LOGITS, pair.ids, pair.type_ids)[0])
