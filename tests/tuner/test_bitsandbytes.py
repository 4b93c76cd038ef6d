"""Masks over weights that bitsandbytes has quantized, where that is installed: the tests do not bring it."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments, initialize_masks
from hf_maskpro.deploy import merge
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.base import plain, weight_of

from ..conftest import tiny_llama


pytest.importorskip("bitsandbytes")

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(params=KINDS)
def loaded(request, tmp_path):
    """Loads a model by bitsandbytes."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    tiny_llama(**sizes).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(**KINDS[request.param])
    options = {"quantization_config": settings, "device_map": "cpu", "dtype": torch.float32}
    return lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base", **options)


def test_a_base_of_bitsandbytes_learns_and_is_compared(loaded, ids, tmp_path):
    base = loaded()
    weight = plain(weight_of(base.model.layers[0].mlp.up_proj)).clone()
    model = get_peft_model(base, MaskProConfig(init_mask="wanda+swaps"))
    initialize_masks(model, [{"input_ids": ids}])
    layer = masked_layers(model)["model.layers.0.mlp.up_proj"]
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        kept = layer.learned_mask("default").transpose(1, 2).flatten(1)
        torch.testing.assert_close(layer(inputs), inputs @ (weight * kept).float().T)
        # The dense layer's own kernel is let loose on the weight, which has to stay readable.
        with model.disable_adapter():
            torch.testing.assert_close(
                model.eval()(input_ids=ids).logits, loaded()(input_ids=ids).logits, atol=0.02, rtol=0
            )
    for estimator in ("simple", "residual"):
        args = MaskProTrainingArguments(
            str(tmp_path), estimator=estimator, max_steps=2, save_strategy="no", report_to="none", use_cpu=True
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        MaskProTrainer(model, args, train_dataset=data).train()
    assert all(layer.maskpro_theta["default"].any() for layer in masked_layers(model).values())
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(loaded(), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="no more than the signs"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_a_weight_that_bitsandbytes_has_laid_out_for_cpus_is_refused(loaded, ids):
    base = loaded()
    with torch.no_grad():
        base(input_ids=ids)
    # Those in 8 bits stay as they are, and on other CPUs all do.
    if not any(vars(getattr(p, "quant_state", p)).get("packing_format_for_cpu") for p in base.parameters()):
        get_peft_model(base, MaskProConfig())
        return
    with pytest.raises(ValueError, match="has laid its weight out for CPUs; load the model anew"):
        get_peft_model(base, MaskProConfig())


def test_what_hangs_on_the_call_is_refused_but_for_the_hooks_that_move_weights(loaded):
    def changed(change):
        base = loaded()
        change(base.model.layers[0].mlp.up_proj)
        return masked_layers(get_peft_model(base, MaskProConfig()))["model.layers.0.mlp.up_proj"]

    inputs = torch.randn(3, 64)
    for change in (
        lambda layer: layer.register_forward_hook(lambda module, args, output: 2 * output),
        lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda layer: setattr(layer, "forward", lambda x: x),
    ):
        with pytest.raises(ValueError, match=r"^cannot mask Linear.*hooks or was replaced") as caught:
            changed(change)(inputs)
        assert len(str(caught.value).splitlines()) == 1
    layer = changed(lambda layer: add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True)))
    torch.testing.assert_close(layer(inputs), changed(lambda layer: None)(inputs))
