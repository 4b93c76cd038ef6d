"""Counter-based random bits: a pure function of (seed, layer, position), the same on every device and rank."""

import torch


_WORD = 0xFFFFFFFF


def _signed(word: int) -> int:
    """The two's complement value of a 32-bit word, as torch wants an int32 constant."""
    return word - (1 << 32) if word & 0x80000000 else word


def _mix(word: int) -> int:
    """`lowbias32` of Chris Wellons' hash-prospector, on a Python integer."""
    word &= _WORD
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _WORD
    return word ^ (word >> 16)


def _mix_tensor(words: torch.Tensor) -> torch.Tensor:
    """`lowbias32` on an int32 tensor; the masks turn torch's arithmetic shifts into logical ones."""
    words = (words ^ ((words >> 16) & 0xFFFF)) * _signed(0x7FEB352D)
    words = (words ^ ((words >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return words ^ ((words >> 16) & 0xFFFF)


def keys(seed: int, layer: int) -> tuple[int, int]:
    """
    Two 32-bit words that stand for (seed, layer), each input mixed in a round of its own.

    Args:
        seed (`int`): Between 0 and 2**64 - 1.
        layer (`int`): Index of the layer, between 0 and 2**32 - 1.

    Returns:
        `tuple[int, int]`: Two signed 32-bit words.
    """
    key = _mix(_mix(_mix(seed & _WORD) ^ (seed >> 32)) + layer)
    return _signed(key), _signed(_mix(key ^ 0x9E3779B9))


def hash_positions(position: torch.Tensor, first: int | torch.Tensor, second: int | torch.Tensor) -> torch.Tensor:
    """The words of [`uniform_bits`] at int32 positions, from the two [`keys`]."""
    return _mix_tensor(_mix_tensor(position + first) ^ second)


def more_words(words: torch.Tensor, stream: int) -> torch.Tensor:
    """Further words from those of [`uniform_bits`], for uses that must not repeat them."""
    return _mix_tensor(words ^ _signed(_mix(stream + 1)))


def both_ends(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `u` and `1 - u` for `u` uniform in (0, 1), in float32 and each with full relative precision near its own zero.

    The lowest 31 bits count, so that probabilities down to 2**-31 are kept without bias.
    """
    low = words & 0x7FFFFFFF
    return (low.float() + 0.5) * 2.0**-31, ((0x7FFFFFFF - low).float() + 0.5) * 2.0**-31


def to_uniform(words: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1) from all 32 bits, exact in float64."""
    return (words.double() + (2.0**31 + 0.5)) * 2.0**-32


def uniform_bits(
    shape: tuple[int, ...], seed: int, layer: int = 0, device: torch.device | str | None = None
) -> torch.Tensor:
    """
    Uniform random 32-bit words, one for every position of `shape`.

    Position, layer and seed each pass through a round of the integer hash `lowbias32`
    (https://github.com/skeeto/hash-prospector), so that two layers or seeds share no numbers in another order.

    Args:
        shape (`tuple[int, ...]`): Shape of the result; positions are counted in row-major order, up to 2**31.
        seed (`int`): Between 0 and 2**64 - 1.
        layer (`int`): Index of the layer.
        device (`torch.device`): Where to put the result.

    Returns:
        `torch.Tensor`: int32, of the given shape, all 32 bits uniform.
    """
    position = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)
    return hash_positions(position, *keys(seed, layer))


def random_keys(seed: int, layer: int, device: torch.device, start: int = 0) -> list[torch.Tensor]:
    """
    The two [`keys`] as int32 tensors, which a compiled kernel takes without compiling them in; positions count from
    `start`.
    """
    first, second = keys(seed, layer)
    # A position and the first key are added before anything else is done with either.
    words = _signed((first + start) & _WORD), second
    # full, unlike tensor, does not wait for the device.
    return [torch.full((), word, dtype=torch.int32, device=device) for word in words]


def position_words(
    like: torch.Tensor, first: torch.Tensor, second: torch.Tensor, count: int, of: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """
    The words of [`uniform_bits`] of shape `[count, rows, groups]`, given a tensor `[rows, groups]` and the keys; where
    these are some of a layer's rows, `of` is the number of all its groups, an int32 scalar.
    """
    rows, groups = like.shape
    position = torch.arange(rows * groups, dtype=torch.int32, device=like.device).view(rows, groups)
    apart = rows * groups if of is None else of
    return [hash_positions(position + i * apart, first, second) for i in range(count)]
