import pytest
import torch
from peft import get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.initialization.wanda import scores
from hf_maskpro.subset import mask_of
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_gpt2, tiny_llama


def batches(ids):
    return [{"input_ids": ids[:2], "labels": ids[:2]}, {"input_ids": ids[2:]}]


def test_scores_are_weight_times_input_norm():
    weight, inputs = torch.randn(3, 8), torch.randn(5, 8)
    expected = torch.tensor([[abs(w) * x for w, x in zip(row, inputs.norm(dim=0), strict=True)] for row in weight])
    torch.testing.assert_close(scores(weight, inputs.norm(dim=0)), expected)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_every_layer_sees_what_the_masked_layers_before_it_produce(make, ids, n, m):
    """Against a slow second way: hooks on whole forward passes, one decoder layer masked after another."""
    model = get_peft_model(make(), MaskProConfig(n=n, m=m, init_mask="wanda"))
    initialize_masks(model, batches(ids))
    layers = masked_layers(model)

    reference = get_peft_model(make(), MaskProConfig(n=n, m=m)).eval()
    theirs = masked_layers(reference)
    for block in range(2):
        squares = {}
        handles = []
        for name, layer in theirs.items():
            layer.enable_adapters(f".{block}." not in name and any(f".{b}." in name for b in range(block)))
            if f".{block}." in name:

                def add(module, args, name=name, squares=squares):
                    squares[name] = squares.get(name, 0) + args[0].flatten(0, -2).square().sum(0)

                handles.append(layer.register_forward_pre_hook(add))
        with torch.no_grad():
            reference(input_ids=ids)
        for handle in handles:
            handle.remove()
        for name, square in squares.items():
            layer = theirs[name]
            rows = layer.out_in(layer.get_base_layer().weight.detach()).abs() * square.sqrt()
            keep = torch.zeros_like(rows, dtype=torch.bool).view(len(rows), -1, m)
            keep.scatter_(2, rows.view(len(rows), -1, m).topk(n, dim=-1).indices, True)
            layer.set_initial_mask("default", keep.transpose(1, 2))
            mine = mask_of(layers[name].initial_codes("default"), m)
            assert torch.equal(mine, keep.transpose(1, 2)), name
        for layer in theirs.values():
            layer.enable_adapters(True)


def test_every_decoder_layer_gets_its_own_arguments(ids):
    """Models that mix sliding and full attention give each layer another mask and other positions."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=34,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = get_peft_model(Gemma3ForCausalLM(config).eval(), MaskProConfig(init_mask="wanda"))
    seen, outputs = [], []
    block = model.base_model.model.model.layers[2]
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    initialize_masks(model, [{"input_ids": ids}])
    walked = seen[-1]
    block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=ids)
    assert torch.equal(walked, outputs[0])


def test_a_second_adapter_on_fewer_layers(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig())
    model.add_adapter("narrow", MaskProConfig(init_mask="wanda", target_modules=["up_proj"]))
    model.set_adapter("narrow")
    initialize_masks(model, batches(ids))
    assert len(masked_layers(model, "narrow")) == 2


def test_layers_in_eval_mode_stay_there(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="wanda"))
    initialize_masks(model, batches(ids))
    assert not any(layer.training for layer in masked_layers(model).values())


def test_state_is_left_as_it_was(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="wanda")).train()
    initialize_masks(model, batches(ids))
    assert model.training
    for layer in masked_layers(model).values():
        assert layer.training
        assert not layer.disable_adapters
        assert layer.maskpro_theta["default"].requires_grad
        assert not layer._forward_pre_hooks
    model(input_ids=ids, labels=ids).loss.backward()


def test_data_free_masks_are_left_alone(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="random"))
    before = [layer.maskpro_mask["default"].clone() for layer in masked_layers(model).values()]
    initialize_masks(model)
    after = [layer.maskpro_mask["default"] for layer in masked_layers(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_bad_input():
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="wanda"))
    with pytest.raises(ValueError, match="needs calibration text"):
        initialize_masks(model)
    with pytest.raises(ValueError, match="dataloader is empty"):
        initialize_masks(model, [])
