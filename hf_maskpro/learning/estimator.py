"""What an estimator decides: the trainer asks it at these places, and knows no more of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ..subset import Distribution
from ..tuner import PLAIN_LOGIT_SCALE
from .adapter import TrainedAdapter


# Steps after which processes compare their logits, besides the first.
STEPS_BETWEEN_HASHES = 100

TrainingStep = Callable[[nn.Module, dict[str, Any], torch.Tensor | int | None], torch.Tensor]


class Estimator:
    """
    Moves the logits of one adapter. A subclass answers what is asked below; what it leaves out is answered for one
    that learns by backward through the layers' own samples.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer that asks.
        adapter ([`TrainedAdapter`]): What it trains.
    """

    # A dataclass of the settings that are its own: they become fields of `MaskProTrainingArguments`.
    Arguments: type | None = None
    # Whether the optimizer keeps anything from step to step.
    has_optimizer_state = True
    # The `C` of an adapter that was given none.
    logit_scale = PLAIN_LOGIT_SCALE

    @classmethod
    def defaults(cls, args: TrainingArguments) -> dict[str, Any]:
        """
        The values of the arguments that the user left at `None`.

        Raises:
            `ValueError`: if a setting of its own is out of range.
        """
        raise NotImplementedError

    def __init__(self, trainer: Trainer, adapter: TrainedAdapter):
        self.trainer, self.adapter = trainer, adapter
        # What a plain `Trainer` has moved, it has moved under its own `C`.
        if adapter.has_moved():
            self.logit_scale = PLAIN_LOGIT_SCALE
        self.skipped = self._skipped_in_a_row = 0
        self._steps = False

    def check(self) -> None:
        """
        Raises:
            `ValueError`: if it cannot train this model, by this trainer.
        """

    def refuse_several_processes(self, what: str, why: str) -> None:
        """
        Args:
            what (`str`): What runs in one process alone.
            why (`str`): Why, and what to do.

        Raises:
            `ValueError`: if the run has several.
            `SystemExit`: in all of them but the first, which says so for all.
        """
        args = self.trainer.args
        if (processes := max(args.world_size, args.n_gpu)) > 1:
            if args.process_index > 0:
                # As if it had succeeded: for one that fails, torchrun ends the first before it has said why.
                raise SystemExit
            raise ValueError(f"{what} runs in one process on one device, not {processes}: {why}.")

    def begin(self) -> None:
        """Called before the first step of a run, new or resumed."""

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps to learn the mask."""
        return self.adapter.thetas()

    def optimizer(self, default: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """The optimizer of a run: `default` makes that of a `Trainer`, over all that requires grad."""
        optimizer = default()
        thetas = {id(theta) for theta in self.adapter.thetas()}
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        optimizer.add_param_group({**groups[0], "params": self.parameters()})
        for group in groups:
            others = [parameter for parameter in group["params"] if id(parameter) not in thetas]
            if others:
                rate = self.trainer.args.modules_to_save_learning_rate
                optimizer.add_param_group({**group, "params": others, "lr": rate})
        return optimizer

    def train_dataloader(self, default: Callable[[], DataLoader]) -> DataLoader:
        """The batches of a run: `default` makes those of a `Trainer`."""
        return default()

    def training_step(
        self,
        default: TrainingStep,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """
        One micro-batch. `default` is that of a `Trainer`: forward and backward.

        Returns:
            `torch.Tensor`: Its share of the loss of the whole batch, a scalar without a graph.
        """
        return default(model, inputs, num_items_in_batch)

    def before_step(self) -> None:
        """Called when the gradients of an optimizer step are there, and are finite."""

    def after_step(self) -> None:
        """Called after an optimizer step that was not skipped."""

    def settle(self) -> None:
        """
        Bring the logits up to what was learned. Called before the mask is measured, logged or saved, also of a trainer
        that has not trained.
        """

    def metrics(self) -> dict[str, float]:
        """What is logged beside the loss."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What the adapter records of how it learns."""
        return {"optimizer": OptimizerNames(self.trainer.args.optim).value}

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what a resumed run needs beside logits and optimizer."""

    def load(self, folder: Path) -> None:
        """
        Read what [`save`] wrote.

        Raises:
            `ValueError`: if the checkpoint is another estimator's.
        """

    def flipped_groups(self) -> float:
        """Share of all groups that one sample changes against the starting mask."""
        # Seeded by the step: a draw from torch's generator would change the run.
        seed = self.trainer.state.global_step
        name, distribution = self.adapter.name, self.distribution
        return self.adapter.share_that_differs(lambda i, layer: layer.sampled_codes(name, seed, i, distribution))

    @property
    def distribution(self) -> Distribution:
        """What the layers sample from."""
        return "conditional_poisson"

    def watch(self, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        """Skip steps that are not finite, and call [`before_step`] and [`after_step`] for others."""
        return [
            optimizer.register_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer)),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def gradient_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor | None:
        """A number that is finite if the gradients of a step are; `None` if there are none."""
        return get_total_norm(gradients) if gradients else None

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self.gradient_norm([p.grad for p in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self._steps = norm is None or self.is_finite(norm)
        if self._steps:
            self.before_step()
            return
        for parameter in parameters:
            # Without a gradient an optimizer leaves a parameter alone.
            parameter.grad = None

    @torch.no_grad()
    def _after_step(self) -> None:
        if self._steps:
            self.after_step()
        step = self.trainer.state.global_step + 1
        if step % STEPS_BETWEEN_HASHES == 0 or step in (1, self.trainer.state.max_steps):
            self.check_processes(step)

    def agreed(self) -> float:
        """What it goes by, besides masks and logits, that is the same in all processes."""
        return 0.0

    def check_processes(self, step: int) -> None:
        """
        Raises:
            `RuntimeError`: in all processes, if they have parted.
        """
        if self.trainer.accelerator.num_processes == 1:
            return
        # Of logits that FSDP has split there are no copies that could part.
        known = hash((self.adapter.digest(logits=not self.trainer.is_fsdp_enabled), self.agreed()))
        digests = self.trainer.accelerator.gather(torch.tensor([known], device=self.trainer.args.device)).tolist()
        other = [process for process, found in enumerate(digests) if found != digests[0]]
        if other:
            raise RuntimeError(
                f"after step {step} process {other[0]} does not have the masks and logits of process 0, so the run "
                "stops; resume from the last checkpoint, with the same versions and devices in all processes."
            )

    def is_finite(self, value: torch.Tensor) -> bool:
        """
        Whether an update may be made, from a number that is finite if all of it is. Those that may not are counted.

        Raises:
            `FloatingPointError`: if too many in a row may not.
        """
        if value.isfinite():
            self._skipped_in_a_row = 0
            return True
        self.skipped += 1
        self._skipped_in_a_row += 1
        most = self.trainer.args.max_skipped
        if self._skipped_in_a_row >= most:
            raise FloatingPointError(
                f"{most} updates in a row were not finite, the last at step {self.trainer.state.global_step}; "
                "what they would have moved is as before. Look for batches without labels, or lower the learning rate."
            )
        return False
