"""Swaps of kept against dropped weights while the layer's reconstruction error falls (the idea of SparseSwaps)."""

import torch

from ..tuner.layer import to_planes


# A gain below this share of a row's first error is rounding.
_LEAST_GAIN = 1e-9


def reconstruction_error(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """
    `||X (W_i - m_i W_i)||^2` of every row i: what the layer's outputs lose.

    Args:
        weight (`torch.Tensor`): `[out_features, in_features]`.
        mask (`torch.Tensor`): bool `[out_features, m, in_features // m]`.
        gram (`torch.Tensor`): X^T X, `[in_features, in_features]`.

    Returns:
        `torch.Tensor`: float64 `[out_features]`.
    """
    dropped = weight.double().masked_fill(mask.transpose(1, 2).flatten(1), 0)
    return ((dropped @ gram.double()) * dropped).sum(1)


def refine(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """
    Swap within groups, one swap a row at a time, the best of the row, until none lowers its error.

    With d the dropped weights of a row and c = G d, to drop p and keep q instead changes `d^T G d` by exactly
    `2 w_p c_p + w_p^2 G_pp - 2 w_q c_q + w_q^2 G_qq - 2 w_p w_q G_pq`.

    Args:
        weight (`torch.Tensor`): `[out_features, in_features]`.
        mask (`torch.Tensor`): bool `[out_features, m, in_features // m]`.
        gram (`torch.Tensor`): X^T X, `[in_features, in_features]`.

    Returns:
        `torch.Tensor`: The refined mask, of the same shape. No single swap of it lowers the error of a row by more
            than a billionth of what it was at first.
    """
    rows, m, groups = mask.shape
    weight, gram = weight.double(), gram.double()
    diagonal = gram.diagonal()
    keep = mask.transpose(1, 2).flatten(1).clone()
    product = weight.masked_fill(keep, 0) @ gram
    # Rounding can make the error of a row whose inputs are all but zero negative.
    tolerance = _LEAST_GAIN * (product * weight.masked_fill(keep, 0)).sum(1).clamp(min=0)
    # G_pq within the groups, `[groups, m, m]`.
    inner = gram.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    pairs = [(p, q) for p in range(m) for q in range(m) if p != q]
    active = torch.arange(rows, device=weight.device)
    while len(active):
        w, c, k = weight[active], product[active], keep[active]
        own = w.square() * diagonal
        dropping = to_planes((2 * w * c + own).masked_fill(~k, torch.inf), m)
        keeping = to_planes((own - 2 * w * c).masked_fill(k, torch.inf), m)
        planes = to_planes(w, m)
        best = torch.full((len(active),), torch.inf, dtype=torch.float64, device=w.device)
        out, into = torch.zeros_like(active), torch.zeros_like(active)
        for p, q in pairs:
            change = dropping[:, p] + keeping[:, q] - 2 * planes[:, p] * planes[:, q] * inner[:, p, q]
            value, group = change.min(1)
            better = value < best
            best = torch.where(better, value, best)
            out, into = torch.where(better, group * m + p, out), torch.where(better, group * m + q, into)
        gains = best < -tolerance[active]
        active, out, into = active[gains], out[gains], into[gains]
        keep[active, out], keep[active, into] = False, True
        product[active] += (
            weight[active, out].unsqueeze(1) * gram[out] - weight[active, into].unsqueeze(1) * gram[into]
        )
    return keep.unflatten(1, (groups, m)).transpose(1, 2).contiguous()
