"""The adapter under everything that PEFT and transformers users do with it."""

import copy
import json
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from transformers.pytorch_utils import Conv1D

from hf_maskpro import MaskProConfig, check_sparsity, initialize_masks
from hf_maskpro.deploy import merge
from hf_maskpro.subset import group_members, keep_of
from hf_maskpro.tuner import MaskProLayer, masked_layers, unmasked
from hf_maskpro.tuner.layer import has_memory

from ..conftest import tiny_gpt2, tiny_llama, tiny_mixtral


class Int8(torch.Tensor):
    """As torchao's tensors: quantized, and says that it is floating-point."""


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def perturb(model, adapter_name="default", seed=0):
    """Move the learned mask away from the starting mask."""
    generator = torch.Generator().manual_seed(seed)
    for layer in masked_layers(model, adapter_name).values():
        theta = layer.maskpro_theta[adapter_name]
        theta.data = (4 * torch.randn(theta.shape, generator=generator)).to(theta.dtype)


@pytest.fixture
def base_folder(tmp_path):
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(base_folder, tmp_path, ids):
    """A saved adapter with a moved mask, and the outputs of the model it came from."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), MaskProConfig()).eval()
    perturb(model)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    return folder, logits(model, ids)


def test_targets_every_linear_layer_but_the_head(llama):
    model = get_peft_model(llama, MaskProConfig())
    names = masked_layers(model)
    assert len(names) == 14
    assert not any("lm_head" in name for name in names)
    assert all(isinstance(layer, MaskProLayer) for layer in names.values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}.maskpro_theta.default" for name in names
    }


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (8, 16), (1, 2), (3, 4)])
@pytest.mark.parametrize("init_mask", ["magnitude", "random"])
def test_starting_masks_keep_the_pattern(llama, ids, n, m, init_mask):
    dense = {name: p.detach().clone() for name, p in llama.named_parameters()}
    model = get_peft_model(llama, MaskProConfig(n=n, m=m, init_mask=init_mask)).eval()
    logits(model, ids)
    merged = model.merge_and_unload(safe_merge=True)
    report = check_sparsity(merged, n, m)
    assert all(zeros == pytest.approx(1 - n / m) for zeros in report.values())
    if init_mask == "magnitude":
        name = "model.layers.0.mlp.up_proj.weight"
        planes = group_members(dense[name].abs(), m)
        kept = group_members(merged.get_parameter(name).detach() != 0, m)
        assert torch.equal(kept, planes >= planes.topk(n, dim=1).values[:, -1:])


def test_groups_of_a_conv1d_run_along_its_inputs(ids):
    base = tiny_gpt2()
    weight = base.transformer.h[0].mlp.c_fc.weight.detach().clone()
    model = get_peft_model(base, MaskProConfig()).eval()
    before = logits(model, ids)
    merged = model.merge_and_unload()
    layer = merged.transformer.h[0].mlp.c_fc
    assert isinstance(layer, Conv1D)
    kept = layer.weight != 0
    assert (kept.view(4, 4, 64).sum(1) == 2).all()
    assert torch.equal(layer.weight[kept], weight[kept])
    assert torch.equal(logits(merged, ids), before)
    check_sparsity(merged, 2, 4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_peft_loads_the_learned_mask(saved, base_folder, ids, low_cpu_mem_usage, is_trainable, recwarn):
    folder, expected = saved
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(
        base, folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable
    ).eval()
    assert torch.equal(logits(model, ids), expected)
    assert not any("missing adapter keys" in str(warning.message) for warning in recwarn)
    assert all(p.requires_grad == is_trainable for n, p in model.named_parameters() if "maskpro" in n)
    assert not any(p.is_meta for p in model.parameters())
    model.train()(input_ids=ids, labels=ids).loss.backward() if is_trainable else None


def test_every_other_way_in(saved, base_folder, ids):
    folder, expected = saved
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder).eval(), ids), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval(), ids), expected)
    for is_trainable in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        model.load_adapter(str(folder), is_trainable=is_trainable)
        assert torch.equal(logits(model.eval(), ids), expected)


def test_bfloat16_bases_load_bit_for_bit(base_folder, tmp_path, ids):
    def base():
        return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)

    model = get_peft_model(base(), MaskProConfig()).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(logits(loaded.merge_and_unload(), ids), logits(model, ids))


@pytest.mark.parametrize("loader", ["peft", "peft_low_cpu", "transformers", "transformers_trainable"])
def test_save_logits_keeps_theta_exactly_and_the_learned_mask(base_folder, tmp_path, ids, loader):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), MaskProConfig(save_logits=True)).eval()
    model.peft_config["default"].logit_scale = 4.0
    perturb(model)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["save_logits"] is True
    assert config["logit_scale"] == 4.0
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    if loader.startswith("peft"):
        base = PeftModel.from_pretrained(base, tmp_path / "a", low_cpu_mem_usage=loader == "peft_low_cpu")
    else:
        base.load_adapter(str(tmp_path / "a"), is_trainable=loader == "transformers_trainable")
    assert torch.equal(logits(base.eval(), ids), expected)
    for mine, theirs in zip(masked_layers(model).values(), masked_layers(base).values(), strict=True):
        assert torch.equal(mine.maskpro_theta["default"], theirs.maskpro_theta["default"])
        assert torch.equal(mine.initial_codes("default"), theirs.initial_codes("default"))


def test_transformers_add_adapter_and_save(base_folder, tmp_path, ids):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.add_adapter(MaskProConfig(init_mask="random"))
    model.eval()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(base_folder)
    loaded.load_adapter(str(tmp_path / "a"))
    assert torch.equal(logits(loaded.eval(), ids), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded, ids), logits(AutoModelForCausalLM.from_pretrained(base_folder), ids))
    loaded.enable_adapters()
    loaded.delete_adapter("default")


def test_file_is_small_and_config_tells_the_rest(saved):
    folder, _ = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(name.endswith(".maskpro_mask") and t.dtype == torch.uint8 for name, t in tensors.items())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["format_version"] == 1
    (stage,) = config["lineage"]
    assert stage["init_mask"] == "magnitude"
    assert len(stage["groups_changed"]) == 14
    assert all(share > 0 for share in stage["groups_changed"].values())


def test_a_change_too_small_for_the_shares_by_layer_is_a_stage(saved, base_folder, tmp_path):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), saved[0], is_trainable=True)
    config = model.peft_config["default"]
    config.record_stage({"layer": round(1e-7, 6)}, 1e-7, 1, "", 1)
    config.save_pretrained(tmp_path / "again")
    lineage = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lineage"]
    assert [stage["changed"] > 0 for stage in lineage] == [True, True]


def test_lineage_keeps_a_training_that_changed_nothing(saved, base_folder, tmp_path):
    folder, _ = saved
    for name in ("first", "again"):
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        config = model.peft_config["default"]
        config.save_logits = True
        config.start.setdefault("training", {"steps": 3})
        model.save_pretrained(tmp_path / name)
        folder = tmp_path / name
        lineage = json.loads((folder / "adapter_config.json").read_text())["lineage"]
        assert [stage["init_mask"] for stage in lineage] == ["magnitude", "adapter"]
        assert lineage[1]["training"] == {"steps": 3}
        assert not any(lineage[1]["groups_changed"].values())


def test_lineage_follows_an_adapter_through_its_stages(saved, base_folder, tmp_path):
    folder, _ = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder, is_trainable=True)
    model.save_pretrained(tmp_path / "same")
    assert len(json.loads((tmp_path / "same" / "adapter_config.json").read_text())["lineage"]) == 1
    model.peft_config["default"].save_logits = True
    perturb(model, seed=1)
    model.save_pretrained(tmp_path / "second")
    lineage = json.loads((tmp_path / "second" / "adapter_config.json").read_text())["lineage"]
    assert [stage["init_mask"] for stage in lineage] == ["magnitude", "adapter"]
    resumed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "second")
    resumed.save_pretrained(tmp_path / "third")
    assert json.loads((tmp_path / "third" / "adapter_config.json").read_text())["lineage"] == lineage


def test_several_adapters(llama, ids):
    dense = logits(llama, ids)
    model = get_peft_model(llama, MaskProConfig()).eval()
    model.add_adapter("other", MaskProConfig(init_mask="random", n=1, m=4))
    first = logits(model, ids)
    model.set_adapter("other")
    second = logits(model, ids)
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), dense)
    model.base_model.set_adapter(["default", "other"])
    layer = next(iter(masked_layers(model).values()))
    both = layer.masked_weight() != 0
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    alone = layer.masked_weight() != 0
    model.set_adapter("other")
    assert torch.equal(both, alone & (layer.masked_weight() != 0))
    model.delete_adapter("other")
    assert "other" not in layer.maskpro_mask
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    with pytest.raises(NotImplementedError, match="cannot be averaged"):
        model.add_weighted_adapter(["default"], [1.0], "mix")


def test_merge_and_unmerge_return_the_weights_bit_for_bit(llama, ids):
    llama.model.layers[0].mlp.up_proj.weight.data[0, 0] = -0.0
    dense = copy.deepcopy(llama.state_dict())
    model = get_peft_model(llama, MaskProConfig()).eval()
    model.add_adapter("other", MaskProConfig(init_mask="random"))
    expected = logits(model, ids)
    model.merge_adapter()
    assert torch.equal(logits(model, ids), expected)
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    unloaded = model.unload()
    for name, value in unloaded.state_dict().items():
        assert torch.equal(value.view(torch.int32), dense[name].view(torch.int32)), name


def test_a_merged_model_is_dense_within_unmasked_and_merged_again_after_it(llama, ids):
    dense = logits(llama, ids)
    model = get_peft_model(llama, MaskProConfig(init_mask="random")).eval()
    model.merge_adapter()
    expected, merged = logits(model, ids), copy.deepcopy(model.state_dict())
    with unmasked(model):
        assert torch.equal(logits(model, ids), dense)
    assert all(layer.merged for layer in masked_layers(model).values())
    assert torch.equal(logits(model, ids), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, merged[name]), name
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload(), ids), dense)


def test_dropped_weights_become_positive_zero_even_where_not_finite():
    layer = nn.Sequential(nn.Linear(4, 1, bias=False))
    layer[0].weight.data = torch.tensor([[-1.0, -5.0, -6.0, -2.0]])
    model = get_peft_model(layer, MaskProConfig(target_modules=["0"]))
    layer[0].get_base_layer().weight.data[0, 0] = -torch.inf
    merged = model.merge_and_unload(safe_merge=True)
    assert (
        merged[0].weight.view(torch.int32).tolist()
        == torch.tensor([[0.0, -5.0, -6.0, 0.0]]).view(torch.int32).tolist()
    )


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(llama):
    model = get_peft_model(llama, MaskProConfig())
    layer = next(iter(masked_layers(model).values()))
    weight = layer.get_base_layer().weight
    weight.data.view(-1)[weight.abs().argmax()] = torch.nan
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(weight.isnan(), before.isnan())


def test_eval_applies_the_mode_and_train_samples(llama, ids):
    model = get_peft_model(llama, MaskProConfig(logit_scale=1.0)).eval()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    torch.manual_seed(3)
    first = logits(model, ids)
    assert not torch.equal(first, logits(model, ids))
    torch.manual_seed(3)
    assert torch.equal(first, logits(model, ids))
    model.base_model.set_adapter("default", inference_mode=True)
    assert torch.equal(logits(model, ids), logits(model, ids))


def test_a_plain_loop_trains_and_gradient_checkpointing_gives_the_same_gradient(llama, ids):
    def gradients(checkpointing):
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=2.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        model(input_ids=ids, labels=ids).loss.backward()
        return [layer.maskpro_theta["default"].grad for layer in masked_layers(model).values()]

    plain, checkpointed = gradients(False), gradients(True)
    assert all(grad.abs().sum() > 0 for grad in plain)
    for mine, theirs in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_wanda_needs_data_first(llama, ids, tmp_path):
    model = get_peft_model(llama, MaskProConfig(init_mask="wanda"))
    with pytest.raises(ValueError, match="call initialize_masks"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="call initialize_masks"):
        model.save_pretrained(tmp_path)


def test_modules_to_save_and_inject(llama, ids, tmp_path):
    model = get_peft_model(copy.deepcopy(llama), MaskProConfig(modules_to_save=["lm_head"])).train()
    model(input_ids=ids, labels=ids).loss.backward()
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert head.weight.grad is not None
    head.weight.data += 1
    model.eval().save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "a").eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))

    injected = inject_adapter_in_model(MaskProConfig(init_mask="random"), copy.deepcopy(llama)).eval()
    state = get_peft_model_state_dict(injected)
    other = inject_adapter_in_model(MaskProConfig(), copy.deepcopy(llama)).eval()
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other, ids), logits(injected, ids))


@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_logits_dtype_is_the_configs_whatever_the_path(base_folder, tmp_path, logits_dtype):
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    model = get_peft_model(base, MaskProConfig(logits_dtype=logits_dtype))
    model.add_adapter("other", MaskProConfig(logits_dtype=logits_dtype))
    model.save_pretrained(tmp_path / "a")
    for low in (False, True):
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True, low_cpu_mem_usage=low)
        for each in (model, loaded):
            dtypes = {p.dtype for n, p in each.named_parameters() if "maskpro_theta" in n}
            assert dtypes == {getattr(torch, logits_dtype)}


def test_an_adapter_for_inference_takes_no_memory_for_theta(saved, base_folder):
    folder, _ = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
    thetas = [p for n, p in model.named_parameters() if "maskpro_theta" in n]
    assert sum(theta.untyped_storage().nbytes() for theta in thetas) == 4 * len(thetas)
    model.set_adapter("default")
    thetas = [p for n, p in model.named_parameters() if "maskpro_theta" in n]
    assert all(theta.untyped_storage().nbytes() == theta.nbytes for theta in thetas)


def test_new_layers_follow_the_mode_of_the_base_model(llama, ids):
    model = get_peft_model(llama, MaskProConfig(logit_scale=1.0))
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.add_adapter("other", MaskProConfig(logit_scale=1.0, init_mask="random"))
    model.set_adapter("other")
    assert torch.equal(logits(model, ids), logits(model, ids))


def test_a_second_adapter_leaves_the_first_frozen(saved, base_folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), saved[0])
    model.add_adapter("other", MaskProConfig())
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("theta.default"))


def test_a_second_adapter_on_conv1d():
    model = get_peft_model(tiny_gpt2(), MaskProConfig())
    model.add_adapter("other", MaskProConfig(init_mask="random"))
    assert masked_layers(model).keys() == masked_layers(model, "other").keys()


@pytest.mark.parametrize("n", [1, 2])
def test_an_empty_mask_stays_recognisable(llama, ids, n):
    model = get_peft_model(llama, MaskProConfig(n=n, m=4, init_mask="wanda"))
    for layer in masked_layers(model).values():
        layer._apply(lambda tensor: tensor.clone())
    with pytest.raises(ValueError, match="call initialize_masks"):
        logits(model, ids)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (1, 2), (1, 16), (8, 16)])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("init_mask", ["magnitude", "wanda"])
def test_the_state_of_a_model_without_masks_brings_none(llama, ids, n, m, assign, init_mask):
    state = get_peft_model(tiny_llama(), MaskProConfig(n=n, m=m, init_mask="wanda")).state_dict()
    model = get_peft_model(llama, MaskProConfig(n=n, m=m, init_mask=init_mask))
    model.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=assign)
    with pytest.raises(ValueError, match="is not there yet"):
        logits(model, ids)
    model.load_state_dict(get_peft_model(tiny_llama(), MaskProConfig(n=n, m=m)).state_dict(), assign=assign)
    logits(model, ids)


def test_a_state_dict_that_lacks_one_mask_brings_the_others(llama):
    state = get_peft_model(tiny_llama(), MaskProConfig()).state_dict()
    del state["base_model.model.model.layers.0.self_attn.q_proj.maskpro_mask.default"]
    model = get_peft_model(llama, MaskProConfig(init_mask="wanda"))
    model.load_state_dict(state, strict=False)
    there = {}
    for name, layer in masked_layers(model).items():
        try:
            there[name] = layer.masked_weight() is not None
        except ValueError:
            there[name] = False
    assert [name for name, known in there.items() if not known] == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_copy_of_an_empty_mask_is_empty_and_a_filled_one_is_not(llama, ids, n, tmp_path):
    model = get_peft_model(llama, MaskProConfig(n=n, m=4, init_mask="wanda"))
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        with pytest.raises(ValueError, match="call initialize_masks"):
            logits(copied, ids)
    other = get_peft_model(tiny_llama(), MaskProConfig(n=n, m=4))
    model.load_state_dict(other.state_dict())
    logits(model, ids)


def test_no_stale_mask_after_deleting_an_adapter(llama, ids):
    model = get_peft_model(llama, MaskProConfig()).eval()
    logits(model, ids)
    for seed in range(4):
        torch.manual_seed(seed)
        model.add_adapter("other", MaskProConfig(init_mask="random"))
        model.set_adapter("other")
        layer = next(iter(masked_layers(model, "other").values()))
        expected = layer.out_in(keep_of(layer.initial_codes("other"), 4))
        logits(model, ids)
        with torch.no_grad():
            assert torch.equal(layer.masked_weight() != 0, expected)
        model.delete_adapter("other")
        model.set_adapter("default")


def test_adapters_are_not_mixed_within_a_batch(llama, ids):
    model = get_peft_model(llama, MaskProConfig())
    with pytest.raises(ValueError, match="cannot be mixed within a batch"):
        model(input_ids=ids, adapter_names=["default"] * len(ids))


class TestRefusals:
    def refused(self, model, message, **options):
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=message) as error:
            get_peft_model(model, MaskProConfig(**options))
        assert "\n" not in str(error.value)
        assert [name for name, _ in model.named_modules()] == before

    def test_embeddings(self, llama):
        self.refused(llama, "model.embed_tokens: embeddings are not masked", target_modules=["embed_tokens"])

    def test_a_head_that_is_the_embedding(self):
        self.refused(tiny_llama(tie_word_embeddings=True), "lm_head: its weight is that", target_modules=["lm_head"])

    def test_other_modules(self, llama):
        self.refused(llama, "LlamaRMSNorm is not nn.Linear", target_modules=["norm"])

    def test_sizes_that_do_not_divide(self, llama):
        model = nn.ModuleDict({"narrow": nn.Linear(6, 8), "wide": nn.Linear(8, 8)})
        self.refused(model, "cannot mask narrow: in_features 6", target_modules=["narrow", "wide"])

    def test_no_layer_matched(self, llama):
        self.refused(llama, "not found in the base model", target_modules=["nothing"])

    def test_fused_experts_of_a_layout_that_is_not_known(self):
        experts = nn.Module()
        experts.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 64))
        self.refused(nn.ModuleDict({"experts": experts}), r"experts\.gate_up_proj")

    def test_a_layer_that_is_never_called(self, llama):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        self.refused(model, "out_proj: NonDynamically", target_modules=["out_proj"])

    def test_quantized_weights(self, llama):
        layer = llama.model.layers[0].mlp.up_proj
        layer.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
        self.refused(llama, "its weight is torch.uint8")

    @pytest.mark.parametrize(
        "weight", [torch.zeros(32, 16).to(torch.float8_e4m3fn), torch.ones(32, 16).as_subclass(Int8)]
    )
    def test_quantized_weights_that_pass_for_floating_point(self, llama, weight):
        llama.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
        self.refused(llama, r"up_proj: its weight is (torch.float8_e4m3fn|Int8); of quantized layers")

    def test_experts_in_matrices_that_are_no_layers(self):
        config = DbrxConfig(
            vocab_size=34,
            d_model=16,
            n_heads=2,
            n_layers=1,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        )
        self.refused(DbrxForCausalLM(config), r"experts\.mlp\.\w+.*: what is no linear layer would stay dense")


def test_a_weight_normed_convolution_is_not_taken_for_experts():
    config = Wav2Vec2Config(
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
    assert len(masked_layers(get_peft_model(Wav2Vec2Model(config), MaskProConfig()))) == 7


def test_a_model_with_added_tokens_is_loaded_with_them(base_folder, tmp_path, ids):
    def base():
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        model.resize_token_embeddings(40, mean_resizing=False)
        return model

    model = get_peft_model(base(), MaskProConfig()).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "a")
    added = torch.cat([ids, torch.full((len(ids), 2), 38)], dim=1)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    assert torch.equal(logits(loaded, added), logits(model, added))
    # Into a model without those tokens they would come in silence.
    with pytest.raises(ValueError, match="weights besides its masks"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "a")


def test_a_base_that_is_not_there_is_said_to_be_so(ids, tmp_path):
    base = tiny_llama()
    base.model.layers[1].to("meta")
    model = get_peft_model(base, MaskProConfig())
    with pytest.raises(ValueError, match="they are offloaded or on the meta device; load the base model whole"):
        model.save_pretrained(tmp_path / "a")


class TestPatternsOfFiles:
    def adapter(self, folder, pattern):
        get_peft_model(tiny_llama(), MaskProConfig(target_modules=r".*\.(q|down)_proj")).save_pretrained(folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | pattern))
        return folder

    @pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
    @pytest.mark.parametrize("loader", ["peft", "transformers", "merge"])
    def test_one_that_takes_for_ever_is_refused(self, base_folder, tmp_path, name, loader):
        folder = self.adapter(tmp_path / "a", {name: r"(\w+\.?)+!"})
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        load = {
            "peft": lambda: PeftModel.from_pretrained(base, folder),
            "transformers": lambda: base.load_adapter(str(folder)),
            "merge": lambda: merge(base_folder, folder, tmp_path / "merged"),
        }[loader]
        message = rf"^{name} of .* is the pattern '\(.*!', which takes more than 0.25 s to match"
        with pytest.raises(ValueError, match=message) as error:
            load()
        assert "\n" not in str(error.value)

    def test_one_that_takes_for_ever_on_the_names_of_experts_is_refused(self, tmp_path):
        get_peft_model(tiny_mixtral(1), MaskProConfig()).save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        pattern = {"exclude_modules": r"(?=.*gate_up_proj)(\w+\.?)+!"}
        all_linear = {"target_modules": None, "target_parameters": None}
        path.write_text(json.dumps(json.loads(path.read_text()) | all_linear | pattern))
        with pytest.raises(ValueError, match=r"^exclude_modules of .* takes more than 0.25 s to match"):
            PeftModel.from_pretrained(tiny_mixtral(1), tmp_path)

    @pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
    def test_one_that_is_none_is_refused(self, base_folder, tmp_path, name):
        folder = self.adapter(tmp_path / "a", {name: "(q_proj"})
        with pytest.raises(ValueError, match=rf"^{name} of .* the pattern '\(q_proj', which is none: .*") as error:
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
        assert "\n" not in str(error.value)

    def test_time_is_the_processors_and_nothing_of_the_users_python_is_run(self, base_folder, tmp_path, monkeypatch):
        """On a busy machine, or one whose Python brings much of its own, a sound pattern takes no longer."""
        folder = self.adapter(tmp_path / "a", {})
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\necho "$@" | grep -q -e "^-I -S" || exit 3\nsleep 2\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        assert len(masked_layers(PeftModel.from_pretrained(base, folder))) == 4

    @pytest.mark.parametrize(
        "pattern", [r".*\.(q|down)_proj", r"(\w+\.)*(q|down)_proj", r"^(?!.*up).*\.(q|down)_\w+$"]
    )
    def test_those_that_users_write_are_matched(self, base_folder, tmp_path, pattern):
        folder = self.adapter(tmp_path / "a", {"target_modules": pattern})
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
        assert len(masked_layers(model)) == 4
        assert model.peft_config["default"].target_modules == pattern


class TestAlteredFiles:
    """Whatever the loading path, no wrong mask is ever used."""

    def load(self, loader, base_folder, folder, ids):
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        if loader == "peft":
            base = PeftModel.from_pretrained(base, folder)
        else:
            base.load_adapter(str(folder), is_trainable=loader == "trained")
        return logits(base.train(loader == "trained"), ids)

    def alter(self, folder, change):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    @pytest.mark.parametrize("loader", ["peft", "transformers"])
    @pytest.mark.parametrize("n", [1, 2])
    def test_a_missing_tensor(self, base_folder, tmp_path, ids, loader, n):
        """n = 1 as well: with 4 combinations every byte is a valid word."""
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), MaskProConfig(n=n, m=4))
        model.save_pretrained(tmp_path / "a")
        self.alter(tmp_path / "a", lambda tensors: tensors.pop(next(iter(tensors))))
        with pytest.raises(ValueError, match="has no mask for"):
            self.load(loader, base_folder, tmp_path / "a", ids)

    @pytest.mark.parametrize("loader", ["peft", "transformers", "trained"])
    @pytest.mark.parametrize("keys", [{"format_version": None}, {"format_version": None, "lineage": None}, None])
    def test_a_missing_tensor_and_no_version(self, saved, base_folder, ids, loader, keys):
        path = saved[0] / "adapter_config.json"
        config = json.loads(path.read_text())
        config |= keys or {"lineage": None, "target_weights": None, "base_fingerprint": None, "inference_mode": False}
        path.write_text(json.dumps(config | {"format_version": None}))
        self.alter(saved[0], lambda tensors: tensors.pop(next(iter(tensors))))
        with pytest.raises(ValueError, match="has no mask for"):
            self.load(loader, base_folder, saved[0], ids)

    @pytest.mark.parametrize("part", ["mask", "theta"])
    def test_two_names_for_one_tensor(self, base_folder, tmp_path, part):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), MaskProConfig(save_logits=True))
        model.save_pretrained(tmp_path / "a")

        def add(tensors):
            name = next(name for name in tensors if name.endswith(part))
            tensors[f"{name}.default"] = torch.zeros_like(tensors[name])

        self.alter(tmp_path / "a", add)
        with pytest.raises(ValueError, match=rf"none of a mask's: .*_{part}\.default"):
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "a")
        with pytest.raises(ValueError, match=rf"none of a mask's: .*_{part}\.default"):
            merge(base_folder, tmp_path / "a", tmp_path / "merged")
        start = MaskProConfig(init_mask=str(tmp_path / "a"))
        with pytest.raises(ValueError, match=rf"none of a mask's: .*_{part}\.default"):
            initialize_masks(get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), start))

    @pytest.mark.parametrize("loader", ["peft", "transformers"])
    def test_digits_out_of_range(self, saved, base_folder, ids, loader):
        self.alter(saved[0], lambda tensors: next(iter(tensors.values())).fill_(230))
        with pytest.raises(ValueError, match="out of range"):
            self.load(loader, base_folder, saved[0], ids)

    @pytest.mark.parametrize("loader", ["peft", "transformers"])
    def test_another_shape(self, saved, base_folder, ids, loader):
        def shorten(tensors):
            name = next(iter(tensors))
            tensors[name] = tensors[name][:-1].contiguous()

        self.alter(saved[0], shorten)
        with pytest.raises((ValueError, RuntimeError)):
            self.load(loader, base_folder, saved[0], ids)

    @pytest.mark.parametrize("loader", ["peft", "transformers"])
    def test_another_pattern(self, saved, base_folder, ids, loader):
        path = saved[0] / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"n": 4, "m": 8}))
        with pytest.raises((ValueError, RuntimeError)):
            self.load(loader, base_folder, saved[0], ids)

    @pytest.mark.parametrize("loader", ["peft", "transformers"])
    def test_a_truncated_file(self, saved, base_folder, ids, loader):
        path = saved[0] / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(Exception, match=r".+"):
            self.load(loader, base_folder, saved[0], ids)

    def test_masks_for_layers_that_the_model_has_not(self, saved, base_folder, ids):
        def add(tensors):
            name, tensor = next(iter(tensors.items()))
            tensors[name.replace("layers.0", "layers.9").replace("layers.1", "layers.9")] = tensor.clone()

        self.alter(saved[0], add)
        with pytest.raises(ValueError, match="the model has not"):
            self.load("peft", base_folder, saved[0], ids)


def lora(masked, **options):
    """A LoRA over a masked model, which does something."""
    config = LoraConfig(init_lora_weights=False, **options)
    return get_peft_model(masked.get_base_model(), config, adapter_name="quality").eval()


def test_a_lora_over_a_mask_works_unmerged(saved, base_folder, ids, tmp_path):
    masked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), saved[0])
    with pytest.raises(ValueError, match="'default' is the name of an adapter of masks; give the other one a name"):
        get_peft_model(masked.get_base_model(), LoraConfig())
    model = lora(masked)
    expected = logits(model, ids)
    assert not torch.equal(expected, saved[1])
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(base_folder), ids))
    model.save_pretrained(tmp_path / "both")
    mask, quality = (load_file(tmp_path / "both" / name / "adapter_model.safetensors") for name in (".", "quality"))
    assert mask.keys() == load_file(saved[0] / "adapter_model.safetensors").keys()
    assert all(".lora_" in key for key in quality)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    both = PeftModel.from_pretrained(base, tmp_path / "both" / "quality", adapter_name="quality")
    assert torch.equal(logits(both.eval(), ids), expected)
    # Served beside the sparse checkpoint, by those who know no masks.
    merge(base_folder, tmp_path / "both", tmp_path / "sparse")
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    beside = PeftModel.from_pretrained(sparse, tmp_path / "both" / "quality")
    assert torch.equal(logits(beside.eval(), ids), expected)


@pytest.mark.parametrize("move", [lambda model: model.to(torch.float64), lambda model: model.half()])
def test_a_mask_for_inference_has_no_logits_wherever_it_goes(saved, base_folder, move):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), saved[0])
    before = [layer.learned_mask("default") for layer in masked_layers(model).values()]
    layers = masked_layers(move(model)).values()
    assert not any(has_memory(layer.maskpro_theta["default"]) for layer in layers)
    assert all(map(torch.equal, before, (layer.learned_mask("default") for layer in layers)))
    next(iter(layers)).set_adapter("default")
    assert not next(iter(layers)).maskpro_theta["default"].any()


def test_disabling_a_mask_changes_nothing_of_what_is_trained(saved, base_folder, ids):
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), saved[0]).train()
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), MaskProConfig())
    for model, trains in (loaded, False), (trained, True):
        with model.disable_adapter():
            assert not torch.equal(logits(model, ids), saved[1])
        thetas = [layer.maskpro_theta["default"] for layer in masked_layers(model).values()]
        assert {theta.requires_grad for theta in thetas} == {trains}
        assert {has_memory(theta) for theta in thetas} == {trains}
    # In train mode, but not sampled.
    assert torch.equal(logits(loaded, ids), saved[1])


def test_a_mask_is_saved_as_safetensors_alone(llama, tmp_path):
    model = get_peft_model(llama, MaskProConfig())
    with pytest.raises(ValueError, match="safe_serialization is False, and a mask is read from safetensors alone"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert not (tmp_path / "pickle").exists()


def test_a_lora_over_a_mask_is_merged_when_asked_for(saved, base_folder, ids):
    masked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), saved[0])
    model = lora(masked, target_modules="all-linear")
    expected = logits(model, ids)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merging in (model.merge_adapter, model.merge_and_unload, masked.merge_and_unload):
        with pytest.raises(ValueError, match=r"q_proj.* a mask lies beneath, whose zeros it would fill"):
            merging()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    masked.merge_adapter()
    assert torch.equal(logits(model, ids), expected)
    dense = model.merge_and_unload()
    torch.testing.assert_close(logits(dense, ids), expected)
    with pytest.raises(ValueError, match="have more than 2 of 4"):
        check_sparsity(dense, 2, 4)


def test_a_mask_and_a_lora_learn_together(llama, ids):
    masked = get_peft_model(llama, MaskProConfig(save_logits=True))
    model = lora(masked, target_modules="all-linear").train()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for p in learned.values())
    assert len([name for name in learned if "maskpro_theta" in name]) == 14
    assert len([name for name in learned if ".lora_" in name]) == 28
    perturb(masked)
    expected = logits(model.eval(), ids)
    state = get_peft_model_state_dict(masked)
    perturb(masked, seed=1)
    assert not torch.equal(logits(model, ids), expected)
    set_peft_model_state_dict(masked, state)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("exclude_modules", [None, ["o_proj"], ".*o_proj"])
def test_layers_that_m_does_not_divide_stay_dense_when_asked_for(tmp_path, ids, exclude_modules):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=34, num_key_value_heads=2, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"mlp\.down_proj.*in_features 30 .* or all such layers by on_indivisible='dense'"
    ):
        get_peft_model(base, MaskProConfig())
    config = MaskProConfig(on_indivisible="dense", exclude_modules=exclude_modules)
    dense, masked = 2 * 16 * 30, 2 * (2 * 16 * 30 + (4 if exclude_modules is None else 3) * 16 * 16)
    with pytest.warns(UserWarning, match=rf"down_proj stay dense, {dense:,} of {dense + masked:,} weights"):
        model = get_peft_model(base, config).eval()
    assert not any("down_proj" in name for name in masked_layers(model))
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a")
    assert torch.equal(logits(loaded.eval(), ids), logits(model, ids))
    assert len(merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")) == len(masked_layers(model))


def test_a_layer_that_m_does_not_divide_leaves_no_other_dense_whose_name_ends_alike():
    base = nn.ModuleDict(
        {"fc": nn.Linear(6, 8), "inner": nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 4)})}
    )
    config = MaskProConfig(target_modules=["fc", "out"], exclude_modules=["out"], on_indivisible="dense")
    with pytest.warns(UserWarning, match="^fc stay dense, 48 of 112 weights"):
        model = get_peft_model(base, config)
    assert list(masked_layers(model)) == ["inner.fc"]


def test_a_head_that_is_named_is_masked_saved_loaded_and_merged(llama, base_folder, tmp_path, ids):
    model = get_peft_model(llama, MaskProConfig(target_modules=["q_proj", "lm_head"])).eval()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "a")
    assert all(".maskpro_mask" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").eval()
    assert torch.equal(logits(loaded, ids), expected)
    report = merge(base_folder, tmp_path / "a", tmp_path / "merged")
    assert report["lm_head.weight"] == 0.5
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), expected)
    merged = loaded.merge_and_unload()
    for form in (merged, merged.state_dict(), tmp_path / "merged"):
        assert check_sparsity(form, 2, 4, report) == report


@pytest.mark.parametrize("target_modules", [None, "all-linear", ["q_proj", "up_proj"]])
def test_some_decoder_layers_alone(llama, tmp_path, target_modules):
    model = get_peft_model(llama, MaskProConfig(layers_to_transform=[1], target_modules=target_modules))
    names = set(masked_layers(model))
    assert len(names) == (2 if isinstance(target_modules, list) else 7)
    assert all(name.startswith("model.layers.1.") for name in names)
    model.save_pretrained(tmp_path / "a")
    assert set(masked_layers(PeftModel.from_pretrained(tiny_llama(), tmp_path / "a"))) == names


def test_float16_bases(base_folder, tmp_path, ids):
    def base():
        return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float16)

    model = get_peft_model(base(), MaskProConfig(init_mask="sparsegpt+swaps"))
    initialize_masks(model, [{"input_ids": ids}])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.maskpro_theta["default"].grad.any() for layer in masked_layers(model).values())
    perturb(model.eval())
    expected = logits(model, ids)
    assert expected.dtype == torch.float16
    model.save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="float16 weights cannot be compared"):
        loaded = PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    assert torch.equal(logits(loaded, ids), expected)
    merged = loaded.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged, ids), expected)
    check_sparsity(merged, 2, 4)


def test_layers_of_one_row_and_one_group_with_a_bias():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(1, 4)).eval()
    x = torch.randn(5, 4)
    model = get_peft_model(base, MaskProConfig(target_modules=["0", "1"]))
    model.train()(x).sum().backward()
    assert all(layer.maskpro_theta["default"].grad.isfinite().all() for layer in masked_layers(model).values())
    expected = model.eval()(x)
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), expected)
    assert (merged[1].weight != 0).sum() == 4
