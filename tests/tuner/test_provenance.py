import json
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_maskpro import MaskProConfig
from hf_maskpro.tuner.base import cached_commit, fingerprint


@pytest.fixture
def adapter(checkpoint, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), MaskProConfig())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def other_base(checkpoint, layer="model.layers.1.mlp.up_proj"):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.get_submodule(layer).weight.mul_(1.1)
    return model


def test_fingerprint_is_of_values_and_shape():
    weight = torch.randn(96, 64).bfloat16()
    known = fingerprint(weight)
    assert known == fingerprint(weight.float()) == fingerprint(weight.double())
    assert known != fingerprint(weight.view(64, 96))
    assert known != fingerprint(weight * 2)
    assert known != fingerprint(weight.T)
    # Rounding decides, not truncation.
    exact = torch.randn(96, 64)
    assert fingerprint(exact) == fingerprint(exact.bfloat16())


def test_other_weights_are_refused_and_named(checkpoint, adapter, tmp_path):
    with pytest.raises(ValueError, match=r"in 1 of 14 layers: model\.layers\.1\.mlp\.up_proj\. Load the base model"):
        PeftModel.from_pretrained(other_base(checkpoint), adapter)
    with pytest.raises(ValueError, match="other weights"):
        other_base(checkpoint).load_adapter(str(adapter))
    other_base(checkpoint).save_pretrained(tmp_path / "other")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(tmp_path / "other"), "check_base": False}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    # What a file says about being checked is not heard.
    with pytest.raises(ValueError, match="other weights"):
        AutoPeftModelForCausalLM.from_pretrained(adapter)
    with pytest.raises(ValueError, match="other weights"), pytest.warns(UserWarning, match="check_base"):
        other_base(checkpoint).load_adapter(str(adapter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_pass_in_either_dtype(checkpoint, adapter, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype), adapter)


def test_going_on_nevertheless(checkpoint, adapter, tmp_path):
    config = MaskProConfig.from_pretrained(adapter)
    config.check_base = False
    model = PeftModel.from_pretrained(other_base(checkpoint), adapter, config=config)
    model.save_pretrained(tmp_path / "new")
    assert "check_base" not in json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    # It is now a mask for the weights that it was put on.
    PeftModel.from_pretrained(other_base(checkpoint), tmp_path / "new")
    with pytest.raises(ValueError, match="other weights"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "new")


def test_what_cannot_be_compared_warns(checkpoint, adapter):
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16)
    with pytest.warns(UserWarning, match="float16 weights cannot be compared"):
        PeftModel.from_pretrained(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["base_fingerprint"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="does not say which weights"):
        PeftModel.from_pretrained(other_base(checkpoint), adapter)


@pytest.mark.parametrize("known", [{}, {"model.layers.0.mlp.up_proj": "0"}])
def test_layers_without_a_fingerprint_are_other_weights(checkpoint, adapter, known):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_fingerprint": known}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="in 14 of 14 layers"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter)


def test_the_commit_is_recorded_where_it_is_certain(tmp_path, monkeypatch):
    snapshots = tmp_path / "snapshots"
    monkeypatch.setattr(
        "hf_maskpro.tuner.base.try_to_load_from_cache", lambda *_: str(snapshots / "a" / "config.json")
    )
    (snapshots / "a").mkdir(parents=True)
    assert cached_commit("me/base") == "a"
    assert cached_commit(str(tmp_path)) is None
    (snapshots / "b").mkdir()
    assert cached_commit("me/base") is None
