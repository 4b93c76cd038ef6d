"""`simple`: a backward pass through the exact marginals (SIMPLE, Ahmed et al., ICLR 2023)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainingArguments

from .adapter import TrainedAdapter
from .estimator import Estimator, TrainingStep
from .lean import OptimizerInBackward, most_of_root
from .objectives import objective_weights


# The square of the mean gradient is in the estimate of the curvature too, as many times as there are terms. With these
# it is nearly as large as what is estimated, on SmolLM2-135M, and with more it would rule.
MOST_TERMS = 1024


@dataclass
class SimpleArguments:
    """
    The settings of `estimator="simple"`.

    Args:
        optimizer_in_backward (`bool`, defaults to `False`):
            Move the logits of each layer within the backward pass, as soon as their gradient is there, and free it.
            The rule is AdamW with its moments in 8 bits, by `learning_rate`, `adam_beta1`, `adam_beta2`,
            `adam_epsilon` and `weight_decay`; `optim` is for `modules_to_save` alone. Turns `gradient_checkpointing`
            on unless that is given. With bfloat16 logits a run then adds about 4.1 bytes to a weight. One process, no
            accumulation.
        weight_pull (`float`, *optional*):
            A pull towards large weights, as MaskLLM's (arXiv 2409.17481): a reward for the squares of the kept
            weights, whose gradient has this share of the norm of the loss's, in each layer. Where the text says
            little, large weights win. Learned from a mixture, masks suit other text better by it. Default 0.3, and in
            runs of more than 60 steps less, by the square root of the ratio: a steady pull adds up, and noise averages
            out.
        curvature (`float`, defaults to 1.0):
            How much of the loss's curvature counts where a weight is kept or dropped, which is no small step. It is
            estimated by the squares of the batch's gradients, times its number of labels, up to 1,024. SIMPLE as
            published takes the slope alone, which makes less of kept weights than they are worth, and more of dropped
            ones; that is 0 here, with a `weight_pull` of 0. So it is with `objective="distillation"` alone, and where
            batches have no labels.
    """

    optimizer_in_backward: bool = field(
        default=False, metadata={"help": "Move the logits within `simple`'s backward pass: least memory."}
    )
    weight_pull: float | None = field(default=None, metadata={"help": "`simple`'s preference for large weights."})
    curvature: float = field(default=1.0, metadata={"help": "How much of the loss's curvature `simple` counts."})


class Simple(Estimator):
    """
    The layers do all of it: in train mode they sample masks, and their backward sends what keeping a weight is worth
    through the exact marginals to the logits. What is its own are the settings of the optimizer, when it steps, the
    pull towards large weights, and what the curvature is estimated by.
    """

    Arguments = SimpleArguments

    @classmethod
    def defaults(cls, args: TrainingArguments) -> dict[str, Any]:
        if args.optimizer_in_backward and args.gradient_accumulation_steps > 1:
            raise ValueError(
                "optimizer_in_backward=True steps in every backward pass, and gradient_accumulation_steps is "
                f"{args.gradient_accumulation_steps}, not 1; use larger batches, or drop one of the two."
            )
        if args.optimizer_in_backward and (args.max_grad_norm or 0) > 0:
            raise ValueError(
                "optimizer_in_backward=True steps before the norm of all gradients is known, and max_grad_norm is "
                f"{args.max_grad_norm}, not 0; drop one of the two."
            )
        if args.weight_pull is not None and not 0 <= args.weight_pull < inf:
            raise ValueError(f"weight_pull is {args.weight_pull}; it cannot be negative or infinite. 0.3 is usual.")
        if not 0 <= args.curvature < inf:
            raise ValueError(f"curvature is {args.curvature}; it cannot be negative or infinite. 1 is usual.")
        # Of a run that is measured in epochs the number of steps is not known here.
        steps = args.max_steps if args.max_steps > 0 else 120
        rate = 0.2 * sqrt(120 / steps) if args.learning_rate is None else args.learning_rate
        decay = {"power": 1.0, "lr_end": rate / 10} if args.lr_scheduler_type is None else None
        return {
            "learning_rate": rate,
            "lr_scheduler_type": "polynomial",
            "lr_scheduler_kwargs": decay,
            # In a short run the rest of the schedule needs steps, too; below 1 it is a share of the run.
            "warmup_steps": 10 if args.max_steps >= 50 else args.max_steps // 5 if args.max_steps > 0 else 0.1,
            "adam_beta2": 0.98,
            "weight_pull": 0.3 * min(1, sqrt(60 / steps)),
        } | ({"gradient_checkpointing": True} if args.optimizer_in_backward else {})

    def __init__(self, trainer: Trainer, adapter: TrainedAdapter):
        super().__init__(trainer, adapter)
        # Once a run has begun that has one.
        self.in_backward: OptimizerInBackward | None = None

    def check(self) -> None:
        if not self.trainer.args.optimizer_in_backward:
            return
        self.refuse_several_processes(
            "optimizer_in_backward=True", "it steps before gradients are summed; drop it, or run one process"
        )
        most_of_root(self.trainer.args.adam_beta1, self.trainer.args.adam_beta2)
        if self.trainer.optimizer is not None:
            raise ValueError("optimizer_in_backward=True steps the logits itself; drop optimizers.")

    def optimizer(self, default: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        if self.trainer.args.optimizer_in_backward:
            self.in_backward = OptimizerInBackward(self.trainer, self.adapter)
        # It finds no gradient of the logits, and holds their learning rate for the schedule.
        return super().optimizer(default)

    def training_step(
        self,
        default: TrainingStep,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        self._set_curvature(self._curvature(inputs.get("labels")))
        try:
            return super().training_step(default, model, inputs, num_items_in_batch)
        finally:
            self._set_curvature(0.0)

    def _curvature(self, labels: Any) -> float:
        """What makes a second derivative of a micro-batch's mean squared gradient."""
        args = self.trainer.args
        # The gradient of a divergence has none of the noise of labels that it takes; without labels it is not known
        # what the loss is a mean over.
        weights = objective_weights(args.objective)
        if not args.curvature or "language-modeling" not in weights or not isinstance(labels, torch.Tensor):
            return 0.0
        terms = min((labels != -100).sum().item(), MOST_TERMS) * self.trainer.current_gradient_accumulation_steps
        # A loss that is multiplied by a number has its gradient's square multiplied by the square of that.
        return args.curvature * terms / sum(weights.values())

    def _set_curvature(self, scale: float) -> None:
        for layer in self.adapter.layers:
            layer.curvature = scale

    def before_step(self) -> None:
        if not (pull := self.trainer.args.weight_pull) or self.in_backward is not None:
            return
        for index, theta in enumerate(self.adapter.thetas()):
            # A layer that no batch has reached has none.
            if theta.grad is not None:
                self.adapter.prefer_large_weights(index, theta.grad, pull)

    def watch(self, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        return super().watch(optimizer) + ([] if self.in_backward is None else self.in_backward.watch())

    def gradient_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor | None:
        norm = super().gradient_norm(gradients)
        moved = None if self.in_backward is None else self.in_backward.take_norm()
        return norm if moved is None else moved if norm is None else norm + moved.to(norm.device)

    def metrics(self) -> dict[str, float]:
        return {"flipped": self.flipped_groups()}

    def settings(self) -> dict[str, Any]:
        args = self.trainer.args
        found = super().settings() | {"weight_pull": args.weight_pull, "curvature": args.curvature}
        if not args.optimizer_in_backward:
            return found
        # Its first moment is kept in units that depend on these.
        return found | {"optimizer": f"8-bit AdamW in backward, betas {args.adam_beta1:g} and {args.adam_beta2:g}"}

    def save(self, folder: Path) -> None:
        if self.in_backward is not None:
            self.in_backward.save(folder)

    def load(self, folder: Path) -> None:
        if self.in_backward is not None:
            self.in_backward.load(folder)
