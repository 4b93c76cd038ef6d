"""What is minimised, against plain implementations of the same."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    Trainer,
)
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.learning import objectives
from hf_maskpro.learning.objectives import LossBySpans, language_modeling_by_spans, objective_weights
from hf_maskpro.tuner import MaskProLayer

from ..conftest import tiny_gpt2, tiny_llama
from .test_trainer import arguments, rows, thetas


def batch(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def plain(dense, masked, labels, weights, temperature):
    """Losses of sequences from all logits at once."""
    counts, targets = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    found = (masked[:, :-1] / temperature).log_softmax(-1)
    wanted = (dense[:, :-1] / temperature).log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1) * temperature**2
    likelihood = masked[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    losses = weights.get("distillation", 0) * divergence - weights.get("language-modeling", 0) * likelihood
    return (losses * counts).sum(1)


def double(model):
    """A masked model in float64, with trained values in the place of masks."""
    masked = get_peft_model(model.double(), MaskProConfig())
    values = []
    for layer in masked.modules():
        if isinstance(layer, MaskProLayer):
            value = torch.rand_like(layer.get_base_layer().weight).requires_grad_()
            layer.choose_mask = lambda weight, value=value: weight * value
            values.append(value)
    return masked.train(), values


def tiny_opt():
    """It calls the decoder inside its base model, and not the base model."""
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=34,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt])
@pytest.mark.parametrize(
    "weights", [{"distillation": 1.0}, {"distillation": 0.7, "language-modeling": 0.2}, {"language-modeling": 1.0}]
)
def test_the_gradient_is_that_of_a_plain_implementation(monkeypatch, make, weights):
    monkeypatch.setattr(objectives, "SPAN", 5)
    model, values = double(make())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, OPTDecoderLayer):
            module.dropout = 0.0
    inputs = batch(rows(4, ragged=True))
    with model.disable_adapter(), torch.no_grad():
        dense = model(input_ids=inputs["input_ids"]).logits
    expected = plain(dense, model(input_ids=inputs["input_ids"]).logits, inputs["labels"], weights, 2.0)
    found = LossBySpans(model, weights, 2.0).sequence_losses(model, inputs)

    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    gradients = torch.autograd.grad(found.sum(), values)
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_what_a_model_does_to_its_logits_is_part_of_them():
    config = Gemma2Config(
        vocab_size=34, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(Gemma2ForCausalLM(config), MaskProConfig()).eval()
    inputs = batch(rows(2))
    with torch.no_grad():
        masked = model(input_ids=inputs["input_ids"]).logits
        with model.disable_adapter():
            dense = model(input_ids=inputs["input_ids"]).logits
        found = LossBySpans(model, {"distillation": 1.0}, 1.0).sequence_losses(model, inputs)
    assert masked.abs().max() <= 0.05
    torch.testing.assert_close(found, plain(dense, masked, inputs["labels"], {"distillation": 1.0}, 1.0))


def test_a_mask_that_drops_nothing_costs_nothing(tmp_path):
    model = tiny_llama()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.view(len(module.weight), -1, 4)[..., 2:] = 0
    masked = get_peft_model(model, MaskProConfig())
    loss = LossBySpans(masked, {"distillation": 1.0}, 1.0).sequence_losses(masked, batch(rows(4)))
    assert torch.equal(loss, torch.zeros(4))


@pytest.mark.parametrize("estimator", ["simple", "residual", "proxsparse", "maskllm"])
def test_accumulated_batches_learn_as_one_with_every_estimator(tmp_path, estimator):
    def learn(size, accumulation):
        masked = get_peft_model(tiny_llama(), MaskProConfig())
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        # What is explored goes by the first micro-batch.
        options |= {"explored_groups": 10**9} if estimator == "residual" else {}
        args = arguments(tmp_path, estimator, objective="distillation", max_steps=1, logging_steps=1, **options)
        trainer = MaskProTrainer(masked, args, train_dataset=rows(8, ragged=True))
        trainer.train()
        return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)

    # The others draw a mask for every micro-batch; the starting mask is hardly left.
    draws_once = estimator in ("residual", "proxsparse")
    assert learn(8, 1) == pytest.approx(learn(2, 4), rel=1e-3 if draws_once else 0.2)


def test_padding_and_checkpointing_change_nothing(tmp_path):
    def gradient(inputs, checkpointing):
        masked = get_peft_model(tiny_llama(), MaskProConfig(logit_scale=4.0))
        if checkpointing:
            masked.gradient_checkpointing_enable({"use_reentrant": False})
        masked.train()
        torch.manual_seed(1)
        objective = LossBySpans(masked, {"distillation": 1.0}, 1.0)
        objective.sequence_losses(masked, inputs).sum().backward()
        return [parameter.grad for parameter in masked.parameters() if parameter.grad is not None]

    inputs = batch(rows(4))
    known = gradient(inputs, False)
    padded = {
        "input_ids": F.pad(inputs["input_ids"], (0, 3), value=1),
        "labels": F.pad(inputs["labels"], (0, 3), value=-100),
        "attention_mask": F.pad(torch.ones_like(inputs["input_ids"]), (0, 3)),
    }
    for others in (gradient(inputs, True), gradient(padded, False)):
        assert known
        for one, other in zip(known, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_packed_sequences_have_their_losses_apart():
    """By the collator of transformers that packs without padding."""
    masked = get_peft_model(tiny_llama(), MaskProConfig(init_mask="random")).eval()
    features = [
        {name: value[: 12 - place].tolist() for name, value in row.items()}
        for place, row in enumerate(rows(5, ragged=True))
    ]
    packed = DataCollatorWithFlattening(return_tensors="pt")(features)
    assert packed["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in features))

    def losses(inputs):
        with torch.no_grad():
            objective = LossBySpans(masked, {"distillation": 1.0, "language-modeling": 0.5}, 1.0)
            return objective.sequence_losses(masked, inputs)

    apart = [losses({name: torch.tensor([value]) for name, value in row.items()}) for row in features]
    torch.testing.assert_close(losses(packed), torch.stack(apart).sum(0))


def test_distillation_brings_the_masked_model_closer_to_the_dense_one(tmp_path):
    masked = get_peft_model(tiny_llama(), MaskProConfig(init_mask="random"))
    args = arguments(tmp_path, "simple", objective="distillation", max_steps=60, per_device_train_batch_size=16)
    trainer = MaskProTrainer(masked, args, train_dataset=rows(64))
    inputs = batch(rows(16, seed=1))

    def divergence():
        masked.eval()
        with torch.no_grad():
            return LossBySpans(masked, {"distillation": 1.0}, 1.0).sequence_losses(masked, inputs).sum().item()

    before = divergence()
    trainer.train()
    assert divergence() < 0.8 * before


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt])
@pytest.mark.parametrize("items", [None, 30])
def test_the_language_model_loss_by_spans_is_the_models_own(tmp_path, make, items):
    masked = get_peft_model(make(), MaskProConfig(logit_scale=4.0)).eval()
    trainer = MaskProTrainer(masked, arguments(tmp_path, "simple"), train_dataset=rows())
    inputs = batch(rows(4, ragged=True))
    by_spans = language_modeling_by_spans(masked)
    assert by_spans is not None
    found = {}
    for objective in (None, by_spans):
        trainer.loss_by_spans = objective
        loss = trainer.compute_loss(masked, inputs, num_items_in_batch=items)
        found[objective] = [loss, *torch.autograd.grad(loss, [p for p in masked.parameters() if p.requires_grad])]
    own, spans = found.values()
    assert all(each.any() for each in own)
    for one, other in zip(own, spans, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["simple", "residual"])
def test_language_modelling_runs_by_spans(tmp_path, monkeypatch, estimator, dtype):
    def never(self, *args, **kwargs):
        raise AssertionError("the model's own loss has all logits")

    monkeypatch.setattr(Trainer, "compute_loss", never)
    masked = get_peft_model(tiny_llama().to(dtype), MaskProConfig())
    MaskProTrainer(masked, arguments(tmp_path, estimator, max_steps=1), train_dataset=rows()).train()


def unshifted():
    return BartForCausalLM(
        BartConfig(vocab_size=34, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    )


def routed():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=34, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, output_router_logits=True,
        )
    )  # fmt: skip


def with_a_layer_before_the_head():
    return RobertaForCausalLM(
        RobertaConfig(
            vocab_size=34, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            is_decoder=True,
        )
    )  # fmt: skip


def without_padding():
    """Whatever its label, what is padding does not count, as with Qwen2-Audio."""

    class WithoutPadding(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            if labels is not None and attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, -100)
            return super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    return WithoutPadding(tiny_llama().config)


def foreign():
    """It takes the end of a text for what the first token follows."""

    class Foreign(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            return super().forward(input_ids, labels=None if labels is None else labels.roll(1, 1), **kwargs)

    return Foreign(tiny_llama().config)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (unshifted, {}),
        (routed, {}),
        (with_a_layer_before_the_head, {}),
        (without_padding, {}),
        (foreign, {}),
        (tiny_llama, {"modules_to_save": ["lm_head"]}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_models_own_loss_is_another_it_is_taken(tmp_path, make, options, dtype):
    torch.manual_seed(0)
    masked = get_peft_model(make().to(dtype), MaskProConfig(**options))
    trainer = MaskProTrainer(masked, arguments(tmp_path, "simple", max_steps=1), train_dataset=rows())
    trainer.train()
    assert trainer.loss_by_spans is None


def test_a_layer_before_the_head_is_moved_by_language_modelling_and_refused_by_distillation(tmp_path):
    def trainer(objective):
        masked = get_peft_model(with_a_layer_before_the_head(), MaskProConfig())
        return MaskProTrainer(
            masked, arguments(tmp_path, "simple", objective=objective, max_steps=1), train_dataset=rows()
        )

    moves = trainer("language-modeling")
    moves.train()
    assert moves.model.base_model.model.lm_head.dense.maskpro_theta["default"].any()
    refused = trainer("distillation")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"trains the decoder alone, and .*lm_head\.dense.*exclude_modules"):
            refused.train()


def test_batches_that_the_model_makes_labels_of_have_its_own_loss(tmp_path):
    masked = get_peft_model(tiny_llama(), MaskProConfig())
    trainer = MaskProTrainer(masked, arguments(tmp_path, "residual", max_steps=1), train_dataset=rows())
    trainer.train()
    assert trainer.loss_by_spans is not None
    inputs = batch(rows(4))
    inputs["shift_labels"] = inputs["labels"].roll(1, 1)
    torch.testing.assert_close(trainer.compute_loss(masked.eval(), inputs), masked(**inputs).loss)
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.compute_loss(masked, {"input_ids": inputs["input_ids"]})


@pytest.mark.parametrize("option", ["torch_compile", "use_liger_kernel"])
def test_what_brings_a_head_of_its_own_keeps_it(tmp_path, monkeypatch, option):
    masked = get_peft_model(tiny_llama(), MaskProConfig())
    trainer = MaskProTrainer(masked, arguments(tmp_path, "residual", max_steps=1), train_dataset=rows())
    trainer.train()
    assert trainer.loss_by_spans is not None
    monkeypatch.setattr(trainer.args, option, True)
    # It is not installed.
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *_: None)
    trainer.train()
    assert trainer.loss_by_spans is None


def test_a_loss_of_the_users_own_is_taken(tmp_path):
    masked = get_peft_model(tiny_llama(), MaskProConfig())
    args = arguments(tmp_path, "residual", max_steps=1, logging_steps=1)

    def seven(outputs, labels, num_items_in_batch=None):
        return outputs.logits.new_tensor(7.0)

    trainer = MaskProTrainer(masked, args, train_dataset=rows(), compute_loss_func=seven)
    trainer.train()
    assert trainer.loss_by_spans is None
    assert next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry) == 7


def test_the_trained_logits_are_not_touched_by_the_dense_pass():
    masked = get_peft_model(tiny_llama(), MaskProConfig())
    masked.train()
    before = thetas(masked)
    LossBySpans(masked, {"distillation": 1.0}, 1.0).sequence_losses(masked, batch(rows(4))).sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(before, thetas(masked), strict=True))
    assert all(parameter.requires_grad for name, parameter in masked.named_parameters() if "theta" in name)
    assert masked.training


def test_residual_caches_the_divergence(tmp_path):
    def learn(baseline):
        masked = get_peft_model(tiny_llama(), MaskProConfig(logit_scale=4.0))
        options = {"objective": "distillation", "baseline": baseline, "per_device_train_batch_size": 8}
        args = arguments(tmp_path, "residual", max_steps=6, logging_steps=1, **options)
        trainer = MaskProTrainer(masked, args, train_dataset=rows(16, ragged=True))
        trainer.train()
        return [entry["residual"] for entry in trainer.state.log_history if "residual" in entry]

    assert learn("cache") == pytest.approx(learn("step"), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        "kl",
        "{",
        "{}",
        '{"kl": 1}',
        '{"distillation": 2}',
        '{"distillation": 0, "language-modeling": 1}',
        '{"distillation": "2", "language-modeling": 1}',
        '{"distillation": Infinity, "language-modeling": 1}',
        ["distillation"],
        7,
    ],
)
def test_an_unknown_objective_is_refused(tmp_path, objective):
    with pytest.raises(ValueError, match=r"^objective is .*language-modeling"):
        arguments(tmp_path, "simple", objective=objective)


def test_weights_come_as_json_from_a_command_line():
    assert objective_weights('{"distillation": 2, "language-modeling": 1}') == {
        "distillation": 2,
        "language-modeling": 1,
    }


def test_models_without_a_head_of_their_own_are_refused(tmp_path):
    config = BartConfig(
        vocab_size=34, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    masked = get_peft_model(BartForConditionalGeneration(config), MaskProConfig())
    with pytest.raises(ValueError, match="needs a causal language model, not BartFor"):
        MaskProTrainer(masked, arguments(tmp_path, "simple", objective="distillation"), train_dataset=rows())


def test_the_dense_states_of_a_batch_that_was_changed_in_place_are_not_kept():
    masked = get_peft_model(tiny_llama(), MaskProConfig()).eval()
    objective = LossBySpans(masked, {"distillation": 1.0}, 1.0)
    inputs, others = batch(rows(4)), batch(rows(4, seed=1))
    with torch.no_grad():
        objective.sequence_losses(masked, inputs)
        for name, value in others.items():
            inputs[name].copy_(value)
        changed = objective.sequence_losses(masked, inputs)
        fresh = LossBySpans(masked, {"distillation": 1.0}, 1.0).sequence_losses(masked, others)
    assert torch.equal(changed, fresh)


def test_a_batch_without_labels_is_named():
    masked = get_peft_model(tiny_llama(), MaskProConfig())
    with pytest.raises(ValueError, match="has no labels, only input_ids"):
        LossBySpans(masked, {"distillation": 1.0}, 1.0).sequence_losses(masked, {"input_ids": batch(rows(2))})


def test_a_run_does_not_go_on_with_another_objective(tmp_path):
    def trainer(objective):
        args = arguments(
            tmp_path, "simple", objective=objective, max_steps=2, save_strategy="steps", save_steps=1, seed=0
        )
        return MaskProTrainer(get_peft_model(tiny_llama(), MaskProConfig()), args, train_dataset=rows())

    trainer("distillation").train()
    with pytest.raises(ValueError, match="has the objective distillation, and this run language-modeling"):
        trainer("language-modeling").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_trained_head_is_refused(tmp_path):
    masked = get_peft_model(tiny_llama(), MaskProConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="trains no head"):
        MaskProTrainer(masked, arguments(tmp_path, "simple", objective="distillation"), train_dataset=rows())


def test_a_loss_of_the_users_own_and_distillation_exclude_each_other(tmp_path):
    masked = get_peft_model(tiny_llama(), MaskProConfig())
    args = arguments(tmp_path, "simple", objective="distillation")
    with pytest.raises(ValueError, match="drop compute_loss_func"):
        MaskProTrainer(masked, args, train_dataset=rows(), compute_loss_func=lambda *args, **kwargs: None)


# In a process of its own, whose peak is nobody else's.
_MEASURE = """
import json, resource, sys, torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from hf_maskpro import MaskProConfig
from hf_maskpro.learning.objectives import LossBySpans
torch.manual_seed(0)
config = LlamaConfig(vocab_size=150_000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096)
model = get_peft_model(LlamaForCausalLM(config), MaskProConfig()).train()
objective = LossBySpans(model, json.loads(sys.argv[1]), 1.0)
def step(tokens):
    ids = torch.randint(150_000, (1, tokens))
    objective.sequence_losses(model, {"input_ids": ids, "labels": ids}).sum().backward()
step(4)
# It has to find out anew what comes before the head.
objective = LossBySpans(model, json.loads(sys.argv[1]), 1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("weights", [{"distillation": 1.0, "language-modeling": 1.0}, {"language-modeling": 1.0}])
def test_a_large_vocabulary_and_many_tokens_take_less_than_a_gigabyte(weights):
    command = [sys.executable, "-W", "ignore", "-c", _MEASURE, json.dumps(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # All logits of one model alone would take 2.5 GB in float32.
    assert int(done.stdout) < 1e9
