"""The masked forms of the linear layers that there are."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .base import is_of_bitsandbytes, is_quantized
from .layer import MaskProLayer


class MaskProLinear(MaskProLayer):
    """A masked `nn.Linear`."""

    base_forward = nn.Linear.forward

    def is_plain(self) -> bool:
        base = self.base_layer
        hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        forward, patched = type(base).forward, "forward" in vars(base)
        known = forward is type(self).base_forward
        if is_of_bitsandbytes(self.base_weight):
            # Its forwards take no other weight, but what they compute is known; accelerate's hook has nothing to move.
            known, patched = forward.__module__.startswith("bitsandbytes."), patched and "_hf_hook" not in vars(base)
        return known and type(base).__call__ is nn.Module.__call__ and not (hooks or patched)

    def out_in(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, self.base_layer.bias)

    def __repr__(self) -> str:
        return "maskpro." + super().__repr__()


class MaskProConv1DLinear(MaskProLinear):
    """
    A masked `transformers.pytorch_utils.Conv1D`, GPT-2's linear layer with a transposed weight.

    PEFT knows a masked linear layer by the word in its class's name.
    """

    base_forward = Conv1D.forward

    def out_in(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        bias = self.get_base_layer().bias
        return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.shape[1])


# Subclasses of these compute in ways of their own.
PLAIN = (torch.Tensor, nn.Parameter)


def is_ordinary(weight: torch.Tensor) -> bool:
    """Whether a weight is a plain matrix of numbers of two bytes or more, as no quantized one is."""
    return type(weight) in PLAIN and weight.is_floating_point() and weight.dtype.itemsize > 1


def layer_class(module: nn.Module) -> type[MaskProLinear] | None:
    """The class that masks a module, or `None` if there is none."""
    # nn.MultiheadAttention reads the weight of its output projection and never calls it.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear) and (is_ordinary(module.weight) or is_quantized(module.weight)):
        return MaskProLinear
    if isinstance(module, Conv1D):
        return MaskProConv1DLinear
    return None
