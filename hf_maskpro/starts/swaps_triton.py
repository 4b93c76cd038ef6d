"""Swaps on a GPU, in Triton: one program a row, which goes on until the row has no swap left."""

import torch
import triton
import triton.language as tl


_BLOCK = 1024


@triton.jit
def _swap(
    weight, gram, squares, inner, product, tolerance, keep, inputs, groups, M: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * inputs
    weight, product, squares, keep = weight + start, product + start, squares + start, keep + start
    limit = -tl.load(tolerance + tl.program_id(0))
    lane = tl.arange(0, BLOCK)
    going = limit <= 0
    while going:
        best, place = tl.full((BLOCK,), float("inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, groups, BLOCK):
            group = begin + lane
            inside = group < groups
            for p in range(M):
                for q in range(p + 1, M):
                    i, j = p * groups + group, q * groups + group
                    first, second = tl.load(keep + i, mask=inside, other=0), tl.load(keep + j, mask=inside, other=0)
                    a, b = tl.load(weight + i, mask=inside, other=0), tl.load(weight + j, mask=inside, other=0)
                    c = tl.load(product + i, mask=inside, other=0).to(tl.float32)
                    d = tl.load(product + j, mask=inside, other=0).to(tl.float32)
                    change = 2 * tl.where(first != 0, a * c - b * d, b * d - a * c)
                    change += tl.load(squares + i, mask=inside, other=0) + tl.load(squares + j, mask=inside, other=0)
                    change -= 2 * a * b * tl.load(inner + (p * M + q) * groups + group, mask=inside, other=0)
                    better = inside & (first != second) & (change < best)
                    best = tl.where(better, change, best)
                    place = tl.where(better, (p * M + q) * groups + group, place)
        # The first of the lanes with the lowest, and of these the first place.
        least = tl.min(best, axis=0)
        found = tl.min(tl.where(best == least, place, 0x7FFFFFFF), axis=0)
        group, pair = found % groups, found // groups
        i, j = pair // M * groups + group, pair % M * groups + group
        kept = tl.load(keep + i) != 0
        out, into = tl.where(kept, i, j), tl.where(kept, j, i)
        # In float64, since rounding must not make a gain of a swap and of its undoing.
        a, b = tl.load(weight + out).to(tl.float64), tl.load(weight + into).to(tl.float64)
        change = 2 * (a * tl.load(product + out) - b * tl.load(product + into))
        change += a * a * tl.load(gram + out.to(tl.int64) * inputs + out).to(tl.float64)
        change += b * b * tl.load(gram + into.to(tl.int64) * inputs + into).to(tl.float64)
        change -= 2 * a * b * tl.load(gram + out.to(tl.int64) * inputs + into).to(tl.float64)
        going = (least < float("inf")) & (change < limit)
        # All have read the row before one writes to it, and one has written before all read it again.
        tl.debug_barrier()
        if going:
            tl.store(keep + out, 0)
            tl.store(keep + into, 1)
            for begin in range(0, inputs, BLOCK):
                column = begin + lane
                inside = column < inputs
                moved = a * tl.load(gram + out.to(tl.int64) * inputs + column, mask=inside, other=0).to(tl.float64)
                moved -= b * tl.load(gram + into.to(tl.int64) * inputs + column, mask=inside, other=0).to(tl.float64)
                tl.store(product + column, tl.load(product + column, mask=inside, other=0) + moved, mask=inside)
        tl.debug_barrier()


def refine(
    weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, product: torch.Tensor, tolerance: torch.Tensor
) -> torch.Tensor:
    """
    The refined mask of `hf_maskpro.starts.swaps.refine`.

    Args:
        weight (`torch.Tensor`): float32 `[out_features, m, groups]`, contiguous like the others.
        mask (`torch.Tensor`): bool `[out_features, m, groups]`.
        gram (`torch.Tensor`): float32 `[m, groups, m, groups]`.
        product (`torch.Tensor`): float32 `[out_features, m, groups]`: of the dropped weights and the Gram matrix.
        tolerance (`torch.Tensor`): float32 `[out_features]`: smaller gains are none.

    Returns:
        `torch.Tensor`: bool `[out_features, m, groups]`.
    """
    rows, m, groups = mask.shape
    inner = gram.diagonal(dim1=1, dim2=3).contiguous()
    squares = weight.square() * inner.diagonal(dim1=0, dim2=1).T
    keep = mask.to(torch.int8, copy=True)
    operands = (weight, gram, squares.contiguous(), inner, product.double(), tolerance.double(), keep)
    block = min(_BLOCK, triton.next_power_of_2(groups))
    # Triton launches on the current device, whatever that of its operands is.
    with torch.cuda.device_of(weight):
        _swap[(rows,)](*operands, m * groups, groups, M=m, BLOCK=block, num_warps=4)
    return keep.bool()
