"""`maskllm`: a softmax over the masks of a group, with annealed Gumbel noise (MaskLLM, arXiv 2409.17481)."""

from dataclasses import dataclass, field
from functools import cache, reduce
from math import comb
from typing import Any

import torch
from transformers import TrainingArguments

from ..subset import Kernel, candidates, gumbel, random_keys
from ..tuner import MaskProLayer
from .relaxation import Relaxation


# The deviation of the gates at first, and how many of them a member that the starting mask keeps is worth.
SPREAD, PRIOR = 0.01, 3.0
# From the first step to the last.
SCALE, TEMPERATURE = (100.0, 500.0), (4.0, 0.05)


@dataclass
class MaskLLMArguments:
    """
    The settings of `estimator="maskllm"`.

    Args:
        weight_bonus (`float`, defaults to 1e-5):
            Weight in the loss of `-||W * M||^2`, which prefers masks that keep large weights. It fades over the run.
    """

    weight_bonus: float = field(default=1e-5, metadata={"help": "`maskllm`'s preference for large weights."})


class MaskLLM(Relaxation):
    """
    Trains a gate for each of the C(m, n) masks of a group. In training a layer multiplies by the soft mask
    `softmax((kappa * gates + Gumbel noise) / tau) @ masks`, with kappa from 100 to 500 and tau from 4 to 0.05 over the
    run; the learned mask is that of the largest gate. Gates are C(m, n) / m times as many as weights.

    As in the published code, the gates start from noise of deviation 0.01, to which the starting mask adds three times
    that deviation, times the number of members that both keep less one.
    """

    Arguments = MaskLLMArguments

    @classmethod
    def defaults(cls, args: TrainingArguments) -> dict[str, Any]:
        if args.weight_bonus < 0:
            raise ValueError(f"weight_bonus is {args.weight_bonus}; it needs to be at least 0.")
        return {
            # The published 5e-5 times 10, which its code gives to gates.
            "learning_rate": 5e-4,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1} if args.lr_scheduler_type is None else None,
            "warmup_steps": 0,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-5,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
        }

    def check(self) -> None:
        super().check()
        config = self.adapter.config
        if config.m != 4 or config.n not in (1, 2):
            raise ValueError(f"estimator='maskllm' learns 2:4 and 1:4, not {config.pattern}; use estimator='simple'.")

    def initial_values(self, index: int, layer: MaskProLayer) -> torch.Tensor:
        n, kept = self.adapter.config.n, layer.learned_mask(self.adapter.name).float()
        rows, m, groups = kept.shape
        gates = SPREAD * torch.randn(rows, comb(m, n), groups).to(kept.device)
        overlap = torch.einsum("cm,rmg->rcg", candidates(n, m, kept.device), kept)
        return gates + (overlap - 1) * gates.std() * PRIOR

    def _progress(self) -> float:
        return min(1.0, self.trainer.state.global_step / max(1, self.trainer.state.max_steps))

    def _annealed(self, ends: tuple[float, float]) -> float:
        return ends[0] + (ends[1] - ends[0]) * self._progress()

    def training_weight(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        # torch's own generator, so that the replay of gradient checkpointing holds, and a resumed run.
        seed = int(torch.randint(2**63 - 1, ()))
        bonus = self.trainer.args.weight_bonus * (1 - self._progress())
        masked = _SoftMask.apply(
            self.values[index],
            layer.out_in(weight),
            seed,
            index,
            self.adapter.config.n,
            self._annealed(SCALE),
            self._annealed(TEMPERATURE),
            bonus / self.trainer.current_gradient_accumulation_steps,
        )
        return layer.out_in(masked)

    def mask_of_values(self, index: int, layer: MaskProLayer) -> torch.Tensor:
        config, gates = self.adapter.config, self.values[index]
        chosen = candidates(config.n, config.m, gates.device)[gates.argmax(1)]
        return chosen.transpose(1, 2) == 1

    def metrics(self) -> dict[str, float]:
        return {"temperature": self._annealed(TEMPERATURE)}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"weight_bonus": self.trainer.args.weight_bonus}


