"""A cross-encoder as part of a release: from a Sentence Transformers `CrossEncoder` to int8 ONNX, checked against the original.

The folder `reranker/` of a release holds the model (`config.json`, `model.safetensors`, tokenizer: what `CrossEncoder(folder)`
loads), its ONNX files where that library looks for them, and `reranker.json` with the tokens of a pair that are read. The
manifest's table of files covers it, so signature and hashes do too. It needs no field in the manifest: a device of a version
before rerankers verifies such a release, and leaves the folder unused.

Inputs `input_ids`, `attention_mask`, `token_type_ids` (batch, tokens) int64; output `logits` (batch, 1) float32. Weights are
quantized like those of the document tower (`export.py`). The logit is read off the first token, so the last layer is written
for that token alone (`bert_graph.first_state`). Files of versions that computed all tokens give the same.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer
from torch import nn
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from stillroom_server.bert_graph import Graph, first_state
from stillroom_server.export import quantize
from stillroom_server.publish import write_tokenizer
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import (
    ONNX_FILES,
    RERANKER_FOLDER,
    RERANKER_SETTINGS,
    Release,
    RerankerSettings,
    open_release,
    seal_release,
)
from stillroom_shared.sealed import MANIFEST_NAME, new_folder
from stillroom_shared.signing import SigningKey

OUTPUT = "logits"
_FLOAT_TOLERANCE = 1e-3
_PROBES = (
    ("what do tapirs eat", "The tapir eats leaves, fruit and berries."),
    ("what do tapirs eat", "A zip file holds members."),
    (
        "how is a file opened",
        "open(path) gives a file object; close it when you are done with it, or use a with statement.",
    ),
    ("how is a file opened", "x"),
    ("a", "Passages may be long. " * 40),
)


@dataclass(frozen=True, slots=True)
class Exported:
    """How far the files are from the float model, as the largest difference of a logit over `pairs` pairs.

    `spread` is the standard deviation of the float model's logits on the same pairs: what a difference is to be compared with.
    """

    pairs: int
    float_error: float
    int8_error: float
    spread: float


def export_reranker(
    model: CrossEncoder | Path,
    folder: Path,
    *,
    tokens: int = 256,
    pairs: Sequence[tuple[str, str]] = _PROBES,
) -> Exported:
    """Write `reranker/` into a release folder that is not sealed yet, and compare its scores with the model's.

    Args:
        model: a cross-encoder with one score, or the folder of one; a BERT, as all MiniLM cross-encoders are.
        tokens: of query and passage together that are read; the longer of the two is cut.
        pairs: (query, passage) to compare on.

    Raises:
        ReleaseError: the model is of another kind, or the float32 file differs from it.
    """
    encoder = CrossEncoder(str(model), device="cpu", local_files_only=True) if isinstance(model, Path) else model
    return write_reranker(encoder, folder / RERANKER_FOLDER, tokens=tokens, pairs=pairs)


def write_reranker(
    encoder: CrossEncoder, target: Path, *, tokens: int = 256, pairs: Sequence[tuple[str, str]] = _PROBES
) -> Exported:
    """The same into a folder of any name, which may hold the saved model already."""
    scorer, tokenizer = _parts(encoder)
    limit = scorer.config.max_position_embeddings
    if not 8 <= tokens <= limit:
        raise ReleaseError(f"the reranker shall read {tokens} tokens of a pair: choose 8 to {limit}, which it knows")
    for name in ONNX_FILES.values():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
    scorer.save_pretrained(target)
    plain = write_tokenizer(target, tokenizer, tokens)
    settings = RerankerSettings(tokens=tokens).model_dump()
    (target / RERANKER_SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    _export(scorer, target / ONNX_FILES["float32"])
    quantize(target / ONNX_FILES["float32"], target / ONNX_FILES["int8"], blockwise=True)
    for path in target.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    return _compared(scorer, target, plain, tokens, pairs)


def with_reranker(
    folder: Path, release: Release, model: CrossEncoder | Path, *, key: SigningKey, tokens: int = 256
) -> tuple[Release, Exported]:
    """A new release that is `release` with a reranker, sealed as its child: same towers, so indexes stay valid.

    Adapters name the release that they are for, so those of the parent are not taken by the child: publish them again.
    """
    kept = release.manifest.model_dump(
        exclude={
            "kind",
            "schema_version",
            "files",
            "public_key",
            "signature",
            "query_tower_hash",
            "document_tower_hash",
        }
    )
    with new_folder(folder) as partial:
        shutil.copytree(release.folder, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RERANKER_FOLDER))
        (partial / MANIFEST_NAME).unlink()
        done = export_reranker(model, partial, tokens=tokens)
        fields = {**kept, "adapter_spec": release.adapter_spec, "parent": release.id}
        seal_release(partial, fields, key)
    return open_release(folder, trusted_key=key.public), done


def _parts(encoder: CrossEncoder) -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    scorer, tokenizer = encoder.model, encoder.tokenizer
    if not isinstance(scorer, BertForSequenceClassification) or scorer.config.num_labels != 1:
        labels = getattr(getattr(scorer, "config", None), "num_labels", "?")
        raise ReleaseError(
            f"the cross-encoder is a {type(scorer).__name__} with {labels} outputs: give a BERT with one score"
        )
    own = copy.deepcopy(scorer)
    nn.Module.to(own, "cpu", torch.float32)
    own.train(False)
    return own, tokenizer


def _export(scorer: BertForSequenceClassification, path: Path) -> None:
    tower = scorer.bert
    assert tower.pooler is not None
    graph = Graph()
    pooled = graph.add(
        "Tanh", graph.linear(first_state(graph, tower), tower.pooler.dense, "pooler.dense"), out="pooled"
    )
    onnx.save(graph.model(graph.linear(pooled, scorer.classifier, OUTPUT), ("batch", 1)), path)


def _compared(
    scorer: BertForSequenceClassification,
    folder: Path,
    tokenizer: Tokenizer,
    tokens: int,
    pairs: Sequence[tuple[str, str]],
) -> Exported:
    tokenizer.enable_truncation(tokens)
    read = [tokenizer.encode(*pair) for pair in pairs]
    feeds = [
        {
            "input_ids": np.array([one.ids], np.int64),
            "attention_mask": np.ones((1, len(one.ids)), np.int64),
            "token_type_ids": np.array([one.type_ids], np.int64),
        }
        for one in read
    ]
    with torch.inference_mode():
        truth = np.array([float(scorer(**{n: torch.from_numpy(v) for n, v in feed.items()}).logits) for feed in feeds])
    error = {name: float(np.abs(_logits(folder / path, feeds) - truth).max()) for name, path in ONNX_FILES.items()}
    if not error["float32"] <= _FLOAT_TOLERANCE:
        raise ReleaseError(
            f"the exported reranker is off by {error['float32']:.2g} in a logit: it is not the same model"
        )
    return Exported(len(pairs), error["float32"], error["int8"], float(truth.std()))


def _logits(path: Path, feeds: Sequence[dict[str, NDArray[np.int64]]]) -> NDArray[np.float64]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.array([float(session.run([OUTPUT], feed)[0][0, 0]) for feed in feeds])
