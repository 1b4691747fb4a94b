"""Fine-tune a cross-encoder on labelled public lists before it teaches: "fine-tune, then distil" (arXiv 2010.02666).

Sentence Transformers' `CrossEncoderTrainer` and losses, on the candidates of `Lessons`: passages with a grade above 0 are
relevant, the others (mined negatives) are taken as not. A part of the queries, chosen by a hash of their text, is held out; the
weights of the checkpoint with the best nDCG@10 on their lists are saved. Splits for testing are not for lessons at all: whoever
writes them leaves those out.

    softmax   cross-entropy of the candidates' softmax against the relevant ones (localised contrastive estimation,
              arXiv 2101.08751): `ListNetLoss` with labels far enough apart that only the best grade has a share
    binary    each pair on its own, relevant ones weighted by how many irrelevant there are: `BinaryCrossEntropyLoss`
    lambda    nDCG by swapping pairs (LambdaLoss framework, CIKM 2018): `LambdaLoss`

What is saved is an ordinary `CrossEncoder` folder, with `teaching.json`: settings, hash and sources of the lessons, figures.

Work in progress lies in `.NAME.teaching` beside `out`: the same call again goes on from the last checkpoint and gives, on one
machine, bit for bit the weights of a run that was not interrupted (order, dropout, optimizer and schedule are restored).

| case | what happens |
|---|---|
| `out` is there, of the same lessons and settings | it is returned, nothing is trained |
| `out` is there, of others | `SettingsError` |
| work in progress is of other lessons or settings | it is discarded |
| a list without a relevant candidate, or with nothing else | left out |
| nothing is left to train on or to hold out | `DataError` |
| a checkpoint that a killed process left unfinished | removed; the one before it is gone on from |
| a loss that is not finite | `DataError`, nothing is saved |
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from pydantic import Field
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, LambdaLoss, ListNetLoss
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardCallback
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from stillroom_server.distillery.data.sources import content_of
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.students.towers import plain_attention
from stillroom_server.distillery.teachers.loading import load_model, quiet
from stillroom_server.distillery.teaching_lists import Taught, pick_lists, training_rows, validation_samples
from stillroom_server.distillery.training.checkpoints import newest_checkpoint
from stillroom_server.distillery.training.padding import less_padding
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.processor import native_bfloat16
from stillroom_shared.sealed import new_folder
from stillroom_shared.settings_file import Group

FACTS = "teaching.json"
_LOGS_BETWEEN_CHECKPOINTS = 10
_METRIC = "eval_held_out_ndcg@10"


class TeachSettings(Group):
    """How a cross-encoder is fine-tuned."""

    model: str = Field("offline", min_length=1, description="folder or name it starts from; any transformer will do")
    loss: Literal["softmax", "binary", "lambda"] = Field("softmax", description="what is minimised")
    candidates: int = Field(8, ge=2, description="passages of a list that are read, relevant ones first")
    most_lists: int | None = Field(None, ge=1, description="lists that are trained on; none takes all")
    held_out: float = Field(0.05, gt=0, lt=1, description="share of queries that is not trained on but measured")
    most_held_out: int = Field(200, ge=1, description="lists that are measured, at most")
    pair_tokens: int = Field(256, ge=8, description="of query and passage together that are read; the longer is cut")
    epochs: float = Field(1.0, gt=0, description="times that each list is seen")
    batch_size: int = Field(64, ge=2, description="pairs in one step")
    learning_rate: float = Field(3e-5, gt=0, description="at its peak, after the warm-up; then down to 0 in a line")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    checkpoints: int = Field(5, ge=1, description="times that it is measured and can be resumed from")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of its products; `auto`: bfloat16 where the processor multiplies it natively"
    )
    device: Literal["cpu", "auto"] = Field("auto", description="cpu, or the best there is")
    seed: int = Field(0, ge=0, description="of the order, of dropout and of a new head")


@dataclass(frozen=True, slots=True)
class Teaching:
    """What came of it.

    Attributes:
        folder: of the cross-encoder.
        before, after: nDCG@10 on the held-out lists; before, a new head ranks at random.
        lists, held_out: how many lists were trained on, and measured.
        steps: of the optimizer, in all.
    """

    folder: Path
    before: float
    after: float
    lists: int
    held_out: int
    steps: int


def teach(
    lessons: Lessons,
    settings: TeachSettings,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Teaching:
    """Fine-tune, and save to `out`; `progress` counts steps."""
    begun = content_of(settings.model)
    identity = hashlib.sha256(f"{lessons.identity} {settings.model_dump_json()} {begun}".encode()).hexdigest()
    if out.exists():
        return _finished(out, identity)
    work = out.with_name(f".{out.name}.teaching")
    _claim(work, identity)
    picked = pick_lists(lessons, settings.held_out, settings.most_held_out, settings.most_lists, settings.seed)
    model = _start(settings)
    evaluator = CrossEncoderRerankingEvaluator(
        validation_samples(lessons, picked.held_out), name="held_out", batch_size=settings.batch_size, write_csv=False
    )
    before = _measured(work, evaluator, model)
    trainer = _trainer(model, lessons, picked, settings, work, evaluator, progress)
    with quiet(), less_padding(model):
        newest = newest_checkpoint(work, _whole)
        trainer.train(resume_from_checkpoint=newest)
    model.eval()
    after = float(trainer.state.best_metric or 0.0)
    done = Teaching(out, before, after, len(picked.trained), len(picked.held_out), trainer.state.global_step)
    _save(model, done, identity, lessons, settings)
    shutil.rmtree(work)
    return done


def _whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has its state, which the library writes last, to its end."""
    try:
        return bool(json.loads((checkpoint / TRAINER_STATE_NAME).read_text()))
    except (OSError, ValueError):
        return False


