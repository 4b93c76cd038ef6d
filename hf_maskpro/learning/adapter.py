"""The adapter that is trained: its layers, and the masks that they can apply."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..tuner import MaskProConfig, MaskProLayer, masked_layers


# Makes of a layer's weight what its forward multiplies by, given the layer's index and the layer.
MaskWeight = Callable[[int, MaskProLayer, torch.Tensor], torch.Tensor]


@dataclass
class TrainedAdapter:
    """
    The one active mask adapter of a model.

    Attributes:
        name (`str`): Its name.
        config ([`MaskProConfig`]): Its configuration.
        layers (`list[MaskProLayer]`): The layers that it masks, in the model's order.
    """

    name: str
    config: MaskProConfig
    layers: list[MaskProLayer]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """
        Raises:
            `ValueError`: if the model has none or several, or the adapter is disabled, merged, offloaded or was loaded
                for inference.
        """
        layers = [layer for layer in model.modules() if isinstance(layer, MaskProLayer)]
        names = {name for layer in layers for name in layer.active_adapters}
        if len(names) != 1:
            raise ValueError(
                f"the model has {len(names)} active mask adapters, and one is trained at a time; "
                "add one with get_peft_model, or choose one with set_adapter."
            )
        name = names.pop()
        masked = list(masked_layers(model, name).values())
        if masked[0].disable_adapters or masked[0].merged:
            state, remedy = ("merged", "call unmerge_adapter()") if masked[0].merged else ("disabled", "enable it")
            raise ValueError(f"adapter {name!r} is {state}, so it would learn nothing; {remedy} first.")
        if not masked[0].maskpro_theta[name].requires_grad:
            raise ValueError(f"adapter {name!r} was loaded for inference; load it with is_trainable=True.")
        if any(layer.maskpro_theta[name].is_meta for layer in masked):
            raise ValueError(
                f"adapter {name!r} has logits that are offloaded, which cannot be trained; load the model without "
                "device_map and without cpu_offload, or quantized where it does not fit."
            )
        return cls(name, masked[0].maskpro_config[name], masked)

    def thetas(self) -> list[nn.Parameter]:
        """The trained offsets of the logits, layer by layer."""
        return [layer.maskpro_theta[self.name] for layer in self.layers]

    def has_moved(self) -> bool:
        """Whether any logit is elsewhere than at the start."""
        return any(bool(theta.any()) for theta in self.thetas())

    def digest(self, logits: bool) -> int:
        """A hash of the bits of all starting masks and, if asked for, of all logits, 63 bits."""
        found = hashlib.blake2b(digest_size=8)
        for layer, theta in zip(self.layers, self.thetas(), strict=True):
            for tensor in (layer.maskpro_mask[self.name], *[theta.detach()] * logits):
                # One number a row and member, since what cancels out within all of a layer would not be seen.
                found.update(torch.hash_tensor(tensor, -1).cpu().numpy().tobytes())
        return int.from_bytes(found.digest()) >> 1

    def groups(self) -> int:
        """How many groups the layers have together."""
        return sum(theta.shape[0] * theta.shape[2] for theta in self.thetas())

    @contextmanager
    def masks(self, choose: MaskWeight, keep: bool = False) -> Iterator[None]:
        """
        Let every layer multiply by what `choose` makes of its weight. To `keep` that until the end takes the memory of
        another model, and spares choosing again at every token that is generated.
        """
        modes = [layer.training for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.train()
            chosen = partial(choose, index, layer)
            layer.choose_mask = cache(chosen) if keep else chosen
        try:
            yield
        finally:
            for layer, mode in zip(self.layers, modes, strict=True):
                layer.choose_mask = None
                layer.train(mode)

    @torch.no_grad()
    def prefer_large_weights(self, index: int, gradient: torch.Tensor, strength: float) -> None:
        """
        Subtract from the gradient of a layer's theta, in place, that of a reward for the squares of the kept weights.

        Args:
            index (`int`): The layer's.
            gradient (`torch.Tensor`): That of the loss.
            strength (`float`): The norm of what is subtracted, as a share of that of the gradient.
        """
        found = self.layers[index].magnitude_gradient(self.name)
        if isinstance(gradient, DTensor):
            mesh, placements = gradient.device_mesh, gradient.placements
            size, steps = gradient.shape, gradient.stride()
            found = DTensor.from_local(found, mesh, placements, run_check=False, shape=size, stride=steps)
        if self.layers[index].experts > 1:
            # One that no token has reached stays as it is.
            found = found.where(gradient != 0, 0)
        norm, of_reward = (torch.linalg.vector_norm(known, dtype=torch.float32) for known in (gradient, found))
        # Of weights that are all zero none is large.
        share = torch.where(of_reward > 0, strength * norm / of_reward, 0)
        gradient.addcmul_(found, share.to(found.dtype), value=-1)

    def mode(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        """The weight under the learned mask."""
        return layer.masked(weight, self.name)

    def initial(self, index: int, layer: MaskProLayer, weight: torch.Tensor) -> torch.Tensor:
        """The weight under the starting mask."""
        return layer.initially_masked(weight, self.name)

    def changed_groups(self) -> float:
        """Share of all groups whose learned mask has left the starting mask."""
        return self.share_that_differs(lambda index, layer: layer.mode_codes(self.name))

    def share_that_differs(self, choose: Callable[[int, MaskProLayer], torch.Tensor]) -> float:
        """Share of all groups in which masks, given as codes, differ from the starting mask."""
        differ = torch.zeros((), dtype=torch.int64, device=self.thetas()[0].device)
        for index, layer in enumerate(self.layers):
            differ += (choose(index, layer) != layer.initial_codes(self.name)).sum().to(differ.device)
        return differ.item() / self.groups()
