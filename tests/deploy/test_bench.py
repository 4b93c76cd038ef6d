"""What can be told without a GPU: who is timed when, and what becomes of the times."""

import copy
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from hf_maskpro import check_sparsity
from hf_maskpro.deploy import bench as benchmark

from ..conftest import tiny_llama


@pytest.fixture
def small(monkeypatch):
    shape = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, vocab_size=64
    )
    monkeypatch.setitem(benchmark.SHAPES, "7b", shape)
    return benchmark.random_model("7b", torch.bfloat16, "cpu")


def test_two_functions_take_turns():
    calls = []
    times = benchmark.in_turns(lambda: calls.append("a"), lambda: calls.append("b"), repeats=4)
    pairs = ["".join(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert pairs == ["ba", "ab"] * 3 + ["ba"]
    assert [len(each) for each in times] == [4, 4]


def test_random_models_are_2of4(small):
    names = [f"{name}.weight" for name, module in small.model.named_modules() if isinstance(module, torch.nn.Linear)]
    report = check_sparsity(small, 2, 4)
    assert len(report) == len(names) == 14
    assert set(report.values()) == {0.5}
    assert small.dtype == torch.bfloat16


def test_the_slower_and_the_different_model_are_found_out(small):
    slow = copy.deepcopy(small)
    slow.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.05))
    slow.model.layers[1].mlp.down_proj.weight.data *= 1.5
    same, worse = (list(benchmark.compare(small, other, [24], [1, 3], 3)) for other in (copy.deepcopy(small), slow))
    assert [(row["phase"], row["batch_size"], row["tokens"]) for row in worse] == [
        ("prefill", 1, 24),
        ("decode", 1, 128),
        ("decode", 3, 128),
    ]
    for row in same:
        assert row["difference"] == 0
    for row in worse:
        assert row["difference"] > 1e-3
        assert row["ratio"] < 0.5
        assert (row["mode"], row["sparse"]) == ("eager", "slower")
        assert row["sparse_seconds"] > 0.05 > row["dense_seconds"] > 0


def test_a_pass_that_fails_costs_no_other(small, monkeypatch):
    broken = copy.deepcopy(small)

    def refuse(module, inputs):
        if inputs[0].shape[0] == 3:
            raise RuntimeError("out of memory\nand more")

    broken.model.layers[0].mlp.up_proj.register_forward_pre_hook(refuse)
    rows = list(benchmark.compare(small, broken, [24], [3, 1], 1))
    assert [row.get("failed") for row in rows] == [None, "out of memory", None]


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, and so cannot be captured as a CUDA graph."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        assert packet not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_steps_do_not_wait_for_the_device_and_can_be_repeated(small):
    ids = torch.randint(64, (2, 24))
    for make in (benchmark._prefill, benchmark._decode):
        step = make(small, ids)
        expected = small(input_ids=ids if make is benchmark._prefill else torch.cat([ids, ids[:, -1:]], 1)).logits
        with NoWaiting():
            found = [step()[:, -1] for _ in range(3)]
        torch.testing.assert_close(torch.stack(found), expected[:, -1].expand(3, -1, -1), rtol=0.02, atol=0.02)


def test_the_sparse_model_is_a_copy(small, monkeypatch):
    def convert(model, min_weights):
        model.lm_head.weight.data.zero_()
        return {"lm_head.weight": "it is not 2:4"}

    monkeypatch.setattr("hf_maskpro.deploy.bench.to_semi_structured", convert)
    dense, sparse, left = benchmark.sparse_pair(small)
    assert dense is small
    assert dense.lm_head.weight.abs().max() > 0 == sparse.lm_head.weight.abs().max()
    assert left == {"lm_head.weight": "it is not 2:4"}


def test_fp8_of_nothing_that_is_2of4(small, monkeypatch):
    message = (
        r"nothing was measured: no layer can be FP8 \+ 2:4; model\.layers\.0\.self_attn\.q_proj\.weight: it is torch"
    )
    with pytest.raises(ValueError, match=message):
        benchmark.sparse_pair(tiny_llama(), "fp8")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-maskpro\[fp8\]'"):
        benchmark.sparse_pair(small, "fp8")


def test_which_layers_can_be_fp8():
    sparse = torch.tensor([[1.0, 2.0, 0.0, 0.0]], dtype=torch.bfloat16).repeat(16, 4)
    assert benchmark._why_not_fp8(sparse) is None
    assert benchmark._why_not_fp8(sparse.half()) == "it is torch.float16, not bfloat16"
    assert benchmark._why_not_fp8(sparse[:8]) == "its shape is no multiple of 16"
    assert benchmark._why_not_fp8(torch.ones_like(sparse)) == "it is not 2:4"


def test_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"nothing was measured: 2:4 needs .* 8\.0 or newer, and torch finds no GPU"):
        benchmark.check_device()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "A100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    benchmark.check_device()
    with pytest.raises(ValueError, match=r"FP8 \+ 2:4 needs .* 9\.0 or newer, and A100 has 8\.0"):
        benchmark.check_device(fp8=True)
