import math

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer

from hf_maskpro import MaskProConfig, perplexity

from .conftest import tiny_llama


@pytest.fixture
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def test_perplexity_equals_its_definition(tokenizer):
    model = tiny_llama()
    text = " ".join(f"w{(i * i) % 32}" for i in range(50))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    total = 0.0
    for start in (0, 16, 32):
        with torch.no_grad():
            probabilities = model(input_ids=ids[None, start : start + 16]).logits[0].double().log_softmax(-1)
        total -= sum(probabilities[i, ids[start + i + 1]].item() for i in range(15))
    assert perplexity(model, tokenizer, text, seq_len=16) == pytest.approx(math.exp(total / 45), rel=1e-5)
    shorter = perplexity(model, tokenizer, text, seq_len=16, max_tokens=40)
    assert shorter == perplexity(model, tokenizer, " ".join(text.split()[:32]), seq_len=16)


def test_an_adapter_is_measured_at_its_mode(tokenizer):
    model = get_peft_model(tiny_llama(), MaskProConfig(logit_scale=1.0)).train()
    text = "w1 w2 w3 " * 20
    assert perplexity(model, tokenizer, text, seq_len=16) == perplexity(model, tokenizer, text, seq_len=16)
    assert model.training


def test_bad_input(tokenizer):
    with pytest.raises(ValueError, match="the text has 2 tokens, fewer than one window of 16"):
        perplexity(tiny_llama(), tokenizer, "w1 w2", seq_len=16)
    with pytest.raises(ValueError, match="seq_len is 1"):
        perplexity(tiny_llama(), tokenizer, "w1 w2", seq_len=1)
