"""Training by its effect on a loss."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from torch import nn
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from hf_maskpro import MaskProConfig, MaskProTrainer, MaskProTrainingArguments, initialize_masks
from hf_maskpro.learning import residual
from hf_maskpro.learning.arguments import ESTIMATORS
from hf_maskpro.learning.record import plot_run
from hf_maskpro.learning.relaxation import Relaxation
from hf_maskpro.tuner import MaskProLayer, masked_layers

from ..conftest import tiny_llama
from ..tuner.test_files import contents, largest_file, on_disks_of_every_size


def arguments(folder, estimator, **options):
    return MaskProTrainingArguments(
        **{
            "output_dir": str(folder),
            "estimator": estimator,
            "report_to": [],
            "save_strategy": "no",
            "per_device_train_batch_size": 8,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "use_cpu": True,
        }
        | options
    )


def rows(count=32, length=12, ragged=False, seed=0):
    """Examples in which every token follows from the one before; ragged ones hide some labels."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 32, (count, 1), generator=generator)
    ids = (starts + 5 * torch.arange(length)) % 32 + 2
    labels = ids.clone()
    if ragged:
        hidden = torch.randint(0, length - 2, (count, 1), generator=generator)
        labels[torch.arange(length) < hidden] = -100
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def thetas(model):
    return [layer.maskpro_theta["default"].detach().clone() for layer in masked_layers(model).values()]


def batch_loss(model, examples):
    model.eval()
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
    with torch.no_grad():
        return model(**batch)["loss"].item()


class Puzzle(nn.Module):
    """
    A layer whose best mask is known, behind losses that differ by a hundred times more from example to example than
    from mask to mask: without the baseline nothing can be learned.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(8, 8, bias=False)
        self.layer.weight.data = torch.randn(8, 8, generator=generator).sign()
        kept = torch.rand(8, 2, 4, generator=generator).topk(2, dim=-1).indices
        best = torch.zeros(8, 2, 4, dtype=torch.bool).scatter_(2, kept, True)
        self.target = torch.where(best.view(8, 8), self.layer.weight.detach(), 0)

    def forward(self, x, offset, labels=None):
        error = (self.layer(x) - x @ self.target.T).square().mean()
        return {"loss": error + offset.mean()}


class Fused(Puzzle):
    """A layer that a faster function goes without calling while it is trained, as Mamba's does on a GPU."""

    def forward(self, x, offset, labels=None):
        if not self.training:
            return super().forward(x, offset)
        return {"loss": (F.linear(x, self.layer.weight) - x @ self.target.T).square().mean()}


def puzzle_rows(count=64):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 8, generator=generator)
    offsets = 100 * torch.randn(count, generator=generator)
    return [{"x": x, "offset": offset, "labels": torch.zeros(1)} for x, offset in zip(inputs, offsets, strict=True)]


def play(tmp_path, seed=0, advantage="raw", **options):
    """Loss above that of the best mask, before and after 800 steps of `residual`."""
    torch.manual_seed(seed)
    puzzle = Puzzle()
    config = MaskProConfig(target_modules=["layer"], init_mask="random", logit_scale=2.0, **options)
    model = get_peft_model(puzzle, config)
    args = arguments(
        tmp_path, "residual", max_steps=800, learning_rate={"raw": 0.1, "scaled": 0.2}[advantage],
        per_device_train_batch_size=16, logging_steps=800, seed=seed, advantage=advantage,
    )  # fmt: skip
    offset = torch.stack([row["offset"] for row in puzzle_rows()]).mean().item()
    before = batch_loss(model, puzzle_rows()) - offset
    MaskProTrainer(model, args, train_dataset=puzzle_rows()).train()
    assert all(p.grad is None for p in model.parameters())
    return before, batch_loss(model, puzzle_rows()) - offset


@pytest.mark.parametrize("advantage", ["raw", "scaled"])
@pytest.mark.parametrize("distribution", ["plackett_luce", "conditional_poisson"])
def test_residual_lowers_the_loss_where_it_can_be_seen(tmp_path, distribution, advantage):
    before, after = play(tmp_path, distribution=distribution, advantage=advantage)
    assert after < 0.2 * before


def test_a_weight_that_is_used_without_a_call_in_train_mode_alone_is_refused_before_the_first_step(tmp_path):
    def trainer(estimator):
        model = get_peft_model(Fused(), MaskProConfig(target_modules=["layer"]))
        return MaskProTrainer(model, arguments(tmp_path, estimator, max_steps=1), train_dataset=puzzle_rows(8))

    trained = trainer("simple")
    with pytest.raises(ValueError, match=r"^cannot mask layer: the model uses the weight without calling"):
        trained.train()
    assert not trained.adapter.has_moved()
    # It learns in eval mode.
    trainer("residual").train()


