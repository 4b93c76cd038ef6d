"""What is not finite says nothing of what to keep: no mask is made of it, wherever it comes from."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig, hub
from hf_maskpro.deploy import merge
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_llama


BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def spoil(model, value):
    name, layer = list(masked_layers(model).items())[3]
    with torch.no_grad():
        layer.maskpro_theta["default"][2, 1, 0] = value
    return name


@pytest.fixture(params=BAD)
def spoiled(request, base, tmp_path):
    """A file with one logit that is not finite."""
    model = get_peft_model(base(), MaskProConfig(save_logits=True))
    for layer in masked_layers(model).values():
        torch.nn.init.normal_(layer.maskpro_theta["default"])
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("v_proj.maskpro_theta"))
    tensors[key][2, 1, 0] = request.param
    save_file(tensors, file, {"format": "pt"})
    return tmp_path / "adapter"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_logits_of_a_file_are_refused_where_peft_loads_them(spoiled, base, low_cpu_mem_usage, is_trainable):
    with pytest.raises(ValueError, match=r"v_proj has logits that are not finite"):
        PeftModel.from_pretrained(base(), spoiled, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable)


@pytest.mark.parametrize("training", [False, True])
def test_logits_of_a_file_are_refused_at_their_first_use(spoiled, base, ids, training):
    model = base()
    model.load_adapter(str(spoiled), is_trainable=training)
    with pytest.raises(ValueError, match="has logits that are not finite"):
        model.train(training)(input_ids=ids)


def test_logits_of_a_file_are_refused_where_it_is_read(spoiled, base, tmp_path):
    for read in (hub.read_masks, lambda folder: hub.inspect_adapter(str(folder))):
        with pytest.raises(ValueError, match=r"v_proj\.maskpro_theta holds logits that are not finite"):
            read(spoiled)
    with pytest.raises(ValueError, match=r"v_proj\.weight: the source's theta is not finite float32"):
        merge(tmp_path / "base", spoiled, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", ["without its mask", "shape", "dtype"])
def test_logits_that_are_none_are_refused(base, tmp_path, change):
    model = get_peft_model(base(), MaskProConfig(save_logits=True))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("theta"))
    if change == "shape":
        tensors[key] = tensors[key][:, 1:].contiguous()
    elif change == "dtype":
        tensors[key] = tensors[key].long()
    else:
        del tensors[key.replace("theta", "mask")]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"is not a file of masks: .*without the mask|which is not that|in float32 or"
    ):
        hub.read_masks(tmp_path / "adapter")


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("save_logits", [False, True])
def test_no_file_is_written_of_them(llama, tmp_path, value, save_logits):
    model = get_peft_model(llama, MaskProConfig(save_logits=save_logits))
    name = spoil(model, value)
    with pytest.raises(ValueError, match=f"{name} has logits that are not finite"):
        model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").iterdir())


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_they_are_not_merged(llama, value, safe_merge):
    model = get_peft_model(llama, MaskProConfig())
    layer = masked_layers(model)[spoil(model, value)]
    before = layer.get_base_layer().weight.detach().clone()
    with pytest.raises(ValueError, match="has logits that are not finite"):
        model.merge_and_unload(safe_merge=safe_merge)
    assert torch.equal(layer.get_base_layer().weight, before)


def test_a_mode_is_not_taken_of_logits_that_training_spoiled(llama, ids):
    model = get_peft_model(llama, MaskProConfig()).eval()
    model(input_ids=ids)
    spoil(model, torch.nan)
    with pytest.raises(ValueError, match="has logits that are not finite"):
        model(input_ids=ids)


def test_logits_that_an_optimizer_spoiled_through_data(llama, ids):
    model = get_peft_model(llama, MaskProConfig()).train()
    model(input_ids=ids)
    for layer in masked_layers(model).values():
        layer.maskpro_theta["default"].data.fill_(torch.nan)
    for use in (lambda: model.merge_and_unload(), lambda: model.eval()(input_ids=ids)):
        with pytest.raises(ValueError, match="has logits that are not finite"):
            use()


def test_training_looks_at_logits_once(llama, ids, monkeypatch):
    model = get_peft_model(llama, MaskProConfig())
    looked = []
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: looked.append(tensor) or torch.isfinite(tensor))
    for _ in range(3):
        # As a trainer does before every step.
        model.train()
        model(input_ids=ids)
    assert len(looked) == len(masked_layers(model))


def test_logits_that_load_state_dict_brings(llama, ids):
    model = get_peft_model(llama, MaskProConfig()).train()
    model(input_ids=ids)
    state = {key: torch.full_like(t, torch.nan) if "theta" in key else t for key, t in model.state_dict().items()}
    model.load_state_dict(state)
    with pytest.raises(ValueError, match="has logits that are not finite"):
        model(input_ids=ids)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("init_mask", ["magnitude", "wanda"])
def test_a_base_with_such_weights_is_refused_by_name(llama, value, init_mask):
    llama.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"cannot mask model\.layers\.1\.mlp\.up_proj: .* not finite"):
        get_peft_model(llama, MaskProConfig(init_mask=init_mask))
    assert not any("maskpro" in name for name, _ in llama.named_parameters())
    get_peft_model(llama, MaskProConfig(target_modules=["q_proj"]))
