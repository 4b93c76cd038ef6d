"""GBLM-Pruner (Das et al., 2023, arXiv 2311.04902): Wanda and the gradient of the dense model's loss."""

import torch

from .walk import Calibration


ALPHA = 100.0


def scores(weight: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """
    `|W_ij| * (||X_j|| + 100 ||G_ij||)`, of float32 `[out_features, in_features]`.

    As in the authors' code, `||X_j||` is the root of the mean over sequences of its square, and `||G_ij||` the norm of
    the gradients of the single sequences.
    """
    assert calibration.inputs is not None
    assert calibration.gradient is not None
    norms = (calibration.inputs.squares / max(1, calibration.inputs.sequences)).sqrt()
    return weight.abs() * (norms + ALPHA * calibration.gradient)
