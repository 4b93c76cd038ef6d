"""Sparse layers on CUDA take any input: for real, and on a CPU with weights that refuse what those on CUDA refuse."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from hf_maskpro import MaskProConfig
from hf_maskpro.deploy import bench as benchmark
from hf_maskpro.deploy import flatten_inputs, to_semi_structured

from ..conftest import tiny_llama


class SemiStructured(SparseSemiStructuredTensorCUSPARSELT):
    """torch's own, with its table of operations, but for the product: which takes what cuSPARSELt takes."""

    @classmethod
    def from_dense(cls, weight):
        nothing = dict.fromkeys(("meta", "packed_t", "meta_t", "compressed_swizzled_bitmask"))
        return cls(weight.shape, packed=weight.clone(), **nothing)

    def _mm(self, x, *, bias=None, should_transpose_dense=False):
        if not should_transpose_dense:
            # An older torch transposes both what goes in and what comes out.
            return self._mm(x.t(), bias=bias, should_transpose_dense=True).t()
        if x.ndim != 2 or not x.is_contiguous():
            raise RuntimeError(f"cuSPARSELt takes no input of shape {x.shape} and strides {x.stride()}")
        return F.linear(x, self.packed, bias)


class Float8(torch.Tensor):
    """A weight whose product takes what torchao's 2:4 product takes: scales per row, of as many dimensions as x."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear and args[0].ndim != 2:
            raise RuntimeError(f"Expected Xq scale argument to be 2D tensor, got {args[0].ndim} dims")
        return super().__torch_function__(function, types, args, kwargs)


def merged(dtype=torch.bfloat16, **sizes):
    model = tiny_llama(dtype=dtype, attention_bias=True, **sizes)
    return get_peft_model(model, MaskProConfig()).merge_and_unload()


@pytest.fixture
def semi_structured(monkeypatch):
    """A model with such weights, and the same one dense."""
    monkeypatch.setattr("hf_maskpro.deploy.semi_structured._check_device", lambda device: None)
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", SemiStructured.from_dense)
    dense = merged()
    sparse = copy.deepcopy(dense)
    assert to_semi_structured(sparse) == {}
    assert isinstance(sparse.model.layers[0].mlp.up_proj.weight, SemiStructured)
    return dense, sparse


@pytest.fixture
def float8(monkeypatch):
    """Both of a pair for the bench, in what stands in for FP8."""

    def quantize(model, config, chosen):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and chosen(module, name):
                module.weight = nn.Parameter(module.weight.detach().as_subclass(Float8), requires_grad=False)

    torchao = SimpleNamespace(
        Float8DynamicActivationFloat8WeightConfig=lambda **_: None, PerRow=lambda: None, quantize_=quantize
    )
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=torchao))
    monkeypatch.setitem(sys.modules, "torchao.quantization", torchao)
    model = merged()
    expected = copy.deepcopy(model)
    _, sparse, left = benchmark.sparse_pair(model, "fp8")
    assert left == {"lm_head.weight": "its shape is no multiple of 16"}
    return expected, sparse


INPUTS = {
    "a vector": lambda x: x[0, 0],
    "rows with gaps": lambda x: x[:, 0],
    "columns for rows": lambda x: x[0, :16].T.contiguous().T,
    "a batch": lambda x: x,
    "the last token of each": lambda x: x[:, -1:],
    "the last token of one": lambda x: x[:1, -1:],
    "tokens before sequences": lambda x: x.transpose(0, 1),
    "four dimensions": lambda x: x.view(2, 2, -1, 16).transpose(1, 2),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["semi_structured", "float8"])
def test_inputs_of_any_shape_and_stride(kind, context, request):
    dense, sparse = request.getfixturevalue(kind)
    x = torch.randn(4, 18, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with context():
        for name in ("self_attn.q_proj", "mlp.up_proj"):  # with a bias and without
            layers = [model.model.layers[0].get_submodule(name) for model in (dense, sparse)]
            for strided in INPUTS.values():
                expected, found = (layer(strided(x)) for layer in layers)
                torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["semi_structured", "float8"])
def test_generation_is_that_of_the_dense_model(kind, request, ids):
    dense, sparse = request.getfixturevalue(kind)
    tokens = [model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1) for model in (dense, sparse)]
    assert tokens[0].equal(tokens[1])


@torch.no_grad()
def test_semi_structured_layers_compile(semi_structured, ids):
    dense, sparse = semi_structured
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, dense(ids).logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("hooked", ["before", "after"])
@torch.no_grad()
def test_inputs_are_flattened_under_the_hooks_of_accelerate(hooked):
    shapes = []

    class Weight(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is F.linear:
                shapes.append(args[0].shape)
            return super().__torch_function__(function, types, args, kwargs)

    layer, x = nn.Linear(16, 32), torch.randn(2, 3, 16)
    expected = layer(x)
    if hooked == "before":
        add_hook_to_module(layer, ModelHook())
    flatten_inputs(layer)
    if hooked == "after":
        add_hook_to_module(layer, ModelHook())
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight))
    torch.testing.assert_close(layer(x).as_subclass(torch.Tensor), expected)
    remove_hook_from_module(layer)
    layer(x)
    assert shapes == [(6, 16)] * 2


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_with_a_forward_of_their_own_stay_dense(semi_structured):
    dense, _ = semi_structured
    dense.model.layers[0].mlp.up_proj.__class__ = Doubled
    left = to_semi_structured(dense)
    assert left == {"model.layers.0.mlp.up_proj.weight": "Doubled has a forward of its own"}
    assert type(dense.model.layers[0].mlp.up_proj.weight) is nn.Parameter


def test_layers_below_a_size_stay_dense(semi_structured):
    dense, _ = semi_structured
    left = to_semi_structured(dense, min_weights=512)
    assert len(left) == 8
    assert set(left.values()) == {"it has 256 weights, fewer than the 512 asked for"}
    assert isinstance(dense.model.layers[0].mlp.down_proj.weight, SemiStructured)
    with pytest.raises(ValueError, match=r"no layer can be converted; .* fewer than the 1,024 asked for"):
        to_semi_structured(merged(), min_weights=1024)


def test_flattening_leaves_other_linear_layers_alone():
    attention = nn.MultiheadAttention(16, 2)
    before = type(attention.out_proj)
    flatten_inputs(attention)
    assert type(attention.out_proj) is before is not nn.Linear


@pytest.mark.gpu
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inputs_of_any_shape_and_stride_on_a_gpu(context):
    dense = merged(torch.float16).cuda()
    sparse = copy.deepcopy(dense)
    assert to_semi_structured(sparse) == {}
    x = torch.randn(4, 18, 16, device="cuda").half()
    with context():
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            layers = [model.model.layers[0].get_submodule(name) for model in (dense, sparse)]
            for strided in INPUTS.values():
                expected, found = (layer(strided(x)) for layer in layers)
                torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


@pytest.mark.gpu
@torch.no_grad()
def test_a_semi_structured_model_generates_and_compiles_on_a_gpu(ids):
    dense, ids = merged(torch.float16).cuda(), ids[:1].cuda()
    sparse = copy.deepcopy(dense)
    assert to_semi_structured(sparse) == {}
    assert_greedy(sparse, dense, ids, 0.02)
    compiled = torch.compile(sparse, fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, dense(ids).logits, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@torch.no_grad()
def test_an_fp8_model_on_a_gpu(ids):
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    model = merged(hidden_size=128, intermediate_size=256).cuda()
    dense, sparse, left = benchmark.sparse_pair(model, "fp8")
    assert left.keys() == {"lm_head.weight"}
    layers = [model.model.layers[0].mlp.up_proj for model in (dense, sparse)]
    x = torch.randn(4, 18, 128, device="cuda").bfloat16()
    for strided in (x, x[:, -1:], x[:1, -1:], x.transpose(0, 1)):
        expected, found = (layer(strided) for layer in layers)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    ids = ids[:1].cuda()
    assert_greedy(sparse, dense, ids, 0.05)
    compiled = torch.compile(sparse)
    torch.testing.assert_close(compiled(ids).logits, dense(ids).logits, rtol=0.05, atol=0.05)


def assert_greedy(model, other, ids, tolerance):
    """What a model generates, another would as well, but for rounding."""
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)
    logits = other(tokens).logits[0, ids.shape[1] - 1 : -1]
    assert (logits.amax(-1) - logits.gather(1, tokens[0, ids.shape[1] :, None])[:, 0]).max() < tolerance
