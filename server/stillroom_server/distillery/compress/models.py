"""ONNX for students of any kind that take no adapter, where Sentence Transformers looks for it, checked against torch.

Inputs `input_ids`, `attention_mask` and, where the tower reads them, `token_type_ids` (batch, tokens) int64; output
`last_hidden_state` (batch, tokens, dim) float32. Pooling stays outside.

| first module of the model | how it is written |
|---|---|
| BERT | operator by operator (`stillroom_server.bert_graph`) |
| static embedding (a table) | one Gather; the mean over tokens is the model's vector |
| any other transformer | traced by `torch.onnx` |
| a tower without `last_hidden_state`, or whose file differs from it | `ReleaseError` |
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel

from stillroom_server.bert_graph import INPUTS, OPSET
from stillroom_server.distillery.students.export import export_table
from stillroom_server.export import OUTPUT, bare, export, quiet
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import ONNX_FILES

_TOLERANCE = 1e-4


def export_model(model: SentenceTransformer, folder: Path) -> float:
    """Write `onnx/model.onnx` into the folder of a saved model.

    Returns:
        The largest difference from torch, as a share of the largest value.

    Raises:
        ReleaseError: the model's tower cannot be exported, or the file computes something else.
    """
    path = folder / ONNX_FILES["float32"]
    path.parent.mkdir(parents=True, exist_ok=True)
    module = model[0]
    if isinstance(module, StaticEmbedding):
        export_table(module, path)
        return _difference(path, lambda feed: module.embedding.weight[feed["input_ids"]])
    tower = getattr(module, "auto_model", None)
    if not isinstance(tower, PreTrainedModel):
        raise ReleaseError(f"the model begins with a {type(module).__name__}: give one with a transformer or a table")
    own = copy.deepcopy(tower)
    nn.Module.to(own, "cpu", torch.float32)
    own.train(False)
    if isinstance(own, BertModel):
        export(own, path)
    else:
        _trace(own, path, [name for name in INPUTS if name in model.tokenizer.model_input_names])
    return _difference(path, lambda feed: own(**feed).last_hidden_state)


class _Traced(nn.Module):
    """A tower as a function of its inputs by position."""

    def __init__(self, tower: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.tower, self.names = tower, names

    def forward(self, *inputs: Tensor) -> Tensor:
        states: Tensor = self.tower(**dict(zip(self.names, inputs, strict=True))).last_hidden_state
        return states


def _trace(tower: PreTrainedModel, path: Path, names: list[str]) -> None:
    tower.set_attn_implementation("eager")
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=tower.config.max_position_embeddings)}
    # Any values of rank 2 would do, but sizes 0 and 1 would be taken for constants, and one tensor given twice for one input.
    inputs = tuple(torch.ones(2, 3, dtype=torch.int64) for _ in names)
    with quiet():
        program = torch.onnx.export(
            _Traced(tower, names).eval(),
            inputs,
            input_names=names,
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes=((sizes,) * len(names),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    onnx.save(bare(program.model_proto), path)


def _difference(path: Path, truth: Callable[[dict[str, Tensor]], Tensor]) -> float:
    """Over two texts of different lengths; `ReleaseError` above the tolerance."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = np.arange(10, dtype=np.int64).reshape(2, 5)
    mask = np.array([[1] * 5, [1] * 3 + [0] * 2], np.int64)
    names = {entry.name for entry in session.get_inputs()}
    feed = {n: v for n, v in zip(INPUTS, (ids, mask, np.zeros_like(ids)), strict=True) if n in names}
    found: NDArray[np.float32] = session.run([OUTPUT], feed)[0]
    with torch.inference_mode():
        states = truth({name: torch.from_numpy(value) for name, value in feed.items()}).cpu().numpy()
    error = float(np.abs((found - states)[mask == 1]).max() / np.abs(states).max())
    if not error <= _TOLERANCE:
        raise ReleaseError(f"the exported model is off by {error:.2g} of the largest value: it is not the same model")
    return error
