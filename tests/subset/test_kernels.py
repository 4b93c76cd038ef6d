"""The fused kernels, compiled and eager, against the plain functions."""

import os
import subprocess
import sys

import pytest
import torch

from hf_maskpro.subset import codes_of, keep_of, kernels, marginals_backward, mask_of, mode, sample, score


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def compiled(request, monkeypatch):
    monkeypatch.setattr(kernels, "SMALLEST_COMPILED", 1 if request.param else 1 << 62)


def layer(n, m, dtype=torch.float32, out_features=24, groups=40):
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(out_features, m, groups, generator=generator)
    initial = mode(torch.rand(out_features, m, groups, generator=generator), n)
    weight = torch.randn(out_features, m * groups, generator=generator).to(dtype)
    return theta, initial, weight, theta + 2.0 * initial


def test_two_of_four(compiled):
    theta, initial, _, logits = layer(2, 4)
    codes = codes_of(initial)
    assert torch.equal(mask_of(codes, 4), initial)
    assert torch.equal(mask_of(kernels.mode_codes(theta, codes, 2.0, 2), 4), mode(logits, 2))
    for distribution in ("plackett_luce", "conditional_poisson"):
        drawn = kernels.sample_codes(theta, codes, 2.0, 2, 7, 3, distribution)
        expected = sample(logits, 2, 7, 3, distribution)
        assert (mask_of(drawn, 4) != expected).any(1).float().mean() < 1e-2
        moved = theta.clone()
        kernels.move_logits(moved, codes, drawn, 2.0, 2, -0.5, distribution)
        gradient = score(logits, mask_of(drawn, 4), distribution)
        torch.testing.assert_close(moved, theta - 0.5 * gradient, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_and_gradients(compiled, dtype):
    theta, initial, weight, logits = layer(2, 4, dtype)
    codes = codes_of(initial)
    masked = kernels.apply_codes(weight, codes, 4)
    assert torch.equal(masked, torch.where(keep_of(codes, 4), weight, 0))
    assert torch.equal(keep_of(codes, 4).unflatten(1, (-1, 4)).transpose(1, 2), initial)
    grad = torch.randn(weight.shape).to(dtype)
    worth = (grad.float() * weight.float()).unflatten(1, (-1, 4)).transpose(1, 2)
    expected = marginals_backward(logits, 2, worth)
    got = kernels.theta_gradient(theta, codes, 2.0, 2, grad, weight)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_a_weight_that_does_not_start_on_a_word():
    _, initial, weight, _ = layer(2, 4, torch.bfloat16)
    codes = codes_of(initial)
    shifted = torch.cat([torch.zeros(1, dtype=torch.bfloat16), weight.flatten()])[1:].view(weight.shape)
    assert torch.equal(kernels.apply_codes(shifted, codes, 4), kernels.apply_codes(weight, codes, 4))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 8)])
def test_other_patterns(n, m):
    theta, initial, weight, logits = layer(n, m)
    codes = codes_of(initial)
    drawn = kernels.sample_codes(theta, codes, 2.0, n, 7, 3, "conditional_poisson")
    assert torch.equal(mask_of(drawn, m), sample(logits, n, 7, 3, "conditional_poisson"))
    moved = theta.clone()
    kernels.move_logits(moved, codes, drawn, 2.0, n, 1.0, "plackett_luce")
    torch.testing.assert_close(moved, theta + score(logits, mask_of(drawn, m)), atol=1e-5, rtol=1e-5)
    grad = torch.randn(weight.shape)
    worth = (grad * weight).unflatten(1, (-1, m)).transpose(1, 2)
    got = kernels.theta_gradient(theta, codes, 2.0, n, grad, weight)
    torch.testing.assert_close(got, marginals_backward(logits, n, worth), atol=1e-6, rtol=1e-5)


def test_without_a_compiler_there_is_one_warning_and_the_same_result(tmp_path):
    program = """
import warnings, torch
from hf_maskpro.subset import kernels
theta, codes = torch.randn(256, 4, 256), torch.full((256, 256), 3, dtype=torch.int32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = (kernels.mode_codes(theta, codes, 5.0, 2) for _ in range(2))
    kernels.sample_codes(theta, codes, 5.0, 2, 1)
assert torch.equal(first, second)
ours = [w for w in caught if "without torch.compile" in str(w.message)]
assert len(ours) == 1, caught
"""
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
