"""The exact marginals of conditional Poisson, and the gradient through them."""

import torch

from .weights import planes_of, weights_of, work_dtype


def _extend(polynomials: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """Elementary symmetric polynomials e_0..e_n after one more weight."""
    return [polynomials[0]] + [polynomials[k] + weight * polynomials[k - 1] for k in range(1, len(polynomials))]


def suffix_polynomials(weights: list[torch.Tensor], n: int) -> list[list[torch.Tensor]]:
    """e_0..e_n of the weights from i onwards, for i = 0..m."""
    one, zero = torch.ones_like(weights[0]), torch.zeros_like(weights[0])
    suffix = [[one] + [zero] * n]
    for weight in reversed(weights):
        suffix.append(_extend(suffix[-1], weight))
    return suffix[::-1]


def marginals(logits: torch.Tensor, n: int) -> torch.Tensor:
    """
    Probability that each member is kept, under the conditional Poisson distribution.

    `mu_i = w_i e_{n-1}(w without i) / e_n(w)` with `w = exp(logits)`: sums of positive terms alone.

    Args:
        logits (`torch.Tensor`): `[..., m, groups]`.
        n (`int`): Members kept per group.

    Returns:
        `torch.Tensor`: float32 `[..., m, groups]`; sums to n over the members.
    """
    weights = weights_of(planes_of(logits), n, work_dtype(n))
    return torch.stack(marginals_of(weights, n), dim=-2).float()


def marginals_of(weights: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    """[`marginals`] on planes of weights."""
    suffix = suffix_polynomials(weights, n)
    total = suffix[0][n]
    prefix = [suffix[-1][0]] + [suffix[-1][1]] * n
    result = []
    for i, weight in enumerate(weights):
        without = sum(prefix[k] * suffix[i + 1][n - 1 - k] for k in range(n))
        result.append(weight * without / total)
        prefix = _extend(prefix, weight)
    return result


def marginals_backward(logits: torch.Tensor, n: int, grad: torch.Tensor) -> torch.Tensor:
    """
    Send a gradient with respect to the mask through the exact marginals to the logits: SIMPLE (Ahmed et al., ICLR
    2023).

    `dL/dl_i = sum_j Cov(m_i, m_j) d_j = mu_i (1 - mu_i) (E[f | i kept] - E[f | i dropped])` where `f` is the sum of
    `d` over the kept members. `1 - mu_i` is formed as the probability of the sets without i, never by subtraction.

    Args:
        logits (`torch.Tensor`): `[..., m, groups]`.
        n (`int`): Members kept per group.
        grad (`torch.Tensor`): `d`, the gradient with respect to the mask, `[..., m, groups]`.

    Returns:
        `torch.Tensor`: float32 `[..., m, groups]`.
    """
    dtype = work_dtype(n)
    values = [plane.to(dtype) for plane in planes_of(grad)]
    return torch.stack(marginal_gradient(weights_of(planes_of(logits), n, dtype), values, n), dim=-2)


def marginal_gradient(weights: list[torch.Tensor], values: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    """[`marginals_backward`] on planes."""
    suffix = suffix_polynomials(weights, n)
    # Beside each e_k, the same sum over sets with f(set) as a further factor.
    zero = torch.zeros_like(weights[0])
    suffix_f = [[zero] * (n + 1)]
    for i in range(len(weights) - 1, -1, -1):
        suffix_f.append(_extend_f(suffix[i + 1], suffix_f[-1], weights[i], values[i]))
    suffix_f = suffix_f[::-1]
    total = suffix[0][n]
    prefix, prefix_f = suffix[-1], suffix_f[-1]
    result = []
    for i, (weight, value) in enumerate(zip(weights, values, strict=True)):
        kept, kept_f = _combine(prefix, prefix_f, suffix[i + 1], suffix_f[i + 1], n - 1)
        dropped, dropped_f = _combine(prefix, prefix_f, suffix[i + 1], suffix_f[i + 1], n)
        difference = value + kept_f / kept - dropped_f / dropped
        result.append((weight * kept / total * (dropped / total) * difference).float())
        prefix, prefix_f = _extend(prefix, weight), _extend_f(prefix, prefix_f, weight, value)
    return result


def _extend_f(
    polynomials: list[torch.Tensor], with_f: list[torch.Tensor], weight: torch.Tensor, value: torch.Tensor
) -> list[torch.Tensor]:
    """The sums with the factor f, after one more weight whose value is `value`."""
    return [with_f[0]] + [
        with_f[k] + weight * (with_f[k - 1] + value * polynomials[k - 1]) for k in range(1, len(with_f))
    ]


def _combine(
    left: list[torch.Tensor],
    left_f: list[torch.Tensor],
    right: list[torch.Tensor],
    right_f: list[torch.Tensor],
    n: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """e_n of two disjoint parts together, and the same sum with the factor f."""
    plain, with_f = left[0] * right[n], left_f[0] * right[n] + left[0] * right_f[n]
    for k in range(1, n + 1):
        plain = plain + left[k] * right[n - k]
        with_f = with_f + left_f[k] * right[n - k] + left[k] * right_f[n - k]
    return plain, with_f
