"""The calibration walk, on every family of models that it must know."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_maskpro import MaskProConfig, initialize_masks
from hf_maskpro.starts import calibration, generated_text, random_windows, start_token_of, swaps
from hf_maskpro.starts.batches import without_cache
from hf_maskpro.starts.gradients import gradient_norms
from hf_maskpro.starts.walk import SHRINKAGE, walk
from hf_maskpro.subset import group_members, mask_of, mode
from hf_maskpro.tuner import masked_layers, unmasked

from ..conftest import tiny_gpt2, tiny_llama


def batches(ids):
    return [{"input_ids": ids[:2], "labels": ids[:2]}, {"input_ids": ids[2:]}]


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
    with pytest.raises(ValueError, match="calibration data is empty"):
        initialize_masks(model, [])


@pytest.mark.parametrize("rule", ["wanda", "sparsegpt", "wanda+swaps"])
def test_inputs_that_overflow_are_refused(rule, ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask=rule))
    masked_layers(model)["model.layers.0.mlp.down_proj"].get_base_layer().weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs are not finite"):
        initialize_masks(model, batches(ids))


SIZES = {
    "vocab_size": 34,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES = [
    LlamaConfig(**SIZES),
    Qwen3Config(**SIZES),
    MistralConfig(**SIZES),
    Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"], sliding_window=4),
    PhiConfig(**SIZES),
    GPT2Config(vocab_size=34, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
@pytest.mark.parametrize("rule", ["wanda", "ria", "sparsegpt", "gblm", "pruner-zero", "random+swaps"])
def test_families(config, rule, ids):
    """In bfloat16, every rule gives every layer of every family a mask, and leaves the model as it was."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, MaskProConfig(init_mask=rule))
    initialize_masks(model, batches(ids))
    for layer in masked_layers(model).values():
        assert (mask_of(layer.initial_codes("default"), 4).sum(1) == 2).all()
        assert not layer.dense
        assert not layer.get_base_layer().weight.requires_grad
    model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert model.peft_config["default"].start["calibration"] == {"sequences": 4, "tokens": 48}


def test_padding_is_not_among_the_tokens_that_are_recorded(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="wanda"))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    initialize_masks(model, [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}])
    start = model.peft_config["default"].start["calibration"]
    assert start == {"sequences": 2 * len(ids), "tokens": int(mask.sum()) + ids.numel()}