class Uncalled(nn.Module):
    """A language model that uses a weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(34, 16), nn.Linear(16, 34)

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **options):
        logits = F.linear(self.table(input_ids), self.layer.weight)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, 34, num_items_in_batch)
        return CausalLMOutput(loss, logits)


@pytest.mark.parametrize("baseline", ["auto", "cache"])
def test_a_weight_that_is_used_without_a_call_is_refused_by_every_run_of_residual(tmp_path, baseline):
    model = get_peft_model(Uncalled(), MaskProConfig(target_modules=["layer"]))
    trainer = MaskProTrainer(model, arguments(tmp_path, "residual", max_steps=8, baseline=baseline), rows(16))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^cannot mask layer: the model uses the weight without calling"):
            trainer.train()


def test_a_layer_that_the_first_batch_of_a_run_does_not_reach_is_told(tmp_path, caplog):
    puzzle = Puzzle()
    puzzle.tower = nn.Linear(8, 8)
    model = get_peft_model(puzzle, MaskProConfig(target_modules=["layer", "tower"]))
    MaskProTrainer(model, arguments(tmp_path, "residual", max_steps=2), train_dataset=puzzle_rows(8)).train()
    assert caplog.text.count("the first batch does not reach tower:") == 1


def advantages(tmp_path, llama, residuals, **options):
    model = get_peft_model(copy.deepcopy(llama), MaskProConfig())
    trainer = MaskProTrainer(model, arguments(tmp_path, "residual", **options), train_dataset=rows())
    return [trainer.estimator._advantages([value])[0] for value in residuals]


def test_the_scaled_advantage_does_not_depend_on_the_size_of_the_loss(tmp_path, llama):
    residuals = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    found = advantages(tmp_path, llama, residuals)
    assert advantages(tmp_path, llama, [1000 * value for value in residuals]) == pytest.approx(found)
    # Against the definition: median and median distance of the last 25 residuals, in float64.
    for step, value in enumerate(residuals, 1):
        heard = np.array(residuals[max(0, step - 25) : step])
        deviation = np.median(np.abs(heard - np.median(heard))) / norm.ppf(0.75) if step > 1 else 0.0
        expected = min(2, max(-2, (value - np.median(heard)) / deviation)) if deviation else 0.0
        assert found[step - 1] == pytest.approx(expected, rel=1e-4)
    assert max(found) == 2.0


def test_a_mask_that_breaks_the_model_does_not_hide_the_others(tmp_path, llama):
    residuals = torch.randn(100, generator=torch.Generator().manual_seed(0)).tolist()
    calm = advantages(tmp_path, llama, residuals)
    spoiled = advantages(tmp_path, llama, [*residuals[:50], 1000.0, *residuals[50:]])
    assert spoiled[50] == 2.0
    assert spoiled[51:] == pytest.approx(calm[50:], abs=0.5)


def test_a_reward_that_was_always_the_same_is_heard_when_it_changes(tmp_path, llama):
    assert advantages(tmp_path, llama, [0.0] * 20 + [-1.0])[-1] == -2.0


def test_what_all_masks_have_in_common_teaches_nothing_from_the_first_step(tmp_path, llama):
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    found = advantages(tmp_path, llama, [100 + value for value in noise])
    assert found == pytest.approx(advantages(tmp_path, llama, noise))


def test_masks_that_are_all_alike_teach_nothing(tmp_path, llama):
    assert advantages(tmp_path, llama, [0.0, 0.0]) == [0.0, 0.0]


def test_the_raw_advantage_is_the_papers(tmp_path, llama):
    first, second = advantages(tmp_path, llama, [1.0, 3.0], advantage="raw")
    assert first == pytest.approx(1 - 0.01)
    assert second == pytest.approx(3 - (0.99 * 0.01 + 0.01 * 3))


@pytest.mark.parametrize("fault", ["sign", "baseline", "score"])
def test_that_test_would_notice_a_fault(tmp_path, monkeypatch, fault):
    move, loss = MaskProLayer.move_logits, residual.share_of_loss

    def wrong_sign(self, name, moves, *args):
        move(self, name, [(seed, -step) for seed, step in moves], *args)

    def wrong_score(self, name, moves, *args):
        move(self, name, [(seed + 1, step) for seed, step in moves], *args)

    def no_baseline(trainer, model, inputs, num_items_in_batch):
        sampled = trainer.adapter.layers[0].choose_mask.func == trainer.estimator._sampled
        return loss(trainer, model, inputs, num_items_in_batch) * sampled

    if fault == "baseline":
        monkeypatch.setattr(residual, "share_of_loss", no_baseline)
    else:
        monkeypatch.setattr(MaskProLayer, "move_logits", {"sign": wrong_sign, "score": wrong_score}[fault])
    before, after = play(tmp_path)
    assert after > 0.4 * before


def test_residual_never_builds_a_graph_and_turns_dropout_off(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig(logit_scale=2.0))
    seen = []
    llama.model.layers[0].mlp.act_fn.register_forward_hook(
        lambda module, args, output: seen.append((torch.is_grad_enabled(), output.requires_grad, module.training))
    )
    trainer = MaskProTrainer(model, arguments(tmp_path, "residual", max_steps=2), train_dataset=rows())
    trainer.train()
    # Two steps of two passes, after one that looks whether every masked layer is called and one for what is at stake;
    # and before all that three of two short sequences, which try the loss.
    assert len(seen) == 9
    assert set(seen) == {(False, False, False)}


@pytest.mark.parametrize("ragged", [False, True])
def test_accumulated_residual_steps_equal_undivided_ones(tmp_path, llama, ragged):
    examples = rows(16, ragged=ragged)
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=2.0))
        args = arguments(
            tmp_path,
            "residual",
            max_steps=4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=5.0,
            advantage="raw",
            baseline="step",
        )
        MaskProTrainer(model, args, train_dataset=examples).train()
        results.append(thetas(model))
    assert all(theta.abs().max() > 0 for theta in results[0])
    for whole, divided in zip(*results, strict=True):
        torch.testing.assert_close(whole, divided, atol=1e-5, rtol=1e-4)


def test_accumulated_simple_steps_are_exact_in_their_token_weights(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(MaskProLayer, "_seed", lambda self: None)
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=1.0))
        args = arguments(
            tmp_path,
            "simple",
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            warmup_steps=0,
            learning_rate=100.0,
            lr_scheduler_type="constant",
            # Each micro-batch estimates it by its own gradient.
            curvature=0.0,
        )
        MaskProTrainer(model, args, train_dataset=rows(16, ragged=True)).train()
        results.append(thetas(model))
    assert all(theta.abs().max() > 0 for theta in results[0])
    for whole, divided in zip(*results, strict=True):
        torch.testing.assert_close(whole, divided, atol=1e-6, rtol=1e-4)


def test_an_adapter_that_transformers_added_trains_too(tmp_path, llama):
    llama.add_adapter(MaskProConfig(logit_scale=2.0))
    for estimator in ("residual", "simple"):
        trainer = MaskProTrainer(llama, arguments(tmp_path, estimator, max_steps=2), train_dataset=rows())
        trainer.train()
    assert all(theta.abs().max() > 0 for theta in thetas(llama))


def test_cached_and_repeated_baselines_agree(tmp_path, llama):
    results = []
    for baseline in ("step", "cache"):
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=2.0))
        args = arguments(tmp_path, "residual", max_steps=6, learning_rate=5.0, advantage="raw", baseline=baseline)
        trainer = MaskProTrainer(model, args, train_dataset=rows(16, ragged=True))
        trainer.train()
        assert (trainer.estimator._baselines is None) == (baseline == "step")
        results.append(thetas(model))
    for step, cache in zip(*results, strict=True):
        torch.testing.assert_close(step, cache, atol=1e-5, rtol=1e-4)


def baseline_of(tmp_path, llama, steps=5, examples=None, baseline="auto", **options):
    """Whether a run of so many steps caches its baseline."""
    model = get_peft_model(copy.deepcopy(llama), MaskProConfig())
    args = arguments(tmp_path, "residual", max_steps=steps, baseline=baseline)
    trainer = MaskProTrainer(model, args, train_dataset=rows(32) if examples is None else examples, **options)
    trainer.train()
    return "step" if trainer.estimator._baselines is None else "cache"


def test_the_cheaper_sound_baseline_is_the_default(tmp_path, llama):
    assert baseline_of(tmp_path, llama, 5) == "cache"
    assert baseline_of(tmp_path, llama, 3) == "step"


class DrawnAtRandom(torch.utils.data.Dataset):
    """A random window at every access."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = torch.randint(2, 34, (12,))
        return {"input_ids": row, "labels": row}


