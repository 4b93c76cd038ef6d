"""Gradients of the dense model's loss, for the rules that look at them."""

from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from ..tuner import MaskProLayer, evaluating, masked_layers
from ..tuner.base import is_quantized
from .batches import sequences_in, without_cache


def gradient_norms(model: nn.Module, adapter_name: str, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """
    L2 norm over the sequences of the gradient of every masked layer's weight, in the dense model.

    A gradient is squared and freed as soon as the backward pass has made it, so that what is kept is one float32 per
    weight.

    Args:
        model (`torch.nn.Module`): A model with a mask adapter.
        adapter_name (`str`): The adapter whose layers are looked at.
        batches (`list[dict]`): Batches for the model's forward; a text without labels is its own.

    Returns:
        `dict[str, torch.Tensor]`: float32 `[out_features, in_features]` by layer.

    Raises:
        `ValueError`: if a layer is quantized.
    """
    layers = masked_layers(model, adapter_name)
    weights = {name: layer.base_weight for name, layer in layers.items()}
    if quantized := [name for name, weight in weights.items() if is_quantized(weight)]:
        raise ValueError(f"{quantized[0]} is quantized, and has no gradient; calibrate by wanda, ria or sparsegpt.")
    # Layers may share a weight, which then has one gradient.
    squares = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights.values()}
    every_layer = [module for module in model.modules() if isinstance(module, MaskProLayer)]
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = []
    try:
        for parameter in trained:
            parameter.requires_grad_(parameter in squares)
        for weight, square in squares.items():
            handles.append(weight.register_post_accumulate_grad_hook(partial(_add_and_free, square)))
        for layer in every_layer:
            layer.dense = True
        device = next(model.parameters()).device
        sequences = [
            {key: value if isinstance(value, bool) else value[i : i + 1] for key, value in batch.items()}
            for batch in batches
            for i in range(sequences_in(batch))
        ]
        with evaluating(model), torch.enable_grad():
            for sequence in tqdm(sequences, desc="gradients"):
                sequence = send_to_device(sequence, device)
                model(**_with_labels(sequence) | without_cache(model)).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in trained.items():
            parameter.requires_grad_(required)
        for layer in every_layer:
            layer.dense = False
    for square in squares.values():
        square.sqrt_()
    return {name: layer.out_in(squares[weights[name]]) for name, layer in layers.items()}


def _add_and_free(square: torch.Tensor, weight: torch.Tensor) -> None:
    assert weight.grad is not None
    square += weight.grad.float().square()
    weight.grad = None


def _with_labels(sequence: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "labels" in sequence:
        return sequence
    if "input_ids" not in sequence:
        raise ValueError(f"a batch of {', '.join(sequence)} has no loss; give it labels.")
    labels = sequence["input_ids"]
    if "attention_mask" in sequence:
        labels = labels.masked_fill(sequence["attention_mask"] == 0, -100)
    return {**sequence, "labels": labels}
