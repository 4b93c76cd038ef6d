"""SparseGPT (Frantar & Alistarh, 2023, arXiv 2301.00774): the mask alone, chosen while the kept weights make up."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from ..subset import group_members, mode
from ..subset.native import compiled_or_none
from .gpu import in_triton
from .walk import Calibration


DAMPING = 0.01
BLOCK = 128


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled_or_none(Path(__file__).with_name("sparsegpt.cpp"), "SparseGPT's choices")
    if library is not None:
        library.choose.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 5 + [ctypes.c_int]
    return library


def mask(weight: torch.Tensor, calibration: Calibration, n: int, m: int) -> torch.Tensor:
    """
    Group by group, keep the largest `W_ij^2 / U_jj^2`, where U is the upper Cholesky factor of the inverse of
    `H = X^T X + damping`; after each column, the error of what it dropped is spread over the columns to its right by
    the optimal brain surgeon's update, so that later groups choose among weights that make up for earlier ones.

    Args:
        weight (`torch.Tensor`): float32 `[out_features, in_features]`; not changed.
        calibration ([`Calibration`]): With the Gram matrix of the inputs.
        n (`int`): Members kept per group.
        m (`int`): Members of a group.

    Returns:
        `torch.Tensor`: bool `[out_features, m, in_features // m]`.
    """
    assert calibration.inputs is not None
    assert calibration.inputs.gram is not None
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    # The inverse of what massive activations make of H is beyond float32.
    hessian = calibration.inputs.gram.double()
    diagonal = hessian.diagonal()
    # A feature that is always zero can be dropped at no cost.
    unused = diagonal == 0
    columns[unused] = 0
    diagonal[unused] = 1
    diagonal += DAMPING * diagonal.mean()
    factor = _inverse_factor(hessian)
    del hessian, diagonal
    keep = torch.empty_like(columns, dtype=torch.bool)
    choose = _way(weight)
    # The columns beyond a block are updated once per block, by one product.
    per_block = max(1, BLOCK // m) * m
    for start in range(0, len(columns), per_block):
        end = start + per_block
        errors = choose(columns[start:end], factor[start:end, start:end], keep[start:end], n, m)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return group_members(keep.T, m).contiguous()


def _way(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    if in_triton(weight):
        from .sparsegpt_triton import choose

        return choose
    return _choose_compiled if weight.device.type == "cpu" and _library() is not None else _choose_in_torch


def _choose_compiled(columns: torch.Tensor, factor: torch.Tensor, keep: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """[`_choose_in_torch`] in C++."""
    library = _library()
    assert library is not None
    errors = torch.empty_like(columns)
    pointers = [tensor.data_ptr() for tensor in (columns, factor, keep, errors)]
    library.choose(*pointers, *columns.shape, factor.stride(0), n, m, torch.get_num_threads())
    return errors


def _choose_in_torch(columns: torch.Tensor, factor: torch.Tensor, keep: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """
    Choose within a block of columns of the weight.

    Args:
        columns (`torch.Tensor`): `[columns, out_features]`; the compiled choices leave it as it is.
        factor (`torch.Tensor`): Their rows and columns of U.
        keep (`torch.Tensor`): bool `[columns, out_features]`, to be filled.

    Returns:
        `torch.Tensor`: What is to be spread over the columns beyond, `[columns, out_features]`.
    """
    errors = torch.empty_like(columns)
    for first in range(0, len(columns), m):
        last = first + m
        group, error, own = columns[first:last], errors[first:last], factor[first:last, first:last]
        keep[first:last] = mode((group / own.diagonal().unsqueeze(1)).square(), n)
        for j in range(m):
            torch.div(group[j].masked_fill(keep[first + j], 0), own[j, j], out=error[j])
            group[j + 1 :].addr_(own[j, j + 1 :], error[j], alpha=-1)
        columns[last:].addmm_(factor[first:last, last:].T, error, alpha=-1)
    return errors


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """
    The upper U with U^T U = H^-1, in float32: as H = R R^T with R upper, the factor of H in reverse order, U is R^-1.
    """
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    # By rows, as the compiled choices read it.
    inverse = torch.zeros(lower.shape, device=lower.device)
    # By blocks, as torch's solver does not skip the zeros of a triangular right-hand side.
    unit = torch.eye(len(lower), 2 * BLOCK).to(lower)
    for start in range(0, len(lower), 2 * BLOCK):
        rest, block = slice(start, None), slice(start, start + 2 * BLOCK)
        right = unit[: len(lower) - start, : len(lower) - start]
        inverse[rest, block] = torch.linalg.solve_triangular(lower[rest, rest], right, upper=False)
    return inverse.flip(0, 1)
