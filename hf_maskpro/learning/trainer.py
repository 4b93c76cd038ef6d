"""Trains a mask adapter: the `residual` estimator of the MaskPro paper, or `simple` by backward."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from math import exp, sqrt
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    DefaultDataCollator,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import SchedulerType, TrainOutput
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..tuner import MaskProConfig, MaskProLayer, masked_layers
from ..tuner.card import CARD_FILE, PLOT, card_for_repository, load_card, save_card


logger = logging.get_logger(__name__)

RESIDUAL_LOGIT_SCALE, SIMPLE_LOGIT_SCALE = 10.0, 6.0
STATE_NAME = "residual_state.json"


@dataclass
class MaskProTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with an estimator, and with defaults that suit logits rather than weights.

    Args:
        estimator (`str`, defaults to `"residual"`):
            `"residual"`: the policy gradient of MaskPro (arXiv 2506.12876), forward passes alone. `"simple"`: a
            backward pass through the exact marginals (Ahmed et al., ICLR 2023); far fewer steps.
        tracker_decay (`float`, defaults to 0.99):
            `alpha` of the moving average that `residual` subtracts from the loss residual.
        baseline (`str`, defaults to `"auto"`):
            Where `residual` takes the loss of the initial mask from: `"step"` computes it with every batch,
            `"cache"` once per example before training, which needs map-style data, a deterministic collator and the
            model's own causal loss. `"auto"` is the cheaper of those that are sound.
        modules_to_save_learning_rate (`float`, defaults to 5e-5):
            Learning rate of `MaskProConfig.modules_to_save`, a parameter group of their own.
        learning_rate (`float`, *optional*):
            Default 50 for `residual` (the paper's). For `simple` 0.2 in a run of 120 steps; in shorter ones more, in
            longer ones less, by the square root of the ratio: in few steps each must be larger for a logit to cross
            `logit_scale`, in many the noise of each adds up.
        lr_scheduler_type (`str`, *optional*):
            Default `"constant"` for `residual`; for `simple` 10 warm-up steps and a linear decay to a tenth.
        warmup_steps (`float`, *optional*):
            Default 0 for `residual`; for `simple` 10, or a fifth of `max_steps` below 50.
        adam_beta2 (`float`, *optional*):
            Default 0.98: gradients of logits change quickly. `residual` has no optimizer state.
        max_grad_norm (`float`, defaults to 0):
            No clipping: Adam scales every logit's step by itself, `residual` has no gradient.
    """

    estimator: Literal["residual", "simple"] = field(default="residual", metadata={"help": "Who moves the logits."})
    tracker_decay: float = field(default=0.99, metadata={"help": "Decay of the residual's moving average."})
    baseline: Literal["auto", "step", "cache"] = field(
        default="auto", metadata={"help": "When `residual` computes the loss of the initial mask."}
    )
    modules_to_save_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of modules_to_save."})
    learning_rate: float | None = field(default=None, metadata={"help": "50 for `residual`, 0.2 for `simple`."})
    lr_scheduler_type: str | None = field(default=None, metadata={"help": "constant for `residual`, else linear."})
    warmup_steps: float | None = field(default=None, metadata={"help": "0 for `residual`, up to 10 for `simple`."})
    adam_beta2: float | None = field(default=None, metadata={"help": "0.98 unless given."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "No clipping unless given."})

    def __post_init__(self):
        for name, allowed in {"estimator": ("residual", "simple"), "baseline": ("auto", "step", "cache")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(repr, allowed))}.")
        if not 0 <= self.tracker_decay < 1:
            raise ValueError(f"tracker_decay is {self.tracker_decay}, outside 0 to 1; 0.99 is usual.")
        simple = self.estimator == "simple"
        if self.learning_rate is None:
            # Of a run that is measured in epochs the number of steps is not known here.
            steps = self.max_steps if self.max_steps > 0 else 120
            self.learning_rate = 0.2 * sqrt(120 / steps) if simple else 50.0
        if self.warmup_steps is None:
            # In a short run the rest of the schedule needs steps, too.
            short = simple and 0 < self.max_steps < 50
            self.warmup_steps = self.max_steps // 5 if short else 10 if simple else 0
        if self.adam_beta2 is None:
            self.adam_beta2 = 0.98
        if self.lr_scheduler_type is None:
            self.lr_scheduler_type = "polynomial" if simple else "constant"
            if simple and not self.lr_scheduler_kwargs:  # type: ignore[has-type]
                self.lr_scheduler_kwargs = {"power": 1.0, "lr_end": self.learning_rate / 10}
        super().__post_init__()
        if not simple and max(self.world_size, self.n_gpu) > 1:
            raise ValueError(
                f"estimator='residual' runs in one process on one device, not {max(self.world_size, self.n_gpu)}: "
                "ranks with different masks would drift apart; use estimator='simple'."
            )


