"""Learners that train values of their own instead of the logits, which follow when they are asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import clip_grad_norm_

from ..tuner import MaskProLayer
from .estimator import Estimator, TrainingStep


STATE_NAME = "estimator_state.safetensors"


class Relaxation(Estimator):
    """
    Trains one float32 tensor a layer. A subclass says where it starts, what the layer multiplies by meanwhile, what
    follows an optimizer step, and which mask it stands for.
    """

    # The values, one tensor a layer: they are made when a run begins, and belong to it alone.
    values: list[nn.Parameter]

    def start(self, index: int, layer: MaskProLayer) -> torch.Tensor:
        """What a layer's values start from, float32."""
        raise NotImplementedError

    def relaxed(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        """What a layer multiplies by in training, in the weight's layout and dtype, with a graph to the values."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called when the optimizer has moved the values."""

    def mask(self, index: int, layer: MaskProLayer) -> torch.Tensor:
        """The mask that the values stand for, bool `[out_features, m, groups]`."""
        raise NotImplementedError

    def check(self) -> None:
        if self.trainer.optimizer is not None:
            raise ValueError(
                f"estimator={self.trainer.args.estimator!r} makes what its optimizer steps; drop optimizers."
            )

    def parameters(self) -> list[nn.Parameter]:
        return self.values

    def optimizer(self, default: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        with torch.no_grad():
            self.values = [nn.Parameter(self.start(i, layer)) for i, layer in enumerate(self.adapter.layers)]
        optimizer = super().optimizer(default)
        # The trainer clips the gradients of the model's own parameters, and frees those.
        optimizer.register_step_pre_hook(lambda *_: self._clip())
        optimizer.register_step_post_hook(lambda *_: self._finish_step())
        return optimizer

    def _clip(self) -> None:
        if (most := self.trainer.args.max_grad_norm) > 0:
            clip_grad_norm_(self.values, most)

    @torch.no_grad()
    def _finish_step(self) -> None:
        for value in self.values:
            value.grad = None
        self.after_step()

    def training_step(
        self,
        default: TrainingStep,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        with self.adapter.masks(self.relaxed):
            return default(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def settle(self) -> None:
        for index, layer in enumerate(self.adapter.layers):
            layer.set_learned_mask(self.adapter.name, self.mask(index, layer))

    def save(self, folder: Path) -> None:
        save_file({str(i): value.detach() for i, value in enumerate(self.values)}, folder / STATE_NAME)

    def load(self, folder: Path) -> None:
        path = folder / STATE_NAME
        saved = load_file(path) if path.is_file() else {}
        if [saved[key].shape for key in sorted(saved, key=int)] != [value.shape for value in self.values]:
            estimator = self.trainer.args.estimator
            raise ValueError(f"{folder} is not a checkpoint of estimator={estimator!r}; start a new run from it.")
        with torch.no_grad():
            for index, value in enumerate(self.values):
                value.copy_(saved[str(index)])