class Halves(MaskProTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) / 2


def padded_on_the_left(items):
    """A row's last padding predicts its first token, so that its loss depends on the longest row of the batch."""
    length = max(len(item["input_ids"]) for item in items)
    pads = [length - len(item["input_ids"]) for item in items]
    return {
        "input_ids": torch.stack([F.pad(item["input_ids"], (pad, 0)) for item, pad in zip(items, pads, strict=True)]),
        "labels": torch.stack([F.pad(i["labels"], (pad, 0), value=-100) for i, pad in zip(items, pads, strict=True)]),
        "attention_mask": torch.stack([(torch.arange(length) >= pad).long() for pad in pads]),
    }


def padded_on_the_right(items):
    flipped = padded_on_the_left([{key: value.flip(0) for key, value in item.items()} for item in items])
    return {key: value.flip(1) for key, value in flipped.items()}


def ragged_rows():
    return [{key: value[: 3 + i % 9] for key, value in row.items()} for i, row in enumerate(rows(16))]


@pytest.mark.parametrize(
    ("examples", "options"),
    [
        (DrawnAtRandom(), {}),
        (ragged_rows(), {"data_collator": padded_on_the_left}),
        (rows(16), {"data_collator": DataCollatorWithFlattening(return_tensors="pt")}),
        (rows(16), {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()}),
    ],
)
def test_what_has_no_loss_of_its_own_is_never_cached(tmp_path, llama, examples, options):
    assert baseline_of(tmp_path, llama, 8, examples, **options) == "step"
    with pytest.raises(ValueError, match="baseline='cache' needs"):
        baseline_of(tmp_path, llama, 8, examples, baseline="cache", **options)


def test_all_processes_look_at_as_many_batches_whatever_they_find(tmp_path, llama, monkeypatch):
    counted, found = [], []
    count, add_up = Trainer._get_num_items_in_batch, residual.Residual._add_up
    # In several processes it gathers.
    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", lambda *args: (counted.append(args), count(*args))[1])

    def looks(self, *args):
        before = len(counted)
        result = add_up(self, *args)
        found.append((result, len(counted) - before))
        return result

    monkeypatch.setattr(residual.Residual, "_add_up", looks)
    for cls in MaskProTrainer, Halves:
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig())
        cls(model, arguments(tmp_path, "residual", max_steps=8), train_dataset=rows(32)).train()
    assert found == [(True, 4), (True, 0), (False, 4)]


def test_batches_to_calibrate_on_are_there_before_a_mask_is(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig(init_mask="wanda"))
    args = arguments(tmp_path, "residual", max_steps=5, baseline="cache")
    trainer = MaskProTrainer(model, args, train_dataset=rows(16))
    with pytest.raises(ValueError, match="call initialize_masks"):
        trainer.train()
    batches = list(trainer.get_train_dataloader())
    assert {key for batch in batches for key in batch} == {"input_ids", "labels"}
    initialize_masks(model, batches)
    trainer.train()
    assert trainer.estimator._baselines is not None


def test_a_smaller_batch_that_was_found_is_what_is_recorded(tmp_path, llama, monkeypatch):
    model = get_peft_model(llama, MaskProConfig())
    args = arguments(tmp_path, "simple", max_steps=1, auto_find_batch_size=True)
    trainer = MaskProTrainer(model, args, train_dataset=rows(16))
    learner = ESTIMATORS["simple"]
    step = learner.training_step

    def runs_out_at_first(self, *given):
        if trainer._train_batch_size == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, *given)

    monkeypatch.setattr(learner, "training_step", runs_out_at_first)
    trainer.train()
    assert model.peft_config["default"].start["training"]["sequences_per_step"] == trainer._train_batch_size < 8


def test_examples_of_more_than_tokens_are_never_cached(tmp_path, llama):
    embed = llama.get_input_embeddings()
    examples = [{"inputs_embeds": embed(row["input_ids"]).detach(), "labels": row["labels"]} for row in rows(16)]
    assert baseline_of(tmp_path, llama, 8, examples) == "step"
    with pytest.raises(ValueError, match="baseline='cache' needs examples of input_ids"):
        baseline_of(tmp_path, llama, 8, examples, baseline="cache")


def test_rows_without_labels_have_no_loss_to_learn_from(tmp_path, llama):
    with pytest.raises(ValueError, match="did not return a loss"):
        baseline_of(tmp_path, llama, 8, [{"input_ids": row["input_ids"]} for row in rows(16)])


def test_one_row_among_many_that_pads_others_is_not_overlooked(tmp_path, llama):
    examples = [{key: value[: 12 if i == 5 else 5] for key, value in row.items()} for i, row in enumerate(rows(64))]
    assert baseline_of(tmp_path, llama, 20, examples, data_collator=padded_on_the_left) == "step"
    assert baseline_of(tmp_path, llama, 20, examples, data_collator=padded_on_the_right) == "cache"


def drawn_prompt(row):
    """Other tokens before the same labels."""
    prompt = torch.randint(2, 34, (6,))
    labels = torch.cat([torch.full((6,), -100), row["labels"][6:]])
    return {"input_ids": torch.cat([prompt, row["input_ids"][6:]]), "labels": labels}


def drawn_order(row):
    """The same tokens in another order, after the same first one."""
    ids = row["input_ids"][[0, *range(11, 0, -1)]] if torch.rand(()) < 0.5 else row["input_ids"]
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("draw", [drawn_prompt, drawn_order, lambda row: DrawnAtRandom()[0]])
def test_one_row_among_many_that_is_drawn_at_random_is_not_overlooked(tmp_path, llama, monkeypatch, draw):
    examples = rows(64)

    class Drawn(torch.utils.data.Dataset):
        def __len__(self):
            return len(examples)

        def __getitem__(self, index):
            return draw(examples[index]) if index == 5 else examples[index]

    said = []
    monkeypatch.setattr(residual.logger, "warning", said.append)
    assert baseline_of(tmp_path, llama, 20, Drawn()) == "step"
    assert len([line for line in said if "has other tokens than when its loss was cached" in line]) == 1


