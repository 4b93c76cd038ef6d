"""Masks of one decoder layer at a time, learned against what the dense model makes of the same tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch

from ..tuner import MaskProLayer
from ..tuner.layer import members_first


# How far refinements go from the outputs of a layer's own inputs towards those of the dense model.
TOWARDS_DENSE = 0.2
STEPS, WARMUP, RATE, BETAS = 24, 4, 0.7, (0.9, 0.98)
# What is added to the inputs of every linear layer while masks are learned, in deviations of each feature: which
# features go together in the calibration text says little of other texts.
NOISE = 0.3

# Of the tokens of one batch: a decoder layer's outputs `[tokens, hidden]` under its masks or, with `True`, without,
# and what is to be added to the latter.
Example = tuple[Callable[[bool], torch.Tensor], torch.Tensor]


def learn(adapter_name: str, layers: list[MaskProLayer], examples: list[Example]) -> None:
    """
    Move the masks of a decoder layer by SIMPLE: each step samples them, and what keeping a weight is worth for one
    batch goes through the exact marginals to the logits, which Adam moves. The starting masks become the learned ones.

    Logits, moments and activations are there for this decoder layer alone, gradients for one linear layer.

    Args:
        layers (`list[MaskProLayer]`): The masked layers of the decoder layer, with starting masks.
        adapter_name (`str`): The adapter.
        examples (`list`): For every batch a function that runs the decoder layer, with or without its masks, and how
            far what it should give is from what it gives without.
    """
    thetas = [layer.maskpro_theta[adapter_name] for layer in layers]
    before = [(theta.data, theta.requires_grad) for theta in thetas]
    optimizers = {theta: torch.optim.Adam([theta], betas=BETAS) for theta in thetas}

    def move(theta: torch.Tensor) -> None:
        optimizers[theta].step()
        theta.grad = None

    for layer, theta in zip(layers, thetas, strict=True):
        theta.data = members_first(torch.zeros((), device=theta.device).expand(theta.shape))
        theta.requires_grad_(True)
        layer.train()
    handles = [theta.register_post_accumulate_grad_hook(move) for theta in thetas]
    try:
        for step, (run, way) in enumerate(islice(cycle(examples), STEPS)):
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 1 - 0.9 * step / STEPS)
            with _disturbed(layers, step):
                target = run(True) + way
                with torch.enable_grad():
                    relative_error(run(False), target).backward(inputs=thetas)
        for layer in layers:
            layer.set_initial_mask(adapter_name, layer.learned_mask(adapter_name))
    finally:
        for handle in handles:
            handle.remove()
        for layer, theta, (data, trained) in zip(layers, thetas, before, strict=True):
            theta.data = data
            theta.requires_grad_(trained)
            layer.eval()


@contextmanager
def _disturbed(layers: list[MaskProLayer], seed: int) -> Iterator[None]:
    """Give layers inputs with noise, the same at every call."""

    def disturb(layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = args[0]
        generator = torch.Generator(inputs.device).manual_seed(seed * len(layers) + numbers[layer])
        noise = torch.randn(inputs.shape, generator=generator, device=inputs.device)
        size = inputs.detach().flatten(0, -2).float().square().mean(0).sqrt()
        return (inputs + (NOISE * size * noise).to(inputs.dtype), *args[1:])

    numbers: dict[torch.nn.Module, int] = {layer: number for number, layer in enumerate(layers)}
    handles = [layer.register_forward_pre_hook(disturb) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative_error(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error, where every token counts as if its target were of size 1: a few massive ones would rule."""
    target = target.float()
    size = target.square().mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((outputs.float() - target).square().mean(1) / size).mean()
