import json

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig, check_sparsity
from hf_maskpro.deploy import to_onnx, to_semi_structured, to_torchao_fp8
from hf_maskpro.deploy.onnx import ONNX_TOLERANCE
from hf_maskpro.deploy.semi_structured import _why_dense
from hf_maskpro.deploy.torchao import TORCHAO_FILE

from ..conftest import tiny_gpt2, tiny_llama


@pytest.mark.parametrize(("make", "layers"), [(tiny_llama, 14), (tiny_gpt2, 8)])
def test_an_onnx_graph_has_the_logits_and_the_zeros(tmp_path, make, layers):
    onnx_ir, _ = pytest.importorskip("onnx_ir"), pytest.importorskip("onnxruntime")
    model = get_peft_model(make(), MaskProConfig()).merge_and_unload()
    report = to_onnx(model, None, tmp_path / "onnx")
    assert report["layers"] == layers
    assert report["logits_differ"] <= ONNX_TOLERANCE
    files = ["config.json", "model.onnx", "model.onnx.data"]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == files
    graph = onnx_ir.load(tmp_path / "onnx" / "model.onnx").graph
    zeros = sum(int((value.const_value.numpy() == 0).sum()) for value in graph.initializers.values())
    assert zeros >= sum(model.get_parameter(name).numel() for name in check_sparsity(model, 2, 4)) // 2


def test_an_onnx_graph_of_a_dense_model_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="no linear layer of the model is 2:4"):
        to_onnx(tiny_llama(), None, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_for_fp8(tmp_path):
    core = pytest.importorskip("torchao.core.config")
    tiny_llama().save_pretrained(tmp_path / "base")
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(tmp_path / "adapter")
    get_peft_model(tiny_llama(), MaskProConfig(exclude_modules=["up_proj"])).save_pretrained(tmp_path / "partly")
    to_torchao_fp8(tmp_path / "base", tmp_path / "adapter", tmp_path / "fp8")
    assert set(check_sparsity(tmp_path / "fp8", 2, 4).values()) == {0.5}
    AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    config = core.config_from_dict(json.loads((tmp_path / "fp8" / TORCHAO_FILE).read_text()))
    assert config.packing_format.name == "SPARSE_2D_DATA_2D_METADATA"
    to_torchao_fp8(tmp_path / "fp8", None, tmp_path / "again")
    names = {path.name for path in (tmp_path / "fp8").iterdir()}
    # Without an adapter there is nothing to say in a card.
    assert {path.name for path in (tmp_path / "again").iterdir()} == names - {"README.md"}
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight: .* groups have more than 2 of 4"):
        to_torchao_fp8(tmp_path / "base", tmp_path / "partly", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_semi_structured_needs_cuda():
    with pytest.raises(ValueError, match="the model is on cpu, and torch's 2:4 products need CUDA"):
        to_semi_structured(tiny_llama())


def test_why_a_layer_stays_dense():
    half = get_peft_model(tiny_llama(dtype=torch.bfloat16), MaskProConfig()).merge_and_unload()
    assert _why_dense(half.model.layers[0].mlp.up_proj) is None
    assert "groups have more than 2 of 4" in _why_dense(tiny_llama(dtype=torch.float16).model.layers[0].mlp.up_proj)
    assert "torch.float32" in _why_dense(tiny_llama().model.layers[0].mlp.up_proj)
    assert "[16, 24], and both must be multiples of 16" in _why_dense(nn.Linear(24, 16, dtype=torch.float16))
    assert "Conv1D" in _why_dense(tiny_gpt2().transformer.h[0].mlp.c_fc)


@pytest.mark.gpu
def test_semi_structured_layers_give_the_same_outputs(ids):
    model = get_peft_model(tiny_llama(dtype=torch.float16), MaskProConfig()).merge_and_unload().cuda()
    with torch.no_grad():
        expected = model(input_ids=ids.cuda()).logits
        assert to_semi_structured(model) == {}
        torch.testing.assert_close(model(input_ids=ids.cuda()).logits, expected, rtol=1e-2, atol=1e-2)
