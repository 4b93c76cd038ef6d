"""Gradients of the dense model's loss, for the rules that look at them."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..tuner import evaluating, masked_layers


def gradient_norms(model: nn.Module, adapter_name: str, batches: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """
    L2 norm over the sequences of the gradient of every masked layer's weight, in the dense model.

    A gradient is squared and freed as soon as the backward pass has made it, so that what is kept is one float32 per
    weight.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        adapter_name (`str`): The adapter whose layers are looked at.
        batches (`Iterable[dict]`): Batches for the model's forward; without labels a text is its own.

    Returns:
        `dict[str, torch.Tensor]`: float32 `[out_features, in_features]` by layer.
    """
    layers = masked_layers(model, adapter_name)
    squares = {
        name: torch.zeros_like(layer.get_base_layer().weight, dtype=torch.float32) for name, layer in layers.items()
    }

    def add(name: str, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        squares[name] += weight.grad.float().square()
        weight.grad = None

    handles, trained = [], []
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        if not weight.requires_grad:
            trained.append(weight.requires_grad_(True))
        handles.append(weight.register_post_accumulate_grad_hook(partial(add, name)))
        layer.dense = True
    device = next(model.parameters()).device
    sequences = [
        {key: value[i : i + 1].to(device) for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    try:
        with evaluating(model), torch.enable_grad():
            for sequence in tqdm(sequences, desc="gradients"):
                labels = {} if "labels" in sequence else {"labels": sequence["input_ids"]}
                model(**sequence, **labels, use_cache=False).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for weight in trained:
            weight.requires_grad_(False)
        for layer in layers.values():
            layer.dense = False
    return {name: layer.out_in(squares[name]).sqrt() for name, layer in layers.items()}
