"""
Two distributions over the n-of-m subsets of a group: Plackett-Luce and conditional Poisson.

Logits have the shape `[..., m, groups]`: the m members of a group are m planes with a contiguous innermost axis, so
that every operation is element-wise over planes. A mask is a bool tensor of the same shape with n True per group.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch

from .bits import both_ends, position_words, to_uniform, uniform_bits
from .codec import join, mask_of


Distribution = Literal["plackett_luce", "conditional_poisson"]

# A member this far below (above) the n-th largest logit of its group is never (always) drawn; without the clamp a
# lead of about 103 underflows float32 and gives NaN.
_LOWEST = -60.0
# In float32 products of four such weights must stay finite. What the limit changes has a probability below 2**-28.
_HIGHEST = {torch.float32: 20.0, torch.float64: 40.0}
# The polynomial of the least maximal relative error that is exact at 0.
_POWER_OF_TWO = (0.00132646524, 0.00967151133, 0.0555073396, 0.240222421, 0.693146978, 1.0)


def _planes(tensor: torch.Tensor) -> list[torch.Tensor]:
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


def gumbel(like: torch.Tensor, first: torch.Tensor, second: torch.Tensor, count: int) -> list[torch.Tensor]:
    """
    Standard Gumbel noise, a function of the keys and the position.

    Args:
        like (`torch.Tensor`): Of the shape and device of each draw, `[rows, groups]`.
        first, second (`torch.Tensor`): From [`random_keys`].
        count (`int`): Draws.

    Returns:
        `list[torch.Tensor]`: float32.
    """
    draws = []
    for word in position_words(like, first, second, count):
        low, high = both_ends(word)
        # Each logarithm where its argument is exact.
        draws.append(-torch.log(torch.where(low < 0.5, -torch.log(low), -torch.log1p(-high))))
    return draws


def mode(logits: torch.Tensor, n: int) -> torch.Tensor:
    """
    The most likely mask of either distribution: the n largest logits, ties to the lower index.

    Args:
        logits (`torch.Tensor`): `[..., m, groups]`, any floating dtype.
        n (`int`): Members kept per group.

    Returns:
        `torch.Tensor`: bool `[..., m, groups]`.
    """
    return torch.stack(mode_of(_planes(logits), n), dim=-2)


def mode_of(planes: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    """Keep a member that fewer than n others beat."""
    beaten_by = [torch.zeros_like(plane, dtype=torch.int32) for plane in planes]
    for i in range(len(planes)):
        for j in range(i + 1, len(planes)):
            wins = (planes[j] > planes[i]).int()
            beaten_by[i] = beaten_by[i] + wins
            beaten_by[j] = beaten_by[j] + (1 - wins)
    return [count < n for count in beaten_by]


def sample(
    logits: torch.Tensor, n: int, seed: int, layer: int = 0, distribution: Distribution = "plackett_luce"
) -> torch.Tensor:
    """
    Draw one mask per group, a pure function of (logits, seed, layer).

    Args:
        logits (`torch.Tensor`): `[..., m, groups]`, any floating dtype.
        n (`int`): Members kept per group.
        seed (`int`): Between 0 and 2**64 - 1.
        layer (`int`): Index of the layer, so that layers share no random numbers.
        distribution (`str`): `"plackett_luce"` (n draws without replacement from the softmax, arXiv 2506.12876) or
            `"conditional_poisson"` (independent members, given that n of them are kept).

    Returns:
        `torch.Tensor`: bool `[..., m, groups]`.
    """
    weights = weights_of(_planes(logits), n, work_dtype(n))
    words = uniform_bits((draws(n, distribution), *weights[0].shape), seed, layer, logits.device)
    return mask_of(draw(weights, n, words.unbind(0), distribution), len(weights))


def draws(n: int, distribution: Distribution) -> int:
    """Random words that a group needs."""
    return n if n > 2 and distribution == "plackett_luce" else 1


def draw(
    weights: list[torch.Tensor], n: int, words: Sequence[torch.Tensor], distribution: Distribution
) -> torch.Tensor:
    """The codes of one mask per group, from as many random words as [`draws`] says."""
    if n <= 2:
        return _draw_from_sets(weights, n, words[0], distribution)
    if distribution == "plackett_luce":
        return join(_draw_plackett_luce(weights, n, [to_uniform(word) for word in words]))
    return join(_draw_conditional_poisson(weights, n, to_uniform(words[0])))


def _draw_from_sets(
    weights: list[torch.Tensor], n: int, words: torch.Tensor, distribution: Distribution
) -> torch.Tensor:
    """
    One uniform number per group walks the sets in lexicographic order.

    Whether `u` is beyond the first k sets, `u >= p / (p + s)` for their mass `p` and the mass `s` of the others, is
    asked as `u s >= (1 - u) p`: products of positive numbers, so that rare sets at either end keep their probability
    in float32.
    """
    m = len(weights)
    if n == 1:
        codes, masses = [1 << i for i in range(m)], weights
    else:
        # itertools.combinations is not known to torch.compile.
        pairs = [(i, j) for i in range(m) for j in range(i + 1, m)]
        codes = [1 << i | 1 << j for i, j in pairs]
        masses = [weights[i] * weights[j] for i, j in pairs]
        if distribution == "plackett_luce":
            factors = _orders_of_drawing(_others(weights), pairs)
            masses = [mass * factor for mass, factor in zip(masses, factors, strict=True)]
    before = list(accumulate(masses[:-1]))
    after = list(accumulate(masses[:0:-1]))[::-1]
    u, rest = both_ends(words)
    drawn = torch.full_like(words, codes[0])
    for code, p, s in zip(codes[1:], before, after, strict=True):
        drawn = torch.where(u * s >= rest * p, code, drawn)
    return drawn


def _others(planes: list[torch.Tensor]) -> list[torch.Tensor]:
    """For every plane the sum of all others, by adding alone."""
    if len(planes) == 4:
        (a, b, c, d), low, high = planes, planes[0] + planes[1], planes[2] + planes[3]
        return [b + high, a + high, d + low, c + low]
    before, after = list(accumulate(planes)), list(accumulate(planes[::-1]))[::-1]
    inner = [p + s for p, s in zip(before[:-2], after[2:], strict=True)]
    return [after[1], *inner, before[-2]]


def _orders_of_drawing(others: list[torch.Tensor], pairs: list[tuple[int, int]]) -> list[torch.Tensor]:
    """
    `1 / (1 - p_i) + 1 / (1 - p_j)` for every pair, up to a common factor: a pair is drawn in either order.

    Of four members it is `(o_i + o_j) o_k o_l` with `o` the sum of all other weights: no division, which takes as
    long as ten multiplications.
    """
    if len(others) == 4:
        rest = [next(q for q in pairs if not set(q) & set(pair)) for pair in pairs]
        a, b = [others[i] + others[j] for i, j in pairs], [others[i] * others[j] for i, j in rest]
        return [x * y for x, y in zip(a, b, strict=True)]
    inverse = [1 / other for other in others]
    return [inverse[i] + inverse[j] for i, j in pairs]


def _draw_plackett_luce(weights: list[torch.Tensor], n: int, uniform: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = list(weights)
    kept = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    for turn in range(n):
        total = sum(weights)
        # A little less than the total, which rounding must not reach: the last member that is left would then be
        # passed over.
        threshold = uniform[turn] * (total * (1 - 2.0**-50))
        below = torch.zeros_like(threshold)
        drawn = torch.zeros_like(kept[0])
        for i, weight in enumerate(weights):
            below = below + weight
            hit = (threshold < below) & ~drawn
            drawn = drawn | hit
            kept[i] = kept[i] | hit
            weights[i] = torch.where(hit, 0.0, weight)
    return kept


def _draw_conditional_poisson(weights: list[torch.Tensor], n: int, uniform: torch.Tensor) -> list[torch.Tensor]:
    """One uniform number per group walks the sets in lexicographic order, member by member."""
    m = len(weights)
    suffix = _suffix_polynomials(weights, n)
    threshold = uniform * suffix[0][n]
    left = torch.full_like(weights[0], n, dtype=torch.int32)
    kept = []
    for i, weight in enumerate(weights):
        # Between the members that must still come and those that were kept so far, few counts are possible here.
        mass = torch.zeros_like(weight)
        for k in range(max(1, n - i), min(n, m - i - 1) + 1):
            mass = torch.where(left == k, weight * suffix[i + 1][k - 1], mass)
        hit = ((threshold < mass) & (left > 0)) | (left == m - i)
        threshold = torch.where(hit, threshold / weight, threshold - mass)
        left = left - hit.int()
        kept.append(hit)
    return kept


def _extend(polynomials: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """Elementary symmetric polynomials e_0..e_n after one more weight."""
    return [polynomials[0]] + [polynomials[k] + weight * polynomials[k - 1] for k in range(1, len(polynomials))]


def _suffix_polynomials(weights: list[torch.Tensor], n: int) -> list[list[torch.Tensor]]:
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
    weights = weights_of(_planes(logits), n, work_dtype(n))
    return torch.stack(marginals_of(weights, n), dim=-2).float()


def marginals_of(weights: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    """[`marginals`] on planes of weights."""
    suffix = _suffix_polynomials(weights, n)
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
    values = [plane.to(dtype) for plane in _planes(grad)]
    return torch.stack(marginal_gradient(weights_of(_planes(logits), n, dtype), values, n), dim=-2)


def marginal_gradient(weights: list[torch.Tensor], values: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    """[`marginals_backward`] on planes."""
    suffix = _suffix_polynomials(weights, n)
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


def log_prob(logits: torch.Tensor, mask: torch.Tensor, distribution: Distribution = "plackett_luce") -> torch.Tensor:
    """
    Log-probability of a mask, that is of the unordered set of kept members.

    Args:
        logits (`torch.Tensor`): `[..., m, groups]`.
        mask (`torch.Tensor`): bool `[..., m, groups]`, the same number of True in every group.
        distribution (`str`): `"plackett_luce"` or `"conditional_poisson"`.

    Returns:
        `torch.Tensor`: float64 `[..., groups]`.
    """
    n = _subset_size(mask)
    if distribution == "plackett_luce":
        return _PlackettLuceSubsets(logits, mask, n).forward[-1]
    weights = weights_of(_planes(logits), n, torch.float64)
    chosen = sum(torch.where(kept, weight.log(), 0.0) for kept, weight in zip(_planes(mask), weights, strict=True))
    return chosen - _suffix_polynomials(weights, n)[0][n].log()


def score(logits: torch.Tensor, mask: torch.Tensor, distribution: Distribution = "plackett_luce") -> torch.Tensor:
    """
    Gradient of [`log_prob`] with respect to the logits, in closed form.

    Args:
        logits (`torch.Tensor`): `[..., m, groups]`.
        mask (`torch.Tensor`): bool `[..., m, groups]`, the same number of True in every group.
        distribution (`str`): `"plackett_luce"` or `"conditional_poisson"`.

    Returns:
        `torch.Tensor`: float32 `[..., m, groups]`; sums to 0 over the members.
    """
    n = _subset_size(mask)
    if n > 2 and distribution == "plackett_luce":
        return _score_plackett_luce(logits, mask, n)
    weights = weights_of(_planes(logits), n, work_dtype(n))
    return torch.stack(score_of(weights, _planes(mask), n, distribution), dim=-2).float()


def _subset_size(mask: torch.Tensor) -> int:
    return int(mask[..., 0].reshape(-1, mask.shape[-2])[0].sum())


def score_of(
    weights: list[torch.Tensor], kept: list[torch.Tensor], n: int, distribution: Distribution
) -> list[torch.Tensor]:
    """[`score`] on planes of weights, for every case but Plackett-Luce of more than two."""
    if n == 2 and distribution == "plackett_luce":
        return _score_of_two(weights, kept)
    marginal = marginals_of(weights, n)
    return [torch.where(k, 1.0, 0.0) - mu for k, mu in zip(kept, marginal, strict=True)]


def _score_of_two(weights: list[torch.Tensor], kept: list[torch.Tensor]) -> list[torch.Tensor]:
    """
    The Plackett-Luce score for n = 2 in float32, with a single division.

    With `o_i` the sum of all other weights, `T` that of all, and a and b the kept members it is
    `m_i - w_i (1 / T + s_i / (o_a o_b (o_a + o_b)))`, where `s_i` is `o_i^2` for a kept member and `o_a^2 + o_b^2` for
    a dropped one. What a member shares with the others is always summed, never taken as 1 - p.
    """
    others = _others(weights)
    chosen = [torch.where(k, other, 0.0) for k, other in zip(kept, others, strict=True)]
    squares = [value * value for value in chosen]
    total, both, square = sum(weights), sum(chosen), sum(squares)
    for k, other in zip(kept, others, strict=True):
        both = both * torch.where(k, other, 1.0)
    inverse = 1 / (total * both)
    first, later = inverse * both, inverse * total
    return [
        torch.where(k, 1.0, 0.0) - weight * (first + torch.where(k, own, square) * later)
        for k, weight, own in zip(kept, weights, squares, strict=True)
    ]


class _PlackettLuceSubsets:
    """
    The sums over the subsets of the kept members, in log space and float64.

    `forward[A]` is log F(A), the probability that the members A are drawn first, in whatever order; `outside[A]` is
    the log of the total weight outside A. Subsets are bit masks over the n kept members.
    """

    def __init__(self, logits: torch.Tensor, mask: torch.Tensor, n: int):
        log_weights = torch.stack(weights_of(_planes(logits), n, torch.float64), dim=-1).log()
        by_group = mask.transpose(-1, -2)
        self.log_weights = log_weights
        kept = log_weights[by_group].view(*by_group.shape[:-1], n)
        self.kept = list(kept.unbind(-1))
        dropped = log_weights.masked_fill(by_group, -torch.inf).logsumexp(-1)
        self.outside = [
            torch.stack([dropped] + [self.kept[a] for a in range(n) if not subset >> a & 1]).logsumexp(0)
            for subset in range(1 << n)
        ]
        self.forward = [torch.zeros_like(dropped)]
        for subset in range(1, 1 << n):
            last = [a for a in range(n) if subset >> a & 1]
            self.forward.append(
                torch.stack(
                    [self.forward[subset ^ 1 << a] + self.kept[a] - self.outside[subset ^ 1 << a] for a in last]
                ).logsumexp(0)
            )


def _score_plackett_luce(logits: torch.Tensor, mask: torch.Tensor, n: int) -> torch.Tensor:
    """`score_i = m_i - w_i sum_A gamma(A) / w(outside A)` over the proper subsets A of the mask without i."""
    subsets = _PlackettLuceSubsets(logits, mask, n)
    full = (1 << n) - 1
    backward: list[torch.Tensor] = [torch.zeros_like(subsets.forward[0])] * (full + 1)
    for subset in range(full - 1, -1, -1):
        following = [
            subsets.kept[a] - subsets.outside[subset] + backward[subset | 1 << a]
            for a in range(n)
            if not subset >> a & 1
        ]
        backward[subset] = torch.stack(following).logsumexp(0)
    visits = [
        subsets.forward[subset] + backward[subset] - subsets.forward[full] - subsets.outside[subset]
        for subset in range(full)
    ]
    for_dropped = torch.stack(visits).logsumexp(0)
    for_kept = [
        torch.stack([visits[subset] for subset in range(full) if not subset >> a & 1]).logsumexp(0) for a in range(n)
    ]
    by_group = mask.transpose(-1, -2)
    log_visits = for_dropped.unsqueeze(-1).expand(by_group.shape).clone()
    log_visits[by_group] = torch.stack(for_kept, dim=-1).flatten()
    return (by_group.double() - (subsets.log_weights + log_visits).exp()).float().transpose(-1, -2).contiguous()
