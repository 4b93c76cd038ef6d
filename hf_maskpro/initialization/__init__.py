"""Starting masks: one file per rule, the layer-by-layer walk that they share, refinement, and masks from elsewhere."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..subset import mask_of, mode
from ..tuner import DATA_FREE, RULES, MaskProConfig, MaskProLayer
from ..tuner.layer import to_planes
from . import gblm, magnitude, pruner_zero, ria, sparsegpt, swaps, wanda
from .calibration import generated_text, random_windows
from .gradients import gradient_norms
from .sources import fill_masks
from .walk import Calibration, Inputs, walk


__all__ = ["generated_text", "initialize_masks", "needs_data", "random_windows"]

_SCORES = {
    "magnitude": magnitude.scores,
    "wanda": wanda.scores,
    "ria": ria.scores,
    "gblm": gblm.scores,
    "pruner-zero": pruner_zero.scores,
}


def needs_data(init_mask: str) -> bool:
    """Whether a starting mask needs calibration text."""
    rule = init_mask.removesuffix("+swaps")
    return rule != init_mask or rule in set(RULES) - set(DATA_FREE)


def initialize_masks(model: nn.Module, dataloader: Iterable[dict[str, Any]] | None = None) -> None:
    """
    Fill the starting masks that `MaskProConfig.init_mask` names, for every active mask adapter.

    `"magnitude"` and `"random"` are there already and are left alone.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        dataloader (`Iterable[dict]`, *optional*): Batches of calibration text, the arguments of the model's forward,
            for instance from [`random_windows`]. Needed by every rule but these two, and by `"+swaps"`.

    Raises:
        `ValueError`: if the method needs data and there is none, or a mask from elsewhere does not fit.
    """
    adapters = {
        name: layer.maskpro_config[name]
        for layer in model.modules()
        if isinstance(layer, MaskProLayer)
        for name in layer.active_adapters
        if name in layer.maskpro_config and not layer.maskpro_config[name].awaits_file
    }
    batches = None if dataloader is None else list(dataloader)
    for name, config in adapters.items():
        if needs_data(config.init_mask) and batches is None:
            raise ValueError(f"init_mask={config.init_mask!r} needs calibration text; pass a dataloader.")
        _initialize(model, name, config, batches or [])


def _initialize(model: nn.Module, adapter_name: str, config: MaskProConfig, batches: list[dict[str, Any]]) -> None:
    rule = config.init_mask.removesuffix("+swaps")
    refine = rule != config.init_mask
    if rule not in RULES:
        fill_masks(model, adapter_name, rule)
    if not needs_data(config.init_mask):
        return
    gradients = gradient_norms(model, adapter_name, batches) if rule in ("gblm", "pruner-zero") else {}
    error_left: list[float] = []

    def choose(name: str, layer: MaskProLayer, inputs: Inputs) -> None:
        weight = layer.out_in(layer.get_base_layer().weight.detach()).float()
        calibration = Calibration(inputs, gradients.get(name))
        if rule == "sparsegpt":
            mask = sparsegpt.mask(weight, calibration, config.n, config.m)
        elif rule in _SCORES:
            mask = mode(to_planes(_SCORES[rule](weight, calibration), config.m), config.n)
        elif rule == "random":
            mask = mode(to_planes(torch.rand_like(weight), config.m), config.n)
        else:
            mask = mask_of(layer.initial_codes(adapter_name), config.m)
        if refine:
            assert inputs.gram is not None
            before = swaps.reconstruction_error(weight, mask, inputs.gram).sum()
            mask = swaps.refine(weight, mask, inputs.gram)
            after = swaps.reconstruction_error(weight, mask, inputs.gram).sum()
            error_left.append((after / before).item())
        layer.set_initial_mask(adapter_name, mask)

    walk(model, adapter_name, batches, refine or rule == "sparsegpt", choose)
    config.start["calibration"] = {
        "sequences": sum(len(batch["input_ids"]) for batch in batches),
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
    }
    if refine:
        # Of what every layer's outputs lose, the share that the swaps left: median and worst layer.
        left = torch.tensor(error_left)
        config.start["error_left"] = {"median": left.median().item(), "largest": left.max().item()}
