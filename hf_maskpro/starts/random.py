"""Uniform draws: every mask is as likely as any other."""

import torch

from .walk import Calibration


def scores(weight: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """Independent of weight and inputs; drawn on the CPU, so that a seed means the same on every device."""
    return torch.rand(weight.shape, device="cpu").to(weight.device)
