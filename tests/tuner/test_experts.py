"""Experts that a model keeps in 3-D parameters."""

import copy
import logging

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.tuner import masked_layers
from hf_maskpro.tuner.base import fingerprint
from tests.conftest import tiny_gpt_oss, tiny_mixtral


def tiny_nemotron():
    """Its experts have no gate."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 34, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "layers_block_type": ["full_attention", "moe"]}
    experts = {"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 32}
    return NemotronHForCausalLM(NemotronHConfig(**sizes, **heads, **experts)).eval()


MODELS = pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss])
WITH_UNGATED = pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss, tiny_nemotron])
# Larger than what a kernel of another order of sums differs by, and a hundredth of what a mask makes.
ROUNDING = 1e-6


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def pruned(model, n=2, m=4):
    """The experts' largest weights of every group, with nothing of the library."""
    for parameter in model.parameters():
        if parameter.ndim == 3:
            transposed = "GptOss" in type(model).__name__
            rows = parameter.data.transpose(1, 2) if transposed else parameter.data
            groups = rows.reshape(-1, m)
            keep = torch.zeros_like(groups).scatter_(1, groups.abs().topk(n, dim=1).indices, 1)
            rows = (groups * keep).view(rows.shape)
            parameter.data = rows.transpose(1, 2).contiguous() if transposed else rows
    return model


@WITH_UNGATED
def test_every_kernel_reads_experts_with_zeros_in_each_group_of_inputs(make, ids):
    first = "up_proj" if make is tiny_nemotron else "gate_up_proj"
    model = get_peft_model(make(), MaskProConfig(target_modules=[], target_parameters=[first, "down_proj"]))
    expected = pruned(make())
    assert (logits(expected, ids) - logits(make(), ids)).abs().max() > 100 * ROUNDING
    for kernel in ("eager", "grouped_mm", "batched_mm"):
        for each in (model.base_model.model, expected):
            each.set_experts_implementation(kernel)
        assert (logits(model, ids) - logits(expected, ids)).abs().max() < ROUNDING


@WITH_UNGATED
def test_a_copy_under_gradient_checkpointing_gives_the_same_gradient(make, ids):
    model = get_peft_model(make(), MaskProConfig(logit_scale=2.0)).train()
    copied = copy.deepcopy(model)
    copied.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, copied):
        torch.manual_seed(5)
        each(input_ids=ids, labels=ids).loss.backward()
    for mine, theirs in zip(masked_layers(model).values(), masked_layers(copied).values(), strict=True):
        assert mine.base_weight is not theirs.base_weight
        assert mine.maskpro_theta["default"].grad.any()
        torch.testing.assert_close(mine.maskpro_theta["default"].grad, theirs.maskpro_theta["default"].grad)


@MODELS
def test_a_gradient_reaches_the_logits_of_every_expert_that_saw_a_token(make, ids):
    model = get_peft_model(make(), MaskProConfig()).train()
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in masked_layers(model).values():
        assert layer.maskpro_theta["default"].grad.any()
        assert not layer.base_weight.requires_grad


def test_experts_without_kernels_are_known_by_their_shapes(ids, caplog):
    """As Llama 4's, which are stored transposed, and given tokens in another way."""

    def make():
        torch.manual_seed(0)
        sizes = {"vocab_size": 34, "hidden_size": 16, "intermediate_size": 16, "num_local_experts": 4, "head_dim": 8}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "pad_token_id": 1}
        return Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads)).eval()

    model = get_peft_model(make(), MaskProConfig(init_mask="wanda"))
    with caplog.at_level(logging.WARNING):
        initialize_masks(model, [{"input_ids": ids}])
    assert "calibration: 4 experts saw fewer than" in caplog.text
    expected = make().model.layers[0].feed_forward.experts.gate_up_proj.detach()
    largest = expected.unflatten(1, (4, 4)).abs().topk(2, dim=2).indices
    kept = torch.zeros(4, 4, 4, 32).scatter_(2, largest, 1).flatten(1, 2)
    masked = logits(model, ids)
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.layers[0].feed_forward.experts.gate_up_proj, expected * kept)
    assert (logits(merged, ids) - masked).abs().max() < ROUNDING


