"""`proxsparse`: a relaxed weight and a proximal operator that is at rest at 2:4 (ProxSparse, arXiv 2502.00258)."""

from dataclasses import dataclass, field
from functools import cache, reduce
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..subset import Kernel, group_members, mode
from ..tuner import MaskProLayer
from ..tuner.base import plain
from .adapter import TrainedAdapter
from .relaxation import Relaxation


# Sweeps of the proximal operator in one call of its kernel, and all together.
SWEEPS, MOST_SWEEPS = 4, 100
# Of the pull to the pretrained weight, which divides by it.
EPSILON = 0.1
# A dropped weight starts at no more than this share of the smallest kept one of its group, unless the kept ones are
# the largest: closer by, noise would choose between them.
MOST_DROPPED = 0.5


@dataclass
class ProxSparseArguments:
    """
    The settings of `estimator="proxsparse"`.

    Args:
        prox_lambda (`float`, *optional*):
            `lambda` of the regulariser. The paper's goes with the size of the weights, from 0.2 to 25. `None` is
            `learning_rate / median(W^2)` of every layer: 0.25 where weights are around 0.02 and the rate is 1e-4.
            The operator then takes from a third weight in a step about as much as the optimizer may give.
        prox_pull (`float`, defaults to 0):
            Weight in the loss of the pull to the pretrained weight, `||(V / (W + 0.1 sign W)) (V - W)||^2`; the
            published runs of most models have none, that of LLaMA-3.1-8B has 1.
    """

    prox_lambda: float | None = field(default=None, metadata={"help": "Strength of `proxsparse`'s regulariser."})
    prox_pull: float = field(default=0.0, metadata={"help": "Strength of `proxsparse`'s pull to the weights."})


