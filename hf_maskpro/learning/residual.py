"""`residual`: the policy gradient of MaskPro (arXiv 2506.12876), by forward passes alone."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import exp, isfinite, sqrt
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from accelerate.utils import broadcast, gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..subset import Distribution
from ..subset.bits import hash_positions
from ..tuner import MaskProLayer
from ..tuner.base import plain
from ..tuner.layer import Groups, onloaded
from ..tuner.linear import MaskProLinear
from .adapter import MaskWeight, TrainedAdapter
from .estimator import Estimator, TrainingStep
from .objectives import ranks_of_loss, sequence_losses, share_of_loss


logger = logging.get_logger(__name__)

STATE_NAME = "residual_state.json"
# Batches whose loss is computed both ways before cached losses are trusted. The two may differ by a rounding of each
# token's, of random signs, and by what is left of that in float32; found was at most a tenth of either.
PROBES, LEAST_TOLERANCE = 4, 5e-5
# Deviations that a single residual may count for.
CLIP = 2.0
# Of a normal distribution the deviation is so many times the median distance from the median.
OF_MEDIAN = 1.4826
# Of a scaled advantage: groups that are explored, and by how much a starting mask's members lead.
EXPLORED, LOGIT_SCALE = 128, 3.0

_INDEX = "example_index"
# All that is told of an example's tokens; whether anything else in a batch is what it was, nothing tells.
_TOLD = {"input_ids", "attention_mask", "labels"}


@dataclass
class ResidualArguments:
    """
    The settings of `estimator="residual"`.

    Args:
        masks_per_step (`int`, defaults to 1):
            Masks that are sampled for a step in every process, each for its share of the micro-batches, whose number
            `gradient_accumulation_steps` it divides. The logits move by all of them, those of other processes
            included: `learning_rate` is of one mask.
        advantage (`str`, defaults to `"scaled"`):
            What a step is proportional to. `"scaled"`: the residual minus its running median, divided by its running
            deviation and clipped at 2, so that `learning_rate` is in logits a step, whatever the loss, the batch or
            the model. `"raw"`: the paper's, the residual minus its moving average.
        tracker_decay (`float`, *optional*):
            `alpha` of the moving average, 0.99 with the raw advantage as in the paper. The running median and
            deviation, which is by the median distance from the median, are of the last `1 / (1 - alpha)` residuals:
            25 with the default of the scaled advantage, 0.96.
        explored_groups (`int`, *optional*):
            How many groups are sampled and learned; all others keep the mode. They are those with most at stake: their
            share in `sum(W^2 x^2)` of the layer, `x` being the size of its inputs under the starting mask, in the
            first batch. Default 128 with the scaled advantage, and all with the raw one.
        baseline (`str`, defaults to `"auto"`):
            Where the loss of the initial mask comes from: `"step"` computes it with every batch, `"cache"` once per
            example before training. The latter is refused where an example's loss depends on its company or on when
            it is drawn, which a few batches tell, and left where an example has other tokens later. `"auto"` is the
            cheaper of those that are sound.
    """

    masks_per_step: int = field(default=1, metadata={"help": "Masks that `residual` samples for a step."})
    advantage: Literal["scaled", "raw"] = field(
        default="scaled", metadata={"help": "Whether `residual` divides by the residual's deviation."}
    )
    tracker_decay: float | None = field(default=None, metadata={"help": "Decay of the residual's moving average."})
    explored_groups: int | None = field(
        default=None, metadata={"help": "Groups that `residual` samples, those with most at stake."}
    )
    baseline: Literal["auto", "step", "cache"] = field(
        default="auto", metadata={"help": "When `residual` computes the loss of the initial mask."}
    )


class Residual(Estimator):
    """
    Samples one mask an optimizer step, and moves the logits by `l <- l - lr * a * score(m_t)`. The advantage `a` is
    `g - delta`, where `g = f(m_t) - f(m_0)` is the loss of the sampled mask minus that of the initial one on the same
    batch, and `delta` its moving average. Unless the raw one is asked for, `delta` is the median of the last
    residuals, and the advantage is divided by their deviation and clipped. Once in a while a mask breaks the model,
    and medians do not follow it. It never builds an autograd graph.

    The scaled advantage explores few groups, and often. What is learned of all together grows with the number of
    passes alone, and a swap where much is at stake can be worth more than all others.

    Several masks a step, of one process or of several, each have a part of the batch of their own, and move the
    logits by the sum of such terms. Processes tell each other nothing but the seed of every mask and its `g`: a mask
    is a function of its seed, and all of them move the logits alike. Tracker and deviation are of all of them.
    """

    Arguments = ResidualArguments
    has_optimizer_state = False

    @classmethod
    def defaults(cls, args: TrainingArguments) -> dict[str, Any]:
        if args.advantage not in ("scaled", "raw"):
            raise ValueError(f"advantage is {args.advantage!r}; use 'scaled' or 'raw'.")
        if args.baseline not in ("auto", "step", "cache"):
            raise ValueError(f"baseline is {args.baseline!r}; use one of 'auto', 'step', 'cache'.")
        if args.masks_per_step < 1 or args.gradient_accumulation_steps % args.masks_per_step:
            raise ValueError(
                f"masks_per_step is {args.masks_per_step}, and gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps}, not a multiple of it: every mask needs micro-batches of its own."
            )
        # At 0 the tracker is the residual itself, and nothing is left to learn from.
        if args.tracker_decay is not None and not 0 < args.tracker_decay < 1:
            raise ValueError(f"tracker_decay is {args.tracker_decay}, not between 0 and 1; 0.99 is usual.")
        if args.explored_groups is not None and args.explored_groups < 1:
            raise ValueError(f"explored_groups is {args.explored_groups}, not a positive number; 128 is usual.")
        if args.advantage == "raw":
            return {"learning_rate": 50.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "tracker_decay": 0.99}
        # A group that makes no difference walks at random, as far as the rate times the root of the steps. A rate that
        # falls with that root keeps it from getting further in a longer run, and one that falls within a run keeps it
        # from losing at last what the first few groups have won.
        steps = args.max_steps if args.max_steps > 0 else 1000
        rate = 0.57 * sqrt(100 / max(steps, 50))
        # The first residuals, with masks that break the model, are not long what others are judged by.
        schedule = {"learning_rate": rate, "lr_scheduler_type": "linear", "warmup_steps": 0}
        return schedule | {"tracker_decay": 0.96, "explored_groups": EXPLORED}

    def __init__(self, trainer: Trainer, adapter: TrainedAdapter):
        # The paper's scale goes with its advantage.
        self.logit_scale = 10.0 if trainer.args.advantage == "raw" else LOGIT_SCALE
        super().__init__(trainer, adapter)
        self.tracker = 0.0
        # The last ones, of which the scaled advantage takes median and deviation.
        self._residuals: deque[float] = deque(maxlen=round(1 / (1 - trainer.args.tracker_decay)))
        # Of every layer the groups that are sampled; of a layer that is not there, all. Nothing until they are chosen.
        self._explored: dict[int, Groups] | None = None
        # Of a step: what its masks' seeds are made of, the micro-batches so far, and for each mask its share in the
        # loss, minus that of the initial one, and a number that is 0 if there was nothing to predict.
        self._step_seed, self._micro_batches = 0, 0
        self._shares = torch.empty(0, 2)
        # Of the mask that the layers apply.
        self._seed = 0
        self._history: dict[str, list[float]] = {"residual": [], "tracker": []}
        # What [`_cached`] says of all examples.
        self._baselines: torch.Tensor | None = None
        self._tokens = torch.empty(0, 2, dtype=torch.int64)

    def check(self) -> None:
        args = self.trainer.args
        if args.n_gpu > 1:
            raise ValueError(
                f"estimator='residual' runs in one process a GPU, and this one has {args.n_gpu}; start it with "
                "torchrun or accelerate launch, or show it one GPU by CUDA_VISIBLE_DEVICES."
            )
        thetas = {id(theta) for theta in self.adapter.thetas()}
        parameters = self.trainer.model.named_parameters()
        others = [name for name, p in parameters if p.requires_grad and id(p) not in thetas]
        if others:
            raise ValueError(
                f"estimator='residual' trains nothing but masks, and {others[0]} requires grad; "
                "drop modules_to_save or use estimator='simple'."
            )
        if self.trainer.optimizer is not None:
            raise ValueError("estimator='residual' has no optimizer; drop optimizers.")
        if self.trainer.reward_fn is not None and args.baseline == "cache":
            raise ValueError("baseline='cache' is for losses of tokens, not for reward_fn; use baseline='step'.")
        if args.baseline == "cache" and not self._has_fixed_examples():
            raise ValueError(
                "baseline='cache' needs map-style data in the usual order, and no FSDP; use baseline='step'."
            )

    def begin(self) -> None:
        accelerator = self.trainer.accelerator
        # DistributedDataParallel would keep buckets of the size of all logits, for gradients that there are none of.
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
        config = self.adapter.config
        scale = self.logit_scale if config.logit_scale is None else config.logit_scale
        n, m = config.n, config.m
        factor = sum(1 / k for k in range(1, n + 1)) if config.distribution == "plackett_luce" else n
        share = min(1, (m - n) * factor * exp(-scale))
        groups = self.adapter.groups()
        count = self.trainer.args.explored_groups or groups
        if count >= groups:
            self._explored = {}
        logger.warning(
            f"residual: explores {min(count, groups):,} of {groups:,} groups, of which a sample changes about "
            f"{share * min(count, groups):,.3g}, so the average one is tried once in {1 / share:,.0f} steps; plan for "
            "several times as many (the paper explores all, and runs 10,000 steps). Where a backward pass fits, "
            "estimator='simple' learns more."
        )

    @contextmanager
    def _gathering(self) -> Iterator[dict[int, torch.Tensor]]:
        """The sum of the squares of each input feature of every layer that is called meanwhile, `[in_features]`."""
        squares: dict[int, torch.Tensor] = {}

        def add(index: int, layer: MaskProLinear, args: tuple[Any, ...]) -> None:
            # An objective may run the dense model as well.
            if not layer._adapters_to_apply():
                return
            found = args[0].detach().flatten(0, -2).float().square().sum(0)
            squares[index] = squares[index] + found if index in squares else found

        # Experts are no modules that are called with inputs of their own.
        layers = [(i, layer) for i, layer in enumerate(self.adapter.layers) if isinstance(layer, MaskProLinear)]
        handles = [layer.register_forward_pre_hook(partial(add, index)) for index, layer in layers]
        try:
            yield squares
        finally:
            for handle in handles:
                handle.remove()

    def _with_most_at_stake(self, inputs: dict[int, torch.Tensor]) -> dict[int, Groups]:
        """The groups to explore, given the squares of the inputs, of every layer that was called."""
        count, m = self.trainer.args.explored_groups, self.adapter.config.m
        stakes = []
        for index, layer in enumerate(self.adapter.layers):
            with onloaded([layer]):
                weight = layer.out_in(plain(layer.base_weight).detach())
                weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
                squares = torch.ones(layer.in_features, device=weight.device)
                if isinstance(layer, MaskProLinear):
                    # Those of the first process: alone it would have no others. What no token reaches has no stake.
                    squares = broadcast(inputs.get(index, torch.zeros_like(squares)))
                stake = (weight.float().square() * squares).unflatten(1, (-1, m)).sum(2)
            # Of weights or inputs that are all 0 there is no share.
            found = (stake / stake.sum()).nan_to_num(0).flatten().topk(min(count, stake.numel()))
            stakes.append((found.values.cpu(), found.indices, stake.shape[1]))
        least = torch.cat([values for values, *_ in stakes]).topk(count).values[-1]
        explored = {}
        for index, (values, indices, width) in enumerate(stakes):
            chosen = indices[(values >= least).to(indices.device)]
            layer = self.adapter.layers[index]
            explored[index] = layer.groups_at(self.adapter.name, chosen // width, chosen % width)
        return explored

    def optimizer(self, default: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        # Nothing has a gradient, so this steps nothing: it holds the learning rate for the schedule.
        return torch.optim.SGD(self.adapter.thetas(), lr=self.trainer.args.learning_rate)

    def _sampled(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        """By the mask of this optimiser step, which is drawn again wherever it is needed."""
        return layer.masked(weight, self.adapter.name, self._seed, index, self.distribution, self._groups(index))

    def _groups(self, index: int) -> Groups | None:
        """Of a layer those that are sampled; `None` for all."""
        return (self._explored or {}).get(index)

    def training_step(
        self,
        default: TrainingStep,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        trainer = self.trainer
        # Dropout would put other noise into the two losses than the mask.
        model.eval()
        if not self._micro_batches:
            # torch's own generator, whose state a checkpoint keeps.
            self._step_seed = int(torch.randint(2**63 - 1, ()))
            masks = min(trainer.args.masks_per_step, trainer.current_gradient_accumulation_steps)
            self._shares = torch.zeros(masks, 2, device=trainer.args.device)
        mask = self._micro_batches % len(self._shares)
        self._micro_batches += 1
        self._seed = self._seed_of(mask)
        index = inputs.pop(_INDEX, None)
        inputs = trainer._prepare_inputs(inputs)
        if self._explored is None:
            with torch.no_grad(), trainer.compute_loss_context_manager(), self._gathering() as squares:
                self._loss(self.adapter.initial, model, inputs, num_items_in_batch)
            self._explored = self._with_most_at_stake(squares)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = self._loss(self._sampled, model, inputs, num_items_in_batch)
            if index is None or self._baselines is None or not self._are_known(index.cpu(), inputs):
                baseline = self._loss(self.adapter.initial, model, inputs, num_items_in_batch)
            else:
                assert num_items_in_batch is not None
                known = self._baselines[index.cpu()].sum() * ranks_of_loss(trainer)
                baseline = (known / float(num_items_in_batch)).to(loss)
        # Unlike the loss of no tokens a reward of 0 is one.
        told = loss.abs() + baseline.abs() if trainer.reward_fn is None else torch.ones_like(loss)
        self._shares[mask] += torch.stack([loss - baseline, told])
        if trainer.accelerator.sync_gradients:
            seeds, residuals = self._of_all_processes()
            if self.is_finite(torch.tensor(residuals).sum()) and seeds:
                self._move_logits(seeds, residuals)
            self._micro_batches = 0
        return loss

    def _are_known(self, index: torch.Tensor, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether examples are what they were when their losses were cached; else those are forgotten."""
        if inputs.keys() <= _TOLD and torch.equal(_tokens_of(inputs), self._tokens[index]):
            return True
        self._baselines = None
        logger.warning(
            "residual: an example has other tokens than when its loss was cached, so from now on every step computes "
            "its baseline; use baseline='step' with data that are drawn at random."
        )
        return False

    def _loss(
        self, mask: MaskWeight, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The micro-batch's share of what is minimised, under a mask."""
        trainer = self.trainer
        with self.adapter.masks(mask, keep=trainer.reward_fn is not None):
            if trainer.reward_fn is None:
                return share_of_loss(trainer, model, inputs, items)
            rewards = trainer.reward_fn(model, dict(inputs))
        if not isinstance(rewards, torch.Tensor) or rewards.dim() != 1:
            given = f"a tensor {list(rewards.shape)}" if isinstance(rewards, torch.Tensor) else type(rewards).__name__
            raise ValueError(f"reward_fn gave {given}; it gives a tensor [examples], a number for each.")
        return -rewards.float().mean() / trainer.current_gradient_accumulation_steps

    def _seed_of(self, mask: int) -> int:
        """The seed of a mask of this process: in one process that had the masks of all it would be the same."""
        accelerator = self.trainer.accelerator
        return (self._step_seed + mask * accelerator.num_processes + accelerator.process_index) % (2**63 - 1)

    def _of_all_processes(self) -> tuple[list[int], list[float]]:
        """The seed of every mask of a step that had something to predict, and its residual."""
        masks = len(self._shares)
        shares = self._shares.double().cpu()
        # No seed is negative.
        seeds = torch.tensor([self._seed_of(mask) for mask in range(masks)]).where(shares[:, 1] != 0, -1)
        residuals = masks * shares[:, 0]
        told = torch.stack([seeds, residuals.view(torch.int64)], dim=1).unsqueeze(0).to(self.trainer.args.device)
        # First the first mask of every process, in the order of the micro-batches.
        known = self.trainer.accelerator.gather(told).cpu().transpose(0, 1).flatten(0, 1)
        heard = known[known[:, 0] >= 0]
        # The tokens that the shares are of are spread over fewer masks.
        residuals = heard[:, 1].contiguous().view(torch.float64) * (len(heard) / len(known))
        return heard[:, 0].tolist(), residuals.tolist()

    @torch.no_grad()
    def _move_logits(self, seeds: list[int], residuals: list[float]) -> None:
        """`l <- l - lr * a * score(m_t)`, summed over the masks."""
        rate = self.trainer._get_learning_rate()
        moves = [(seed, -rate * a) for seed, a in zip(seeds, self._advantages(residuals), strict=True)]
        for index, layer in enumerate(self.adapter.layers):
            layer.move_logits(self.adapter.name, moves, index, self.distribution, self._groups(index))
        self._history["residual"].append(sum(residuals) / len(residuals))
        self._history["tracker"].append(self.tracker)

    def _advantages(self, residuals: list[float]) -> list[float]:
        alpha, count = self.trainer.args.tracker_decay, len(residuals)
        if self.trainer.args.advantage == "raw":
            self.tracker = alpha * self.tracker + (1 - alpha) * sum(residuals) / count
            return [residual - self.tracker for residual in residuals]
        self._residuals.extend(residuals)
        self.tracker = median(self._residuals)
        distances = [abs(residual - self.tracker) for residual in self._residuals]
        # Of rewards most may be alike, and the median distance 0.
        deviation = OF_MEDIAN * median(distances) or fmean(distances)
        # Of masks that all have the same loss nothing is learned.
        return [max(-CLIP, min(CLIP, (r - self.tracker) / deviation)) if deviation else 0.0 for r in residuals]

    def flipped_groups(self) -> float:
        seed, name = self.trainer.state.global_step, self.adapter.name
        return self.adapter.share_that_differs(
            lambda i, layer: layer.sampled_codes(name, seed, i, self.distribution, self._groups(i))
        )

    def metrics(self) -> dict[str, float]:
        logs = {name: sum(values) / len(values) for name, values in self._history.items() if values}
        self._history = {name: [] for name in self._history}
        return logs | {"flipped": self.flipped_groups()}

    @property
    def distribution(self) -> Distribution:
        return self.adapter.config.distribution

    def agreed(self) -> float:
        return self.tracker

    def settings(self) -> dict[str, Any]:
        args = self.trainer.args
        return {
            "masks_per_step": args.masks_per_step * args.world_size,
            "advantage": args.advantage,
            "tracker_decay": args.tracker_decay,
            "explored_groups": args.explored_groups,
            "baseline": args.baseline,
            "distribution": self.distribution,
        } | ({} if self.trainer.reward_fn is None else {"objective": "reward"})

    def save(self, folder: Path) -> None:
        scaled = self.trainer.args.advantage == "scaled"
        state: dict[str, Any] = {"residuals": list(self._residuals)} if scaled else {"tracker": self.tracker}
        state["explored"] = [
            [index, row, place]
            for index, groups in (self._explored or {}).items()
            for row, place in zip(groups.rows.tolist(), groups.places.tolist(), strict=True)
        ]
        (folder / STATE_NAME).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        path = folder / STATE_NAME
        if not path.is_file():
            raise ValueError(f"{folder} is not a checkpoint of estimator='residual'; start a new run from it.")
        name = "residuals" if self.trainer.args.advantage == "scaled" else "tracker"
        try:
            state = json.loads(path.read_text())
            found, explored = state[name], state["explored"]
            listed = found if isinstance(found, list) else [found]
            values = [float(value) for value in listed]
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{path} has no {name}: {error}; resume from an earlier checkpoint, with the advantage that it was "
                "written with."
            ) from error
        is_known = isinstance(found, list) == (name == "residuals") and {*map(type, listed)} <= {int, float}
        if not is_known or not all(map(isfinite, values)):
            raise ValueError(f"{path} has the {name} {str(found)[:50]!r}; resume from an earlier checkpoint.")
        if name == "tracker":
            self.tracker = values[0]
        else:
            self._residuals.extend(values)
        self._explored = self._explored_of(explored, path)

    def _explored_of(self, explored: Any, path: Path) -> dict[int, Groups]:
        """
        The groups that a checkpoint names, each by its layer, row and place.

        Raises:
            `ValueError`: if it names others than there are.
        """
        shapes = [(theta.shape[0], theta.shape[2]) for theta in self.adapter.thetas()]
        is_known = isinstance(explored, list) and all(
            isinstance(at, list)
            and [*map(type, at)] == [int] * 3
            and 0 <= at[0] < len(shapes)
            and 0 <= at[1] < shapes[at[0]][0]
            and 0 <= at[2] < shapes[at[0]][1]
            for at in explored
        )
        if not is_known:
            raise ValueError(f"{path} has the explored {str(explored)[:50]!r}; resume from an earlier checkpoint.")
        if not explored:
            return {}
        found: dict[int, Groups] = {}
        for index, layer in enumerate(self.adapter.layers):
            at = torch.tensor([[r, p] for i, r, p in explored if i == index], dtype=torch.int64).reshape(-1, 2)
            at = at.to(layer.maskpro_mask[self.adapter.name].device)
            found[index] = layer.groups_at(self.adapter.name, at[:, 0], at[:, 1])
        return found

    def train_dataloader(self, default: Callable[[], DataLoader]) -> DataLoader:
        trainer = self.trainer
        if not self._pays():
            return default()
        dataset, collator = trainer.train_dataset, trainer.data_collator
        trainer.data_collator = _IndexedCollator(trainer._get_collator_with_removed_columns(collator))
        trainer.train_dataset = _Indexed(dataset)
        try:
            if all(gather_object([self._cache_is_sound()])):
                accelerator = trainer.accelerator
                mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
                cached = self._cached(mine, trainer._train_batch_size)
                losses, tokens = (accelerator.reduce(part.to(trainer.args.device)).cpu() for part in cached)
                if all(gather_object([self._add_up(self._unlike(tokens[:, 1]), losses)])):
                    self._baselines, self._tokens = losses, tokens
                    return default()
        finally:
            trainer.train_dataset, trainer.data_collator = dataset, collator
        if trainer.args.baseline == "cache":
            raise ValueError(
                "baseline='cache' needs examples of input_ids, attention_mask and labels alone, whose loss is the "
                "same in any company, at any time, and the model's own causal loss; use baseline='step'."
            )
        logger.warning(
            "residual: examples do not have a loss of their own, or hold more than tokens, so every step computes its "
            "baseline."
        )
        return default()

    def _pays(self) -> bool:
        """Whether a pass over all examples takes less than a baseline every step, or is asked for."""
        args = self.trainer.args
        # Outside of a run the data are asked for to calibrate on, before there is a mask.
        is_wanted = self.trainer.is_in_train and args.baseline != "step" and self.trainer.reward_fn is None
        if not is_wanted or not self._has_fixed_examples():
            return False
        examples = len(self.trainer.train_dataset)
        per_step = self.trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
        trained = per_step * args.max_steps if args.max_steps > 0 else examples * args.num_train_epochs
        return args.baseline == "cache" or examples < trained

    def _has_fixed_examples(self) -> bool:
        dataset = self.trainer.train_dataset
        # FSDP has not split the model yet when a run's data are asked for.
        map_style = (
            dataset is not None and not self.trainer.is_fsdp_enabled and not isinstance(dataset, IterableDataset)
        )
        return map_style and self.trainer.args.train_sampling_strategy in ("random", "sequential")

    def _cache_is_sound(self) -> bool:
        """
        By evidence: whether the trainer's loss of a few batches is what the losses of their examples add up to, each
        computed by itself and as they will be cached.
        """
        for layer in self.adapter.layers:
            # One that has no mask yet says so.
            layer.packed_initial_mask(self.adapter.name)
        size = self.trainer._train_batch_size
        # A generator of its own: a draw from torch's would change the run.
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.trainer.train_dataset), generator=generator)[: PROBES * size].tolist()
        try:
            alone, together = self._cached(order, 1), self._cached(order, size)
            # Of another example, or of a token more, the loss may be much the same.
            is_alike = torch.equal(alone[1], together[1])
        except torch.OutOfMemoryError:
            raise
        # Of what has no labels or no logits, or is no batch of rows, the losses cannot be cached.
        except (KeyError, AttributeError, TypeError, ValueError, IndexError, RuntimeError):
            is_alike = False
        # What follows all processes do, or none.
        return all(gather_object([is_alike])) and self._add_up(order, alone[0], together[0])

    def _add_up(self, order: list[int], *cached: torch.Tensor) -> bool:
        """Whether the trainer's loss of batches of examples is the sum of cached ones, but for rounding."""
        trainer = self.trainer
        half = trainer.accelerator.mixed_precision == "bf16"
        rounding = torch.finfo(torch.bfloat16 if half else plain(self.adapter.layers[0].base_weight).dtype).eps
        # To the end, since in every batch all processes count their items.
        adds_up = True
        for inputs in self._batches(order, trainer._train_batch_size):
            index = inputs.pop(_INDEX)
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
            if not (count := float(items or 0)) or not inputs.keys() <= _TOLD:
                adds_up = False
                continue
            with torch.no_grad(), self.adapter.masks(self.adapter.initial), trainer.accelerator.autocast():
                loss = share_of_loss(trainer, trainer.model, trainer._prepare_inputs(inputs), items).item()
            # A divergence near 0 is a difference of logarithms that are not.
            tolerance = max(1.0, abs(loss)) * (rounding / sqrt(count) + LEAST_TOLERANCE)
            for losses in cached:
                adds_up &= abs(losses[index].sum().item() * ranks_of_loss(trainer) / count - loss) <= tolerance
        return adds_up

    def _unlike(self, lengths: torch.Tensor) -> list[int]:
        """The shortest and the longest examples, side by side: of a few that are padded a draw may show none."""
        order = lengths.argsort()
        pairs = torch.stack([order, order.flip(0)], dim=1)[: PROBES * self.trainer._train_batch_size // 2]
        return pairs.flatten().tolist() if lengths.min() < lengths.max() else []

    def _cached(self, examples: Sequence[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Summed loss of examples under the initial mask, so many at a time: float64 `[all examples]`; and what is told
        of the tokens that it is of, int64 `[all examples, 2]`.
        """
        trainer = self.trainer
        losses = torch.zeros(len(trainer.train_dataset), dtype=torch.float64)
        tokens = torch.zeros(len(losses), 2, dtype=torch.int64)
        trainer.model.eval()
        for inputs in tqdm(self._batches(examples, size), desc="baseline loss", disable=trainer.args.disable_tqdm):
            index = inputs.pop(_INDEX)
            inputs = trainer._prepare_inputs(inputs)
            tokens[index] = _tokens_of(inputs)
            with torch.no_grad(), self.adapter.masks(self.adapter.initial), trainer.accelerator.autocast():
                if trainer.loss_by_spans is not None:
                    found = trainer.loss_by_spans.sequence_losses(trainer.model, inputs)
                else:
                    labels = inputs.pop("labels")
                    found = sequence_losses(trainer.model(**inputs).logits, labels)
            if len(found) != len(index):
                raise ValueError(f"{len(index)} examples become {len(found)} rows.")
            losses[index] = found.double().cpu()
        return losses, tokens

    def _batches(self, examples: Sequence[int], size: int) -> DataLoader:
        dataset, collator = self.trainer.train_dataset, self.trainer.data_collator
        return DataLoader(
            dataset, batch_size=size, collate_fn=collator, sampler=list(examples), generator=torch.Generator()
        )


def _tokens_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every row a hash of its tokens and labels, and how many labels count: int64 `[rows, 2]`."""
    labels = inputs["labels"]
    counts = labels != -100
    # A causal loss does not see what comes after the last label, where padding may be that no mask tells of.
    seen = counts.flip(1).cumsum(1).flip(1) * inputs.get("attention_mask", 1) > 0
    # The same wherever padding has moved a row.
    places = seen.cumsum(1).int()
    words = hash_positions(hash_positions(places, 0, inputs.get("input_ids", labels).int()), 0, labels.int())
    return torch.stack([words.long().where(seen, 0).sum(1), counts[:, 1:].sum(1)], dim=1).cpu()


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