class MaskProTrainer(Trainer):
    """
    A `Trainer` that learns the mask of a model's active [`MaskProConfig`] adapter.

    With `estimator="simple"` it trains by backward, as any `Trainer` would, with defaults that suit. With
    `"residual"` it never builds an autograd graph: every optimiser step samples one mask, and moves the logits by

    `l <- l - lr * (g - delta) * score(m_t)`, where `g = f(m_t) - f(m_0)` is the loss residual of the sampled against
    the initial mask on the same batch, and `delta` its moving average (arXiv 2506.12876).

    Its checkpoints hold the logits exactly, so that a resumed run ends with the same bits. Logged beside the usual:
    `flipped`, the share of groups that a sample changes against the initial mask, `changed`, the share whose mode has
    left it, and for `residual` the `residual` and its `tracker`; `loss` is that of sampled masks. Evaluation uses the
    mode.

    Args:
        model ([`~peft.PeftModel`]): A model with a mask adapter.
        args ([`MaskProTrainingArguments`]): The arguments of the run.
        kwargs: As for `Trainer`.

    Raises:
        `ValueError`: if the model has no mask adapter, or its adapter cannot be trained by the estimator.
    """

    args: MaskProTrainingArguments
    train_dataset: Any
    data_collator: Any

    def __init__(self, model: nn.Module, args: MaskProTrainingArguments, **kwargs: Any):
        self.adapter_name, self.config, self.layers = _trained_adapter(model)
        if args.estimator == "residual":
            thetas = {id(theta) for theta in self._thetas()}
            others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in thetas]
            if others:
                raise ValueError(
                    f"estimator='residual' trains nothing but masks, and {others[0]} requires grad; "
                    "drop modules_to_save or use estimator='simple'."
                )
            if kwargs.get("optimizers", (None, None))[0] is not None:
                raise ValueError("estimator='residual' has no optimizer; drop optimizers.")
        super().__init__(model=model, args=args, **kwargs)
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError("fp16 scales gradients, which moves the logits by the scale; use bf16.")
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed partitions the logits, which masks need whole; train without it.")
        if args.baseline == "cache" and not self._cache_is_sound():
            raise ValueError(
                "baseline='cache' needs map-style data, a deterministic collator and the model's own causal loss; "
                "use baseline='step'."
            )
        self.tracker = 0.0
        self._seed = -1
        self._residual = torch.zeros(())
        self._history: dict[str, list[float]] = {"residual": [], "tracker": []}
        self._baselines: torch.Tensor | None = None

    @property
    def _card_file(self) -> str:
        """Where PEFT saves the adapter, and so its card: all but `"default"` in a folder of their own."""
        return CARD_FILE if self.adapter_name == "default" else f"{self.adapter_name}/{CARD_FILE}"

    def _thetas(self) -> list[nn.Parameter]:
        return [layer.maskpro_theta[self.adapter_name] for layer in self.layers]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.config.logit_scale is None:
            simple = self.args.estimator == "simple"
            self.config.logit_scale = SIMPLE_LOGIT_SCALE if simple else RESIDUAL_LOGIT_SCALE
        if self.args.estimator == "residual":
            # Nothing has a gradient, so this steps nothing: it holds the learning rate for the schedule.
            assert self.args.learning_rate is not None
            self.optimizer = torch.optim.SGD(self._thetas(), lr=self.args.learning_rate)
            return self.optimizer
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        thetas = {id(theta) for theta in self._thetas()}
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for is_theta in (True, False):
            for group in groups:
                params = [p for p in group["params"] if (id(p) in thetas) == is_theta]
                if params:
                    rate = {} if is_theta else {"lr": self.args.modules_to_save_learning_rate}
                    optimizer.add_param_group({**group, "params": params, **rate})
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        if not self._uses_cache():
            return super().get_train_dataloader()
        dataset, collator = self.train_dataset, self.data_collator
        self.data_collator = _IndexedCollator(self._get_collator_with_removed_columns(collator))
        self.train_dataset = _Indexed(dataset)
        try:
            self._cache_baselines()
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _uses_cache(self) -> bool:
        args = self.args
        if args.estimator != "residual" or args.baseline == "step" or not self._cache_is_sound():
            return False
        examples = len(self.train_dataset)
        per_step = self._train_batch_size * args.gradient_accumulation_steps
        trained = per_step * args.max_steps if args.max_steps > 0 else examples * args.num_train_epochs
        return args.baseline == "cache" or examples < trained

    def _cache_is_sound(self) -> bool:
        """Whether an example's loss under the initial mask is the same in whatever batch, at whatever step."""
        collator, base = self.data_collator, self.accelerator.unwrap_model(self.model)
        if isinstance(base, PeftModel):
            base = base.get_base_model()
        deterministic = (
            collator is default_data_collator
            or isinstance(collator, (DataCollatorWithPadding, DataCollatorForSeq2Seq, DefaultDataCollator))
            or (isinstance(collator, DataCollatorForLanguageModeling) and not collator.mlm)
        )
        own_loss = (
            isinstance(base, PreTrainedModel)
            and self.model_accepts_loss_kwargs
            and base.loss_function is ForCausalLMLoss
            and not base.config.to_dict().get("output_router_logits")
            and self.compute_loss_func is None
            and self.label_smoother is None
            and type(self).compute_loss is Trainer.compute_loss
        )
        map_style = self.train_dataset is not None and not isinstance(self.train_dataset, IterableDataset)
        return (
            deterministic and own_loss and map_style and self.args.train_sampling_strategy in ("random", "sequential")
        )

    def _cache_baselines(self) -> None:
        """Summed loss of every example under the initial mask, in one pass."""
        assert isinstance(self.train_dataset, _Indexed)
        # With a generator of its own: a draw from torch's would change the run.
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
        )
        self._baselines = torch.zeros(len(self.train_dataset), dtype=torch.float64)
        self.model.eval()
        for inputs in tqdm(loader, desc="baseline loss", disable=self.args.disable_tqdm):
            index = inputs.pop(_INDEX)
            inputs = self._prepare_inputs(inputs)
            labels = F.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]
            with torch.no_grad(), self._masks(self._initial), self.accelerator.autocast():
                logits = self.model(**inputs).logits.float()
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            self._baselines[index.cpu()] = losses.sum(1).double().cpu()

    @contextmanager
    def _masks(self, choose: Callable[[int, MaskProLayer, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Mask every layer's weight by what `choose` makes of it, and keep nothing; the rest stays in eval mode."""
        for index, layer in enumerate(self.layers):
            layer.train()
            layer.choose_mask = partial(choose, index, layer)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.choose_mask = None
                layer.eval()

    def _initial(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        return layer.initially_masked(weight, self.adapter_name)

    def _sampled(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        """By the mask of this optimiser step, which is drawn again wherever it is needed."""
        return layer.masked(weight, self.adapter_name, self._seed, index, self.config.distribution)

    def _mode(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        return layer.masked(weight, self.adapter_name)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        # In eval mode every layer would keep its masked weight: that serves generation, and takes memory here.
        with self._masks(self._mode):
            return super().prediction_step(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.args.estimator == "simple":
            return super().training_step(model, inputs, num_items_in_batch)
        # Dropout would put other noise into the two losses than the mask.
        model.eval()
        if self._seed < 0:
            # torch's own generator, whose state a checkpoint keeps.
            self._seed = int(torch.randint(2**63 - 1, ()))
            self._residual = torch.zeros((), device=self.args.device)
        index = inputs.pop(_INDEX, None)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            with self._masks(self._sampled):
                loss = self._micro_batch_loss(model, inputs, num_items_in_batch)
            if index is None:
                with self._masks(self._initial):
                    baseline = self._micro_batch_loss(model, inputs, num_items_in_batch)
            else:
                assert self._baselines is not None
                assert num_items_in_batch is not None
                baseline = (self._baselines[index.cpu()].sum() / float(num_items_in_batch)).to(loss)
        self._residual += loss - baseline
        if self.accelerator.sync_gradients:
            self._move_logits(self._residual.item())
            self._seed = -1
        return loss

    def _micro_batch_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The micro-batch's share of the loss of the whole batch: shares add up to it."""
        loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        scaled = self.compute_loss_func is not None or (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        )
        return loss.detach() if scaled else loss.detach() / self.current_gradient_accumulation_steps

    @torch.no_grad()
    def _move_logits(self, residual: float) -> None:
        """`l <- l - lr * (g - delta) * score(m_t)`."""
        alpha = self.args.tracker_decay
        self.tracker = alpha * self.tracker + (1 - alpha) * residual
        step = -self._get_learning_rate() * (residual - self.tracker)
        for index, layer in enumerate(self.layers):
            layer.move_logits(self.adapter_name, step, self._seed, index, self.config.distribution)
        self._history["residual"].append(residual)
        self._history["tracker"].append(self.tracker)

    def changed_groups(self) -> float:
        """Share of all groups whose mode has left the initial mask."""
        return self._share_that_differs(lambda index, layer: layer.mode_codes(self.adapter_name))

    def flipped_groups(self) -> float:
        """Share of all groups that one sample changes against the initial mask."""
        simple = self.args.estimator == "simple"
        distribution = "conditional_poisson" if simple else self.config.distribution
        # Seeded by the step: a draw from torch's generator would change the run.
        seed = self.state.global_step
        return self._share_that_differs(lambda i, layer: layer.sampled_codes(self.adapter_name, seed, i, distribution))

    def _share_that_differs(self, choose: Callable[[int, MaskProLayer], torch.Tensor]) -> float:
        differ, groups = torch.zeros((), dtype=torch.int64, device=self.args.device), 0
        for index, layer in enumerate(self.layers):
            codes = choose(index, layer)
            differ += (codes != layer.initial_codes(self.adapter_name)).sum().to(differ.device)
            groups += codes.numel()
        return differ.item() / groups

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._history.items() if values}
            logs["flipped"] = self.flipped_groups()
            self._history = {name: [] for name in self._history}
            logs["changed"] = self.changed_groups()
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.args.estimator == "residual":
            scale = RESIDUAL_LOGIT_SCALE if self.config.logit_scale is None else self.config.logit_scale
            n, m = self.config.n, self.config.m
            factor = sum(1 / k for k in range(1, n + 1)) if self.config.distribution == "plackett_luce" else n
            share = min(1, (m - n) * factor * exp(-scale))
            groups = sum(theta.shape[0] * theta.shape[2] for theta in self._thetas())
            logger.warning(
                f"residual: a sample changes about {share * groups:,.3g} of {groups:,} groups, so the average one is "
                f"tried once in {1 / share:,.0f} steps; plan for that many forward passes or more (the paper runs "
                "10,000 steps). Where a backward pass fits, estimator='simple' needs a few hundred."
            )
        output = super().train(*args, **kwargs)
        self._record_training()
        if self.is_world_process_zero() and find_spec("matplotlib") is not None:
            plot_run(self.state.log_history, Path(self.args.output_dir) / PLOT)
        return output

    def _record_training(self) -> None:
        """Note in the adapter how its mask is learned."""
        args, residual = self.args, self.args.estimator == "residual"
        own = {
            "tracker_decay": args.tracker_decay,
            "baseline": args.baseline,
            "distribution": self.config.distribution,
        }
        self.config.start["training"] = self.config.start.get("training", {}) | {
            "estimator": args.estimator,
            "steps": self.state.global_step,
            "sequences_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "schedule": SchedulerType(args.lr_scheduler_type).value,
            "warmup_steps": args.warmup_steps,
            "logit_scale": self.config.logit_scale,
            "seed": args.seed,
            **(own if residual else {"optimizer": OptimizerNames(args.optim).value}),
        }

    def _save(self, *args: Any, **kwargs: Any) -> None:
        self._record_training()
        super()._save(*args, **kwargs)

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
        path = Path(self.args.output_dir) / self._card_file
        if not path.is_file():
            self.save_model(_internal_call=True)
        card = load_card(path)
        for name, value in {"language": language, "license": license, "datasets": dataset}.items():
            if value is not None:
                card.data[name] = value
        more = [tags] if isinstance(tags, str) else tags or []
        card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *more]))
        if self.hub_model_id is not None:
            api = HfApi(token=self.args.hub_token)
            card = card_for_repository(card, api, self.hub_model_id, self._card_file, self.args.hub_revision)
        save_card(card, path)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / self._card_file
            path.parent.mkdir(exist_ok=True)
            shutil.copy(Path(checkpoint_folder) / self._card_file, path)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        save_logits, self.config.save_logits = self.config.save_logits, True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.config.save_logits = save_logits

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = MaskProConfig.from_pretrained(resume_from_checkpoint)
        for name in ("n", "m", "logit_scale"):
            mine, theirs = getattr(self.config, name), getattr(saved, name)
            if mine not in (None, theirs):
                raise ValueError(f"{name} is {mine}, and {theirs} in {resume_from_checkpoint}; resume with the same.")
        self.config.logit_scale, self.config.start = saved.logit_scale, saved.start
        # A mask that is no loaded adapter's may not even be there.
        loaded = self.layers if self.config.awaits_file else []
        masks = [layer.packed_initial_mask(self.adapter_name).clone() for layer in loaded]
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for layer, mask in zip(loaded, masks, strict=True):
            if not torch.equal(layer.packed_initial_mask(self.adapter_name), mask):
                raise ValueError(
                    f"{resume_from_checkpoint} was begun from another mask than that of the adapter; "
                    "resume with the adapter that it was begun from."
                )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from its last checkpoint, a Trainer would take one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.estimator == "residual":
            (Path(output_dir) / STATE_NAME).write_text(json.dumps({"tracker": self.tracker}))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.estimator == "residual":
            state = Path(checkpoint) / STATE_NAME
            if not state.is_file():
                raise ValueError(f"{checkpoint} is not a checkpoint of estimator='residual'; start a new run from it.")
            self.tracker = json.loads(state.read_text())["tracker"]


def plot_run(history: list[dict[str, float]], path: Path) -> None:
    """Plot the loss of sampled masks, and the share of groups whose mode has left the start, against steps."""
    from matplotlib.figure import Figure

    logs = [entry for entry in history if "loss" in entry]
    if not logs:
        return
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in logs]
    axes.plot(steps, [entry["loss"] for entry in logs])
    axes.set(xlabel="step", ylabel="loss of sampled masks")
    changed = axes.twinx()
    changed.plot(steps, [100 * entry["changed"] for entry in logs], color="tab:orange")
    changed.set(ylabel="groups changed, %")
    figure.savefig(path, dpi=120)


_INDEX = "example_index"


class _Indexed(Dataset):
    """A map-style dataset whose items know their index."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class _IndexedCollator:
    """A collator that passes the indices of its examples on."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, items: list[tuple[int, Any]]) -> dict[str, Any]:
        batch = self.collator([item for _, item in items])
        return {**batch, _INDEX: torch.tensor([index for index, _ in items])}


def _trained_adapter(model: nn.Module) -> tuple[str, MaskProConfig, list[MaskProLayer]]:
    """The one active mask adapter of a model, its configuration and its layers in order."""
    adapters = {name for layer in model.modules() if isinstance(layer, MaskProLayer) for name in layer.active_adapters}
    if len(adapters) != 1:
        raise ValueError(
            f"the model has {len(adapters)} active mask adapters, and one is trained at a time; "
            "add one with get_peft_model, or choose one with set_adapter."
        )
    name = adapters.pop()
    layers = list(masked_layers(model, name).values())
    if not layers[0].maskpro_theta[name].requires_grad:
        raise ValueError(f"adapter {name!r} was loaded for inference; load it with is_trainable=True.")
    return name, layers[0].maskpro_config[name], layers
