"""Wanda (Sun et al., 2023, arXiv 2306.11695): keep the largest |W_ij| * ||X_j||."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..subset import mode
from ..tuner.layer import MaskProLayer, to_planes
from .walk import walk


class InputNorms:
    """Sums the squares of every input feature over all tokens that a layer sees, in float32."""

    def __init__(self, layer: MaskProLayer):
        weight = layer.out_in(layer.get_base_layer().weight)
        self.squares = torch.zeros(weight.shape[1], device=weight.device)

    def update(self, inputs: torch.Tensor) -> None:
        self.squares += inputs.flatten(0, -2).float().square().sum(0)


def scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """`|W_ij| * ||X_j||`, float32 `[out_features, in_features]`."""
    return weight.float().abs() * norms


def initialize(model: nn.Module, adapter_name: str, dataloader: Iterable[dict[str, Any]]) -> None:
    """Fill the starting masks of an adapter."""

    def choose(layer: MaskProLayer, statistics: InputNorms) -> None:
        config = layer.maskpro_config[adapter_name]
        score = scores(layer.out_in(layer.get_base_layer().weight.detach()), statistics.squares.sqrt())
        layer.set_initial_mask(adapter_name, mode(to_planes(score, config.m), config.n))

    walk(model, adapter_name, dataloader, InputNorms, choose)
