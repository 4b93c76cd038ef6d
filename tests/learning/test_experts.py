"""Masks of experts learn as others do."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.learning.arguments import ESTIMATORS
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_gpt_oss, tiny_mixtral
from .test_trainer import arguments, batch_loss, rows


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_experts_learn_and_what_is_learned_is_saved(estimator, tmp_path):
    model = get_peft_model(tiny_mixtral(), MaskProConfig(target_modules=[], target_parameters=EXPERTS))
    weights = {name: parameter.clone() for name, parameter in model.named_parameters() if "maskpro" not in name}
    args = arguments(tmp_path, estimator, max_steps=3, per_device_train_batch_size=8, logging_steps=1)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    for layer in masked_layers(model).values():
        assert layer.maskpro_theta["default"].any()
    for name, before in weights.items():
        assert torch.equal(model.get_parameter(name), before), name
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_mixtral(), tmp_path / "adapter")
    assert batch_loss(loaded, rows()) == pytest.approx(batch_loss(model, rows()), abs=1e-6)


def test_simple_lowers_the_loss_of_transposed_experts(tmp_path):
    model = get_peft_model(tiny_gpt_oss(), MaskProConfig(target_modules=[], target_parameters=EXPERTS))
    before = batch_loss(model, rows())
    args = arguments(tmp_path, "simple", max_steps=40, per_device_train_batch_size=8)
    MaskProTrainer(model, args, train_dataset=rows()).train()
    assert batch_loss(model, rows()) < before - 0.05


def test_residual_lowers_the_loss_of_experts(tmp_path):
    base = tiny_mixtral(1)
    # As they are drawn, hardly anything depends on them.
    for parameter in base.model.layers[0].mlp.experts.parameters():
        parameter.data *= 20
    config = {"target_modules": [], "target_parameters": ["experts.down_proj"], "init_mask": "random"}
    model = get_peft_model(base, MaskProConfig(**config, logit_scale=0.5))
    before = batch_loss(model, rows())
    args = arguments(tmp_path, "residual", max_steps=100, learning_rate=1.0, per_device_train_batch_size=32)
    MaskProTrainer(model, args, train_dataset=rows()).train()
    assert batch_loss(model, rows()) < before - 0.01
