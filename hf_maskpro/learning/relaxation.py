"""Learners that train values of their own instead of the logits, which follow when they are asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer

from ..tuner import MaskProLayer
from .adapter import TrainedAdapter
from .estimator import Estimator, TrainingStep


STATE_NAME = "estimator_state.safetensors"


class Relaxation(Estimator):
    """
    Trains one float32 tensor a layer. A subclass says where it starts, what the layer multiplies by meanwhile, and
    which mask it stands for.
    """

    def __init__(self, trainer: Trainer, adapter: TrainedAdapter):
        super().__init__(trainer, adapter)
        # One tensor a layer, once a run has begun.
        self.values: list[nn.Parameter] = []

    def initial_values(self, index: int, layer: MaskProLayer) -> torch.Tensor:
        """What a layer's values start from, float32, of a shape of the subclass's own."""
        raise NotImplementedError

    def training_weight(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        """What a layer multiplies by in training, in the weight's layout and dtype, with a graph to the values."""
        raise NotImplementedError

    def mask_of_values(self, index: int, layer: MaskProLayer) -> torch.Tensor:
        """The mask that the values stand for, bool `[out_features, m, groups]`."""
        raise NotImplementedError

    def check(self) -> None:
        args = self.trainer.args
        self.refuse_several_processes(
            f"estimator={self.trainer.args.estimator!r}",
            "ranks with different masks would drift apart; use estimator='simple'",
        )
        if self.trainer.optimizer is not None:
            raise ValueError(f"estimator={args.estimator!r} makes what its optimizer steps; drop optimizers.")
        if args.load_best_model_at_end and args.save_only_model:
            raise ValueError(
                f"estimator={args.estimator!r} needs its own state to go back to the best mask; drop save_only_model."
            )

    def parameters(self) -> list[nn.Parameter]:
        return self.values

    def optimizer(self, default: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        with torch.no_grad():
            self.values = [nn.Parameter(self.initial_values(i, layer)) for i, layer in enumerate(self.adapter.layers)]
        return super().optimizer(default)

    def before_step(self) -> None:
        # The trainer clips the gradients of the model's own parameters.
        if (most := self.trainer.args.max_grad_norm) > 0:
            clip_grad_norm_(self.values, most)

    def after_step(self) -> None:
        # And frees those.
        for value in self.values:
            value.grad = None

    def training_step(
        self,
        default: TrainingStep,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        with self.adapter.masks(self.training_weight):
            return default(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def settle(self) -> None:
        if self.values:
            for index, layer in enumerate(self.adapter.layers):
                layer.set_learned_mask(self.adapter.name, self.mask_of_values(index, layer))

    def save(self, folder: Path) -> None:
        save_file({str(i): value.detach() for i, value in enumerate(self.values)}, folder / STATE_NAME)

    def load(self, folder: Path) -> None:
        path = folder / STATE_NAME
        try:
            saved = load_file(path)
        except (OSError, SafetensorError):
            saved = {}
        kinds = {str(index): (value.dtype, value.shape) for index, value in enumerate(self.values)}
        if {key: (value.dtype, value.shape) for key, value in saved.items()} != kinds:
            raise ValueError(f"{path} does not hold the values of this run; start a new run from the checkpoint.")
        if other := [key for key, value in saved.items() if not value.isfinite().all()]:
            raise ValueError(f"{path} holds values that are not finite, of layer {other[0]}; resume from another.")
        with torch.no_grad():
            for index, value in enumerate(self.values):
                value.copy_(saved[str(index)])
