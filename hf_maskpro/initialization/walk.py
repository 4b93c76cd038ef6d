"""The calibration walk: decoder layer by decoder layer, each seeing what the masked layers before it produce."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ..tuner import MaskProLayer, masked_layers


class Statistics(Protocol):
    """What a method gathers about the inputs of a layer."""

    def update(self, inputs: torch.Tensor) -> None: ...


S = TypeVar("S", bound=Statistics)


class _StopForward(Exception):
    """Raised where the first decoder layer would run: its inputs are all that is wanted."""


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
    layers = masked_layers(model, adapter_name)
    blocks = _decoder_layers(model, list(layers.values()))
    was_training = model.training
    model.eval()
    inputs = _first_inputs(model, blocks[0], dataloader)
    for block in tqdm(blocks, desc="calibration"):
        inside = [module for module in block.modules() if isinstance(module, MaskProLayer)]
        statistics = {id(layer): gather(layer) for layer in inside}

        def record(module: nn.Module, args: tuple[torch.Tensor, ...], statistics: dict[int, S] = statistics) -> None:
            statistics[id(module)].update(args[0])

        handles = [layer.register_forward_pre_hook(record) for layer in inside]
        for layer in inside:
            layer._disable_adapters = True
        for args, kwargs in inputs:
            block(*args, **kwargs)
        for handle in handles:
            handle.remove()
        for layer in inside:
            layer._disable_adapters = False
            choose(layer, statistics[id(layer)])
        inputs = [((_hidden(block(*args, **kwargs)), *args[1:]), kwargs) for args, kwargs in inputs]
        for layer in inside:
            layer.train()  # drops the masked weight that eval mode keeps
    model.train(was_training)


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _decoder_layers(model: nn.Module, layers: list[MaskProLayer]) -> list[nn.Module]:
    """The longest `nn.ModuleList` that holds every masked layer."""
    wanted = {id(layer) for layer in layers}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and wanted <= {id(inner) for inner in module.modules()}:
            return list(module)
    raise ValueError("calibration needs every masked layer inside the decoder layers; narrow target_modules.")


def _first_inputs(
    model: nn.Module, first: nn.Module, dataloader: Iterable[dict[str, Any]]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments with which the first decoder layer is called, for every batch."""
    captured: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:
            args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        captured.append((args, kwargs))
        raise _StopForward

    device = next(model.parameters()).device
    handle = first.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        for batch in dataloader:
            batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            with suppress(_StopForward):
                model(**batch, use_cache=False)
    finally:
        handle.remove()
    if not captured:
        raise ValueError("the calibration dataloader is empty.")
    return captured
