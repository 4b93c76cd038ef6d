"""The weights exp(logit) of a group, in a range in which their products stay finite."""

import torch


# A member this far below (above) the n-th largest logit of its group is never (always) drawn; without the clamp a
# lead of about 103 underflows float32 and gives NaN.
_LOWEST = -60.0

# In float32 products of four such weights must stay finite. What the limit changes has a probability below 2**-28.
_HIGHEST = {torch.float32: 20.0, torch.float64: 40.0}

# The polynomial of the least maximal relative error that is exact at 0.
_POWER_OF_TWO = (0.00132646524, 0.00967151133, 0.0555073396, 0.240222421, 0.693146978, 1.0)


def planes_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The members of every group of `[..., m, groups]`, each `[..., groups]`."""
    return list(tensor.unbind(-2))


def work_dtype(n: int) -> torch.dtype:
    """Products of more than two weights of up to exp(40) leave the range of float32."""
    return torch.float32 if n <= 2 else torch.float64


def _nth_largest(planes: list[torch.Tensor], n: int) -> torch.Tensor:
    """The n-th largest of the planes, element-wise, by n passes of bubble sort."""
    planes = list(planes)
    for k in range(n):
        for i in range(len(planes) - 1, k, -1):
            low, high = torch.minimum(planes[i - 1], planes[i]), torch.maximum(planes[i - 1], planes[i])
            planes[i - 1], planes[i] = high, low
    return planes[n - 1]


def weights_of(planes: list[torch.Tensor], n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """exp(logits), shifted by the n-th largest of the group, in `dtype`."""
    planes = [plane.to(dtype) for plane in planes]
    shift = _nth_largest(planes, n)
    exponents = [(plane - shift).clamp(_LOWEST, _HIGHEST[dtype]) for plane in planes]
    return [_exp(exponent) if dtype == torch.float32 else exponent.exp() for exponent in exponents]


def _exp(exponent: torch.Tensor) -> torch.Tensor:
    """
    exp in float32 by exactly rounded operations alone, so that eager and compiled masks are the same: libraries differ
    in its last bit. `2**f` for f in [-0.5, 0.5] is a polynomial with a relative error of 1e-7.
    """
    binary = exponent * 1.4426950408889634
    whole = binary.round()
    fraction = binary - whole
    power = fraction * _POWER_OF_TWO[0] + _POWER_OF_TWO[1]
    for coefficient in _POWER_OF_TWO[2:]:
        power = power * fraction + coefficient
    return (power.view(torch.int32) + (whole.int() << 23)).view(torch.float32)
