import pytest
import torch
from scipy.stats import chisquare

from hf_maskpro.subset import uniform_bits
from hf_maskpro.subset.bits import _mix, _mix_tensor, both_ends, more_words, to_uniform


def unsigned(bits: torch.Tensor) -> torch.Tensor:
    return bits.long() & 0xFFFFFFFF


def test_tensor_and_integer_hash_agree():
    words = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 123456789], dtype=torch.int32)
    assert unsigned(_mix_tensor(words)).tolist() == [_mix(w) for w in words.tolist()]


def test_the_hash_is_a_bijection_on_a_large_window():
    hashed = _mix_tensor(torch.arange(1 << 22, dtype=torch.int32))
    assert hashed.unique().numel() == 1 << 22


def test_words_are_uniform_in_their_upper_and_lower_bits():
    bits = unsigned(uniform_bits((1 << 20,), seed=3, layer=1))
    for part in (bits >> 24, bits & 0xFF):
        assert chisquare(torch.bincount(part, minlength=256).numpy()).pvalue > 1e-4


def test_pure_function_of_seed_layer_and_position():
    bits = uniform_bits((7, 11), seed=2**63 + 5, layer=4)
    assert torch.equal(bits, uniform_bits((77,), seed=2**63 + 5, layer=4).view(7, 11))
    for seed, layer in [(2**63 + 6, 4), (5, 4), (2**63 + 5, 5)]:
        other = uniform_bits((7, 11), seed=seed, layer=layer)
        assert (bits == other).sum() <= 1
        assert not torch.equal(bits.flatten().sort().values, other.flatten().sort().values)


def test_neighbouring_layers_and_seeds_are_uncorrelated():
    def centred(seed, layer):
        return unsigned(uniform_bits((1 << 18,), seed, layer)).double() / 2**32 - 0.5

    base = centred(0, 0)
    for seed, layer in [(0, 1), (1, 0), (1, 1), (2**32, 0)]:
        correlation = (base * centred(seed, layer)).mean() * 12
        assert abs(correlation.item()) < 5 / 2**9


def test_all_words_give_uniform_numbers():
    """Equal steps over the 2**31 values that count, of which this takes every 127th; never 0 or 1."""
    words = torch.arange(0, 1 << 31, 127, dtype=torch.int64).to(torch.int32)
    u, rest = both_ends(words)
    exact = (words.double() + 0.5) * 2.0**-31
    assert u.min() > 0
    assert rest.min() > 0
    assert ((u.double() - exact).abs() <= exact * 2.0**-23).all()
    assert ((rest.double() - (1 - exact)).abs() <= (1 - exact) * 2.0**-23).all()
    # The sign bit does not count.
    assert torch.equal(both_ends(words | -(1 << 31))[0], u)
    assert torch.equal(to_uniform(words), (words.double() + 0.5) * 2.0**-32 + 0.5)


def test_the_hash_of_24_bits_is_uniform():
    """All 2**24 positions: the final numbers fill 4,096 equal bins, at their finest scale as well."""
    words = unsigned(uniform_bits((1 << 24,), seed=11, layer=5))
    assert words.unique().numel() == 1 << 24
    for part in (words >> 20, words & 0xFFF, words >> 10 & 0xFFF):
        assert chisquare(torch.bincount(part, minlength=4096).numpy()).pvalue > 1e-4
    small = (words & 0x7FFFFFFF).double().mul(2.0**-31)
    for probability in (2.718281828**-6, 2.718281828**-10, 2.718281828**-12):
        expected = probability * 2**24
        assert abs((small < probability).sum().item() - expected) < 5 * expected**0.5


def test_members_groups_layers_and_seeds_are_independent():
    def numbers(seed, layer):
        return both_ends(uniform_bits((1 << 18,), seed, layer))[0]

    base = numbers(3, 4)
    members = both_ends(uniform_bits((2, 1 << 18), 3, 4))[0]
    assert torch.equal(members[0], base)
    others = {
        "the next member": members[1],
        "the next group": base.roll(1),
        "a group of the next row": base.roll(144),
        "the next layer": numbers(3, 5),
        "the next seed": numbers(4, 4),
        "seed and layer exchanged": numbers(4, 3),
        "further words": both_ends(more_words(uniform_bits((1 << 18,), 3, 4), 0))[0],
    }
    for name, other in others.items():
        table = torch.bincount((base * 16).int() * 16 + (other * 16).int(), minlength=256)
        assert chisquare(table.numpy()).pvalue > 1e-4, name
    for other in (numbers(3, 5), numbers(4, 4), numbers(4, 3)):
        assert (base.sort().values == other.sort().values).float().mean() < 0.01


def test_compiled_bits_equal_eager_bits(compiler):
    compiled = torch.compile(lambda seed: uniform_bits((3, 1 << 12), 12345, 6), fullgraph=True)
    assert torch.equal(compiled(0), uniform_bits((3, 1 << 12), 12345, 6))


@pytest.mark.gpu
def test_bits_on_the_gpu_equal_those_on_the_cpu():
    assert torch.equal(uniform_bits((3, 1 << 16), 12345, 6, "cuda").cpu(), uniform_bits((3, 1 << 16), 12345, 6))
