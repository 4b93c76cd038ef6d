"""The README's Python, run as it is pasted."""

import re
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_maskpro import check_sparsity


README = Path(__file__).parents[1] / "README.md"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def offline(monkeypatch):
    """Fail whatever asks the Hub, instead of asking it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_every_python_block_runs_as_pasted(tmp_path, monkeypatch, checkpoint, offline):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert any(HUB_ID in block for block in blocks)
    pasted = {}
    for block in blocks:
        exec(block.replace(HUB_ID, str(checkpoint)), pasted)
    masked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), "my-2of4-mask")
    assert masked.peft_config["default"].lineage[0]["training"]["steps"] == 120
    assert check_sparsity("my-sparse-model", 2, 4)
