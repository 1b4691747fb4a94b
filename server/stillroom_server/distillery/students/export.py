"""Towers as a device runs them: inputs and output of `stillroom_server.export`, whatever the student is made of.

A device takes the mean of `last_hidden_state` over a text's tokens and normalizes it. Mean and linear map commute, so what
stands after the pooling is folded into each token's state: the file of a narrow or a static student is one that a device of
today runs, and the length of its vectors is that of the teacher's space.

| student | graph | what a release of it would need beside the file |
|---|---|---|
| layers left out, fewer neurons | its `BertModel` | nothing: `publish_release` takes it |
| fewer heads | `ShapedBertModel` | `AdapterSpec` with the length of `B`; a tower class that devices can train |
| narrow or rotated, with a `Dense` | `ShapedBertModel` with `output_size` | its dimension apart from its width; that class |
| static | a looked-up row, mapped | a query tower that takes no adapter, so no federated rounds |
| late interaction | its tower with the map of its tokens; unit length and masks stay outside | an index of tokens |
| any other transformer, with nothing after its pooling | traced by `torch.onnx` | a tower class that devices can train |
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import onnx
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel

from stillroom_server.bert_graph import INPUTS, OPSET, PROJECTION, Graph
from stillroom_server.distillery.students.shaped import ShapedBertConfig, ShapedBertModel
from stillroom_server.distillery.students.towers import bert_of, first_of, linear_of
from stillroom_server.export import OUTPUT, bare, compare, export, quiet
from stillroom_shared.errors import ReleaseError


def export_student(student: SentenceTransformer | MultiVectorEncoder, path: Path) -> None:
    """Write a tower, a static student or a late-interaction one as float32 ONNX, which `compress` takes further.

    Raises:
        ReleaseError: the student pools in another way, or has modules that are not linear.
    """
    if isinstance(student, MultiVectorEncoder):
        linear = _map([module for module in list(student)[1:] if not isinstance(module, MultiVectorMask)])
        export(_with_map(bert_of(student), linear), path)
    elif isinstance(student[0], StaticEmbedding):
        export_table(student[0], path, _map(list(student)[1:]))
    else:
        tower = getattr(first_of(student), "auto_model", None)
        if isinstance(tower, PreTrainedModel) and not isinstance(tower, BertModel):
            if _after_mean(student) is not None:
                raise ReleaseError(
                    f"a Dense follows the pooling of a {type(tower).__name__}: only a BERT takes it into its states"
                )
            _trace(tower, path)
        else:
            export(folded(student), path)


def folded(student: SentenceTransformer) -> BertModel:
    """A tower whose mean state is the student's vector before normalization: its own, or one that ends with its `Dense`."""
    linear = _after_mean(student)
    return _with_map(bert_of(student), linear)


def _after_mean(student: SentenceTransformer) -> nn.Linear | None:
    """What maps the mean of the states, or None; `ReleaseError` where it is not the mean that counts."""
    pooling = student[1] if len(student) > 1 else None
    if not isinstance(pooling, Pooling) or pooling.pooling_mode != "mean":
        raise ReleaseError(f"the student pools by {getattr(pooling, 'pooling_mode', None)}: a device takes the mean")
    return _map(list(student)[2:])


class _Traced(nn.Module):
    """A tower as a function of a device's inputs by position, its last hidden states alone."""

    def __init__(self, tower: PreTrainedModel) -> None:
        super().__init__()
        self.tower = copy.deepcopy(tower)
        nn.Module.to(self, "cpu", torch.float32)
        self.tower.set_attn_implementation("eager")
        known = inspect.signature(tower.forward).parameters
        self._names = [name if name in known else None for name in INPUTS]

    def forward(self, *inputs: Tensor) -> Tensor:
        read = {name: value for name, value in zip(self._names, inputs, strict=True) if name is not None}
        states: Tensor = self.tower(**read).last_hidden_state
        return states


def _trace(tower: PreTrainedModel, path: Path) -> None:
    own = _Traced(tower).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=tower.config.max_position_embeddings)}
    # Any values of rank 2 would do, but sizes 0 and 1 would be taken for constants, and one tensor given twice for one input.
    inputs = tuple(torch.ones(2, 3, dtype=torch.int64) for _ in INPUTS)
    with quiet():
        program = torch.onnx.export(
            own,
            inputs,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes=((sizes,) * len(INPUTS),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    onnx.save(bare(program.model_proto), path)
    compare(path, lambda feed: own(*feed.values()), tower.config)


def _with_map(tower: BertModel, linear: nn.Linear | None) -> BertModel:
    """A tower whose states are mapped once more."""
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
    if linear := linear_of(only):
        return linear
    names = ", ".join(type(module).__name__ for module in maps)
    raise ReleaseError(f"after its pooling the student has {names}: only one linear Dense can be exported")


def export_table(module: StaticEmbedding, path: Path, linear: nn.Linear | None = None) -> None:
    """(batch, tokens) to (batch, tokens, dim): the row of each token, mapped; mask and types are inputs that change nothing."""
    graph = Graph()
    # The name that the quantizer looks for.
    table = graph.constant("word_embeddings.weight", module.embedding.weight)
    if linear is None:
        states, width = graph.add("Gather", table, INPUTS[0], out=OUTPUT), module.embedding.embedding_dim
    else:
        found, width = graph.add("Gather", table, INPUTS[0], out="found"), linear.out_features
        rows = graph.add("Reshape", found, graph.constant("rows", [-1, linear.in_features]), out="found.rows")
        size = graph.add("Shape", INPUTS[0], out="size")
        shape = graph.add("Concat", size, graph.constant("width", [width]), out="size.states", axis=0)
        states = graph.add("Reshape", graph.linear(rows, linear, PROJECTION), shape, out=OUTPUT)
    onnx.save(graph.model(states, ("batch", "tokens", width)), path)
