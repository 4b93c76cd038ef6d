import torch
from scipy.stats import chisquare

from hf_maskpro.subset import uniform_bits
from hf_maskpro.subset.bits import _mix, _mix_tensor


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
