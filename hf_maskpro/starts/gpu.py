"""Whether the kernels of starting masks for GPUs can be used."""

import warnings
from functools import cache

import torch


def in_triton(weight: torch.Tensor) -> bool:
    """Whether a weight is on a GPU where Triton is there and works; where it does not, a warning says why."""
    return _on_gpu(weight) and _works(weight.device)


def _on_gpu(weight: torch.Tensor) -> bool:
    return weight.is_cuda


@cache
def _works(device: torch.device) -> bool:
    try:
        # Only here, since on a CPU there may be no Triton.
        from .swaps_triton import refine

        # What is missing shows at the first launch, for which one group is enough.
        one = torch.eye(4, device=device)
        refine(one.view(4, 4, 1), one.view(4, 4, 1) > 0, one.view(4, 1, 4, 1), one.view(4, 4, 1), one[0])
    # It raises many kinds of errors for a missing compiler, header, driver or architecture.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"plain torch takes several times as long; Triton does not work: {reason}", stacklevel=4)
        return False
    return True
