"""`simple` with its optimizer in the backward pass: the same rule as a plain loop, in less memory."""

from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_maskpro import MaskProConfig, MaskProTrainer
from hf_maskpro.learning.lean import STATE_NAME, OptimizerInBackward, _update_kernel, most_of_root
from hf_maskpro.subset import Kernel, random_keys
from hf_maskpro.tuner import masked_layers

from ..conftest import tiny_llama
from .test_trainer import NotANumber, Spoiled, arguments, recover, rows, thetas


def lean(folder, **options):
    return arguments(folder, "simple", optimizer_in_backward=True, **options)


def masked_llama(**options):
    torch.manual_seed(7)
    return get_peft_model(tiny_llama(), MaskProConfig(**{"init_mask": "random", "logit_scale": 2.0} | options))


class Gradients(TrainerCallback):
    """Notes which logits have a gradient when a step's backward pass is over."""

    def __init__(self):
        self.left = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.left += [name for name, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_within_the_backward_pass_the_steps_are_those_after_it(tmp_path, monkeypatch, gradient_checkpointing):
    def train(folder):
        args = lean(
            folder, max_steps=5, per_device_train_batch_size=8, warmup_steps=2,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        trainer = MaskProTrainer(masked_llama(logits_dtype="bfloat16"), args, train_dataset=rows())
        trainer.train()
        return thetas(trainer.model)

    within = train(tmp_path / "within")

    def move_all(self):
        # Called before the optimizer's own step, when the backward pass is over.
        for index, theta in enumerate(self.thetas):
            self._move(index, theta)

    monkeypatch.setattr(OptimizerInBackward, "watch", lambda self: [])
    monkeypatch.setattr(OptimizerInBackward, "take_norm", move_all)
    after = train(tmp_path / "after")
    assert any(theta.abs().max() > 0 for theta in within)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(within, after, strict=True))


def state(shape):
    return torch.zeros(shape, dtype=torch.int8), torch.zeros(shape, dtype=torch.uint8), torch.zeros(())


def update(theta, gradient, shares, codes, updates, rate=1.0, betas=(0.9, 0.98), epsilon=0.0, kept=1.0, seed=1):
    """One step of the kernel."""
    norm = torch.linalg.vector_norm(gradient)
    settings = [torch.tensor(value) for value in (rate, *betas, epsilon, kept, most_of_root(*betas))]
    keys = random_keys(seed, 0, theta.device)
    _update_kernel()(theta.numel(), theta, gradient, shares, codes, updates, norm, settings, keys)


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.9, 0.999), (0.0, 0.98), (0.5, 0.9999)])
@pytest.mark.parametrize("compiles", [False, True])
def test_its_steps_are_those_of_adamw_but_for_rounding(monkeypatch, compiles, betas):
    """For gradients of 1e-6 to 10 that lean to one side, and while they fade to a thousandth."""
    monkeypatch.setattr(Kernel, "compiles", compiles)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 1, 64, dtype=torch.float64).repeat(256, 1)
    exact = torch.nn.Parameter(torch.zeros(256, 64, dtype=torch.float64))
    optimizer = torch.optim.AdamW([exact], lr=1.0, betas=betas, eps=1e-12, weight_decay=0.01)
    (shares, codes, updates), errors, steps = state((256, 64)), [], []
    for t in range(1, 401):
        size = sizes if t <= 200 else sizes / 1000
        gradient = size * (torch.randn(256, 64, generator=generator, dtype=torch.float64) + 0.3)
        theta, before = exact.detach().float(), exact.detach().clone()
        start = theta.clone()
        exact.grad = gradient
        optimizer.step()
        update(theta, gradient.float(), shares, codes, updates, betas=betas, epsilon=1e-12, kept=0.99, seed=t)
        steps.append(exact.detach() - before)
        errors.append((theta - start).double() - steps[-1])
    assert updates == 400
    assert codes.min() > 0
    assert codes.max() < 255
    for span, spread in ((slice(0, 10), 0.1), (slice(100, 200), 0.35), (slice(390, 400), 0.5)):
        error, step = torch.cat(errors[span]), torch.cat(steps[span])
        assert error.std() < spread * step.std()
        assert error.mean().abs() < 0.03 * step.abs().mean()


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.9, 0.9999), (0.5, 0.999)])
def test_a_first_moment_is_as_large_as_can_be(betas):
    """After gradients that grow as the bound has it, the first moment is still kept whole."""
    (shares, codes, updates), theta = state((4, 8)), torch.zeros(4, 8)
    growth = betas[1] / betas[0]
    for t in range(1, 21):
        update(theta, torch.full((4, 8), 1e-6 * growth**t), shares, codes, updates, rate=0.0, betas=betas, seed=t)
    known = most_of_root(*betas) * (shares.double() / 127).square() * torch.exp2((codes.double() / 3 - 68) / 2)
    first = 0.0
    for t in range(1, 21):
        first = betas[0] * first + (1 - betas[0]) * 1e-6 * growth**t
    torch.testing.assert_close(known, torch.full((4, 8), first, dtype=torch.float64), rtol=0.1, atol=0)


