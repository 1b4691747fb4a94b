"""Towers as a device runs them: inputs and output of `stillroom_server.export`, whatever the student is made of.

A device takes the mean of `last_hidden_state` over a text's tokens and normalizes it. Mean and linear map commute, so what
stands after the pooling is folded into each token's state: the file of a narrow or a static student is one that a device of
today runs, and the length of its vectors is that of the teacher's space.

| student | graph | what a release of it would need beside the file |
|---|---|---|
| layers left out, fewer neurons | its `BertModel` | nothing: `publish_release` takes it |
| fewer heads | `ShapedBertModel` | `AdapterSpec` with the length of `B`; a tower class that devices can train |
| narrow, with a `Dense` | `ShapedBertModel` with `output_size` | its dimension apart from the tower's width; that class |
| static | a looked-up row, mapped | a query tower that takes no adapter, so no federated rounds |
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from torch import Tensor, nn
from transformers import BertModel

from stillroom_server.bert_graph import INPUTS
from stillroom_server.distillery.students.shaped import ShapedBertConfig, ShapedBertModel
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.export import OUTPUT, bare, export, quiet
from stillroom_shared.errors import ReleaseError

_OPSET = 18


def export_student(student: SentenceTransformer, path: Path) -> None:
    """Write a tower or a static student as float32 ONNX, which `stillroom_server.export.quantize` takes further.

    Raises:
        ReleaseError: the student pools in another way, or has modules that are not linear.
    """
    if isinstance(student[0], StaticEmbedding):
        _export_table(_Table(student[0].embedding.weight, _map(list(student)[1:])), path)
    else:
        export(folded(student), path)


def folded(student: SentenceTransformer) -> BertModel:
    """A tower whose mean state is the student's vector before normalization: its own, or one that ends with its `Dense`."""
    pooling = student[1] if len(student) > 1 else None
    if not isinstance(pooling, Pooling) or pooling.pooling_mode != "mean":
        raise ReleaseError(f"the student pools by {getattr(pooling, 'pooling_mode', None)}: a device takes the mean")
    tower, linear = bert_of(student), _map(list(student)[2:])
    if linear is None:
        return tower
    names = ("model_type", "architectures", "output_size")
    fields = {name: value for name, value in tower.config.to_dict().items() if name not in names}
    whole = ShapedBertModel(ShapedBertConfig(**fields, output_size=linear.out_features), tower.pooler is not None)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    last = {"projection.weight": linear.weight.detach(), "projection.bias": bias}
    whole.load_state_dict({**tower.state_dict(), **last})
    whole.train(False)
    return whole


def _map(modules: list[nn.Module]) -> nn.Linear | None:
    """The linear map among what follows the pooling, or None when there is nothing but a normalization."""
    maps = [module for module in modules if not isinstance(module, Normalize)]
    if not maps:
        return None
    only = maps[0] if len(maps) == 1 else None
    if isinstance(only, Dense) and not only.use_residual and isinstance(only.activation_function, nn.Identity):
        return only.linear
    names = ", ".join(type(module).__name__ for module in maps)
    raise ReleaseError(f"after its pooling the student has {names}: only one linear Dense can be exported")


class _Table(nn.Module):
    """(batch, tokens) to (batch, tokens, dim): the row of each token, mapped; the other inputs are read and change nothing."""

    def __init__(self, weight: Tensor, linear: nn.Linear | None) -> None:
        super().__init__()
        # The name is what the quantizer looks for.
        self.word_embeddings = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight.detach())
        self.linear = linear

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        states: Tensor = self.word_embeddings(ids)
        states = states if self.linear is None else self.linear(states)
        return states * (mask + 0 * types)[:, :, None].to(states.dtype)


def _export_table(table: _Table, path: Path) -> None:
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    ids = tuple(torch.ones(2, 3, dtype=torch.int64) for _ in INPUTS)  # `stillroom_server.export` says why of this size
    with quiet():
        program = torch.onnx.export(
            table.eval(),
            ids,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            opset_version=_OPSET,
            dynamic_shapes=tuple({0: batch, 1: tokens} for _ in INPUTS),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    onnx.save(bare(program.model_proto), path)
