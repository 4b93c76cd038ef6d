"""A look at one small forward pass: whether every masked weight is used by calling its layer."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from .layer import MaskProLayer
from .linear import MaskProLinear


# Of what is heard, a quarter of a second at 16 kHz: more than the stride of any feature extractor.
_SAMPLES = 4000


def tiny_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The least that a model's forward takes, by its main input: all zeros, which are a token of every vocabulary."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        inputs = {"pixel_values": torch.zeros(1, config.num_channels, *size)}
    elif model.main_input_name == "input_values":
        inputs = {"input_values": torch.zeros(1, _SAMPLES)}
    elif model.main_input_name == "input_features":
        # Whisper's encoder halves the length of what it hears, and takes no other.
        heard = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {"input_features": heard, "decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}
    else:
        inputs = {
            name: torch.zeros_like(value[:1]) for name, value in model.dummy_inputs.items() if "mask" not in name
        }
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


@torch.no_grad()
def used_without_a_call(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """
    The masked layers whose weight a forward pass uses without calling the layer, so that no mask applies.

    The pass is that of the dense model, in the mode that it is in. It leaves torch's generators as they were.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        run (`Callable`): The forward pass.
    """
    layers = [module for module in model.modules() if isinstance(module, MaskProLayer)]
    weight_of = {layer: id(layer.get_base_layer().weight) for layer in layers if isinstance(layer, MaskProLinear)}
    names = {weight_of[module]: name for name, module in model.named_modules() if module in weight_of}
    called: list[int] = []
    found: set[int] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            # A dtype or a shape may be read by anybody.
            if any(isinstance(value, torch.Tensor) for value in tree_leaves(result)):
                used = {id(value) for value in tree_leaves((args, kwargs))} & names.keys()
                found.update(used.difference(called))
            return result

    def enter(module: nn.Module, args: Any) -> None:
        if module in weight_of:
            called.append(weight_of[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in weight_of:
            called.pop()

    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), torch.compiler.set_stance("force_eager"), Watch():
        handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        for layer in layers:
            layer.dense = True
        try:
            run()
        finally:
            for layer in layers:
                layer.dense = False
            for handle in handles:
                handle.remove()
    return [name for weight, name in names.items() if weight in found]


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Let hooks of a model's modules rest: whoever counts or gathers by them is not to hear of this pass."""
    before = [(module, module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    for module, *_ in before:
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in before:
            # What a model registered within its first pass stays.
            hooks.update(module._forward_hooks)
            pre_hooks.update(module._forward_pre_hooks)
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks
