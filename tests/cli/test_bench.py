import json
import re

import pytest
import torch

from .test_cli import fails, run


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that is none, on which nothing becomes sparse: what is printed, not what it is worth."""
    monkeypatch.setattr("hf_maskpro.deploy.bench.check_device", lambda fp8: None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "no GPU")
    monkeypatch.setattr(
        "hf_maskpro.deploy.bench.to_semi_structured", lambda model, min_weights: {"lm_head.weight": "it is not 2:4"}
    )


def test_bench(checkpoint, pretended):
    bench = ["bench", "--model", checkpoint, "--prefill-tokens", 16, "--batch-size", 2, "--batch-size", 1]
    figures = json.loads(run(*bench, "--repeats", 2, "--json").stdout)
    assert [(row["phase"], row["batch_size"]) for row in figures["rows"]] == [
        ("prefill", 1),
        ("decode", 2),
        ("decode", 1),
    ]
    assert figures["dtype"] == "float32"
    assert figures["tolerance"] == 2**-22
    assert figures["left_dense"] == {"lm_head.weight": "it is not 2:4"}
    printed = run(*bench, "--repeats", 2).stdout
    assert len(re.findall(r"│ decode +│", printed)) == 2
    assert "1 linear layers: it is not 2:4" in printed
    assert "--prefill-tokens 4096 is more than the model's 2,048 positions" in fails(*bench, "--prefill-tokens", 4096)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run it")
def test_a_clear_word_without_a_gpu(checkpoint):
    for bench in (["bench", "--model", checkpoint], ["bench", "--shapes", "7b"], ["bench", "--shapes", "7b", "--fp8"]):
        assert "nothing was measured" in fails(*bench)
    assert "either --model DIR or --shapes 7b" in fails("bench")
