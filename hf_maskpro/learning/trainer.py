"""Trains a mask adapter: a `Trainer` that asks its estimator."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.hooks import RemovableHandle
from transformers import ProgressCallback, Trainer, TrainerState, default_data_collator
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput, has_length, rotate_checkpoints

from ..tuner import MaskProConfig, check_calls, saved_config
from ..tuner.card import CARD_FILES, PLOT, load_card, save_card
from ..tuner.files import json_object, one_line, private_folder
from .adapter import TrainedAdapter
from .arguments import ESTIMATORS, MaskProTrainingArguments
from .checkpoints import (
    UNFINISHED,
    EndsWithCheckpoint,
    checkpoint_to_resume,
    discard,
    outlive_sigterm,
    place_checkpoint,
)
from .dataset import Repeated, check_predicts_text, dataset_by_name, rows_of
from .objectives import LossBySpans, language_modeling_by_spans, objective_weights, ranks_of_loss
from .progress import MaskProgress
from .record import add_to_card, card_path, objective_name, plot_run, record_training


# In a checkpoint, how many updates were not finite.
SKIPPED_NAME = "skipped.json"


class MaskProTrainer(Trainer):
    """
    A `Trainer` that learns the mask of a model's active [`MaskProConfig`] adapter, by the estimator that its arguments
    name.

    Its checkpoints hold the logits exactly and the estimator's state, so that a resumed run ends with the same bits.
    Logged beside the usual: `changed`, the share of groups whose mask has left the start, and `skipped`, the updates
    that were not made because they were not finite. The estimator adds `flipped`, the share of groups that a sample
    changes against the start, and `residual` its `residual` and `tracker`. `loss` is the objective of the masks it
    trains with. Evaluation uses the mode, and the language-model loss.

    Args:
        model ([`~peft.PeftModel`]): A model with a mask adapter.
        args ([`MaskProTrainingArguments`]): The arguments of the run.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset`, `list[dict]` or `str`, *optional*):
            Rows with a text in the column `text` or a conversation in the column `messages`. They are tokenised, by
            the tokenizer's chat template, and packed into windows of `args.max_length` tokens. Each begins with the
            start token, where the tokenizer adds one. A stream is tokenised as it is read. Rows with arguments of the
            model's forward, as `input_ids` and `labels`, are left as they are. Or a folder or Hub id, NAME or
            NAME:CONFIG, of whose split `train` the rows are streamed.
        eval_dataset (*optional*):
            Such rows, or a dictionary of such datasets by name.
        processing_class (`PreTrainedTokenizerBase`, *optional*): The tokenizer.
        data_collator (`Callable`, *optional*):
            Makes a batch of rows. Without a `processing_class` it is given the rows as they are, whatever they hold.
        reward_fn (`Callable[[nn.Module, dict], torch.Tensor]`, *optional*):
            What `estimator="residual"` raises in place of lowering a loss: a number for each example, of any floating
            dtype, `[examples]`; higher is better. It is given the model under a mask and a batch, as the collator made
            it. It needs no gradient, so it may generate, compare or ask somebody else. It is called twice a
            batch, under a sampled and under the starting mask, and once more in the first where groups are chosen. It
            takes the memory of the masked weights.
        kwargs: As for `Trainer`.

    Raises:
        `ValueError`: if the model has no mask adapter, its adapter cannot be trained by the estimator, or a dataset
            has neither text nor what the model's forward takes. From `train`, if the model uses the weight of a masked
            layer without calling it.
        `FloatingPointError`: from `train`, if several updates in a row are not finite.
    """

    args: MaskProTrainingArguments
    optimizer: Any
    train_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        args: MaskProTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        reward_fn: Callable[[nn.Module, dict[str, Any]], torch.Tensor] | None = None,
        **kwargs: Any,
    ):
        self.adapter = TrainedAdapter.of(model)
        if reward_fn is not None and (args.estimator, args.objective) != ("residual", "language-modeling"):
            raise ValueError(
                f"reward_fn is for estimator='residual' with its objective in place of another, not for "
                f"{args.estimator!r} and {args.objective!r}; the others need the gradient of a loss."
            )
        self.reward_fn = reward_fn
        if isinstance(train_dataset, dict):
            raise ValueError(f"train_dataset has the splits {', '.join(train_dataset)}; choose one of them.")
        for name in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            if isinstance(name, str):
                raise ValueError(f"eval_dataset is {name!r}; load it, since a stream may not end.")
        if isinstance(train_dataset, str):
            train_dataset = dataset_by_name(train_dataset)
        if args.load_best_model_at_end and not isinstance(model, PeftModel):
            raise ValueError(
                "load_best_model_at_end=True needs a PeftModel, which a Trainer reads adapters into; make the adapter "
                "by get_peft_model, not by add_adapter."
            )
        if processing_class is not None or data_collator is None:
            read = partial(rows_of, model=model, tokenizer=processing_class, max_length=args.max_length)
            rows, eval_rows = read(train_dataset), read(eval_dataset)
            # Windows need no padding, and not every tokenizer has a token for it.
            if data_collator is None and (rows is not train_dataset or eval_rows is not eval_dataset):
                check_predicts_text(model)
                data_collator = default_data_collator
            train_dataset, eval_dataset = rows, eval_rows
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError("fp16 scales gradients, which moves the logits by the scale; use bf16.")
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed partitions the logits, which masks need whole; train without it.")
        if args.fsdp or self.is_fsdp_enabled:
            self._check_fsdp()
        weights = objective_weights(args.objective)
        # Language modelling alone chooses when a run begins; `None` is what a Trainer has.
        self.loss_by_spans: LossBySpans | None = None
        self._distills = "distillation" in weights
        if self._distills:
            if reason := self._why_not_by_spans():
                raise ValueError(f"objective='distillation' {reason}.")
            self.loss_by_spans = LossBySpans(model, weights, args.distillation_temperature)
        self._unfinished = ""
        self._is_checked = False
        self._ending = EndsWithCheckpoint(self.accelerator)
        self.add_callback(self._ending)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(MaskProgress)
        self._given_optimizer = self.optimizer
        self._hooks: list[RemovableHandle] = []
        self.estimator = ESTIMATORS[args.estimator](self, self.adapter)
        self.estimator.check()

    def _check_fsdp(self) -> None:
        if not self.is_fsdp_enabled:
            raise ValueError("accelerate ignores fsdp on CPUs; drop fsdp, or drop use_cpu where there are GPUs.")
        plugin = self.accelerator.state.fsdp_plugin
        for wrong, reason in (
            (plugin.fsdp_version != 2, "version 1 splits within groups of logits; set version to 2"),
            (
                "FULL" not in str(plugin.state_dict_type),
                "an adapter is saved whole; set state_dict_type to FULL_STATE_DICT",
            ),
            (
                plugin.cpu_ram_efficient_loading,
                "starting masks are buffers, which cpu_ram_efficient_loading loses; drop it",
            ),
            (
                self.accelerator.mixed_precision != "no",
                "masks would be drawn from rounded logits; load the model in bfloat16 instead of bf16=True",
            ),
        ):
            if wrong:
                raise ValueError(f"fsdp: {reason}.")

    def _why_not_by_spans(self) -> str | None:
        if self.compute_loss_func is not None or self.label_smoother is not None:
            return "is a loss; drop compute_loss_func and label_smoothing_factor"
        if self.args.n_gpu > 1:
            return (
                f"runs in one process a GPU, and this one has {self.args.n_gpu}; start it with torchrun or accelerate "
                "launch, or show it one GPU by CUDA_VISIBLE_DEVICES"
            )
        if self.is_fsdp_enabled:
            return "runs the head by itself, which FSDP has split; drop fsdp"
        return None

    @property
    def config(self) -> MaskProConfig:
        """The adapter's configuration."""
        return self.adapter.config

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint_to_resume(str(self.args.output_dir))
        if resume_from_checkpoint:
            if not isinstance(self.model, PeftModel):
                raise ValueError(
                    "a checkpoint is read into a PeftModel; make the adapter by get_peft_model, not by add_adapter."
                )
            _check_state(Path(resume_from_checkpoint, TRAINER_STATE_NAME))
        if not self._distills:
            # Either replaces the forward that the head of a span is a part of.
            replaced = self.args.torch_compile or self.args.use_liger_kernel
            self.loss_by_spans = None
            if not replaced and self._why_not_by_spans() is None:
                with self.accelerator.autocast():
                    self.loss_by_spans = language_modeling_by_spans(self.model)
        # What an earlier run of this trainer left behind is not this run's.
        self._is_checked = False
        self.estimator = ESTIMATORS[self.args.estimator](self, self.adapter)
        self.optimizer = self._given_optimizer
        if self.is_fsdp_enabled:
            for theta in self.adapter.thetas():
                # FSDP takes no other layout.
                theta.data = theta.data.contiguous()
        self.estimator.begin()
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset) and not has_length(dataset):
            several = self.accelerator.num_processes > 1
            self.train_dataset = Repeated(dataset, several and self.args.save_strategy != SaveStrategy.NO)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            # A Trainer says so of a run that has succeeded alone.
            self.is_in_train = False
            self.train_dataset = dataset
            self._ending.restore_handlers()
            # Another run over these logits may be another trainer's.
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
        if (reason := self._ending.agreed(self.args)) is not None:
            # It came after the last step, which has its checkpoint.
            raise reason
        self._record()
        # In train mode every call would draw another mask, of a model that is there to be used now.
        self.model.eval()
        if self.is_world_process_zero() and find_spec("matplotlib") is not None:
            plot_run(self.state, Path(self.args.output_dir) / PLOT)
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.config.logit_scale is None:
            self.config.logit_scale = self.estimator.logit_scale
        if self.optimizer is None:
            self.optimizer = self.estimator.optimizer(partial(super().create_optimizer, model))
        # A run that is tried again with smaller batches has them already.
        if not self._hooks:
            self._hooks = self.estimator.watch(self.optimizer)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        return self.estimator.train_dataloader(super().get_train_dataloader)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        dataloader: Any = super()._get_dataloader(*args, **kwargs)
        loader = dataloader.base_dataloader
        loader.worker_init_fn = partial(outlive_sigterm, loader.worker_init_fn)
        return dataloader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        batches: list[Any] = []
        error = None
        stream = self.train_dataset if isinstance(self.train_dataset, Repeated) else None
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except Exception as failed:
            # Others wait for what one reads for all, and would not hear what it asks them.
            is_awaited = stream and stream.ends_on_error and self.accelerator.dispatch_batches is not False
            if self.args.save_strategy == SaveStrategy.NO or is_awaited:
                raise
            error = failed
        # Between two steps nothing is half done.
        if self._ending.data_failed(self.args, error or (stream.error if stream else None)):
            self.control.should_training_stop = True
            return [], None
        if stream and not batches:
            warnings.warn(
                f"the data ended after step {self.state.global_step} of max_steps={self.state.max_steps}, and "
                "gave nothing when they were begun again; the run ends here.",
                stacklevel=2,
            )
            self.control.should_training_stop = True
        return super().get_batch_samples(iter(batches), num_batches, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        return self.estimator.training_step(super().training_step, model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if not (self._is_checked or return_outputs):
            # Before the first step, since a model may use weights in train mode alone without calling their layers.
            look = partial(self.compute_loss, model, dict(inputs), num_items_in_batch=num_items_in_batch)
            # The look is itself a loss that is computed.
            self._is_checked = True
            try:
                check_calls(self.model, look)
            except BaseException:
                self._is_checked = False
                raise
        # A model may make its labels itself, or go by others.
        own = not self._distills and ("labels" not in inputs or "shift_labels" in inputs)
        # Evaluation asks for outputs, too; its loss is the language model's whatever is minimised.
        if self.loss_by_spans is None or own or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The head runs by itself, out of reach of what accelerate has put around the model's forward.
        with self.accelerator.autocast():
            loss = self.loss_by_spans.sequence_losses(model, inputs).sum()
        if not self.model_accepts_loss_kwargs or num_items_in_batch is None:
            return loss / (inputs["labels"][:, 1:] != -100).sum()
        return loss * ranks_of_loss(self) / num_items_in_batch

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.estimator.settle()
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        # In eval mode every layer would keep its masked weight: that serves generation, and takes memory here.
        with self.adapter.masks(self.adapter.mode):
            return super().prediction_step(*args, **kwargs)

    def changed_groups(self) -> float:
        """Share of all groups whose mode has left the initial mask."""
        self.estimator.settle()
        return self.adapter.changed_groups()

    def flipped_groups(self) -> float:
        """Share of all groups that one sample changes against the initial mask."""
        return self.estimator.flipped_groups()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.estimator.metrics()
            logs["changed"] = self.changed_groups()
            if self.estimator.skipped:
                logs["skipped"] = self.estimator.skipped
        super().log(logs, start_time)

    def _record(self) -> None:
        self.estimator.settle()
        # Which is smaller where auto_find_batch_size has found that it has to be.
        batch = self._train_batch_size
        record_training(self.config, self.args, batch, self.state.global_step, self.estimator.settings())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._record()
        folder = output_dir or str(self.args.output_dir)
        if not self.args.should_save:
            super()._save(folder, state_dict)
            return
        # The adapter, which PEFT saves whole, comes with its tokenizer and arguments.
        cards = [card_path("", name).with_name(file) for name in self.model.peft_config for file in CARD_FILES]
        with private_folder(folder, *map(str, cards)) as new:
            super()._save(str(new), state_dict)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the card that saving the adapter wrote, where a `Trainer` would put a draft in its place."""
        if not self.is_world_process_zero():
            return
        path = card_path(self.args.output_dir, self.adapter.name)
        if not path.is_file():
            self.save_model(_internal_call=True)
        add_to_card(path, self.args, self.hub_model_id, tags, language=language, license=license, datasets=dataset)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            path = card_path(self.args.output_dir, self.adapter.name)
            save_card(load_card(card_path(checkpoint_folder, self.adapter.name)), path)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # What has parted would be resumed as it is.
        self.estimator.check_processes(self.state.global_step)
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = run / UNFINISHED
        if self.args.should_save:
            # A process that was killed may have left some of its last.
            discard(unfinished)
        self.accelerator.wait_for_everyone()
        save_logits, self.config.save_logits = self.config.save_logits, True
        # What is pushed lies where it stays.
        push, self.args.push_to_hub = self.args.push_to_hub, False
        self._unfinished = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / folder.name / TRAINER_STATE_NAME))
                place_checkpoint(unfinished / folder.name, folder)
        except BaseException as error:
            if self.args.should_save:
                discard(unfinished)
            # Of a full disk torch says no more than that a stream failed.
            if isinstance(error, RuntimeError | SafetensorError):
                raise OSError(
                    f"{folder} could not be written: {error}; look for room on that disk, and resume from the "
                    "checkpoint before."
                ) from error
            raise
        finally:
            self._unfinished = ""
            self.config.save_logits, self.args.push_to_hub = save_logits, push
        # Where one ends, its launcher stops the others.
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Where PEFT saves the adapter, and so its card.
        saved = saved_config(card_path(resume_from_checkpoint, self.adapter.name).parent)
        learner = saved.start.get("training", {}).get("estimator", self.args.estimator)
        if learner != self.args.estimator:
            raise ValueError(
                f"{resume_from_checkpoint} is not a checkpoint of estimator={self.args.estimator!r}, but of "
                f"{learner!r}; start a new run from it."
            )
        settings = {"objective": objective_name(self.args)} | self.estimator.settings()
        for name in ("objective", "optimizer"):
            mine, theirs = settings.get(name), saved.start.get("training", {}).get(name)
            if theirs not in (None, mine):
                raise ValueError(
                    f"{resume_from_checkpoint} has the {name} {one_line(theirs)}, and this run {mine}; resume with "
                    "the same, or start a new run from it."
                )
        for name in ("n", "m", "logit_scale"):
            mine, theirs = getattr(self.config, name), getattr(saved, name)
            if mine not in (None, theirs):
                raise ValueError(f"{name} is {mine}, and {theirs} in {resume_from_checkpoint}; resume with the same.")
        self.config.resume(saved)
        # A mask that is no loaded adapter's may not even be there.
        loaded = self.adapter.layers if self.config.awaits_file else []
        masks = [layer.packed_initial_mask(self.adapter.name).clone() for layer in loaded]
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except ValueError as error:
            if str(resume_from_checkpoint) in str(error):
                raise
            raise ValueError(f"{resume_from_checkpoint}: {error}") from error
        for layer, mask in zip(loaded, masks, strict=True):
            if not torch.equal(layer.packed_initial_mask(self.adapter.name), mask):
                raise ValueError(
                    f"{resume_from_checkpoint} was begun from another mask than that of the adapter; "
                    "resume with the adapter that it was begun from."
                )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.args.save_only_model:
            self.estimator.load(Path(str(self.state.best_model_checkpoint)))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from its last checkpoint, a Trainer would take one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            # A stream has epochs without end.
            self.control.should_training_stop = True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.estimator.save(Path(output_dir))
            Path(output_dir, SKIPPED_NAME).write_text(json.dumps(self.estimator.skipped))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled and checkpoint is not None and not self.estimator.has_optimizer_state:
            # torch gives the state of an optimizer to sharded parameters only where there is some.
            schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.estimator.load(Path(checkpoint))
            # A plain trainer counts none.
            if (skipped := Path(checkpoint, SKIPPED_NAME)).is_file():
                self.estimator.skipped = _count_in(skipped)


def _check_state(path: Path) -> None:
    """Refuse the state of a run that transformers would stumble over, without a word about the file."""
    known = json_object(path)
    try:
        step = TrainerState(**known).global_step
    except TypeError as error:
        raise ValueError(f"{path} is no state of a run: {error}; resume from an earlier checkpoint.") from error
    # Of another number the run would go on elsewhere; without one it would begin again.
    named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.parent.name)
    if not isinstance(known.get("log_history", []), list):
        raise ValueError(f"{path} has a log_history that is no list; resume from an earlier checkpoint.")
    if type(step) is not int or step < 1 or (named and step != int(named[1])):
        raise ValueError(f"{path} has the global_step {step!r}; resume from an earlier checkpoint.")


def _count_in(path: Path) -> int:
    text = path.read_bytes()
    if not re.fullmatch(rb"0|[1-9][0-9]{0,17}", text):
        raise ValueError(
            f"{path} holds {text[:50]!r}, which is no count of updates; resume from an earlier checkpoint."
        )
    return int(text)
