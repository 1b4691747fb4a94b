"""Queries written by a language model: a sequence-to-sequence one as in doc2query, or one that follows instructions.

Sampling is exact and belongs to the text, not to the batch: the m-th query of a passage comes from uniform numbers that are
drawn by the hash of (seed, passage, m), one for each token, through the inverse of the distribution's cumulated
probabilities. A batch of another size, another order or a run that was resumed gives the same queries, up to the arithmetic of
padding (differences of 1e-6 in a probability may, rarely, tip a token).

| paper | |
|---|---|
| docTTTTTquery (Nogueira & Lin 2019) | T5, top-k sampling with k = 10; doc2query--, arXiv 2301.03266, filters afterwards |
| InPars, arXiv 2202.05144; Promptagator, arXiv 2209.11755 | a large model is asked for a question |

| what a model writes | what stays of it |
|---|---|
| thinking between <think> tags | what follows; nothing, where it does not end |
| several lines | the first that is a query after cleaning |
| `1. `, `- `, `Question: `, quotation marks, backquotes around it | what is inside |
| fewer or more words than allowed, mostly no letters, the whole passage | nothing |
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stillroom_server.distillery.data.heuristics import acceptable
from stillroom_server.distillery.data.sampling import mark
from stillroom_server.distillery.data.settings import SyntheticSettings
from stillroom_shared.errors import SettingsError

_THINKING = re.compile(r"<think>.*?</think>|^.*</think>|<think>.*$", re.DOTALL)
_LABEL = re.compile(
    r"^(?:\s|[-*•>#]|\(?\d{1,2}[.):](?=\s)|\*\*|(?:the\s+)?(?:search\s+)?(?:question|query)(?:\s+\d+)?\s*[:=])+", re.I
)
_AROUND = " \t\"'`*\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb"


@dataclass(frozen=True, eq=False)
class Generator:
    """A model that writes a query for a passage.

    The model stays on the device that it is on; `tokenizer` is changed (side and token of padding).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: SyntheticSettings
    seed: int

    @classmethod
    def load(cls, settings: SyntheticSettings, *, seed: int) -> Generator:
        """Load by folder or name. Raises `SettingsError` when it cannot be had or is of another kind."""
        kind = AutoModelForSeq2SeqLM if "seq2seq" in settings.makers else AutoModelForCausalLM
        try:
            config = AutoConfig.from_pretrained(settings.model)
            tokenizer = AutoTokenizer.from_pretrained(settings.model)
            model = kind.from_pretrained(settings.model, config=config)
        except (OSError, ValueError, KeyError) as error:
            raise SettingsError(
                f"data.synthetic.model {settings.model!r} cannot be loaded as {kind.__name__} ({error}): give a folder, a "
                "name with network access, or the other maker of seq2seq and llm"
            ) from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.eval().to(device), tokenizer, settings, seed)

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        # A causal model goes on where its prompt ends, so padding stands before it.
        self.tokenizer.padding_side = "right" if self._pairs else "left"

    @property
    def _pairs(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @cached_property
    def identity(self) -> str:
        """A hash of the weights, the vocabulary, and of what the settings say about generation."""
        digest = hashlib.sha256(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(
                name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        ignored = {"batch_size", "makers", "passages", "model"}
        return f"{digest.hexdigest()[:24]} {self.settings.model_dump_json(exclude=ignored)} {self.seed}"

    def __call__(self, passages: Sequence[str]) -> list[list[str]]:
        """Cleaned queries of each passage, at most `per_passage`, none twice."""
        jobs = [(row, number) for row in range(len(passages)) for number in range(self.settings.per_passage)]
        # Like lengths share a batch: padding is work.
        jobs.sort(key=lambda job: len(passages[job[0]]))
        written: dict[tuple[int, int], str] = {}
        for start in range(0, len(jobs), self.settings.batch_size):
            batch = jobs[start : start + self.settings.batch_size]
            texts = self._write([passages[row] for row, _ in batch], [number for _, number in batch])
            written |= zip(batch, texts, strict=True)
        return [
            [clean(written[row, number], passage, self.settings) for number in range(self.settings.per_passage)]
            for row, passage in enumerate(passages)
        ]

    @torch.no_grad()
    def _write(self, passages: Sequence[str], numbers: Sequence[int]) -> list[str]:
        """What the model writes for each passage, uncleaned."""
        inputs = self.tokenizer(
            [self.reads(text) for text in passages],
            padding=True,
            return_tensors="pt",
            add_special_tokens=self._pairs or not self.tokenizer.chat_template,  # a template has written its own
        )
        inputs.pop("token_type_ids", None)
        seeds = [[mark(text, self.seed), self.seed, number] for text, number in zip(passages, numbers, strict=True)]
        uniforms = np.stack([np.random.default_rng(seed).random(self.settings.new_tokens) for seed in seeds])
        device = self.model.device
        output = cast(Callable[..., Tensor], self.model.generate)(
            **inputs.to(device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.settings.new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([Sampled(self._warpers(), torch.from_numpy(uniforms).to(device))]),
        )
        start = 0 if self._pairs else inputs["input_ids"].shape[1]
        return self.tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)

    def _warpers(self) -> list[Any]:
        settings = self.settings
        warpers: list[Any] = [TemperatureLogitsWarper(settings.temperature)] if settings.temperature != 1 else []
        warpers += [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        return warpers + ([TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else [])

    def reads(self, passage: str) -> str:
        """The model's input for a passage: the passage, or the prompt around it in the model's chat template."""
        tokens = self.tokenizer(passage, add_special_tokens=False)["input_ids"]
        if len(tokens) > self.settings.passage_tokens:
            passage = cast(str, self.tokenizer.decode(tokens[: self.settings.passage_tokens]))
        if self._pairs:
            return passage
        asked = self.settings.prompt.replace("{passage}", passage)
        if not self.tokenizer.chat_template:
            return asked
        turns = [{"role": "user", "content": asked}]
        return cast(str, self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


class Sampled(LogitsProcessor):
    """Leaves one token of each row: that where the cumulated probability passes the row's number of this step.

    Greedy decoding then samples exactly from the warped distribution, row by row.
    """

    def __init__(self, warpers: Sequence[Any], uniforms: Tensor) -> None:
        self._warpers = warpers
        self._uniforms = uniforms  # (rows, steps) in [0, 1)
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, (rows, vocabulary), all but one at minus infinity."""
        self._start = input_ids.shape[1] if self._start is None else self._start
        step = input_ids.shape[1] - self._start
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        chosen = draw(scores, self._uniforms[:, step])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens with the probabilities of softmax(logits), by the inverse of the cumulated probabilities.

    Args:
        logits: (rows, vocabulary); minus infinity is never drawn.
        uniforms: (rows,) in [0, 1).

    >>> draw(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]), torch.tensor([0.6, 0.999])).tolist()
    [1, 0]
    """
    cumulated = nn.functional.softmax(logits.double(), dim=-1).cumsum(-1)
    # Scaled, not compared with 1: the sum of the last row's floats may be a little less.
    place = uniforms.double().unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, place, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def clean(text: str, passage: str, settings: SyntheticSettings) -> str:
    """The query in what a model wrote, or "" when there is none.

    >>> clean('<think>Hm.</think>\\n1. **Question:** "What do tapirs eat?"\\n2. ...', "Leaves.", SyntheticSettings())
    'What do tapirs eat?'
    >>> clean("Yes.", "Leaves.", SyntheticSettings())
    ''
    """
    for line in _THINKING.sub("", text).splitlines():
        query = " ".join(_LABEL.sub("", line.strip(_AROUND)).strip(_AROUND).split())
        if acceptable(query, passage, settings):
            return query
    return ""