class _SoftMask(torch.autograd.Function):
    """A weight times its soft mask. The noise is a function of the seed, so backward makes it again."""

    @staticmethod
    def forward(ctx, gates, rows, seed, index, n, scale, temperature, bonus):
        ctx.save_for_backward(gates, rows)
        ctx.n, ctx.numbers = n, [_number(x, gates.device) for x in (scale, temperature, bonus)]
        ctx.keys = random_keys(seed, index, gates.device)
        size = gates.numel() // gates.shape[1]
        return _soft_kernel(n, rows.shape[1] // gates.shape[2])(size, gates, rows, *ctx.keys, *ctx.numbers[:2])

    @staticmethod
    def backward(ctx, grad):
        gates, rows = ctx.saved_tensors
        size = gates.numel() // gates.shape[1]
        kernel = _soft_gradient_kernel(ctx.n, rows.shape[1] // gates.shape[2])
        grad_gates = kernel(size, gates, rows, *ctx.keys, *ctx.numbers, grad.contiguous())
        return grad_gates, None, None, None, None, None, None, None


def _number(value: float, device: torch.device) -> torch.Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def soft_choice(
    gates: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    scale: torch.Tensor,
    temperature: torch.Tensor,
) -> list[torch.Tensor]:
    """
    The probabilities of the candidates.

    Args:
        gates (`torch.Tensor`): float32 `[out_features, C(m, n), groups]`.
        first, second (`torch.Tensor`): The keys of the noise.
        scale, temperature (`torch.Tensor`): kappa and tau, scalars.

    Returns:
        `list[torch.Tensor]`: For every candidate, float32 `[out_features, groups]`.
    """
    planes = list(gates.unbind(1))
    noise = gumbel(planes[0], first, second, len(planes))
    exponents = [(scale * gate + draw) / temperature for gate, draw in zip(planes, noise, strict=True)]
    highest = exponents[0]
    for exponent in exponents[1:]:
        highest = torch.maximum(highest, exponent)
    weights = [(exponent - highest).exp() for exponent in exponents]
    total = reduce(torch.add, weights)
    return [weight / total for weight in weights]


def _soft_members(chances: list[torch.Tensor], kept_by: list[list[int]]) -> list[torch.Tensor]:
    return [reduce(torch.add, [chances[c] for c in kept]) for kept in kept_by]


def _kept(n: int, m: int) -> tuple[list[list[int]], list[list[int]]]:
    """For every member the candidates that keep it, and for every candidate the members that it keeps."""
    table = candidates(n, m, torch.device("cpu")) == 1
    return [column.nonzero()[:, 0].tolist() for column in table.T], [row.nonzero()[:, 0].tolist() for row in table]


@cache
def _soft_kernel(n: int, m: int) -> Kernel:
    kept_by, _ = _kept(n, m)

    def soft_mask(gates, rows, first, second, scale, temperature):
        members = _soft_members(soft_choice(gates, first, second, scale, temperature), kept_by)
        return (torch.stack(members, dim=-1).flatten(1) * rows).to(rows.dtype)

    return Kernel(soft_mask, f"{n}:{m} soft mask")


@cache
def _soft_gradient_kernel(n: int, m: int) -> Kernel:
    kept_by, keeps = _kept(n, m)

    def soft_gradient(gates, rows, first, second, scale, temperature, bonus, grad):
        chances = soft_choice(gates, first, second, scale, temperature)
        members = _soft_members(chances, kept_by)
        worth = []
        for i, member in enumerate(members):
            weight = rows[:, i::m].float()
            worth.append(weight * (grad[:, i::m].float() - 2 * bonus * weight * member))
        of_candidates = [reduce(torch.add, [worth[i] for i in kept]) for kept in keeps]
        mean = reduce(torch.add, [chance * value for chance, value in zip(chances, of_candidates, strict=True)])
        planes = [chance * (value - mean) for chance, value in zip(chances, of_candidates, strict=True)]
        return scale / temperature * torch.stack(planes, dim=1)

    return Kernel(soft_gradient, f"{n}:{m} gradient of the soft mask")