def test_a_loss_that_differs_by_more_than_rounding_is_never_cached(tmp_path, llama):
    class Nearly(MaskProTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * 1.001

    model = get_peft_model(llama, MaskProConfig())
    trainer = Nearly(model, arguments(tmp_path, "residual", max_steps=8), train_dataset=rows(16))
    trainer.train()
    assert trainer.estimator._baselines is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_alone_does_not_forbid_to_cache(tmp_path, llama, dtype):
    examples = [{key: value[: 4 + i % 9] for key, value in row.items()} for i, row in enumerate(rows(32))]
    assert baseline_of(tmp_path, llama.to(dtype), 9, examples, data_collator=padded_on_the_right) == "cache"


def bart():
    """A decoder whose own loss does not shift the labels."""
    config = BartConfig(
        vocab_size=34,
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return BartForCausalLM(config)


def t5():
    config = T5Config(
        vocab_size=34,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [bart, t5])
def test_a_loss_that_is_not_the_next_tokens_is_never_cached(tmp_path, make):
    assert baseline_of(tmp_path, make(), 8) == "step"


def test_a_loss_that_a_subclass_computes_is_never_cached(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig())
    trainer = Halves(model, arguments(tmp_path, "residual", max_steps=8), train_dataset=rows(16))
    trainer.train()
    assert trainer.estimator._baselines is None


# What makes each of them move in a few steps of a tiny model.
QUICK = {
    "proxsparse": {"learning_rate": 0.02, "prox_pull": 0.01},
    "maskllm": {"learning_rate": 0.02},
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, llama, estimator):
    def run(folder, resume):
        torch.manual_seed(7)
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=2.0, init_mask="random"))
        args = arguments(
            folder, estimator, max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2,
            **QUICK.get(estimator, {}),
        )  # fmt: skip
        trainer = MaskProTrainer(model, args, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return trainer, model

    whole, expected = run(tmp_path / "run", None)
    saved = json.loads((tmp_path / "run" / "checkpoint-3" / "adapter_config.json").read_text())
    assert saved["save_logits"] is True
    resumed, model = run(tmp_path / "again", str(tmp_path / "run" / "checkpoint-3"))
    for mine, theirs in zip(thetas(expected), thetas(model), strict=True):
        assert torch.equal(mine, theirs)
    assert any(theta.abs().max() > 0 for theta in thetas(expected))
    if estimator == "residual":
        assert whole.estimator.tracker == resumed.estimator.tracker
    if isinstance(whole.estimator, Relaxation):
        for mine, theirs in zip(whole.estimator.values, resumed.estimator.values, strict=True):
            assert torch.equal(mine, theirs)
    assert model.peft_config["default"].save_logits is False
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "run" / "checkpoint-6").eval()
    assert batch_loss(loaded, rows(8)) == batch_loss(expected, rows(8))


def fitted_llama():
    """A model that knows the rows, so that a bad mask costs something."""
    model = tiny_llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = {key: torch.stack([row[key] for row in rows(64)]) for key in ("input_ids", "labels")}
    for _ in range(25):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("trainer_class", [MaskProTrainer, Trainer])