def test_routers_stay_dense_and_so_does_what_is_excluded():
    model = get_peft_model(tiny_mixtral(), MaskProConfig(exclude_modules=["experts.down_proj", "0.mlp.experts"]))
    names = {name.removeprefix("model.layers.") for name in masked_layers(model)}
    attention = {f"{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkvo"}
    assert names == attention | {"1.mlp.experts.gate_up_proj"}


def test_a_router_that_is_a_linear_layer_stays_dense():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.shared_expert = nn.Linear(16, 4), nn.ModuleDict({"gate_proj": nn.Linear(16, 16)})
            self.experts = tiny_mixtral(1).model.layers[0].mlp.experts

    model = get_peft_model(
        nn.ModuleDict({"moe": Block(), "mlp": nn.ModuleDict({"gate": nn.Linear(16, 16)})}), MaskProConfig()
    )
    model.add_adapter("other", MaskProConfig())
    expected = {"mlp.gate", "moe.shared_expert.gate_proj", "moe.experts.gate_up_proj", "moe.experts.down_proj"}
    for name in ("default", "other"):
        assert set(masked_layers(model, name)) == expected


def test_a_router_stays_dense_beside_experts_that_are_modules_of_a_list_or_a_dict():
    torch.manual_seed(0)
    sizes = {"vocab_size": 34, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 2}
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**sizes, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    )
    routers = {name for name, module in model.named_modules() if name.endswith("router.classifier")}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert len(routers) == 2
    assert set(masked_layers(get_peft_model(model, MaskProConfig()))) == linear - routers

    block = nn.ModuleDict({"gate": nn.Linear(16, 2), "experts": nn.ModuleList([nn.ModuleDict(), nn.ModuleDict()])})
    block["experts"][1]["gate"] = nn.Linear(16, 16)
    model = get_peft_model(nn.ModuleDict({"moe": block}), MaskProConfig())
    assert set(masked_layers(model)) == {"moe.experts.1.gate"}


@MODELS
def test_experts_come_back_by_every_loading_path(make, tmp_path, ids):
    model = get_peft_model(make(), MaskProConfig(init_mask="random")).eval()
    model.save_pretrained(tmp_path)
    mixed = make()
    mixed.load_adapter(tmp_path)
    loaded = [
        PeftModel.from_pretrained(make(), tmp_path),
        PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).eval(),
        PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True),
        mixed,
    ]
    for again in loaded:
        assert torch.equal(logits(again, ids), logits(model, ids))


@MODELS
def test_merged_experts_have_the_pattern_and_come_back_dense(make, ids):
    model = get_peft_model(make(), MaskProConfig(init_mask="random")).eval()
    masked, dense = logits(model, ids), logits(make(), ids)
    model.merge_adapter(safe_merge=True)
    assert (logits(model, ids) - masked).abs().max() < ROUNDING
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), dense)
    merged = model.merge_and_unload(safe_merge=True)
    assert (logits(merged, ids) - masked).abs().max() < ROUNDING
    assert {type(module) for module in merged.modules()} == {type(module) for module in make().modules()}
    for name, parameter in merged.named_parameters():
        if parameter.ndim == 3:
            rows = parameter.transpose(1, 2) if make is tiny_gpt_oss else parameter
            assert int((rows.unflatten(2, (-1, 4)) != 0).sum(3).max()) == 2, name


def test_two_adapters_keep_what_both_keep(ids):
    model = get_peft_model(tiny_mixtral(), MaskProConfig(init_mask="random")).eval()
    model.add_adapter("other", MaskProConfig(init_mask="random"))
    layer = masked_layers(model)["model.layers.0.mlp.experts.down_proj"]
    alone = layer().clone()
    model.base_model.set_adapter(["default", "other"])
    other = layer.masked(layer.base_weight, "other")
    assert torch.equal(layer() != 0, (alone != 0) & (other != 0))
    model.delete_adapter("other")
    assert torch.equal(layer(), alone)