def _start(settings: TeachSettings) -> CrossEncoder:
    """The model before training; its head is new unless it was a cross-encoder."""
    torch.manual_seed(settings.seed)
    device = "cpu" if settings.device == "cpu" else None
    model: CrossEncoder = load_model(CrossEncoder, settings.model, num_labels=1, device=device)
    model.max_seq_length = min(settings.pair_tokens, model.max_seq_length or settings.pair_tokens)
    if model.device.type == "cpu" and _bfloat16(settings):
        plain_attention(model)
    return model


def _bfloat16(settings: TeachSettings) -> bool:
    automatic = (settings.device != "cpu" and torch.cuda.is_available()) or native_bfloat16()
    return settings.precision == "bfloat16" or (settings.precision == "auto" and automatic)


def _loss(model: CrossEncoder, settings: TeachSettings, negatives: float) -> nn.Module:
    if settings.loss == "binary":
        return BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(negatives, device=model.device))
    # All pairs at once: the library's parts follow lists, `less_padding` makes them by length.
    loss: nn.Module = (ListNetLoss if settings.loss == "softmax" else LambdaLoss)(model, mini_batch_size=-1)
    return loss


def _trainer(
    model: CrossEncoder,
    lessons: Lessons,
    picked: Taught,
    settings: TeachSettings,
    work: Path,
    evaluator: CrossEncoderRerankingEvaluator,
    progress: Callable[[int, int], None],
) -> CrossEncoderTrainer:
    rows, per_row, negatives = training_rows(lessons, picked.trained, settings.loss, settings.candidates, work)
    batch = max(1, settings.batch_size // per_row)
    dataset = Dataset.from_file(str(rows))
    steps = max(1, round(math.ceil(len(dataset) / batch) * settings.epochs))
    every = math.ceil(steps / settings.checkpoints)
    logged = max(1, every // _LOGS_BETWEEN_CHECKPOINTS)
    every = math.ceil(every / logged) * logged  # a loss is looked at before it is measured what came of it
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        bf16=_bfloat16(settings),
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=_METRIC,
        greater_is_better=True,
        logging_strategy="steps",
        logging_steps=logged,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=model.device.type == "cuda",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = CrossEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        loss=_loss(model, settings, negatives),
        evaluator=evaluator,
        callbacks=[_Watcher(progress)],
    )
    trainer.remove_callback(PrinterCallback)  # our own progress stands in its place
    trainer.remove_callback(CrossEncoderModelCardCallback)  # `teaching.json` says what it is
    return trainer


class _Watcher(TrainerCallback):
    """Reports finished steps, and stops at a loss that is not finite."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise DataError(f"the loss was not finite at step {state.global_step}: lower learning_rate, or use float32")


def _measured(work: Path, evaluator: CrossEncoderRerankingEvaluator, model: CrossEncoder) -> float:
    """nDCG@10 before training, which a resumed run reads back."""
    path = work / "before.json"
    if not path.exists():
        path.write_text(json.dumps(float(evaluator(model)[str(evaluator.primary_metric)])))
    return float(json.loads(path.read_text()))


def _claim(work: Path, identity: str) -> None:
    """Make the folder of work in progress, and empty it if it is of other lessons or settings."""
    mark = work / "identity"
    if not mark.exists() or mark.read_text() != identity:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        mark.write_text(identity)


def _finished(out: Path, identity: str) -> Teaching:
    try:
        facts = json.loads((out / FACTS).read_text())
    except (OSError, ValueError):
        facts = {}
    if facts.get("identity") != identity:
        raise SettingsError(f"{out} exists and is not of these lessons and settings: name another folder")
    return Teaching(out, **facts["result"])


def _save(model: CrossEncoder, done: Teaching, identity: str, lessons: Lessons, settings: TeachSettings) -> None:
    names = ("before", "after", "lists", "held_out", "steps")
    facts = {
        "identity": identity,
        "result": {name: getattr(done, name) for name in names},
        "settings": settings.model_dump(mode="json"),
        "lessons": lessons.identity,
        "sources": lessons.sources,
    }
    with new_folder(done.folder) as partial:
        with quiet():
            model.save_pretrained(str(partial), create_model_card=False)
        (partial / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
