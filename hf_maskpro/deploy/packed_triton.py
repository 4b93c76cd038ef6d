"""Products with packed 2:4 weights on a GPU, in Triton: for decoding, which is bound by the bytes of the weights."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


# With more rows of inputs than these, dense products on an unpacked weight are faster.
FEW_TOKENS = 16
# Outputs and groups of four inputs that a program takes at a time, and its warps: for one token, and for a few.
ONE_TILE, FEW_TILE = (8, 256, 4), (32, 64, 4)
_UNPACK_TILE = 1024


@triton.jit
def _load(pairs, positions, place, inside):
    """The two values of every group in one word, and in the lowest four bits where they belong."""
    pair = tl.load(pairs + place, mask=inside, other=0)
    return pair, tl.load(positions + (place >> 3), mask=inside, other=0) >> ((place & 7) << 2)


@triton.jit
def _floats(words, HALF: tl.constexpr):
    """The lower and upper 16 bits of int32, which are float16 or else bfloat16, as float32."""
    if HALF:
        low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _members(pair, bits):
    """The four weights of every group, 16 bits in int32."""
    low, high = pair & 0xFFFF, (pair >> 16) & 0xFFFF
    first = tl.where((bits & 1) != 0, low, 0)
    second = tl.where((bits & 2) != 0, tl.where((bits & 1) != 0, high, low), 0)
    third = tl.where((bits & 4) != 0, tl.where((bits & 8) != 0, low, high), 0)
    fourth = tl.where((bits & 8) != 0, high, 0)
    return first, second, third, fourth


@triton.jit
def _one(x, pairs, positions, bias, y, outputs, groups, HALF: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """One token: each value times the input that its position chooses."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Beyond the last output it is computed again, so that no load of weights needs a mask of rows.
    start = tl.minimum(row, outputs - 1)[:, None] * groups
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    for begin in range(0, groups, GROUPS):
        group = begin + tl.arange(0, GROUPS)
        inside = group < groups
        inputs = tl.load(x + group, mask=inside, other=0)
        x0, x1 = _floats(inputs.to(tl.int32), HALF)
        x2, x3 = _floats((inputs >> 32).to(tl.int32), HALF)
        x0, x1, x2, x3 = x0[None, :], x1[None, :], x2[None, :], x3[None, :]
        pair, bits = _load(pairs, positions, start + group[None, :], inside[None, :])
        first, second = _floats(pair, HALF)
        total += first * tl.where((bits & 1) != 0, x0, tl.where((bits & 2) != 0, x1, x2))
        total += second * tl.where((bits & 8) != 0, x3, tl.where((bits & 4) != 0, x2, x1))
    product = tl.sum(total, axis=1)
    if bias is not None:
        product += tl.load(bias + row, mask=row < outputs, other=0).to(tl.float32)
    tl.store(y + row, product.to(y.dtype.element_ty), mask=row < outputs)


@triton.jit
def _few(
    x,
    pairs,
    positions,
    bias,
    y,
    outputs,
    groups,
    tokens,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Up to 16 tokens: the weights of a tile are unpacked in registers, and multiplied member by member."""
    dtype: tl.constexpr = y.dtype.element_ty
    row, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 16)
    start = tl.minimum(row, outputs - 1)[:, None] * groups
    total = tl.zeros((ROWS, 16), tl.float32)
    for begin in range(0, groups, GROUPS):
        group = begin + tl.arange(0, GROUPS)
        inside = group < groups
        given = inside[:, None] & (token < tokens)[None, :]
        inputs = tl.load(x + token[None, :] * groups + group[:, None], mask=given, other=0)
        pair, bits = _load(pairs, positions, start + group[None, :], inside[None, :])
        first, second, third, fourth = _members(pair, bits)
        total = tl.dot(_bits(first, dtype), _bits(inputs, dtype), total)
        total = tl.dot(_bits(second, dtype), _bits(inputs >> 16, dtype), total)
        total = tl.dot(_bits(third, dtype), _bits(inputs >> 32, dtype), total)
        total = tl.dot(_bits(fourth, dtype), _bits(inputs >> 48, dtype), total)
    if bias is not None:
        total += tl.load(bias + row, mask=row < outputs, other=0).to(tl.float32)[:, None]
    written = (row < outputs)[:, None] & (token < tokens)[None, :]
    tl.store(y + token[None, :] * outputs + row[:, None], total.to(dtype), mask=written)


@triton.jit
def _bits(words, dtype: tl.constexpr):
    """The lowest 16 bits as a number of that dtype."""
    return words.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _unpack(pairs, positions, weight, count, GROUPS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    pair, bits = _load(pairs, positions, place, place < count)
    first, second, third, fourth = _members(pair, bits)
    low, high = (first | (second << 16)).to(tl.int64) & 0xFFFFFFFF, (third | (fourth << 16)).to(tl.int64)
    tl.store(weight + place, low | (high << 32), mask=place < count)


def unpack(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    The dense weight of what [`pack`] gives.

    Args:
        values (`torch.Tensor`): bfloat16 or float16 `[out_features, in_features / 2]`.
        positions (`torch.Tensor`): int32 `[out_features, in_features / 32]`.

    Returns:
        `torch.Tensor`: `[out_features, in_features]`, of the values' dtype.
    """
    weight = torch.empty(len(values), 2 * values.shape[1], dtype=values.dtype, device=values.device)
    groups = values.numel() // 2
    grid = (triton.cdiv(groups, _UNPACK_TILE),)
    _unpack[grid](values.view(torch.int32), positions, weight.view(torch.int64), groups, GROUPS=_UNPACK_TILE)
    return weight


def linear(x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """
    What a linear layer with a packed weight gives, summed in float32.

    Args:
        x (`torch.Tensor`): `[..., in_features]`, of the values' dtype.
        values (`torch.Tensor`): bfloat16 or float16 `[out_features, in_features / 2]`, as of [`pack`].
        positions (`torch.Tensor`): int32 `[out_features, in_features / 32]`.
        bias (`torch.Tensor`, *optional*): `[out_features]`.

    Returns:
        `torch.Tensor`: `[..., out_features]`.
    """
    in_features, outputs = x.shape[-1], len(values)
    rows = x.reshape(-1, in_features)
    tokens = len(rows)
    if not 0 < tokens <= FEW_TOKENS:
        return F.linear(x, unpack(values, positions), bias)
    rows = rows.contiguous()
    if rows.storage_offset() % 4:
        # Inputs are read a group at a time.
        rows = rows.clone()
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    operands = (rows.view(torch.int64), values.view(torch.int32), positions, bias, y, outputs, in_features // 4)
    tile, groups, warps = ONE_TILE if tokens == 1 else FEW_TILE
    constants = {"HALF": x.dtype == torch.float16, "ROWS": tile, "GROUPS": groups, "num_warps": warps}
    grid = (triton.cdiv(outputs, tile),)
    if tokens == 1:
        _one[grid](*operands, **constants)
    else:
        _few[grid](*operands, tokens, **constants)
    return y.view(*x.shape[:-1], outputs)