def test_simple_recovers_what_a_random_mask_lost(tmp_path, trainer_class):
    torch.manual_seed(0)
    base = fitted_llama()
    dense = batch_loss(base, rows(64))
    model = get_peft_model(base, MaskProConfig(init_mask="random"))
    before = batch_loss(model, rows(64))
    args = arguments(tmp_path, "simple", max_steps=60, per_device_train_batch_size=32)
    if trainer_class is Trainer:
        args = TrainingArguments(
            str(tmp_path), max_steps=60, per_device_train_batch_size=32, learning_rate=0.3, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
    trainer_class(model, args, train_dataset=rows(64)).train()
    assert batch_loss(model, rows(64)) - dense < 0.5 * (before - dense)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["logit_scale"] == 6.0


@pytest.mark.parametrize("estimator", ["proxsparse", "maskllm"])
def test_relaxations_recover_what_a_random_mask_lost(tmp_path, estimator):
    options = {"proxsparse": {"learning_rate": 0.02}, "maskllm": {"learning_rate": 0.02}}[estimator]
    before, after = recover(tmp_path, estimator=estimator, **options)
    assert after < 0.7 * before


@pytest.mark.parametrize("estimator", ["simple", "proxsparse", "maskllm"])
def test_every_backward_learner_bears_gradient_checkpointing(tmp_path, estimator):
    before, after = recover(
        tmp_path, estimator=estimator, gradient_checkpointing=True, gradient_accumulation_steps=2,
        per_device_train_batch_size=16, **QUICK.get(estimator, {}),
    )  # fmt: skip
    assert after < 0.8 * before


class Spoiled(torch.utils.data.Dataset):
    """Rows of which some have no labels, and so a loss that is not a number."""

    def __init__(self, bad):
        self.rows, self.bad = rows(8), bad

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {**row, "labels": torch.full_like(row["labels"], -100)} if index in self.bad else row


class NotANumber(MaskProTrainer):
    """A loss that is NaN, and has such gradients, for batches without labels."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if (inputs["labels"] != -100).any():
            return super().compute_loss(model, inputs, *args, **kwargs)
        return super().compute_loss(model, {**inputs, "labels": inputs["input_ids"]}, *args, **kwargs) * float("nan")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path, llama, estimator):
    model = get_peft_model(llama, MaskProConfig(logit_scale=2.0, init_mask="random"))
    args = arguments(
        tmp_path, estimator, max_steps=8, per_device_train_batch_size=1, logging_steps=8, **QUICK.get(estimator, {})
    )
    trainer = NotANumber(model, args, train_dataset=Spoiled({2, 5}))
    trainer.train()
    assert all(theta.isfinite().all() for theta in thetas(model))
    assert any(theta.abs().max() > 0 for theta in thetas(model))
    assert trainer.state.log_history[0]["skipped"] == 2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_several_such_updates_in_a_row_stop_the_run_with_the_checkpoint_in_place(tmp_path, llama, estimator):
    model = get_peft_model(llama, MaskProConfig(logit_scale=2.0, init_mask="random"))
    args = arguments(
        tmp_path, estimator, max_steps=8, per_device_train_batch_size=1, save_strategy="steps", save_steps=1,
        save_total_limit=10, train_sampling_strategy="sequential", max_skipped=4, **QUICK.get(estimator, {}),
    )  # fmt: skip
    trainer = NotANumber(model, args, train_dataset=Spoiled({2, 3, 4, 5, 6, 7}))
    with pytest.raises(FloatingPointError, match=r"^4 updates in a row were not finite.*labels"):
        trainer.train()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-2")
    assert all(theta.isfinite().all() for theta in thetas(loaded))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.estimator.skipped == 6


@pytest.mark.parametrize("advantage", ["raw", "scaled"])
def test_a_mask_that_had_nothing_to_predict_is_as_if_it_had_not_been_there(tmp_path, advantage):
    def run(dataset, masks):
        model = get_peft_model(tiny_llama(), MaskProConfig(logit_scale=2.0, init_mask="random"))
        args = arguments(
            tmp_path, "residual", max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=masks,
            masks_per_step=masks, train_sampling_strategy="sequential", baseline="step", advantage=advantage,
        )  # fmt: skip
        trainer = MaskProTrainer(model, args, train_dataset=dataset)
        trainer.train()
        return trainer

    # The second mask of each step has no labels.
    two, one = run(Spoiled({1, 3}), 2), run(rows(8)[:4:2], 1)
    assert any(theta.any() for theta in thetas(one.model))
    for theta, expected in zip(thetas(two.model), thetas(one.model), strict=True):
        torch.testing.assert_close(theta, expected)
    assert two.estimator.tracker == pytest.approx(one.estimator.tracker)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_micro_batch_without_labels_spoils_no_step(tmp_path, llama, estimator):
    model = get_peft_model(llama, MaskProConfig(logit_scale=2.0, init_mask="random"))
    args = arguments(
        tmp_path, estimator, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential", logging_steps=2, **QUICK.get(estimator, {}),
    )  # fmt: skip
    trainer = MaskProTrainer(model, args, train_dataset=Spoiled({1, 2}))
    trainer.train()
    assert all(theta.isfinite().all() for theta in thetas(model))
    assert any(theta.any() for theta in thetas(model))
    assert trainer.estimator.skipped == 0


class Interrupted(Exception):
    pass


class Interrupts(MaskProTrainer):
    """Fails at one of its losses."""

    seen, at = 0, -1

    def compute_loss(self, *args, **kwargs):
        Interrupts.seen += 1
        if Interrupts.seen == Interrupts.at:
            raise Interrupted
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_trainer_that_was_interrupted_within_a_step_resumes_exactly(tmp_path, llama, monkeypatch, estimator):
    def trainer(folder):
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=3.0))
        args = arguments(
            folder, estimator, max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=3, **QUICK.get(estimator, {}),
            **({"baseline": "step"} if estimator == "residual" else {}),
        )  # fmt: skip
        return Interrupts(model, args, train_dataset=rows())

    monkeypatch.setattr(Interrupts, "at", -1)
    whole = trainer(tmp_path / "a")
    whole.train()
    passes = 2 if estimator == "residual" else 1
    monkeypatch.setattr(Interrupts, "at", Interrupts.seen + passes * 9 - passes + 1)
    again = trainer(tmp_path / "b")
    with pytest.raises(Interrupted):
        again.train()
    again.train(resume_from_checkpoint=True)
    for mine, theirs in zip(thetas(whole.model), thetas(again.model), strict=True):
        assert torch.equal(mine, theirs)


def test_a_stray_pass_does_not_decide_the_logit_scale(tmp_path, llama, ids):
    model = get_peft_model(llama, MaskProConfig()).train()
    model(input_ids=ids, labels=ids).loss.backward()
    args = arguments(tmp_path, "residual", advantage="raw", max_steps=1)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    assert model.peft_config["default"].logit_scale == 10.0


def test_what_a_plain_trainer_has_moved_keeps_its_logit_scale(tmp_path, llama, ids):
    model = get_peft_model(llama, MaskProConfig()).train()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    args = arguments(tmp_path, "residual", advantage="raw", max_steps=1)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    assert model.peft_config["default"].logit_scale == 6.0


def test_a_resumed_run_keeps_the_earlier_stages(tmp_path, llama):
    first = get_peft_model(copy.deepcopy(llama), MaskProConfig(init_mask="random"))
    MaskProTrainer(first, arguments(tmp_path / "a", "simple", max_steps=1), train_dataset=rows()).train()
    first.save_pretrained(tmp_path / "first")

    def second():
        model = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "first", is_trainable=True)
        args = arguments(tmp_path / "b", "simple", max_steps=2, save_strategy="steps", save_steps=1)
        return MaskProTrainer(model, args, train_dataset=rows())

    second().train()
    resumed = second()
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-1"))
    resumed.save_model(str(tmp_path / "resumed"))
    lineage = json.loads((tmp_path / "resumed" / "adapter_config.json").read_text())["lineage"]
    assert [stage["init_mask"] for stage in lineage] == ["random", "adapter"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_best_mask_is_what_a_run_ends_with(tmp_path, estimator):
    """The worst here, which is an early one: where the last is the best there is nothing to see."""
    torch.manual_seed(0)
    model = get_peft_model(fitted_llama(), MaskProConfig(init_mask="random"))
    options = {"residual": {"learning_rate": 5.0, "advantage": "raw"}, "simple": {"warmup_steps": 0}}.get(
        estimator, QUICK.get(estimator, {})
    )
    args = arguments(
        tmp_path, estimator, max_steps=12, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        per_device_train_batch_size=32, save_total_limit=1, **options,
    )  # fmt: skip
    trainer = MaskProTrainer(model, args, train_dataset=rows(64), eval_dataset=rows(64))
    trainer.train()
    assert list(tmp_path.glob("checkpoint-*")) == [tmp_path / f"checkpoint-{trainer.state.best_global_step}"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert estimator == "residual" or min(losses) < max(losses)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_trainer_that_has_not_trained_can_be_asked(tmp_path, llama, estimator):
    model = get_peft_model(llama, MaskProConfig(init_mask="random"))
    trainer = MaskProTrainer(model, arguments(tmp_path, estimator), train_dataset=rows(), eval_dataset=rows(8))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(batch_loss(model, rows(8)), rel=1e-5)
    trainer.save_model()
    assert trainer.changed_groups() == 0


@pytest.mark.parametrize("estimator", ["proxsparse", "maskllm"])
def test_a_relaxation_goes_on_from_the_learned_mask(tmp_path, llama, estimator):
    model = get_peft_model(llama, MaskProConfig(init_mask="random"))
    args = arguments(tmp_path, estimator, max_steps=10, **QUICK.get(estimator, {}))
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    learned = trainer.changed_groups()
    again = MaskProTrainer(model, arguments(tmp_path, estimator, learning_rate=0.0), train_dataset=rows())
    again.create_optimizer()
    # The gates start from noise, which changes a few groups.
    assert learned > 0
    assert again.changed_groups() == pytest.approx(learned, abs=0.15 if estimator == "maskllm" else 1e-3)
    assert (again.changed_groups() > 0.5 * learned) or estimator == "maskllm"


@pytest.mark.parametrize(("mine", "theirs"), [("maskllm", "simple"), ("simple", "residual")])
def test_a_checkpoint_of_another_estimator_is_refused(tmp_path, llama, mine, theirs):
    model = get_peft_model(copy.deepcopy(llama), MaskProConfig())
    args = arguments(tmp_path, theirs, max_steps=1, save_strategy="steps", save_steps=1)
    MaskProTrainer(model, args, train_dataset=rows()).train()
    other = MaskProTrainer(
        get_peft_model(llama, MaskProConfig()), arguments(tmp_path, mine, max_steps=2), train_dataset=rows()
    )
    with pytest.raises(ValueError, match=f"is not a checkpoint of estimator='{mine}', but of '{theirs}'"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_named_by_a_path_says_what_is_wrong_with_it(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig())
    args = arguments(tmp_path, "simple", max_steps=1, save_strategy="steps", save_steps=1)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    (tmp_path / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/checkpoint-1: the adapter file is not a whole safetensors"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "{}",
        '{"tracker": 0.5}',
        '{"residuals": null}',
        '{"residuals": 0.5}',
        '{"residuals": [0.5, NaN]}',
        '{"residuals": [0.5, "3"]}',
        '{"residuals": [true]}',
        '{"residuals": [[]]}',
        '{"residuals": {}}',
        f'{{"residuals": [1{"0" * 400}]}}',
        "[" * 5000,
    ],
)
def test_a_spoiled_tracker_is_refused(tmp_path, llama, content):
    def trainer():
        args = arguments(tmp_path, "residual", max_steps=2, save_strategy="steps", save_steps=1)
        return MaskProTrainer(get_peft_model(copy.deepcopy(llama), MaskProConfig()), args, train_dataset=rows())

    trainer().train()
    (tmp_path / "checkpoint-1" / "residual_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"residual_state\.json has") as caught:
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", ["foreign", "missing", "bytes", "not finite"])
def test_spoiled_values_are_refused(tmp_path, llama, spoil):
    def trainer():
        args = arguments(tmp_path, "proxsparse", max_steps=2, save_strategy="steps", save_steps=1)
        return MaskProTrainer(get_peft_model(copy.deepcopy(llama), MaskProConfig()), args, train_dataset=rows())

    trainer().train()
    path = tmp_path / "checkpoint-1" / "estimator_state.safetensors"
    values = load_file(path)
    if spoil == "bytes":
        path.write_bytes(b"none")
    else:
        first = values.pop("0")
        others = {"foreign": {"0": first, "x": first.clone()}, "missing": {}, "not finite": {"0": first * torch.nan}}
        save_file(values | others[spoil], path)
    message = "holds values that are not finite, of layer 0" if spoil == "not finite" else "does not hold the values"
    with pytest.raises(ValueError, match=rf"estimator_state\.safetensors {message}") as caught:
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "\n" not in str(caught.value)


def test_an_adapter_with_a_name_is_resumed(tmp_path, llama):
    def trainer():
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig(logit_scale=2.0), adapter_name="mine")
        args = arguments(tmp_path, "simple", max_steps=4, save_strategy="steps", save_steps=2)
        return MaskProTrainer(model, args, train_dataset=rows())

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for mine, theirs in zip(whole.adapter.thetas(), resumed.adapter.thetas(), strict=True):
        assert torch.equal(mine, theirs)


def recover(tmp_path, seed=0, logits_dtype="float32", estimator="simple", **options):
    """Loss above the dense model's, before and after 60 steps of an estimator."""
    torch.manual_seed(seed)
    base = fitted_llama()
    dense = batch_loss(base, rows(64))
    torch.manual_seed(seed)
    model = get_peft_model(base, MaskProConfig(init_mask="random", logits_dtype=logits_dtype))
    before = batch_loss(model, rows(64))
    options = {"max_steps": 60, "per_device_train_batch_size": 32, "seed": seed} | options
    MaskProTrainer(model, arguments(tmp_path, estimator, **options), train_dataset=rows(64)).train()
    return before - dense, batch_loss(model, rows(64)) - dense


@pytest.mark.parametrize("learn", [play, recover])
def test_bfloat16_logits_learn_as_well_as_float32(tmp_path, learn):
    left = {"float32": [], "bfloat16": []}
    for dtype, shares in left.items():
        for seed in range(3):
            before, after = learn(tmp_path, seed=seed, logits_dtype=dtype)
            shares.append(after / before)
    exact, rounded = (torch.tensor(shares) for shares in left.values())
    spread = max(exact.std().item(), rounded.std().item())
    assert exact.max() < 0.5
    assert abs((rounded.mean() - exact.mean()).item()) < 2 * spread + 0.05, left


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_optimizers(tmp_path, optim, logits_dtype):
    # The gradient of a logit is tiny, and SGD does not scale it.
    options = {"learning_rate": 5e4} if optim == "sgd" else {}
    before, after = recover(tmp_path, logits_dtype=logits_dtype, optim=optim, **options)
    assert after < 0.6 * before


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_torch_8bit"])
def test_8_bit_optimizers(tmp_path, optim, request):
    pytest.importorskip("bitsandbytes" if "bnb" in optim else "torchao")
    if "torch" in optim:
        request.getfixturevalue("compiler")
    before, after = recover(tmp_path, optim=optim)
    assert after < 0.6 * before


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_torch_8bit"])
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_moments_of_8_bit_optimizers(tmp_path, optim, logits_dtype, request):
    """In layers of 4,096 logits: of smaller ones both libraries keep the moments as they are."""
    pytest.importorskip("bitsandbytes" if "bnb" in optim else "torchao")
    if "torch" in optim:
        request.getfixturevalue("compiler")
    config = tiny_llama().config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 64, 32
    model = get_peft_model(LlamaForCausalLM(config), MaskProConfig(logits_dtype=logits_dtype))
    args = arguments(tmp_path, "simple", max_steps=3, optim=optim)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    for theta in trainer.adapter.thetas():
        assert theta.abs().max() > 0
        state = [t for t in trainer.optimizer.state[theta].values() if isinstance(t, torch.Tensor)]
        moments = [t for t in state if t.numel() == theta.numel()]
        assert len(moments) == 2
        assert all(t.dtype == torch.uint8 or type(t).__name__ == "OptimState8bit" for t in moments)


def test_gradient_checkpointing_with_accumulation(tmp_path):
    before, after = recover(
        tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2, per_device_train_batch_size=16
    )
    assert after < 0.5 * before


def test_gradients_of_bfloat16_logits_are_never_float32(llama, ids):
    model = get_peft_model(llama, MaskProConfig(logits_dtype="bfloat16")).train()
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in masked_layers(model).values():
        theta = layer.maskpro_theta["default"]
        assert theta.grad.dtype == torch.bfloat16
        assert theta.grad.stride() == theta.stride()


def test_residual_keeps_nothing_of_the_size_of_a_weight(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig(logits_dtype="bfloat16"))
    args = arguments(tmp_path, "residual", max_steps=2)
    trainer = MaskProTrainer(model, args, train_dataset=rows(), eval_dataset=rows(8))
    trainer.train()
    trainer.evaluate()
    assert trainer.optimizer.state == {}
    for layer in masked_layers(model).values():
        assert layer._masked_weight is None
        held = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        assert not held
        tensors = {name: t for name, t in layer.state_dict().items() if "base_layer" not in name}
        weights = layer.base_layer.weight.numel()
        assert sum(t.nbytes for t in tensors.values()) <= 2.2 * weights
        assert all(p.grad is None for p in layer.parameters())


def test_modules_to_save_have_a_parameter_group_of_their_own(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig(modules_to_save=["lm_head"]))
    args = arguments(tmp_path, "simple", max_steps=2, warmup_steps=0, learning_rate=0.3)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    before = head.detach().clone()
    trainer.train()
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates == [0.3, 5e-5]
    assert trainer.optimizer.param_groups[1]["params"][0] is head
    assert 0 < (head - before).abs().max() < 1e-3
    with pytest.raises(ValueError, match="drop modules_to_save"):
        MaskProTrainer(model, arguments(tmp_path, "residual"), train_dataset=rows())


def test_what_is_logged(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig(logit_scale=1.0))
    args = arguments(tmp_path, "residual", max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4)
    trainer = MaskProTrainer(model, args, train_dataset=rows(), eval_dataset=rows(8))
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"loss", "residual", "tracker", "flipped", "changed"} <= set(first)
    assert 0 < first["flipped"] < 1
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluated["eval_loss"] == pytest.approx(batch_loss(model, rows(8)), rel=1e-5)

    model = get_peft_model(tiny_llama(), MaskProConfig())
    trainer = MaskProTrainer(model, arguments(tmp_path, "simple", max_steps=2, logging_steps=1), train_dataset=rows())
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"flipped", "changed"} <= set(first)
    assert "residual" not in first