def test_layers_that_share_one_input_need_not_share_the_next(ids):
    """Two experts that get the same tensor in one batch, and others in the next."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in "abc")

        def forward(self, hidden, **options):
            self.a(hidden)
            if hidden.flatten()[0] > 0:
                self.b(hidden)
                return self.c(hidden)
            self.b(2 * hidden)
            return hidden

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block()])

        def forward(self, hidden, use_cache=False):
            return self.layers[0](hidden)

    torch.manual_seed(0)
    x = torch.rand(3, 5, 16) + 1
    model = get_peft_model(Model(), MaskProConfig(init_mask="wanda", target_modules=["a", "b", "c"]))
    seen = {}
    data = [{"hidden": rows.unsqueeze(0)} for rows in (x[0], -x[1], x[2])]
    walk(model, "default", data, True, lambda name, layer, inputs: choose(seen, name[-1], layer, inputs))
    for name, rows in {"a": x, "b": x * torch.tensor([1, 2, 1]).view(3, 1, 1), "c": x[[0, 2]]}.items():
        flat = rows.flatten(0, 1)
        torch.testing.assert_close(seen[name].gram, flat.T @ flat)
        torch.testing.assert_close(seen[name].squares, flat.square().sum(0))
        assert seen[name].sequences == len(rows)


def test_layers_with_the_same_input_share_what_is_gathered(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="wanda"))
    seen = {}
    walk(model, "default", batches(ids), True, lambda name, layer, inputs: choose(seen, name, layer, inputs))
    first = {name.split(".")[-1]: inputs for name, inputs in seen.items() if ".0." in name}
    assert first["q_proj"] is first["k_proj"] is first["v_proj"]
    assert first["gate_proj"] is first["up_proj"]
    assert len(set(map(id, first.values()))) == 4
    assert all(inputs.sequences == 4 for inputs in first.values())


def choose(seen, name, layer, inputs):
    seen[name] = inputs
    layer.set_initial_mask(
        "default", torch.ones(layer.out_features, 4, 1).cumsum(1).expand(-1, -1, layer.in_features // 4) <= 2
    )


@pytest.mark.parametrize("rule", ["wanda", "sparsegpt", "gblm"])
def test_padding_does_not_count(rule, ids):
    """Texts of different lengths, padded into one batch, against each by itself."""
    mask = torch.ones_like(ids)
    mask[1, 8:], mask[3, 5:] = 0, 0
    padded = {"input_ids": ids.where(mask == 1, 0), "attention_mask": mask}
    single = [{"input_ids": row[None, :length]} for row, length in zip(ids, mask.sum(1), strict=True)]
    masks = []
    for data in ([padded], single):
        model = get_peft_model(tiny_llama(), MaskProConfig(init_mask=rule))
        initialize_masks(model, data)
        masks.append([layer.initial_codes("default") for layer in masked_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_two_active_adapters_are_calibrated_by_themselves(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="gblm", target_modules=["up_proj", "q_proj"]))
    model.add_adapter("second", MaskProConfig(init_mask="wanda", target_modules=["down_proj", "q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    initialize_masks(model, batches(ids))
    for name, config in (("default", model.peft_config["default"]), ("second", model.peft_config["second"])):
        alone = get_peft_model(
            tiny_llama(), MaskProConfig(init_mask=config.init_mask, target_modules=config.target_modules)
        )
        initialize_masks(alone, batches(ids))
        expected = masked_layers(alone)
        for layer_name, layer in masked_layers(model, name).items():
            assert torch.equal(layer.initial_codes(name), expected[layer_name].initial_codes("default"))
            assert layer.active_adapters == ["default", "second"]


def test_gradients_of_others_are_left_alone(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="gblm", modules_to_save=["lm_head"]))
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    initialize_masks(model, batches(ids))
    assert required == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())


class TwoStacks(nn.Module):
    """Two lists of layers, one layer before, between and behind them, and one that nothing ever reaches."""

    def __init__(self, shared=False):
        super().__init__()
        self.before, self.between, self.behind, self.unseen = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.first, self.second = (nn.ModuleList(map(Residual, [16] * 2)) for _ in range(2))
        if shared:
            self.second[1] = self.second[0]

    def forward(self, hidden, use_cache=False):
        for blocks, layer in ((self.first, self.between), (self.second, self.behind)):
            hidden = self.before(hidden) if blocks is self.first else hidden
            for block in blocks:
                hidden = block(hidden)
            hidden = layer(hidden)
        return hidden


class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)

    def forward(self, hidden, **options):
        return hidden + self.layer(hidden)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_lists_are_walked_as_they_run_and_what_is_outside_comes_last(shared, in_order, caplog):
    torch.manual_seed(0)
    names = ["before", "between", "behind", "unseen", "layer"]
    model = get_peft_model(TwoStacks(shared), MaskProConfig(init_mask="wanda", target_modules=names)).eval()
    data = [{"hidden": torch.randn(2, 5, 16)} for _ in range(3)]
    order, seen = [], {}

    def take(name, layer, inputs):
        order.append(name)
        choose(seen, name, layer, inputs)

    walk(model, "default", data, True, take, in_order)
    walked = ["first.0.layer", "first.1.layer"] + ["second.0.layer", "second.1.layer"] * (not shared)
    assert order[: len(walked)] == walked
    assert "in one pass" in caplog.text
    assert not seen.pop("unseen").squares.any()
    # Of what the masked layers before it make of the data.
    layers, given = masked_layers(model), {name: [] for name in seen}
    for layer in {*layers.values()} - {layers[name] for name in walked}:
        layer.dense = True
    handles = [
        layers[name].register_forward_pre_hook(lambda layer, args, name=name: given[name].append(args[0]))
        for name in seen
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    for name in set(seen) - set(walked):
        rows = torch.cat(given[name]).flatten(0, 1)
        torch.testing.assert_close(seen[name].squares, rows.square().sum(0))


@pytest.mark.parametrize("rule", ["wanda", "sparsegpt+swaps"])
def test_layers_of_a_list_that_no_data_reaches_keep_their_largest_weights_and_are_named(rule, ids, caplog):
    sizes = {"vocab_size": 34, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = get_peft_model(
        GPT2LMHeadModel(GPT2Config(add_cross_attention=True, **sizes)), MaskProConfig(init_mask=rule)
    )
    initialize_masks(model, batches(ids))
    model.add_adapter("largest", MaskProConfig())
    kept = [
        name
        for name, layer in masked_layers(model).items()
        if torch.equal(layer.initial_codes("default"), layer.initial_codes("largest"))
    ]
    assert kept == [name for name in masked_layers(model) if "crossattention" in name]
    (told,) = [record.message for record in caplog.records if "saw no data" in record.message]
    assert all(name in told for name in kept[:3])
    assert f"and {len(kept) - 3} more saw no data; their largest weights are kept" in told


def test_batches_that_run_other_layers_than_the_first_are_refused():
    class Skips(TwoStacks):
        def forward(self, hidden, skip=None, use_cache=False):
            for block in self.first if skip is None else self.first[1:]:
                hidden = block(hidden)
            return hidden

    model = get_peft_model(Skips(), MaskProConfig(init_mask="wanda", target_modules=["layer"]))
    data = [{"hidden": torch.ones(1, 2, 16)}, {"hidden": torch.ones(1, 2, 16), "skip": torch.ones(1)}]
    with pytest.raises(ValueError, match="batch 2 of 2 takes another way through the model than the first"):
        initialize_masks(model, data)
    # What the first does not reach is no part of a list.
    seen = {}
    walk(model, "default", data[::-1], False, lambda name, layer, inputs: choose(seen, name, layer, inputs))
    assert seen["first.0.layer"].squares.tolist() == [2.0] * 16


def test_padding_of_an_encoder_is_not_that_of_its_decoder(ids):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=34, decoder_start_token_id=1, pad_token_id=1, **sizes)
    model = get_peft_model(T5ForConditionalGeneration(config).eval(), MaskProConfig(init_mask="wanda"))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    seen = {}
    data = [{"input_ids": ids, "attention_mask": mask, "labels": ids[:, :12]}]
    walk(model, "default", data, False, lambda name, layer, inputs: choose(seen, name, layer, inputs))
    with torch.no_grad():
        known = model.base_model.model.shared(ids)
    normalised = known * known.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    squares = seen["encoder.block.0.layer.0.SelfAttention.q"].squares
    torch.testing.assert_close(squares, normalised[:, :8].flatten(0, 1).square().sum(0))
    inputs = model.base_model.model.shared(torch.cat([torch.ones(4, 1, dtype=torch.int64), ids[:, :-1]], 1)).detach()
    normalised = inputs * inputs.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    squares = seen["decoder.block.0.layer.0.SelfAttention.q"].squares
    torch.testing.assert_close(squares, normalised.flatten(0, 1).square().sum(0))


@pytest.mark.parametrize("rule", ["magnitude", "wanda", "sparsegpt"])
def test_swaps_lower_the_error_of_every_layer(rule, ids):
    """Of the first decoder layer, whose inputs are the same before and after."""
    masks = {}
    for method in (rule, f"{rule}+swaps"):
        model = get_peft_model(tiny_llama(), MaskProConfig(init_mask=method))
        initialize_masks(model, batches(ids))
        layers = masked_layers(model)
        masks[method] = {name: mask_of(layer.initial_codes("default"), 4) for name, layer in layers.items()}

    def measure(name, layer, inputs):
        weight = layer.get_base_layer().weight.detach()
        before, after = (swaps.reconstruction_error(weight, masks[m][name], inputs.gram).sum() for m in masks)
        if ".0." in name:
            assert after < before, name
        layer.set_initial_mask("default", masks[f"{rule}+swaps"][name])

    walk(model, "default", batches(ids), True, measure)


def test_gradients_are_those_of_single_sequences(ids):
    for make in (tiny_llama, tiny_gpt2):
        model = get_peft_model(make(), MaskProConfig(init_mask="random"))
        norms = gradient_norms(model, "default", [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}])
        dense = make()
        squares = {}
        for row in ids:
            dense.zero_grad()
            dense(input_ids=row[None], labels=row[None]).loss.backward()
            for name, parameter in dense.named_parameters():
                squares[name] = squares.get(name, 0) + parameter.grad.square()
        for name, layer in masked_layers(model).items():
            torch.testing.assert_close(norms[name], layer.out_in(squares[f"{name}.weight"]).sqrt())


def test_windows_start_anywhere_and_by_the_seed():
    ids = torch.arange(100)
    windows = torch.cat([batch["input_ids"] for batch in random_windows(ids, samples=50, seq_len=10, seed=1)])
    assert windows.shape == (50, 10)
    assert torch.equal(windows - windows[:, :1], torch.arange(10).expand(50, 10))
    assert len({int(start) % 10 for start in windows[:, 0]}) > 5
    again = torch.cat([batch["input_ids"] for batch in random_windows(ids, samples=50, seq_len=10, seed=1)])
    other = torch.cat([batch["input_ids"] for batch in random_windows(ids, samples=50, seq_len=10, seed=2)])
    assert torch.equal(windows, again)
    assert not torch.equal(windows, other)
    assert len(random_windows(ids, 1, 100)[0]["input_ids"]) == 1
    with pytest.raises(ValueError, match="100 tokens, fewer than a calibration window of 101"):
        random_windows(ids, 1, 101)


def test_windows_begin_with_the_start_token():
    ids, start = torch.arange(100), 100
    plain = torch.cat([batch["input_ids"] for batch in random_windows(ids, 50, 9, seed=1)])
    begun = torch.cat([torch.full((50, 1), start), plain], dim=1)
    for text in (
        ids,
        torch.cat([torch.tensor([start]), ids]),
        torch.nn.functional.pad(ids.view(4, 25), (1, 0), value=start),
    ):
        batches = random_windows(text, 50, 10, seed=1, start_token=start)
        assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), begun)
    assert len(random_windows(ids, 1, 101, start_token=start)[0]["input_ids"]) == 1
    with pytest.raises(ValueError, match="100 tokens, fewer than a calibration window of 102"):
        random_windows(ids, 1, 102, start_token=start)


def test_generated_text_begins_with_the_start_token(starting_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(starting_checkpoint)
    batches = generated_text(tiny_llama(), tokenizer, samples=9, seq_len=12)
    text = torch.cat([batch["input_ids"] for batch in batches])
    assert text.shape == (9, 12)
    assert (text[:, 0] == start_token_of(tokenizer)).all()


def test_generated_text_begins_with_any_token(starting_checkpoint, checkpoint):
    """After the start token where the tokenizer adds one, and with no special one then or later."""
    for path, first in (starting_checkpoint, 1), (checkpoint, 0):
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = None
        words = {*range(len(tokenizer))} - {*tokenizer.all_special_ids}
        # One of the vocabulary, as line breaks are in some tokenizers, and one that the model has no row for.
        tokenizer.add_tokens(["w30", "beyond"])
        assert len(tokenizer) == len(words) + len(tokenizer.all_special_ids) + 1
        batches = generated_text(tiny_llama(), tokenizer, samples=400, seq_len=8)
        text = torch.cat([batch["input_ids"] for batch in batches])
        assert set(text[:, first].tolist()) == words - {tokenizer.convert_tokens_to_ids("w30")}
        assert set(text[:, first:].flatten().tolist()) == words
        assert generated_text(tiny_llama(), tokenizer, samples=1, seq_len=2)[0]["input_ids"].shape == (1, 2)


def test_generated_text_is_a_function_of_its_seed(starting_checkpoint):
    model, tokenizer = tiny_llama(), AutoTokenizer.from_pretrained(starting_checkpoint)

    def text(**options):
        return torch.cat([batch["input_ids"] for batch in generated_text(model, tokenizer, **options)])

    state = torch.get_rng_state()
    first = text(samples=70, seq_len=12, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(text(samples=65, seq_len=12, seed=1), first[:65])
    assert not torch.equal(text(samples=70, seq_len=12, seed=2), first)
    # By chance alone two of them were alike.
    assert len({tuple(row) for row in first.tolist()}) == 70


@pytest.mark.parametrize(
    "config",
    [*FAMILIES, MambaConfig(vocab_size=34, hidden_size=16, state_size=4, num_hidden_layers=2)],
    ids=lambda config: config.model_type,
)
def test_every_token_of_generated_text_is_drawn_from_the_whole_distribution(config):
    """As in a loop that keeps no keys and values."""
    torch.manual_seed(0)
    # In double precision, where the two ways of computing do not round a token to another.
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # So that it matters what was attended to.
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    taste = model.generation_config = GenerationConfig(temperature=0.3, top_k=2, eos_token_id=[*range(17)])
    ids = torch.tensor([[1, 5, 9]] * 4)
    torch.manual_seed(7)
    with torch.no_grad():
        while ids.shape[1] < 24:
            logits = model(input_ids=ids, **without_cache(model)).logits[:, -1].float()
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    assert torch.equal(calibration._sample(model, torch.tensor([[1, 5, 9]] * 4), 24, 7), ids)
    assert model.generation_config is taste


@pytest.mark.parametrize("start", ["{{ bos_token }} ", ""])
def test_every_other_batch_of_generated_text_begins_as_a_conversation(starting_checkpoint, start):
    tokenizer = AutoTokenizer.from_pretrained(starting_checkpoint)
    tokenizer.chat_template = start + "w30 w31 {{ messages[0].content }} w29"
    batches = generated_text(tiny_llama(), tokenizer, samples=130, seq_len=8)
    text = torch.cat([batch["input_ids"] for batch in batches])
    assert text.shape == (130, 8)
    opening = tokenizer("w30 w31").input_ids
    begins = (text[:, :3] == torch.tensor(opening)).all(1)
    assert begins[64:128].all()
    assert not begins[:64].any()
    assert (text[:, 0] == opening[0]).all()
    # Windows that the opening would fill are left to the model.
    short = generated_text(tiny_llama(), tokenizer, samples=70, seq_len=3)
    assert not (torch.cat([batch["input_ids"] for batch in short]) == torch.tensor(opening)).all(1)[64:].all()


def test_interrupted_generation_goes_on(starting_checkpoint, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(starting_checkpoint)

    def text(samples=150, seed=1, cache=tmp_path / "cache", model=None):
        batches = generated_text(model or tiny_llama(), tokenizer, samples, 12, seed, cache)
        return torch.cat([batch["input_ids"] for batch in batches])

    made, sample = [], calibration._sample

    def interrupted(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arguments)
        return sample(*arguments)

    monkeypatch.setattr(calibration, "_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["00000.safetensors", "00001.safetensors"]
    made.clear()
    resumed = text()
    assert len(made) == 1
    made.clear()
    assert torch.equal(text(samples=100), resumed[:100])
    assert made == []
    monkeypatch.undo()
    assert torch.equal(text(cache=None), resumed)
    for other in ({"seed": 2}, {"model": tiny_llama(seed=1)}):
        with pytest.raises(
            ValueError, match="cache holds text by another model, seed or seq_len; remove or rename it"
        ):
            text(**other)
    (tmp_path / "cache" / "00001.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"00001\.safetensors is damaged: .*; remove it"):
        text()


def test_gradients_that_are_not_finite_are_refused(ids):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="gblm"))
    with torch.no_grad():
        model.base_model.model.lm_head.weight *= 1e38
    with pytest.raises(ValueError, match="its gradients are not finite"):
        initialize_masks(model, [{"input_ids": ids}])


def test_a_walk_by_stages_sees_what_whole_models_see():
    """Against a slow second way: hooks on whole forward passes, dense and under the masks that were chosen."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="sparsegpt+swaps"))
    batches = [{"input_ids": torch.randint(2, 34, (3, 11))} for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    seen = {}

    def choose(name, layer, inputs):
        seen[name] = inputs
        weight = layer.out_in(layer.get_base_layer().weight)
        scores = torch.rand(weight.shape, generator=generator)
        layer.set_initial_mask("default", mode(group_members(scores, 4), 2))

    walk(model, "default", batches, True, choose, in_order=True)
    layers = masked_layers(model)
    assert list(seen) == list(layers)

    def inputs_of_all():
        found = {name: [] for name in layers}
        handles = [
            layer.register_forward_pre_hook(lambda layer, args, name=name: found[name].append(args[0].flatten(0, 1)))
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            for batch in batches:
                model.eval()(**batch)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(tensors).double() for name, tensors in found.items()}

    masked = inputs_of_all()
    with unmasked(model):
        dense = inputs_of_all()
    for name, inputs in seen.items():
        scale = masked[name].square().mean(1, keepdim=True).rsqrt()
        unit = masked[name] * scale
        gram = unit.T @ unit
        expected = torch.lerp(gram, gram.diagonal().diag(), SHRINKAGE)
        torch.testing.assert_close(inputs.gram.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inputs.squares.double(), masked[name].square().sum(0), rtol=1e-4, atol=1e-5)
        lost = ((dense[name] - masked[name]) * scale).T @ unit
        torch.testing.assert_close(inputs.lost.double(), lost, rtol=1e-3, atol=1e-3)
    # Of the first stage nothing is lost, of all others something is.
    assert [bool(inputs.lost.norm() > 1e-2) for inputs in seen.values()] == [False] * 3 + [True] * (len(seen) - 3)


def test_a_walk_by_stages_runs_a_layer_under_its_mask_once_for_a_batch(ids, monkeypatch):
    model = get_peft_model(tiny_llama(), MaskProConfig(init_mask="wanda+swaps"))
    names = {layer: name for name, layer in masked_layers(model).items()}
    cls, runs = type(next(iter(names))), []
    forward = cls.forward

    def counted(layer, *args):
        if not layer.dense:
            runs.append(names[layer])
        return forward(layer, *args)

    monkeypatch.setattr(cls, "forward", counted)
    initialize_masks(model, batches(ids))
    assert sorted(runs) == sorted(2 * list(names.values()))


def test_what_parts_in_a_later_batch_has_its_own_dense_inputs():
    """Two layers that share their input at first: then each has another."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, hidden_states, **options):
            x = self.first(hidden_states)
            apart = hidden_states[0, 0, 0] > 0
            return self.a(x) + self.b(2 * x if apart else x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Parts()])

        def forward(self, hidden_states, use_cache=False):
            return self.layers[0](hidden_states)

    torch.manual_seed(0)
    model = get_peft_model(Model(), MaskProConfig(target_modules=["first", "a", "b"], init_mask="sparsegpt+swaps"))
    together, apart = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    together[0, 0, 0], apart[0, 0, 0] = -1.0, 1.0
    seen = {}

    def choose(name, layer, inputs):
        seen[name.rpartition(".")[2]] = inputs
        layer.set_initial_mask("default", mode(group_members(torch.rand(8, 8), 4), 2))

    walk(model, "default", [{"hidden_states": together}, {"hidden_states": apart}], True, choose, in_order=True)
    # Of tokens of size 1 the factor 2 is no difference.
    torch.testing.assert_close(seen["a"].gram, seen["b"].gram)
    torch.testing.assert_close(seen["a"].lost, seen["b"].lost)
