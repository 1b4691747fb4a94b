"""What a model's outputs depend on, as a hash, so that results can be kept by content.

It covers the weights, each module's and the transformer's settings, and the tokenizer with its vocabulary and rules. It does
not cover what a call sets (text limits, prompts, precision: the teachers add those), nor where the model lies, nor on which
device it runs.

| case | what happens |
|---|---|
| the same model from another folder, or saved again | the same hash |
| a tokenizer that has been used (calls leave their padding and truncation in it) | the same hash |
| tied weights | hashed under each name |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_VOLATILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Of a transformer's settings: where it came from, and by what it was saved."""


def model_identity(model: nn.Module) -> str:
    """The hash of a Sentence Transformers model of any type, 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(list(_described(model)), sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _described(model: nn.Module) -> Iterator[Any]:
    """Of the whole where its vectors are cut; of each module of the pipeline: type, settings, tokenizer."""
    if cut := getattr(model, "truncate_dim", None):
        yield ["truncate_dim", cut]
    for name, module in model.named_modules():
        kind = [name, type(module).__name__]
        if hasattr(module, "get_config_dict"):
            yield [*kind, module.get_config_dict()]
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_diff_dict"):
            yield [*kind, {k: v for k, v in config.to_diff_dict().items() if k not in _VOLATILE}]
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is not None:
            yield [*kind, _rules(tokenizer)]


def _rules(tokenizer: Any) -> Any:
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(fast, "to_str"):
        return sorted(tokenizer.get_vocab().items())
    rules = json.loads(fast.to_str())
    rules.update(truncation=None, padding=None)  # left there by the last call
    template = getattr(tokenizer, "chat_template", None)  # around the texts of a reranker that is a language model
    return [rules, getattr(tokenizer, "model_max_length", None), *([template] if template else [])]
