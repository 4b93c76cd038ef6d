"""What hangs on calling a layer: hooks, offloading, a forward of its own."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_gpt2, tiny_llama


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


class Doubled(nn.Linear):
    """A layer that computes something else than `nn.Linear`, and keeps something of it."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.linear(x, 2 * self.weight, self.bias)


def with_doubled_layer():
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    doubled = Doubled(layer.in_features, layer.out_features, bias=False)
    doubled.weight = layer.weight
    model.model.layers[0].mlp.up_proj = doubled
    return model, doubled


def with_patched_layer():
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return model, layer


@pytest.mark.parametrize("make", [with_doubled_layer, with_patched_layer])
def test_a_forward_of_its_own_gets_the_masked_weight(ids, make):
    base, layer = make()
    model = get_peft_model(base, MaskProConfig()).eval()
    masked = logits(model, ids)
    assert not torch.equal(masked, logits(get_peft_model(tiny_llama(), MaskProConfig()).eval(), ids))
    if isinstance(layer, Doubled):
        assert layer.calls == 1
    assert torch.equal(logits(model.merge_and_unload(), ids), masked)


def test_a_gradient_goes_through_a_forward_of_its_own(ids):
    def gradients(base):
        model = get_peft_model(base, MaskProConfig(logit_scale=1.0)).train()
        torch.manual_seed(0)
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    doubled = tiny_llama()
    with torch.no_grad():
        doubled.model.layers[0].mlp.up_proj.weight.mul_(2)
    # Every value of the layer is the same, so what keeping a weight is worth is as well.
    for mine, theirs in zip(gradients(with_doubled_layer()[0]), gradients(doubled), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_hooks_of_a_layer_are_called_and_see_the_masked_weight(ids, make):
    base, seen = make(), []
    layer = next(module for name, module in base.named_modules() if name.endswith(("up_proj", "c_fc")))
    layer.register_forward_hook(lambda module, args, output: seen.append((module.weight, output)))
    model = get_peft_model(base, MaskProConfig()).eval()
    expected = logits(get_peft_model(make(), MaskProConfig()).eval(), ids)
    assert torch.equal(logits(model, ids), expected)
    ((weight, _),) = seen
    assert (weight == 0).float().mean() == 0.5
    assert layer.weight.all()


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_offloaded_weights_are_masked_where_they_are_used(ids, offload_buffers):
    model = get_peft_model(tiny_llama(), MaskProConfig()).eval()
    expected = logits(model, ids)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    for _ in range(2):
        assert torch.equal(logits(model, ids), expected)
    for layer in masked_layers(model).values():
        assert layer.base_layer.weight.is_meta
        assert layer._masked_weight is None


def test_of_offloaded_logits_nothing_is_saved(ids, tmp_path):
    model = get_peft_model(tiny_llama(), MaskProConfig())
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"offloaded.* remove_hook_from_submodules"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_a_mask_over_an_offloaded_base_is_refused(ids, tmp_path):
    get_peft_model(tiny_llama(), MaskProConfig()).save_pretrained(tmp_path / "a")
    base = tiny_llama()
    cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"cannot mask .*: its weight is offloaded"):
        PeftModel.from_pretrained(base, tmp_path / "a")


def test_an_offloaded_model_is_not_calibrated(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="wanda"))
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="is offloaded or not there"):
        initialize_masks(model, [{"input_ids": ids}])


@pytest.mark.parametrize("alter", [weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5)])
def test_a_weight_that_something_else_computes_is_refused(llama, alter):
    alter(llama.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"cannot mask .*up_proj: its weight is computed from others"):
        get_peft_model(llama, MaskProConfig())


def test_a_weight_that_something_else_computes_is_not_masked_in_vain(llama, ids):
    model = get_peft_model(llama, MaskProConfig())
    prune.l1_unstructured(masked_layers(model)["model.layers.0.mlp.up_proj"].base_layer, "weight", amount=0.5)
    with pytest.raises(ValueError, match="computed from others"):
        logits(model, ids)


@torch.inference_mode()
def test_a_model_made_in_inference_mode_works(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig()).eval()
    generated = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == ids.shape[1] + 2
    before = logits(model, ids)
    for layer in masked_layers(model).values():
        layer.base_layer.weight.mul_(2)
    changed = logits(model, ids)
    assert not torch.equal(changed, before)
    assert torch.equal(logits(model.merge_and_unload(), ids), changed)


@pytest.mark.parametrize("mode", [nn.Module.eval, nn.Module.train])
def test_weights_that_are_exchanged_are_seen_by_the_next_evaluation(llama, ids, mode):
    model = get_peft_model(llama, MaskProConfig()).eval()
    before = logits(model, ids)
    for layer in masked_layers(model).values():
        layer.base_layer.weight.data.mul_(2)
    mode(model)
    changed = logits(model.eval(), ids)
    assert not torch.equal(changed, before)
    assert torch.equal(logits(model.merge_and_unload(), ids), changed)


def test_weights_that_are_swapped_there_and_back_are_seen(llama, ids):
    model = get_peft_model(llama, MaskProConfig()).eval()
    before = logits(model, ids)
    weights = [layer.base_layer.weight for layer in masked_layers(model).values()]
    own = [weight.data for weight in weights]
    for factor in (2, 3):
        for weight, value in zip(weights, own, strict=True):
            weight.data = value.clone().mul_(factor)
        assert not torch.equal(logits(model, ids), before)
        for weight, value in zip(weights, own, strict=True):
            weight.data = value
        assert torch.equal(logits(model, ids), before)
