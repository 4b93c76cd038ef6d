"""The fused kernels, compiled and eager, against the plain functions."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from hf_maskpro.subset import (
    candidates,
    codes_of,
    compiling,
    keep_of,
    kernels,
    log_prob,
    marginals_backward,
    mask_of,
    mode,
    pack,
    random_keys,
    sample,
    score,
    unpack,
    unpack_codes,
)
from hf_maskpro.subset.codec import code_table


@pytest.fixture(autouse=True)
def compiles(monkeypatch):
    """As in a new process: where no compiler works, an earlier test has found out."""
    monkeypatch.setattr(compiling.Kernel, "compiles", True)


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def compiled(request, monkeypatch):
    if request.param:
        request.getfixturevalue("compiler")
    monkeypatch.setattr(compiling, "SMALLEST_COMPILED", 1 if request.param else 1 << 62)
    return request.param


def layer(n, m, dtype=torch.float32, out_features=24, groups=40):
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(m, out_features, groups, generator=generator).transpose(0, 1)
    initial = mode(torch.rand(out_features, m, groups, generator=generator), n)
    weight = torch.randn(out_features, m * groups, generator=generator).to(dtype)
    return theta, pack(initial, n, m), weight, theta + 2.0 * initial


def rows_of(mask):
    """bool `[out_features, m, groups]` to `[out_features, in_features]`."""
    return mask.transpose(1, 2).flatten(1)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("compiled", "n", "m", "distribution"),
    [
        (False, 2, 4, "plackett_luce"),
        (False, 2, 4, "conditional_poisson"),
        (False, 1, 4, "plackett_luce"),
        (False, 2, 3, "plackett_luce"),
        (False, 4, 8, "plackett_luce"),
        (False, 4, 8, "conditional_poisson"),
        (True, 2, 4, "plackett_luce"),
        (True, 2, 4, "conditional_poisson"),
        pytest.param(True, 4, 8, "conditional_poisson", marks=SLOW),
        pytest.param(True, 1, 4, "plackett_luce", marks=SLOW),
    ],
    indirect=["compiled"],
)
def test_sample_and_update(compiled, n, m, distribution):
    theta, packed, weight, logits = layer(n, m)
    assert torch.equal(mask_of(kernels.mode_codes(theta, packed, 2.0, n), m), mode(logits, n))
    assert torch.equal(kernels.mode_and_apply(weight, theta, packed, 2.0, n) != 0, rows_of(mode(logits, n)))
    drawn = mask_of(kernels.sample_codes(theta, packed, 2.0, n, 7, 3, distribution), m)
    assert (drawn != sample(logits, n, 7, 3, distribution)).any(1).float().mean() < 1e-2
    masked = kernels.sample_and_apply(weight, theta, packed, 2.0, n, 7, 3, distribution)
    assert torch.equal(masked, torch.where(rows_of(drawn), weight, 0))
    moved = theta.clone()
    kernels.score_and_update(moved, packed, 2.0, n, -0.5, 7, 3, distribution)
    torch.testing.assert_close(moved, theta - 0.5 * score(logits, drawn, distribution), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_some_rows_move_as_they_do_in_the_whole_layer(n, m):
    """Of n = 4 a group has several random words, which lie a whole layer apart."""
    theta, packed, _, _ = layer(n, m)
    moved = theta.clone()
    kernels.score_and_update(moved, packed, 2.0, n, -0.5, 7, 3)
    for rows in (slice(0, 3), slice(3, len(theta))):
        part = theta[rows].clone()
        kernels.score_and_update(part, packed[rows], 2.0, n, -0.5, 7, 3, rows=(rows.start, len(theta)))
        torch.testing.assert_close(part, moved[rows], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [2.0, 10.0])
@pytest.mark.parametrize(
    ("n", "distribution"),
    [(2, "plackett_luce"), (2, "conditional_poisson"), pytest.param(1, "plackett_luce", marks=SLOW)],
)
def test_compiled_masks_are_the_eager_masks(compiler, scale, n, distribution):
    """Bit for bit up to n = 2: what decides a mask is exactly rounded."""
    theta = 3 * torch.randn(4, 512, 384, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    packed = pack(mode(torch.rand(512, 4, 384), n), n, 4)
    for seed in range(8):
        assert differing(theta, packed, scale, n, seed, distribution) == 0


@SLOW
@pytest.mark.parametrize("m", [8, 16])
def test_how_often_compiled_masks_differ_beyond_n_of_two(m):
    """Where exp in float64 decides: not once in a million groups."""
    theta = 3 * torch.randn(m, 512, 256, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    packed = pack(mode(torch.rand(512, m, 256), m // 2), m // 2, m)
    assert sum(differing(theta, packed, 5.0, m // 2, seed, "conditional_poisson") for seed in range(8)) == 0


def differing(theta, packed, scale, n, seed, distribution):
    """How many groups the compiled kernel draws otherwise than the same function run eagerly."""
    m = theta.shape[1]
    eager = kernels._sample_kernel(n, m, distribution, False).function
    arguments = (code_table(n, m, theta.device), kernels._number(scale, theta.device))
    words = random_keys(seed, 3, theta.device)
    drawn = kernels.sample_codes(theta, packed, scale, n, seed, 3, distribution)
    return (drawn != eager(theta, packed, *arguments, *words, None)).sum().item()


@pytest.mark.parametrize("distribution", ["plackett_luce", "conditional_poisson"])
def test_rare_flips_of_the_kernel(compiled, distribution):
    """At C = 10 a sample leaves the mode as often as the probabilities say."""
    theta = torch.zeros(4, 4096, 1024).transpose(0, 1)
    initial = mode(torch.rand(4096, 4, 1024, generator=torch.Generator().manual_seed(0)), 2)
    packed = pack(initial, 2, 4)
    drawn = kernels.sample_codes(theta, packed, 10.0, 2, 3, 1, distribution)
    flipped = (drawn != codes_of(initial)).sum().item()
    one = initial[:1, :, :1]
    expected = drawn.numel() * (1 - log_prob(10.0 * one, one, distribution).exp().item())
    assert abs(flipped - expected) < 5 * expected**0.5


def test_eight_of_sixteen():
    theta, packed, weight, logits = layer(8, 16)
    drawn = mask_of(kernels.sample_codes(theta, packed, 2.0, 8, 7, 3, "conditional_poisson"), 16)
    assert torch.equal(drawn, sample(logits, 8, 7, 3, "conditional_poisson"))
    masked = kernels.sample_and_apply(weight, theta, packed, 2.0, 8, 7, 3, "conditional_poisson")
    assert torch.equal(masked, torch.where(rows_of(drawn), weight, 0))
    moved = theta.clone()
    kernels.score_and_update(moved, packed, 2.0, 8, 1.0, 7, 3, "conditional_poisson")
    torch.testing.assert_close(moved, theta + score(logits, drawn, "conditional_poisson"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=SLOW)], indirect=True)
def test_theta_in_any_memory_order(compiled):
    theta, packed, weight, _ = layer(2, 4)
    other = theta.contiguous()
    assert other.stride() != theta.stride()
    assert torch.equal(*(kernels.sample_and_apply(weight, t, packed, 2.0, 2, 7) for t in (theta, other)))
    for t in (theta, other):
        kernels.score_and_update(t, packed, 2.0, 2, 1.0, 7)
    torch.testing.assert_close(theta, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_weights_and_gradients(compiled, dtype, n, m):
    if compiled and n != 2:
        pytest.skip("compiling takes long")
    theta, packed, weight, logits = layer(n, m, dtype)
    keep = rows_of(unpack(packed, n, m, weight.shape[1]))
    assert torch.equal(kernels.apply_packed(weight, packed, n, m), torch.where(keep, weight, 0))
    assert torch.equal(keep_of(unpack_codes(packed, n, m, weight.shape[1]), m), keep)
    grad = torch.randn(weight.shape).to(dtype)
    worth = (grad.float() * weight.float()).unflatten(1, (-1, m)).transpose(1, 2)
    expected = marginals_backward(logits, n, worth)
    got = kernels.theta_gradient(theta, packed, 2.0, n, grad, weight)
    assert got.stride() == theta.stride()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_with_curvature_its_mean_is_the_gradient_of_the_expected_loss(compiled, dtype, n, m):
    """Exactly, over all masks of a group, where each weight's own effect is quadratic; the slope alone is not."""
    if compiled and n != 2:
        pytest.skip("compiling takes long")
    theta, packed, weight, logits = layer(n, m, dtype)
    torch.manual_seed(0)
    slope = torch.randn(weight.shape)
    rows, columns = torch.rand(len(weight), 1) + 0.5, torch.rand(weight.shape[1]) + 0.5
    sets = candidates(n, m, torch.device("cpu"))
    leaf = logits.detach().double().requires_grad_(True)
    chances = torch.einsum("cm,rmg->crg", sets.double(), leaf).softmax(0)
    expected, mean, by_slope = torch.zeros(()).double(), 0, 0
    for kept, chance in zip(sets, chances, strict=True):
        masked = torch.where(kept.bool().repeat(weight.shape[1] // m), weight, 0)
        loss = slope.double() * masked.double() + rows.double() * columns * masked.double().square() / 2
        expected = expected + (chance * loss.unflatten(1, (-1, m)).sum(2)).sum()
        grad = (slope + rows * columns * masked.float()).to(dtype)
        share = chance.detach().float().unsqueeze(1)
        mean = mean + share * kernels.theta_gradient(theta, packed, 2.0, n, grad, weight, (masked, rows, columns))
        by_slope = by_slope + share * kernels.theta_gradient(theta, packed, 2.0, n, grad, weight)
    (exact,) = torch.autograd.grad(expected, leaf)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(mean.double(), exact, atol=tolerance, rtol=tolerance)
    assert (by_slope - exact).norm() > 0.1 * exact.norm()


def test_parameters_and_tensors_without_a_graph_share_a_compilation(compiler, monkeypatch):
    """The one is a backward pass by the slope alone, the other the pull towards large weights."""
    monkeypatch.setattr(compiling, "SMALLEST_COMPILED", 1)
    theta, packed, weight, _ = layer(2, 4)
    parameters = torch.nn.Parameter(theta), torch.nn.Parameter(weight)
    kernels.theta_gradient(parameters[0], packed, 2.0, 2, torch.randn(weight.shape), parameters[1])
    factors = torch.ones(len(weight), 1), torch.ones(weight.shape[1])
    masked = kernels.apply_packed(weight, packed, 2, 4)
    kernels.theta_gradient(theta, packed, 2.0, 2, weight, weight, (masked, *factors))
    with torch._dynamo.config.patch(error_on_recompile=True):
        kernels.theta_gradient(theta, packed, 2.0, 2, weight, weight)
        # As an output that was kept for the backward pass.
        kernels.theta_gradient(theta, packed, 2.0, 2, weight, weight, (masked.requires_grad_(True), *factors))


def test_a_weight_that_does_not_start_on_a_word(compiled):
    _, packed, weight, _ = layer(2, 4, torch.bfloat16)
    shifted = torch.cat([torch.zeros(1, dtype=torch.bfloat16), weight.flatten()])[1:].view(weight.shape)
    assert torch.equal(kernels.apply_packed(shifted, packed, 2, 4), kernels.apply_packed(weight, packed, 2, 4))


def test_dropped_weights_are_selected_not_multiplied(compiled):
    for dtype in (torch.float32, torch.bfloat16):
        _, packed, weight, _ = layer(2, 4, dtype)
        weight[0], weight[1] = torch.inf, -1.0
        masked = kernels.apply_packed(weight, packed, 2, 4)
        assert not masked.isnan().any()
        assert not masked[1][masked[1] == 0].signbit().any()


def test_rounding_bfloat16_at_random_is_unbiased(compiled):
    """A change far below the unit in the last place arrives on average, where nearest rounding would lose it."""
    theta = torch.full((4, 512, 512), 1.0, dtype=torch.bfloat16).transpose(0, 1)
    packed = pack(mode(torch.rand(512, 4, 512), 2), 2, 4)
    moved, exact = theta.clone(), theta.float().clone()
    for step in range(8):
        kernels.score_and_update(moved, packed, 5.0, 2, 2e-3, step)
        kernels.score_and_update(exact, packed, 5.0, 2, 2e-3, step)
    unit = 2.0**-7
    for initial in (False, True):
        here = mode(theta.float() + 5.0 * unpack(packed, 2, 4, 2048), 2) == initial
        change, expected = (t.float()[here].mean().item() - 1.0 for t in (moved, exact))
        assert abs(change - expected) < 5 * unit / 2 * (8 / here.sum().item()) ** 0.5
    flipped = (exact - 1).abs() > 1e-3
    assert flipped.sum() > 1000
    for sign in (-1, 1):
        chosen = flipped & ((exact - 1) * sign > 0)
        ratio = (moved.float() - 1)[chosen].mean() / (exact - 1)[chosen].mean()
        assert abs(ratio.item() - 1) < 0.2


def test_one_kernel_serves_all_shapes(compiled):
    """dynamic=True: another shape must not be another minute of compiling."""
    kernels._sample_kernel.cache_clear()
    counters.clear()
    for out_features, groups in [(24, 40), (32, 60), (48, 44), (16, 128)]:
        theta, packed, weight, _ = layer(2, 4, out_features=out_features, groups=groups)
        masked = kernels.sample_and_apply(weight, theta, packed, 2.0, 2, 7)
        keep = rows_of(mask_of(kernels.sample_codes(theta, packed, 2.0, 2, 7), 4))
        assert torch.equal(masked, torch.where(keep, weight, 0))
    # Two each: one for padded rows of packed masks, one for others.
    assert counters["stats"]["unique_graphs"] <= 4


def test_a_long_compilation_is_announced(compiler, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "SMALLEST_COMPILED", 1)
    monkeypatch.setattr(compiling, "_SECONDS_OF_SILENCE", 0.0)
    kernels._mode_kernel.cache_clear()
    # The first has padded rows, which are compiled for by themselves.
    for groups in (40, 60):
        theta, packed, _, _ = layer(2, 4, groups=groups)
        for _ in range(2):
            kernels.mode_codes(theta, packed, 2.0, 2)
    assert sum("compiling the mask kernel 2:4 mode" in record.message for record in caplog.records) == 2


def test_without_a_compiler_there_is_one_warning_and_the_same_result(tmp_path):
    program = """
import warnings, torch
from hf_maskpro.subset import compiling, kernels
theta, packed = torch.randn(256, 4, 256), torch.zeros(256, 86, dtype=torch.uint8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = (kernels.mode_codes(theta, packed, 5.0, 2) for _ in range(2))
    kernels.sample_codes(theta, packed, 5.0, 2, 1)
assert torch.equal(first, second)
ours = [w for w in caught if "without torch.compile" in str(w.message)]
assert len(ours) == 1, caught
"""
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_on_a_gpu_every_shape_has_a_kernel_of_its_own(monkeypatch):
    compilations = []

    def compile(function, dynamic, fullgraph):
        compilations.append((function.__code__, dynamic))
        return function

    monkeypatch.setattr("torch.compile", compile)
    monkeypatch.setattr(compiling, "_on_gpu", lambda tensors: True)
    kernel = compiling.Kernel(lambda x, others: x + others[0], "sum")
    for size in (3, 5, 3, 5, 7):
        assert kernel(1 << 20, torch.ones(size), [torch.ones(size)]).tolist() == [2] * size
    assert [dynamic for _, dynamic in compilations] == [True, False, False, False]
    assert len({code for code, _ in compilations}) == 4


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 4)])
def test_codes_by_place_are_those_of_the_words(n, m):
    """What a GPU reads, of rows that fill their words and of padded ones."""
    for groups in (40, 41, 42):
        packed = pack(mode(torch.rand(6, m, groups), n), n, m)
        found = kernels.codes_by_place(packed, code_table(n, m, packed.device), groups)
        assert found.dtype == torch.int32
        assert found.equal(unpack_codes(packed, n, m, m * groups))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [40, 41, 42])
