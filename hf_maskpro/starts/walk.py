"""The calibration walk: decoder layer by decoder layer, each seeing what the masked layers before it produce."""

import copy
from collections.abc import Callable
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

    def update(self, rows: torch.Tensor, sequences: int) -> None:
        """Add inputs `[tokens, in_features]`."""
        rows = rows.float()
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


@dataclass
class _Batch:
    """What enters the first decoder layer, the other arguments of every decoder layer, and which tokens are none."""

    hidden: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    attention_mask: torch.Tensor | None

    def run(self, block: nn.Module, index: int) -> torch.Tensor:
        args, kwargs = self.arguments[index]
        output = block(self.hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def rows(self, inputs: torch.Tensor) -> torch.Tensor:
        """A layer's inputs without padding; what is no longer one row a token, as in an expert, is left as it is."""
        rows = inputs.flatten(0, -2)
        if self.attention_mask is None or len(rows) != self.attention_mask.numel():
            return rows
        return rows[self.attention_mask.flatten() != 0]


class _StopForward(Exception):
    """Raised where the last decoder layer would run: nothing after it is wanted."""


@torch.no_grad()
def walk(
    model: nn.Module,
    adapter_name: str,
    batches: list[dict[str, Any]],
    with_gram: bool,
    choose: Callable[[str, MaskProLayer, Inputs], None],
) -> None:
    """
    Visit the masked layers in order: gather what their inputs add up to, then choose their masks.

    After a pass through the dense model, which captures the arguments of the decoder layers, each of these runs twice:
    dense to gather and masked to hand its outputs on, as in the code of Wanda, RIA and SparseGPT, so that one layer's
    activations are in memory at a time. Layers that are given the same tensor, as q, k and v are, share [`Inputs`].

    Args:
        model (`torch.nn.Module`): A model with one active mask adapter.
        adapter_name (`str`): The adapter, whose masks are chosen.
        batches (`list[dict]`): Batches for the model's forward.
        with_gram (`bool`): Gather X^T X too.
        choose (`Callable`): Sets the mask of a layer, given its name and its inputs.

    Raises:
        `ValueError`: if there is no batch, or a masked layer lies outside the decoder layers.
    """
    names = {layer: name for name, layer in masked_layers(model, adapter_name).items()}
    blocks = _decoder_layers(model, names)
    with evaluating(model):
        captured = _capture(model, blocks, batches)
        for index, block in enumerate(tqdm(blocks, desc="calibration")):
            inside = [layer for layer in block.modules() if layer in names]
            gathered = _gather(block, index, inside, captured, with_gram)
            for layer in inside:
                choose(names[layer], layer, gathered[layer])
            for batch in captured:
                batch.hidden = batch.run(block, index)
            for layer in inside:
                layer.forget_masked_weight()


def _gather(
    block: nn.Module, index: int, inside: list[MaskProLayer], batches: list[_Batch], with_gram: bool
) -> dict[MaskProLayer, Inputs]:
    """Run a decoder layer dense, and add up the inputs of the masked layers inside."""
    gathered: dict[MaskProLayer, Inputs] = {}
    # The inputs of one batch, held so that no other tensor takes a freed one's identity.
    seen: dict[MaskProLayer, list[torch.Tensor]] = {}

    def record(layer: MaskProLayer, args: tuple[torch.Tensor, ...]) -> None:
        seen.setdefault(layer, []).append(args[0])

    for layer in inside:
        layer.dense = True
    try:
        for batch in batches:
            handles = [layer.register_forward_pre_hook(record) for layer in inside]
            try:
                batch.run(block, index)
            finally:
                for handle in handles:
                    handle.remove()
            _add(gathered, seen, batch, with_gram)
            seen.clear()
    finally:
        for layer in inside:
            layer.dense = False
    # An expert that no token was sent to has seen nothing.
    return {layer: gathered.get(layer) or _nothing(layer, with_gram) for layer in inside}


def _add(
    gathered: dict[MaskProLayer, Inputs], seen: dict[MaskProLayer, list[torch.Tensor]], batch: _Batch, with_gram: bool
) -> None:
    """Add up what the layers were given with a batch; of those that shared all inputs until now, some may part."""
    before = dict(gathered)
    shared: dict[tuple[int, ...], list[MaskProLayer]] = {}
    for layer, tensors in seen.items():
        shared.setdefault((id(before.get(layer)), *map(id, tensors)), []).append(layer)
    for layers in shared.values():
        tensors, inputs = seen[layers[0]], before.get(layers[0])
        if inputs is None:
            inputs = Inputs(tensors[0].shape[-1], tensors[0].device, with_gram)
        elif any(other is inputs and layer not in layers for layer, other in before.items()):
            inputs = copy.deepcopy(inputs)
        for tensor in tensors:
            inputs.update(batch.rows(tensor), len(batch.hidden))
        gathered.update(dict.fromkeys(layers, inputs))


def _nothing(layer: MaskProLayer, with_gram: bool) -> Inputs:
    return Inputs(layer.in_features, layer.get_base_layer().weight.device, with_gram)


def _decoder_layers(model: nn.Module, names: dict[MaskProLayer, str]) -> list[nn.Module]:
    """The outermost `nn.ModuleList` that holds every masked layer."""
    outside = list(names.values())
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            inner = set(module.modules())
            left = [name for layer, name in names.items() if layer not in inner]
            if not left:
                return list(module)
            outside = min(outside, left, key=len)
    raise ValueError(
        f"calibration goes by decoder layers, and {outside[0]} lies outside of them; name it in exclude_modules."
    )


def _capture(model: nn.Module, blocks: list[nn.Module], batches: list[dict[str, Any]]) -> list[_Batch]:
    """
    What every decoder layer of the dense model is given: models that mix kinds of attention give each its own mask and
    positions.
    """
    captured: list[_Batch] = []

    def capture(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        states, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        if index == 0:
            captured.append(_Batch(states, [], None))
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        captured[-1].arguments.append((args, others))
        if index == len(blocks) - 1:
            raise _StopForward

    device = next(model.parameters()).device
    layers = [module for module in model.modules() if isinstance(module, MaskProLayer)]
    handles = [
        block.register_forward_pre_hook(partial(capture, index=index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    for layer in layers:
        layer.dense = True
    try:
        for batch in tqdm(batches, desc="reading the calibration text"):
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            with suppress(_StopForward):
                model(**inputs, use_cache=False)
            captured[-1].attention_mask = inputs.get("attention_mask")
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.dense = False
    if not captured:
        raise ValueError("the calibration data is empty; pass at least one batch.")
    return captured
