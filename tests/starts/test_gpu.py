"""Kernels in Triton: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

from hf_maskpro.starts import gpu, sparsegpt, swaps

from .test_rules import random_layer
from .test_swaps import random_mask


pytest.importorskip("triton")

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there they are compiled")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture
def in_triton(monkeypatch):
    """What a GPU runs, on whatever device the operands are."""
    monkeypatch.setattr(gpu, "_on_gpu", lambda weight: True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "m", "shifted"), [(2, 4, False), (1, 4, True), (4, 8, False), (3, 16, False)])
def test_swaps_are_those_in_torch(in_triton, device, n, m, shifted):
    weight, _, calibration = random_layer(out_features=3, in_features=2 * m * 3, tokens=100)
    weight, gram = weight.to(device), calibration.inputs.gram.to(device)
    start = random_mask(3, n, m, 6).to(device)
    shift = 0.1 * weight @ gram if shifted else None
    refined = swaps.refine(weight, start, gram, shift)
    assert refined.equal(swaps.refine_in_torch(weight, start, gram, shift))
    assert not refined.equal(start)
    assert refined.sum(1).eq(n).all()


def test_without_a_working_triton_swaps_are_in_torch(in_triton, monkeypatch):
    from hf_maskpro.starts import swaps_triton

    def refine(*operands):
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(swaps_triton, "refine", refine)
    gpu._works.cache_clear()
    weight, _, calibration = random_layer(out_features=3, in_features=24, tokens=100)
    start = random_mask(3, 2, 4, 6)
    expected = swaps.refine_in_torch(weight, start, calibration.inputs.gram)
    with pytest.warns(UserWarning, match=r"Triton does not work: Failed to find C compiler\.$") as warned:
        found = [swaps.refine(weight, start, calibration.inputs.gram) for _ in range(2)]
    gpu._works.cache_clear()
    assert len(warned) == 1
    assert all(mask.equal(expected) for mask in found)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_swapped_without_a_gain(in_triton, device):
    weight, start = torch.randn(4, 16).to(device), random_mask(4, 2, 4, 4).to(device)
    assert swaps.refine(weight, start, torch.zeros(16, 16, device=device)).equal(start)
    everything = torch.ones_like(start)
    assert swaps.refine(weight, everything, torch.eye(16, device=device)).equal(everything)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "m", "groups"), [(2, 4, 33), (1, 3, 43), (4, 8, 5), (5, 16, 9)])
def test_choices_of_sparsegpt_are_those_in_torch(in_triton, monkeypatch, device, n, m, groups):
    weight, _, calibration = random_layer(out_features=35, in_features=groups * m, tokens=200)
    # Of equal ones the first, in a column that is never used as well.
    weight[0, :m] = 1
    calibration.inputs.gram[:, m + 1] = calibration.inputs.gram[m + 1] = 0
    weight, calibration.inputs.gram = weight.to(device), calibration.inputs.gram.to(device)
    assert sparsegpt._way(weight).__module__.endswith("sparsegpt_triton")
    found = sparsegpt.mask(weight, calibration, n, m)
    monkeypatch.setattr(sparsegpt, "_way", lambda weight: sparsegpt._choose_in_torch)
    # A GPU rounds otherwise, by which another of two that cost the same may be kept.
    same = found == sparsegpt.mask(weight, calibration, n, m)
    assert same.all() if device == "cpu" else same.float().mean() > 0.999
    assert found.sum(1).eq(n).all()
