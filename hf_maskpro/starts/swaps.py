"""Swaps of kept against dropped weights while the layer's reconstruction error falls (the idea of SparseSwaps)."""

import ctypes
from functools import cache
from pathlib import Path

import torch

from ..subset import group_members
from ..subset.native import compiled_or_none
from .gpu import in_triton


# A gain below this share of what a row's dropped weights cost, each by itself, is rounding.
_LEAST_GAIN = 1e-9


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled_or_none(Path(__file__).with_name("swaps.cpp"), "swaps")
    if library is not None:
        library.refine.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    return library


def reconstruction_error(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """
    `||X (W_i - m_i W_i)||^2` of every row i: what the layer's outputs lose.

    Args:
        weight (`torch.Tensor`): `[out_features, in_features]`.
        mask (`torch.Tensor`): bool `[out_features, m, in_features // m]`.
        gram (`torch.Tensor`): X^T X, `[in_features, in_features]`.

    Returns:
        `torch.Tensor`: float64 `[out_features]`.
    """
    dropped = _dropped(weight, mask)
    return ((dropped @ gram) * dropped).sum(1, dtype=torch.float64)


def refine(
    weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Swap within groups, one swap a row at a time, the best of the row, until none lowers its error.

    With d the dropped weights of a row and c = G d, to drop p and keep q instead changes `d^T G d` by exactly
    `2 w_p c_p + w_p^2 G_pp - 2 w_q c_q + w_q^2 G_qq - 2 w_p w_q G_pq`.

    On a CPU this is compiled at first use, on a GPU it is in Triton, and in both a row's swaps are ranked in float32.
    Elsewhere, and without a compiler or Triton, it is [`refine_in_torch`].

    Args:
        weight (`torch.Tensor`): `[out_features, in_features]`.
        mask (`torch.Tensor`): bool `[out_features, m, in_features // m]`, with as many kept in every group.
        gram (`torch.Tensor`): X^T X, `[in_features, in_features]`.
        shift (`torch.Tensor`, *optional*): float32 `[out_features, in_features]`, added to c at first. With s a row of
            it, what falls is `d^T G d + 2 s^T d`: the error towards other outputs than those of the dense weight.

    Returns:
        `torch.Tensor`: The refined mask, of the same shape. No single swap of it lowers the error of a row by more
            than rounding: of float64 a billionth, of float32 a millionth of `sum_j d_j^2 G_jj` at first.
    """
    triton = in_triton(weight)
    library = _library() if weight.device.type == "cpu" and not triton else None
    if not triton and library is None:
        return refine_in_torch(weight, mask, gram, shift)
    rows, m, groups = mask.shape
    # What is compiled reads float32, whatever is there.
    weight, gram = weight.float(), gram.float()
    dropped = _dropped(weight, mask)
    product = dropped @ gram if shift is None else torch.addmm(shift, dropped, gram)
    tolerance = _LEAST_GAIN * (dropped.square() @ gram.diagonal())
    # Of both, the same member of all groups in a row.
    weight, product = (group_members(matrix, m).contiguous() for matrix in (weight, product))
    gram = gram.view(groups, m, groups, m).permute(1, 0, 3, 2).contiguous()
    if triton:
        from . import swaps_triton

        return swaps_triton.refine(weight, mask.contiguous(), gram, product, tolerance)
    assert library is not None
    refined = mask.clone(memory_format=torch.contiguous_format)
    pointers = [tensor.data_ptr() for tensor in (weight, gram, product, tolerance, refined)]
    library.refine(*pointers, rows, m, groups, torch.get_num_threads())
    return refined


def refine_in_torch(
    weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """[`refine`] in float64, on any device: all rows at once, one swap of each."""
    rows, m, groups = mask.shape
    n = int(mask[0, :, 0].sum())
    weight, gram = weight.double(), gram.double()
    dropped = _dropped(weight, mask)
    product = dropped @ gram if shift is None else shift + dropped @ gram
    squares = weight.square() * gram.diagonal()
    tolerance = _LEAST_GAIN * (dropped.square() @ gram.diagonal())
    # The features of every group, those that are kept first.
    order = mask.byte().argsort(dim=1, descending=True) + torch.arange(groups, device=mask.device) * m
    active = torch.arange(rows, device=mask.device)
    while len(active):
        features = order[active].flatten(1)
        w, c, square = (
            matrix[active].gather(1, features).unflatten(1, (m, groups)) for matrix in (weight, product, squares)
        )
        cross = 2 * w * c
        dropping, keeping = (square + cross)[:, :n], (square - cross)[:, n:]
        features = features.unflatten(1, (m, groups))
        best = torch.full_like(tolerance[active], torch.inf)
        place = torch.zeros_like(active)
        for p in range(n):
            for q in range(n, m):
                inner = gram[features[:, p], features[:, q]]
                change = dropping[:, p] + keeping[:, q - n] - 2 * w[:, p] * w[:, q] * inner
                value, group = change.min(1)
                place = torch.where(value < best, (p * m + q) * groups + group, place)
                best = torch.minimum(best, value)
        gains = best < -tolerance[active]
        active, place = active[gains], place[gains]
        group, first, second = place % groups, place // groups // m, place // groups % m
        out, into = order[active, first, group], order[active, second, group]
        order[active, first, group], order[active, second, group] = into, out
        product[active] += (
            weight[active, out].unsqueeze(1) * gram[out] - weight[active, into].unsqueeze(1) * gram[into]
        )
    keep = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order[:, :n].flatten(1), True)
    return group_members(keep, m).contiguous()


def _dropped(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A weight with zeros where the mask keeps it."""
    return weight.masked_fill(mask.transpose(1, 2).flatten(1), 0)
