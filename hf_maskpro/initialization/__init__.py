"""Starting masks that need calibration data, one file per method, and the layer-by-layer walk that they share."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..tuner import MaskProLayer
from . import wanda


def initialize_masks(model: nn.Module, dataloader: Iterable[dict[str, Any]] | None = None) -> None:
    """
    Fill the starting masks that `MaskProConfig.init_mask` names, for every active mask adapter.

    `"magnitude"` and `"random"` are there already and are left alone.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        dataloader (`Iterable[dict]`, *optional*): Batches of calibration text, the arguments of the model's forward;
            labels are not used. Needed for `"wanda"`.

    Raises:
        `ValueError`: if the method needs data and there is none.
    """
    adapters = {
        (name, layer.maskpro_config[name].init_mask)
        for layer in model.modules()
        if isinstance(layer, MaskProLayer)
        for name in layer.active_adapters
        if name in layer.maskpro_config and not layer.maskpro_config[name].awaits_file
    }
    for name, method in sorted(adapters):
        if method == "wanda":
            if dataloader is None:
                raise ValueError("init_mask='wanda' needs calibration text; pass a dataloader.")
            wanda.initialize(model, name, dataloader)
