"""SparseGPT's choice in a block of columns on a GPU, in Triton: a program settles some rows in its registers."""

import torch
import triton
import triton.language as tl


_ROWS = 32


@triton.jit
def _choose(
    columns,
    factor,
    keep,
    errors,
    length,
    rows,
    factor_row,
    n,
    M: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    column = tl.arange(0, LENGTH)[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    place, inside = column.to(tl.int64) * rows + row, (column < length) & (row < rows)
    weights = tl.load(columns + place, mask=inside, other=0)
    diagonal = tl.load(factor + column * (factor_row + 1), mask=column < length, other=1)
    scores = weights
    for j in range(length):
        if j % M == 0:
            ratios = weights / diagonal
            scores = ratios * ratios
        here = column == j
        score = tl.sum(tl.where(here, scores, 0), axis=0, keep_dims=True)
        # A member is kept that fewer than n others beat; of equal ones the first wins.
        beats = (scores > score) | ((scores == score) & (column < j))
        kept = tl.sum((beats & (column // M == j // M)).to(tl.int32), axis=0, keep_dims=True) < n
        own = tl.load(factor + j * (factor_row + 1))
        error = tl.where(kept, 0, tl.sum(tl.where(here, weights, 0), axis=0, keep_dims=True) / own)
        beyond = tl.load(factor + j * factor_row + column, mask=(column > j) & (column < length), other=0)
        weights -= beyond * error
        at = tl.cast(j, tl.int64) * rows + row
        tl.store(errors + at, error, mask=row < rows)
        tl.store(keep + at, kept.to(tl.int8), mask=row < rows)


def choose(columns: torch.Tensor, factor: torch.Tensor, keep: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """
    What `hf_maskpro.starts.sparsegpt` chooses within a block of columns.

    Args:
        columns (`torch.Tensor`): float32 `[columns, out_features]`, contiguous; not changed.
        factor (`torch.Tensor`): float32 `[columns, columns]`, a corner of a matrix whose rows are contiguous.
        keep (`torch.Tensor`): bool `[columns, out_features]`, contiguous, to be filled.

    Returns:
        `torch.Tensor`: What is to be spread over the columns beyond, float32 `[columns, out_features]`.
    """
    errors = torch.empty_like(columns)
    length, rows = columns.shape
    tile = {"LENGTH": triton.next_power_of_2(length), "ROWS": _ROWS}
    with torch.cuda.device_of(columns):
        _choose[(triton.cdiv(rows, _ROWS),)](
            columns, factor, keep.view(torch.int8), errors, length, rows, factor.stride(0), n, M=m, **tile
        )
    return errors
