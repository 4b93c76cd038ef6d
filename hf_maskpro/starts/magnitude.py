"""Magnitude (Han et al., 2015, arXiv 1506.02626): keep the largest |W_ij|."""

import torch

from .walk import Calibration


def scores(weight: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """`|W_ij|`, of float32 `[out_features, in_features]`."""
    return weight.abs()
