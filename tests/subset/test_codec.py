from itertools import combinations
from math import comb, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_maskpro.subset import mode, pack, packed_width, unpack
from hf_maskpro.subset.codec import word_layout


@given(data=st.data(), m=st.integers(2, 16), seed=st.integers(0, 2**31))
@settings(max_examples=300, deadline=None)
def test_round_trip_for_every_pattern(data, m, seed):
    n = data.draw(st.integers(1, m - 1))
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    mask = mode(torch.rand(rows, m, groups, generator=torch.Generator().manual_seed(seed)), n)
    packed = pack(mask, n, m)
    assert packed.shape == (rows, packed_width(n, m, m * groups))
    assert torch.equal(unpack(packed, n, m, m * groups), mask)


@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 4, 9)])
@pytest.mark.parametrize("n", [1, 2])
def test_any_leading_dimensions(shape, n):
    mask = mode(torch.rand(shape), n)
    assert torch.equal(unpack(pack(mask, n, 4), n, 4, 36), mask)


def test_all_patterns_at_their_extremes():
    for m in range(2, 17):
        for n in range(1, m):
            for rank in (0, comb(m, n) - 1):
                mask = torch.zeros(1, m, 31, dtype=torch.bool)
                members = list(range(n)) if rank == 0 else list(range(m - n, m))
                mask[:, members] = True
                assert torch.equal(unpack(pack(mask, n, m), n, m, 31 * m), mask)


def test_the_documented_layouts():
    assert word_layout(2, 4) == (3, 1)
    assert word_layout(4, 8) == (9, 7)
    assert word_layout(8, 16) == (4, 7)
    assert word_layout(1, 4) == (4, 1)


def test_bytes_follow_the_written_format():
    """Lexicographic rank, first group least significant: groups {0,1}, {2,3}, {0,2} are 0 + 5 * 6 + 1 * 36."""
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    for group, members in enumerate([(0, 1), (2, 3), (0, 2), (1, 3)]):
        mask[0, list(members), group] = True
    assert pack(mask, 2, 4).tolist() == [[0 + 5 * 6 + 1 * 36, 4]]
    assert list(combinations(range(4), 2))[4] == (1, 3)


def test_words_are_little_endian():
    mask = mode(torch.rand(1, 8, 9, generator=torch.Generator().manual_seed(0)), 4)
    ranks = {members: rank for rank, members in enumerate(combinations(range(8), 4))}
    value = sum(ranks[tuple(mask[0, :, g].nonzero().flatten().tolist())] * 70**g for g in range(9))
    assert bytes(pack(mask, 4, 8)[0].tolist()) == value.to_bytes(7, "little")


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (4, 8), (8, 16), (15, 16)])
def test_size_is_close_to_the_entropy(n, m):
    digits, size = word_layout(n, m)
    assert log2(comb(m, n)) <= 8 * size / digits <= log2(comb(m, n)) + 0.35


def test_bad_input_raises():
    good = pack(mode(torch.rand(2, 4, 6), 2), 2, 4)
    with pytest.raises(ValueError, match="out of range"):
        unpack(torch.full_like(good, 216), 2, 4, 24)
    with pytest.raises(ValueError, match="bytes a row"):
        unpack(good, 2, 4, 48)
    with pytest.raises(ValueError, match="bytes a row"):
        unpack(good.float(), 2, 4, 24)
    with pytest.raises(ValueError, match="exactly 2 members"):
        pack(torch.ones(1, 4, 3, dtype=torch.bool), 2, 4)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (2, 8), (8, 16)])
def test_masks_of_no_rows(n, m):
    packed = pack(torch.zeros(0, m, 3, dtype=torch.bool), n, m)
    assert packed.shape == (0, packed_width(n, m, 3 * m))
    assert unpack(packed, n, m, 3 * m).shape == (0, m, 3)
