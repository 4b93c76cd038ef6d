"""A look at small forward passes: whether every masked weight is used by calling its layer, and only so."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from .experts import MaskProExperts
from .layer import MaskProLayer, over
from .linear import MaskProLinear, is_ordinary


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


@dataclass
class Findings:
    """
    How forward passes used the masked layers of a model, by their names.

    Attributes:
        unseen (`list[str]`): Those that no pass has called.
        uncalled (`list[str]`): Those whose weight was used without calling them, so that no mask applies.
        unlike (`list[str]`): Those that compute something else under a mask than with the masked weight merged, or
            whatever their weight is.
    """

    unseen: list[str]
    uncalled: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)


def tiny_passes(model: nn.Module, findings: Findings) -> Exception | None:
    """
    Run a model on tiny inputs, and the models inside of it that this does not reach, as towers for images.

    Returns:
        What the first pass that failed raised.
    """
    error = None
    for prefix, inner in model.named_modules():
        reached = not any(name.startswith(prefix and f"{prefix}.") for name in findings.unseen)
        if isinstance(inner, PreTrainedModel) and not reached:
            try:
                inner(**tiny_inputs(inner))
            # A model may need other inputs; a skeleton, as merging makes one, computes nothing at all.
            except Exception as failure:
                error = error or failure
    return error


def _goes_not_by_its_weight(
    module: Any, args: Any, kwargs: Any, forked: Callable[[], AbstractContextManager[None]]
) -> bool:
    """Whether a module computes something else with a weight put over its own than with it merged, or the same."""
    if isinstance(module, MaskProExperts):
        base, weights = module.base_layer, {layer.parameter_name: layer.base_weight for layer in module.masked()}
    # What calling a plain layer comes to is known.
    elif module.is_plain():
        return False
    else:
        base, weights = module.get_base_layer(), {"weight": module.base_weight}
    # Of a quantized one the mask is merged into others, and FSDP may have taken it away again.
    if any(weight.is_meta or not is_ordinary(weight) for weight in weights.values()):
        return False
    # Of weights and inputs that are zero the outputs would not tell; and no mask may be there yet.
    others = {name: weight.detach() - 1 for name, weight in weights.items()}
    args, kwargs = tree_map(
        lambda value: (
            torch.rand_like(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        ),
        (args, kwargs),
    )
    with forked(), over(base, others):
        masked = base(*args, **kwargs)
    with forked():
        merged = functional_call(base, others, args, kwargs)
    with forked():
        own = base(*args, **kwargs)
    return not _are_close(masked, merged) or _are_close(masked, own)


def _are_close(these: Any, those: Any) -> bool:
    try:
        torch.testing.assert_close(tree_leaves(these), tree_leaves(those), equal_nan=True)
    except AssertionError:
        return False
    return True


@contextmanager
def watching(model: nn.Module) -> Iterator[Findings]:
    """
    Look at the forward passes that are run meanwhile, of the dense model in the mode that it is in. They leave torch's
    generators as they were.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, MaskProLayer)]
    # What is called with inputs, and the names of the weights that it masks.
    masking: dict[nn.Module, dict[int, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskProLinear):
            masking[module] = {id(module.get_base_layer().weight): name}
        elif isinstance(module, MaskProExperts):
            masking[module] = {id(layer.base_weight): f"{name}.{layer.parameter_name}" for layer in module.masked()}
    names = {weight: name for weights in masking.values() for weight, name in weights.items()}
    findings = Findings(list(names.values()))
    called: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            # A dtype or a shape may be read by anybody.
            if any(isinstance(value, torch.Tensor) for value in tree_leaves(result)):
                used = {id(value) for value in tree_leaves((args, kwargs))} & names.keys()
                uncalled = {names[weight] for weight in used.difference(called)}
                findings.uncalled += uncalled.difference(findings.uncalled)
            return result

    def enter(module: nn.Module, args: Any) -> None:
        called.extend(masking.get(module, ()))

    # After an error torch calls it without the keyword arguments.
    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if not isinstance(module, (MaskProLinear, MaskProExperts)):
            return
        inside = list(masking[module].values())
        # A layer of an expert may be called for no token at all; and after an error nothing has come out.
        tokens = all(value.numel() for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
        if inside[0] in findings.unseen and output is not None and tokens:
            findings.unseen = [name for name in findings.unseen if name not in inside]
            if _goes_not_by_its_weight(module, args, kwargs, forked):
                findings.unlike += inside
        del called[-len(inside) :]

    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    forked = partial(torch.random.fork_rng, list(devices))
    with torch.no_grad(), forked(), torch.compiler.set_stance("force_eager"), Watch():
        handles = (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, with_kwargs=True, always_call=True),
        )
        for layer in layers:
            layer.dense = True
        try:
            yield findings
        finally:
            for layer in layers:
                layer.dense = False
            for handle in handles:
                handle.remove()


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
