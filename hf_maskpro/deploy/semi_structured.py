"""2:4 weights as torch's semi-structured tensors, on sparse tensor cores."""

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .check import linear_names, violation
from .flat import flatten_inputs, own_forward


def to_semi_structured(model: nn.Module, min_weights: int = 0) -> dict[str, str]:
    """
    Convert the 2:4 layers of a merged model on CUDA to torch's semi-structured tensors, in place and layer by layer.

    The products then run on sparse tensor cores, in one direction: for inference alone. There is no file format for
    the converted weights; convert after every load.

    Args:
        model (`torch.nn.Module`): A merged model in float16 or bfloat16 on a GPU of compute capability 8.0 or newer.
        min_weights (`int`, defaults to 0): Leave layers of fewer weights dense. Small products are slower sparse.

    Returns:
        `dict[str, str]`: By parameter, why a linear layer besides the output head was left dense.

    Raises:
        `ValueError`: if the model is not on such a GPU, or none of its layers qualifies.
    """
    _check_device(next(model.parameters()).device)
    left, names = {}, linear_names(model)
    flatten_inputs(model)
    for name in tqdm(names, desc="converting", disable=None):
        module = model.get_submodule(name.removesuffix(".weight"))
        if reason := _why_dense(module, min_weights):
            left[name] = reason
        else:
            sparse = torch.sparse.to_sparse_semi_structured(module.get_parameter("weight").detach())
            module.weight = nn.Parameter(sparse, requires_grad=False)
    if len(left) == len(names):
        raise ValueError(f"no layer can be converted; {names[0]}: {left[names[0]]}.")
    return left


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"the model is on {device}, and torch's 2:4 products need CUDA; move it there first.")
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        raise ValueError(f"compute capability {capability[0]}.{capability[1]} has no 2:4 products; 8.0 is the first.")


def _why_dense(module: nn.Module, min_weights: int = 0) -> str | None:
    """Why a linear layer's weight is not to be multiplied by as a 2:4 one, or `None` if it is."""
    if isinstance(module, Conv1D):
        return "Conv1D multiplies by the transposed weight"
    if reason := own_forward(module):
        return reason
    weight = module.get_parameter("weight").detach()
    if weight.numel() < min_weights:
        return f"it has {weight.numel():,} weights, fewer than the {min_weights:,} asked for"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"it is {weight.dtype}, not float16 or bfloat16"
    # cuSPARSELt's, which is torch's default.
    if any(size % 16 for size in weight.shape):
        return f"its shape is {list(weight.shape)}, and both must be multiples of 16"
    return violation(weight, 2, 4)