def test_logging_does_not_change_a_run(tmp_path, llama):
    results = []
    for logging_steps in (1, 100):
        model = get_peft_model(copy.deepcopy(llama), MaskProConfig())
        args = arguments(tmp_path, "simple", max_steps=4, logging_steps=logging_steps)
        MaskProTrainer(model, args, train_dataset=rows()).train()
        results.append(thetas(model))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_defaults_by_estimator(tmp_path):
    residual, simple = arguments(tmp_path, "residual"), arguments(tmp_path, "simple")
    assert (residual.lr_scheduler_type, residual.max_grad_norm) == ("linear", 0.0)
    rates = {steps: arguments(tmp_path, "residual", max_steps=steps).learning_rate for steps in (10, 50, 400, -1)}
    assert rates == pytest.approx({10: 0.57 * 2**0.5, 50: 0.57 * 2**0.5, 400: 0.285, -1: 0.57 / 10**0.5})
    assert arguments(tmp_path, "residual", advantage="raw", max_steps=10).learning_rate == 50.0
    assert (simple.learning_rate, simple.adam_beta2, simple.warmup_steps) == (0.2, 0.98, 0.1)
    assert arguments(tmp_path, "simple", max_steps=30).learning_rate == pytest.approx(0.4)
    warmups = {steps: arguments(tmp_path, "simple", max_steps=steps).warmup_steps for steps in (10, 50, -1)}
    assert warmups == {10: 2, 50: 10, -1: 0.1}
    assert arguments(tmp_path, "simple", learning_rate=0.1).lr_scheduler_kwargs["lr_end"] == pytest.approx(0.01)


