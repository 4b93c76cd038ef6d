"""Masks that are learned one decoder layer after another."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from hf_maskpro import MaskProConfig, check_sparsity, initialize_masks
from hf_maskpro.starts import blocks
from hf_maskpro.starts.walk import Inputs
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.layer import has_memory

from ..conftest import tiny_gpt2, tiny_llama


relative_error = blocks.relative_error


def calibration():
    ids = torch.randint(2, 34, (16, 24), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids.split(4)]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("start", ["magnitude", "wanda+swaps"])
def test_learning_brings_the_outputs_of_a_decoder_layer_near_the_dense_ones(make, start, monkeypatch):
    errors = []

    def learn(adapter_name, layers, examples):
        def error():
            return sum(blocks.relative_error(run(), target) for run, target in examples)

        before = error()
        own(adapter_name, layers, examples)
        errors.append((before, error()))

    own = blocks.learn
    monkeypatch.setattr(blocks, "learn", learn)
    model = get_peft_model(make(), MaskProConfig(init_mask=f"{start}+blocks"))
    initialize_masks(model, calibration())
    assert len(errors) == 2
    # Where swaps have done it all, there is nothing left to learn.
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    assert errors[0][1] < errors[0][0]
    assert model.peft_config["default"].start["init_mask"] == f"{start}+blocks"
    check_sparsity(model.merge_and_unload(), 2, 4)


def test_nothing_but_masks_is_left(monkeypatch):
    """Logits and gradients are there for one decoder layer at a time, of an adapter for inference too."""
    seen = []

    def learn(adapter_name, layers, examples):
        def run(run=examples[0][0]):
            theirs = [layer for layer in every_layer.values() if has_memory(layer.maskpro_theta["default"])]
            seen.append(theirs == layers)
            return run()

        own(adapter_name, layers, [(run, examples[0][1])])

    own = blocks.learn
    monkeypatch.setattr(blocks, "learn", learn)
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="magnitude+blocks", inference_mode=True))
    every_layer = masked_layers(model)
    initialize_masks(model, calibration())
    assert seen == [True] * 2 * blocks.STEPS
    for layer in every_layer.values():
        theta = layer.maskpro_theta["default"]
        assert not has_memory(theta)
        assert not theta.requires_grad
        assert theta.grad is None
        assert layer._masked_weight is None


def test_the_size_of_the_error_is_of_no_account(monkeypatch):
    """With Adam's own epsilon a small one would move nothing."""
    changed = []
    for size in (1.0, 1e-3):
        monkeypatch.setattr(blocks, "relative_error", lambda *args, size=size: size * relative_error(*args))
        masks = []
        for refined in ("", "+blocks"):
            model = get_peft_model(tiny_llama(), MaskProConfig(init_mask=f"wanda{refined}"))
            torch.manual_seed(1)
            initialize_masks(model, calibration())
            masks.append(torch.cat([x.learned_mask("default").flatten() for x in masked_layers(model).values()]))
        changed.append((masks[0] != masks[1]).float().mean().item())
    assert changed[0] > 0.05
    assert changed[1] == pytest.approx(changed[0], rel=0.2)


@pytest.mark.parametrize(("start", "gathered"), [("wanda", False), ("wanda+swaps", True), ("sparsegpt", True)])
def test_only_what_looks_at_them_gathers_gram_matrices(start, gathered, monkeypatch):
    seen, own = set(), Inputs.update_beside_dense

    def noted(inputs, *args):
        seen.add(inputs.gram is not None)
        own(inputs, *args)

    monkeypatch.setattr(Inputs, "update_beside_dense", noted)
    monkeypatch.setattr(blocks, "STEPS", 1)
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask=f"{start}+blocks"))
    initialize_masks(model, calibration())
    assert seen == {gathered}


def test_a_decoder_layer_without_masks_is_passed_over():
    config = MaskProConfig(init_mask="magnitude+blocks", layers_to_transform=[1])
    model = get_peft_model(tiny_llama(), config)
    initialize_masks(model, calibration())
    merged = model.merge_and_unload()
    learned = [name for name, _ in merged.named_parameters() if "layers.1." in name and "proj" in name]
    assert len(learned) == 7
    check_sparsity(merged, 2, 4, learned)


def in_file(parameter, path):
    """Whether a parameter is where a file is mapped: it is read when it is used, and takes no memory of its own."""
    maps = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    return any(int(start, 16) <= parameter.data_ptr() < int(end, 16) for start, end in maps)


def test_weights_stay_in_the_checkpoint(tmp_path, monkeypatch):
    """So what is in memory of a model is the decoder layer at work, however many there are."""
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path)
    seen, own = [], blocks.learn

    def are_in_file():
        return all(
            in_file(parameter, tmp_path) for name, parameter in base.named_parameters() if "maskpro" not in name
        )

    def learn(*args):
        own(*args)
        seen.append(are_in_file())

    monkeypatch.setattr(blocks, "learn", learn)
    monkeypatch.setattr(blocks, "STEPS", 1)
    model = get_peft_model(base, MaskProConfig(init_mask="magnitude+blocks", inference_mode=True))
    initialize_masks(model, calibration())
    assert seen == [True] * 4
    assert not in_file(torch.zeros(4), tmp_path)


def test_a_start_is_followed_by_no_other_refinement():
    with pytest.raises(ValueError, match="init_mask is 'wanda\\+blocks\\+swaps'"):
        MaskProConfig(init_mask="wanda+blocks+swaps")