def test_masks_and_updates_on_a_gpu_are_those_of_the_cpu(monkeypatch, groups, dtype):
    monkeypatch.setattr(compiling, "SMALLEST_COMPILED", 1 << 62)
    theta, packed, weight, _ = layer(2, 4, torch.bfloat16, groups=groups)
    found = []
    for device in ("cpu", "cuda"):
        if device == "cuda":
            monkeypatch.setattr(compiling, "SMALLEST_COMPILED", 1)
        moved, words = theta.to(device, dtype, copy=True), packed.to(device)
        masked = kernels.sample_and_apply(weight.to(device), moved, words, 2.0, 2, 7, 3)
        kernels.score_and_update(moved, words, 2.0, 2, -0.5, 7, 3)
        found.append((masked.cpu(), moved.cpu()))
    assert found[0][0].equal(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("home", ["writable", "not writable", "set"])
def test_compiled_kernels_are_kept_where_nobody_else_can_put_any(home, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    if home != "set":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    cache = tmp_path / "cache"
    if home == "not writable":
        cache.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    at_exit = []
    monkeypatch.setattr(
        compiling.atexit, "register", lambda *call, **options: at_exit.append(partial(*call, **options))
    )
    kernel = compiling.Kernel(lambda rows, packed: rows, "test")
    found = []
    kernel.compiled = lambda *args: found.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    kernel(compiling.SMALLEST_COMPILED, torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.uint8))
    if home == "set":
        assert found == [str(tmp_path / "mine")]
        return
    assert Path(found[0]).stat().st_mode & 0o777 == 0o700
    assert (found == [str(cache / "hf_maskpro" / "inductor")]) == (home == "writable")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    compiling._keep_kernels_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == found[0]
    for call in at_exit:
        call()
    assert Path(found[0]).exists() == (home == "writable")