def test_refusals(tmp_path, llama):
    with pytest.raises(ValueError, match="estimator is 'reinforce'"):
        arguments(tmp_path, "reinforce")
    with pytest.raises(ValueError, match="advantage is 'none'"):
        arguments(tmp_path, "residual", advantage="none")
    with pytest.raises(ValueError, match="max_skipped is 0"):
        arguments(tmp_path, "simple", max_skipped=0)
    with pytest.raises(ValueError, match="tracker_decay is 1"):
        arguments(tmp_path, "residual", tracker_decay=1.0)
    model = get_peft_model(copy.deepcopy(llama), MaskProConfig())
    with pytest.raises(ValueError, match="fp16 scales gradients"):
        MaskProTrainer(model, arguments(tmp_path, "simple", fp16=True), train_dataset=rows())
    with pytest.raises(ValueError, match="0 active mask adapters"):
        MaskProTrainer(llama, arguments(tmp_path, "simple"), train_dataset=rows())
    get_peft_model(copy.deepcopy(llama), MaskProConfig()).save_pretrained(tmp_path / "a")
    frozen = PeftModel.from_pretrained(llama, tmp_path / "a")
    with pytest.raises(ValueError, match="is_trainable=True"):
        MaskProTrainer(frozen, arguments(tmp_path, "simple"), train_dataset=rows())
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="'default' is disabled, so it would learn nothing; enable it first"):
        MaskProTrainer(model, arguments(tmp_path, "simple"), train_dataset=rows())
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged, so it would learn nothing; call unmerge_adapter"):
        MaskProTrainer(model, arguments(tmp_path, "simple"), train_dataset=rows())
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="train_dataset has the splits train, test; choose one of them"):
        MaskProTrainer(model, arguments(tmp_path, "simple"), train_dataset={"train": rows(), "test": rows()})
    with pytest.raises(ValueError, match="eval_dataset is 'me/text'; load it"):
        MaskProTrainer(model, arguments(tmp_path, "simple"), train_dataset=rows(), eval_dataset="me/text")
    with pytest.raises(ValueError, match="preserve_rng_state=False would draw other masks"):
        arguments(tmp_path, "simple", gradient_checkpointing_kwargs={"preserve_rng_state": False})


def test_an_adapter_of_transformers_is_not_resumed(tmp_path):
    model = tiny_llama()
    model.add_adapter(MaskProConfig())
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match="load_best_model_at_end=True needs a PeftModel"):
        MaskProTrainer(model, arguments(tmp_path, "simple", **best), train_dataset=rows(), eval_dataset=rows())
    args = arguments(tmp_path, "simple", max_steps=1, save_strategy="steps", save_steps=1)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    with pytest.raises(ValueError, match="a checkpoint is read into a PeftModel"):
        trainer.train(resume_from_checkpoint=True)


