"""Masks over quantized weights, which are never there in full size but for the layer at work."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, get_peft_model

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments, initialize_masks
from hf_maskpro.deploy import merge
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.model import logger

from ..conftest import tiny_llama


torchao = pytest.importorskip("torchao.quantization")

KINDS = {
    "int8": torchao.Int8WeightOnlyConfig(),
    "int4": torchao.IntxWeightOnlyConfig(torch.int4),
}


def quantized(kind="int8", seed=0, dtype=torch.bfloat16):
    model = tiny_llama(seed, dtype)
    torchao.quantize_(model.model, KINDS[kind])
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["simple", "residual"])
def test_what_is_learned_is_what_the_weights_in_full_size_would_have_learned(kind, estimator, ids, tmp_path):
    def learn(base):
        model = get_peft_model(base, MaskProConfig(init_mask="wanda+swaps"))
        initialize_masks(model, [{"input_ids": ids}])
        # Adam would make much of what is rounding.
        settings = {"optim": "sgd", "learning_rate": 300.0} if estimator == "simple" else {}
        args = MaskProTrainingArguments(
            str(tmp_path), estimator=estimator, max_steps=2, save_strategy="no", report_to="none", **settings
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        MaskProTrainer(model, args, train_dataset=data).train()
        return {name: layer.maskpro_theta["default"].detach() for name, layer in masked_layers(model).items()}

    base, plain = quantized(kind, dtype=torch.float32), tiny_llama()
    for name, module in base.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            plain.model.get_submodule(name).weight.data.copy_(module.weight.dequantize())
    theirs, mine = learn(plain), learn(base)
    for name, theta in mine.items():
        assert theta.any()
        torch.testing.assert_close(theta, theirs[name], rtol=1e-2, atol=1e-3)


def test_the_dtype_of_a_quantized_weight_is_no_advice(ids, monkeypatch, caplog):
    monkeypatch.setattr("hf_maskpro.tuner.model.multiplies_in", lambda dtype: False)
    logger.warning_once.cache_clear()
    for base, told in ((quantized(), 0), (tiny_llama(), 1)):
        initialize_masks(get_peft_model(base, MaskProConfig()), [{"input_ids": ids}])
        assert caplog.text.count("this CPU has no instructions") == told


def test_no_copy_in_full_size_stays(ids):
    model = get_peft_model(quantized(), MaskProConfig())
    for train in (False, True):
        model.train(train)
        model(input_ids=ids, labels=ids, use_cache=False)
        for layer in masked_layers(model).values():
            assert layer._masked_weight is None


def test_a_mask_is_merged_into_the_weights_in_full_size(ids, tmp_path):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = get_peft_model(quantized(), MaskProConfig())
    config = model.peft_config["default"]
    known, config.base_model_name_or_path, config.revision = config.base_fingerprint, str(tmp_path / "base"), "abc"
    assert all(value.startswith("Int8Tensor:") for value in known.values())
    with pytest.raises(ValueError, match="quantized \\(Int8Tensor\\), and a mask is merged"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    compared = r"a copy of .*base at revision abc that is quantized \(Int8Tensor\): .* no more than the signs"
    with pytest.warns(UserWarning, match=compared):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tiny_llama(1, torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="learned for other weights"), pytest.warns(UserWarning, match=compared):
        merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "none")

    with pytest.warns(UserWarning, match=compared):
        loaded = PeftModel.from_pretrained(tiny_llama(dtype=torch.bfloat16), tmp_path / "adapter")
    for layer, other in zip(masked_layers(loaded).values(), masked_layers(model).values(), strict=True):
        assert layer.learned_mask("default").equal(other.learned_mask("default"))
    assert loaded.peft_config["default"].base_fingerprint == known
    # Another copy of the same weights passes, and none of other weights.
    with pytest.warns(UserWarning, match=compared):
        PeftModel.from_pretrained(quantized("int4"), tmp_path / "adapter")
    for other in (quantized(seed=1), quantized("int4", seed=1), tiny_llama(1)):
        with pytest.raises(ValueError, match="learned for other weights"):
            PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_a_mask_of_full_weights_says_that_a_quantized_copy_was_not_compared(tmp_path):
    get_peft_model(tiny_llama(dtype=torch.bfloat16), MaskProConfig()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"these are quantized \(Int8Tensor\): they were not compared"):
        PeftModel.from_pretrained(quantized(), tmp_path)


def test_rules_that_look_at_gradients_are_refused(ids):
    model = get_peft_model(quantized(), MaskProConfig(init_mask="gblm"))
    with pytest.raises(ValueError, match="is quantized, and has no gradient"):
        initialize_masks(model, [{"input_ids": ids}])


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def subclassed(layer):
    class Doubles(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__ = Doubles


def moved(layer):
    add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    hooked(layer)


@pytest.mark.parametrize("change", [hooked, patched, subclassed, moved])
def test_what_hangs_on_the_call_of_a_quantized_layer_is_run(change):
    inputs = torch.randn(3, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    found = []
    for changed in (False, True):
        base = quantized()
        if changed:
            change(base.model.layers[0].mlp.up_proj)
        model = get_peft_model(base, MaskProConfig()).eval()
        found.append(masked_layers(model)["model.layers.0.mlp.up_proj"](inputs))
    torch.testing.assert_close(found[1], 2 * found[0])