@pytest.mark.parametrize("betas", [(0.99, 0.98), (0.0, 0.0)])
def test_betas_without_a_bound_are_refused(tmp_path, betas):
    args = lean(tmp_path, adam_beta1=betas[0], adam_beta2=betas[1])
    with pytest.raises(ValueError, match=rf"adam_beta1 {betas[0]} and adam_beta2 {betas[1]}; the square of the first"):
        MaskProTrainer(masked_llama(), args, train_dataset=rows())


def test_a_bad_batch_moves_logits_no_further_than_adamw_does():
    (shares, codes, updates), theta = state((4, 8)), torch.zeros(4, 8)
    for t in range(1, 21):
        update(theta, torch.full((4, 8), 1e-6 * (-1) ** t), shares, codes, updates, rate=0.1, seed=t)
    before = theta.clone()
    update(theta, torch.full((4, 8), 1e-3), shares, codes, updates, rate=0.1)
    assert (before - theta).min() > 0
    # (1 - beta1) / (1 - beta1^21) over the root of (1 - beta2) / (1 - beta2^21), times the rate.
    torch.testing.assert_close(before - theta, torch.full((4, 8), 0.0466), rtol=0.02, atol=0.0)


def test_a_gradient_that_is_not_finite_changes_nothing():
    theta, codes, updates = torch.ones(4, 8), torch.full((4, 8), 77, dtype=torch.uint8), torch.ones(())
    shares, gradient = torch.full((4, 8), -7, dtype=torch.int8), torch.ones(4, 8)
    gradient[2, 3] = torch.nan
    update(theta, gradient, shares, codes, updates)
    assert theta.eq(1).all()
    assert shares.eq(-7).all()
    assert codes.eq(77).all()
    assert updates == 1


def test_bfloat16_logits_move_by_what_is_right_on_average():
    """By a step that rounding to nearest would lose at every logit."""
    theta = torch.full((256, 256), 4.0, dtype=torch.bfloat16)
    update(theta, torch.ones(256, 256), *state((256, 256)), rate=0.004)
    assert theta.unique().numel() == 2
    assert (4 - theta.double().mean()).item() == pytest.approx(0.004, rel=0.1)


def test_logits_decay_to_the_start():
    (shares, codes, updates), theta = state((4, 8)), torch.ones(4, 8)
    update(theta, torch.zeros(4, 8), shares, codes, updates, epsilon=1e-8, kept=0.9)
    torch.testing.assert_close(theta, torch.full((4, 8), 0.9))
    assert codes.eq(0).all()
    assert shares.eq(0).all()


