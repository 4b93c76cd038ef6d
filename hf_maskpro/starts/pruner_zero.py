"""Pruner-Zero (Dong et al., 2024, arXiv 2406.02924): a metric found by symbolic search."""

import torch

from .walk import Calibration


def scores(weight: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """`W_ij^2 * minmax(|G_ij|)` with `minmax` over the layer, of float32 `[out_features, in_features]`."""
    assert calibration.gradient is not None
    low, high = calibration.gradient.aminmax()
    return weight.square() * ((calibration.gradient - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny))
