"""Sentence Transformers models of width 32, in folders, without the export of a release."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertModel, PreTrainedTokenizerFast


def save_models(root: Path, tower: BertModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """A bi-encoder, cross-encoders with one and three outputs, and a ColBERT."""
    bare = root / "bare"
    tower.save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    transformer = Transformer(str(bare), max_seq_length=48)
    folders = {name: str(root / name) for name in ("bi-encoder", "cross-encoder", "three", "colbert")}
    SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu").save_pretrained(
        folders["bi-encoder"], create_model_card=False
    )
    torch.manual_seed(0)
    for name, labels in (("cross-encoder", 1), ("three", 3)):
        encoder = CrossEncoder(folders["bi-encoder"], num_labels=labels, device="cpu")
        assert encoder.model is not None
        encoder.model.get_parameter("classifier.weight").data.normal_()
        encoder.save_pretrained(folders[name], create_model_card=False)
    MultiVectorEncoder(folders["bi-encoder"], device="cpu").save_pretrained(folders["colbert"], create_model_card=False)
    return folders
