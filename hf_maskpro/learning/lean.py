"""An optimizer step within the backward pass, with a byte of state per logit."""

from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer

from ..subset import Kernel, random_keys
from ..subset.bits import position_words
from ..subset.kernels import round_at_random
from .adapter import TrainedAdapter


STATE_NAME = "optimizer_in_backward.safetensors"
# A code is a third of an octave of the second moment, so the 256 of them are gradients from 5.8e-11 to 360.
CODES_PER_OCTAVE, LOWEST_OCTAVE = 3, -68


class OptimizerInBackward:
    """
    Moves the logits of each layer as soon as the backward pass has their gradient, and frees it: in no moment are two
    layers' gradients there.

    The rule is RMSprop, Adam without its first moment: `theta -= lr * g / (sqrt(v / (1 - beta2^t)) + epsilon)`, with
    `v` a moving average of `g^2` for every logit, but by no more than `lr`. Without that limit a mask that was badly
    drawn moves all logits far at once, where Adam spreads it over ten steps, and a run on a real model diverges. `v`
    is kept as its logarithm in 8 bits, rounded up or down at random: in 50 steps it fades to a third, and rounded to
    nearest it would never do so. bfloat16 logits are rounded likewise. Where a gradient is not finite, the layer stays
    as it is.

    Args:
        trainer ([`~transformers.Trainer`]): Whose learning rate, step and arguments count.
        adapter ([`TrainedAdapter`]): What is moved.
    """

    def __init__(self, trainer: Trainer, adapter: TrainedAdapter):
        self.trainer, self.thetas = trainer, adapter.thetas()
        # As the kernel sees the logits, the members of all groups one after the other.
        self.second_moments = [torch.zeros_like(_planes(theta), dtype=torch.uint8) for theta in self.thetas]
        self.updates = [torch.zeros((), device=theta.device) for theta in self.thetas]
        self._norm: torch.Tensor | None = None

    def watch(self) -> list[RemovableHandle]:
        """Have every layer moved in the backward passes from now on."""
        return [
            theta.register_post_accumulate_grad_hook(lambda theta, index=index: self._move(index, theta))
            for index, theta in enumerate(self.thetas)
        ]

    def take_norm(self) -> torch.Tensor | None:
        """Sum of the norms of the gradients since the last call, finite if all were; `None` if there were none."""
        norm, self._norm = self._norm, None
        return norm

    @torch.no_grad()
    def _move(self, index: int, theta: nn.Parameter) -> None:
        gradient, theta.grad = theta.grad, None
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._norm = norm if self._norm is None else self._norm + norm.to(self._norm.device)
        args = self.trainer.args
        rate = self.trainer._get_learning_rate()
        settings = (rate, args.adam_beta2, args.adam_epsilon, 1 - rate * args.weight_decay)
        _update_kernel()(
            theta.numel(),
            _planes(theta),
            _planes(gradient),
            self.second_moments[index],
            self.updates[index],
            norm,
            # full, unlike tensor, does not wait for the device.
            [torch.full((), value, device=theta.device) for value in settings],
            random_keys(args.seed << 32 | self.trainer.state.global_step, index, theta.device),
        )

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        moments = {f"{i}.second_moment": moment for i, moment in enumerate(self.second_moments)}
        save_file(moments | {f"{i}.updates": count for i, count in enumerate(self.updates)}, folder / STATE_NAME)

    def load(self, folder: Path) -> None:
        """
        Read what [`save`] wrote.

        Raises:
            `ValueError`: if it is not there, or another model's.
        """
        path = folder / STATE_NAME
        try:
            saved = load_file(path) if path.is_file() else {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; resume from an earlier checkpoint.") from error
        mine = {f"{i}.second_moment": moment for i, moment in enumerate(self.second_moments)}
        mine |= {f"{i}.updates": count for i, count in enumerate(self.updates)}
        kinds, known = (
            {name: (value.dtype, value.shape) for name, value in tensors.items()} for tensors in (mine, saved)
        )
        if known != kinds:
            raise ValueError(
                f"{path} does not hold the state of these layers; resume with the settings of the checkpoint."
            )
        for name, value in saved.items():
            if not ((value >= 0) & value.isfinite()).all():
                raise ValueError(f"{path} has a {name} that no run writes; resume from an earlier checkpoint.")
        for name, value in mine.items():
            value.copy_(saved[name])


def _planes(theta: torch.Tensor) -> torch.Tensor:
    """`[out_features, m, groups]` as it lies in memory, `[m * out_features, groups]`."""
    return theta.detach().transpose(0, 1).flatten(0, 1)


@cache
def _update_kernel() -> Kernel:
    def update(
        theta: torch.Tensor,
        gradient: torch.Tensor,
        codes: torch.Tensor,
        updates: torch.Tensor,
        norm: torch.Tensor,
        settings: list[torch.Tensor],
        keys: list[torch.Tensor],
    ) -> None:
        rate, beta, epsilon, kept = settings
        (words,) = position_words(theta, keys[0], keys[1], 1)
        finite, g = norm.isfinite(), gradient.float()
        known = torch.where(codes > 0, torch.exp2(codes.float() / CODES_PER_OCTAVE + LOWEST_OCTAVE), 0)
        v = beta * known + (1 - beta) * g * g
        scale = (v / (1 - beta ** (updates + 1))).sqrt() + epsilon
        moved = kept * theta.float() - rate * (g / scale).clamp(-1, 1)
        if theta.dtype == torch.bfloat16:
            (moved,) = round_at_random([moved], words)
        dither = (words >> 16 & 0xFFFF).float() / 0x10000
        new_codes = ((torch.log2(v) - LOWEST_OCTAVE) * CODES_PER_OCTAVE + dither).floor().clamp(0, 255)
        theta.copy_(torch.where(finite, moved, theta.float()))
        codes.copy_(torch.where(finite, new_codes, codes.float()))
        updates.add_(finite)

    return Kernel(update, "optimizer in backward")