def test_experts_have_fingerprints_and_others_are_refused(tmp_path):
    model = get_peft_model(tiny_mixtral(), MaskProConfig())
    model.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    other = tiny_mixtral()
    assert model.peft_config["default"].base_fingerprint[name] == fingerprint(other.get_parameter(name))
    other.get_parameter(name).data += 1
    with pytest.raises(ValueError, match=f"other weights than this model has, in 1 of 12 layers: {name}"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_proj.weight", "not the weights of experts; name linear layers in target_modules"),
        ("gate_up_proj_bias", "not the weights of experts"),
        ("down_proj", "in_features 32 is not a multiple of m = 3"),
    ],
)
def test_parameters_that_cannot_be_masked_are_refused(target, message):
    with pytest.raises(ValueError, match=rf"cannot mask model\.layers\.0\..*{target}.*: .*{message}"):
        get_peft_model(tiny_gpt_oss(), MaskProConfig(n=1, m=3, target_modules=[], target_parameters=[target]))


def test_a_parameter_that_is_not_there_is_refused():
    config = MaskProConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj", "expert.gate_up_proj"])
    with pytest.raises(ValueError, match=r"target_parameters expert\.gate_up_proj is no parameter of the model"):
        get_peft_model(tiny_mixtral(), config)


def test_experts_that_share_their_weights_are_refused():
    model = tiny_mixtral()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj = first.gate_up_proj
    match = r"0\.mlp\.experts\.gate_up_proj.*: model\.layers\.0\.mlp\.experts and .*1\.mlp\.experts share one weight"
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, MaskProConfig())
    config = MaskProConfig(exclude_modules=["gate_up_proj"])
    assert len([name for name in masked_layers(get_peft_model(model, config)) if "experts" in name]) == 2


def test_offloaded_experts_are_masked_as_they_are_brought(ids):
    model = get_peft_model(tiny_mixtral(), MaskProConfig(init_mask="random")).eval()
    expected = logits(model, ids)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model, ids), expected)


def test_experts_that_the_pattern_does_not_fit_stay_dense_if_asked(tmp_path, ids):
    config = MaskProConfig(n=3, m=5, target_modules=[], target_parameters=["experts.down_proj"])
    sizes = {"vocab_size": 34, "hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}

    def make():
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()

    with pytest.raises(ValueError, match="experts' in_features 32 is not a multiple of m = 5"):
        get_peft_model(make(), config)
    with pytest.warns(UserWarning, match=r"experts\.down_proj stay dense, 2,560 of 9,280 weights"):
        model = get_peft_model(make(), MaskProConfig(n=3, m=5, on_indivisible="dense")).eval()
    assert {name for name in masked_layers(model) if "experts" in name} == {"model.layers.0.mlp.experts.gate_up_proj"}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path), ids), logits(model, ids))


def test_another_adapter_between_experts_and_their_mask_is_refused(ids):
    masked = get_peft_model(tiny_mixtral(), MaskProConfig())
    names = sorted(masked.peft_config["default"].target_parameters)
    config = LoraConfig(target_modules=[], target_parameters=names)
    model = get_peft_model(masked.base_model.model, config, adapter_name="lora")
    with pytest.raises(ValueError, match="ParamWrapper lies between masked experts and their mask"):
        logits(model, ids)


def test_a_lora_learns_beside_masked_experts_and_is_loaded_over_them(tmp_path, ids):
    masked = get_peft_model(tiny_mixtral(), MaskProConfig(init_mask="random"))
    with pytest.raises(ValueError, match="'all-linear' of 'quality' takes in experts that are masked; name the"):
        get_peft_model(masked.get_base_model(), LoraConfig(target_modules="all-linear"), adapter_name="quality")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(masked.get_base_model(), config, adapter_name="quality").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name or "maskpro_theta" in name}
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path)
    base = tiny_mixtral()
    PeftModel.from_pretrained(base, tmp_path)
    both = PeftModel.from_pretrained(base, tmp_path / "quality", adapter_name="quality").eval()
    assert torch.equal(logits(both, ids), expected)
