"""What hangs on calling a layer: hooks, offloading, a forward of its own."""

import re

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import FalconMambaConfig, FalconMambaForCausalLM, WavLMConfig, WavLMModel

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.tuner import MaskProLayer, masked_layers
from hf_maskpro.tuner.calls import tiny_inputs
from hf_maskpro.tuner.model import logger

from ..architectures.table import ARCHITECTURES
from ..conftest import tiny_gpt2, tiny_llama, tiny_mixtral


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
    before = layer.calls if isinstance(layer, Doubled) else 0
    masked = logits(model, ids)
    assert not torch.equal(masked, logits(get_peft_model(tiny_llama(), MaskProConfig()).eval(), ids))
    if isinstance(layer, Doubled):
        assert layer.calls == before + 1
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


def test_offloaded_logits_are_not_trained_in_vain(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig()).eval()
    cpu_offload(model, execution_device=torch.device("cpu"))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model(input_ids=ids)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    with pytest.raises(ValueError, match=r"logits are offloaded.* train without"):
        model.train()(input_ids=ids)


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


@pytest.mark.parametrize("alter", [weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", amount=0.1)])
def test_a_weight_that_something_else_computes_is_not_masked_in_vain(llama, ids, alter):
    model = get_peft_model(llama, MaskProConfig())
    alter(masked_layers(model)["model.layers.0.mlp.up_proj"].base_layer)
    for use in (lambda: logits(model, ids), lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="computed from others"):
            use()


@torch.inference_mode()
@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_made_in_inference_mode_works(ids, loaded, tmp_path):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="random")).eval()
    if loaded:
        model.save_pretrained(tmp_path)
        other, model = model, PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        assert torch.equal(logits(model, ids), logits(other, ids))
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


def wavlm():
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_kernel=(8, 3),
        conv_stride=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    return WavLMModel(config).eval(), MaskProConfig(target_modules=["q_proj", "v_proj"])


def mamba():
    config = FalconMambaConfig(
        vocab_size=34, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4, intermediate_size=32
    )
    return FalconMambaForCausalLM(config).eval(), MaskProConfig()


@pytest.mark.parametrize(("make", "name"), [(wavlm, "q_proj"), (mamba, "dt_proj")])
def test_layers_whose_weight_is_used_without_calling_them_are_refused(make, name):
    model, config = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=rf"^cannot mask .*{name}.*: the model uses the weight without calling"):
        get_peft_model(model, config)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    uncalled = ["q_proj", "k_proj", "v_proj", "out_proj"] if name == "q_proj" else [name]
    get_peft_model(model, MaskProConfig(exclude_modules=uncalled))


class Lists(nn.Module):
    """A model that keeps a layer where nothing that replaces modules finds it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.order = [self.first, self.second]

    def forward(self, x, **_):
        return self.second(self.order[0](x))


def test_a_look_that_fails_is_told(monkeypatch, caplog):
    base = tiny_llama()
    monkeypatch.setattr(base, "forward", lambda **_: 1 / 0)
    get_peft_model(base, MaskProConfig())
    assert "whether LlamaForCausalLM calls every masked layer was not seen (division by zero)" in caplog.text


class Derived(nn.Linear):
    """A layer that made something of its weight when it was made."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("signs", self.weight.detach().sign(), persistent=False)

    def forward(self, x):
        return F.linear(x, self.signs)


class Listed(nn.Linear):
    """A layer that finds its weight among its parameters."""

    def forward(self, x):
        return F.linear(x, dict(self.named_parameters())["weight"])


class Called(nn.Linear):
    """A layer that does more as it is called."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Doubling(nn.Parameter):
    """A weight that is twice itself in a product."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func is F.linear else result


def with_layer(layer_class):
    base = tiny_llama()
    layer = base.model.layers[1].mlp.up_proj
    base.model.layers[1].mlp.up_proj = layer_class(layer.in_features, layer.out_features, bias=False)
    return base.eval()


