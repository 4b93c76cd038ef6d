"""Masks of one decoder layer at a time, learned against what the dense model makes of the same tokens."""

from collections.abc import Callable
from itertools import cycle, islice

import torch

from ..tuner import MaskProLayer
from ..tuner.layer import members_first


STEPS, WARMUP, RATE, BETAS = 64, 10, 0.4, (0.9, 0.98)
# The gradient of one logit is far below Adam's own epsilon, which would then set the size of a step.
EPSILON = 1e-12

# Of the tokens of one batch: a decoder layer's outputs `[tokens, hidden]` under its masks, and what the dense model
# has in their place.
Example = tuple[Callable[[], torch.Tensor], torch.Tensor]


def learn(adapter_name: str, layers: list[MaskProLayer], examples: list[Example]) -> None:
    """
    Move the masks of a decoder layer by SIMPLE: each step samples them, and what keeping a weight is worth for one
    batch goes through the exact marginals to the logits, which Adam moves. The starting masks become the learned ones.

    Logits, moments and activations are there for this decoder layer alone, gradients for one linear layer.

    Args:
        layers (`list[MaskProLayer]`): The masked layers of the decoder layer, with starting masks.
        adapter_name (`str`): The adapter.
        examples (`list`): For every batch a function that runs the decoder layer, and what it should give.
    """
    thetas = [layer.maskpro_theta[adapter_name] for layer in layers]
    before = [(theta.data, theta.requires_grad) for theta in thetas]
    optimizers = {theta: torch.optim.Adam([theta], betas=BETAS, eps=EPSILON) for theta in thetas}

    def move(theta: torch.Tensor) -> None:
        optimizers[theta].step()
        theta.grad = None

    for layer, theta in zip(layers, thetas, strict=True):
        theta.data = members_first(torch.zeros((), device=theta.device).expand(theta.shape))
        theta.requires_grad_(True)
        layer.train()
    handles = [theta.register_post_accumulate_grad_hook(move) for theta in thetas]
    try:
        for step, (run, target) in enumerate(islice(cycle(examples), STEPS)):
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 1 - 0.9 * step / STEPS)
            with torch.enable_grad():
                # By the width, since in float16 the gradient of a mean over tokens and features would be none.
                (target.shape[1] * relative_error(run(), target)).backward(inputs=thetas)
        for layer in layers:
            layer.set_initial_mask(adapter_name, layer.learned_mask(adapter_name))
    finally:
        for handle in handles:
            handle.remove()
        for layer, theta, (data, trained) in zip(layers, thetas, before, strict=True):
            theta.data = data
            theta.requires_grad_(trained)
            layer.eval()


def relative_error(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error, where every token counts as if its target were of size 1: a few massive ones would rule."""
    target = target.float()
    size = target.square().mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((outputs.float() - target).square().mean(1) / size).mean()
