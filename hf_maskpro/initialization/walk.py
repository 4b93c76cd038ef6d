"""The calibration walk: decoder layer by decoder layer, each seeing what the masked layers before it produce."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ..tuner import MaskProLayer, evaluating, masked_layers


class Statistics(Protocol):
    """What a method gathers about the inputs of a layer."""

    def update(self, inputs: torch.Tensor) -> None: ...


S = TypeVar("S", bound=Statistics)


class _StopForward(Exception):
    """Raised where the last decoder layer would run: nothing after it is wanted."""


@torch.no_grad()
def walk(
    model: nn.Module,
    adapter_name: str,
    dataloader: Iterable[dict[str, Any]],
    gather: Callable[[MaskProLayer], S],
    choose: Callable[[MaskProLayer, S], None],
) -> None:
    """
    Visit the masked layers in order: gather statistics of their inputs, then choose their masks.

    Every decoder layer runs twice, dense to gather and masked to hand its outputs on, so that one layer's
    activations are in memory at a time.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        adapter_name (`str`): The adapter whose masks are chosen.
        dataloader (`Iterable[dict]`): Batches for the model's forward.
        gather (`Callable`): Makes the empty statistics of a layer.
        choose (`Callable`): Sets the mask of a layer from its statistics.

    Raises:
        `ValueError`: if the dataloader is empty, or the masked layers lie outside the decoder layers.
    """
    blocks = _decoder_layers(model, list(masked_layers(model, adapter_name).values()))
    with evaluating(model):
        hidden, arguments = _capture(model, blocks, dataloader)
        for block, block_arguments in zip(tqdm(blocks, desc="calibration"), arguments, strict=True):
            inside = [m for m in block.modules() if isinstance(m, MaskProLayer) and adapter_name in m.maskpro_config]
            statistics = {id(layer): gather(layer) for layer in inside}

            def record(
                layer: nn.Module, args: tuple[torch.Tensor, ...], statistics: dict[int, S] = statistics
            ) -> None:
                statistics[id(layer)].update(args[0])

            handles = [layer.register_forward_pre_hook(record) for layer in inside]
            for layer in inside:
                layer.dense = True
            for states, (args, kwargs) in zip(hidden, block_arguments, strict=True):
                block(states, *args, **kwargs)
            for handle in handles:
                handle.remove()
            for layer in inside:
                layer.dense = False
                choose(layer, statistics[id(layer)])
            hidden = [
                _hidden(block(states, *args, **kwargs))
                for states, (args, kwargs) in zip(hidden, block_arguments, strict=True)
            ]
            for layer in inside:
                layer.forget_masked_weight()


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _decoder_layers(model: nn.Module, layers: list[MaskProLayer]) -> list[nn.Module]:
    """The longest `nn.ModuleList` that holds every masked layer."""
    wanted = {id(layer) for layer in layers}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and wanted <= {id(inner) for inner in module.modules()}:
            return list(module)
    raise ValueError("calibration needs every masked layer inside the decoder layers; narrow target_modules.")


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _capture(
    model: nn.Module, blocks: list[nn.Module], dataloader: Iterable[dict[str, Any]]
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
        for batch in dataloader:
            batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            with suppress(_StopForward):
                model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.dense = False
    if not hidden:
        raise ValueError("the calibration dataloader is empty.")
    return hidden, arguments


def _with_index(
    capture: Callable[..., None], index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    capture(block, args, kwargs, index)