@pytest.mark.parametrize("layer_class", [Derived, Listed])
def test_layers_whose_outputs_under_a_mask_are_not_those_of_the_merged_weight_are_refused(layer_class):
    base = with_layer(layer_class)
    with pytest.raises(
        ValueError, match=r"^cannot mask model\.layers\.1\.mlp\.up_proj: its forward does not go by its"
    ):
        get_peft_model(base, MaskProConfig(init_mask="wanda"))
    assert not any(isinstance(module, MaskProLayer) for module in base.modules())
    get_peft_model(base, MaskProConfig(exclude_modules=["up_proj"]))


def test_experts_that_do_not_read_their_weights_are_refused():
    base = tiny_mixtral()
    experts = base.model.layers[1].mlp.experts
    kept = experts.down_proj.detach().clone()
    experts.forward = lambda hidden, *_: hidden @ experts.gate_up_proj[0].T[:, : kept.shape[2]] @ kept[0].T
    get_peft_model(base, MaskProConfig(target_modules=[], target_parameters=["gate_up_proj"])).unload()
    with pytest.raises(ValueError, match=r"^cannot mask model\.layers\.1\.mlp\.experts\.down_proj: its forward"):
        get_peft_model(base, MaskProConfig(target_modules=[], target_parameters=["down_proj"]))


def test_what_more_a_layer_does_as_it_is_called_is_done(ids):
    model = get_peft_model(with_layer(Called), MaskProConfig()).eval()
    masked = logits(model, ids)
    assert torch.equal(logits(model.merge_and_unload(), ids), masked)


def test_a_weight_of_a_kind_of_its_own_is_refused(llama):
    layer = llama.model.layers[0].mlp.up_proj
    layer.weight = Doubling(layer.weight.detach())
    with pytest.raises(ValueError, match=r"cannot mask .*up_proj: its weight is Doubling"):
        get_peft_model(llama, MaskProConfig())


@pytest.mark.parametrize(
    ("name", "unseen"), [("LLaVA", r"\S*linear_1, \S*linear_2"), ("CLIP", "visual_projection, text_projection")]
)
def test_towers_for_images_are_looked_at_and_what_is_not_is_told(name, unseen, caplog):
    known = next(known for known in ARCHITECTURES if known.name == name)
    get_peft_model(known.model_class(known.config), MaskProConfig())
    assert re.search(rf"whether {known.model_class.__name__} calls {unseen} was not seen", caplog.text)


