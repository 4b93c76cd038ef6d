"""SparseGPT (Frantar & Alistarh, 2023, arXiv 2301.00774): the mask alone, chosen while the kept weights make up."""

import torch

from ..subset import mode
from ..tuner.layer import to_planes
from .walk import Calibration


DAMPING = 0.01
BLOCK = 128


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
    # The inverse of what massive activations make of H is beyond float32.
    weight, hessian = weight.clone(), calibration.inputs.gram.double()
    diagonal = hessian.diagonal()
    # A feature that is always zero can be dropped at no cost.
    unused = diagonal == 0
    weight[:, unused] = 0
    diagonal[unused] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    groups = weight.shape[1] // m
    keep = torch.zeros(weight.shape[0], m, groups, dtype=torch.bool, device=weight.device)
    # The columns beyond a block are updated once per block, by one product.
    per_block = max(1, BLOCK // m)
    for first in range(0, groups, per_block):
        start, end = first * m, min(first + per_block, groups) * m
        errors = torch.empty(weight.shape[0], end - start, device=weight.device)
        for j in range(start, end):
            group, member = divmod(j, m)
            if member == 0:
                score = (weight[:, j : j + m] / factor.diagonal()[j : j + m]).square()
                keep[:, :, group] = mode(to_planes(score, m), n)[:, :, 0]
            dropped = torch.where(keep[:, member, group], 0, weight[:, j])
            error = dropped / factor[j, j]
            weight[:, j:end] -= error.unsqueeze(1) * factor[j, j:end]
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return keep
