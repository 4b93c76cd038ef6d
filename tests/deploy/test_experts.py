"""Experts of merged checkpoints, whether they are stored one by one or as the model holds them."""

import re

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from hf_maskpro import MaskProConfig, check_sparsity
from hf_maskpro.deploy import merge
from tests.conftest import headers, tiny_gpt_oss, tiny_mixtral


SIZES = {"vocab_size": 34, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 1}


def tiny_olmoe(layers=2):
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, **sizes, num_hidden_layers=layers)).eval()


def tiny_deepseek(layers=2):
    """A dense layer, then one with a shared expert beside the routed ones."""
    torch.manual_seed(0)
    attention = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    sizes = {"intermediate_size": 32, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    config = DeepseekV3Config(**SIZES, **attention, **experts, **sizes, num_hidden_layers=layers)
    return DeepseekV3ForCausalLM(config).eval()


@pytest.fixture
def folders(tmp_path):
    """A base and an adapter for it."""

    def save(make, shard="5GB"):
        make().save_pretrained(tmp_path / "base", max_shard_size=shard)
        model = get_peft_model(make(), MaskProConfig(init_mask="random")).eval()
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"

    return save


@pytest.mark.parametrize("shard", ["1GB", "9KB"])
@pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss, tiny_olmoe, tiny_deepseek])
def test_a_merged_checkpoint_has_the_pattern_in_every_expert(make, shard, folders, ids):
    model, base, adapter, merged = folders(make, shard)
    report = merge(base, adapter, merged)
    assert set(report.values()) == {0.5}
    assert sum("experts." in name and not name.endswith(".weight") for name in report) in (2, 4)
    assert headers(base) == headers(merged)
    for file in merged.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            if "expert" in key and "bias" not in key:
                rows = tensor.transpose(1, 2) if make is tiny_gpt_oss else tensor
                assert int((rows.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) == 2, key
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert check_sparsity(merged, 2, 4) == check_sparsity(loaded, 2, 4) == report
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def one_tensor(base, change):
    """Change one expert's part of a checkpoint that stores them one by one."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if re.search(r"experts\.2\.w3", key))
    change(tensors, key)
    save_file(tensors, file, metadata={"format": "pt"})


def test_other_experts_than_the_mask_was_learned_for_are_refused(folders):
    _, base, adapter, merged = folders(tiny_mixtral)
    one_tensor(base, lambda tensors, key: tensors[key].mul_(2))
    with pytest.raises(ValueError, match=r"learned for other weights than .*experts\.\d\.w\d"):
        merge(base, adapter, merged)
    assert not merged.exists()


def test_a_checkpoint_that_lacks_an_expert_is_refused(folders):
    _, base, adapter, merged = folders(tiny_mixtral)
    one_tensor(base, lambda tensors, key: tensors.pop(key))
    with pytest.raises(ValueError, match=r"model\.layers\.\d\.mlp\.experts\.gate_up_proj has no tensor of its own"):
        merge(base, adapter, merged)


def test_one_dense_expert_is_found(folders):
    _, base, adapter, merged = folders(tiny_mixtral)
    merge(base, adapter, merged)
    one_tensor(merged, lambda tensors, key: tensors[key].fill_(1))
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj: 128 of 128 groups have more than 2 of 4"):
        check_sparsity(merged, 2, 4)
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj: 128 of 256 groups have more than 2 of 4"):
        check_sparsity(AutoModelForCausalLM.from_pretrained(merged), 2, 4)
