import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

from hf_maskpro import MaskProConfig, packed
from hf_maskpro.deploy.packed import PackedConfig, PackedLinear, PackedQuantizer, pack, to_packed, unpack

from ..conftest import tiny_gpt2, tiny_llama


@pytest.fixture
def compiled() -> None:
    try:
        packed._library()
    except ValueError as error:
        pytest.skip(str(error))


def sparse_weight(out_features: int, in_features: int) -> torch.Tensor:
    """2:4 in bfloat16; some groups have one non-zero or none, and some zeros are negative."""
    groups = torch.randn(out_features, in_features // 4, 4, generator=torch.Generator().manual_seed(0))
    groups.scatter_(2, groups.abs().topk(2, largest=False).indices, 0)
    groups[::3, ::2, 0] = -0.0
    groups[1::3, ::5] = 0
    return groups.flatten(1).bfloat16()


def merged(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """With biases, a tied head, and one layer that is not masked."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=34,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, bias in model.named_parameters():
        if name.endswith(".bias"):
            bias.data.normal_()
    config = MaskProConfig(exclude_modules=["model.layers.1.mlp.up_proj"])
    return get_peft_model(model, config).merge_and_unload()


def test_values_and_positions():
    weight = torch.zeros(1, 32)
    weight[0, [0, 3, 4, 13, 14, 30, 31]] = torch.tensor([1.0, 2, 3, 4, 5, 6, 7])
    values, positions = pack(weight)
    assert values.tolist() == [[1, 2, 3, 0, 0, 0, 4, 5, 0, 0, 0, 0, 0, 0, 6, 7]]
    bits = [i for i in range(32) if positions.item() >> i & 1]
    assert bits == [0, 3, 4, 5, 8, 9, 13, 14, 16, 17, 20, 21, 24, 25, 30, 31]
    values, positions = pack(sparse_weight(48, 64))
    assert values.nbytes + positions.nbytes == 0.5625 * sparse_weight(48, 64).nbytes


def test_unpacking_gives_the_weight_back(compiled):
    weight = sparse_weight(1027, 96)
    assert unpack(*pack(weight)).equal(weight)
    # Without negative zeros, which a merged weight has not, bit for bit.
    weight += 0
    assert unpack(*pack(weight)).view(torch.int16).equal(weight.view(torch.int16))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_features", [64, 1027])
def test_products_equal_dense_ones(compiled, bias, out_features):
    weight = sparse_weight(out_features, 96)
    layer = PackedLinear(96, out_features, bias)
    layer.values, layer.positions = pack(weight)
    if bias:
        layer.bias = torch.randn(out_features).bfloat16()
    for tokens in range(11):
        x = torch.randn(96, tokens).bfloat16().T
        expected = F.linear(x.float(), weight.float(), layer.bias.float() if bias else None)
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.01, atol=0.05)
        assert layer(x[None]).equal(layer(x)[None])


def test_wrong_inputs_are_refused(compiled):
    layer = PackedLinear(32, 8, False)
    with pytest.raises(ValueError, match=r"32 inputs in torch\.bfloat16 on cpu, not 32 in torch\.float32 on cpu"):
        layer(torch.zeros(1, 32))
    with pytest.raises(ValueError, match="not 64 in"):
        layer(torch.zeros(1, 64).bfloat16())
    with pytest.raises(ValueError, match=r"on a CPU packed products are in bfloat16, .* torch\.float16"):
        PackedLinear(32, 8, False, torch.float16)(torch.zeros(1, 32).half())


@torch.no_grad()
def test_layers_are_packed_in_place(compiled, ids):
    dense = merged()
    model = copy.deepcopy(dense)
    left = packed.pack_layers(model)
    assert list(left) == ["model.layers.1.mlp.up_proj.weight"]
    assert "more than 2 of 4" in left["model.layers.1.mlp.up_proj.weight"]
    assert sum(isinstance(layer, PackedLinear) for layer in model.modules()) == 13
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match=r"no layer can be packed; .*torch\.float32 on cpu"):
        packed.pack_layers(merged(torch.float32))
    with pytest.raises(ValueError, match=r"no layer can be packed; .* 16 inputs are no multiple of 32"):
        packed.pack_layers(tiny_llama(dtype=torch.bfloat16))


@torch.no_grad()
def test_a_packed_model_is_the_merged_one(compiled, tmp_path, checkpoint, ids):
    dense, tokenizer = merged(), AutoTokenizer.from_pretrained(checkpoint)
    report = to_packed(copy.deepcopy(dense), tokenizer, tmp_path / "packed")
    assert report == {"layers": 13, "dense_layers": 2}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head", "model.layers.1.mlp.up_proj"]
    packed_layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert len(packed_layers) == 13
    for name, layer in packed_layers.items():
        assert unpack(layer.values, layer.positions).equal(dense.get_submodule(name).weight)
    others = [name for name, _ in model.named_parameters()]
    assert all(model.get_parameter(name).equal(dense.get_parameter(name)) for name in others)
    assert "model.layers.1.mlp.up_proj.weight" in others
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for inputs in (ids[:, :2], ids):  # few tokens and many
        torch.testing.assert_close(model(inputs).logits, dense(inputs).logits, rtol=0.05, atol=0.05)
    # What it makes token by token has the highest logits of the merged model, but for rounding.
    tokens = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
    logits = dense(tokens).logits[0, 11:-1]
    assert (logits.amax(-1) - logits.gather(1, tokens[0, 12:, None])[:, 0]).max() < 0.05
    made = pipeline("text-generation", model=str(tmp_path / "packed"))("w3 w4", max_new_tokens=4)
    assert len(made[0]["generated_text"].split()) > 2


def test_a_loaded_model_can_be_saved_again(compiled, tmp_path):
    to_packed(merged(), None, tmp_path / "packed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "again")]
    assert weights[0] == weights[1]


WRONG = {
    "of another dtype": ("positions", lambda x: x.long(), r"positions is torch\.int64 of shape"),
    "smaller": ("positions", lambda x: torch.full(x.shape, 255, dtype=torch.uint8), r"positions is torch\.uint8 of"),
    "all set": ("positions", lambda x: x | -1, r"positions is not 2:4"),
    "not 2:4": ("positions", lambda x: x | 0x0F, r"positions is not 2:4"),
    "16 of 32 but not 2 of 4": ("positions", lambda x: x * 0 + 0xFFFF, r"positions is not 2:4"),
    "missing": ("positions", lambda x: None, r"has no .*\.positions"),
    "values missing": ("values", lambda x: None, r"has no .*\.values"),
    "values of another dtype": ("values", lambda x: x.view(torch.int16), r"values is torch\.int16 of shape"),
    "bias missing": ("bias", lambda x: None, r"has no .*\.bias"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_file_must_not_hold_is_refused(compiled, tmp_path, wrong):
    kind, change, message = WRONG[wrong]
    to_packed(merged(), None, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f"q_proj.{kind}"))
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", ["all set", "not 2:4", "16 of 32 but not 2 of 4"])
def test_a_state_dict_of_a_packed_layer_is_checked_too(wrong):
    layer = PackedLinear(64, 8, bias=False)
    layer.values, layer.positions = pack(sparse_weight(8, 64))
    state = layer.state_dict()
    PackedLinear(64, 8, bias=False).load_state_dict(state)
    _, change, message = WRONG[wrong]
    changed = state | {"positions": change(state["positions"])}
    with pytest.raises(ValueError, match=message):
        PackedLinear(64, 8, bias=False).load_state_dict(changed)
    with pytest.raises(ValueError, match=r"positions is torch\.int64"):
        PackedLinear(64, 8, bias=False).load_state_dict(state | {"positions": state["positions"].long()}, assign=True)


def test_a_layer_whose_inputs_do_not_fill_whole_words_is_refused():
    with pytest.raises(ValueError, match="has a multiple of 32 inputs, not 48"):
        PackedLinear(48, 8, bias=False)


@pytest.mark.parametrize("dense", [None, "lm_head", [5], [["lm_head"]], {"lm_head": 1}])
def test_layers_that_stay_dense_are_a_list_of_names(dense):
    with pytest.raises(ValueError, match=r"^modules_to_not_convert of .* is no list of names\.$"):
        PackedConfig.from_dict({"modules_to_not_convert": dense, "quant_method": packed.METHOD})


def test_what_cannot_be_packed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no layer can be packed: .* the model is torch\.float32, and 13 of its"):
        to_packed(merged(torch.float32), None, tmp_path / "packed")
    with pytest.raises(ValueError, match="and 0 of its layers are 2:4"):
        to_packed(tiny_llama(dtype=torch.bfloat16), None, tmp_path / "packed")
    # Conv1D.
    with pytest.raises(ValueError, match="and 8 of its layers are 2:4"):
        to_packed(get_peft_model(tiny_gpt2(), MaskProConfig()).merge_and_unload(), None, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="compiled at first use, and no-such-compiler is not there"):
        packed._library.__wrapped__()


def test_without_a_compiler_on_a_machine_with_cuda_loading_on_the_cpu_fails(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    packed._library.cache_clear()
    quantizer = PackedQuantizer(PackedConfig([]))
    quantizer.validate_environment()
    layer = PackedLinear(32, 16, False)
    with pytest.raises(ValueError, match="no-such-compiler is not there"):
        quantizer._process_model_after_weight_loading(torch.nn.Sequential(layer))


def test_without_avx512(monkeypatch, tmp_path, compiled):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -march=x86-64-v3\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ValueError, match=r"cannot be compiled here: .*this CPU has no AVX-512 with BF16 and VBMI2"):
        packed._library.__wrapped__()


def test_a_model_without_its_head(compiled, tmp_path):
    """Its layers are called without the prefix that the folder's list of dense ones has."""
    model = merged()
    ids = torch.arange(2, 10).unsqueeze(0)
    expected = copy.deepcopy(model).model(input_ids=ids).last_hidden_state
    to_packed(model, None, tmp_path / "packed")
    loaded = AutoModel.from_pretrained(tmp_path / "packed")
    assert torch.allclose(loaded(input_ids=ids).last_hidden_state, expected, atol=0.1)
