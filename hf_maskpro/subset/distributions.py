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
from .marginals import marginals_of, suffix_polynomials
from .weights import planes_of, weights_of, work_dtype


Distribution = Literal["plackett_luce", "conditional_poisson"]


def gumbel(like: torch.Tensor, first: torch.Tensor, second: torch.Tensor, count: int) -> list[torch.Tensor]:
    """
    Standard Gumbel noise, a function of the keys and the position.

    Args:
        like (`torch.Tensor`): Of the shape and device of each draw, `[rows, groups]`.
        first (`torch.Tensor`): The one of [`random_keys`].
        second (`torch.Tensor`): The other.
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
    return torch.stack(mode_of(planes_of(logits), n), dim=-2)


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
    weights = weights_of(planes_of(logits), n, work_dtype(n))
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
    suffix = suffix_polynomials(weights, n)
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
    weights = weights_of(planes_of(logits), n, torch.float64)
    chosen = sum(torch.where(kept, weight.log(), 0.0) for kept, weight in zip(planes_of(mask), weights, strict=True))
    return chosen - suffix_polynomials(weights, n)[0][n].log()


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
    weights = weights_of(planes_of(logits), n, work_dtype(n))
    return torch.stack(score_of(weights, planes_of(mask), n, distribution), dim=-2).float()


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
        log_weights = torch.stack(weights_of(planes_of(logits), n, torch.float64), dim=-1).log()
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
