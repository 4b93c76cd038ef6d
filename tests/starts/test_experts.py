"""Starting masks of experts, each by the tokens that are sent to it."""

import logging

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from hf_maskpro import MaskProConfig, initialize_masks, starts
from hf_maskpro.starts.walk import FEWEST_TOKENS
from hf_maskpro.tuner import masked_layers
from tests.conftest import tiny_gpt_oss, tiny_mixtral


MODELS = pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss])
EXPERTS = 4


@pytest.fixture(scope="module")
def text():
    return [{"input_ids": torch.randint(2, 34, (4, 24), generator=torch.Generator().manual_seed(i))} for i in range(2)]


def masks(make, text, init_mask, **options):
    model = get_peft_model(make(1), MaskProConfig(init_mask=init_mask, **options))
    initialize_masks(model, text)
    return {
        name.rpartition(".")[2]: layer.initial_mask("default").unflatten(0, (EXPERTS, -1))
        for name, layer in masked_layers(model).items()
        if "experts" in name
    }


def seen(make, text):
    """Of every expert of the dense model: its two matrices, and what each multiplies."""
    model = make(1)
    experts, calls = model.model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda module, args: calls.append(args[:2]))
    with torch.no_grad():
        for batch in text:
            model(**batch)
    for number in range(EXPERTS):
        tokens = torch.cat([hidden[(index == number).any(1)] for hidden, index in calls])
        up, down = (getattr(experts, name)[number].detach() for name in ("gate_up_proj", "down_proj"))
        if make is tiny_gpt_oss:
            up, down = up.T, down.T
            gate, linear = (tokens @ up.T + experts.gate_up_proj_bias[number].detach()).unflatten(1, (-1, 2)).unbind(2)
            gate, linear = gate.clamp(max=7), linear.clamp(-7, 7)
            between = gate * torch.sigmoid(1.702 * gate) * (linear + 1)
        else:
            gate, linear = (tokens @ up.T).chunk(2, dim=1)
            between = F.silu(gate) * linear
        yield {"gate_up_proj": (up, tokens), "down_proj": (down, between)}


def largest(scores):
    """The two largest of every four, `[rows, 4, groups]`."""
    groups = scores.unflatten(1, (-1, 4))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(2, dim=2).indices, True).transpose(1, 2)


def lost(weight, mask, inputs):
    return ((weight * ~mask.transpose(1, 2).flatten(1)) @ inputs.T).square().sum()


@MODELS
def test_an_expert_is_chosen_by_the_tokens_that_are_sent_to_it(make, text):
    chosen, magnitude = masks(make, text, "wanda"), masks(make, text, "magnitude")
    for number, matrices in enumerate(seen(make, text)):
        for name, (weight, inputs) in matrices.items():
            assert len(inputs) >= FEWEST_TOKENS
            assert torch.equal(chosen[name][number], largest(weight.abs() * inputs.square().sum(0).sqrt()))
            assert torch.equal(magnitude[name][number], largest(weight.abs()))
            assert not torch.equal(chosen[name][number], magnitude[name][number])


@MODELS
def test_swaps_lower_what_the_experts_lose(make, text):
    chosen, wanda = masks(make, text, "wanda+swaps"), masks(make, text, "wanda")
    totals = {"chosen": 0, "wanda": 0}
    for number, matrices in enumerate(seen(make, text)):
        for name, (weight, inputs) in matrices.items():
            totals["chosen"] += lost(weight, chosen[name][number], inputs)
            totals["wanda"] += lost(weight, wanda[name][number], inputs)
    assert totals["chosen"] < totals["wanda"]


def test_swaps_wait_for_enough_tokens(text, monkeypatch):
    only = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    wanda = masks(tiny_mixtral, text, "wanda", **only)["gate_up_proj"]
    assert not torch.equal(masks(tiny_mixtral, text, "wanda+swaps", **only)["gate_up_proj"], wanda)
    monkeypatch.setattr(starts, "TOKENS_TO_REFINE", 100)
    assert torch.equal(masks(tiny_mixtral, text, "wanda+swaps", **only)["gate_up_proj"], wanda)


@pytest.mark.parametrize("rule", ["ria", "sparsegpt", "gblm", "pruner-zero"])
def test_other_rules_look_at_experts_one_by_one(rule, text):
    chosen, magnitude = masks(tiny_gpt_oss, text, rule), masks(tiny_gpt_oss, text, "magnitude")
    for name, mask in chosen.items():
        assert (mask.sum(2) == 2).all()
        assert not torch.equal(mask, magnitude[name])


@pytest.mark.parametrize("rule", ["wanda", "sparsegpt", "gblm", "pruner-zero", "wanda+swaps"])
def test_an_expert_that_saw_too_few_tokens_keeps_its_largest_weights(rule, text, caplog):
    def make(layers):
        model = tiny_gpt_oss(layers)
        model.model.layers[0].mlp.router.bias.data[2] = -1e4
        return model

    with caplog.at_level(logging.WARNING):
        chosen = masks(make, text, rule)
    magnitude = masks(make, text, "magnitude")
    for name, mask in chosen.items():
        same = [torch.equal(mask[number], magnitude[name][number]) for number in range(EXPERTS)]
        assert same == [False, False, True, False]
    assert f"1 expert saw fewer than {FEWEST_TOKENS} tokens" in caplog.text


@pytest.mark.parametrize("rule", ["wanda", "wanda+swaps"])
def test_padding_is_no_token_of_an_expert(rule, text):
    attention_mask = torch.ones(4, 24, dtype=torch.int64)
    attention_mask[:, 20:] = 0
    padded = [
        [
            {"input_ids": batch["input_ids"].masked_fill(attention_mask == 0, pad), "attention_mask": attention_mask}
            for batch in text
        ]
        for pad in (1, 5)
    ]
    first, second = (masks(tiny_mixtral, batches, rule) for batches in padded)
    for name, mask in first.items():
        assert torch.equal(mask, second[name])


def test_what_experts_outside_of_a_list_are_given_is_counted(caplog):
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = tiny_mixtral(1).model.layers[0].mlp

        def forward(self, inputs_embeds, use_cache):
            return self.moe(inputs_embeds)

    names = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = get_peft_model(Alone(), MaskProConfig(init_mask="wanda", **names))
    with caplog.at_level(logging.WARNING):
        initialize_masks(model, [{"inputs_embeds": torch.randn(8, 2**11, 16)}])
    assert "gathered in one pass, which takes up to 1 MiB" in caplog.text