@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, logits_dtype):
    def run(folder, resume):
        model = masked_llama(logits_dtype=logits_dtype)
        args = lean(folder, max_steps=6, save_strategy="steps", save_steps=3)
        trainer = MaskProTrainer(model, args, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer.estimator.in_backward

    expected, state = run(tmp_path / "run", None)
    model, resumed = run(tmp_path / "again", str(tmp_path / "run" / "checkpoint-3"))
    assert any(theta.abs().max() > 0 for theta in thetas(expected))
    for mine, theirs in zip(
        [*thetas(expected), *state.first_moments, *state.second_moments, *state.updates],
        [*thetas(model), *resumed.first_moments, *resumed.second_moments, *resumed.updates],
        strict=True,
    ):
        assert torch.equal(mine, theirs)


class Interrupted(Exception):
    pass


class StopsWithinAStep(TrainerCallback):
    """Fails in a backward pass, when the logits of all layers but the first have moved."""

    def __init__(self, model):
        self.theta = next(iter(masked_layers(model).values())).maskpro_theta["default"]

    def on_step_begin(self, args, state, control, **kwargs):
        def fail(gradient):
            hook.remove()
            raise Interrupted

        if state.global_step == 4 and self.theta is not None:
            hook, self.theta = self.theta.register_hook(fail), None


def test_a_trainer_that_was_interrupted_within_a_step_resumes_with_the_same_bits(tmp_path):
    def trainer(folder):
        args = lean(folder, max_steps=6, save_strategy="steps", save_steps=3)
        return MaskProTrainer(masked_llama(), args, train_dataset=rows())

    whole = trainer(tmp_path / "whole")
    whole.train()
    again = trainer(tmp_path / "again")
    again.add_callback(StopsWithinAStep(again.model))
    with pytest.raises(Interrupted):
        again.train()
    again.train(resume_from_checkpoint=True)
    one, other = whole.estimator.in_backward, again.estimator.in_backward
    for mine, theirs in zip(
        [*thetas(whole.model), *one.first_moments, *one.second_moments, *one.updates],
        [*thetas(again.model), *other.first_moments, *other.second_moments, *other.updates],
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_of_the_other_optimizer_is_refused(tmp_path):
    def trainer(folder, **options):
        args = arguments(folder, "simple", max_steps=2, save_strategy="steps", save_steps=1, **options)
        return MaskProTrainer(masked_llama(), args, train_dataset=rows())

    trainer(tmp_path / "plain").train()
    trainer(tmp_path / "lean", optimizer_in_backward=True).train()
    with pytest.raises(ValueError, match=r"has the optimizer adamw.*, and this run 8-bit AdamW in backward"):
        trainer(tmp_path / "a", optimizer_in_backward=True).train(str(tmp_path / "plain" / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"has the optimizer 8-bit AdamW.* betas 0\.9 and 0\.98, and this run adamw"):
        trainer(tmp_path / "b").train(str(tmp_path / "lean" / "checkpoint-1"))
    again = trainer(tmp_path / "d", optimizer_in_backward=True, adam_beta2=0.999)
    with pytest.raises(ValueError, match=r"betas 0\.9 and 0\.98, and this run .* betas 0\.9 and 0\.999; resume"):
        again.train(str(tmp_path / "lean" / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"has the optimizer adamw.*, and this run adafactor; resume with the same"):
        trainer(tmp_path / "c", optim="adafactor").train(str(tmp_path / "plain" / "checkpoint-1"))


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path):
    model = masked_llama(modules_to_save=["lm_head"])
    args = lean(tmp_path, max_steps=8, per_device_train_batch_size=1, logging_steps=8)
    trainer = NotANumber(model, args, train_dataset=Spoiled({2, 5}))
    trainer.train()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(theta.abs().max() > 0 for theta in thetas(model))
    assert trainer.state.log_history[0]["skipped"] == 2
    assert [count.item() for count in trainer.estimator.in_backward.updates] == [6] * len(thetas(model))


def test_several_such_updates_in_a_row_stop_the_run(tmp_path):
    args = lean(tmp_path, max_steps=8, per_device_train_batch_size=1, train_sampling_strategy="sequential")
    trainer = NotANumber(masked_llama(), args, train_dataset=Spoiled({2, 3, 4, 5, 6, 7}))
    with pytest.raises(FloatingPointError, match=r"^5 updates in a row were not finite, the last at step 6"):
        trainer.train()
    assert all(theta.isfinite().all() for theta in thetas(trainer.model))


def test_one_layer_that_is_not_finite_does_not_keep_others_from_moving(tmp_path):
    model = masked_llama()
    args = lean(tmp_path, max_steps=3, warmup_steps=0, logging_steps=3, gradient_checkpointing=False)
    trainer = MaskProTrainer(model, args, train_dataset=rows())
    first = trainer.adapter.layers[0].maskpro_theta["default"]
    first.register_hook(lambda gradient: gradient * torch.inf)
    trainer.train()
    still, *others = thetas(model)
    assert still.eq(0).all()
    assert all(theta.abs().max() > 0 for theta in others)
    assert trainer.state.log_history[0]["skipped"] == 3


def test_modules_to_save_have_their_own_optimizer(tmp_path):
    model = masked_llama(modules_to_save=["lm_head"])
    trainer = MaskProTrainer(model, lean(tmp_path, max_steps=2, warmup_steps=0), train_dataset=rows())
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    before = head.detach().clone()
    trainer.train()
    assert list(trainer.optimizer.state) == [head]
    assert 0 < (head - before).abs().max() < 1e-3
    assert all(theta.abs().max() > 0 for theta in thetas(model))


def test_it_holds_two_bytes_per_logit_and_no_gradient(tmp_path):
    gradients, model = Gradients(), masked_llama(logits_dtype="bfloat16")
    trainer = MaskProTrainer(model, lean(tmp_path, max_steps=2), train_dataset=rows(), callbacks=[gradients])
    trainer.train()
    assert trainer.args.gradient_checkpointing
    assert gradients.left == []
    assert trainer.optimizer.state == {}
    state = trainer.estimator.in_backward
    weights = sum(theta.numel() for theta in thetas(model))
    held = [*thetas(model), *(layer.maskpro_mask["default"] for layer in trainer.adapter.layers)]
    held += [*state.first_moments, *state.second_moments, *state.updates]
    assert all(not isinstance(value, torch.Tensor) for value in vars(state).values())
    assert sum(tensor.nbytes for tensor in held) <= 4.3 * weights


def test_it_recovers_what_a_random_mask_lost_as_the_usual_optimizer_does(tmp_path):
    left = {}
    for where in (False, True):
        shares = []
        for seed in range(3):
            before, after = recover(tmp_path, seed, "bfloat16", optimizer_in_backward=where)
            shares.append(after / before)
        left[where] = torch.tensor(shares)
    assert left[True].max() < 0.5
    assert left[True].mean() < left[False].mean() + 2 * left[False].std() + 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, not 1"),
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1.0, not 0"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MaskProTrainer(masked_llama(), lean(tmp_path, **options), train_dataset=rows())


def test_several_processes_and_an_optimizer_are_refused(tmp_path, monkeypatch):
    optimizers = (torch.optim.SGD(masked_llama().parameters(), lr=1.0), None)
    with pytest.raises(ValueError, match="drop optimizers"):
        MaskProTrainer(masked_llama(), lean(tmp_path), train_dataset=rows(), optimizers=optimizers)
    args = lean(tmp_path)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="one process on one device, not 2"):
        MaskProTrainer(masked_llama(), args, train_dataset=rows())


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_is_over_moves_nothing_any_more(tmp_path, fails):
    model = get_peft_model(tiny_llama(), MaskProConfig(logit_scale=4.0))

    class Stops(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if fails:
                raise KeyboardInterrupt

    args = arguments(tmp_path, "simple", optimizer_in_backward=True, max_steps=2)
    trainer = MaskProTrainer(model, args, train_dataset=rows(), callbacks=[Stops()])
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        trainer.train()
    before = thetas(model)
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(before, thetas(model), strict=True))
    assert all(layer.maskpro_theta["default"].grad is not None for layer in masked_layers(model).values())


def test_the_other_estimators_refuse_it(tmp_path):
    with pytest.raises(ValueError, match="is for estimator='simple', not 'residual'"):
        arguments(tmp_path, "residual", optimizer_in_backward=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.updates", float("nan")),
        ("0.updates", -1.0),
        ("0.first_moment", float("nan")),
        ("0.second_moment", float("nan")),
    ],
)
def test_a_state_that_no_run_writes_is_refused(tmp_path, name, value):
    def trainer():
        args = lean(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        return MaskProTrainer(masked_llama(), args, train_dataset=rows())

    trainer().train()
    path = tmp_path / "checkpoint-1" / STATE_NAME
    state = load_file(path)
    save_file(state | {name: torch.full_like(state[name], value, dtype=torch.float32)}, path)
    said = f"has a {name} that no run writes" if "updates" in name else "does not hold the state of these layers"
    with pytest.raises(ValueError, match=said):
        trainer().train(resume_from_checkpoint=str(path.parent))
