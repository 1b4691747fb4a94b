"""A training run: a trainer of Sentence Transformers over lessons, which can be interrupted, resumed and spread over processes.

    FOLDER/checkpoints/   the newest checkpoints: weights, optimizer, schedule, position in the data, projections of the losses
    FOLDER/curves/        TensorBoard: each loss, the rate, the gradient's length

The first interrupt (Ctrl-C) finishes the step, saves and raises `KeyboardInterrupt`; after a kill, `save_minutes` are lost at
most. A run that goes on from a checkpoint ends with the weights of one that was never interrupted (tested). Under `accelerate
launch` or `torchrun` every process takes its share of the batches; gradients are averaged over them, zero where one did not use
what another used.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor, nn
from transformers import BertModel, PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.losses.composition import Composition
from stillroom_server.distillery.training.batches import LikeLengths, Reading, Unit
from stillroom_server.distillery.training.checkpoints import newest_checkpoint
from stillroom_server.distillery.training.objectives import Clock
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_shared.errors import DataError
from stillroom_shared.processor import native_bfloat16

Student = SentenceTransformer | MultiVectorEncoder | CrossEncoder
Progress = Callable[[int, int], None]

_LOSSES = "losses.pt"


class _Plain:
    """A trainer that writes no model card, and whose processes may use other parameters than each other.

    A card would read texts from data sets of numbers; the recipe describes itself.
    """

    accelerator: Accelerator
    optimizer: Any

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Nothing to add."""

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        """As in the library, but gradients are averaged after the backward pass: in it, each parameter would wait for all."""
        with self.accelerator.no_sync(model):
            loss: Tensor = super().training_step(model, *args, **options)  # type: ignore[misc]
        if self.accelerator.sync_gradients:
            _average_gradients(self.optimizer)
        return loss


class _TowerTrainer(_Plain, SentenceTransformerTrainer):
    pass


class _LateTrainer(_Plain, MultiVectorEncoderTrainer):
    pass


class _RerankTrainer(_Plain, CrossEncoderTrainer):
    pass


_KINDS: tuple[tuple[type, type, type], ...] = (
    (CrossEncoder, _RerankTrainer, CrossEncoderTrainingArguments),
    (MultiVectorEncoder, _LateTrainer, MultiVectorEncoderTrainingArguments),
    (SentenceTransformer, _TowerTrainer, SentenceTransformerTrainingArguments),
)


def train(
    student: Student,
    sets: Mapping[str, tuple[Unit, Dataset, nn.Module]],
    lessons: Lessons,
    settings: TrainingSettings,
    folder: Path,
    *,
    composition: Composition,
    clock: Clock,
    passages: bool,
    progress: Progress = lambda done, total: None,
) -> None:
    """Train `student` in place, from the newest checkpoint in `folder` if there is one.

    Args:
        sets: what is learned from, by name: what its labels number, the labels, and the objective.
        composition: the losses of all objectives; its projections are saved with checkpoints.
        clock: the one that the objectives read.
        passages: whether the student reads candidates, or only queries.

    Raises:
        DataError: several processes have not even a full batch each.
        KeyboardInterrupt: it was interrupted and has been saved.
    """
    _check_share([len(one) for _, one, _ in sets.values()], settings.batch_size)
    _, trainer_type, arguments_type = next(one for one in _KINDS if isinstance(student, one[0]))
    checkpoints = folder / "checkpoints"
    newest = _newest(checkpoints)
    watcher = _Watcher(settings, clock, composition, progress)
    _leave_poolers(student)
    trainer = trainer_type(
        model=student,
        args=arguments_type(output_dir=str(checkpoints), **_arguments(settings)),
        train_dataset=DatasetDict({name: one for name, (_, one, _) in sets.items()}),
        loss={name: objective for name, (_, _, objective) in sets.items()},
        callbacks=[watcher],
    )
    inner = trainer.data_collator
    trainer.data_collator = Reading(
        inner, lessons, {name: unit for name, (unit, _, _) in sets.items()}, passages=passages
    )
    trainer.remove_callback(PrinterCallback)  # our own progress stands in its place
    if trainer.is_world_process_zero():
        trainer.add_callback(_curves(folder / "curves"))
    if newest is not None:
        composition.load_state_dict(torch.load(Path(newest, _LOSSES), weights_only=True))
        if _finished(newest):  # the trainer would look whether it is only after one more step
            trainer._load_from_checkpoint(newest)
            student.train(False)
            return
    with watcher.interruptible(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="accelerate")
        trainer.train(resume_from_checkpoint=newest)
    student.train(False)


