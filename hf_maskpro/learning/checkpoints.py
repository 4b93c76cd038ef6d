"""Checkpoints that are whole or not there, and a run that ends with one when it is asked to stop."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Where a checkpoint is written, in the folder of the run, and there what it replaces; and the sizes of its files, by
# which half of one shows.
UNFINISHED, REPLACED, FILES_NAME = ".unfinished", "replaced", "files.json"
# What a system gives to a process that it asks to end: systemd 90 seconds, others less.
SECONDS_TO_END = 90


def place_checkpoint(written: Path, folder: Path) -> None:
    """
    Give a checkpoint that is written its place, at once. An earlier run's of that name goes; one of more steps stays,
    but no run is resumed from it unasked.
    """
    paths = sorted(written.rglob("*"))
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in paths if path.is_file()}
    (written / FILES_NAME).write_text(json.dumps(sizes))
    # A file system may keep a renaming and lose what was written before it, when the machine stops.
    for path in (written / FILES_NAME, *paths, written):
        _to_disk(path)
    if folder.exists():
        replaced = written.parent / REPLACED
        replaced.mkdir()
        folder.rename(replaced / folder.name)
    written.rename(folder)
    _to_disk(folder.parent)
    for step, other in _checkpoints(folder.parent).items():
        if step > int(folder.name.rpartition("-")[2]):
            (other / FILES_NAME).unlink(missing_ok=True)
    discard(written.parent)


def discard(unfinished: Path) -> None:
    """Delete what was not placed, but for what it was to replace: without a successor that gets its place again."""
    for old in unfinished.glob(f"{REPLACED}/*"):
        if not (unfinished.parent / old.name).exists():
            old.rename(unfinished.parent / old.name)
    shutil.rmtree(unfinished, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoint_to_resume(run: str | Path) -> str:
    """
    The [`newest_checkpoint`] of a run.

    Raises:
        `ValueError`: if there is none.
    """
    if (newest := newest_checkpoint(run)) is not None:
        return newest
    for folder in _checkpoints(run).values():
        if not (folder / FILES_NAME).exists():
            raise ValueError(
                f"{folder} has no {FILES_NAME}, as those of an earlier version or a plain Trainer, so nothing says "
                "whether it is whole; start a new run, or in Python pass its path to "
                "trainer.train(resume_from_checkpoint=...)."
            )
    raise ValueError(f"{run} has no whole checkpoint to resume from; start a new run.")


def newest_checkpoint(run: str | Path) -> str | None:
    """
    Of the checkpoints in the folder of a run that are whole, the one with most steps. One that was being deleted, or
    was not copied to its end, is not, nor one that another trainer wrote.
    """
    steps = {step: str(folder) for step, folder in _checkpoints(run).items() if _is_whole(folder)}
    return steps[max(steps)] if steps else None


def _checkpoints(run: str | Path) -> dict[int, Path]:
    """The checkpoints in the folder of a run by their steps, whole or not."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    folders = {folder.name.removeprefix(prefix): folder for folder in Path(run).glob(f"{prefix}*")}
    return {int(step): folder for step, folder in folders.items() if step.isdecimal()}


def _is_whole(folder: Path) -> bool:
    try:
        sizes = dict(json.loads((folder / FILES_NAME).read_text()))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def outlive_sigterm(begin: Callable[[int], None] | None, reader: int) -> None:
    """
    Begin a process that reads data. Schedulers and torchrun send SIGTERM to it too, and a run whose reader is killed
    fails within its step: so it goes on for as long as they usually let a run end.
    """
    # What is left of an alarm that is set already is kept.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(signal.alarm(0) or SECONDS_TO_END))
    if begin is not None:
        begin(reader)


class EndsWithCheckpoint(TrainerCallback):
    """
    Saves a checkpoint at the end of the step in which Ctrl-C or SIGTERM comes, or the data end or fail, and then stops
    the run: with `KeyboardInterrupt`, `SystemExit` or the error of the data. A second Ctrl-C stops it at once.
    Without checkpoints, by `save_strategy="no"`, it does nothing.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Through which ranks agree on the step.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        # Why the run stops before its end.
        self.reason: BaseException | None = None
        self._saved = -1
        self._handlers: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        # A run that is resumed has its checkpoint.
        self.reason, self._saved = None, state.global_step
        self.restore_handlers()
        # Python gives signals to its main thread alone.
        if args.save_strategy != SaveStrategy.NO and current_thread() is main_thread():
            self._handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
            for each in self._handlers:
                signal.signal(each, self._note)

    def restore_handlers(self) -> None:
        """Give signals back to who had them before the run."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def data_failed(self, args: TrainingArguments, error: Exception | None) -> bool:
        """Whether the data of this process or of another have failed, which all of them have to ask at once."""
        self.reason = error or self.reason
        fails = error is not None
        if self.accelerator.num_processes > 1 and args.save_strategy != SaveStrategy.NO:
            fails = self._any(args, fails)
            if fails and error is None:
                self.reason = RuntimeError("the data of another process failed, which says why.")
        return fails

    def _any(self, args: TrainingArguments, is_true: bool) -> bool:
        """Whether something is true in any process."""
        return bool(self.accelerator.reduce(torch.tensor(int(is_true), device=args.device), "sum"))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or (KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        # SIGTERM comes twice where a scheduler sends it to all, and torchrun passes its own on.
        signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])

    def agreed(self, args: TrainingArguments) -> BaseException | None:
        """Why the run is to stop, if it is. All processes have to ask at once: a signal may have found one of them."""
        stops = self.reason is not None
        if self.accelerator.num_processes > 1 and args.save_strategy != SaveStrategy.NO:
            stops = self._any(args, stops)
        return (self.reason or SystemExit(128 + signal.SIGTERM)) if stops else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.agreed(args) is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if not control.should_training_stop:
            return
        reason = self.agreed(args)
        ends_early = args.save_strategy == SaveStrategy.STEPS and state.global_step < state.max_steps
        if (reason is not None or ends_early) and self._saved < state.global_step:
            control.should_save = True
        elif reason is not None:
            raise reason

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._saved = state.global_step
        if (reason := self.agreed(args)) is not None:
            logger.warning(f"stopped after step {state.global_step} of {state.max_steps}; resume from its checkpoint.")
            raise reason