def test_a_model_is_there_to_be_used_after_its_run(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig(logit_scale=1.0))
    MaskProTrainer(model, arguments(tmp_path, "simple", max_steps=1), train_dataset=rows()).train()
    batch = {key: torch.stack([row[key] for row in rows(8)]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        losses = [model(**batch).loss for _ in range(2)]
    # By the learned mask, not by one that is drawn.
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("estimator", "options"), [("proxsparse", {}), ("maskllm", {}), ("simple", {"optimizer_in_backward": True})]
)
def test_of_several_processes_the_first_alone_says_why_there_must_be_one(
    tmp_path, llama, monkeypatch, estimator, options
):
    args = arguments(tmp_path, estimator, **options)
    model = get_peft_model(llama, MaskProConfig())
    monkeypatch.setattr(MaskProTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="runs in one process on one device, not 2"):
        MaskProTrainer(model, args, train_dataset=rows())
    monkeypatch.setattr(MaskProTrainingArguments, "process_index", 1)
    with pytest.raises(SystemExit) as ended:
        MaskProTrainer(model, args, train_dataset=rows())
    assert not ended.value.code


@pytest.mark.parametrize("steps", [1, 10])
def test_a_run_as_short_as_the_warmup(tmp_path, llama, steps):
    """transformers' schedule divides by the steps that the warm-up leaves."""
    model = get_peft_model(llama, MaskProConfig())
    args = MaskProTrainingArguments(str(tmp_path), estimator="simple", max_steps=steps, report_to=[])
    data = [{"input_ids": row, "labels": row} for row in torch.randint(2, 34, (8, 12))]
    assert MaskProTrainer(model, args, train_dataset=data).train().global_step == steps


def test_the_card_tells_of_the_run(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig())
    args = arguments(
        tmp_path, "simple", max_steps=4, per_device_train_batch_size=8, learning_rate=0.3, logging_steps=2
    )
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags=["mine"], license="mit", model_name="a-name")
    card = ModelCard.load(tmp_path / "README.md")
    settings = "simple, objective language-modeling, steps 4, sequences per step 8, learning rate 0.3, "
    settings += "schedule polynomial, warmup steps 0, "
    assert f"| 1 | magnitude |  | {settings}logit scale 6, seed 42, optimizer adamw_torch" in card.text
    assert card.data.tags == ["peft", "maskpro", "n-m-sparsity", "2:4", "mine"]
    assert card.data.license == "mit"
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert "![The run](learning.png)" in card.text
    training = json.loads((tmp_path / "adapter_config.json").read_text())["lineage"][0]["training"]
    assert training["steps"] == 4


def test_the_card_of_an_adapter_with_a_name(tmp_path, llama):
    model = get_peft_model(llama, MaskProConfig(), adapter_name="mine")
    trainer = MaskProTrainer(model, arguments(tmp_path, "simple", max_steps=1), train_dataset=rows())
    trainer.create_model_card(license="mit")
    assert ModelCard.load(tmp_path / "mine" / "README.md").data.license == "mit"


def test_a_full_disk_leaves_the_earlier_plot(tmp_path):
    (tmp_path / "learning.png").write_text("old")
    state = TrainerState(log_history=[{"step": step, "loss": 1.0, "changed": 0.1} for step in (1, 2)])
    with pytest.raises(OSError, match="File too large"), largest_file(1000):
        plot_run(state, tmp_path / "learning.png")
    assert contents(tmp_path) == {"learning.png": b"old"}


def fill_the_disk_while_saving(folder, llama, step):
    """Save the checkpoint of step 2 on disks of every size, beside that of step 1."""
    model = get_peft_model(llama, MaskProConfig(target_modules=["k_proj"]))
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 0}
    trainer = MaskProTrainer(model, arguments(folder, "simple", **options), train_dataset=rows())
    trainer.train()
    before = contents(folder)
    assert any(name.startswith("checkpoint-1/") for name in before)
    trainer.state.global_step = 2
    after = on_disks_of_every_size(folder, lambda: trainer._save_checkpoint(model, None), step)
    assert before.items() <= after.items()
    new = {name.removeprefix("checkpoint-2/") for name in after.keys() - before.keys()}
    assert new == {name.removeprefix("checkpoint-1/") for name in before if name.startswith("checkpoint-1/")}
    # Nor is one of an earlier run lost for it.
    limit, message = len(after["checkpoint-2/trainer_state.json"]) + 1000, "checkpoint-2 could not be written: .*room"
    with pytest.raises(OSError, match=message), largest_file(limit):
        trainer._save_checkpoint(model, None)
    assert contents(folder) == after


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, llama):
    fill_the_disk_while_saving(tmp_path, llama, 499)


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_checkpoint_whatever_its_size(tmp_path, llama):
    fill_the_disk_while_saving(tmp_path, llama, 1)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 499])
def test_a_full_disk_leaves_what_a_trainer_saved_earlier(tmp_path, llama, checkpoint, step):
    model = get_peft_model(llama, MaskProConfig(target_modules=["k_proj"]))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = MaskProTrainer(model, arguments(tmp_path, "simple"), rows(), processing_class=tokenizer)
    trainer.save_model()
    for layer in masked_layers(model).values():
        nn.init.normal_(layer.maskpro_theta["default"], std=20)
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "My own words.\n")
    before = contents(tmp_path)
    after = on_disks_of_every_size(tmp_path, trainer.save_model, step)
    assert after.keys() == before.keys()
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert after["README.md"].endswith(b"My own words.\n")


def test_a_full_disk_leaves_the_earlier_card_when_a_checkpoint_is_pushed(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *_: None)
    model = get_peft_model(llama, MaskProConfig())
    trainer = MaskProTrainer(model, arguments(tmp_path / "run", "simple"), train_dataset=rows())
    trainer.save_model()
    trainer.save_model(str(tmp_path / "checkpoint"))
    card = (tmp_path / "run" / "README.md").read_text()
    (tmp_path / "checkpoint" / "README.md").write_text(card + "A later one.\n")
    with pytest.raises(OSError, match="File too large"), largest_file(1000):
        trainer._push_from_checkpoint(str(tmp_path / "checkpoint"))
    assert (tmp_path / "run" / "README.md").read_text() == card
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint"))
    assert "A later one." in (tmp_path / "run" / "README.md").read_text()
