"""Wanda (Sun et al., 2023, arXiv 2306.11695): keep the largest |W_ij| * ||X_j||."""

import torch

from .walk import Calibration


def scores(weight: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """`|W_ij| * ||X_j||`, of float32 `[out_features, in_features]`."""
    assert calibration.inputs is not None
    return weight.abs() * calibration.inputs.squares.sqrt()