class ProxSparse(Relaxation):
    """
    Trains a copy V of the weights. After every step of AdamW comes the proximal operator of
    `lambda * (|v1 v2 v3| + |v2 v3 v4| + |v3 v4 v1| + |v4 v1 v2|)` in every group, which is zero exactly where at most
    two of four are not. The mask is the two largest |V| of a group, and is applied to the weights as they were.

    V starts at the weights, which from the magnitude mask is the paper's own start. In groups where the mask keeps
    other than the two largest, the dropped ones start at no more than half the smaller of the two.
    """

    Arguments = ProxSparseArguments

    def __init__(self, trainer: Trainer, adapter: TrainedAdapter):
        super().__init__(trainer, adapter)
        # `lambda` of every layer.
        self.strengths: list[torch.Tensor] = []

    @classmethod
    def defaults(cls, args: TrainingArguments) -> dict[str, Any]:
        for name in ("prox_lambda", "prox_pull"):
            value = getattr(args, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it needs to be at least 0.")
        return {
            "learning_rate": 1e-4,
            "lr_scheduler_type": "linear",
            # A tenth of the run.
            "warmup_steps": 0.1,
            "max_grad_norm": 1.0,
        }

    def check(self) -> None:
        super().check()
        config = self.adapter.config
        if (config.n, config.m) != (2, 4):
            raise ValueError(f"estimator='proxsparse' learns 2:4 alone, not {config.pattern}; use estimator='simple'.")

    def initial_values(self, index: int, layer: MaskProLayer) -> torch.Tensor:
        args, rows = self.trainer.args, layer.out_in(plain(layer.base_weight)).float()
        typical = rows[rows != 0].square().median()
        # Of a layer of zeros there is nothing to choose.
        strength = (args.learning_rate / typical).nan_to_num(0) if args.prox_lambda is None else args.prox_lambda
        self.strengths = [*self.strengths[:index], torch.as_tensor(strength, device=rows.device, dtype=rows.dtype)]
        members = group_members(rows, 4)
        size, kept = members.abs(), layer.learned_mask(self.adapter.name)
        least = size.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
        largest = (mode(size, 2) == kept).all(1, keepdim=True)
        limit = torch.where(largest | kept, torch.inf, MOST_DROPPED * least)
        return torch.where(size > limit, members.sign() * limit, members).transpose(1, 2).flatten(1)

    def training_weight(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        return layer.out_in(self.values[index].to(weight.dtype))

    def training_step(self, *args: Any) -> torch.Tensor:
        loss = super().training_step(*args)
        pull = self.trainer.args.prox_pull / self.trainer.current_gradient_accumulation_steps
        if pull:
            for value, layer in zip(self.values, self.adapter.layers, strict=True):
                # A layer that the batch did not reach is pulled all the same.
                value.grad = torch.zeros_like(value) if value.grad is None else value.grad
                value.grad += pull * pull_gradient(value.detach(), layer.out_in(plain(layer.base_weight)).float())
        return loss

    def after_step(self) -> None:
        super().after_step()
        for value, strength in zip(self.values, self.strengths, strict=True):
            value.copy_(proximal_step(value, strength))

    def mask_of_values(self, index: int, layer: MaskProLayer) -> torch.Tensor:
        return mode(group_members(self.values[index].abs(), 4), 2)

    def metrics(self) -> dict[str, float]:
        dense = sum(int(((group_members(value, 4) != 0).sum(1) > 2).sum()) for value in self.values)
        return {"dense_groups": dense / self.adapter.groups()}

    def settings(self) -> dict[str, Any]:
        args = self.trainer.args
        return super().settings() | {"prox_lambda": args.prox_lambda, "prox_pull": args.prox_pull}


def pull_gradient(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    The gradient with respect to V of `||(V / (W + 0.1 sign W)) (V - W)||^2`, with sign(0) = 1.

    Args:
        value (`torch.Tensor`): V, `[out_features, in_features]`.
        weight (`torch.Tensor`): W, of the same shape.

    Returns:
        `torch.Tensor`: Of the same shape.
    """
    scale = weight + torch.where(weight < 0, -EPSILON, EPSILON)
    return 2 * value * (value - weight) * (2 * value - weight) / scale.square()


def proximal_step(value: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """
    In every group the minimiser of `0.5 ||w - v||^2 + strength * (|w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|)`.

    With z the sizes of v, largest first, it is the best of three candidates: the two largest as they are; three and
    four of them by Gauss-Seidel sweeps over the conditions of a minimum, until nothing moves. As in the published code
    the sweeps start from zero, at the smallest, and there are at most a hundred.

    Args:
        value (`torch.Tensor`): v, float32 or float64 `[out_features, in_features]`.
        strength (`torch.Tensor`): `lambda`, a scalar of that dtype.

    Returns:
        `torch.Tensor`: w, of the shape of v.
    """
    groups = value.numel() // 4
    sizes = _sort_kernel()(groups, value)
    state = sizes.new_zeros(7, *sizes.shape[1:])
    settled = 4 * torch.finfo(value.dtype).eps * sizes.max()
    for _ in range(MOST_SWEEPS // SWEEPS):
        before, state = state, _sweep_kernel()(groups, sizes, state, strength)
        if (state - before).abs().max() <= settled:
            break
    return _choose_kernel()(groups, value, sizes, state, strength)


def _ranks(sizes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Place of every member among the four, ties to the lower index."""
    return [
        reduce(torch.add, [(sizes[j] >= sizes[i] if j < i else sizes[j] > sizes[i]).int() for j in range(4) if j != i])
        for i in range(4)
    ]


def _members(value: torch.Tensor) -> list[torch.Tensor]:
    return [value[:, i::4] for i in range(4)]


@cache
def _sort_kernel() -> Kernel:
    def sort(value: torch.Tensor) -> torch.Tensor:
        sizes = [member.abs() for member in _members(value)]
        ranks = _ranks(sizes)
        return torch.stack(
            [reduce(torch.add, [torch.where(ranks[i] == k, sizes[i], 0) for i in range(4)]) for k in range(4)]
        )

    return Kernel(sort, "2:4 proximal sort")


@cache
def _sweep_kernel() -> Kernel:
    def sweep(sizes: torch.Tensor, state: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        z1, z2, z3, z4 = sizes.unbind()
        # Three of them, then four of them.
        a, b, c, d, e, f, g = state.unbind()
        for _ in range(SWEEPS):
            c = (z3 - strength * (a * b)).clamp(min=0)
            b = (z2 - strength * (a * c)).clamp(min=0)
            a = (z1 - strength * (b * c)).clamp(min=0)
            g = (z4 - strength * (d * e + e * f + f * d)).clamp(min=0)
            f = (z3 - strength * (d * e + e * g + g * d)).clamp(min=0)
            e = (z2 - strength * (d * f + f * g + g * d)).clamp(min=0)
            d = (z1 - strength * (e * f + f * g + g * e)).clamp(min=0)
        return torch.stack([a, b, c, d, e, f, g])

    return Kernel(sweep, "2:4 proximal sweeps")


@cache
def _choose_kernel() -> Kernel:
    def choose(value: torch.Tensor, sizes: torch.Tensor, state: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        members = _members(value)
        ranks = _ranks([member.abs() for member in members])
        z, three, four = list(sizes.unbind()), list(state[:3].unbind()), list(state[3:].unbind())
        zero = torch.zeros_like(z[0])
        candidates = [[z[0], z[1], zero, zero], [*three, zero], four]
        costs = []
        for w in candidates:
            moved = reduce(torch.add, [(w[k] - z[k]).square() for k in range(4)])
            costs.append(0.5 * moved + strength * (w[0] * w[1] * (w[2] + w[3]) + w[2] * w[3] * (w[0] + w[1])))
        take_three = costs[1] < costs[0]
        take_four = costs[2] < torch.minimum(costs[0], costs[1])
        best = [
            torch.where(take_four, of_four, torch.where(take_three, of_three, of_two))
            for of_two, of_three, of_four in zip(*candidates, strict=True)
        ]
        placed = [
            member.sign() * reduce(torch.add, [torch.where(rank == k, best[k], 0) for k in range(4)])
            for member, rank in zip(members, ranks, strict=True)
        ]
        return torch.stack(placed, dim=-1).flatten(1)

    return Kernel(choose, "2:4 proximal choice")
