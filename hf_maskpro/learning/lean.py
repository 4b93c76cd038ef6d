"""An optimizer step within the backward pass, with two bytes of state per logit."""

from functools import cache
from math import sqrt
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
    layers' gradients there, though beside one that of the pull towards large weights.

    The rule is AdamW, with both moments in 8 bits: the second as its logarithm, and the first as the root of its share
    in the root of the second. They are rounded up or down at random: in 50 steps the second fades to a third, and
    rounded to nearest it would never do so. bfloat16 logits are rounded likewise. Where a gradient is not finite, the
    layer stays as it is.

    Args:
        trainer ([`~transformers.Trainer`]): Whose learning rate, step and arguments count.
        adapter ([`TrainedAdapter`]): What is moved.
    """

    def __init__(self, trainer: Trainer, adapter: TrainedAdapter):
        self.trainer, self.adapter, self.thetas = trainer, adapter, adapter.thetas()
        # As the kernel sees the logits, the members of all groups one after the other.
        self.first_moments = [torch.zeros_like(_planes(theta), dtype=torch.int8) for theta in self.thetas]
        self.second_moments = [torch.zeros_like(_planes(theta), dtype=torch.uint8) for theta in self.thetas]
        self.updates = [torch.zeros((), device=theta.device) for theta in self.thetas]
        self._most = most_of_root(trainer.args.adam_beta1, trainer.args.adam_beta2)
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
        if args.weight_pull:
            self.adapter.prefer_large_weights(index, gradient, args.weight_pull)
        rate = self.trainer._get_learning_rate()
        settings = (
            rate,
            args.adam_beta1,
            args.adam_beta2,
            args.adam_epsilon,
            1 - rate * args.weight_decay,
            self._most,
        )
        _update_kernel()(
            theta.numel(),
            _planes(theta),
            _planes(gradient),
            self.first_moments[index],
            self.second_moments[index],
            self.updates[index],
            norm,
            # full, unlike tensor, does not wait for the device.
            [torch.full((), value, device=theta.device) for value in settings],
            random_keys(args.seed << 32 | self.trainer.state.global_step, index, theta.device),
        )

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        save_file(self.state(), folder / STATE_NAME)

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
        mine = self.state()
        kinds, known = (
            {name: (value.dtype, value.shape) for name, value in tensors.items()} for tensors in (mine, saved)
        )
        if known != kinds:
            raise ValueError(
                f"{path} does not hold the state of these layers; resume with the settings of the checkpoint."
            )
        for name, value in saved.items():
            if name.endswith("updates") and not (value.isfinite() and value >= 0):
                raise ValueError(f"{path} has a {name} that no run writes; resume from an earlier checkpoint.")
        for name, value in mine.items():
            value.copy_(saved[name])

    def state(self) -> dict[str, torch.Tensor]:
        """What is kept from step to step, as a checkpoint names it."""
        kinds = {"first_moment": self.first_moments, "second_moment": self.second_moments, "updates": self.updates}
        return {f"{i}.{kind}": value for kind, values in kinds.items() for i, value in enumerate(values)}


def most_of_root(beta1: float, beta2: float) -> float:
    """
    How many times the root of the second moment the first can be, by the Cauchy-Schwarz inequality, if that root has
    been rounded down.

    Raises:
        `ValueError`: if that has no bound.
    """
    if beta1**2 >= beta2:
        raise ValueError(
            "optimizer_in_backward=True keeps the first moment in units of the second's root, and cannot by "
            f"adam_beta1 {beta1} and adam_beta2 {beta2}; the square of the first has to be below the second."
        )
    return (1 - beta1) / sqrt((1 - beta2) * (1 - beta1**2 / beta2)) * 2 ** (1 / CODES_PER_OCTAVE / 2)


def _planes(theta: torch.Tensor) -> torch.Tensor:
    """`[out_features, m, groups]` as it lies in memory, `[m * out_features, groups]`."""
    return theta.detach().transpose(0, 1).flatten(0, 1)


@cache
def _update_kernel() -> Kernel:
    def update(
        theta: torch.Tensor,
        gradient: torch.Tensor,
        shares: torch.Tensor,
        codes: torch.Tensor,
        updates: torch.Tensor,
        norm: torch.Tensor,
        settings: list[torch.Tensor],
        keys: list[torch.Tensor],
    ) -> None:
        rate, beta1, beta2, epsilon, kept, most = settings
        (words,) = position_words(theta, keys[0], keys[1], 1)
        dithers = [(words >> 16 * half & 0xFFFF).float() / 0x10000 for half in (0, 1)]
        finite, g, t = norm.isfinite(), gradient.float(), updates + 1
        known_root, share = _root(codes.float()), shares.float() / 127
        m = beta1 * most * share * share.abs() * known_root + (1 - beta1) * g
        v = beta2 * known_root.square() + (1 - beta2) * g.square()
        step = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + epsilon)
        moved = kept * theta.float() - rate * step
        if theta.dtype == torch.bfloat16:
            (moved,) = round_at_random([moved], words)
        new_codes = ((torch.log2(v) - LOWEST_OCTAVE) * CODES_PER_OCTAVE + dithers[0]).floor().clamp(0, 255)
        # Of the second moment as it will be read.
        size = (m.abs() / (most * _root(new_codes))).sqrt() * 127
        new_shares = torch.where(new_codes > 0, m.sign() * (size + dithers[1]).floor().clamp(max=127), 0)
        theta.copy_(torch.where(finite, moved, theta.float()))
        shares.copy_(torch.where(finite, new_shares, shares.float()))
        codes.copy_(torch.where(finite, new_codes, codes.float()))
        updates.add_(finite)

    return Kernel(update, "optimizer in backward")


def _root(codes: torch.Tensor) -> torch.Tensor:
    """The root of a second moment, of which code 0 says that it is 0."""
    return torch.where(codes > 0, torch.exp2((codes / CODES_PER_OCTAVE + LOWEST_OCTAVE) / 2), 0)
