"""
The work on whole layers, fused by `torch.compile`: one source for CPU (C++) and GPU (Triton).

A layer's logits are `theta + scale * initial`, with `theta` of shape `[out_features, m, groups]` and the starting mask
packed, uint8. Every kernel unpacks the mask, rebuilds the logits and does its job; a sampled mask is a function of
(logits, seed, layer) and never stored. Inside, masks are codes (see `codec.codes_of`).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import comb
from typing import Any

import torch

from .bits import more_words, position_words, random_keys
from .codec import code_table, join, mask_of, word_codes, word_layout
from .compiling import Kernel
from .distributions import (
    Distribution,
    draw,
    draws,
    mode_of,
    score,
    score_of,
)
from .marginals import marginal_gradient
from .weights import weights_of, work_dtype


def _kernel(function: Callable[..., Any], n: int, m: int, job: str) -> Kernel:
    return Kernel(function, f"{n}:{m} {job}", word_layout(n, m))


def _reader(n: int, m: int) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """Unpacks (packed, table, groups) within a kernel to codes, int32 `[out_features, groups]`."""
    base, layout = comb(m, n), word_layout(n, m)

    def read(packed: torch.Tensor, table: torch.Tensor, groups: int) -> torch.Tensor:
        if packed.is_cuda and layout[1] == 1:
            # There a look-up costs less than to write the codes to memory and read them again.
            return codes_by_place(packed, table, groups)
        codes = word_codes(packed, table, base, layout)
        rows, words, digits = codes.shape
        if groups % digits == 0:
            # Not view: torch.compile then stores the codes once, instead of looking them up for every use.
            return codes.as_strided((rows, groups), (groups, 1))
        # Padded rows would keep the kernel from running from end to end, as if a layer were one long row.
        codes = codes.as_strided((rows, groups), (words * digits, 1)).clone()
        return codes.as_strided((rows, groups), (groups, 1))

    return read


def codes_by_place(packed: torch.Tensor, table: torch.Tensor, groups: int) -> torch.Tensor:
    """The codes of one-byte words, each looked up where it is used."""
    place, digits = torch.arange(groups, dtype=torch.int32, device=packed.device), table.shape[1]
    return table[packed[:, place // digits].int(), place % digits]


def _planes(codes: torch.Tensor, theta: Sequence[torch.Tensor], scale: torch.Tensor) -> list[torch.Tensor]:
    """The logits of every member, float32."""
    planes = [member.float() for member in theta]
    return [torch.where(codes & 1 << i != 0, plane + scale, plane) for i, plane in enumerate(planes)]


@lru_cache
def _number(value: float, device: torch.device) -> torch.Tensor:
    """A Python number would be compiled in, or become float64."""
    return torch.full((), value, dtype=torch.float32, device=device)


def _groups_are_words(rows: torch.Tensor, m: int) -> bool:
    """Whether every group is one 64-bit word in memory."""
    return m == 4 and rows.element_size() == 2 and rows.is_contiguous() and rows.storage_offset() % 4 == 0


def _as_words(rows: torch.Tensor, m: int) -> torch.Tensor:
    """Rows as the kernels take them: int64 `[out_features, groups]` where a group is one word, else as they are."""
    return rows.view(torch.int64) if _groups_are_words(rows, m) else rows


def _select(rows: torch.Tensor, codes: torch.Tensor, m: int) -> torch.Tensor:
    """Rows from [`_as_words`] with their dropped entries selected to +0."""
    if rows.dtype != torch.int64:
        return torch.where(keep_of(codes, m), rows, 0)
    keep = (codes & 1).long() * 0xFFFF
    for i in (1, 2, 3):
        keep = keep | (((codes >> i) & 1).long() * 0xFFFF) << (16 * i)
    return rows & keep


def keep_of(codes: torch.Tensor, m: int) -> torch.Tensor:
    """Codes to bool `[out_features, in_features]`."""
    return ((codes.unsqueeze(-1) >> torch.arange(m, dtype=torch.int32, device=codes.device)) & 1 == 1).flatten(1)


@lru_cache
def _apply_kernel(n: int, m: int) -> Kernel:
    read = _reader(n, m)

    def apply(rows: torch.Tensor, packed: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        groups = rows.shape[1] if rows.dtype == torch.int64 else rows.shape[1] // m
        return _select(rows, read(packed, table, groups), m)

    return _kernel(apply, n, m, "apply")


def apply_packed(rows: torch.Tensor, packed: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """
    Rows with their dropped entries at +0, by a packed mask.

    Args:
        rows (`torch.Tensor`): The weight, `[out_features, in_features]`.
        packed (`torch.Tensor`): uint8, as from [`pack`]; valid.
    """
    table = code_table(n, m, rows.device)
    return _apply_kernel(n, m)(rows.numel() // m, _as_words(rows, m), packed, table).view(rows.dtype)


@lru_cache
def _mode_kernel(n: int, m: int, select: bool) -> Kernel:
    read = _reader(n, m)

    def mode(
        theta: torch.Tensor, packed: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        initial = read(packed, table, theta.shape[2])
        codes = join(mode_of(_planes(initial, theta.unbind(1), scale), n))
        return codes if rows is None else _select(rows, codes, m)

    return _kernel(mode, n, m, "mode and apply" if select else "mode")


def _mode(theta: torch.Tensor, packed: torch.Tensor, scale: float, n: int, rows: torch.Tensor | None) -> torch.Tensor:
    m = theta.shape[1]
    kernel = _mode_kernel(n, m, rows is not None)
    return kernel(
        theta.numel() // m, theta, packed, code_table(n, m, theta.device), _number(scale, theta.device), rows
    )


def mode_codes(theta: torch.Tensor, packed: torch.Tensor, scale: float, n: int) -> torch.Tensor:
    """The learned mask as codes, int32 `[out_features, groups]`: the n largest logits, ties to the lower index."""
    return _mode(theta, packed, scale, n, None)


def mode_and_apply(
    rows: torch.Tensor, theta: torch.Tensor, packed: torch.Tensor, scale: float, n: int
) -> torch.Tensor:
    """Rows with their dropped entries at +0, by the mask of [`mode_codes`]."""
    return _mode(theta, packed, scale, n, _as_words(rows, theta.shape[1])).view(rows.dtype)


@lru_cache
def _sample_kernel(n: int, m: int, distribution: Distribution, select: bool) -> Kernel:
    read = _reader(n, m)

    def sample(
        theta: torch.Tensor,
        packed: torch.Tensor,
        table: torch.Tensor,
        scale: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        initial = read(packed, table, theta.shape[2])
        weights = weights_of(_planes(initial, theta.unbind(1), scale), n, work_dtype(n))
        codes = draw(weights, n, position_words(theta[:, 0], first, second, draws(n, distribution)), distribution)
        return codes if rows is None else _select(rows, codes, m)

    return _kernel(sample, n, m, "sample and apply" if select else "sample")


def _sample(
    theta: torch.Tensor,
    packed: torch.Tensor,
    scale: float,
    n: int,
    seed: int,
    layer: int,
    distribution: Distribution,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    m = theta.shape[1]
    kernel = _sample_kernel(n, m, distribution, rows is not None)
    first, second = random_keys(seed, layer, theta.device)
    return kernel(
        theta.numel() // m,
        theta,
        packed,
        code_table(n, m, theta.device),
        _number(scale, theta.device),
        first,
        second,
        rows,
    )


def sample_codes(
    theta: torch.Tensor,
    packed: torch.Tensor,
    scale: float,
    n: int,
    seed: int,
    layer: int = 0,
    distribution: Distribution = "plackett_luce",
) -> torch.Tensor:
    """One sampled mask as codes, a pure function of (logits, seed, layer); as [`sample`]."""
    return _sample(theta, packed, scale, n, seed, layer, distribution, None)


def sample_and_apply(
    rows: torch.Tensor,
    theta: torch.Tensor,
    packed: torch.Tensor,
    scale: float,
    n: int,
    seed: int,
    layer: int = 0,
    distribution: Distribution = "plackett_luce",
) -> torch.Tensor:
    """
    Rows with their dropped entries at +0, by the mask of [`sample_codes`].

    Args:
        rows (`torch.Tensor`): The weight, `[out_features, in_features]`.
    """
    words = _as_words(rows, theta.shape[1])
    return _sample(theta, packed, scale, n, seed, layer, distribution, words).view(rows.dtype)


@lru_cache
def _update_kernel(n: int, m: int, distribution: Distribution, dtype: torch.dtype) -> Kernel:
    read = _reader(n, m)

    def update(
        theta: list[torch.Tensor],
        packed: torch.Tensor,
        table: torch.Tensor,
        scale: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        step: torch.Tensor,
        into: list[torch.Tensor] | None,
        of: torch.Tensor | None,
    ) -> None:
        planes = _planes(read(packed, table, theta[0].shape[1]), theta, scale)
        weights = weights_of(planes, n, work_dtype(n))
        words = position_words(theta[0], first, second, draws(n, distribution), of)
        codes = draw(weights, n, words, distribution)
        if n > 2 and distribution == "plackett_luce":
            scores = list(score(torch.stack(planes, dim=1), mask_of(codes, m), distribution).unbind(1))
        else:
            scores = score_of(weights, [codes & 1 << i != 0 for i in range(m)], n, distribution)
        into = theta if into is None else into
        moved = [member.float() + step * value.float() for member, value in zip(into, scores, strict=True)]
        if dtype == torch.bfloat16:
            moved = round_at_random(moved, words[0])
        for member, value in zip(into, moved, strict=True):
            member.copy_(value)

    return _kernel(update, n, m, "update")


def round_at_random(planes: list[torch.Tensor], words: torch.Tensor) -> list[torch.Tensor]:
    """
    Float32 planes rounded up or down to bfloat16, with probabilities that make it right on average.

    Rounded to nearest, a logit of size 1 would ignore every change below 0.004, and nearly all changes are.
    """
    result = []
    for i, plane in enumerate(planes):
        bits = more_words(words, i // 2) >> 16 * (i % 2) & 0xFFFF
        # bfloat16 is the upper half of float32: what is below it becomes a carry as often as its size says.
        result.append((plane.view(torch.int32) + bits & -65536).view(torch.float32))
    return result


def score_and_update(
    theta: torch.Tensor,
    packed: torch.Tensor,
    scale: float,
    n: int,
    step: float,
    seed: int,
    layer: int = 0,
    distribution: Distribution = "plackett_luce",
    into: torch.Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> None:
    """
    `theta += step * score(mask)` in place, with the mask of [`sample_codes`] (beyond n = 2 up to the rounding of exp);
    bfloat16 is rounded at random.

    Args:
        step (`float`): Minus the learning rate times the advantage.
        into (`torch.Tensor`, *optional*): What is moved in theta's place, of theta's shape; see [`store_logits`].
        rows (`tuple[int, int]`, *optional*): Where theta and the packed mask are some rows of a layer's: the index of
            the first, and how many the layer has.
    """
    m = theta.shape[1]
    groups = theta.shape[2]
    first, second = random_keys(seed, layer, theta.device, rows[0] * groups if rows else 0)
    of = torch.full((), rows[1] * groups, dtype=torch.int32, device=theta.device) if rows else None
    amount = torch.full((), step, dtype=torch.float32, device=theta.device)
    # The score of Plackett-Luce beyond n = 2 sums over 2**n subsets, which do not fit into one compiled kernel.
    size = 0 if n > 2 and distribution == "plackett_luce" else theta.numel() // m
    _update_kernel(n, m, distribution, theta.dtype if into is None else into.dtype)(
        size,
        list(theta.unbind(1)),
        packed,
        code_table(n, m, theta.device),
        _number(scale, theta.device),
        first,
        second,
        amount,
        None if into is None else list(into.unbind(1)),
        of,
    )


@lru_cache
def _rounding_kernel() -> Kernel:
    def store(theta: list[torch.Tensor], exact: list[torch.Tensor], first: torch.Tensor, second: torch.Tensor) -> None:
        rounded = round_at_random(exact, position_words(theta[0], first, second, 1)[0])
        for member, value in zip(theta, rounded, strict=True):
            member.copy_(value)

    return Kernel(store, "rounding at random")


def store_logits(theta: torch.Tensor, exact: torch.Tensor, seed: int, layer: int = 0) -> None:
    """Copy float32 logits into theta; bfloat16 is rounded at random, by a seed that may be a mask's, too."""
    if theta.dtype == exact.dtype:
        theta.copy_(exact)
        return
    keys = random_keys(seed, layer, theta.device)
    _rounding_kernel()(theta.numel() // theta.shape[1], list(theta.unbind(1)), list(exact.unbind(1)), *keys)


def _members(rows: torch.Tensor, m: int, as_words: bool) -> list[torch.Tensor]:
    """The members of every group of `[out_features, in_features]` as float32 planes."""
    if as_words:
        # Strided loads do not vectorise. Each of the four bfloat16 in a word is the upper half of a float32.
        words = rows.view(torch.int64)
        low, high = words.int(), (words >> 32).int()
        return [half.view(torch.float32) for word in (low, high) for half in (word << 16, word & -65536)]
    return [rows[:, i::m].float() for i in range(m)]


@lru_cache
def _gradient_kernel(n: int, m: int, as_words: bool, curved: bool) -> Kernel:
    read = _reader(n, m)

    def gradient(
        theta: torch.Tensor,
        packed: torch.Tensor,
        table: torch.Tensor,
        scale: torch.Tensor,
        grad: torch.Tensor,
        weight: torch.Tensor,
        *curvature: torch.Tensor,
    ) -> torch.Tensor:
        initial = read(packed, table, theta.shape[2])
        dtype = work_dtype(n)
        grads, weights = _members(grad, m, as_words), _members(weight, m, as_words)
        if curved:
            masked, rows, columns = curvature
            halves = zip(grads, weights, _members(masked, m, as_words), columns.view(-1, m).unbind(1), strict=True)
            grads = [g - rows * column * (kept - w / 2) for g, w, kept, column in halves]
        worth = [(g * w).to(dtype) for g, w in zip(grads, weights, strict=True)]
        planes = marginal_gradient(weights_of(_planes(initial, theta.unbind(1), scale), n, dtype), worth, n)
        return torch.stack([plane.to(theta.dtype) for plane in planes]).transpose(0, 1)

    return _kernel(gradient, n, m, "curved marginal gradient" if curved else "marginal gradient")


def theta_gradient(
    theta: torch.Tensor,
    packed: torch.Tensor,
    scale: float,
    n: int,
    grad: torch.Tensor,
    weight: torch.Tensor,
    curvature: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    SIMPLE's gradient with respect to theta, as [`marginals_backward`] of what keeping each weight is worth.

    Args:
        grad (`torch.Tensor`): Gradient with respect to the masked weight, `[out_features, in_features]`.
        weight (`torch.Tensor`): The dense weight, `[out_features, in_features]`.
        curvature (`tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, *optional*): The masked weight, and factors of
            the loss's second derivative with respect to each weight, float32 `[out_features, 1]` and `[in_features]`.
            With them that is the difference to second order, and without them the slope, gradient times weight.

    Returns:
        `torch.Tensor`: Of theta's shape and dtype.
    """
    m = theta.shape[1]
    matrices = (grad, weight) if curvature is None else (grad, weight, curvature[0])
    as_words = all(_groups_are_words(rows, m) and rows.dtype == torch.bfloat16 for rows in matrices)
    kernel, table = _gradient_kernel(n, m, as_words, curvature is not None), code_table(n, m, theta.device)
    # Parameters and plain tensors would be compiled for one after the other.
    theta, grad, weight, *bent = (each.detach() for each in (theta, grad, weight, *(curvature or ())))
    return kernel(theta.numel() // m, theta, packed, table, _number(scale, theta.device), grad, weight, *bent)
