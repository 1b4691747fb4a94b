"""A cross-encoder that is trained in seconds, and knows one thing: passages in which something eats leaves answer best."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

_ANIMALS = ("tapir", "okapi", "numbat", "kakapo", "saola", "dugong")


def trained(folder: Path, tokenizer: PreTrainedTokenizerFast, *, steps: int = 80) -> CrossEncoder:
    """Of random weights, two layers of width 32; saved as `CrossEncoder` saves it, and loaded again."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 1
    model = BertForSequenceClassification(config)
    pairs = [
        (f"what does the {asked} do", text.format(own), float("leaves" in text))
        for asked in _ANIMALS
        for own in _ANIMALS
        for text in ("The {} eats leaves.", "{} {} list.".replace("{} {}", "{0} {0}"), "The {} of the river bank.")
    ]
    batch = tokenizer([a for a, _, _ in pairs], [b for _, b, _ in pairs], padding=True, return_tensors="pt")
    wanted = torch.tensor([label for _, _, label in pairs])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(**batch).logits[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss.item() < 0.1, "the guard: it has learnt that"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded: CrossEncoder = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    return loaded
