"""
The element-wise work on whole layers, fused by `torch.compile`: one source for CPU (C++) and GPU (Triton).

Masks travel as codes, int32 `[out_features, groups]` (see `codec.codes_of`). The logits of a group are
`theta + scale * initial`, with `theta` of shape `[out_features, m, groups]` and `initial` a code.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from .bits import hash_positions, keys, to_uniform
from .codec import join, mask_of
from .distributions import (
    Distribution,
    draw,
    draws,
    marginal_gradient,
    mode_of,
    sampling_dtype,
    score,
    score_of_two,
    weights_of,
    work_dtype,
)


# Smaller layers take less time than compiling for them.
SMALLEST_COMPILED = 1 << 14


class _Kernel:
    """A function that is compiled for large layers, and runs eagerly for small ones or where no compiler works."""

    compiles = True

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.compiled = torch.compile(function, dynamic=True)

    def __call__(self, codes: torch.Tensor, *args: Any) -> Any:
        if not _Kernel.compiles or codes.numel() < SMALLEST_COMPILED:
            return self.function(codes, *args)
        try:
            return self.compiled(codes, *args)
        except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InductorError) as error:
            _Kernel.compiles = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"masks are computed without torch.compile, about 10x slower: {reason}", stacklevel=2)
            return self.function(codes, *args)


def _planes(initial: torch.Tensor, theta: torch.Tensor, scale: float) -> list[torch.Tensor]:
    return [theta[:, i].float() + scale * ((initial >> i) & 1).float() for i in range(theta.shape[1])]


@lru_cache
def _mode_kernel(n: int) -> _Kernel:
    return _Kernel(lambda initial, theta, scale: join(mode_of(_planes(initial, theta, scale), n)))


def mode_codes(theta: torch.Tensor, initial: torch.Tensor, scale: float, n: int) -> torch.Tensor:
    """The learned mask: the n largest logits of every group, ties to the lower index."""
    return _mode_kernel(n)(initial, theta, scale)


@lru_cache
def _sample_kernel(n: int, distribution: Distribution) -> _Kernel:
    def sample(
        initial: torch.Tensor, theta: torch.Tensor, scale: float, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        weights = weights_of(_planes(initial, theta, scale), n, sampling_dtype(n, distribution))
        words = hash_positions((draws(n, distribution), *initial.shape), first, second, initial.device)
        return join(draw(weights, n, to_uniform(words), distribution))

    return _Kernel(sample)


def sample_codes(
    theta: torch.Tensor,
    initial: torch.Tensor,
    scale: float,
    n: int,
    seed: int,
    layer: int = 0,
    distribution: Distribution = "plackett_luce",
) -> torch.Tensor:
    """One sampled mask, a pure function of (logits, seed, layer); as [`sample`]."""
    first, second = (torch.tensor(key, dtype=torch.int32, device=theta.device) for key in keys(seed, layer))
    return _sample_kernel(n, distribution)(initial, theta, scale, first, second)


def _groups_are_words(rows: torch.Tensor, m: int) -> bool:
    """Whether every group is one 64-bit word in memory."""
    return m == 4 and rows.element_size() == 2 and rows.is_contiguous() and rows.storage_offset() % 4 == 0


def _members(rows: torch.Tensor, m: int, as_words: bool) -> list[torch.Tensor]:
    """The members of every group of `[out_features, in_features]` as float32 planes."""
    if as_words:
        # Strided loads do not vectorise. Each of the four bfloat16 in a word is the upper half of a float32.
        words = rows.view(torch.int64)
        low, high = words.int(), (words >> 32).int()
        return [half.view(torch.float32) for word in (low, high) for half in (word << 16, word & -65536)]
    return [rows[:, i::m].float() for i in range(m)]


@lru_cache
def _gradient_kernel(n: int, as_words: bool) -> _Kernel:
    def gradient(
        initial: torch.Tensor, theta: torch.Tensor, scale: float, grad: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        dtype, m = work_dtype(n), theta.shape[1]
        pairs = zip(_members(grad, m, as_words), _members(weight, m, as_words), strict=True)
        worth = [(g * w).to(dtype) for g, w in pairs]
        planes = marginal_gradient(weights_of(_planes(initial, theta, scale), n, dtype), worth, n)
        return torch.stack(planes, dim=1).to(theta.dtype)

    return _Kernel(gradient)


def theta_gradient(
    theta: torch.Tensor, initial: torch.Tensor, scale: float, n: int, grad: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """
    SIMPLE's gradient with respect to theta, as [`marginals_backward`] of gradient times weight.

    Args:
        grad (`torch.Tensor`): Gradient with respect to the masked weight, `[out_features, in_features]`.
        weight (`torch.Tensor`): The dense weight, `[out_features, in_features]`.

    Returns:
        `torch.Tensor`: Of theta's shape and dtype.
    """
    as_words = all(_groups_are_words(rows, theta.shape[1]) and rows.dtype == torch.bfloat16 for rows in (grad, weight))
    return _gradient_kernel(n, as_words)(initial, theta, scale, grad, weight)


@lru_cache
def _update_kernel(n: int, distribution: Distribution) -> _Kernel:
    def update(
        codes: torch.Tensor, initial: torch.Tensor, theta: torch.Tensor, scale: float, step: torch.Tensor
    ) -> torch.Tensor:
        weights = weights_of(_planes(initial, theta, scale), 2, torch.float32)
        kept = [(codes >> i) & 1 == 1 for i in range(theta.shape[1])]
        return theta + (step * torch.stack(score_of_two(weights, kept), dim=1)).to(theta.dtype)

    return _Kernel(update)


def move_logits(
    theta: torch.Tensor,
    initial: torch.Tensor,
    codes: torch.Tensor,
    scale: float,
    n: int,
    step: float,
    distribution: Distribution,
) -> None:
    """`theta += step * score(codes)` in place."""
    if n == 2 and distribution == "plackett_luce":
        amount = torch.tensor(step, dtype=torch.float32, device=theta.device)
        theta.copy_(_update_kernel(n, distribution)(codes, initial, theta, scale, amount))
        return
    m = theta.shape[1]
    logits = torch.stack(_planes(initial, theta, scale), dim=1)
    theta.add_(score(logits, mask_of(codes, m), distribution).to(theta.dtype), alpha=step)


@lru_cache
def _apply_kernel() -> _Kernel:
    def apply(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # A bitwise AND on whole groups: dropped weights come out as +0.
        words = weight.view(torch.int64)
        keep = (codes & 1).long() * 0xFFFF
        for i in (1, 2, 3):
            keep = keep | (((codes >> i) & 1).long() * 0xFFFF) << (16 * i)
        return (words & keep).view(weight.dtype)

    return _Kernel(apply)


def apply_codes(weight: torch.Tensor, codes: torch.Tensor, m: int) -> torch.Tensor:
    """
    The weight with its dropped entries selected to +0.

    Args:
        weight (`torch.Tensor`): `[out_features, in_features]`.
        codes (`torch.Tensor`): int32 `[out_features, in_features // m]`.
        m (`int`): Size of a group.
    """
    if _groups_are_words(weight, m):
        return _apply_kernel()(codes, weight)
    return torch.where(keep_of(codes, m), weight, 0)


def keep_of(codes: torch.Tensor, m: int) -> torch.Tensor:
    """Codes to bool `[out_features, in_features]`."""
    return ((codes.unsqueeze(-1) >> torch.arange(m, dtype=torch.int32, device=codes.device)) & 1 == 1).flatten(1)