def _check_share(sizes: Sequence[int], batch_size: int) -> None:
    """`DataError` where several processes would have no step in an epoch: they take full batches only."""
    together = processes().num_processes
    if together > 1 and sum(size // batch_size for size in sizes) < together:
        raise DataError(
            f"training.batch_size {batch_size}: {' and '.join(f'{size:,}' for size in sizes)} texts or lists are no full batch "
            f"for each of {together} processes: set it lower, or run fewer processes"
        )


def _newest(checkpoints: Path) -> str | None:
    """The newest whole checkpoint, or None; one process removes the others before any reads."""
    state = processes()
    if state.is_main_process:
        newest_checkpoint(checkpoints, _whole)
    state.wait_for_everyone()
    return newest_checkpoint(checkpoints, _whole)


def _whole(checkpoint: Path) -> bool:
    return (checkpoint / _LOSSES).exists()  # written last, at once


def _finished(checkpoint: str) -> bool:
    """Whether it was saved after the last step."""
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    return bool(state.global_step >= state.max_steps)


def _arguments(settings: TrainingSettings) -> dict[str, Any]:
    automatic = torch.cuda.is_available() or native_bfloat16()
    return {
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.gradient_norm,
        "bf16": settings.bfloat16 == "on" or (settings.bfloat16 == "auto" and automatic),
        "use_cpu": not torch.cuda.is_available(),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "batch_sampler": LikeLengths,
        "multi_dataset_batch_sampler": "proportional",
        "save_strategy": "no",  # by the clock, in `_Watcher`
        "save_total_limit": 2,  # the one before stays until the newest is whole
        "logging_steps": settings.log_steps,
        "report_to": "none",  # `_curves`
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Several processes wait for each other at each step: none may have a batch more.
        "dataloader_drop_last": processes().num_processes > 1,
        "ddp_find_unused_parameters": False,
    }


def _curves(folder: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(folder)))  # type: ignore[no-untyped-call]


def processes() -> PartialState:
    """This process among those that train together. They wait for the first as long as its preparation takes."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))


def _leave_poolers(student: Student) -> None:
    """Leave alone what no vector comes from."""
    for part in student.modules():
        if isinstance(part, BertModel) and part.pooler is not None and not isinstance(student, CrossEncoder):
            part.pooler.requires_grad_(False)


def _average_gradients(optimizer: Any) -> None:
    """Have every process step the student and the projections alike, all that the optimizer steps.

    One process may learn from texts, whose losses use fewer of them (no projection, or not the last layer, of which attention
    maps see nothing), while another learns from lists. What none of them used stays without a gradient, as in one process.
    """
    if (together := processes().num_processes) == 1:
        return
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    used = _any_process(*(one.grad is not None for one in parameters))
    stepped = [one for one, anywhere in zip(parameters, used, strict=True) if anywhere]
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in stepped]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    averages = torch.split(flat.div_(together), [gradient.numel() for gradient in gradients])
    for parameter, average in zip(stepped, averages, strict=True):
        parameter.grad = average.view_as(parameter)


def _any_process(*own: bool) -> list[bool]:
    """Of each value, whether it is true in any of the processes."""
    state = processes()
    if state.num_processes == 1:
        return list(own)
    together = torch.tensor(own, dtype=torch.int32, device=state.device)
    torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
    return [bool(value) for value in together.tolist()]


class _Watcher(TrainerCallback):
    """Moves the clock, shows progress, saves by the clock, and ends a run that is interrupted."""

    def __init__(self, settings: TrainingSettings, clock: Clock, composition: Composition, progress: Progress) -> None:
        self._seconds = settings.save_minutes * 60
        self._clock, self._composition, self._progress = clock, composition, progress
        self._saved = time.monotonic()
        self._interrupted = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock.progress = state.global_step / max(state.max_steps, 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps)
        # Processes that disagree would wait for each other: one in the checkpoint, the other in the next step.
        self._interrupted, due = _any_process(self._interrupted, time.monotonic() - self._saved > self._seconds)
        control.should_save |= self._interrupted or due
        control.should_training_stop |= self._interrupted

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = time.monotonic()
        if state.is_world_process_zero and args.output_dir:
            whole = Path(args.output_dir, f"checkpoint-{state.global_step}", _LOSSES)
            torch.save(self._composition.state_dict(), partial := whole.with_suffix(".partial"))
            partial.replace(whole)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs is not None and "loss" in logs:
            logs |= self._clock.means()

    def interruptible(self) -> _Interruptible:
        """Turn the first interrupt into an orderly end, which raises when it is reached."""
        return _Interruptible(self)

    def interrupt(self) -> None:
        """End after this step."""
        self._interrupted = True

    @property
    def interrupted(self) -> bool:
        return self._interrupted


class _Interruptible:
    def __init__(self, watcher: _Watcher) -> None:
        self._watcher = watcher

    def __enter__(self) -> None:
        # Only the main thread may ask for signals; elsewhere whoever runs it sees to interrupts.
        self._own = threading.current_thread() is threading.main_thread()
        if self._own:
            self._before = signal.signal(signal.SIGINT, self._first)

    def _first(self, number: int, frame: Any) -> None:
        self._watcher.interrupt()
        signal.signal(signal.SIGINT, self._before)  # a second one ends it at once

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._own:
            signal.signal(signal.SIGINT, self._before)
        # An error that ends the run as well, such as one that stops it on purpose, would take the interrupt with it.
        if self._watcher.interrupted and (kind is None or issubclass(kind, Exception)):
            raise KeyboardInterrupt
