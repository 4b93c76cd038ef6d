"""The refinement, compiled and in torch, against every single swap tried out and against each other."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from hf_maskpro.starts import swaps

from .test_rules import random_layer


@pytest.fixture(params=["compiled", "in torch"])
def way(request, monkeypatch):
    if request.param == "in torch":
        monkeypatch.setattr(swaps, "_library", lambda: None)
    elif swaps._library() is None:
        pytest.skip("no compiler")


def random_mask(rows, n, m, groups):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(rows, m, groups, generator=generator).argsort(1).argsort(1) < n


def errors(weight, inputs, mask, shift=None):
    """By the outputs themselves; a shift adds twice its product with what is dropped."""
    dropped = torch.where(mask.transpose(1, 2).flatten(1), 0, weight).double()
    left = (inputs.double() @ dropped.T).square().sum(0)
    return left if shift is None else left + 2 * (shift * dropped).sum(1)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8), (8, 16)])
def test_swaps_end_in_a_local_optimum(way, n, m, shifted):
    weight, inputs, calibration = random_layer(in_features=32)
    gram, start = calibration.inputs.gram, random_mask(6, n, m, 32 // m)
    shift = 30 * torch.randn(6, 32, generator=torch.Generator().manual_seed(2)) if shifted else None
    refined = swaps.refine(weight, start, gram, shift)
    assert (refined.sum(1) == n).all()
    before, after = errors(weight, inputs, start, shift), errors(weight, inputs, refined, shift)
    assert (after < before).all()
    assert not shifted or not torch.equal(refined, swaps.refine(weight, start, gram))
    rounding = 1e-6 * errors(weight, inputs, start)
    for group, out, into in itertools.product(range(32 // m), range(m), range(m)):
        neighbour = refined.clone()
        neighbour[:, out, group], neighbour[:, into, group] = refined[:, into, group], refined[:, out, group]
        assert (errors(weight, inputs, neighbour, shift) >= after - rounding).all()


def test_the_error_is_that_of_the_outputs():
    weight, inputs, calibration = random_layer()
    mask = random_mask(6, 2, 4, 4)
    left = swaps.reconstruction_error(weight, mask, calibration.inputs.gram)
    torch.testing.assert_close(left, errors(weight, inputs, mask), rtol=1e-4, atol=0)


def test_swaps_leave_an_optimum_alone(way):
    weight, _, calibration = random_layer()
    refined = swaps.refine(weight, random_mask(6, 2, 4, 4), calibration.inputs.gram)
    assert torch.equal(swaps.refine(weight, refined, calibration.inputs.gram), refined)


def test_swaps_leave_a_mask_alone_that_no_input_tells_of(way):
    weight, _, calibration = random_layer()
    start = random_mask(6, 2, 4, 4)
    assert torch.equal(swaps.refine(weight, start, torch.zeros(16, 16)), start)
    # Of some groups the inputs tell.
    gram = calibration.inputs.gram.clone()
    gram[:8], gram[:, :8] = 0, 0
    refined = swaps.refine(weight, start, gram)
    assert torch.equal(refined[:, :, :2], start[:, :, :2])
    assert not torch.equal(refined, start)


def test_features_that_say_the_same_do_not_swap_for_ever(way):
    weight, _, calibration = random_layer(out_features=64)
    copies = torch.arange(16) // 4 * 4
    gram = calibration.inputs.gram[copies][:, copies].contiguous()
    weight[:32] = weight[:32, copies]
    start = random_mask(64, 2, 4, 4)
    refined = swaps.refine(weight, start, gram)
    costs = swaps.reconstruction_error(weight, start, gram)
    assert (swaps.reconstruction_error(weight, refined, gram) <= costs * (1 + 1e-5)).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (8, 16)])
@pytest.mark.parametrize("shifted", [False, True])
def test_compiled_swaps_are_those_in_torch(n, m, shifted):
    if swaps._library() is None:
        pytest.skip("no compiler")
    weight, _, calibration = random_layer(out_features=128, in_features=384, tokens=300)
    # Two features that are far larger than the others, as in a model.
    scale = torch.ones(384)
    scale[torch.tensor([5, 200])] = 100
    gram = calibration.inputs.gram * scale * scale.unsqueeze(1)
    start = random_mask(128, n, m, 384 // m)
    shift = 0.1 * weight @ gram if shifted else None
    plain, refined = swaps.refine_in_torch(weight, start, gram, shift), swaps.refine(weight, start, gram, shift)
    assert (plain == refined).float().mean() >= 0.999
    if not shifted:
        left = [swaps.reconstruction_error(weight, mask, gram).sum() for mask in (plain, refined)]
        torch.testing.assert_close(*left, rtol=1e-4, atol=0)


def test_swaps_take_views(way):
    weight, _, calibration = random_layer()
    mask, gram = random_mask(6, 2, 4, 4), calibration.inputs.gram
    views = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (weight, mask, gram, weight)]
    assert torch.equal(swaps.refine(*views), swaps.refine(weight, mask, gram, weight))


def test_swaps_take_other_precisions(way):
    weight, _, calibration = random_layer()
    mask, gram = random_mask(6, 2, 4, 4), calibration.inputs.gram
    assert torch.equal(swaps.refine(weight.double(), mask, gram.double()), swaps.refine(weight, mask, gram))


@pytest.mark.parametrize("compiler", ["/no/compiler", "/bin/false"])
def test_without_a_compiler_there_is_one_warning(compiler):
    program = """
import warnings, torch
from hf_maskpro.starts import swaps
weight, mask, gram = torch.randn(8, 16), torch.zeros(8, 4, 4, dtype=torch.bool), torch.eye(16)
mask[:, :2] = True
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = (swaps.refine(weight, mask, gram) for _ in range(2))
kept = weight.abs().view(8, 4, 4).topk(2).indices.sort().values
assert torch.equal(first.transpose(1, 2).nonzero()[:, 2].view(8, 4, 2), kept)
assert len([w for w in caught if "plain torch takes" in str(w.message)]) == 1, caught
"""
    environment = os.environ | {"CXX": compiler}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
