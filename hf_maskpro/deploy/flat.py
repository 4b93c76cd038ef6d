"""Inputs as 2:4 products on CUDA want them."""

from types import MethodType

import torch
from torch import nn


class FlatLinear(nn.Linear):
    """
    A linear layer that multiplies a contiguous matrix by its weight, whatever shape and strides its inputs have. Of
    others torch expands a semi-structured weight, and torchao makes scales of too many dimensions; both raise.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): `[..., in_features]`.

        Returns:
            `torch.Tensor`: `[..., out_features]`.
        """
        y = super().forward(x.reshape(-1, self.in_features).contiguous())
        return y.view(*x.shape[:-1], self.out_features)


def flatten_inputs(model: nn.Module) -> None:
    """
    Let every `nn.Linear` of a model flatten its inputs to a contiguous matrix, in place: for sparse weights that were
    put there by others, such as transformers with torchao. [`to_semi_structured`] does it by itself.

    Args:
        model (`torch.nn.Module`): The model. Subclasses of `nn.Linear` keep their own forward.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            # So it keeps its name, hooks and whatever the weight has become.
            module.__class__ = FlatLinear
            # What accelerate's hooks call is bound when they are attached.
            if "_old_forward" in vars(module):
                vars(module)["_old_forward"] = MethodType(FlatLinear.forward, module)


def own_forward(module: nn.Module) -> str | None:
    """Why a linear layer may do more than multiply by its weight, or `None` if it does not."""
    if type(module) not in (nn.Linear, FlatLinear):
        return f"{type(module).__name__} has a forward of its own"
    return None
