"""Packed products in Triton: interpreted on a CPU, compiled on a GPU."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hf_maskpro
from hf_maskpro.deploy import PackedLinear, pack_layers
from hf_maskpro.deploy.packed import pack

from .test_packed import merged, sparse_weight


pytest.importorskip("triton")

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there they are compiled")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# No multiples of what a program takes, and more groups than it takes at a time.
SHAPES = [(40, 96), (17, 1056)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """Triton's interpreter has bfloat16 as integers, and multiplies matrices of it as such."""
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def exact(self, a, b, *others):
        if a.dtype.scalar == language.bfloat16:
            a, b = (self.cast_impl(operand, language.float32) for operand in (a, b))
        return create_dot(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_dense_weight(device, dtype, shape):
    from hf_maskpro.deploy.packed_triton import linear

    weight = sparse_weight(*shape).to(device, dtype)
    packed = pack(weight)
    torch.manual_seed(0)
    for tokens in (1, 2, 16, 17):
        # One with a bias, the other with strides and beginning within a group.
        plain = torch.randn(tokens, shape[1], device=device).to(dtype)
        strided = torch.randn(tokens, shape[1] + 9, device=device).to(dtype)[:, 7:-2]
        for x, bias in ((plain, torch.randn(shape[0], device=device).to(dtype)), (strided, None)):
            expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
            found = linear(x, *packed, bias)
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)
    one = plain[:1]
    assert linear(one[None], *packed, None).equal(linear(one, *packed, None)[None])
    assert linear(one[:0], *packed, None).shape == (0, shape[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_gives_the_weight_back_bit_for_bit(device, dtype):
    from hf_maskpro.deploy.packed_triton import unpack

    weight = (sparse_weight(37, 96) + 0).to(device, dtype)
    assert unpack(*pack(weight)).view(torch.int16).equal(weight.view(torch.int16))


COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# By themselves, since the whole package takes longer to import than they to compile.
sys.path += sys.argv[1:]
import packed_triton
import sparsegpt_triton
import swaps_triton

packed = {"x": "*i64", "pairs": "*i32", "positions": "*i32", "bias": "*bf16", "y": "*bf16", "outputs": "i32"}
packed |= {"groups": "i32", "tokens": "i32"}
swaps = dict.fromkeys(("weight", "gram", "squares", "inner"), "*fp32") | {"inputs": "i32", "groups": "i32"}
swaps |= {"product": "*fp64", "tolerance": "*fp64", "keep": "*i8"}
choices = dict.fromkeys(("columns", "factor", "errors"), "*fp32") | {"keep": "*i8"}
choices |= dict.fromkeys(("length", "rows", "factor_row", "n"), "i32")


def constants(tile, **others):
    return {"HALF": False, "ROWS": tile[0], "GROUPS": tile[1]} | others


for kernel, types, constexprs in (
    (packed_triton._one, packed, constants(packed_triton.ONE_TILE)),
    (packed_triton._few, packed, constants(packed_triton.FEW_TILE)),
    (packed_triton._unpack, packed | {"weight": "*i64", "count": "i32"}, {"GROUPS": packed_triton._UNPACK_TILE}),
    (swaps_triton._swap, swaps, {"M": 4, "BLOCK": swaps_triton._BLOCK}),
    (sparsegpt_triton._choose, choices, {"M": 4, "LENGTH": 128, "ROWS": sparsegpt_triton._ROWS}),
):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    print(kernel.__name__, "sm_90" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    folders = [str(Path(hf_maskpro.__file__).with_name(name)) for name in ("deploy", "starts")]
    command = [sys.executable, "-c", COMPILE, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "_one",
        "True",
        "_few",
        "True",
        "_unpack",
        "True",
        "_swap",
        "True",
        "_choose",
        "True",
    ]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_on_a_gpu(dtype, ids):
    dense, ids = merged(dtype).cuda(), ids.cuda()
    model = copy.deepcopy(dense)
    assert len(pack_layers(model)) == 1
    assert sum(isinstance(layer, PackedLinear) for layer in model.modules()) == 13
    for inputs in (ids[:1, :1], ids[:, :2], ids):
        torch.testing.assert_close(model(inputs).logits, dense(inputs).logits, rtol=0.05, atol=0.05)
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(3):
        found = compiled(ids[:1, :1]).logits.clone()
    torch.testing.assert_close(found, dense(ids[:1, :1]).logits, rtol=0.05, atol=0.05)
    tokens = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
    logits = dense(tokens).logits[0, 11:-1]
    assert (logits.amax(-1) - logits.gather(1, tokens[0, 12:, None])[:, 0]).max() < 0.05
