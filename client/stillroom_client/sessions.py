"""An ONNX file as a device runs it: a text at a time, without padding, on one core; whoever has more cores runs more texts.

`encoder.py` says why texts are not batched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

_NOTHING: Mapping[str, NDArray[np.float32]] = {}


class Session:
    """A file from token ids to float32 values. Safe to call from many threads.

    Attributes:
        outputs: names of what it gives.
    """

    def __init__(self, content: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._inputs = {one.name for one in self._session.get_inputs()}
        self.outputs = tuple(one.name for one in self._session.get_outputs())

    def run(
        self,
        output: str,
        ids: Sequence[int],
        types: Sequence[int],
        matrices: Mapping[str, NDArray[np.float32]] = _NOTHING,
    ) -> NDArray[np.float32]:
        """What the file gives for one text, the first and only of its batch.

        Args:
            ids, types: tokens of the text, and which of two texts each belongs to; (tokens,). A file of a model that knows no
                types is given none.
            matrices: values of overridable initializers.
        """
        row = np.array([ids], np.int64)  # (1, tokens)
        given = {
            "input_ids": row,
            "attention_mask": np.ones_like(row),
            "token_type_ids": np.array([types], np.int64),
        }
        feed = {name: value for name, value in given.items() if name in self._inputs}
        found: NDArray[np.float32] = self._session.run([output], {**feed, **matrices})[0][0]
        return found