def test_a_layer_of_a_tower_that_is_not_called_is_refused():
    known = next(known for known in ARCHITECTURES if known.name == "LLaVA")
    model = known.model_class(known.config)
    mlp = next(module for name, module in model.named_modules() if re.search(r"vision_tower\..*\.0\.mlp$", name))
    mlp.forward = lambda x: mlp.fc2(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    with pytest.raises(ValueError, match=r"^cannot mask \S*vision_tower\S*fc1: the model uses the weight without"):
        get_peft_model(model, MaskProConfig())


def test_a_model_of_unknown_inputs_is_told(caplog):
    get_peft_model(Lists(), MaskProConfig(target_modules=["second"]))
    assert "whether Lists calls second was not seen; the first batch of" in caplog.text


def test_a_model_that_hears_is_looked_at():
    whisper = next(known for known in ARCHITECTURES if known.name == "Whisper")
    model = whisper.model_class(whisper.config).eval()
    with torch.no_grad():
        assert model(**tiny_inputs(model)).logits.shape[:2] == (1, 1)


@pytest.mark.parametrize("init_mask", ["wanda", "magnitude"])
def test_the_first_batch_tells_where_nothing_is_known_of_a_models_inputs(init_mask):
    model = get_peft_model(Lists(), MaskProConfig(init_mask=init_mask, target_modules=["first", "second"]))
    with pytest.raises(ValueError, match=r"^cannot mask first: the model uses the weight without calling"):
        initialize_masks(model, [{"x": torch.ones(2, 16)}])
    model = get_peft_model(Lists(), MaskProConfig(init_mask=init_mask, target_modules=["second"]))
    initialize_masks(model, [{"x": torch.ones(2, 16)}])


class Partly(nn.Module):
    """A model that uses one of its layers alone."""

    def __init__(self, used):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.used = used

    def forward(self, x, **_):
        return getattr(self, self.used)(x)


@pytest.mark.parametrize(("used", "other"), [("first", "second"), ("second", "first")])
def test_what_the_first_batch_does_not_reach_is_told_each_time(used, other, caplog):
    model = get_peft_model(Partly(used), MaskProConfig(target_modules=["first", "second"]))
    for _ in range(2):
        caplog.clear()
        initialize_masks(model, [{"x": torch.ones(2, 16)}])
        assert caplog.text.count(f"the first batch does not reach {other}:") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dtype_without_instructions_is_told(dtype, caplog, monkeypatch):
    monkeypatch.setattr("hf_maskpro.tuner.model.multiplies_in", lambda known: known == torch.float32)
    logger.warning_once.cache_clear()
    model = get_peft_model(Partly("first").to(dtype), MaskProConfig(target_modules=["first"]))
    for _ in range(2):
        initialize_masks(model, [{"x": torch.ones(2, 16, dtype=dtype)}])
    told = "this CPU has no instructions for torch.bfloat16; load the model with dtype='float32'"
    assert caplog.text.count(told) == (dtype == torch.bfloat16)


@pytest.mark.filterwarnings("error:global module forward hook")
def test_the_first_batch_reaches_a_head_that_is_masked(llama, ids, caplog):
    for targets in (["o_proj"], ["o_proj", "lm_head"]):
        model = get_peft_model(llama, MaskProConfig(target_modules=targets))
        initialize_masks(model, [{"input_ids": ids}])
        assert "does not reach" not in caplog.text
        model.unload()


def test_looking_at_a_pass_leaves_the_model_and_the_generator_as_they_were(llama):
    called = []
    llama.register_forward_hook(lambda *_: called.append(1))
    hooks = [module._forward_hooks for module in llama.modules()]
    llama.train()
    state = torch.get_rng_state()
    model = get_peft_model(llama, MaskProConfig())
    assert torch.equal(torch.get_rng_state(), state)
    assert not called
    assert all(module.training for module in model.modules())
    assert not any(layer.dense for layer in masked_layers(model).values())
    assert hooks[0] is llama._forward_hooks


class Shared(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        share(self)


def share_weight(model):
    model.b.weight = model.a.weight


def share_layer(model):
    model.b = model.a


@pytest.mark.parametrize("share", [share_weight, share_layer])
@pytest.mark.parametrize("targets", [["a", "b"], ["a"]])
def test_a_weight_that_two_layers_share_is_refused(share, targets):
    with pytest.raises(ValueError, match=r"^cannot mask a.*: a and b share one weight"):
        get_peft_model(Shared(share), MaskProConfig(target_modules=targets))


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_a_layer_that_another_adapter_is_on_is_refused_as_that(llama, targets):
    base = get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(ValueError, match=r"q_proj.*: another adapter is on it already"):
        get_peft_model(base, MaskProConfig(target_modules=targets))


@pytest.mark.parametrize("init_mask", ["random", "wanda", "saved"])
def test_the_configuration_of_an_adapter_makes_another_that_starts_from_its_mask(llama, ids, tmp_path, init_mask):
    """As TRL's trainers make their reference of the adapter that they train."""
    model = get_peft_model(llama, MaskProConfig(init_mask="random" if init_mask == "saved" else init_mask)).eval()
    if init_mask == "wanda":
        model.add_adapter("early", model.peft_config["default"])
        model.set_adapter("early")
        with pytest.raises(ValueError, match="call initialize_masks"):
            logits(model, ids)
        model.delete_adapter("early")
        model.set_adapter("default")
        initialize_masks(model, [{"input_ids": ids}])
    elif init_mask == "saved":
        model.save_pretrained(tmp_path / "a")
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", is_trainable=True).eval()
    expected = logits(model, ids)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default" in name:
            model.get_parameter(name.replace(".default", ".ref")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model, ids), expected)
