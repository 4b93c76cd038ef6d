"""
The mask codec: each group's mask as its rank among C(m, n) combinations, ranks as digits of little-endian words.
"""

from functools import lru_cache
from itertools import combinations
from math import comb

import torch


@lru_cache
def word_layout(n: int, m: int) -> tuple[int, int]:
    """
    How many groups share a word, and how many bytes a word has.

    Of the words of 1 to 7 bytes it is the one with the fewest bits per group, and of equals the smallest.

    Args:
        n (`int`): Members kept per group.
        m (`int`): Members of a group.

    Returns:
        `tuple[int, int]`: Digits per word, bytes per word. (3, 1) for 2:4.
    """
    base = comb(m, n)
    best = (0, 1)
    for size in range(1, 8):
        digits = 0
        while base ** (digits + 1) <= 256**size:
            digits += 1
        if digits * best[1] > best[0] * size:
            best = (digits, size)
    return best


def packed_width(n: int, m: int, in_features: int) -> int:
    """Bytes per row of a packed mask; rows are padded to whole words so that a file can be sliced by rows."""
    digits, size = word_layout(n, m)
    groups = in_features // m
    return -(-groups // digits) * size


@lru_cache
def _codes_by_rank(n: int, m: int) -> torch.Tensor:
    """Code of every combination in lexicographic order, int32 `[C(m, n)]`."""
    return torch.tensor(
        [sum(1 << i for i in kept) for kept in combinations(range(m), n)], dtype=torch.int32, device="cpu"
    )


@lru_cache
def _ranks(n: int, m: int) -> torch.Tensor:
    """Rank of every code, int64 `[2**m]`, -1 where it has not n members."""
    table = torch.full((1 << m,), -1, dtype=torch.int64, device="cpu")
    table[_codes_by_rank(n, m)] = torch.arange(comb(m, n), device="cpu")
    return table


@lru_cache
def code_table(n: int, m: int, device: torch.device) -> torch.Tensor:
    """Codes of the groups in every value of a one-byte word, int32 `[256, digits]`; of longer words, by rank."""
    base, (digits, size) = comb(m, n), word_layout(n, m)
    codes = _codes_by_rank(n, m)
    if size == 1:
        byte = torch.arange(256, device="cpu")
        codes = torch.stack([codes[byte // base**i % base] for i in range(digits)], dim=1)
    return codes.to(device)


def group_members(rows: torch.Tensor, m: int) -> torch.Tensor:
    """`[out_features, in_features]` to `[out_features, m, in_features // m]`, a view."""
    return rows.unflatten(1, (-1, m)).transpose(1, 2)


def candidates(n: int, m: int, device: torch.device) -> torch.Tensor:
    """The masks of a group in lexicographic order, float32 `[C(m, n), m]`."""
    codes = _codes_by_rank(n, m).to(device)
    return mask_of(codes, m).T.float()


def codes_of(mask: torch.Tensor) -> torch.Tensor:
    """
    A mask as codes, one number per group whose bit i stands for member i.

    Args:
        mask (`torch.Tensor`): bool `[..., m, groups]`.

    Returns:
        `torch.Tensor`: int32 `[..., groups]`.
    """
    return join(list(mask.unbind(-2)))


def join(kept: list[torch.Tensor]) -> torch.Tensor:
    """[`codes_of`] on a list of planes."""
    codes = kept[0].int()
    for i, plane in enumerate(kept[1:], start=1):
        codes = codes | (plane.int() << i)
    return codes


def mask_of(codes: torch.Tensor, m: int) -> torch.Tensor:
    """The inverse of [`codes_of`]: bool `[..., m, groups]`."""
    return torch.stack([(codes >> i) & 1 == 1 for i in range(m)], dim=-2)


def pack(mask: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """
    Pack a mask into bytes.

    Args:
        mask (`torch.Tensor`): bool `[..., m, in_features // m]`, exactly `n` True per group.
        n (`int`): Members kept per group.
        m (`int`): Members of a group.

    Returns:
        `torch.Tensor`: uint8 `[..., packed_width(n, m, in_features)]`.

    Raises:
        `ValueError`: if a group has not exactly `n` members.
    """
    return pack_codes(codes_of(mask), n, m)


def pack_codes(codes: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """[`pack`] from codes."""
    *rows, groups = codes.shape
    rank = _ranks(n, m).to(codes.device)[codes]
    if rank.numel() and int(rank.min()) < 0:
        raise ValueError(f"a {n}:{m} mask keeps exactly {n} members in every group; this one does not.")
    digits, size = word_layout(n, m)
    words = packed_width(n, m, groups * m) // size
    rank = torch.nn.functional.pad(rank, (0, words * digits - groups)).view(*rows, words, digits)
    place = torch.tensor([comb(m, n) ** i for i in range(digits)], device=codes.device)
    word = (rank * place).sum(-1, keepdim=True)
    shifts = torch.arange(0, 8 * size, 8, device=codes.device)
    return ((word >> shifts) & 0xFF).to(torch.uint8).view(*rows, words * size)


def unpack(packed: torch.Tensor, n: int, m: int, in_features: int) -> torch.Tensor:
    """
    Unpack a mask; the inverse of [`pack`].

    Args:
        packed (`torch.Tensor`): uint8 `[..., packed_width(n, m, in_features)]`.
        n (`int`): Members kept per group.
        m (`int`): Members of a group.
        in_features (`int`): Columns of the weight, a multiple of `m`.

    Returns:
        `torch.Tensor`: bool `[..., m, in_features // m]`.

    Raises:
        `ValueError`: if the shape or dtype is not that of such a mask, or a word is out of range.
    """
    return mask_of(unpack_codes(packed, n, m, in_features), m)


def unpack_codes(packed: torch.Tensor, n: int, m: int, in_features: int) -> torch.Tensor:
    """[`unpack`] to codes."""
    check_packed(packed, n, m, in_features)
    table = code_table(n, m, packed.device)
    return word_codes(packed, table, comb(m, n), word_layout(n, m)).flatten(-2)[..., : in_features // m].contiguous()


def check_packed(packed: torch.Tensor, n: int, m: int, in_features: int) -> None:
    """Raise the errors of [`unpack`]."""
    width = packed_width(n, m, in_features)
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != width:
        raise ValueError(
            f"a packed {n}:{m} mask over {in_features} inputs is uint8 with {width} bytes a row, "
            f"not {packed.dtype} of shape {tuple(packed.shape)}."
        )
    digits, size = word_layout(n, m)
    word = _words(packed, size)
    if word.numel() and int(word.max()) >= comb(m, n) ** digits:
        raise ValueError(f"a word of the packed {n}:{m} mask is out of range: the mask is missing or corrupt.")


def _words(packed: torch.Tensor, size: int) -> torch.Tensor:
    if size == 1:
        return packed.int()
    shifts = torch.arange(0, 8 * size, 8, device=packed.device)
    return (packed.unflatten(-1, (packed.shape[-1] // size, size)).long() << shifts).sum(-1)


def word_codes(packed: torch.Tensor, table: torch.Tensor, base: int, layout: tuple[int, int]) -> torch.Tensor:
    """
    Codes of the groups in every word of a valid packed mask, int32 `[..., words, digits]`.

    Args:
        table (`torch.Tensor`): From [`code_table`].
        base (`int`): C(m, n). Given, like the next, since torch.compile does not follow how they are computed.
        layout (`tuple[int, int]`): From [`word_layout`].
    """
    digits, size = layout
    word = _words(packed, size)
    if size == 1:
        return table[word]
    return torch.stack([table[word // base**i % base] for i in range(digits)], dim=-1)
