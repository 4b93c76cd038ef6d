"""RIA, relative importance and activations (Zhang et al., Plug-and-Play, ICLR 2024)."""

import torch

from .walk import Calibration


def scores(weight: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """`(|W_ij| / sum of row i + |W_ij| / sum of column j) * ||X_j||^0.5`, of float32 `[out_features, in_features]`."""
    assert calibration.inputs is not None
    size = weight.abs()
    # A row or column of zeros is as unimportant as its weights: 0 / 0 must not become NaN.
    smallest = torch.finfo(size.dtype).tiny
    relative = size / size.sum(1, keepdim=True).clamp(min=smallest) + size / size.sum(0).clamp(min=smallest)
    return relative * calibration.inputs.squares.pow(0.25)
