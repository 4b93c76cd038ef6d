"""The calibration walk: decoder layer by decoder layer, each seeing what the masked layers before it produce."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..tuner import MaskProLayer, evaluating, masked_layers


class Inputs:
    """
    What a layer's inputs X of shape `[tokens, in_features]` add up to, in float32.

    Attributes:
        squares (`torch.Tensor`): Sum of the squares of every feature, `[in_features]`.
        gram (`torch.Tensor` or `None`): X^T X, `[in_features, in_features]`, if asked for.
        sequences (`int`): How many sequences the tokens came in.
    """

    def __init__(self, in_features: int, device: torch.device, with_gram: bool):
        self.squares = torch.zeros(in_features, device=device)
        self.gram = torch.zeros(in_features, in_features, device=device) if with_gram else None
        self.sequences = 0

    def update(self, inputs: torch.Tensor, sequences: int) -> None:
        rows = inputs.flatten(0, -2).float()
        self.sequences += sequences
        if self.gram is None:
            self.squares += rows.square().sum(0)
        else:
            self.gram.addmm_(rows.T, rows)
            self.squares = self.gram.diagonal()


@dataclass
class Calibration:
    """
    What a rule may look at beside the weight.

    Attributes:
        inputs (`Inputs`, *optional*): Of the layer.
        gradient (`torch.Tensor`, *optional*): L2 norm over the sequences of the gradient of every weight of the dense
            model, float32 `[out_features, in_features]`.
    """

    inputs: Inputs | None = None
    gradient: torch.Tensor | None = None


class _StopForward(Exception):
    """Raised where the last decoder layer would run: nothing after it is wanted."""


@torch.no_grad()
def walk(
    model: nn.Module,
    adapter_name: str,
    batches: Iterable[dict[str, Any]],
    with_gram: bool,
    choose: Callable[[str, MaskProLayer, Inputs], None],
) -> None:
    """
    Visit the masked layers in order: gather what their inputs add up to, then choose their masks.

    Every decoder layer runs twice, dense to gather and masked to hand its outputs on, as in the code of Wanda, RIA and
    SparseGPT, so that one layer's activations are in memory at a time. Layers that are given the same tensor, as q, k
    and v are, share one [`Inputs`].

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        adapter_name (`str`): The adapter whose masks are chosen.
        batches (`Iterable[dict]`): Batches for the model's forward.
        with_gram (`bool`): Gather X^T X too.
        choose (`Callable`): Sets the mask of a layer, given its name and its inputs.

    Raises:
        `ValueError`: if there is no batch, or the masked layers lie outside the decoder layers.
    """
    names = {layer: name for name, layer in masked_layers(model, adapter_name).items()}
    blocks = _decoder_layers(model, list(names))
    with evaluating(model):
        hidden, arguments = _capture(model, blocks, batches)
        for block, block_arguments in zip(tqdm(blocks, desc="calibration"), arguments, strict=True):
            inside = [layer for layer in block.modules() if layer in names]
            gathered = _gather(block, inside, hidden, block_arguments, with_gram)
            for layer in inside:
                choose(names[layer], layer, gathered[layer])
            hidden = [
                _hidden(block(states, *args, **kwargs))
                for states, (args, kwargs) in zip(hidden, block_arguments, strict=True)
            ]
            for layer in inside:
                layer.forget_masked_weight()


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _gather(
    block: nn.Module,
    inside: list[MaskProLayer],
    hidden: list[torch.Tensor],
    arguments: list[Arguments],
    with_gram: bool,
) -> dict[MaskProLayer, Inputs]:
    """Run a decoder layer dense, and add up the inputs of the masked layers inside."""
    gathered: dict[MaskProLayer, Inputs] = {}
    # The inputs of one batch, held so that no other tensor takes a freed one's identity.
    seen: list[tuple[torch.Tensor, Inputs]] = []

    def record(layer: MaskProLayer, args: tuple[torch.Tensor, ...], sequences: int) -> None:
        tensor = args[0]
        shared = next((inputs for other, inputs in seen if other is tensor), None)
        if layer not in gathered:
            gathered[layer] = shared or Inputs(tensor.shape[-1], tensor.device, with_gram)
        if shared is None:
            gathered[layer].update(tensor, sequences)
            seen.append((tensor, gathered[layer]))

    for layer in inside:
        layer.dense = True
    try:
        for states, (args, kwargs) in zip(hidden, arguments, strict=True):
            handles = [layer.register_forward_pre_hook(partial(_with, record, len(states))) for layer in inside]
            try:
                block(states, *args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            seen.clear()
    finally:
        for layer in inside:
            layer.dense = False
    # An expert that no token was sent to has seen nothing.
    return {layer: gathered.get(layer) or _nothing(layer, with_gram) for layer in inside}


def _nothing(layer: MaskProLayer, with_gram: bool) -> Inputs:
    return Inputs(layer.in_features, layer.get_base_layer().weight.device, with_gram)


def _with(record: Callable[..., None], sequences: int, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    record(layer, args, sequences)


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _decoder_layers(model: nn.Module, layers: list[MaskProLayer]) -> list[nn.Module]:
    """The longest `nn.ModuleList` that holds every masked layer."""
    wanted = {id(layer) for layer in layers}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and wanted <= {id(inner) for inner in module.modules()}:
            return list(module)
    raise ValueError("calibration needs every masked layer inside the decoder layers; narrow target_modules.")


def _capture(
    model: nn.Module, blocks: list[nn.Module], batches: Iterable[dict[str, Any]]
) -> tuple[list[torch.Tensor], list[list[Arguments]]]:
    """
    The hidden states that enter the first decoder layer, for every batch, and the other arguments of every decoder
    layer: models that mix kinds of attention give each its own mask and positions.
    """
    hidden: list[torch.Tensor] = []
    arguments: list[list[Arguments]] = [[] for _ in blocks]

    def capture(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        states, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        arguments[index].append((args, {name: value for name, value in kwargs.items() if name != "hidden_states"}))
        if index == 0:
            hidden.append(states)
        if index == len(blocks) - 1:
            raise _StopForward

    device = next(model.parameters()).device
    layers = [module for module in model.modules() if isinstance(module, MaskProLayer)]
    handles = [
        block.register_forward_pre_hook(partial(_with_index, capture, index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    for layer in layers:
        layer.dense = True
    try:
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            with suppress(_StopForward):
                model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.dense = False
    if not hidden:
        raise ValueError("the calibration data is empty.")
    return hidden, arguments


def _with_index(
    capture: Callable[..., None], index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    capture(block, args, kwargs, index)
